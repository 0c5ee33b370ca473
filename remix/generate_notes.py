"""heard notes, beats -> a new band's notes, window by window, by the model the manifest names.

What the song gives: its bars, the chord of each half bar, how busy each bar is. What the model
gives: every note. Windows of four bars follow each other, each with the tokens before it as its
history; a window's notes are given out as soon as they are written. Onsets lie between the song's
real beats, so the new band speeds up and slows down with the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from remix.chords import estimate_chords, key_chord, pitch_class_profiles
from remix.midi import without_overlaps
from remix.note_tokens import (
    BAR_TOKENS,
    CHORD_QUALITIES,
    DENSITY_LEVELS,
    DRUMS,
    GIVEN_TOKENS,
    HEADER_TOKENS,
    HIGHEST,
    LOWEST,
    STEPS_PER_BEAT,
    STYLES,
    VELOCITY_LEVELS,
    Bar,
    BarConditions,
    GridNote,
    Header,
    decode_bar,
    encode_bar,
    encode_header,
    nearest_duration_steps,
    split_bars,
    tempo_class,
)
from remix.notes import ROLES, BeatGrid, Note, Tracks
from remix.options import GenerateOptions
from remix.stages import Infer, Progress
from remix.transcribe_notes import Section

WINDOW_BARS = 4
"""Bars of one window: 340 tokens on average, about a third of a second on one core."""

HISTORY_TOKENS = 640
"""Of the header and the bars before a window: with the window they fill the 1,024 tokens that the
model was trained on; 7 bars on average."""

WINDOW_TOKENS = WINDOW_BARS * BAR_TOKENS

MIDDLE_DENSITY = 3
"""Of the levels 1 to 5: how busy a usual bar of a song is."""

SMALLEST_SHARE = 0.15
"""Of half bars in which something must be heard for chords to be taken from it."""

SHORTEST_S = 0.05
"""A note that would be shorter at the song's end is left out."""

DRUM_S = 0.1
"""Length of a drum note; the sound is the instrument's own."""

ACCENTS = {"bar": 8, "beat": 4, "half": 0, "other": -6}
"""Added to the velocity of a note by its place in the bar: tokens carry one velocity for each
track and bar, and a bar without accents sounds like a machine."""

HeardNotes = Mapping[str, Sequence[Note]]
"""Notes by role or stem; those of `drums` carry no pitch."""


@dataclass(frozen=True)
class SongPlan:
    """What is given to the model, and where it lies in the song.

    Args:
        header: opens every history.
        bars: conditions of each bar, in order.
        first_beat: index of the first bar's first beat in the song's grid; may be negative.
        count: how many bars the song has; `bars` are fewer while it is still being heard.
        prompt: token bars that the first window continues.
        warnings: what had to be assumed, in words for the report.
    """

    header: Header
    bars: tuple[BarConditions, ...]
    first_beat: int
    count: int
    prompt: tuple[tuple[int, ...], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every bar of the song is there."""
        return len(self.bars) == self.count


@dataclass(frozen=True)
class NotesChunk:
    """The notes of one window, finished.

    Args:
        start_s: where the window begins in the song.
        end_s: where it ends; its notes begin before, and may last longer.
        tracks: the notes by role.
    """

    start_s: float
    end_s: float
    tracks: Tracks


def plan_song(
    heard: HeardNotes,
    grid: BeatGrid,
    length_s: float,
    options: GenerateOptions,
    style: str = "any",
    *,
    known_to_s: float = inf,
    before: SongPlan | None = None,
) -> SongPlan:
    """The song's bars, chords and densities, out of what was heard.

    Args:
        heard: of the song's stems; velocity stands for confidence. May be empty.
        grid: the song's beats and key.
        length_s: of the song.
        options: tracks and mode.
        style: one of `STYLES`.
        known_to_s: until where it was heard; bars that are followed by less than a bar of it are
            left for later.
        before: the plan of what was heard earlier, whose bars stay as they are.
    """
    pitched = [note for name, notes in heard.items() if name != "drums" for note in notes]
    first_beat, count = _bars(grid, length_s)
    beats = grid.beats_per_bar
    known = count
    if known_to_s < length_s:
        known = min(int((_beat_at(grid, known_to_s) - first_beat) // beats) - 1, count - 1)
    done = before.bars if before else ()
    bars = (*done, *_planned_bars(pitched, grid, first_beat, known, options)[len(done) :])
    prompt: tuple[tuple[int, ...], ...] = ()
    warnings = []
    if options.mode == "continue":
        prompt = _prompt(heard, grid, first_beat, bars, options.prompt_bars)
        if not prompt:
            warnings.append("No bar was heard well enough to continue from: the band starts anew.")
    heard_share = _heard_share(_profiles(pitched, grid, first_beat, known))
    if heard_share < SMALLEST_SHARE:
        warnings.append(
            f"Notes were heard in {heard_share:.0%} of the half bars, {SMALLEST_SHARE:.0%} are "
            "needed: the chords are a plain progression in the song's key."
        )
    header = Header(beats, tempo_class(grid.tempo_bpm), STYLES.index(style))
    return SongPlan(header, bars, first_beat, count, prompt, tuple(warnings))


async def plan_while_heard(
    sections: AsyncIterator[Section], grid: BeatGrid, length_s: float, options: GenerateOptions
) -> AsyncIterator[SongPlan]:
    """A plan after every section that was heard, each with the bars of the last one and more.

    Args:
        sections: of the song's stems, in order.
        grid: the song's beats and key.
        length_s: of the song.
        options: tracks and mode.
    """
    heard: dict[str, list[Note]] = {}
    plan: SongPlan | None = None
    async for section in sections:
        for name, notes in section.notes.items():
            heard.setdefault(name, []).extend(notes)
        plan = await asyncio.to_thread(
            plan_song, heard, grid, length_s, options, known_to_s=section.end_s, before=plan
        )
        yield plan
    if plan is None or not plan.is_whole:
        yield await asyncio.to_thread(plan_song, heard, grid, length_s, options, before=plan)


async def generate_notes(
    plans: AsyncIterator[SongPlan],
    grid: BeatGrid,
    length_s: float,
    model: str,
    infer: Infer,
    options: GenerateOptions,
    *,
    progress: Progress | None = None,
) -> AsyncIterator[NotesChunk]:
    """Writes a plan's bars, giving out each window as soon as it is written.

    Args:
        plans: of `plan_while_heard`; or the one of `plan_song`, in which all bars are.
        grid: the song's beats.
        length_s: of the song; no note begins or lasts beyond it.
        model: name of the manifest entry.
        infer: runs it; inputs and outputs as `runners/generate_notes.py` says.
        options: seed, temperature, top-p.
        progress: is told after every window.

    Yields:
        Chunks in the song's order, without gaps.
    """
    written: list[list[int]] | None = None
    first = 0
    async for plan in plans:
        if written is None:
            is_prompted = options.mode == "accompany" or len(plan.prompt) == options.prompt_bars
            if not is_prompted and not plan.is_whole:
                continue  # what it is to go on from was not all heard yet
            written = [list(bar) for bar in plan.prompt]
        while first < len(plan.bars) and (plan.is_whole or first + WINDOW_BARS <= len(plan.bars)):
            conditions = plan.bars[first : first + WINDOW_BARS]
            outputs = await infer(model, _window(plan.header, written, conditions, first, options))
            tokens = outputs["tokens"][0]
            bars = list(split_bars(tokens[tokens >= 0].tolist()))
            written = (written + bars)[-32:]
            last = min(first + WINDOW_BARS, plan.count)
            if progress:
                progress("generate_notes", last / plan.count)
            yield _played_window(bars, plan, first, last, grid, length_s)
            first = last


async def one_plan(plan: SongPlan) -> AsyncIterator[SongPlan]:
    """A plan in which all bars are, as `generate_notes` takes it."""
    yield plan


async def join_chunks(chunks: AsyncIterator[NotesChunk]) -> Tracks:
    """All notes by role; one that is struck again while it sounds ends there."""
    joined: Tracks = {}
    async for chunk in chunks:
        for role, notes in chunk.tracks.items():
            joined.setdefault(role, []).extend(notes)
    return {role: without_overlaps(joined[role]) for role in ROLES if role in joined}


def _played_window(
    bars: Sequence[list[int]],
    plan: SongPlan,
    first: int,
    last: int,
    grid: BeatGrid,
    length_s: float,
) -> NotesChunk:
    """The notes of a window's bars, from bar `first` to bar `last`."""
    tracks: Tracks = {ROLES[track]: [] for track in range(len(ROLES))}
    for index, bar in enumerate(bars):
        start_beat = plan.first_beat + (first + index) * grid.beats_per_bar
        for role, note in _played(decode_bar(bar), grid, start_beat, length_s):
            tracks[ROLES[role]].append(note)
    edges = plan.first_beat + grid.beats_per_bar * np.array([first, last])
    start_s, end_s = np.clip(_time_at(grid, edges), 0.0, length_s).tolist()
    return NotesChunk(
        start_s, end_s, {role: sorted(notes) for role, notes in tracks.items() if notes}
    )


def _planned_bars(
    pitched: Sequence[Note],
    grid: BeatGrid,
    first_beat: int,
    count: int,
    options: GenerateOptions,
) -> list[BarConditions]:
    """Chords, density and tracks of the song's first `count` bars."""
    if count <= 0:
        return []
    profiles = _profiles(pitched, grid, first_beat, count)
    if _heard_share(profiles) >= SMALLEST_SHARE:
        chords = estimate_chords(profiles, grid.tonic, grid.mode)
    else:
        chords = _plain_chords(grid, count)
    tracks = sum(1 << ROLES.index(role) for role in set(options.tracks))
    starts = first_beat + grid.beats_per_bar * np.arange(count + 1)
    densities = _densities(pitched, grid, starts, options.density)
    return [
        BarConditions((int(first), int(second)), int(density), tracks)
        for (first, second), density in zip(chords.reshape(-1, 2), densities, strict=True)
    ]


def _profiles(
    pitched: Sequence[Note], grid: BeatGrid, first_beat: int, count: int
) -> NDArray[np.float64]:
    """[2 * count, 12]: what sounds in each half bar."""
    starts = first_beat + grid.beats_per_bar * np.arange(max(count, 0) + 1)
    halves = np.sort(np.concatenate((starts, starts[:-1] + 2)))
    return pitch_class_profiles(pitched, _time_at(grid, halves))


def _heard_share(profiles: NDArray[np.float64]) -> float:
    """Of the half bars, those in which something sounds."""
    return float(profiles.any(axis=1).mean()) if len(profiles) else 0.0


def _window(
    header: Header,
    written: Sequence[list[int]],
    conditions: Sequence[BarConditions],
    first_bar: int,
    options: GenerateOptions,
) -> dict[str, NDArray[np.generic]]:
    """The inputs of one window: the header, as many of the latest bars as fit, the conditions."""
    history: list[int] = []
    for bar in reversed(written):
        if HEADER_TOKENS + len(bar) + len(history) > HISTORY_TOKENS:
            break
        history = bar + history
    history = encode_header(header) + history
    padded = np.full((1, HISTORY_TOKENS), -1, np.int64)
    padded[0, : len(history)] = history
    given = np.full((1, WINDOW_BARS, GIVEN_TOKENS), -1, np.int64)
    given[0, : len(conditions)] = [bar.tokens for bar in conditions]
    return {
        "history": padded,
        "conditions": given,
        "first_bar": np.array([[first_bar]]),
        "seed": np.array([[options.seed]]),
        "temperature": np.array([[options.temperature]], np.float32),
        "top_p": np.array([[options.top_p]], np.float32),
    }


def _played(bar: Bar, grid: BeatGrid, start_beat: int, length_s: float) -> list[tuple[int, Note]]:
    """(track, note) of each note of a bar that begins within the song, in seconds."""
    if not bar.notes:
        return []
    onsets = np.array([note.onset_steps for note in bar.notes])
    ends = onsets + [note.duration_steps for note in bar.notes]
    onset_s = _time_at(grid, start_beat + onsets / STEPS_PER_BEAT)
    end_s = _time_at(grid, start_beat + ends / STEPS_PER_BEAT)
    played = []
    for note, begin, end in zip(bar.notes, onset_s.tolist(), end_s.tolist(), strict=True):
        duration_s = min(DRUM_S if note.track == DRUMS else end - begin, length_s - begin)
        if begin >= -1e-9 and duration_s >= SHORTEST_S:
            velocity = _velocity(bar.velocities[note.track], note.onset_steps)
            played.append((note.track, Note(max(begin, 0.0), duration_s, note.pitch, velocity)))
    return played


def _velocity(level: int, onset_steps: int) -> int:
    place = (
        "bar" if onset_steps == 0
        else "beat" if onset_steps % STEPS_PER_BEAT == 0
        else "half" if onset_steps % (STEPS_PER_BEAT // 2) == 0
        else "other"
    )  # fmt: skip
    return int(np.clip(128 // VELOCITY_LEVELS * level + 8 + ACCENTS[place], 1, 127))


def _bars(grid: BeatGrid, length_s: float) -> tuple[int, int]:
    """Index of the first bar's first beat, and how many bars reach the song's end."""
    beats = grid.beats_per_bar
    at_zero = float(_beat_at(grid, 0.0))
    # A twentieth of a beat of the music before the first downbeat is no bar of its own.
    behind = int(np.ceil((grid.first_downbeat - at_zero - 0.05) / beats))
    first_beat = grid.first_downbeat - beats * behind
    end_beat = float(_beat_at(grid, length_s))
    return first_beat, max(int(np.ceil((end_beat - first_beat - 0.2) / beats)), 1)


def _time_at(grid: BeatGrid, beats: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.float64]:
    """`BeatGrid.time_at`, going on beyond both ends of the grid at its outermost tempo."""
    times = grid.beat_times_s
    beats = np.asarray(beats, np.float64)
    last = len(times) - 1
    before = np.minimum(beats, 0.0) * (times[1] - times[0])
    after = np.maximum(beats - last, 0.0) * (times[-1] - times[-2])
    return np.asarray(grid.time_at(beats) + before + after)


def _beat_at(grid: BeatGrid, time_s: float) -> float:
    """Inverse of `_time_at`."""
    times = grid.beat_times_s
    before = min(time_s - times[0], 0.0) / (times[1] - times[0])
    after = max(time_s - times[-1], 0.0) / (times[-1] - times[-2])
    return float(grid.beat_at(time_s) + before + after)


def _plain_chords(grid: BeatGrid, bars: int) -> NDArray[np.int64]:
    """I V vi IV in major, i VI III VII in minor, a chord a bar: [2 * bars]."""
    size = len(CHORD_QUALITIES)
    steps = ((0, 0), (7, 0), (9, 1), (5, 0)) if grid.mode == "major" else (
        (0, 1), (8, 0), (3, 0), (10, 0)
    )  # fmt: skip
    chords = [(grid.tonic + step) % 12 * size + quality for step, quality in steps]
    assert chords[0] == key_chord(grid.tonic, grid.mode)
    return np.repeat(np.resize(chords, bars), 2)


def _densities(
    notes: Sequence[Note], grid: BeatGrid, starts: NDArray[np.int64], busier: int
) -> NDArray[np.int64]:
    """A density level a bar: the song's usual bar is 3, busier ones more, and `busier` on top.

    0, which leaves it to the model, if little is heard and nothing else is asked for.
    """
    bars = len(starts) - 1
    if len(notes) < 2 * bars:
        return np.full(bars, MIDDLE_DENSITY + busier if busier else 0)
    onsets = np.array([_beat_at(grid, note.onset_s) for note in notes])
    quarters = np.unique(np.round(onsets * 4)) / 4
    counts = np.histogram(quarters, np.append(starts, starts[-1] + 1) - 0.125)[0][:bars]
    smooth = np.convolve(np.pad(counts, 1, mode="edge"), (0.25, 0.5, 0.25), "valid")
    ratio = smooth / max(float(np.median(smooth)), 1.0)
    levels = 1 + np.searchsorted((0.4, 0.75, 1.25, 1.7), ratio)
    return np.clip(levels + busier, 1, DENSITY_LEVELS - 1)


def _prompt(
    heard: HeardNotes, grid: BeatGrid, first_beat: int, bars: Sequence[BarConditions], most: int
) -> tuple[tuple[int, ...], ...]:
    """The first bars in which something was heard, as tokens; so many at most."""
    steps = grid.beats_per_bar * STEPS_PER_BEAT
    found: dict[int, dict[tuple[int, int, int], int]] = {}
    for name, notes in heard.items():
        for note in notes:
            begin = _beat_at(grid, note.onset_s) - first_beat
            length = (_beat_at(grid, note.end_s) - first_beat - begin) * STEPS_PER_BEAT
            index, onset = divmod(round(begin * STEPS_PER_BEAT), steps)
            track = ROLES.index(name) if name in ROLES else 1 if note.pitch < 48 else 3
            if 0 <= index < len(bars) and LOWEST[track] <= note.pitch <= HIGHEST[track]:
                duration = 1 if track == DRUMS else nearest_duration_steps(length)
                found.setdefault(index, {})[track, onset, note.pitch] = duration
    prompt = []
    for index in sorted(found)[:most]:
        notes_of_bar = [GridNote(t, o, d, p) for (t, o, p), d in found[index].items()]
        tracks = {note.track for note in notes_of_bar}
        conditions = BarConditions(bars[index].chords, 0, sum(1 << track for track in tracks))
        bar = Bar(conditions, dict.fromkeys(tracks, 5), tuple(sorted(notes_of_bar)))
        tokens = encode_bar(bar)
        if len(tokens) < BAR_TOKENS:
            prompt.append(tuple(tokens))
    return tuple(prompt)
