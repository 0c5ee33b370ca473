"""real recordings -> songs of any length, cut by a seed.

A cut begins at a random sample of a recording and goes on from the recording's beginning where it
ends (the demo song is 10.9 s long). So every cut is other bytes, and no cache has seen it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

SHORTEST_S, LONGEST_S = 10.0, 120.0

SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
"""What libsndfile reads."""

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Song:
    """A cut, as a caller would upload it.

    Args:
        flac: the file.
        duration_s: of it.
    """

    flac: bytes
    duration_s: float


@dataclass(frozen=True)
class Recording:
    """A recording that songs are cut from.

    Args:
        samples: [T, C], float32 in [-1, 1].
        sample_rate_hz: of them.
    """

    samples: Samples
    sample_rate_hz: int

    def cut(self, begin_samples: int, duration_s: float) -> Samples:
        """Samples from a place on, over and over: [round(duration_s * rate), C]."""
        places = begin_samples + np.arange(round(duration_s * self.sample_rate_hz))
        return self.samples[places % len(self.samples)]


def recordings(source: Path) -> list[Recording]:
    """A file, or every audio file of a folder in the order of their names.

    Raises:
        SystemExit: there is none.
    """
    paths = sorted(source.iterdir()) if source.is_dir() else [source]
    found = [
        Recording(*soundfile.read(path, dtype="float32", always_2d=True))
        for path in paths
        if path.is_file() and path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise SystemExit(f"{source} has no audio: name a file or a folder of {sorted(SUFFIXES)}.")
    return found


def lengths(count: int, seed: int) -> list[float]:
    """Lengths from 10 to 120 s, log-uniform: as many between 10 and 35 s as between 35 and 120 s.

    >>> all(10 <= length_s <= 120 for length_s in lengths(50, seed=1))
    True
    """
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.uniform(np.log(SHORTEST_S), np.log(LONGEST_S), count))
    return [round(float(length_s), 1) for length_s in drawn]


def cuts(sources: Sequence[Recording], lengths_s: Sequence[float], seed: int) -> Iterator[Song]:
    """One song of each length; the seed says from which recording and from where."""
    rng = np.random.default_rng(seed)
    for length_s in lengths_s:
        recording = sources[int(rng.integers(len(sources)))]
        samples = recording.cut(int(rng.integers(len(recording.samples))), length_s)
        file = io.BytesIO()
        soundfile.write(file, samples, recording.sample_rate_hz, format="FLAC")
        yield Song(file.getvalue(), length_s)
