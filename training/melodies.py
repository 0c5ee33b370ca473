"""chords -> a melody over them: phrases of two bars on chord tones, with rests to breathe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remix.note_tokens import chord_pitch_classes

REACH_SEMITONES = 8
"""From the middle of the range, up and down."""


@dataclass(frozen=True)
class MelodyNote:
    """A note of a melody.

    Args:
        onset_s: from the excerpt's beginning.
        duration_s: until the next note or the rest.
        pitch: in semitones from the middle that was asked for.
    """

    onset_s: float
    duration_s: float
    pitch: int


def draw_melody(
    chords: NDArray[np.int16],
    beats_per_bar: int,
    beat_s: float,
    middle: int,
    rng: np.random.Generator,
) -> list[MelodyNote]:
    """A melody over the chords of half bars.

    Args:
        chords: [bars, 2], indices as in `remix.note_tokens`.
        beats_per_bar: 3 or 4.
        beat_s: seconds a beat lasts.
        middle: MIDI pitch about which the melody moves; its notes are semitones from there.
        rng: draws rhythm, steps and rests.
    """
    notes: list[MelodyNote] = []
    pitch = middle
    for first in range(0, len(chords), 2):
        if rng.random() < 0.2:
            continue  # the band alone
        beats = beats_per_bar * min(2, len(chords) - first)
        at, end = float(rng.choice((0.0, 0.0, 0.5, 1.0))), beats - float(rng.choice((0.5, 1, 1.5)))
        while at < end:
            length = min(float(rng.choice((0.5, 0.5, 1.0, 1.0, 1.5, 2.0))), end - at)
            bar, beat = divmod(at, beats_per_bar)
            chord = int(chords[first + int(bar), int(2 * beat >= beats_per_bar)])
            pitch = _next_pitch(pitch, middle, chord, rng)
            onset_s = (first * beats_per_bar + at) * beat_s
            notes.append(MelodyNote(onset_s, length * beat_s, pitch - middle))
            at += length
    return notes


def _next_pitch(pitch: int, middle: int, chord: int, rng: np.random.Generator) -> int:
    """A tone of the chord near the last one and near the middle."""
    reach = np.arange(middle - REACH_SEMITONES, middle + REACH_SEMITONES + 1)
    classes = chord_pitch_classes(chord) or frozenset(range(12))
    tones = reach[[int(tone) % 12 in classes for tone in reach]]
    weights = np.exp(-np.square(tones - pitch) / 18.0 - np.square(tones - middle) / 60.0)
    return int(rng.choice(tones, p=weights / weights.sum()))
