"""Training of the generator: songs as tokens, and a run that goes on where it was interrupted."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

from export.band_transformer import ModelSize
from remix.errors import InvalidNotes, InvalidOption
from remix.note_tokens import (
    BAR,
    DRUMS,
    ROLES,
    TRACK_VELOCITY,
    chord_pitch_classes,
    decode_bar,
    decode_header,
    encode_bar,
)
from training.band_songs import (
    BARS,
    GrooveFile,
    Song,
    compose,
    grid_notes,
    load_songs,
    midi_parts,
    save_songs,
)
from training.generate_notes import (
    IGNORE,
    Augmentation,
    Trainer,
    TrainingOptions,
    is_held_out,
    sequences,
    song_bar,
    song_tokens,
    split_songs,
)

GROOVE = GrooveFile("stdlib/toyrock", 4, ("ToyRock", "ToyRock1"), ("ToyRockFill",))


def toy_song(seed: int) -> Song:
    """Four on the floor, a bass on the root, a piano on the chord; chords of a real chart."""
    rng = random.Random(seed)
    _, chords, _ = compose(GROOVE, rng)
    notes = []
    for bar in range(BARS):
        for beat in range(4):
            onset = 48 * bar + 12 * beat
            chord = int(chords[bar, beat // 2])
            notes.append((0, onset, 1, 36 if beat % 2 else 38, 100))
            pitches = sorted(chord_pitch_classes(chord))
            notes += [(1, onset, 12, 36 + pitch, 90) for pitch in pitches[:1]]
            notes += [(3, onset + 6, 6, 60 + pitch, 70) for pitch in pitches]
    return Song(f"toys/{seed}", (4, 3, 1), chords, np.array(sorted(notes), np.int16))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    songs = [toy_song(seed) for seed in range(40)]
    assert {is_held_out(song) for song in songs} == {False, True}
    save_songs(tmp_path / "songs-0000.npz", songs)
    return tmp_path


@pytest.fixture
def threads() -> Iterator[None]:
    """A trainer sets the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options_of(data: Path, out: str) -> TrainingOptions:
    size = ModelSize(layers=1, channels=32, heads=2, hidden_channels=32, context_tokens=128)
    return TrainingOptions(
        data, data / out, minutes=1e9, steps=24, warmup_steps=2, evaluate_every=4, size=size
    )


def test_songs_of_a_file_are_the_songs_written_to_it(data: Path) -> None:
    loaded, made = load_songs(data / "songs-0000.npz")[7], toy_song(7)
    assert (loaded.family, loaded.header) == (made.family, made.header)
    np.testing.assert_array_equal(loaded.notes, made.notes)
    np.testing.assert_array_equal(loaded.chords, made.chords)


@pytest.mark.usefixtures("threads")
def test_killed_run_ends_with_the_weights_of_the_whole_run_and_loss_falls(data: Path) -> None:
    whole = Trainer(options_of(data, "whole"))
    whole.run()
    code = (
        "from pathlib import Path; from tests.test_generate_training import options_of; "
        f"from training.generate_notes import Trainer; "
        f"Trainer(options_of(Path({str(data)!r}), 'killed')).run()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        for _ in range(2):  # with the second line the checkpoint of the first is whole
            assert running.stdout.readline()
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    resumed = Trainer(options_of(data, "killed"))
    assert 0 < resumed.step < 24
    resumed.run()
    assert resumed.step == whole.step == 24
    assert untimed(resumed.log) == untimed(whole.log)
    ends = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in ends)
    assert whole.loss_fell
    assert (data / "whole" / "curve.png").stat().st_size > 1000


def untimed(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name != "minutes"} for row in log]


@pytest.mark.usefixtures("threads")
def test_checkpoint_of_another_seed_or_other_songs_is_not_gone_on_with(data: Path) -> None:
    Trainer(options_of(data, "one")).save()
    with pytest.raises(InvalidOption, match="made with seed 1, this run has 2"):
        Trainer(replace(options_of(data, "one"), seed=2))
    save_songs(data / "songs-0001.npz", [toy_song(50)])
    with pytest.raises(InvalidOption, match="made with songs"):
        Trainer(options_of(data, "one"))


def test_families_are_trained_on_or_held_out_and_two_are_needed(tmp_path: Path) -> None:
    songs = [toy_song(seed) for seed in range(2)]
    assert not any(is_held_out(song) for song in songs)
    save_songs(tmp_path / "songs-0000.npz", [*songs, *songs])
    kept, held_out = split_songs(tmp_path)
    assert [len(kept), len(held_out)] == [2, 2]
    assert not {song.family for song in kept} & {song.family for song in held_out}
    save_songs(tmp_path / "songs-0000.npz", songs[:1])
    with pytest.raises(InvalidNotes, match="1 groove files or pieces"):
        split_songs(tmp_path)


def test_songs_too_short_for_the_context_are_an_error_and_no_endless_search() -> None:
    song = replace(toy_song(1), chords=toy_song(1).chords[:8])
    with pytest.raises(InvalidNotes, match="no 1024 tokens in a row"):
        sequences([song], 1, 4096, np.random.default_rng(0), plain=True)


def test_bar_of_a_song_survives_the_tokens() -> None:
    song = toy_song(1)
    for index in range(8):
        bar = song_bar(song, index, Augmentation())
        assert decode_bar(encode_bar(bar)) == bar
        assert len(bar.notes) == np.sum(song.notes[:, 1] // 48 == index)


def test_transposition_moves_chords_and_pitched_notes_alike() -> None:
    song = toy_song(2)
    plain, moved = (song_bar(song, 3, Augmentation(transpose=by)) for by in (0, 5))
    for before, after in zip(plain.conditions.chords, moved.conditions.chords, strict=True):
        expected = {(pitch + 5) % 12 for pitch in chord_pitch_classes(before)}
        assert chord_pitch_classes(after) == expected
    drums = [[n for n in bar.notes if n.track == DRUMS] for bar in (plain, moved)]
    assert drums[0] == drums[1]
    piano = [sorted(n.pitch for n in bar.notes if n.track == 3) for bar in (plain, moved)]
    assert [pitch + 5 for pitch in piano[0]] == piano[1]


def test_augmentations_keep_tracks_swing_quavers_change_tempo_and_swap_drummers() -> None:
    song, notes = toy_song(3), toy_song(4).notes.copy()
    notes[:, 3] += 1
    other = replace(toy_song(4), notes=notes)
    bass = song_bar(song, 0, Augmentation(tracks=1 << ROLES.index("bass")))
    assert {note.track for note in bass.notes} == {ROLES.index("bass")}
    swung = song_bar(song, 0, Augmentation(swing=True))
    assert {n.onset_steps % 12 for n in swung.notes if n.track == 3} == {8}
    faster, _ = song_tokens(song, 0, 3, Augmentation(faster=1))
    plain, _ = song_tokens(song, 0, 3, Augmentation())
    assert decode_header(faster).tempo_class == decode_header(plain).tempo_class + 1
    swapped = song_bar(song, 0, Augmentation(drummer=other))
    assert {note.pitch for note in swapped.notes if note.track == DRUMS} == {37, 39}


def test_given_tokens_are_no_targets() -> None:
    inputs, targets = sequences([toy_song(5)], 2, 256, np.random.default_rng(0))
    kept = targets != IGNORE
    assert kept.any()
    assert (targets[:, :-1] == inputs[:, 1:])[kept[:, :-1]].all()
    assert ((targets[kept] == BAR) | (targets[kept] >= TRACK_VELOCITY)).all()


def test_strummed_chord_of_a_midi_file_is_one_onset_in_its_roles(tmp_path: Path) -> None:
    midi, track = mido.MidiFile(ticks_per_beat=192), mido.MidiTrack()
    midi.tracks.append(track)
    track.append(mido.Message("program_change", program=25))
    for delay, pitch in ((0, 60), (5, 64), (5, 67)):
        track.append(mido.Message("note_on", note=pitch, velocity=90, time=delay))
    for pitch in (60, 64, 67):
        track.append(mido.Message("note_off", note=pitch, time=86 if pitch == 60 else 0))
    midi.save(tmp_path / "song.mid")
    notes = grid_notes(midi_parts(mido.MidiFile(tmp_path / "song.mid")), 0.0, 4)
    assert notes[:, 0].tolist() == [ROLES.index("guitar")] * 3
    assert notes[:, 1].tolist() == [0, 0, 0]
    assert notes[:, 3].tolist() == [60, 64, 67]
