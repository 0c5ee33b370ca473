"""Beats of notes that came without a song."""

from __future__ import annotations

import io

import mido
import numpy as np
import pytest

from remix.midi import read_midi, write_midi
from remix.note_grid import end_of, find_grid, read_grid
from remix.notes import BeatGrid, Note, Tracks


def on_the_beat(tempo_bpm: float, beats: int = 64) -> Tracks:
    beat_s = 60.0 / tempo_bpm
    chord = (60, 64, 67)  # C major
    return {
        "piano": [Note(i * beat_s, 0.8 * beat_s, p, 90) for i in range(beats) for p in chord],
        "bass": [Note(i * beat_s, 0.9 * beat_s, 36, 100) for i in range(0, beats, 2)],
    }


@pytest.mark.parametrize("tempo_bpm", [90.0, 120.0])
def test_grid_found_by_listening_has_the_tempo_of_the_notes(tempo_bpm: float) -> None:
    tracks = on_the_beat(tempo_bpm)
    grid = find_grid(tracks, end_of(tracks))
    # Two hops of the onset detector (12 ms) over a beat of 0.5 s are 5 %.
    assert grid.tempo_bpm == pytest.approx(tempo_bpm, rel=0.05)
    assert (grid.tonic, grid.mode) == (0, "major")


@pytest.mark.parametrize("beats_per_bar", [3, 4])
def test_grid_of_a_written_midi_file_is_the_grid_it_was_written_on(beats_per_bar: int) -> None:
    drifting = np.cumsum(np.linspace(0.48, 0.52, 80)) - 0.48
    grid = BeatGrid(drifting, 0, beats_per_bar, 120.0, 0, "major")
    tracks = on_the_beat(120.0, 60)
    data = write_midi(tracks, grid, 30.0)
    read = read_grid(data, read_midi(data), 30.0)
    # One tick is 0.5 ms, and a tempo is kept in whole microseconds a beat.
    np.testing.assert_allclose(read.beat_times_s[:55], drifting[:55], atol=2e-3)
    assert read.beats_per_bar == beats_per_bar
    assert read.beat_times_s[-1] > 30.0


def test_grid_of_a_midi_file_without_tempo_is_120() -> None:
    file = mido.MidiFile()
    file.tracks.append(mido.MidiTrack())
    written = io.BytesIO()
    file.save(file=written)
    grid = read_grid(written.getvalue(), {}, 10.0)
    assert grid.tempo_bpm == pytest.approx(120.0)
    assert grid.beat_times_s[-1] > 10.0
