"""Notes and the beats they sit on: the symbolic values that flow between stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Role = Literal["drums", "bass", "guitar", "piano", "strings"]
"""The five tracks of the paper, in the order in which they are written and rendered."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, order=True, slots=True)
class Note:
    """One note, heard or written.

    Args:
        onset_s: start, seconds from the song's start.
        duration_s: length, seconds, above 0.
        pitch: MIDI number 0 to 127; for drums a General MIDI percussion key.
        velocity: MIDI velocity 1 to 127. Of a heard note it grows with the model's confidence.
    """

    onset_s: float
    duration_s: float
    pitch: int
    velocity: int

    @property
    def end_s(self) -> float:
        """Where the note ends, seconds."""
        return self.onset_s + self.duration_s


Tracks = dict[Role, list[Note]]
"""Notes by role; a role that is absent has no notes."""


@dataclass(frozen=True)
class BeatGrid:
    """The song's own time: its beats, which of them begin a bar, and its key.

    Args:
        beat_times_s: [K], float64, strictly increasing; the grid may start before 0 and
            reaches past the song's end, so that every instant lies between two beats.
        first_downbeat: index into `beat_times_s` of the first beat that begins a bar.
        beats_per_bar: 3 or 4.
        tempo_bpm: the song's median tempo.
        tonic: pitch class of the key, 0 = C to 11 = B.
        mode: of the key.
    """

    beat_times_s: NDArray[np.float64]
    first_downbeat: int
    beats_per_bar: int
    tempo_bpm: float
    tonic: int
    mode: Literal["major", "minor"]

    def time_at(self, beat: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Seconds of fractional beat positions, interpolated between the real beats."""
        index = np.arange(len(self.beat_times_s), dtype=np.float64)
        return np.asarray(np.interp(beat, index, self.beat_times_s))

    def beat_at(self, time_s: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Fractional beat positions of seconds: the inverse of `time_at`."""
        index = np.arange(len(self.beat_times_s), dtype=np.float64)
        return np.asarray(np.interp(time_s, self.beat_times_s, index))
