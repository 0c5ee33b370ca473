"""Decoding what callers send, right and wrong; encoding what they get."""

from __future__ import annotations

import asyncio
import io
import os
import struct
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from remix.audio import Audio
from remix.audio_codec import Format, Limits, decode, encode
from remix.errors import InvalidAudio, LimitExceeded
from remix.pipeline import to_mixture

T = TypeVar("T")

LIMITS = Limits(wall_s=30, cpu_s=20)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def sound(channels: int = 2, duration_s: float = 1.0, rate_hz: int = 44_100) -> NDArray[np.float32]:
    """[C, T]: a tone of another pitch in each channel."""
    at = np.arange(round(duration_s * rate_hz)) / rate_hz
    tones = [0.3 * np.sin(2 * np.pi * (220 + 55 * c) * at) for c in range(channels)]
    return np.array(tones, np.float32)


def write(path: Path, samples: NDArray[Any], rate_hz: int, **options: Any) -> Path:
    soundfile.write(path, samples.T, rate_hz, **options)
    return path


def write_with_ffmpeg(path: Path, codec: str, blocks: int, rate_hz: int = 48_000) -> Path:
    """A stereo file of `blocks` blocks of 0.02 s."""
    size = rate_hz // 50
    samples = sound(2, 1, rate_hz)
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(codec, rate_hz, layout="stereo")
        for at in range(blocks):
            block = np.ascontiguousarray(samples[:, at % 50 * size : (at % 50 + 1) * size])
            frame = av.AudioFrame.from_ndarray(block, "fltp", "stereo")
            frame.sample_rate, frame.pts = rate_hz, at * size
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def wav_bytes(
    data: bytes, *, data_size: int | None = None, riff_size: int | None = None, channels: int = 2
) -> bytes:
    """A 16-bit WAV file at 44.1 kHz whose header says what it is told to say."""
    data_size = len(data) if data_size is None else data_size
    riff_size = 36 + len(data) if riff_size is None else riff_size
    width = 2 * channels
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", riff_size, b"WAVE", b"fmt ", 16, 1, channels,
                       44_100, 44_100 * width, width, 16)  # fmt: skip
    return head + struct.pack("<4sI", b"data", data_size) + data


def song_file(folder: Path, kind: str) -> Path:
    """A good file of each kind."""
    if kind in ("opus", "m4a", "aac"):
        codec = "libopus" if kind == "opus" else "aac"
        return write_with_ffmpeg(folder / f"song.{kind}", codec, 50)
    if kind == "alac":
        return write_with_ffmpeg(folder / "song.m4a", "alac", 50)
    subtype = {"float": "FLOAT", "double": "DOUBLE", "24": "PCM_24", "8": "PCM_U8"}.get(kind)
    if subtype:
        return write(folder / "song.wav", sound(), 48_000, subtype=subtype)
    if kind == "extensible":
        return write(folder / "song.wav", sound(), 48_000, format="WAVEX", subtype="PCM_16")
    if kind == "rf64":
        return write(folder / "song.wav", sound(), 48_000, format="RF64", subtype="PCM_16")
    return write(folder / f"song.{kind}", sound(), 48_000)


KINDS = ("wav", "float", "double", "24", "8", "extensible", "rf64", "flac", "mp3", "ogg", "opus",
         "m4a", "alac", "aac")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_a_good_file_is_its_sound(tmp_path: Path, kind: str) -> None:
    path = song_file(tmp_path, kind)
    got = run(decode(path, LIMITS))
    is_lossy = kind in ("mp3", "ogg", "opus", "m4a", "aac")
    assert got.samples.dtype == np.float32
    assert got.samples.shape[0] == 2
    # Lossy streams may keep the encoder's padding: 2 * 2048 samples of AAC and a packet.
    assert abs(got.duration_s - got.samples.shape[1] / got.sample_rate_hz) < 1e-9
    expected_s = 44_100 / 48_000 if path.suffix == ".wav" or kind in ("flac", "mp3", "ogg") else 1.0
    assert abs(got.duration_s - expected_s) < (0.15 if is_lossy else 1e-6)
    # The tone of 220 Hz carries the left channel whatever the format did to it.
    middle = got.samples[0, 8_000:40_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    peak_hz = spectrum.argmax() * got.sample_rate_hz / len(middle)
    written_hz = 220 * (48_000 / 44_100 if expected_s < 1 else 1)
    assert abs(peak_hz - written_hz) < 3  # two bins of 1.5 Hz
    assert 0.2 < np.abs(middle).max() < 0.4


def test_decode_of_lossless_file_is_exact(tmp_path: Path) -> None:
    samples = sound()
    path = write(tmp_path / "song.wav", samples, 44_100, subtype="FLOAT")
    assert np.array_equal(run(decode(path)).samples, samples)


@pytest.mark.parametrize("channels", range(1, 9))
def test_decode_of_any_channels_is_mono_or_stereo(tmp_path: Path, channels: int) -> None:
    path = write(tmp_path / "song.wav", sound(channels, 0.1), 44_100)
    assert run(decode(path)).samples.shape == (min(channels, 2), 4_410)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 96_000, 192_000])
def test_decode_resamples_while_it_streams(tmp_path: Path, rate_hz: int) -> None:
    path = write(tmp_path / "song.wav", sound(2, 2.0, rate_hz), rate_hz)
    got = run(decode(path, new_hz=44_100))
    assert got.sample_rate_hz == 44_100
    assert got.samples.shape == (2, 88_200)
    expected = sound(2, 2.0)
    # 16-bit file: 3e-5, and the resampler's 80 dB.
    assert np.abs(got.samples - expected)[:, 2_000:-2_000].max() < 5e-4


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_decode_at_the_mixs_rate_is_the_mixture(
    tmp_path: Path, rate_hz: int, channels: int
) -> None:
    path = write(tmp_path / "song.wav", sound(channels, 1.2345, rate_hz), rate_hz)
    whole = to_mixture(run(decode(path)))
    streamed = to_mixture(run(decode(path, new_hz=44_100)))
    length = sound(channels, 1.2345, rate_hz).shape[1]
    assert streamed.samples.shape == whole.samples.shape == (2, -(-length * 44_100 // rate_hz))
    # The same sums of floats, in blocks of another size.
    assert np.abs(streamed.samples - whole.samples).max() < 1e-6


def test_decode_of_a_file_without_a_name_is_its_sound(tmp_path: Path) -> None:
    path = write(tmp_path / "song.wav", sound(), 44_100)
    with path.open("rb") as file:
        path.unlink()
        got = run(decode(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")))
    assert got.samples.shape == (2, 44_100)


@pytest.mark.parametrize("unknown", [0, 0xFFFFFFFF])
def test_decode_of_wav_written_to_a_pipe_runs_to_the_end(tmp_path: Path, unknown: int) -> None:
    data = (sound() * 32_767).astype("<i2").T.tobytes()
    path = tmp_path / "song.wav"
    path.write_bytes(wav_bytes(data, data_size=unknown, riff_size=unknown))
    assert run(decode(path)).samples.shape == (2, 44_100)


def test_decode_takes_what_the_file_is_and_not_what_it_is_called(tmp_path: Path) -> None:
    path = write(tmp_path / "song.flac", sound(), 44_100)
    assert run(decode(path.rename(tmp_path / "song.mp3"))).samples.shape == (2, 44_100)


def a_whole_mp3() -> bytes:
    return encode(Audio(sound(2, 3.0), 44_100), "mp3")


def frame_start(data: bytes, number: int) -> int:
    """Where the frame of that number begins, in an MP3 of 320 kbit/s at 44.1 kHz."""
    at = 0
    for _ in range(number):
        at += 144 * 320_000 // 44_100 + (data[at + 2] >> 1 & 1)
    return at


def an_mp3_without_info() -> bytes:
    """Frames of 417 or 418 bytes at 128 kbit/s, without the encoder's first frame."""
    file = io.BytesIO()
    soundfile.write(file, sound(2, 3.0).T, 44_100, format="MP3", bitrate_mode="CONSTANT")
    data = file.getvalue()
    second = data.index(data[:2], 4)
    return data[second:]


def damaged(data: bytes) -> bytes:
    """Most of the bytes after the header are noise."""
    noise = np.random.default_rng(0).integers(0, 255, len(data) - 2000, np.uint8).tobytes()
    return data[:2000] + noise


def flac_bytes() -> bytes:
    return encode(Audio(sound(2, 3.0), 44_100), "flac")


def ogg_bytes() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(2, 3.0).T, 44_100, format="OGG")
    return file.getvalue()


def m4a_bytes(folder: Path) -> bytes:
    return write_with_ffmpeg(folder / "whole.m4a", "aac", 150).read_bytes()


PCM = bytes(4 * 44_100)

WRONG: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda _: b"", r"empty \(0 bytes\).*Send an audio file"),
    "text": (lambda _: b"This is no song.\n" * 999, "no audio that is known here.*This is no"),
    "playlist": (lambda _: b"#EXTM3U\n/etc/passwd\n", "no audio that is known here"),
    "concat": (lambda _: b"ffconcat version 1.0\nfile /etc/passwd\n", "no audio that is known"),
    "mp3 cut in a frame": (lambda _: an_mp3_without_info()[:-100], "truncated: its last frame"),
    "mp3 cut in half": (lambda _: a_whole_mp3()[: len(a_whole_mp3()) // 2], "truncated"),
    "mp3 cut between frames": (
        lambda _: (whole := a_whole_mp3())[: frame_start(whole, 30)],
        r"truncated: its header promises \d+ frames, it has \d+",
    ),
    "mp3 of noise": (lambda _: damaged(a_whole_mp3()), "truncated|damaged"),
    "flac cut": (lambda _: flac_bytes()[:-9_000], "truncated|damaged"),
    "flac of noise": (lambda _: damaged(flac_bytes()), "damaged|truncated|0 samples"),
    "ogg cut": (lambda _: ogg_bytes()[:-500], "OGG file is truncated"),
    "m4a cut": (lambda folder: m4a_bytes(folder)[:-5_000], "damaged or cut"),
    "wav that promises more": (
        lambda _: wav_bytes(PCM, data_size=9_999_999),
        "promises 9999999 bytes of samples, the file has 176400",
    ),
    "wav that promises nearly 4 GB": (
        lambda _: wav_bytes(PCM, data_size=0xFFFFFFF0),
        "promises 4294967280 bytes",
    ),
    "wav that promises less": (
        lambda _: wav_bytes(bytes(8 * 44_100), data_size=1_000),
        "promises 1000 bytes of samples, and 351800 bytes of no known kind follow",
    ),
    "wav of nonsense": (lambda _: wav_bytes(PCM, channels=0), "header is nonsense"),
    "wav cut in the header": (lambda _: wav_bytes(PCM)[:30], "promises 16 bytes, the file ends"),
    "wav without data": (lambda _: wav_bytes(PCM)[:36], "no samples"),
    "0 samples": (lambda _: wav_bytes(b""), "0 samples"),
    "0 samples of unknown length": (lambda _: wav_bytes(b"", data_size=0xFFFFFFFF), "0 samples"),
}


@pytest.mark.parametrize("name", WRONG)
def test_decode_of_a_wrong_file_says_what_is_wrong(tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    path = tmp_path / "song.mp3"
    path.write_bytes(make(tmp_path))
    with pytest.raises(InvalidAudio, match=message) as caught:
        run(decode(path, LIMITS))
    error = caught.value
    assert error.value not in (None, "")
    assert error.limit
    assert error.remedy
    assert str(error).endswith(error.remedy)


def with_codec(data: bytes, tag: int) -> bytes:
    """A WAV file whose samples are coded in another way."""
    return data[:20] + struct.pack("<H", tag) + data[22:]


@pytest.mark.parametrize("tag", [0x02, 0x5BAD])
def test_decode_of_an_unknown_code_is_refused(tmp_path: Path, tag: int) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(with_codec(wav_bytes(PCM), tag))
    with pytest.raises(InvalidAudio, match=r"coded as|damaged"):
        run(decode(path, LIMITS))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_of_a_file_damaged_anywhere_is_sound_or_a_refusal(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    path = song_file(tmp_path, kind)
    data = bytearray(path.read_bytes())
    header = rng.integers(0, 200, 5).tolist()
    for at in [*header, *rng.integers(0, len(data), 20).tolist()]:
        data[at] = int(rng.integers(256))
    path.write_bytes(data)
    try:
        got = run(decode(path, LIMITS))
    except (InvalidAudio, LimitExceeded) as error:
        assert "made the decoder stop" not in str(error)
    else:
        assert np.isfinite(got.samples).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [slice(None), slice(66_150, 66_151)])
def test_decode_of_what_is_no_number_is_refused(tmp_path: Path, value: float, where: slice) -> None:
    samples = sound(2, 2.0)
    samples[1, where] = value
    path = write(tmp_path / "song.wav", samples, 44_100, subtype="FLOAT")
    at = "0.000" if where.start is None else "1.500"
    with pytest.raises(InvalidAudio, match=f"not numbers .*first at {at} s"):
        run(decode(path))


def test_decode_of_nine_channels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "song.wav", sound(9, 0.1), 44_100)
    with pytest.raises(LimitExceeded, match=r"9 channels; at most 8.*Mix it down"):
        run(decode(path))


@pytest.mark.parametrize("rate_hz", [4_000, 384_000])
def test_decode_of_a_rate_out_of_range_is_refused(tmp_path: Path, rate_hz: int) -> None:
    path = write(tmp_path / "song.wav", sound(1, 0.1, rate_hz), rate_hz)
    with pytest.raises(LimitExceeded, match=f"{rate_hz} Hz; 8000 to 192000 Hz.*Resample"):
        run(decode(path))


def crc_of_byte(byte: int) -> int:
    crc = byte << 24
    for _ in range(8):
        crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return crc


CRC_TABLE = [crc_of_byte(byte) for byte in range(256)]


def ogg_crc(page: bytes) -> int:
    """Source: RFC 3533, section 6: polynomial 0x04c11db7, not reflected."""
    crc = 0
    for byte in page:
        crc = crc << 8 & 0xFFFFFFFF ^ CRC_TABLE[crc >> 24 ^ byte]
    return crc


def ogg_page(kind: int, granule: int, number: int, packets: list[bytes]) -> bytes:
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, kind, granule, 7, number, 0, len(packets))
    page = head + bytes(len(packet) for packet in packets) + b"".join(packets)
    return page[:22] + struct.pack("<I", ogg_crc(page)) + page[26:]


def hours_of_silence(path: Path, hours: float, stated_s: float) -> Path:
    """Silence as Opus, one packet of 0.12 s over and over, whose last page states `stated_s`."""
    # Code 3 of RFC 6716, section 3.2.5: six frames of 20 ms, one byte each, of a CELT stream
    # whose first bit says "silence".
    packet = bytes([0xFF, 6]) + b"\xff" * 6
    pages = round(hours * 3600 / 0.12 / 255)
    head = struct.pack("<8sBBHIHB", b"OpusHead", 1, 2, 0, 48_000, 0, 0)
    tags = b"OpusTags" + bytes(8)
    stream_pages = [ogg_page(2, 0, 0, [head]), ogg_page(0, 0, 1, [tags])]
    for at in range(pages):
        granule = round((at + 1) / pages * stated_s * 48_000)
        kind = 4 if at == pages - 1 else 0
        stream_pages.append(ogg_page(kind, granule, at + 2, [packet] * 255))
    path.write_bytes(b"".join(stream_pages))
    return path


def memory_peak_kib() -> int:
    """Most memory that this process has held, KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_decode_of_three_hours_in_a_megabyte_stops_at_once(tmp_path: Path) -> None:
    path = hours_of_silence(tmp_path / "song.opus", hours=3, stated_s=3 * 3600)
    assert path.stat().st_size < 1_000_000
    before_kib, started_s = memory_peak_kib(), time.monotonic()
    with pytest.raises(LimitExceeded, match=r"10800 s long; at most 600 s.*Cut it first"):
        run(decode(path))
    assert memory_peak_kib() - before_kib < 50_000
    assert time.monotonic() - started_s < 10


def test_decode_of_hours_behind_a_header_that_hides_them_stops_at_the_limit(tmp_path: Path) -> None:
    path = hours_of_silence(tmp_path / "song.opus", hours=3, stated_s=10)
    before_kib = memory_peak_kib()
    with pytest.raises(LimitExceeded, match="longer than 60 s, the most that is taken"):
        run(decode(path, replace(LIMITS, duration_s=60)))
    # 60 s of stereo floats at 48 kHz are 23 MB; pipe and blocks come on top.
    assert memory_peak_kib() - before_kib < 80_000


def test_decode_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    path = write(tmp_path / "song.wav", sound(), 44_100)
    with pytest.raises(LimitExceeded, match="longer than 0 s to decode"):
        run(decode(path, replace(LIMITS, wall_s=0.01)))


def test_decode_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "song.wav", sound(2, 30.0), 44_100)
    with pytest.raises((LimitExceeded, InvalidAudio), match="decode"):
        run(decode(path, replace(LIMITS, memory_bytes=200 << 20)))


def test_decode_of_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAudio, match="There is no file"):
        run(decode(tmp_path / "none.wav"))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> list[str]:
    """Processes, dead ones too, whose parent is this one."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [stat for stat in stats if stat.rpartition(")")[2].split()[1] == str(os.getpid())]


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3, 0.6])
def test_decode_that_is_cancelled_leaves_nothing(tmp_path: Path, after_s: float) -> None:
    path = write(tmp_path / "song.wav", sound(2, 120.0), 44_100)

    async def cancel_twice() -> None:
        before = open_files()
        decoding = asyncio.create_task(decode(path))
        await asyncio.sleep(after_s)
        for _ in range(2):
            decoding.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([decoding])
        # A second cancellation leaves the clean-up to run on by itself: give it its moment.
        for _ in range(100):
            if open_files() <= before and not children():
                break
            await asyncio.sleep(0.05)
        assert open_files() <= before
        assert not children()

    run(cancel_twice())
    assert [entry.name for entry in tmp_path.iterdir()] == ["song.wav"]


def test_decode_many_times_leaves_no_open_file_and_no_process(tmp_path: Path) -> None:
    good = write(tmp_path / "song.wav", sound(), 44_100)
    bad = tmp_path / "text.mp3"
    bad.write_bytes(b"text")

    async def decode_all() -> None:
        before = open_files()
        for _ in range(3):
            got = await asyncio.gather(
                decode(good), decode(bad), decode(good), return_exceptions=True
            )
            assert [type(result) for result in got] == [Audio, InvalidAudio, Audio]
        assert open_files() <= before
        assert not children()

    run(decode_all())


@pytest.mark.parametrize(
    ("form", "tolerance"),
    # A float, half a step of 16 and of 24 bits (with the clipped last step), MP3 at 320 kbit/s.
    [("wav", 0), ("wav16", 2**-15), ("flac", 2**-23), ("mp3", 0.02)],
)
def test_decode_of_encode_is_the_same_sound(tmp_path: Path, form: Format, tolerance: float) -> None:
    audio = Audio(sound(2, 1.0), 44_100)
    path = tmp_path / "song"
    path.write_bytes(encode(audio, form))
    got = run(decode(path))
    assert got.sample_rate_hz == 44_100
    assert got.samples.shape == audio.samples.shape
    inner = slice(3_000, -3_000) if form == "mp3" else slice(None)
    assert np.abs(got.samples - audio.samples)[:, inner].max() <= tolerance


def test_encode_of_floats_has_no_time_stamp() -> None:
    """A PEAK chunk holds the time of day: the same sound would be other bytes a second later."""
    assert b"PEAK" not in encode(Audio(np.ones((2, 8), np.float32), 44_100), "wav")[:80]


def test_encode_of_integers_clips_and_does_not_wrap(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    path.write_bytes(encode(Audio(np.full((1, 10), 2.0, np.float32), 44_100), "wav16"))
    assert run(decode(path)).samples.min() > 0.99
