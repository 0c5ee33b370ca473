"""bytes of a file -> its container, and whether its header tells the truth about its length.

Pure reading of bytes: nothing is decoded here. A decoder takes a shortened file without a word;
these checks are what tells a caller that the upload was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Literal

from remix.errors import InvalidAudio

Container = Literal["wav", "flac", "mp3", "ogg", "mov", "aac"]
"""FFmpeg's names of the demuxers that may be opened: no playlist, no concatenation, no network."""

Bytes = bytes | mmap

ACCEPTED = "WAV, FLAC, MP3, OGG (Vorbis, Opus), M4A or AAC"

EXPORT_AGAIN = "Export it again."

UPLOAD_WHOLE = "Upload the whole file."

_SEARCHED_BYTES = 1 << 16
"""How far into a file its first MPEG frame may lie, after a tag or padding."""


def sniff(data: Bytes) -> Container:
    """The container, by magic bytes: what the file is called does not matter.

    Raises:
        InvalidAudio: an empty file, or none of the accepted containers.
    """
    if len(data) == 0:
        raise InvalidAudio(
            "The file is empty (0 bytes); at least 1 is needed.",
            value=0,
            limit=1,
            remedy="Send an audio file.",
        )
    start = _after_id3(data)
    head = data[start : start + 12]
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "ogg"
    if head[4:8] == b"ftyp":
        return "mov"
    if _is_adts(data, start):
        return "aac"
    if _first_mpeg_frame(data, start) is not None:
        return "mp3"
    start_of_file = repr(bytes(data[:16]))
    raise InvalidAudio(
        f"The file is no audio that is known here: it begins with {start_of_file}; known are "
        f"{ACCEPTED}.",
        value=start_of_file,
        limit=ACCEPTED,
        remedy="Convert it to one of these first.",
    )


def no_samples() -> InvalidAudio:
    """The refusal of a file without sound."""
    return InvalidAudio(
        "The file has 0 samples; at least 1 is needed.",
        value=0,
        limit=1,
        remedy="Send a song with sound.",
    )


def check_length(data: Bytes, container: Container) -> None:
    """Hold a header's word about its length against the file.

    Raises:
        InvalidAudio: the file is shorter or longer than its header says, or the header is
            nonsense.
    """
    if container == "wav":
        _check_wav(data)
    elif container == "mp3":
        _check_mp3(data)
    elif container == "ogg":
        _check_ogg(data)


# WAV


_UNKNOWN = 0xFFFFFFFF
"""What a program that writes to a pipe puts where the length belongs; some put 0."""


def _check_wav(data: Bytes) -> None:
    """Source: Multimedia Programming Interface 1.0 (1991), and EBU Tech 3306 for RF64."""
    at, frame_bytes, rate_hz, long_size = 12, 0, 0, None
    while at + 8 <= len(data):
        name, size = bytes(data[at : at + 4]), _u32(data, at + 4)
        if name == b"data":
            if frame_bytes == 0:
                raise InvalidAudio(
                    "The WAV file has 0 format chunks before its samples; 1 is needed.",
                    value=0,
                    limit=1,
                    remedy=EXPORT_AGAIN,
                )
            _check_wav_data(data, at + 8, long_size or size, rate_hz * frame_bytes)
            return
        if at + 8 + size > len(data):
            raise InvalidAudio(
                f"The WAV file's chunk {name!r} promises {size} bytes, the file ends after "
                f"{len(data) - at - 8}: it is damaged or cut.",
                value=len(data) - at - 8,
                limit=size,
                remedy=EXPORT_AGAIN,
            )
        if name == b"fmt ":
            frame_bytes, rate_hz = _wav_format(data, at + 8, size)
        elif name == b"ds64" and size >= 16:
            long_size = int.from_bytes(data[at + 16 : at + 24], "little")
        at += 8 + size + size % 2
    raise InvalidAudio(
        "The WAV file has no samples (0 data chunks); 1 is needed.",
        value=0,
        limit=1,
        remedy=EXPORT_AGAIN,
    )


def _wav_format(data: Bytes, at: int, size: int) -> tuple[int, int]:
    """Bytes of one sample of all channels, and the rate."""
    if size < 16:
        raise InvalidAudio(
            f"The WAV file's format chunk has {size} bytes; at least 16 are needed.",
            value=size,
            limit=16,
            remedy=EXPORT_AGAIN,
        )
    tag, channels, rate_hz = _u16(data, at), _u16(data, at + 2), _u32(data, at + 4)
    frame_bytes, bits = _u16(data, at + 12), _u16(data, at + 14)
    is_pcm = tag in (1, 3, 0xFFFE)
    if min(channels, rate_hz, frame_bytes) == 0 or (
        is_pcm and frame_bytes != channels * ((bits + 7) // 8)
    ):
        found = f"{channels} channels of {bits} bits at {rate_hz} Hz in {frame_bytes} bytes"
        needed = "at least 1 of each, and the bytes that these bits need"
        raise InvalidAudio(
            f"The WAV file's header is nonsense: {found}, instead of {needed}.",
            value=found,
            limit=needed,
            remedy=EXPORT_AGAIN,
        )
    return frame_bytes, rate_hz


def _check_wav_data(data: Bytes, at: int, promised: int, bytes_per_s: int) -> None:
    there = len(data) - at
    riff_size = _u32(data, 4)
    streamed = promised == _UNKNOWN or (promised == 0 and riff_size in (0, _UNKNOWN, at - 8))
    if streamed and there > 0:
        return
    if promised == 0 or there == 0:
        raise no_samples()
    if promised > there:
        raise InvalidAudio(
            f"The WAV file's header promises {promised} bytes of samples, the file has {there}: "
            "it was cut, or its header is wrong.",
            value=there,
            limit=promised,
            remedy="Export or upload it again.",
        )
    rest = at + promised + promised % 2
    left_over = len(data) - rest
    if left_over > bytes_per_s and not _is_chunk_name(bytes(data[rest : rest + 4])):
        raise InvalidAudio(
            f"The WAV file's header promises {promised} bytes of samples, and {left_over} bytes "
            f"of no known kind follow; at most {bytes_per_s} may: its header is wrong.",
            value=left_over,
            limit=bytes_per_s,
            remedy=EXPORT_AGAIN,
        )


def _is_chunk_name(name: bytes) -> bool:
    return all(0x20 <= byte < 0x7F for byte in name)


# MPEG audio


@dataclass(frozen=True)
class _MpegFrame:
    at: int
    size: int
    version: int
    """3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5."""
    layer: int
    """3 is layer I, 2 is layer II, 1 is layer III."""
    is_mono: bool


_MPEG1_LAYER3_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG1_LAYER2_KBPS = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_MPEG1_LAYER1_KBPS = tuple(range(0, 449, 32))
_MPEG2_LAYER1_KBPS = (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_MPEG2_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_KBPS = {
    (3, 1): _MPEG1_LAYER3_KBPS,
    (3, 2): _MPEG1_LAYER2_KBPS,
    (3, 3): _MPEG1_LAYER1_KBPS,
    (2, 3): _MPEG2_LAYER1_KBPS,
    (0, 3): _MPEG2_LAYER1_KBPS,
}
"""Source of the tables: ISO/IEC 11172-3 2.4.2.3 and 13818-3 2.4.2.3."""
_MPEG1_RATES_HZ = (44_100, 48_000, 32_000)


def _mpeg_frame(data: Bytes, at: int) -> _MpegFrame | None:
    """The frame whose header lies at `at`, whether or not the file reaches to its end."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, data[at + 1] >> 1 & 3
    bit_rate, rate, padding = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
        return None
    bits_per_s = 1000 * _KBPS.get((version, layer), _MPEG2_KBPS)[bit_rate]
    rate_hz = _MPEG1_RATES_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if layer == 3:
        size = (12 * bits_per_s // rate_hz + padding) * 4
    else:
        eighths = 72 if layer == 1 and version != 3 else 144
        size = eighths * bits_per_s // rate_hz + padding
    return _MpegFrame(at, size, version, layer, data[at + 3] >> 6 == 3)


def _first_mpeg_frame(data: Bytes, start: int) -> _MpegFrame | None:
    """The first frame that a second one of its kind follows, or that ends the file."""
    for at in range(start, min(start + _SEARCHED_BYTES, len(data) - 3)):
        frame = _mpeg_frame(data, at)
        if frame is None:
            continue
        after = _mpeg_frame(data, frame.at + frame.size)
        if after is not None and (after.version, after.layer) == (frame.version, frame.layer):
            return frame
        if at == start and frame.at + frame.size >= len(data):
            return frame
    return None


def _mpeg_frames(data: Bytes, first: _MpegFrame) -> Iterator[_MpegFrame]:
    """Every frame, skipping what lies between frames (tags, damage)."""
    frame: _MpegFrame | None = first
    while frame is not None:
        yield frame
        at = frame.at + frame.size
        frame = _mpeg_frame(data, at)
        if frame is None and at < len(data) and not _is_end_tag(data, at):
            frame = _first_mpeg_frame(data, at)
            if frame is not None and frame.at + frame.size > len(data):
                return  # a chance match in trailing bytes


def _is_end_tag(data: Bytes, at: int) -> bool:
    return bytes(data[at : at + 3]) == b"TAG" or bytes(data[at : at + 8]) in (
        b"APETAGEX",
        b"LYRICSBE",
    )


def _check_mp3(data: Bytes) -> None:
    first = _first_mpeg_frame(data, _after_id3(data))
    if first is None:
        raise InvalidAudio(
            "The MP3 file has 0 frames; at least 1 is needed: it is damaged.",
            value=0,
            limit=1,
            remedy=EXPORT_AGAIN,
        )
    promised = _xing_frames(data, first)
    count, last = 0, first
    for frame in _mpeg_frames(data, first):
        count, last = count + 1, frame
    if last.at + last.size > len(data):
        raise InvalidAudio(
            f"The MP3 file is truncated: its last frame ends at byte {last.at + last.size}, the "
            f"file at byte {len(data)}.",
            value=len(data),
            limit=last.at + last.size,
            remedy=UPLOAD_WHOLE,
        )
    if promised is not None and count < promised:
        raise InvalidAudio(
            f"The MP3 file is truncated: its header promises {promised} frames, it has {count}.",
            value=count,
            limit=promised,
            remedy=UPLOAD_WHOLE,
        )


def _xing_frames(data: Bytes, first: _MpegFrame) -> int | None:
    """Frames that a Xing or Info header promises.

    Source: the Xing VBR SDK: the header follows the side information of the first frame, whose
    size depends on version and mode. Encoders differ in whether they count that frame itself.
    """
    mono_bytes, stereo_bytes = (17, 32) if first.version == 3 else (9, 17)
    side_bytes = mono_bytes if first.is_mono else stereo_bytes
    at = first.at + 4 + side_bytes
    if bytes(data[at : at + 4]) not in (b"Xing", b"Info") or not data[at + 7] & 1:
        return None
    return int.from_bytes(data[at + 8 : at + 12], "big")


def _after_id3(data: Bytes) -> int:
    """Where the audio begins: behind an ID3v2 tag (its size has seven bits a byte)."""
    if bytes(data[:3]) != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    has_footer = bool(data[5] & 0x10)
    return 10 + size + (10 if has_footer else 0)


def _is_adts(data: Bytes, start: int) -> bool:
    """Whether two ADTS frames follow each other. Source: ISO/IEC 13818-7 6.2."""
    at = start
    for _ in range(2):
        if at + 7 > len(data) or data[at] != 0xFF or data[at + 1] & 0xF6 != 0xF0:
            return False
        size = (data[at + 3] & 3) << 11 | data[at + 4] << 3 | data[at + 5] >> 5
        if size < 7:
            return False
        at += size
    return True


# OGG


def _check_ogg(data: Bytes) -> None:
    """Every page must end within the file. Source: RFC 3533, section 6."""
    at = 0
    while bytes(data[at : at + 4]) == b"OggS":
        segments = data[at + 26] if at + 27 <= len(data) else 0
        table_end = at + 27 + segments
        end = table_end + sum(data[at + 27 : table_end])
        if table_end > len(data) or end > len(data):
            raise InvalidAudio(
                f"The OGG file is truncated: its last page ends at byte {max(end, table_end)} or "
                f"later, the file at byte {len(data)}.",
                value=len(data),
                limit=max(end, table_end),
                remedy=UPLOAD_WHOLE,
            )
        at = end


def _u16(data: Bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _u32(data: Bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
