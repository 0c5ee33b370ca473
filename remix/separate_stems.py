"""song -> stems, window by window, by whatever model the manifest names.

The song is cut into overlapping windows; a model turns each into stems; the stems are joined by
a weighted overlap-add. Samples that no later window can change are given out at once, so that
what comes after separation starts with the first window.

Source: demucs 4.1.0, api.py `Separator.separate_tensor` and apply.py `apply_model` with
`shifts=0`: for HTDemucs the result is theirs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from remix.audio import Audio, Samples
from remix.errors import InvalidAudio, InvalidModel
from remix.manifest import ModelEntry
from remix.overlap_add import StreamingOverlapAdd, triangle
from remix.stages import Infer, Progress

INPUT = "mixture"
"""[B, 2, T]: name of the input tensor of every model of this stage."""

OUTPUT = "stems"
"""[B, S, 2, T]: name of its output tensor."""

SMALLEST_SPREAD = 1e-4
"""Of the mono reference against the stereo signal, -80 dB. Below it the channels cancel
(L = -R), and the reference says nothing of the loudness."""


@dataclass(frozen=True)
class Separator:
    """What the flow knows of a separation model; all of it stands in its manifest entry.

    Args:
        name: of the manifest entry.
        stems: names of the S stems, in the order of the output.
        sample_rate_hz: that the model wants.
        window_samples: T, the length of a window.
        overlap: of one window with the next, as a fraction of T.
        is_normalised: whether the song is brought to mean 0 and deviation 1 first.
    """

    name: str
    stems: tuple[str, ...]
    sample_rate_hz: int
    window_samples: int
    overlap: float
    is_normalised: bool

    @classmethod
    def of(cls, entry: ModelEntry) -> Separator:
        """Read the facts of a manifest entry.

        Raises:
            InvalidModel: a fact is missing.
        """
        try:
            return cls(
                name=entry.name,
                stems=tuple(entry.facts["stems"]),
                sample_rate_hz=entry.sample_rate_hz,
                window_samples=entry.facts["window_samples"],
                overlap=entry.facts["overlap"],
                is_normalised=entry.facts["is_normalised"],
            )
        except KeyError as error:
            raise InvalidModel(f"models.toml: {entry.name} lacks the fact {error}.") from error

    @property
    def hop_samples(self) -> int:
        """From the start of one window to the start of the next."""
        return int((1 - self.overlap) * self.window_samples)


@dataclass(frozen=True)
class StemsChunk:
    """A stretch of every stem, finished.

    Args:
        start_sample: where it begins in the song.
        stems: [2, t] by name, t the same for all.
    """

    start_sample: int
    stems: dict[str, Samples]


@dataclass(frozen=True)
class _Scale:
    mean: np.float32
    deviation: np.float32


async def separate_stems(
    mixture: Audio,
    separator: Separator,
    infer: Infer,
    *,
    windows_ahead: int = 2,
    progress: Progress | None = None,
) -> AsyncIterator[StemsChunk]:
    """Separate a song, giving out each stretch as soon as it is final.

    Args:
        mixture: [2, T] at the separator's rate.
        separator: the model, and how it wants to be fed.
        infer: runs it: {"mixture": [B, 2, T]} -> {"stems": [B, S, 2, T]}.
        windows_ahead: windows that are sent before the oldest one's stems are asked for.
        progress: is told after every window.

    Yields:
        Chunks that follow each other without a gap and together have the song's length.

    Raises:
        InvalidAudio: no samples, not stereo, or another rate.
    """
    _check(mixture, separator)
    song = mixture.samples
    scale = _scale_of(song) if separator.is_normalised else _Scale(np.float32(0), np.float32(1))
    joined = StreamingOverlapAdd(triangle(separator.window_samples), separator.hop_samples)
    starts = range(0, song.shape[1], separator.hop_samples)
    given_out = 0
    in_flight: deque[asyncio.Task[Samples]] = deque()
    not_sent = iter(starts)
    try:
        for index, start in enumerate(starts):
            while len(in_flight) < windows_ahead and (send := next(not_sent, None)) is not None:
                window = _stems_of_window(song, send, scale, separator, infer)
                in_flight.append(asyncio.create_task(window))
            piece = await in_flight.popleft()
            finished = joined.push(piece, is_last=start == starts[-1])
            stems = finished * scale.deviation + scale.mean
            if progress:
                progress("separate_stems", (index + 1) / len(starts))
            yield StemsChunk(given_out, dict(zip(separator.stems, stems, strict=True)))
            given_out += finished.shape[-1]
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)


async def join_chunks(chunks: AsyncIterator[StemsChunk]) -> dict[str, Samples]:
    """Whole stems, [2, T] by name, out of their chunks."""
    collected = [chunk.stems async for chunk in chunks]
    return {
        name: np.concatenate([stems[name] for stems in collected], axis=1) for name in collected[0]
    }


def cut_window(song: Samples, start: int, window_samples: int) -> tuple[Samples, int]:
    """The window for the stretch that begins at `start`, and where in it the stretch begins.

    A stretch that the song's end makes shorter than the window stands in the window's middle,
    with the song's own samples around it and silence beyond its ends.

    Args:
        song: [2, T].
        start: first sample of the stretch.
        window_samples: length of the window.

    Returns:
        [2, window_samples], and the offset of the stretch in it.

    Source: demucs 4.1.0, apply.py, `TensorChunk.padded`.

    >>> window, offset = cut_window(np.arange(1, 6, dtype=np.float32)[None], 3, 6)
    >>> window.tolist(), offset
    ([[2.0, 3.0, 4.0, 5.0, 0.0, 0.0]], 2)
    """
    length = min(window_samples, song.shape[1] - start)
    offset = (window_samples - length) // 2
    first = start - offset
    window = np.zeros((song.shape[0], window_samples), np.float32)
    begin, end = max(0, first), min(song.shape[1], first + window_samples)
    window[:, begin - first : end - first] = song[:, begin:end]
    return window, offset


async def _stems_of_window(
    song: Samples, start: int, scale: _Scale, separator: Separator, infer: Infer
) -> Samples:
    """[S, 2, t]: the stems of the stretch that begins at `start`, still scaled."""
    length = min(separator.window_samples, song.shape[1] - start)
    window, offset = cut_window(song, start, separator.window_samples)
    if not window.any():  # every model of this stage maps silence to silence
        return np.zeros((len(separator.stems), 2, length), np.float32)
    if separator.is_normalised:
        first = start - offset
        inside = slice(max(0, -first), song.shape[1] - first)
        window[:, inside] = (window[:, inside] - scale.mean) / scale.deviation
    outputs = await infer(separator.name, {INPUT: window[None]})
    stems: Samples = outputs[OUTPUT][0][..., offset : offset + length]
    return stems


def _scale_of(song: Samples) -> _Scale:
    """Mean and standard deviation of the mono reference, made safe for silence and L = -R."""
    reference = song.mean(axis=0)
    mean = reference.mean(dtype=np.float64)
    deviation = reference.std(ddof=1, dtype=np.float64) if reference.size > 1 else 0.0
    loudness = float(np.sqrt(np.square(song, dtype=np.float64).mean()))
    if deviation <= SMALLEST_SPREAD * loudness:
        deviation = loudness
    return _Scale(np.float32(mean), np.float32(deviation + 1e-8))


def _check(mixture: Audio, separator: Separator) -> None:
    channels, length = mixture.samples.shape
    if length == 0:
        raise InvalidAudio(
            "The song has 0 samples; at least 1 is needed.",
            value=0,
            limit=1,
            remedy="Send a song with sound.",
        )
    if channels != 2 or mixture.sample_rate_hz != separator.sample_rate_hz:
        raise InvalidAudio(
            f"Separation was handed {channels} channels at {mixture.sample_rate_hz} Hz; "
            f"{separator.name} takes 2 at {separator.sample_rate_hz} Hz: resample first."
        )
