"""songs with separate stems -> training examples: stems of different songs, changed and mixed.

A folder in MUSDB's layout: a folder for each song, in it `drums`, `bass`, `other` and `vocals` as
.wav, .flac or .ogg at 44.1 kHz (one that is missing is silent; a `mixture` is not read).
Where `train/` and `test/` are in it, the songs of `test/` are held out; else one song in twelve.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Floats = NDArray[np.float32]

SAMPLE_RATE_HZ = 44_100
STEMS = ("drums", "bass", "other", "vocals")
"""In the order of the published HTDemucs."""

SUFFIXES = (".wav", ".flac", ".ogg")

HELD_OUT_SONGS = 12  # one in so many, where the folder has no test/

SPEEDS = tuple(Fraction(n) for n in ("7/8 8/9 10/11 15/16 1 1 1 16/15 11/10 9/8 8/7".split()))
"""Tempo and pitch together, 2.3 semitones down and up at most."""


@dataclass(frozen=True)
class Track:
    """A song in parts.

    Args:
        name: of its folder.
        paths: of its stems, by name.
        n_samples: of the longest of them.
    """

    name: str
    paths: Mapping[str, Path]
    n_samples: int


@dataclass(frozen=True)
class Augmentation:
    """How examples differ from the songs; each number is the part of the stems it is done to.

    Args:
        shuffled: examples whose stems are of different songs and places.
        silent: stems that are left out.
        panned: stems that are louder on one side.
        equalised: stems with +-9 dB of smooth equaliser.
        resampled: whether tempo and pitch vary.
        coded: mixtures that went through Vorbis at a low rate, while the stems did not.
    """

    shuffled: float = 0.8
    silent: float = 0.06
    panned: float = 0.3
    equalised: float = 0.3
    resampled: bool = True
    coded: float = 0.05


def find_tracks(folder: Path) -> tuple[list[Track], list[Track]]:
    """The songs to train on, and those held out."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _tracks_in(folder / "train"), _tracks_in(folder / "test")
    tracks = _tracks_in(folder)
    kept = [t for t in tracks if hashlib.sha256(t.name.encode()).digest()[0] % HELD_OUT_SONGS]
    return kept, [track for track in tracks if track not in kept]


def _tracks_in(folder: Path) -> list[Track]:
    tracks = []
    for song in sorted(path for path in folder.iterdir() if path.suffix != ".partial"):
        paths = {
            stem: path
            for stem in STEMS
            for path in (song / f"{stem}{suffix}" for suffix in SUFFIXES)
            if path.exists()
        }
        if paths:
            lengths = [soundfile.info(path).frames for path in paths.values()]
            tracks.append(Track(song.name, paths, max(lengths)))
    return tracks


def read_stem(track: Track, stem: str, first: int, n_samples: int) -> Floats:
    """[2, n_samples] of a stem from sample `first` on; silence where it has none."""
    samples = np.zeros((2, n_samples), np.float32)
    if stem in track.paths:
        read, rate_hz = soundfile.read(
            track.paths[stem], n_samples, first, dtype="float32", always_2d=True
        )
        if rate_hz != SAMPLE_RATE_HZ:
            raise ValueError(f"{track.paths[stem]} has {rate_hz} Hz; {SAMPLE_RATE_HZ} are needed.")
        samples[:, : len(read)] = read.T[:2] if read.shape[1] > 1 else read.T
    return samples


def example(
    tracks: Sequence[Track],
    n_samples: int,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """A mixture [2, T] and its stems [4, 2, T], the mono mixture at deviation 1 as in serving.

    Without an augmentation all stems are of one song, as they are.
    """
    is_shuffled = augmentation is not None and rng.random() < augmentation.shuffled
    stems = np.zeros((len(STEMS), 2, n_samples), np.float32)
    place = _draw_place(tracks, n_samples, augmentation, rng)
    for index, stem in enumerate(STEMS):
        if is_shuffled:
            place = _draw_place(tracks, n_samples, augmentation, rng)
        track, first, speed = place
        samples = read_stem(track, stem, first, math.ceil(n_samples * speed) + 1)
        if speed != 1:
            samples = resample_poly(samples, speed.denominator, speed.numerator, axis=1)
        stems[index] = samples[:, :n_samples]
        if augmentation is not None:
            stems[index] = _vary(stems[index], augmentation, rng)
    mixture = stems.sum(0)
    deviation = max(float(mixture.mean(0).std()), 1e-4)
    if augmentation is not None and rng.random() < augmentation.coded:
        mixture = _through_vorbis(mixture, float(rng.uniform(0.6, 0.95)))
    return mixture / np.float32(deviation), stems / np.float32(deviation)


def _draw_place(
    tracks: Sequence[Track],
    n_samples: int,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[Track, int, Fraction]:
    track = tracks[int(rng.integers(len(tracks)))]
    is_resampled = augmentation is not None and augmentation.resampled
    speed = SPEEDS[int(rng.integers(len(SPEEDS)))] if is_resampled else Fraction(1)
    room = track.n_samples - math.ceil(n_samples * speed)
    return track, int(rng.integers(max(room, 0) + 1)), speed


def _vary(samples: Floats, augmentation: Augmentation, rng: np.random.Generator) -> Floats:
    """Gain, polarity, sides, panorama, equaliser, silence."""
    if rng.random() < augmentation.silent:
        return np.zeros_like(samples)
    gains = np.full((2, 1), 10.0 ** (rng.uniform(-8.0, 4.0) / 20) * rng.choice((-1.0, 1.0)))
    if rng.random() < augmentation.panned:
        side_db = rng.uniform(-9.0, 9.0)
        gains *= 10.0 ** (np.array([[side_db], [-side_db]]) / 40)
    if rng.random() < 0.5:
        samples = samples[::-1]
    if rng.random() < augmentation.equalised:
        n_samples = samples.shape[1]
        hz = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ)
        bands_hz = np.geomspace(40, 16_000, 8)
        curve_db = np.interp(np.log(hz.clip(1)), np.log(bands_hz), rng.uniform(-9.0, 9.0, 8))
        spectrum = np.fft.rfft(samples) * 10.0 ** (curve_db / 20)
        samples = np.fft.irfft(spectrum, n_samples).astype(np.float32)
    result: Floats = (samples * gains).astype(np.float32)
    return result


def _through_vorbis(mixture: Floats, compression: float) -> Floats:
    """What is left of a mixture after Vorbis; `compression` 0 is the best, 1 the smallest."""
    peak = max(float(np.abs(mixture).max()), 1e-6)
    file = io.BytesIO()
    soundfile.write(
        file, mixture.T / peak, SAMPLE_RATE_HZ, "VORBIS", format="OGG",
        compression_level=compression,
    )  # fmt: skip
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="float32")
    result: Floats = decoded.T * np.float32(peak)
    return np.ascontiguousarray(result[:, : mixture.shape[1]])


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Example n of a seed, whoever asks for it and when."""

    def __init__(
        self, tracks: Sequence[Track], n_samples: int, augmentation: Augmentation | None, seed: int
    ) -> None:
        self.tracks, self.n_samples = tracks, n_samples
        self.augmentation, self.seed = augmentation, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        pair = example(self.tracks, self.n_samples, self.augmentation, rng)
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


@dataclass(frozen=True)
class _Steps:
    """The examples of each step from `first` on, without an end."""

    first: int
    batch: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first
        while True:
            yield list(range(step * self.batch, (step + 1) * self.batch))
            step += 1


def batches(
    examples: Examples, first_step: int, batch: int, workers: int, pinned: bool
) -> DataLoader[Any]:
    """Batches of the steps from `first_step` on: [B, 2, T] and [B, 4, 2, T]."""
    sampler: Any = _Steps(first_step, batch)
    return DataLoader(
        examples,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pinned,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
