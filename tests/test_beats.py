"""Beats, bars and key of sound whose beats, bars and key are known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.audio import Audio, Samples
from remix.beats import find_beats, find_key
from remix.manifest import read_manifest
from remix.notes import BeatGrid
from runners.soundfont_player import DRUMS, SoundFontPlayer

RATE_HZ = 44_100


def clicks(times_s: NDArray[Any], duration_s: float) -> Audio:
    """Noise bursts over a noise floor 70 dB down."""
    rng = np.random.default_rng(0)
    samples = 1e-4 * rng.standard_normal(round(duration_s * RATE_HZ))
    burst = 0.5 * rng.standard_normal(2_205) * np.exp(-np.arange(2_205) / 500)
    for time_s in times_s[times_s < duration_s - 0.05]:
        at = round(time_s * RATE_HZ)
        samples[at : at + 2_205] += burst
    return Audio(samples.astype(np.float32)[None], RATE_HZ)


def farthest_s(grid: BeatGrid, times_s: NDArray[Any]) -> float:
    """The largest distance of a time from its nearest beat."""
    return float(max(np.abs(grid.beat_times_s - time_s).min() for time_s in times_s))


def assert_covers(grid: BeatGrid, duration_s: float) -> None:
    assert grid.beat_times_s.dtype == np.float64
    assert (np.diff(grid.beat_times_s) > 0).all()
    assert grid.beat_times_s[0] <= 0
    assert grid.beat_times_s[-1] > duration_s
    assert 0 <= grid.first_downbeat < grid.beats_per_bar
    assert grid.beats_per_bar in (3, 4)
    assert 60 <= grid.tempo_bpm <= 180
    assert 0 <= grid.tonic < 12


@pytest.mark.parametrize("bpm", [70, 90, 100, 120, 133.3, 150])
def test_beats_of_clicks_are_the_clicks(bpm: float) -> None:
    times_s = np.arange(0.31, 20, 60 / bpm)
    grid = find_beats(clicks(times_s, 20))
    assert_covers(grid, 20)
    assert grid.tempo_bpm == pytest.approx(bpm, rel=2e-3)
    assert farthest_s(grid, times_s) < 0.015  # a frame and a quarter


@pytest.mark.parametrize("bpm", [40, 62, 165, 175, 200, 220])
def test_tempo_that_is_rare_or_out_of_range_is_taken_in_parts_or_multiples(bpm: float) -> None:
    times_s = np.arange(0.31, 20, 60 / bpm)
    grid = find_beats(clicks(times_s, 20))
    assert_covers(grid, 20)
    assert min(abs(grid.tempo_bpm / bpm - ratio) for ratio in (0.5, 1, 2, 3)) < 5e-3
    inside_s = grid.beat_times_s[
        (grid.beat_times_s > 0.2) & (grid.beat_times_s < times_s[-1] + 0.1)
    ]
    beats_on_clicks = max(np.abs(times_s - beat_s).min() for beat_s in inside_s) < 0.015
    assert beats_on_clicks or farthest_s(grid, times_s) < 0.015


def test_beats_follow_a_player_who_slows_down() -> None:
    steps_s = 0.45 + 0.12 * np.linspace(0, 1, 60)
    times_s = 0.2 + np.cumsum(steps_s)
    duration_s = float(times_s[-1]) + 0.5
    grid = find_beats(clicks(times_s, duration_s))
    assert_covers(grid, duration_s)
    # The line through nine beats lags at a curve's ends.
    assert farthest_s(grid, times_s) < 0.04


def test_beats_of_a_player_who_is_not_exact_are_exact() -> None:
    rng = np.random.default_rng(1)
    ruler_s = 0.3 + 0.5 * np.arange(60)
    grid = find_beats(clicks(ruler_s + 0.015 * rng.standard_normal(60), 31))
    assert farthest_s(grid, ruler_s) < 0.015
    assert np.diff(grid.beat_times_s).std() < 1e-9


def test_beats_go_on_through_silence() -> None:
    times_s = 3.0 + 0.5 * np.arange(80)
    sounding = times_s[(times_s < 15) | (times_s > 25)]
    grid = find_beats(clicks(sounding, 60))  # silent for 3 s, 10 s and at the end 17 s
    assert_covers(grid, 60)
    assert farthest_s(grid, times_s) < 0.015
    assert np.diff(grid.beat_times_s).max() < 0.51


@pytest.fixture(scope="module")
def player() -> SoundFontPlayer:
    return SoundFontPlayer(Path(read_manifest()["musescore-general"].origin["path"]), RATE_HZ)


CHORDS = {"I": (0, 4, 7), "IV": (5, 9, 12), "V": (7, 11, 14), "vi": (9, 12, 16),
          "i": (0, 3, 7), "iv": (5, 8, 12), "VI": (8, 12, 15)}  # fmt: skip


def played(
    player: SoundFontPlayer,
    *,
    bpm: float,
    beats_per_bar: int,
    tonic: int,
    chords: str,
    pickup: int = 0,
    start_s: float = 0.4,
    bars: int = 12,
) -> tuple[Audio, NDArray[Any]]:
    """A piano, a bass and drums; and the times of its bars."""
    beat_s = 60 / bpm
    bars_s = start_s + beat_s * (pickup + beats_per_bar * np.arange(bars))
    notes: dict[int, list[tuple[float, float, int, int]]] = {0: [], 33: [], DRUMS: []}
    names = chords.split()
    for beat in range(-pickup, beats_per_bar * bars):
        at_s, place = start_s + beat_s * (beat + pickup), beat % beats_per_bar
        chord = [48 + tonic + k for k in CHORDS[names[beat // beats_per_bar % len(names)]]]
        notes[DRUMS] += [(at_s, 0.1, 42, 70), (at_s + beat_s / 2, 0.1, 42, 55)]
        if place == 0:
            notes[DRUMS].append((at_s, 0.1, 36, 110))
            notes[33].append((at_s, beat_s * 0.9, chord[0] - 12, 100))
            notes[0] += [(at_s, beat_s * (beats_per_bar - 0.1), key, 80) for key in chord]
        elif place == 2 and beats_per_bar == 4:
            notes[DRUMS].append((at_s, 0.1, 36, 100))
            notes[33].append((at_s, beat_s * 0.9, chord[0] - 12, 85))
        else:
            notes[DRUMS].append((at_s, 0.1, 38, 90))
            notes[0] += [(at_s, beat_s * 0.4, key, 60) for key in chord[1:]]
    length = round((bars_s[-1] + beat_s * beats_per_bar) * RATE_HZ) // 64 * 64
    mix: Samples = np.zeros((2, length), np.float32)
    for program, rows in notes.items():
        table = np.array(rows, np.float32)
        table[:, :2] *= RATE_HZ
        mix += player.render(table, program, length)
    return Audio(mix, RATE_HZ), bars_s


SONGS = [
    (96, 4, 0, "I vi IV V", 0, "major"),
    (124, 4, 7, "I V vi IV", 0, "major"),
    (110, 4, 9, "i VI iv V", 2, "minor"),
    (140, 3, 2, "I IV V I", 0, "major"),
    (118, 3, 4, "i iv V i", 1, "minor"),
]


@pytest.mark.parametrize(("bpm", "beats_per_bar", "tonic", "chords", "pickup", "mode"), SONGS)
def test_song_has_its_tempo_bars_and_key(
    player: SoundFontPlayer,
    bpm: float,
    beats_per_bar: int,
    tonic: int,
    chords: str,
    pickup: int,
    mode: Literal["major", "minor"],
) -> None:
    song, bars_s = played(
        player, bpm=bpm, beats_per_bar=beats_per_bar, tonic=tonic, chords=chords, pickup=pickup
    )
    grid = find_beats(song)
    assert_covers(grid, song.duration_s)
    assert grid.tempo_bpm == pytest.approx(bpm, rel=2e-3)
    assert grid.beats_per_bar == beats_per_bar
    downbeats_s = grid.beat_times_s[grid.first_downbeat :: beats_per_bar]
    # An instrument's attack is not a click: two frames.
    assert max(np.abs(downbeats_s - bar_s).min() for bar_s in bars_s) < 0.025
    assert (grid.tonic, grid.mode) == (tonic, mode)


def test_grid_of_a_song_is_that_of_its_half(player: SoundFontPlayer) -> None:
    song, _ = played(player, bpm=104, beats_per_bar=4, tonic=5, chords="I IV V I", bars=16)
    half = Audio(song.samples[:, : song.samples.shape[1] // 2], RATE_HZ)
    assert farthest_s(find_beats(half), find_beats(song).beat_times_s[1:30]) < 0.01
    slow = Audio(song.samples, 22_050)
    assert find_beats(slow).tempo_bpm == pytest.approx(104, rel=2e-3)  # 52 bpm in doubles


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 96_000])
@pytest.mark.parametrize("duration_s", [0.0001, 0.05, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["silence", "noise", "tone", "click", "constant"])
def test_anything_at_all_has_a_grid(kind: str, duration_s: float, rate_hz: int) -> None:
    length = max(1, round(duration_s * rate_hz))
    samples = {
        "silence": np.zeros(length),
        "noise": np.random.default_rng(0).standard_normal(length),
        "tone": np.sin(np.arange(length) * 0.1),
        "click": np.eye(1, length, length // 2)[0],
        "constant": np.ones(length),
    }[kind]
    grid = find_beats(Audio(samples.astype(np.float32)[None].repeat(2, axis=0), rate_hz))
    assert_covers(grid, duration_s)


def test_silence_has_the_usual_grid() -> None:
    grid = find_beats(Audio(np.zeros((2, 10 * RATE_HZ), np.float32), RATE_HZ))
    assert (grid.tempo_bpm, grid.beats_per_bar, grid.tonic, grid.mode) == (120.0, 4, 0, "major")


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize("mode", ["major", "minor"])
def test_key_of_a_cadence_is_its_tonic(tonic: int, mode: str) -> None:
    names = ("I", "IV", "V", "I") if mode == "major" else ("i", "iv", "V", "i")
    chroma = np.zeros(12)
    for name in names:
        for step in CHORDS[name]:
            chroma[(tonic + step) % 12] += 1
    assert find_key(chroma) == (tonic, mode)


@pytest.mark.slow
def test_beats_of_ten_minutes_are_found_in_seconds() -> None:
    times_s = np.arange(0.3, 600, 0.5)
    song = clicks(times_s, 600)
    started_s = time.process_time()
    grid = find_beats(song)
    assert time.process_time() - started_s < 15
    assert farthest_s(grid, times_s) < 0.02
