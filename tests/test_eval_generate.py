"""The figures of `make eval-generate`: known music gives known figures, and a miss is named."""

from __future__ import annotations

import copy
import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest

from benchmarks.eval_generate import checks_of
from benchmarks.generation.perplexity import START, NGram
from benchmarks.generation.written import (
    Band,
    fault_of,
    habits_of,
    is_on_grid,
    recognised,
    swaying_grid,
    validity,
)
from remix.midi import write_midi
from remix.note_tokens import VOCABULARY_SIZE, Bar, BarConditions, GridNote
from remix.notes import Note

ROOT = Path(__file__).resolve().parent.parent


def by_hand(songs: list[list[int]], tokens: list[int], order: int) -> list[float]:
    """Witten and Bell's method C, as their paper has it."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for song in songs:
        padded = [START] * (order - 1) + song
        for index in range(order - 1, len(padded)):
            for length in range(order):
                counts[tuple(padded[index - length : index])][padded[index]] += 1
    found, padded = [], [START] * (order - 1) + tokens
    for index in range(order - 1, len(padded)):
        estimate = 1 / VOCABULARY_SIZE
        for length in range(order):
            seen = counts.get(tuple(padded[index - length : index]))
            if seen:
                kinds, total = len(seen), seen.total()
                estimate = (seen[padded[index]] + kinds * estimate) / (total + kinds)
        found.append(estimate)
    return found


@pytest.mark.parametrize("order", [1, 3, 5])
def test_ngram_is_the_one_that_is_counted_by_hand(order: int) -> None:
    rng = np.random.default_rng(0)
    songs = [rng.integers(0, 4, 50).tolist() for _ in range(3)]
    tokens = [*rng.integers(0, 5, 30).tolist(), VOCABULARY_SIZE - 1]
    found = NGram(songs, order).probabilities(tokens)
    np.testing.assert_allclose(found, by_hand(songs, tokens, order), rtol=1e-12)


def test_ngram_gives_all_tokens_together_one() -> None:
    songs = [[0, 1, 2, 0, 1, 3, 0, 1, 2]]
    model = NGram(songs, 3)
    shares = [model.probabilities([0, 1, token])[-1] for token in range(VOCABULARY_SIZE)]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) == shares[2]


def test_onsets_on_sixteenths_and_triplets_are_on_the_grid_and_others_are_not() -> None:
    grid = swaying_grid(4, 4, 100.0)
    beats = np.array([0, 0.25, 1 / 3, 0.5, 2 / 3, 5.75])
    assert is_on_grid(grid.time_at(beats), grid).all()
    assert is_on_grid(grid.time_at(beats) + 0.009, grid).all()
    assert not is_on_grid(grid.time_at(beats[[0, 3, 5]]) + 0.020, grid).any()


def test_kinds_that_differ_are_recognised_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    apart = np.repeat(np.eye(6)[:, None], 4, axis=1) + 0.05 * rng.random((6, 4, 6))
    assert recognised(apart) == 1.0
    assert recognised(rng.standard_normal((6, 40, 30))) < 0.35  # chance is 0.17


def test_repetition_is_of_the_last_eight_bars_and_density_of_those_that_play() -> None:
    def bar(pitch: int) -> Bar:
        notes = tuple(GridNote(1, onset, 12, pitch) for onset in (0, 12))
        return Bar(BarConditions((0, 0), 0, 2), {1: 4}, notes if pitch else ())

    same = habits_of([bar(40)] * 12, 4)
    assert same == {"repetition": 1.0, "onsets_per_beat_bass": 0.5}
    other = habits_of([bar(30 + index) for index in range(12)], 4)
    assert other["repetition"] == 0.0
    silent = habits_of([bar(0)] * 6 + [bar(40)] * 6, 4)
    assert silent == {"repetition": pytest.approx(1.0), "onsets_per_beat_bass": 0.5}


def test_faults_of_files_are_told() -> None:
    grid = swaying_grid(8, 4, 120.0)
    good = write_midi({"bass": [Note(1.0, 0.5, 40, 90)]}, grid, 4.0)
    assert fault_of(good, 4.0, ["bass"]) == ""
    assert "beyond" in fault_of(good, 1.2, ["bass"])
    assert "plays" in fault_of(good, 4.0, ["piano"])
    assert fault_of(write_midi({}, grid, 4.0), 4.0, ["bass"]) == "no notes"
    doubled = mido.MidiFile(file=io.BytesIO(good))
    doubled.tracks[-1].insert(2, mido.Message("note_on", note=50, velocity=9, time=0))
    written = io.BytesIO()
    doubled.save(file=written)
    assert "mido reads" in fault_of(written.getvalue(), 4.0, ["bass"])


def test_starter_writes_valid_files() -> None:
    found = validity(Band(ROOT / "starter/generate_notes.onnx"), 4)
    assert found == {"seeds": 4, "valid": 4, "faults": {}}


HABIT = {
    "held_out_5th": 0.2, "held_out_median": 0.4, "held_out_95th": 0.8,
    "written_median": 0.5, "written_within": 0.9,
}  # fmt: skip
SONG = {
    "song": "one",
    "tempo_bpm": {"ours": 120.5, "chart": 120.0, "librosa": 120.2, "essentia": 60.1},
    "key": {"ours": "A minor", "librosa": "A minor", "essentia": "C major"},
    "onsets_on_beats_near_beats_of": {"chart": 0.97, "librosa": 0.9, "essentia": 0.5},
    "onsets_on_own_grid": 0.99,
    "onsets": 400,
    "warnings": [],
}
GOOD: dict[str, Any] = {
    "perplexity": {"held_out": {"model": 4.5, "5-gram": 60.0, "untrained": 410.0}},
    "accompaniment": {
        "chord_agreement": {"model": 0.93, "mma": 0.94, "random_notes_in_key": 0.44},
        "onsets_on_grid": {"model": 0.97, "mma": 0.98, "random": 0.2},
    },
    "progressions": {"passages": 0.9, "single_bars": 0.7, "chance": 1 / 12},
    "habits": {"repetition": HABIT},
    "files": {"seeds": 200, "valid": 200, "faults": {}},
    "real_songs": [{**copy.deepcopy(SONG), "song": name} for name in ("one", "two", "three")],
}


def test_figures_within_their_limits_hold() -> None:
    assert [check.name for check in checks_of(GOOD) if not check.holds] == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("perplexity", "held_out", "model"), 30.0, "perplexity"),
        (("accompaniment", "chord_agreement", "model"), 0.84, "given chord"),
        (("accompaniment", "onsets_on_grid", "model"), 0.94, "beat grid"),
        (("progressions", "passages"), 0.4, "progression"),
        (("habits", "repetition", "written_median"), 0.9, "repetition"),
        (("files", "valid"), 199, "files valid"),
        (("real_songs", 1, "tempo_bpm", "ours"), 123.0, "tempo"),
        (("real_songs", 1, "key", "ours"), "B minor", "key"),
        (
            ("real_songs", 1, "onsets_on_beats_near_beats_of"),
            {"chart": 0.5, "librosa": 0.89, "essentia": 0.4},
            "onsets on beats",
        ),
    ],
)
def test_figure_beyond_its_limit_is_named(
    path: tuple[str | int, ...], value: object, named: str
) -> None:
    result = copy.deepcopy(GOOD)
    place: Any = result
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    missed = [check.name for check in checks_of(result) if not check.holds]
    assert len(missed) == 1
    assert named in missed[0]


def test_real_songs_that_are_not_to_be_had_are_no_miss() -> None:
    names = [check.name for check in checks_of({**GOOD, "real_songs": []})]
    assert not any("record" in name for name in names)
