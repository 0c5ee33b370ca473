"""audio file -> raw samples on the standard output: the process that reads foreign bytes.

Started by `remix.audio_codec` as `python -m remix.audio_decoder FILE LIMITS`. It holds itself to
the memory and the processor time that it is given before it looks at the file, opens nothing but
that file, and imports little, so that it starts quickly.

    standard output     one line of JSON (`StreamHeader`), then float32 samples, interleaved
    standard error      one line of JSON (error class, its parts) if the file is refused
    exit status         0: all decoded; REFUSED: see standard error; else: it died
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import av
import numpy as np

from remix.audio_container import ACCEPTED, UPLOAD_WHOLE, check_length, no_samples, sniff
from remix.errors import InvalidAudio, LimitExceeded, RemixError, excerpt

REFUSED = 65
"""Exit status of a refusal (EX_DATAERR of sysexits.h)."""

DECODERS = {"aac", "alac", "flac", "mp3", "mp3float", "mp2", "mp2float", "vorbis", "opus"}
"""Besides PCM: FFmpeg's decoders that may run."""

MAX_BROKEN_SHARE = 0.01
"""Of the packets that fail to decode, before the file counts as damaged. Players are silent about
a few, and the first packets after a cut in an MP3 always fail."""

MAX_MISSING_S = 0.2
"""How much less than its header says a file may decode to: encoder delay and the padding of the
last packet, 2 * 2048 samples at 44.1 kHz in AAC, doubled."""


@dataclass(frozen=True)
class DecoderLimits:
    """What the decoder's process holds itself to.

    Args:
        duration_s: longest audio.
        max_channels: most channels.
        min_rate_hz: lowest sample rate.
        max_rate_hz: highest sample rate.
        memory_bytes: address space of the process.
        cpu_s: processor time of the process.
    """

    duration_s: float
    max_channels: int
    min_rate_hz: int
    max_rate_hz: int
    memory_bytes: int
    cpu_s: int


@dataclass(frozen=True)
class StreamHeader:
    """What precedes the samples.

    Args:
        sample_rate_hz: of the samples.
        channels: of the samples.
        speakers: FFmpeg's name of each channel's speaker.
    """

    sample_rate_hz: int
    channels: int
    speakers: tuple[str, ...]


def decode_file(path: str, limits: DecoderLimits, output: BinaryIO) -> None:
    """Write the header and the samples of the audio file at `path`.

    Raises:
        InvalidAudio, LimitExceeded: the file is refused.
    """
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            sniff(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            container = sniff(data)
            check_length(data, container)
        try:
            with av.open(
                file,
                format=container,
                io_open=_open_nothing,
                container_options={"protocol_whitelist": "none"},
                metadata_errors="replace",
            ) as opened:
                _decode(opened, limits, output)
        except (av.error.FFmpegError, ValueError, IndexError) as error:
            whole = f"a whole {container.upper()} file"
            raise InvalidAudio(
                f"The file is damaged or cut, and cannot be decoded ({error}): it is not {whole}.",
                value=excerpt(str(error)),
                limit=whole,
                remedy="Export or upload it again.",
            ) from error


def _open_nothing(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    raise InvalidAudio(
        f"The file refers to another file ({excerpt(url)!r}); only the file itself is read.",
        value=excerpt(url),
        limit="the file itself",
        remedy="Send one whole audio file.",
    )


def _decode(opened: Any, limits: DecoderLimits, output: BinaryIO) -> None:
    if not opened.streams.audio:
        raise InvalidAudio(
            "The file has no audio in it (0 streams); at least 1 is needed.",
            value=0,
            limit=1,
            remedy=f"Send {ACCEPTED}.",
        )
    stream = opened.streams.audio[0]
    codec = stream.codec_context.name if stream.codec_context else "nothing that is known"
    if not (codec in DECODERS or codec.startswith("pcm_")):
        raise InvalidAudio(
            f"The file's audio is coded as {codec}; known are {ACCEPTED}.",
            value=codec,
            limit=ACCEPTED,
            remedy="Convert it to one of these first.",
        )
    declared_s = _declared_s(stream, opened)
    check_rate_and_channels(stream.codec_context.rate, stream.codec_context.channels, limits)
    if declared_s is not None:
        check_duration(declared_s, limits)

    to_float: Any = None
    samples = packets = broken = rate_hz = 0
    for packet in opened.demux(stream):
        packets += packet.size > 0
        try:
            frames = packet.decode()
        except (av.error.InvalidDataError, av.error.UndefinedError):
            broken += 1
            continue
        for frame in frames:
            if to_float is None:
                rate_hz = frame.sample_rate
                header = _header(frame)
                check_rate_and_channels(rate_hz, header.channels, limits)
                output.write(json.dumps(asdict(header)).encode() + b"\n")
                to_float = av.AudioResampler("flt", frame.layout, rate_hz)
            frame.pts = None
            for converted in to_float.resample(frame):
                block = np.ascontiguousarray(converted.to_ndarray(), np.float32)
                samples += converted.samples
                output.write(block.data)
    may_break = max(1, int(MAX_BROKEN_SHARE * packets))
    if broken > may_break:
        raise InvalidAudio(
            f"The file is damaged: {broken} of its {packets} packets cannot be decoded; at most "
            f"{may_break} may be broken.",
            value=broken,
            limit=may_break,
            remedy="Export or upload it again.",
        )
    if samples == 0:
        raise no_samples()
    if declared_s is not None and samples / rate_hz < declared_s - MAX_MISSING_S:
        raise InvalidAudio(
            f"The file is truncated: its header promises {declared_s:.2f} s, it has "
            f"{samples / rate_hz:.2f} s.",
            value=round(samples / rate_hz, 2),
            limit=round(declared_s, 2),
            remedy=UPLOAD_WHOLE,
        )


def _header(frame: Any) -> StreamHeader:
    speakers = tuple(channel.name for channel in frame.layout.channels)
    return StreamHeader(frame.sample_rate, frame.layout.nb_channels, speakers)


def _declared_s(stream: Any, opened: Any) -> float | None:
    """The duration that the file states; None where it states none.

    FFmpeg then estimates one from the bit rate (MP3 and AAC streams).
    """
    if opened.format.name in ("mp3", "aac") or stream.duration is None:
        return None
    return float(stream.duration * stream.time_base)


def check_duration(duration_s: float, limits: DecoderLimits) -> None:
    """Refuse what is longer than the limit.

    Raises:
        LimitExceeded: it is.
    """
    if duration_s > limits.duration_s:
        raise LimitExceeded(
            f"The audio is {duration_s:.0f} s long; at most {limits.duration_s:.0f} s are taken.",
            value=round(duration_s),
            limit=limits.duration_s,
            remedy="Cut it first.",
        )


def check_rate_and_channels(rate_hz: int, channels: int, limits: DecoderLimits) -> None:
    """Refuse a rate or a number of channels out of range.

    Raises:
        LimitExceeded: it is out of range.
    """
    if not limits.min_rate_hz <= rate_hz <= limits.max_rate_hz:
        raise LimitExceeded(
            f"The audio's sample rate is {rate_hz} Hz; {limits.min_rate_hz} to "
            f"{limits.max_rate_hz} Hz are taken.",
            value=rate_hz,
            limit=[limits.min_rate_hz, limits.max_rate_hz],
            remedy="Resample it first.",
        )
    if channels > limits.max_channels:
        raise LimitExceeded(
            f"The audio has {channels} channels; at most {limits.max_channels} are taken.",
            value=channels,
            limit=limits.max_channels,
            remedy="Mix it down first.",
        )


def _confine(limits: DecoderLimits) -> None:
    """Cap this process's memory and time; it may write no file and leaves no core behind."""
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main() -> int:
    path, limits = sys.argv[1], DecoderLimits(**json.loads(sys.argv[2]))
    _confine(limits)
    av.logging.set_level(None)
    try:
        decode_file(path, limits, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except (RemixError, MemoryError) as error:
        if isinstance(error, MemoryError):
            mib = limits.memory_bytes >> 20
            error = LimitExceeded(
                f"The file needs more than {mib} MiB, the limit, to decode: it is damaged, or not "
                "a song.",
                value=f"more than {mib} MiB",
                limit=mib,
                remedy="Export it again.",
            )
        sys.stderr.write(json.dumps([type(error).__name__, error.parts()]))
        return REFUSED
    return 0


if __name__ == "__main__":
    try:
        status = _main()
    except BrokenPipeError:  # the parent has seen enough
        status = 1
    # Not sys.exit: flushing a closed standard output would print a traceback.
    sys.stderr.flush()
    os._exit(status)
