"""What the generator writes under given chords: how it fits them, the beats, and other music."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pretty_midi
from numpy.typing import NDArray

from remix.generate_notes import (
    HeardNotes,
    SongPlan,
    generate_notes,
    join_chunks,
    one_plan,
    plan_song,
)
from remix.manifest import read_manifest
from remix.midi import write_midi
from remix.note_tokens import (
    DRUMS,
    NO_CHORD,
    STEPS_PER_BEAT,
    Bar,
    BarConditions,
    Header,
    chord_pitch_classes,
    decode_bar,
    encode_bar,
    split_bars,
)
from remix.notes import ROLES, BeatGrid, Note, Tracks
from remix.options import GenerateOptions
from remix.settings import Settings
from remix.stages import Tensors
from runners.band_transformer import BandTransformer
from runners.onnx_session import OnnxSession
from training.band_songs import Song
from training.generate_notes import Augmentation, song_bar

Floats = NDArray[np.float64]

MODEL = "band-transformer-2m"
ALL_TRACKS = 2 ** len(ROLES) - 1
HALF_BAR = 2 * STEPS_PER_BEAT
MAJOR = (0, 2, 4, 5, 7, 9, 11)

ON_GRID_S = 0.010
"""Within so much of a sixteenth or a triplet an onset is on the grid: ears part clicks from about
there, and evenly strewn onsets at 120 bpm would reach a quarter."""


@dataclass(frozen=True)
class Written:
    """What the model wrote for a plan: its bars as tokens, and the notes as they are played."""

    bars: list[Bar]
    tracks: Tracks


class Band:
    """The model in this process, as its runner has it."""

    def __init__(self, graph: Path) -> None:
        entry = read_manifest()[MODEL]
        file = replace(entry.files[0], path=graph.name)
        session = OnnxSession(entry, file, Settings(graph.parent, graph.parent))
        self._model = BandTransformer(MODEL, session, session.facts, 8)
        self.tokens = 0

    def write(
        self, plan: SongPlan, grid: BeatGrid, length_s: float, options: GenerateOptions
    ) -> Written:
        """Everything for a plan, by the flow's own stage."""
        bars: list[Bar] = []

        async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
            outputs = self._model(inputs)
            tokens = outputs["tokens"][0]
            tokens = tokens[tokens >= 0].tolist()
            self.tokens += len(tokens)
            for bar in split_bars(tokens):
                bars.append(decode_bar(bar))
                assert encode_bar(bars[-1]) == bar, "a written bar is not what its notes say"
            return outputs

        chunks = generate_notes(one_plan(plan), grid, length_s, MODEL, infer, options)
        return Written(bars, asyncio.run(join_chunks(chunks)))


def swaying_grid(bars: int, beats_per_bar: int, tempo_bpm: float) -> BeatGrid:
    """Beats of a band that speeds up and slows down by 5 % every 32 beats, from 0.3 s on."""
    count = (bars + 2) * beats_per_bar
    sway = 1 + 0.05 * np.sin(2 * np.pi * np.arange(count) / 32)
    times_s = 0.3 + np.concatenate([[0.0], np.cumsum(60 / tempo_bpm * sway)])
    return BeatGrid(times_s, 0, beats_per_bar, tempo_bpm, 0, "major")


# Under the chords of held-out songs


class Agreement:
    """Sounding time of pitched notes, and how much of it is in the chord."""

    def __init__(self) -> None:
        self.in_chord = self.total = 0.0

    def add(self, chord: int, pitch: int, steps: float) -> None:
        """One note under the chord of its onset."""
        classes = chord_pitch_classes(chord)
        if classes:
            self.total += steps
            self.in_chord += steps * (pitch % 12 in classes)

    @property
    def share(self) -> float:
        """0 to 1."""
        return round(self.in_chord / max(self.total, 1e-9), 4)


def accompaniment(band: Band, songs: Sequence[Song], bars: int) -> dict[str, dict[str, float]]:
    """All five tracks under the chords of held-out charts, as `accompany` has them.

    Chord agreement: of sounding time, the share whose pitch belongs to the chord at its onset; of
    what is written, of MMA's own notes, and of notes drawn evenly from the song's scale. Beats: of
    onsets in seconds, the share on the grid of the song's real, swaying beats; of what is written,
    of MMA's own, and of onsets strewn evenly.
    """
    ours, mma, in_key = Agreement(), Agreement(), Agreement()
    on_grid: dict[str, list[NDArray[np.bool_]]] = {"model": [], "mma": [], "random": []}
    rng = np.random.default_rng(3)
    for seed, song in enumerate(songs):
        beats = song.header[0]
        grid = swaying_grid(bars, beats, float(rng.uniform(70, 160)))
        length_s = float(grid.time_at(bars * beats))
        chords = song.chords[:bars]
        conditions = tuple(BarConditions((a, b), 0, ALL_TRACKS) for a, b in chords.tolist())
        plan = SongPlan(Header(beats, song.header[1]), conditions, 0, bars)
        written = band.write(plan, grid, length_s, GenerateOptions(seed=seed))
        for bar in written.bars:
            for note in bar.notes:
                if note.track != DRUMS:
                    chord = bar.conditions.chords[note.onset_steps >= HALF_BAR]
                    ours.add(chord, note.pitch, note.duration_steps)
        whole = STEPS_PER_BEAT * beats
        notes = song.notes[song.notes[:, 1] < bars * whole]
        for _, onset, length, pitch, _ in notes[notes[:, 0] != DRUMS].tolist():
            mma.add(int(chords[onset // whole, int(onset % whole >= HALF_BAR)]), pitch, length)
        scale = best_scale(song, bars)
        for chord in chords.ravel().tolist():
            for pitch in rng.choice(scale, 8).tolist():
                in_key.add(chord, pitch, 1.0)
        file = pretty_midi.PrettyMIDI(io.BytesIO(write_midi(written.tracks, grid, length_s)))
        onsets_s = [note.start for part in file.instruments for note in part.notes]
        on_grid["model"].append(is_on_grid(np.array(onsets_s), grid))
        on_grid["mma"].append(is_on_grid(grid.time_at(notes[:, 1] / STEPS_PER_BEAT), grid))
        on_grid["random"].append(is_on_grid(rng.uniform(1.0, length_s, 500), grid))
    return {
        "chord_agreement": {
            "model": ours.share, "mma": mma.share, "random_notes_in_key": in_key.share,
        },
        "onsets_on_grid": {
            name: round(float(np.concatenate(parts).mean()), 4) for name, parts in on_grid.items()
        },
    }  # fmt: skip


def is_on_grid(onsets_s: Floats, grid: BeatGrid) -> NDArray[np.bool_]:
    """Which onsets are within 10 ms of a sixteenth or a triplet of the song's real beats."""
    beats = grid.beat_at(onsets_s)
    nearest = [np.abs(grid.time_at(np.round(beats * n) / n) - onsets_s) for n in (4, 3)]
    return np.asarray(np.minimum(*nearest) <= ON_GRID_S)


def best_scale(song: Song, bars: int) -> list[int]:
    """The major scale that holds most of the chart's chord notes."""
    counts = np.zeros(12)
    for chord in song.chords[:bars].ravel().tolist():
        counts[list(chord_pitch_classes(chord))] += 1
    root = max(range(12), key=lambda tonic: sum(counts[(tonic + s) % 12] for s in MAJOR))
    return [(root + step) % 12 for step in MAJOR]


# One progression against another

PROGRESSION_BARS = 4


def progressions_apart(
    band: Band, songs: Sequence[Song], kinds: int, seeds: int
) -> dict[str, float]:
    """Whether what is written under one progression is told from what is under another.

    Progressions of four bars, all in C, are written with several seeds each; style and tempo go
    with the seed. Every passage, and every single bar, is given to the progression whose other
    passages (without its own) its pitch classes are nearest to.
    """
    progressions = _progressions(songs, kinds)
    profiles = np.zeros((kinds, seeds, 2 * PROGRESSION_BARS, 12))
    for kind, chords in enumerate(progressions):
        for seed in range(seeds):
            conditions = tuple(BarConditions((a, b), 0, ALL_TRACKS) for a, b in chords.tolist())
            plan = SongPlan(Header(4, 2 + seed % 4, 1 + seed % 8), conditions, 0, PROGRESSION_BARS)
            grid = swaying_grid(PROGRESSION_BARS, 4, 100.0)
            written = band.write(plan, grid, 1e9, GenerateOptions(seed=seed))
            for index, bar in enumerate(written.bars):
                for note in bar.notes:
                    if note.track != DRUMS:
                        half = 2 * index + (note.onset_steps >= HALF_BAR)
                        length = min(note.duration_steps, HALF_BAR)
                        profiles[kind, seed, half, note.pitch % 12] += length
    profiles /= np.maximum(np.linalg.norm(profiles, axis=-1, keepdims=True), 1e-9)
    bars = profiles.reshape(kinds, seeds, PROGRESSION_BARS, 24)
    by_bar = [recognised(bars[:, :, bar]) for bar in range(PROGRESSION_BARS)]
    return {
        "passages": round(recognised(profiles.reshape(kinds, seeds, -1)), 4),
        "single_bars": round(float(np.mean(by_bar)), 4),
        "chance": round(1 / kinds, 4),
    }


def _progressions(songs: Sequence[Song], kinds: int) -> list[NDArray[np.int16]]:
    """Openings of held-out charts in C, whose roots differ in two half bars at least."""
    found: list[NDArray[np.int16]] = []
    for song in songs:
        tonic = best_scale(song, len(song.chords))[0]
        chords = song.chords[:PROGRESSION_BARS]
        if song.header[0] != 4 or NO_CHORD in chords:
            continue
        moved = ((chords - 7 * tonic) % NO_CHORD).astype(np.int16)
        if all(((moved // 7 != other // 7).sum() >= 2) for other in found):
            found.append(moved)
        if len(found) == kinds:
            break
    assert len(found) == kinds, "too few held-out songs"
    return found


def recognised(features: Floats) -> float:
    """[kinds, seeds, D] -> share that is nearest to its own kind's mean, itself left out."""
    kinds, seeds, _ = features.shape
    sums, right = features.sum(axis=1), 0
    for kind in range(kinds):
        for seed in range(seeds):
            means = sums / seeds
            means[kind] = (sums[kind] - features[kind, seed]) / (seeds - 1)
            scores = means @ features[kind, seed] / np.linalg.norm(means, axis=1)
            right += int(scores.argmax() == kind)
    return float(right / (kinds * seeds))


# Repetition and density

LOOK_BACK_BARS = 8


def habits(band: Band, songs: Sequence[Song], bars: int) -> dict[str, dict[str, float]]:
    """Repetition, and onsets per beat of each track: written pieces in held-out pieces' range.

    Written with the conditions of the held-out pieces themselves: chords, densities, tracks, style.
    Repetition: of a piece's bars, track by track, the share that equal one of the 8 before.

    Returns:
        For each habit the 5th and 95th percentile of the held-out pieces, the median of the written
        ones, and the share of them that lies within.
    """
    theirs: dict[str, list[float]] = {}
    ours: dict[str, list[float]] = {}
    for seed, song in enumerate(songs):
        known = [song_bar(song, index, Augmentation()) for index in range(bars)]
        plan = SongPlan(Header(*song.header), tuple(bar.conditions for bar in known), 0, bars)
        grid = swaying_grid(bars, song.header[0], 100.0)
        written = band.write(plan, grid, 1e9, GenerateOptions(seed=seed))
        for piece, found in ((known, theirs), (written.bars, ours)):
            for name, value in habits_of(piece, song.header[0]).items():
                found.setdefault(name, []).append(value)
    return {
        name: _within(np.array(ours[name]), np.array(theirs[name]))
        for name in sorted(theirs)
        if len(theirs[name]) >= 8
    }


def _within(ours: Floats, theirs: Floats) -> dict[str, float]:
    low, high = np.percentile(theirs, (5, 95))
    inside = (ours >= low - 1e-9) & (ours <= high + 1e-9)
    return {
        "held_out_5th": round(float(low), 3),
        "held_out_median": round(float(np.median(theirs)), 3),
        "held_out_95th": round(float(high), 3),
        "written_median": round(float(np.median(ours)), 3),
        "written_within": round(float(inside.mean()), 3),
    }


def habits_of(piece: Sequence[Bar], beats: int) -> dict[str, float]:
    """Repetition, and onsets per beat of each track in the bars in which it plays."""
    found: dict[str, float] = {}
    repeated = played = 0
    for track, role in enumerate(ROLES):
        figures = [
            frozenset((n.onset_steps, n.pitch) for n in bar.notes if n.track == track)
            for bar in piece
        ]
        sounding = [figure for figure in figures if figure]
        if sounding:
            onsets = sum(len({onset for onset, _ in figure}) for figure in sounding)
            found[f"onsets_per_beat_{role}"] = onsets / len(sounding) / beats
        for index in range(LOOK_BACK_BARS, len(piece)):
            if figures[index]:
                played += 1
                repeated += figures[index] in figures[index - LOOK_BACK_BARS : index]
    if played:
        found["repetition"] = repeated / played
    return found


# Every file is one


def validity(band: Band, seeds: int) -> dict[str, Any]:
    """Whole files of short songs: tempo, meter, length, tracks, mode and boldness by the seed.

    A file is valid where pretty_midi and mido both read the same number of notes in it, one at
    least, and none begins before the song or ends after it.
    """
    faults: dict[str, str] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        beats = int(rng.choice((3, 4)))
        length_s = float(rng.uniform(3.0, 14.0))
        grid = swaying_grid(40, beats, float(rng.uniform(60, 180)))
        grid = replace(grid, tonic=int(rng.integers(12)))
        heard = _strewn_notes(rng, length_s) if rng.random() < 0.7 else {}
        tracks = tuple(rng.permutation(ROLES)[: int(rng.integers(1, 6))].tolist())
        options = GenerateOptions(
            seed=seed,
            mode="continue" if rng.random() < 0.3 else "accompany",
            tracks=tracks,
            temperature=float(rng.uniform(0.5, 1.5)),
            top_p=float(rng.uniform(0.7, 1.0)),
        )
        plan = plan_song(heard, grid, length_s, options)
        written = band.write(plan, grid, length_s, options)
        fault = fault_of(write_midi(written.tracks, grid, length_s), length_s, tracks)
        if fault:
            faults[str(seed)] = fault
    return {"seeds": seeds, "valid": seeds - len(faults), "faults": faults}


def _strewn_notes(rng: np.random.Generator, length_s: float) -> HeardNotes:
    onsets = np.sort(rng.uniform(0, length_s, int(4 * length_s))).tolist()
    pitches = rng.integers(36, 84, len(onsets)).tolist()
    return {"other": [Note(a, 0.4, p, 80) for a, p in zip(onsets, pitches, strict=True)]}


def fault_of(data: bytes, length_s: float, tracks: Sequence[str]) -> str:
    """What is wrong with a MIDI file; empty where nothing is."""
    file = mido.MidiFile(file=io.BytesIO(data))
    struck = [e for track in file.tracks for e in track if e.type == "note_on" and e.velocity > 0]
    song = pretty_midi.PrettyMIDI(io.BytesIO(data))
    notes = [note for part in song.instruments for note in part.notes]
    names = {part.name for part in song.instruments}
    if not notes:
        return "no notes"
    if len(struck) != len(notes):
        return f"mido reads {len(struck)} notes, pretty_midi {len(notes)}"
    if max(note.end for note in notes) > length_s + 1e-3 or min(n.start for n in notes) < 0:
        return f"notes beyond {length_s} s"
    if not names <= set(tracks):
        return f"plays {names}, was told {tracks}"
    return ""
