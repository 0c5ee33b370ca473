"""bars of notes <-> tokens, and the grammar that keeps every generated bar playable.

A sequence is a header and then bars, each self-contained:

    METER TEMPO STYLE                                              given, once
    BAR CHORD CHORD DENSITY TRACKS                                 given, per bar
        (TRACK_VELOCITY (POSITION DRUM+)+)                         drums
        (TRACK_VELOCITY (POSITION DURATION PITCH+)+)               every other track of TRACKS

Notes of one onset and one length share their POSITION and DURATION, so a bar of a five-piece band
is about 84 tokens. A PITCH counts semitones above the root of the chord that sounds at its onset,
`pitch - root`, so that one C-major bar teaches the model the other eleven: transposing a song
changes its CHORD tokens only (and the register, where a root wraps past B).

The grid is 12 steps a beat: sixteenths (3) and triplets (4) both lie on it. On this grid, with
velocities and durations from the tables below, `decode_bar(encode_bar(bar)) == bar` exactly.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

ROLES: Final = ("drums", "bass", "guitar", "piano", "strings")
DRUMS: Final = 0
STEPS_PER_BEAT: Final = 12
METERS: Final = (3, 4)  # beats a bar
MAX_BAR_STEPS: Final = STEPS_PER_BEAT * METERS[-1]

# Ranges (MIDI) that tokens can express: about what the instruments reach.
LOWEST: Final = (35, 24, 36, 28, 36)  # drums: General MIDI percussion, Acoustic Bass Drum ..
HIGHEST: Final = (81, 67, 88, 103, 100)  # .. Open Triangle

# Ranges that are written in: where the band of the training songs plays all but 1 % of its notes.
PLAYED_LOWEST: Final = (35, 26, 43, 40, 45)
PLAYED_HIGHEST: Final = (81, 60, 81, 84, 86)

# Notes struck at once, at most: two hands and two feet, one bass, six strings, about two hands.
STRUCK_AT_ONCE: Final = (4, 1, 6, 6, 5)

# Quavers, triplets, dotted values and ties up to four 4/4 bars, in steps.
DURATIONS_STEPS: Final = (
    *(1, 2, 3, 4, 6, 8, 9, 12, 15, 18, 21, 24, 30, 36, 42, 48, 60, 72, 96, 120, 144, 192),
)
VELOCITY_LEVELS: Final = 8  # level i plays at 16 i + 8
TEMPO_EDGES_BPM: Final = (70.0, 85.0, 100.0, 115.0, 130.0, 150.0, 175.0)  # 8 classes
STYLES: Final = (
    *("any", "rock", "pop", "ballad", "swing", "latin", "country"),
    *("funk", "dance", "blues", "folk", "march"),
)
# Onsets per beat and track that part the density levels 1..5 (0 = not given): quintiles of the
# training songs.
DENSITY_EDGES: Final = (0.95, 1.2, 1.45, 1.8)
DENSITY_LEVELS: Final = len(DENSITY_EDGES) + 2

CHORD_QUALITIES: Final = ("maj", "min", "7", "maj7", "min7", "dim", "sus4")
NO_CHORD: Final = 12 * len(CHORD_QUALITIES)
CHORD_INTERVALS: Final = (
    *((0, 4, 7), (0, 3, 7), (0, 4, 7, 10), (0, 4, 7, 11), (0, 3, 7, 10), (0, 3, 6), (0, 5, 7)),
)

# A bar may spend this many tokens; the grammar closes it in time. 99 % of the training bars are
# shorter; a bar of five tracks has 84 on average.
BAR_TOKENS: Final = 192


def _spans() -> dict[str, tuple[int, int]]:
    sizes = {
        "meter": len(METERS),
        "tempo": len(TEMPO_EDGES_BPM) + 1,
        "style": len(STYLES),
        "bar": 1,
        "chord": NO_CHORD + 1,
        "density": DENSITY_LEVELS,
        "tracks": 2 ** len(ROLES),
        "track_velocity": len(ROLES) * VELOCITY_LEVELS,
        "position": MAX_BAR_STEPS,
        "duration": len(DURATIONS_STEPS),
        "drum": HIGHEST[DRUMS] - LOWEST[DRUMS] + 1,
        "pitch": max(HIGHEST[1:]) + 1,
    }
    spans, start = {}, 0
    for name, size in sizes.items():
        spans[name] = (start, start + size)
        start += size
    return spans


SPANS: Final = _spans()
(
    METER,
    TEMPO,
    STYLE,
    BAR,
    CHORD,
    DENSITY,
    TRACKS,
    TRACK_VELOCITY,
    POSITION,
    DURATION,
    DRUM,
    PITCH,
) = (start for start, _ in SPANS.values())
VOCABULARY_SIZE: Final = SPANS["pitch"][1]
VOCABULARY_HASH: Final = hashlib.sha256(
    repr((SPANS, LOWEST, HIGHEST, DURATIONS_STEPS, TEMPO_EDGES_BPM, STYLES, DENSITY_EDGES)).encode()
).hexdigest()[:16]
"""Stands in the graph's metadata: a model speaks the vocabulary it was trained on, no other."""

HEADER_TOKENS: Final = 3
GIVEN_TOKENS: Final = 4  # CHORD CHORD DENSITY TRACKS, after BAR
_DURATION_INDEX: Final = {steps: index for index, steps in enumerate(DURATIONS_STEPS)}


@dataclass(frozen=True, slots=True, order=True)
class GridNote:
    """A note on the grid of its bar.

    Args:
        track: index into `ROLES`.
        onset_steps: from the bar's start, 0 <= onset < 12 * beats.
        duration_steps: one of `DURATIONS_STEPS`; 1 for drums.
        pitch: MIDI number within the track's range.
    """

    track: int
    onset_steps: int
    duration_steps: int
    pitch: int


@dataclass(frozen=True, slots=True)
class Header:
    """What holds for the whole song: beats a bar, tempo class 0..7, index into `STYLES`."""

    beats_per_bar: int
    tempo_class: int
    style: int = 0


@dataclass(frozen=True, slots=True)
class BarConditions:
    """What is given before a bar is written.

    Args:
        chords: of the first two beats and of the rest, 0..83 = 7 * root + quality, 84 = none.
        density: 0 = not given, 1 (sparse) .. 5 (busy).
        tracks: bit `1 << track` for each track that plays; it then has at least one onset.
    """

    chords: tuple[int, int]
    density: int
    tracks: int

    @property
    def tokens(self) -> tuple[int, int, int, int]:
        """The four given tokens, as they follow BAR."""
        first, second = self.chords
        return CHORD + first, CHORD + second, DENSITY + self.density, TRACKS + self.tracks


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its conditions, a velocity level for each track that plays, and its notes, sorted."""

    conditions: BarConditions
    velocities: dict[int, int]
    notes: tuple[GridNote, ...]


def chord_root(chord: int) -> int:
    """Root pitch class 0..11 of a chord index; 0 where there is no chord.

    >>> chord_root(7 * 9 + 1)  # A minor
    9
    """
    return 0 if chord == NO_CHORD else chord // len(CHORD_QUALITIES)


def chord_pitch_classes(chord: int) -> frozenset[int]:
    """Pitch classes of a chord index; empty where there is no chord.

    >>> sorted(chord_pitch_classes(0))
    [0, 4, 7]
    """
    if chord == NO_CHORD:
        return frozenset()
    root, quality = divmod(chord, len(CHORD_QUALITIES))
    return frozenset((root + interval) % 12 for interval in CHORD_INTERVALS[quality])


def tempo_class(tempo_bpm: float) -> int:
    """Class 0..7 of a tempo."""
    return int(np.searchsorted(TEMPO_EDGES_BPM, tempo_bpm, side="right"))


def density_level(onsets: int, tracks: int, beats: int) -> int:
    """Level 1..5 of `onsets` distinct onsets over `tracks` tracks and `beats` beats; 0 if none."""
    if onsets == 0:
        return 0
    return 1 + int(np.searchsorted(DENSITY_EDGES, onsets / (tracks * beats), side="right"))


def nearest_duration_steps(steps: float) -> int:
    """The entry of `DURATIONS_STEPS` nearest in ratio, since hearing judges lengths by ratio."""
    table = np.log(np.array(DURATIONS_STEPS))
    return DURATIONS_STEPS[int(np.argmin(np.abs(table - np.log(max(steps, 0.5)))))]


def encode_header(header: Header) -> list[int]:
    """The three tokens that open every sequence."""
    meter = METERS.index(header.beats_per_bar)
    return [METER + meter, TEMPO + header.tempo_class, STYLE + header.style]


def decode_header(tokens: Sequence[int]) -> Header:
    """Inverse of `encode_header`."""
    return Header(METERS[tokens[0] - METER], tokens[1] - TEMPO, tokens[2] - STYLE)


def root_at(conditions: BarConditions, onset_steps: int) -> int:
    """Root of the chord at an onset: the second chord begins with the third beat."""
    return chord_root(conditions.chords[onset_steps >= 2 * STEPS_PER_BEAT])


def encode_bar(bar: Bar) -> list[int]:
    """A bar as tokens, from BAR to its last note."""
    tokens = [BAR, *bar.conditions.tokens]
    track, group = -1, (-1, -1)
    for note in bar.notes:
        if note.track != track:
            track, group = note.track, (-1, -1)
            tokens.append(TRACK_VELOCITY + track * VELOCITY_LEVELS + bar.velocities[track])
        if (note.onset_steps, note.duration_steps) != group:
            group = (note.onset_steps, note.duration_steps)
            tokens.append(POSITION + note.onset_steps)
            if track != DRUMS:
                tokens.append(DURATION + _DURATION_INDEX[note.duration_steps])
        if track == DRUMS:
            tokens.append(DRUM + note.pitch - LOWEST[DRUMS])
        else:
            tokens.append(PITCH + note.pitch - root_at(bar.conditions, note.onset_steps))
    return tokens


def decode_bar(tokens: Sequence[int]) -> Bar:
    """Inverse of `encode_bar`, for a bar that the grammar accepts."""
    first, second, density, tracks = tokens[1 : 1 + GIVEN_TOKENS]
    conditions = BarConditions((first - CHORD, second - CHORD), density - DENSITY, tracks - TRACKS)
    velocities: dict[int, int] = {}
    notes: list[GridNote] = []
    track, onset, duration = -1, 0, 1
    for token in tokens[1 + GIVEN_TOKENS :]:
        if token >= PITCH:
            pitch = token - PITCH + root_at(conditions, onset)
            notes.append(GridNote(track, onset, duration, pitch))
        elif token >= DRUM:
            notes.append(GridNote(track, onset, 1, token - DRUM + LOWEST[DRUMS]))
        elif token >= DURATION:
            duration = DURATIONS_STEPS[token - DURATION]
        elif token >= POSITION:
            onset = token - POSITION
        else:
            track, level = divmod(token - TRACK_VELOCITY, VELOCITY_LEVELS)
            velocities[track] = level
    return Bar(conditions, velocities, tuple(notes))


def split_bars(tokens: Iterable[int]) -> Iterator[list[int]]:
    """The bars of a token stream without its header, each from its BAR."""
    bar: list[int] = []
    for token in tokens:
        if token == BAR and bar:
            yield bar
            bar = []
        bar.append(int(token))
    if bar:
        yield bar


class BarGrammar:
    """What may come next within one bar, after its given tokens; `allowed` is never empty.

    Every path through it ends with BAR (the next bar's first token), within `BAR_TOKENS` tokens,
    with each given track present, every pitch within its range, and no note struck twice.

    Args:
        beats_per_bar: 3 or 4.
        conditions: the given tokens of the bar.
        budget: tokens that the bar may spend, its given ones and the closing BAR included.
    """

    def __init__(
        self, beats_per_bar: int, conditions: BarConditions, budget: int = BAR_TOKENS
    ) -> None:
        self._steps = beats_per_bar * STEPS_PER_BEAT
        self._conditions = conditions
        self._left = budget - 1 - GIVEN_TOKENS
        self._waiting = [track for track in range(len(ROLES)) if conditions.tracks >> track & 1]
        self._track = -1
        self._onset = -1
        self._duration = -1  # index; -1: no note at this onset yet
        self._pitch = -1  # last of the open group; -1: the group has none yet
        self._struck: set[int] = set()
        self._kind = TRACKS
        self.done = False

    def push(self, token: int) -> None:
        """Takes one of the tokens that `allowed` offers."""
        self._left -= 1
        if token >= DRUM:
            self._pitch = token
            self._struck.add(token)
            self._kind = DRUM
        elif token >= DURATION:
            self._duration = token - DURATION
            self._kind = DURATION
        elif token >= POSITION:
            onset = token - POSITION
            if onset != self._onset:
                self._onset, self._duration = onset, -1
                self._struck.clear()
            self._pitch = -1
            self._kind = POSITION
        elif token >= TRACK_VELOCITY:
            self._track = self._waiting.pop(0)
            self._onset = self._duration = self._pitch = -1
            self._struck.clear()
            self._kind = TRACK_VELOCITY
        else:
            self.done = True

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[VOCABULARY_SIZE], True where the token may follow."""
        mask = np.zeros(VOCABULARY_SIZE, np.bool_)
        kind = self._kind
        if kind == TRACKS:
            self._allow_next_track(mask)
        elif kind == TRACK_VELOCITY:
            mask[POSITION : POSITION + self._steps] = True
        elif kind == DURATION:
            self._allow_pitches(mask)
        elif kind == POSITION and self._track != DRUMS:
            mask[DURATION + self._duration + 1 : DURATION + len(DURATIONS_STEPS)] = True
        elif kind == POSITION:
            mask[DRUM:PITCH] = True
        else:
            self._allow_after_note(mask)
        return mask

    def _allow_next_track(self, mask: npt.NDArray[np.bool_]) -> None:
        if self._waiting:
            start = TRACK_VELOCITY + self._waiting[0] * VELOCITY_LEVELS
            mask[start : start + VELOCITY_LEVELS] = True
        else:
            mask[BAR] = True

    def _allow_after_note(self, mask: npt.NDArray[np.bool_]) -> None:
        self._allow_next_track(mask)
        # The tracks still to come cost 4 tokens each at least (drums 3), the closing BAR one.
        spare = self._left - 4 * len(self._waiting) - 1
        is_full = len(self._struck) == STRUCK_AT_ONCE[self._track]
        if self._track == DRUMS:
            if spare >= 2:
                mask[POSITION + self._onset + 1 : POSITION + self._steps] = True
            if spare >= 1 and not is_full:
                mask[self._pitch + 1 : PITCH] = True
            return
        if spare >= 3:
            # The same onset again only for longer notes.
            later = is_full or self._duration + 1 == len(DURATIONS_STEPS)
            mask[POSITION + self._onset + later : POSITION + self._steps] = True
        if spare >= 1 and not is_full:
            self._allow_pitches(mask)

    def _allow_pitches(self, mask: npt.NDArray[np.bool_]) -> None:
        base = PITCH - root_at(self._conditions, self._onset)
        lowest = max(base + PLAYED_LOWEST[self._track], self._pitch + 1)
        mask[lowest : base + PLAYED_HIGHEST[self._track] + 1] = True
        mask[list(self._struck)] = False
