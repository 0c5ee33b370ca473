"""A folder of MIDI files as songs to train on."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import mido
import numpy as np
import pytest

from remix.errors import InvalidNotes
from remix.note_tokens import DRUMS, ROLES, chord_root, tempo_class
from training import midi_songs
from training.band_songs import Song, load_songs
from training.generate_notes import Augmentation, song_tokens, split_songs
from training.midi_songs import make_midi_songs, read_songs

TICKS = 480
PROGRESSION = (0, 7, 9, 5)  # C G Am F, a bar each
MINOR = {9}


def band_midi(
    *,
    bars: int = 16,
    transpose: int = 0,
    meters: tuple[tuple[int, int, int], ...] = ((0, 4, 4),),
    bpm: float = 120.0,
    bar_beats: float = 4.0,
    jitter: float = 0.0,
    type_0: bool = False,
) -> mido.MidiFile:
    """A bass, a piano and a drum kit over a progression.

    `meters`: (bar, numerator, denominator); `bar_beats`: quarters a bar is filled with; `jitter`:
    each onset is as much as this late, in quarters, as of a player without a click.
    """
    rng = np.random.default_rng(1)
    midi = mido.MidiFile(type=0 if type_0 else 1, ticks_per_beat=TICKS)
    events: dict[int, list[tuple[float, mido.Message]]] = {0: [], 1: [], 9: []}
    for bar in range(bars):
        root = PROGRESSION[bar % 4]
        third = 3 if root in MINOR else 4
        for beat in range(int(bar_beats)):
            at = bar * bar_beats + beat + rng.uniform(0, jitter)
            chord = [(0, 36 + root + transpose)]
            chord += [(1, 60 + root + transpose + step) for step in (0, third, 7)]
            for channel, pitch in [*chord, (9, 36 if beat % 2 == 0 else 38)]:
                on = mido.Message("note_on", channel=channel, note=pitch, velocity=90)
                off = mido.Message("note_off", channel=channel, note=pitch)
                events[channel] += [(at, on), (at + 0.9, off)]
    head = [
        (bar * bar_beats, mido.MetaMessage("time_signature", numerator=n, denominator=d))
        for bar, n, d in meters
    ]
    head.append((0.0, mido.MetaMessage("set_tempo", tempo=round(60e6 / bpm))))
    programs = [(0.0, mido.Message("program_change", channel=0, program=33))]
    tracks = [head, [*programs, *events[0]], events[1], events[9]]
    for track in [[*chain(*tracks)]] if type_0 else tracks:
        midi.tracks.append(mido.MidiTrack())
        now = 0
        for at, event in sorted(track, key=lambda one: (one[0], one[1].type == "note_on")):
            tick = round(at * TICKS)
            midi.tracks[-1].append(event.copy(time=tick - now))
            now = tick
    return midi


def roots(song: Song) -> list[int]:
    return [chord_root(chord) for chord in song.chords[:, 0].tolist()]


def read(midi: mido.MidiFile, folder: Path, name: str = "one.mid") -> list[Song]:
    midi.save(folder / name)
    return read_songs(folder / name)


@pytest.mark.parametrize("type_0", [False, True])
def test_notes_chords_and_tempo_of_a_file_are_those_that_are_in_it(
    type_0: bool, tmp_path: Path
) -> None:
    (song,) = read(band_midi(bpm=132, type_0=type_0), tmp_path)
    assert song.header == (4, tempo_class(132), 0)
    assert roots(song) == list(PROGRESSION) * 4
    names = {ROLES[track] for track in song.notes[:, 0].tolist()}
    assert names == {"drums", "bass", "piano"}
    for track, count in ((0, 64), (1, 64), (3, 192)):
        onsets = song.notes[song.notes[:, 0] == track][:, 1]
        assert len(onsets) == count
        assert set(onsets.tolist()) == set(range(0, 16 * 48, 12))
    tokens, _ = song_tokens(song, 0, 10**6, Augmentation())
    assert len(tokens) > 16 * 20


def test_meters_become_bars_of_three_or_four_and_others_are_left_out(tmp_path: Path) -> None:
    (waltz,) = read(band_midi(meters=((0, 3, 4),), bar_beats=3), tmp_path)
    assert waltz.header[0] == 3
    assert roots(waltz) == list(PROGRESSION) * 4
    (two,) = read(band_midi(meters=((0, 2, 4),), bar_beats=2), tmp_path)
    assert (two.header[0], len(two.chords)) == (4, 8)
    (slow,) = read(band_midi(meters=((0, 12, 8),), bar_beats=6), tmp_path)
    assert slow.header == (4, tempo_class(80), 0)  # 120 quarters a minute are 80 dotted ones
    changes = band_midi(bars=26, meters=((0, 4, 4), (10, 7, 8), (16, 4, 4)))
    assert [len(song.chords) for song in read(changes, tmp_path)] == [10, 10]
    with pytest.raises(InvalidNotes, match="two, three or four beats"):
        read(band_midi(meters=((0, 5, 4),), bar_beats=5), tmp_path)


def test_beats_are_heard_where_notes_do_not_lie_on_the_files_own(tmp_path: Path) -> None:
    """96 bpm, written as if at 120: only listening finds the beats."""
    midi = band_midi(bars=24, bpm=120, jitter=0.02)
    for track in midi.tracks:
        for event in track:
            event.time = round(event.time * 1.25 * 0.97)
    (song,) = read(midi, tmp_path)
    assert song.header[0] == 4
    assert song.header[1] == tempo_class(96 / 0.97)
    onsets = song.notes[song.notes[:, 0] == 3][:, 1]
    assert np.isin(onsets % 12, (11, 0, 1)).mean() > 0.9


def test_damaged_files_are_skipped_with_a_reason_and_the_rest_is_read(tmp_path: Path) -> None:
    folder, out = tmp_path / "lakh", tmp_path / "songs"
    (folder / "a/b/c").mkdir(parents=True)
    (folder / "d").mkdir()
    band_midi().save(folder / "a/b/c/good.mid")
    band_midi(bars=20).save(folder / "d/other.MIDI")
    band_midi(transpose=5, bpm=90).save(folder / "d/same piece, other key.mid")
    whole = (folder / "a/b/c/good.mid").read_bytes()
    (folder / "a/cut.mid").write_bytes(whole[: len(whole) // 2])
    (folder / "a/no midi.mid").write_bytes(b"RIFF" + bytes(100))
    (folder / "a/empty.mid").touch()
    (folder / "a/drums only.mid").write_bytes(
        whole.replace(b"\x90", b"\x99").replace(b"\x91", b"\x99")
    )
    (folder / "readme.txt").write_text("no music")
    skipped = make_midi_songs(folder, out)
    reasons = dict(line.split("\t") for line in (out / "skipped-0000.tsv").read_text().splitlines())
    assert set(reasons) == {
        "a/cut.mid", "a/no midi.mid", "a/empty.mid", "a/drums only.mid",
        "d/same piece, other key.mid",
    }  # fmt: skip
    assert "another file" in reasons["d/same piece, other key.mid"]
    assert skipped.total() == 5
    songs = load_songs(out / "songs-0000.npz")
    assert [len(song.chords) for song in songs] == [16, 20]
    kept, held_out = split_songs(out)
    assert len({song.family for song in kept} | {song.family for song in held_out}) == 2


def test_bytes_at_random_give_songs_or_an_error_of_ours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    band_midi(bars=8).save(tmp_path / "one.mid")
    whole = np.frombuffer((tmp_path / "one.mid").read_bytes(), np.uint8)
    refused = 0
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(0, 120 if rng.random() < 0.5 else len(whole), 3)] = rng.integers(256)
        (tmp_path / "one.mid").write_bytes(damaged.tobytes())
        try:
            assert all(
                song.notes[:, 0].max() < len(ROLES) for song in read_songs(tmp_path / "one.mid")
            )
        except InvalidNotes:
            refused += 1
    assert 0 < refused < 40


def test_interrupted_reading_goes_on_and_other_files_are_refused(tmp_path: Path) -> None:
    folder, out = tmp_path / "files", tmp_path / "songs"
    folder.mkdir()
    band_midi().save(folder / "one.mid")
    make_midi_songs(folder, out)
    written = (out / "songs-0000.npz").stat().st_mtime_ns
    assert make_midi_songs(folder, out).total() == 0
    assert (out / "songs-0000.npz").stat().st_mtime_ns == written
    band_midi(bars=9).save(folder / "two.mid")
    with pytest.raises(InvalidNotes, match="songs of other files"):
        make_midi_songs(folder, out)
    with pytest.raises(InvalidNotes, match="holds no file"):
        make_midi_songs(tmp_path / "songs", tmp_path / "none")


def test_chords_with_more_notes_than_hands_are_thinned(tmp_path: Path) -> None:
    midi = band_midi(bars=8)
    track = mido.MidiTrack()
    for pitch in range(48, 72):
        track.append(mido.Message("note_on", note=pitch, channel=2, velocity=60))
    for pitch in range(48, 72):
        track.append(mido.Message("note_off", note=pitch, channel=2, time=480 * (pitch == 48)))
    midi.tracks.append(track)
    (song,) = read(midi, tmp_path)
    first = song.notes[(song.notes[:, 0] == ROLES.index("piano")) & (song.notes[:, 1] == 0)]
    assert first[:, 3].tolist() == [66, 67, 68, 69, 70, 71]
    assert (song.notes[:, 0] == DRUMS).any()


def test_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "one.mid").write_bytes(bytes(midi_songs.LARGEST_BYTES + 1))
    with pytest.raises(InvalidNotes, match="4000001 bytes"):
        read_songs(tmp_path / "one.mid")
