"""MIDI files hold the notes at their seconds, on the song's beats."""

from __future__ import annotations

import io

import mido
import numpy as np
import pretty_midi
import pytest

from remix.errors import InvalidNotes
from remix.midi import PROGRAMS, read_midi, role_of_program, without_overlaps, write_midi
from remix.notes import ROLES, BeatGrid, Note, Tracks

DURATION_S = 20.0


def drifting_grid(seed: int = 0) -> BeatGrid:
    """Beats around 100 bpm that no clock made; the first before the song, the last past it."""
    steps_s = 0.6 + 0.02 * np.random.default_rng(seed).standard_normal(40)
    return BeatGrid(np.cumsum(steps_s) - 0.85, 2, 4, 100.0, 9, "minor")


def random_tracks(seed: int = 0, notes: int = 60) -> Tracks:
    rng = np.random.default_rng(seed)
    return {
        role: without_overlaps(
            [
                Note(
                    float(rng.uniform(0, DURATION_S - 1)),
                    float(rng.uniform(0.05, 0.9)),
                    int(rng.integers(30, 90)),
                    int(rng.integers(1, 128)),
                )
                for _ in range(notes)
            ]
        )
        for role in ROLES
    }


def test_midi_round_trip_keeps_every_note_at_its_seconds() -> None:
    tracks = random_tracks()
    got = read_midi(write_midi(tracks, drifting_grid(), DURATION_S))
    assert list(got) == list(ROLES)
    for role in ROLES:
        for before, after in zip(tracks[role], got[role], strict=True):
            assert (before.pitch, before.velocity) == (after.pitch, after.velocity)
            # A tick is 0.6 ms here; onset and end are each off by half of one, and a microsecond
            # a beat of the tempo adds up to less than one.
            assert abs(before.onset_s - after.onset_s) < 1e-3
            assert abs(before.end_s - after.end_s) < 1e-3


def test_midi_of_another_library_agrees_on_times_programs_and_beats() -> None:
    tracks, grid = random_tracks(), drifting_grid()
    read = pretty_midi.PrettyMIDI(io.BytesIO(write_midi(tracks, grid, DURATION_S)))
    assert [instrument.name for instrument in read.instruments] == list(ROLES)
    for role, instrument in zip(ROLES, read.instruments, strict=True):
        assert instrument.is_drum == (role == "drums")
        assert instrument.program == PROGRAMS[role]
        onsets_s = sorted(note.start for note in instrument.notes)
        expected_s = [note.onset_s for note in tracks[role]]
        assert np.abs(np.array(onsets_s) - expected_s).max() < 1e-3  # a tick and a half
    beats_s = read.get_beats()
    inside = grid.beat_times_s[(grid.beat_times_s > 0) & (grid.beat_times_s < DURATION_S - 1)]
    assert all(np.abs(beats_s - beat_s).min() < 2e-3 for beat_s in inside)
    bars_s = read.get_downbeats()
    for bar_s in grid.beat_times_s[2::4]:
        if 0 < bar_s < DURATION_S - 2:
            assert np.abs(bars_s - bar_s).min() < 2e-3


def test_midi_ends_with_the_song() -> None:
    tracks: Tracks = {
        "piano": [Note(18.0, 9.0, 60, 80), Note(25.0, 1.0, 62, 80), Note(-1.0, 2.0, 64, 80)]
    }
    data = write_midi(tracks, drifting_grid(), DURATION_S)
    got = read_midi(data)["piano"]
    assert [note.pitch for note in got] == [64, 60]
    assert got[0].onset_s == 0
    assert all(note.end_s <= DURATION_S for note in got)
    assert mido.MidiFile(file=io.BytesIO(data)).length <= DURATION_S + 1e-3


def test_midi_without_notes_is_a_file_without_notes() -> None:
    assert read_midi(write_midi({"bass": []}, drifting_grid(), DURATION_S)) == {}


def test_midi_of_other_programs_is_told_by_program_and_channel() -> None:
    file = pretty_midi.PrettyMIDI()
    for program, is_drum in ((0, True), (38, False), (30, False), (5, False), (73, False)):
        instrument = pretty_midi.Instrument(program, is_drum)
        instrument.notes.append(pretty_midi.Note(90, 50, 1.0, 2.0))
        file.instruments.append(instrument)
    written = io.BytesIO()
    file.write(written)
    assert list(read_midi(written.getvalue())) == ["drums", "bass", "guitar", "piano", "strings"]
    assert role_of_program(0, is_drum=True) == "drums"


def test_overlapping_notes_of_a_pitch_are_one_after_the_other() -> None:
    got = without_overlaps([Note(0, 2, 60, 90), Note(1, 2, 60, 80), Note(1, 3, 60, 99)])
    assert got == [Note(0, 1, 60, 90), Note(1, 3, 60, 99)]


@pytest.mark.parametrize("data", [b"", b"no MIDI at all", b"MThd\0\0\0\6\0\1\0\2\1\xe0MTrk\0\0"])
def test_midi_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidNotes, match=f"{len(data)} bytes is no whole MIDI file"):
        read_midi(data)


def test_midi_with_wrong_bytes_is_read_or_refused() -> None:
    rng = np.random.default_rng(1)
    key = mido.MetaMessage("key_signature", key="C").bytes()
    data = write_midi(random_tracks(notes=5), drifting_grid(), DURATION_S)
    data = data.replace(b"\xff\x51\x03", bytes(key) + b"\0\xff\x51\x03")  # some key, too
    for _ in range(400):
        wrong = bytearray(data)
        for place in rng.integers(0, len(wrong), 3):
            wrong[place] = rng.integers(256)
        try:
            read_midi(bytes(wrong))
        except InvalidNotes:
            continue
    no_key = bytes(key[:3]) + b"\x0b\x07"
    with pytest.raises(InvalidNotes):
        read_midi(data.replace(bytes(key), no_key))


def test_midi_cut_anywhere_is_read_or_refused() -> None:
    data = write_midi(random_tracks(notes=5), drifting_grid(), DURATION_S)
    for length in range(0, len(data), 7):
        try:
            read_midi(data[:length])
        except InvalidNotes:
            continue
