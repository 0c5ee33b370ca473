"""raw F0 -> the melody: voicing, octave slips, gaps, and the octave that suits a voice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

MIN_CONFIDENCE = 0.05  # FCPE's posterior; its own decoder keeps 0.006, which takes breath for voice
GATE_BELOW_LOUD_DB = 40.0  # bleed lies at -15..-40 dB under the singer, and FCPE calls it voiced
GATE_FLOOR_DBFS = -60.0
SHORTEST_RUN_FRAMES = 4  # 40 ms: shorter voiced runs and gaps are estimator noise
SLIP_CONTEXT_FRAMES = 51  # 0.5 s: an octave slip is shorter than half of this


@dataclass(frozen=True)
class PitchTrack:
    """F0 of a whole vocal, 100 frames/s.

    Args:
        f0_hz: [N], positive everywhere; interpolated where unvoiced.
        voiced: [N], where the singer's folds swing.
    """

    f0_hz: Floats
    voiced: Mask

    def shifted(self, octaves: int) -> PitchTrack:
        """The same melody `octaves` higher."""
        return PitchTrack(self.f0_hz * np.float32(2.0**octaves), self.voiced)


def loud_level_db(level_db: Floats) -> float:
    """Level of a vocal's loud frames, beside which others are bleed: the 95th percentile."""
    return float(np.percentile(level_db, 95)) if len(level_db) else GATE_FLOOR_DBFS


def clean_pitch(f0_hz: Floats, confidence: Floats, level_db: Floats, loud_db: float) -> PitchTrack:
    """The track that a voice sings.

    Args:
        f0_hz: [N], the estimator's F0, any value where unvoiced.
        confidence: [N], in 0..1.
        level_db: [N], level of the frame in dBFS.
        loud_db: of the vocal, `loud_level_db`.
    """
    voiced = voiced_frames(confidence, level_db, loud_db)
    estimated = voiced & (f0_hz > 0)  # the estimator gives 0 where it is at a loss
    f0_hz = correct_octave_slips(f0_hz, estimated)
    return PitchTrack(interpolate_unvoiced(f0_hz, estimated), voiced)


def voiced_frames(confidence: Floats, level_db: Floats, loud_db: float) -> Mask:
    """Frames that are periodic and loud enough to be the singer; no run or gap under 40 ms."""
    gate_db = max(loud_db - GATE_BELOW_LOUD_DB, GATE_FLOOR_DBFS)
    voiced = (confidence >= MIN_CONFIDENCE) & (level_db >= gate_db)
    for state in (False, True):  # first fill short gaps, then drop short runs
        for start, stop in runs(voiced == state):
            inside = start > 0 and stop < len(voiced)
            if stop - start < SHORTEST_RUN_FRAMES and (state or inside):
                voiced[start:stop] = not state
    return voiced


def runs(mask: Mask) -> list[tuple[int, int]]:
    """Half-open [start, stop) of every run of True.

    >>> runs(np.array([True, False, True, True]))
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def correct_octave_slips(f0_hz: Floats, voiced: Mask) -> Floats:
    """Moves frames that lie one octave off their surroundings back by that octave.

    A frame is compared with the median of the voiced frames within 0.25 s; melodic leaps of an
    octave last longer and move the median with them.
    """
    corrected = f0_hz.copy()
    frames = np.flatnonzero(voiced)
    if not len(frames):
        return corrected
    pitch = np.log2(f0_hz[frames])
    half = SLIP_CONTEXT_FRAMES // 2
    first = np.searchsorted(frames, frames - half)
    last = np.searchsorted(frames, frames + half, side="right")
    around = np.array([np.median(pitch[a:b]) for a, b in zip(first, last, strict=True)])
    octaves = np.round(pitch - around)
    near = np.abs(pitch - around - octaves) < 0.25  # within 3 semitones of a whole octave
    corrected[frames] *= np.where(near, 2.0**-octaves, 1.0).astype(np.float32)
    return corrected


def interpolate_unvoiced(f0_hz: Floats, voiced: Mask) -> Floats:
    """F0 with unvoiced frames on a straight line in log frequency; 100 Hz if nothing is voiced."""
    frames = np.flatnonzero(voiced)
    if not len(frames):
        return np.full(len(f0_hz), 100.0, np.float32)
    line = np.interp(np.arange(len(f0_hz)), frames, np.log2(f0_hz[frames]))
    return np.exp2(line).astype(np.float32)


def octaves_to_range(track: PitchTrack, low_hz: float, high_hz: float) -> int:
    """Fewest whole octaves that bring the median voiced F0 into a voice's range.

    If the range is narrower than an octave and no shift fits, the nearest one is taken. A song
    without a voiced frame is not shifted.
    """
    if not track.voiced.any():
        return 0
    median = float(np.median(np.log2(track.f0_hz[track.voiced])))
    low, high = np.log2(low_hz), np.log2(high_hz)

    def badness(octaves: int) -> tuple[float, int]:
        outside = max(low - median - octaves, median + octaves - high, 0.0)
        return round(float(outside), 6), abs(octaves)

    return min(range(-4, 5), key=badness)
