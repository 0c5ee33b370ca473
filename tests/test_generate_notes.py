"""Generation with the starter model itself, in this process; and the plan it is given."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.chords import estimate_chords, key_chord, pitch_class_profiles
from remix.errors import InvalidModel, InvalidOption
from remix.generate_notes import (
    HISTORY_TOKENS,
    WINDOW_BARS,
    generate_notes,
    join_chunks,
    one_plan,
    plan_song,
)
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.note_tokens import (
    CHORD_QUALITIES,
    NO_CHORD,
    STEPS_PER_BEAT,
    VOCABULARY_HASH,
    BarConditions,
    Header,
    chord_pitch_classes,
    decode_bar,
    encode_header,
    split_bars,
)
from remix.notes import ROLES, BeatGrid, Note, Tracks
from remix.options import GenerateOptions
from remix.settings import Settings
from remix.stages import Tensors
from runners.adaptive_batcher import Workers
from runners.band_transformer import BandTransformer, SampleOptions, sample
from runners.onnx_session import OnnxSession

MODEL = "band-transformer-2m"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> BandTransformer:
    """The model of the repository, verified against the manifest."""
    entry = read_manifest()[MODEL]
    file = replace(entry.files[0], path="generate_notes.onnx")
    folder = MANIFEST_PATH.parent / "starter"
    session = OnnxSession(entry, file, Settings(folder, tmp_path_factory.mktemp("run")))
    return BandTransformer(MODEL, session, session.facts, 8)


def steady_grid(
    tempo_bpm: float = 120.0, beats_per_bar: int = 4, length_s: float = 60.0
) -> BeatGrid:
    beats = np.arange(-1, int(length_s * tempo_bpm / 60) + 8) * 60 / tempo_bpm + 0.1
    return BeatGrid(beats, 2, beats_per_bar, tempo_bpm, 9, "minor")


def swaying_grid(length_s: float = 40.0) -> BeatGrid:
    """Between 100 and 140 bpm."""
    gaps = 0.5 + 0.07 * np.sin(np.arange(int(length_s * 2.4) + 8) / 5)
    return BeatGrid(np.cumsum(gaps) - 0.7, 1, 4, 120.0, 0, "major")


def written(
    writer: BandTransformer,
    grid: BeatGrid,
    length_s: float,
    options: GenerateOptions,
    heard: dict[str, list[Note]] | None = None,
) -> Tracks:
    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        assert model == MODEL
        return writer(inputs)

    plan = plan_song(heard or {}, grid, length_s, options)
    chunks = generate_notes(one_plan(plan), grid, length_s, MODEL, infer, options)
    return asyncio.run(join_chunks(chunks))


def chords_heard(grid: BeatGrid, chords: list[int], length_s: float) -> list[Note]:
    """A pad that holds each chord for one bar, from the first downbeat on."""
    notes = []
    beats = grid.first_downbeat + grid.beats_per_bar * np.arange(10_000)
    times = grid.beat_times_s
    for index, beat in enumerate(beats[beats + grid.beats_per_bar < len(times)].tolist()):
        onset_s, end_s = times[beat], times[beat + grid.beats_per_bar]
        for pitch_class in chord_pitch_classes(chords[index % len(chords)]):
            if onset_s >= 0 and end_s <= length_s:
                notes.append(Note(onset_s, end_s - onset_s, 60 + pitch_class, 80))
    return notes


def window(seed: int, bars: int, *, header: Header | None = None) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    history = np.full((1, HISTORY_TOKENS), -1)
    history[0, :3] = encode_header(header or Header(4, 3))
    conditions = np.full((1, WINDOW_BARS, 4), -1)
    for bar in range(bars):
        chords = (int(rng.integers(NO_CHORD)), int(rng.integers(NO_CHORD)))
        conditions[0, bar] = BarConditions(chords, 0, int(rng.integers(1, 32))).tokens
    return {
        "history": history,
        "conditions": conditions,
        "first_bar": np.array([[7]]),
        "seed": np.array([[seed]]),
        "temperature": np.array([[1.0]], np.float32),
        "top_p": np.array([[0.95]], np.float32),
    }


def of_window(writer: BandTransformer, inputs: Tensors) -> list[list[int]]:
    tokens = writer(inputs)["tokens"][0]
    return list(split_bars(tokens[tokens >= 0].tolist()))


@pytest.mark.parametrize("beats_per_bar", [3, 4])
def test_notes_lie_on_the_songs_beats_within_its_length(
    writer: BandTransformer, beats_per_bar: int
) -> None:
    grid = replace(swaying_grid(16.0), beats_per_bar=beats_per_bar)
    tracks = written(writer, grid, 15.3, GenerateOptions(seed=3))
    assert set(tracks) == set(ROLES)
    for notes in tracks.values():
        for note in notes:
            steps = float(grid.beat_at(note.onset_s)) * STEPS_PER_BEAT
            assert steps == pytest.approx(round(steps), abs=1e-6)  # interpolation there and back
            assert 0.0 <= note.onset_s < note.end_s <= 15.3 + 1e-9
            assert 1 <= note.velocity <= 127


def test_only_chosen_tracks_play(writer: BandTransformer) -> None:
    options = GenerateOptions(tracks=("bass", "strings", "drums"))
    assert set(written(writer, steady_grid(), 9.0, options)) == {"drums", "bass", "strings"}


def test_same_seed_is_the_same_music_and_another_is_not(writer: BandTransformer) -> None:
    grid = steady_grid()
    first = written(writer, grid, 9.0, GenerateOptions(seed=5))
    assert written(writer, grid, 9.0, GenerateOptions(seed=5)) == first
    assert written(writer, grid, 9.0, GenerateOptions(seed=6)) != first


def test_windows_are_the_same_in_any_company(writer: BandTransformer) -> None:
    windows = [window(seed, 1 + seed % WINDOW_BARS) for seed in range(6)]
    alone = [writer(inputs)["tokens"] for inputs in windows]
    together = writer({name: np.concatenate([w[name] for w in windows]) for name in windows[0]})
    np.testing.assert_array_equal(together["tokens"], np.concatenate(alone))


def test_windows_are_the_same_whoever_comes_and_goes(writer: BandTransformer) -> None:
    """Eight at once on two workers, one of them cancelled half-way."""
    windows = [window(seed, 1 + seed % WINDOW_BARS) for seed in range(8)]
    windows[3] = window(3, WINDOW_BARS)
    alone = [writer(inputs)["tokens"] for inputs in windows]

    async def together() -> list[Any]:
        batcher = writer.batcher(Workers(2), 100)
        calls = [asyncio.create_task(batcher.submit(inputs)) for inputs in windows]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert calls[3].cancel()
        results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        return results

    results = asyncio.run(together())
    assert isinstance(results.pop(3), asyncio.CancelledError)
    del alone[3]
    for (outputs, timing), expected in zip(results, alone, strict=True):
        np.testing.assert_array_equal(outputs["tokens"], expected)
        assert timing.batch_rows <= writer.max_batch
    assert max(timing.batch_rows for _, timing in results) > 1


def test_given_conditions_stand_in_the_output_and_their_tracks_play(
    writer: BandTransformer,
) -> None:
    inputs = window(1, WINDOW_BARS)
    bars = of_window(writer, inputs)
    assert [bar[1:5] for bar in bars] == inputs["conditions"][0].tolist()
    for tokens in bars:
        bar = decode_bar(tokens)
        assert sum(1 << track for track in bar.velocities) == bar.conditions.tracks
        assert {note.track for note in bar.notes} == set(bar.velocities)


def test_window_goes_on_where_its_history_ends(writer: BandTransformer) -> None:
    """Two windows of two bars are one of four: randomness belongs to the bar, not to the call."""
    whole = window(9, 4)
    begin, end = dict(whole), dict(whole)
    begin["conditions"] = whole["conditions"].copy()
    begin["conditions"][0, 2:] = -1
    first = of_window(writer, begin)
    end["history"] = whole["history"].copy()
    tokens = [token for bar in first for token in bar]
    end["history"][0, 3 : 3 + len(tokens)] = tokens
    end["conditions"] = np.roll(whole["conditions"], -2, axis=1)
    end["conditions"][0, 2:] = -1
    end["first_bar"] = whole["first_bar"] + 2
    assert first + of_window(writer, end) == of_window(writer, whole)


def test_window_without_bars_is_empty(writer: BandTransformer) -> None:
    assert of_window(writer, window(0, 0)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("top_p", 1.5), ("history", 5), ("seed", -1), ("conditions", 3)],
)
def test_impossible_input_is_refused(writer: BandTransformer, name: str, value: float) -> None:
    inputs = window(0, 1)
    inputs[name] = np.full_like(inputs[name], value)
    with pytest.raises(InvalidOption):
        writer(inputs)


def test_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidModel, match="vocabulary"):
        BandTransformer("other", lambda inputs: {}, {"vocabulary": "0" * 16}, 1)
    assert len(VOCABULARY_HASH) == 16


def test_written_notes_follow_the_chords_that_were_heard(writer: BandTransformer) -> None:
    grid = steady_grid(length_s=34.0)
    chords = [7 * root + quality for root, quality in ((1, 0), (8, 1), (6, 0), (11, 3))]
    heard = {"other": chords_heard(grid, chords, 34.0)}
    plan = plan_song(heard, grid, 34.0, GenerateOptions())
    inside = [pair for bar in plan.bars[1:-1] for pair in bar.chords]
    assert inside == [chord for chord in (chords * 9)[: len(inside) // 2] for _ in range(2)]
    tracks = written(writer, grid, 34.0, GenerateOptions(), heard)
    agreeing = sounding = 0.0
    for role, notes in tracks.items():
        for note in notes if role != "drums" else []:
            bar = int((grid.beat_at(note.onset_s) - plan.first_beat + 1e-6) // 4)
            sounding += note.duration_s
            in_chord = note.pitch % 12 in chord_pitch_classes(plan.bars[bar].chords[0])
            agreeing += note.duration_s * in_chord
    # Random notes of the key reach about 0.6, those of all twelve 0.27.
    assert agreeing / sounding > 0.75


def test_silence_is_filled_from_the_key_with_a_warning(writer: BandTransformer) -> None:
    grid = steady_grid()
    plan = plan_song({"other": []}, grid, 20.0, GenerateOptions())
    assert plan.bars[0].chords[0] == key_chord(9, "minor")
    assert "plain progression" in plan.warnings[0]
    tracks = written(writer, grid, 20.0, GenerateOptions())
    assert sum(len(notes) > 0 for notes in tracks.values()) >= 3


@pytest.mark.parametrize("length_s", [0.5, 2.0, 7.77])
def test_song_shorter_than_a_window_has_notes(writer: BandTransformer, length_s: float) -> None:
    tracks = written(writer, steady_grid(), length_s, GenerateOptions(seed=1))
    assert any(tracks.values())
    assert all(note.end_s <= length_s + 1e-9 for notes in tracks.values() for note in notes)


def test_continue_begins_from_what_was_heard(writer: BandTransformer) -> None:
    grid = steady_grid()
    heard = {"other": chords_heard(grid, [0, 35], 20.0), "drums": [Note(0.6, 0.1, 36, 90)]}
    options = GenerateOptions(mode="continue")
    plan = plan_song(heard, grid, 20.0, options)
    longer = plan_song(heard, grid, 20.0, GenerateOptions(mode="continue", prompt_bars=6))
    prompt = decode_bar(plan.prompt[0])
    assert {note.pitch for note in prompt.notes if note.track == 3} == {60, 64, 67}
    assert written(writer, grid, 20.0, options, heard) != written(
        writer, grid, 20.0, GenerateOptions(), heard
    )
    assert [len(plan.prompt), len(longer.prompt)] == [4, 6]
    empty = plan_song({}, grid, 20.0, options)
    assert len(empty.warnings) == 2


def test_busy_bars_are_asked_to_be_denser_than_sparse_ones() -> None:
    grid = steady_grid(length_s=32.0)
    sparse = [Note(0.6 + i, 0.4, 60, 80) for i in range(16)]
    busy = [Note(16.6 + i / 8, 0.1, 60, 80) for i in range(112)]
    plan = plan_song({"other": sparse + busy}, grid, 31.0, GenerateOptions())
    levels = [bar.density for bar in plan.bars]
    assert max(levels[:6]) < min(levels[10:14])


def test_denser_is_busier_than_sparser(writer: BandTransformer) -> None:
    grid = steady_grid()
    counts = []
    for density in (-2, 2):
        tracks = written(writer, grid, 30.0, GenerateOptions(seed=3, density=density))
        counts.append(sum(map(len, tracks.values())))
    assert counts[1] > 1.3 * counts[0]


def test_chords_of_played_chords_are_those_chords() -> None:
    for root in range(12):
        for quality, name in enumerate(CHORD_QUALITIES):
            chord = root * len(CHORD_QUALITIES) + quality
            profile = np.zeros((4, 12))
            profile[:, list(chord_pitch_classes(chord))] = 1.0
            profile[:, root] = 2.0  # the bass
            found = estimate_chords(profile, root, "minor" if "m" in name[:1] else "major")
            assert found.tolist() == [chord] * 4, (root, name)


def test_chords_of_nothing_are_none_and_gaps_keep_the_chord() -> None:
    assert estimate_chords(np.zeros((3, 12)), 0, "major").tolist() == [NO_CHORD] * 3
    profile = np.zeros((3, 12))
    profile[0, [2, 6, 9]] = 1.0
    assert len(set(estimate_chords(profile, 0, "major").tolist())) == 1


def test_profiles_share_a_note_between_the_spans_in_which_it_sounds() -> None:
    profile = pitch_class_profiles([Note(0.5, 1.0, 60, 127)], np.array([0.0, 1.0, 2.0]))
    assert profile[:, 0].tolist() == [0.5, 0.5]


def test_samples_follow_their_probabilities_within_the_nucleus() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    allowed = np.array([True, True, True, True])
    grid = (np.arange(1000) + 0.5) / 1000
    drawn = [sample(logits, allowed, SampleOptions(1.0, 0.75), u) for u in grid]
    assert np.bincount(drawn, minlength=4).tolist() == [625, 375, 0, 0]
    allowed[0] = False
    assert sample(logits, allowed, SampleOptions(0.01, 1.0), 0.999) == 1
