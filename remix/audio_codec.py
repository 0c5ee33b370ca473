"""file <-> audio: any common format in, WAV, FLAC or MP3 out.

Foreign bytes are decoded in a process of their own (`remix.audio_decoder`) with limits on memory
and time. Its output is counted here while it streams, so that a small file that decodes to hours
ends at the limit and costs no more than a song of that length.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import scipy

from remix import errors
from remix.audio import Audio, Samples
from remix.audio_container import EXPORT_AGAIN
from remix.audio_decoder import REFUSED, DecoderLimits, StreamHeader
from remix.errors import InvalidAudio, LimitExceeded, RemixError
from remix.resample import StreamingResampler, to_stereo

Format = Literal["wav", "wav16", "flac", "mp3"]
"""What `encode` writes: WAV of 32-bit floats, WAV of 16-bit integers, FLAC of 24 bits, MP3 of
320 kbit/s."""

MAX_SAMPLE = 1000.0
"""Of a float file: 60 dB above full scale is no recording, and far above it squares overflow."""

_BLOCK_BYTES = 1 << 20
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Limits(DecoderLimits):
    """What a decode may cost, and what audio is taken.

    Args:
        wall_s: time from start to end of a decode.
    """

    duration_s: float = 600.0
    max_channels: int = 8
    min_rate_hz: int = 8_000
    max_rate_hz: int = 192_000
    memory_bytes: int = 1 << 30
    cpu_s: int = 60
    wall_s: float = 120.0


async def decode(path: Path, limits: Limits | None = None, new_hz: int | None = None) -> Audio:
    """The sound of an audio file: WAV, FLAC, MP3, OGG (Vorbis, Opus), M4A or AAC.

    Args:
        path: the file.
        limits: what is taken; the defaults if left out.
        new_hz: rate to resample to while it streams; the file's own if left out.

    Returns:
        One or two channels: a file of more is mixed down to stereo. Finite, of at least one
        sample; not clipped.

    Raises:
        InvalidAudio: not audio, damaged, truncated, without samples, or not finite.
        LimitExceeded: too long, too many channels, a rate out of range, too costly to decode.
    """
    limits = limits or Limits()
    if not path.is_file():
        raise InvalidAudio(
            f"There is no file {path}; an audio file is needed.",
            value=str(path),
            limit="an audio file",
            remedy="Give the path of one.",
        )
    try:
        async with asyncio.timeout(limits.wall_s), _decoder(path, limits) as process:
            return await _collect(process, limits, new_hz)
    except TimeoutError as error:
        raise LimitExceeded(
            f"The file took longer than {limits.wall_s:.0f} s to decode, the most that is taken: "
            "it is too long, or damaged.",
            value=f"longer than {limits.wall_s:.0f} s",
            limit=limits.wall_s,
            remedy="Cut it, or export it again.",
        ) from error


def encode(audio: Audio, form: Format) -> bytes:
    """The bytes of an audio file.

    Args:
        audio: [C, T]; what exceeds full scale is clipped, except in `wav`, which holds floats.
        form: see `Format`.
    """
    # Only where it is used: its libsndfile has the system's name, and FluidSynth, loaded later into
    # the same process, would decode its SoundFont with that one, to other samples.
    import soundfile

    file = BytesIO()
    if form == "wav":
        # libsndfile stamps files of floats with the time of day; equal sound is equal bytes here.
        scipy.io.wavfile.write(file, audio.sample_rate_hz, audio.samples.T)
        return file.getvalue()
    container, subtype = {
        "wav16": ("WAV", "PCM_16"),
        "flac": ("FLAC", "PCM_24"),
        "mp3": ("MP3", "MPEG_LAYER_III"),
    }[form]
    options = {"compression_level": 0.0, "bitrate_mode": "CONSTANT"} if form == "mp3" else {}
    samples = np.clip(audio.samples, -1, 1)
    soundfile.write(
        file, samples.T, audio.sample_rate_hz, format=container, subtype=subtype, **options
    )
    return file.getvalue()


@asynccontextmanager
async def _decoder(path: Path, limits: Limits) -> AsyncIterator[Process]:
    """The decoder at work on `path`; however the block is left, the process is gone after it."""
    confined = {name: getattr(limits, name) for name in DecoderLimits.__dataclass_fields__}
    with _deaf_to_sigterm():
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "remix.audio_decoder",
            # Not resolved: an upload may be a file without a name, open as /proc/PID/fd/N.
            str(path.absolute()),
            json.dumps(confined),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            limit=_BLOCK_BYTES,
            # Nothing of this process's environment: secrets are none of the decoder's business.
            # One thread each: a thread pool would take address space and start-up time.
            env={"PYTHONPATH": str(_PACKAGE_ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )
    try:
        yield process
    finally:
        # Shielded: a second cancellation must not leave a zombie.
        await asyncio.shield(asyncio.ensure_future(_end(process)))


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """What is started here keeps SIGTERM blocked: a process inherits the mask of its starter.

    A service that is told to stop ends its decodes first, and BentoML tells its children as well.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


async def _end(process: Process) -> None:
    """Kill the process if it still runs, and empty its pipes.

    A pipe whose reader has stopped at its buffer's limit would never be closed.
    """
    if process.returncode is None:
        # Not process.kill(): it would reap a process that has just ended, whose exit status
        # asyncio then misses, and warns of.
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        while await pipe.read(_BLOCK_BYTES):
            pass
    await process.wait()


async def _collect(process: Process, limits: Limits, new_hz: int | None) -> Audio:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise await _refusal(process, limits)
    stream = _Stream(StreamHeader(**json.loads(line)), limits, new_hz)
    while block := await _read_block(process.stdout, stream.frame_bytes):
        # In a thread: mixing and resampling a megabyte would hold up the event loop.
        await asyncio.to_thread(stream.push, block)
    if await process.wait() != 0:
        raise await _refusal(process, limits)
    return await asyncio.to_thread(stream.finish)


async def _read_block(pipe: asyncio.StreamReader, frame_bytes: int) -> bytes:
    """Whole frames, about a megabyte of them; none at the end."""
    try:
        return await pipe.readexactly(_BLOCK_BYTES // frame_bytes * frame_bytes)
    except asyncio.IncompleteReadError as error:
        return error.partial[: len(error.partial) // frame_bytes * frame_bytes]


async def _refusal(process: Process, limits: Limits) -> RemixError:
    """What the decoder said of the file, or what its death says of it."""
    assert process.stderr is not None
    said, status = await process.stderr.read(), await process.wait()
    if status == REFUSED:
        name, parts = json.loads(said)
        refused: RemixError = getattr(errors, name)(**parts)
        return refused
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return LimitExceeded(
            f"The file took more than {limits.cpu_s} s of processor time, the limit, to decode: "
            "it is too long, or damaged.",
            value=f"more than {limits.cpu_s} s",
            limit=limits.cpu_s,
            remedy="Cut it, or export it again.",
        )
    return InvalidAudio(
        f"The file made the decoder stop with status {status} instead of 0: it is damaged.",
        value=status,
        limit=0,
        remedy=EXPORT_AGAIN,
    )


class _Stream:
    """The decoded samples of one file as they arrive: checked, mixed down, resampled."""

    def __init__(self, header: StreamHeader, limits: Limits, new_hz: int | None) -> None:
        self._header = header
        self._limits = limits
        self._new_hz = new_hz or header.sample_rate_hz
        self.frame_bytes = 4 * header.channels
        channels = min(header.channels, 2)
        self._resampler = StreamingResampler(header.sample_rate_hz, self._new_hz, channels)
        self._seen = 0
        self._parts: list[Samples] = []

    def push(self, block: bytes) -> None:
        """Take whole frames.

        Raises:
            InvalidAudio: a sample is not finite.
            LimitExceeded: the stream is longer than the limit.
        """
        samples = np.frombuffer(block, np.float32).reshape(-1, self._header.channels).T
        rate_hz = self._header.sample_rate_hz
        if not np.isfinite(samples).all():
            wrong = ~np.isfinite(samples)
            first = int(np.flatnonzero(wrong.any(axis=0))[0])
            value = str(samples[wrong][0])
            raise InvalidAudio(
                f"The audio has samples that are not numbers ({value}; the first at "
                f"{(self._seen + first) / rate_hz:.3f} s); all must be finite.",
                value=value,
                limit="finite numbers",
                remedy=EXPORT_AGAIN,
            )
        peak = float(np.abs(samples).max(initial=0.0))
        if peak > MAX_SAMPLE:
            raise InvalidAudio(
                f"The audio has a sample of {peak:.3g}, where full scale is 1; at most "
                f"{MAX_SAMPLE:.0f} is taken.",
                value=peak,
                limit=MAX_SAMPLE,
                remedy="Export it again with its level within full scale.",
            )
        self._seen += samples.shape[1]
        if self._seen > self._limits.duration_s * rate_hz:
            raise LimitExceeded(
                f"The audio is longer than {self._limits.duration_s:.0f} s, the most that is "
                "taken (decoding was stopped there).",
                value=f"longer than {self._limits.duration_s:.0f} s",
                limit=self._limits.duration_s,
                remedy="Cut it first.",
            )
        if samples.shape[0] > 2:
            samples = to_stereo(samples, tuple(self._header.speakers))
        self._parts.append(np.array(self._resampler.push(samples), order="C"))

    def finish(self) -> Audio:
        """All of it."""
        parts = [*self._parts, self._resampler.flush()]
        return Audio(np.concatenate(parts, axis=1), self._new_hz)
