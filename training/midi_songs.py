"""a folder of MIDI files -> band songs, as `training/band_songs.py` makes them of MMA's.

Any folder, at any depth (Lakh's, MAESTRO's): every file that ends in .mid, .midi or .kar is read.
Bars and tempo are the file's own tempo map and time signatures; where its notes do not lie on them
(a performance that was recorded without a click, as MAESTRO's are), its beats are found by
listening, as a song's are. Roles go by program, the chord of each half bar is what serving's own
finder (`remix/chords.py`) hears in the notes. A file that cannot be used is skipped, and why is
written to `skipped-NNNN.tsv` beside the songs.

    python -m training.midi_songs FOLDER --out .cache/training/midi-songs
"""

from __future__ import annotations

import argparse
import hashlib
import io
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np
import numpy.typing as npt

from remix.beats import find_key
from remix.chords import estimate_chords, pitch_class_profiles
from remix.errors import InvalidNotes
from remix.midi import read_midi
from remix.note_grid import DEFAULT_TEMPO_US, end_of, find_grid
from remix.note_tokens import DRUMS, STEPS_PER_BEAT, STRUCK_AT_ONCE, tempo_class
from remix.notes import Note
from training.band_songs import STEPS, Part, Song, grid_notes, load_songs, midi_parts, save_songs

SUFFIXES = (".mid", ".midi", ".kar")
LARGEST_BYTES = 4_000_000
"""The largest file of MAESTRO has a quarter of it; above are recordings of controllers."""

LONGEST_S = 3_600.0
SHORTEST_BARS = 8
LONGEST_BARS = 512
"""Of one song: its steps fit 16 bits. A longer piece becomes several, all on one side of the
split."""

FILES_AT_ONCE = 500
"""MIDI files that go into one file of songs."""

ON_GRID_BEATS = 1 / 24
ON_GRID_SHARE = 0.65
"""A file keeps its own beats where so many of its onsets lie within so much of a beat of a
sixteenth or a triplet. Evenly strewn onsets would reach 0.5: six places of a twelfth each."""

_BROKEN = (
    *(OSError, EOFError, ValueError, IndexError, KeyError, TypeError, struct.error),
    mido.KeySignatureError,
)
"""What mido raises over a damaged file."""


@dataclass(frozen=True)
class Stretch:
    """Bars of one meter.

    Args:
        begin: its first bar line, in beats of the file.
        end: in beats of the file.
        beat: length of one of its beats, in beats of the file: 1.5 in 12/8.
        beats_per_bar: 3 or 4.
        tempo_bpm: of its beats.
    """

    begin: float
    end: float
    beat: float
    beats_per_bar: int
    tempo_bpm: float


def read_songs(path: Path) -> list[Song]:
    """The songs of a MIDI file, one for each stretch of one meter of at least eight bars.

    Raises:
        InvalidNotes: it is damaged, too large, too long, or holds no such stretch.
    """
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise InvalidNotes(f"It has {size} bytes; at most {LARGEST_BYTES} are read.")
    data = path.read_bytes()
    try:
        midi = mido.MidiFile(file=io.BytesIO(data), clip=True)
        if midi.type == 2 or midi.ticks_per_beat <= 0:
            raise ValueError("its tracks have no common beats")
        parts, tempo = midi_parts(midi), _TempoMap(midi)
    except _BROKEN as error:
        raise InvalidNotes(f"It is no whole MIDI file: {error or 'it ends early'}.") from error
    if not any(part.track != DRUMS for part in parts):
        raise InvalidNotes("No role of the band has pitched notes in it.")
    end = max(onset + length for part in parts for onset, length, _, _ in part.notes)
    if tempo.seconds_at(end) > LONGEST_S:
        raise InvalidNotes(f"It lasts {tempo.seconds_at(end):.0f} s; at most {LONGEST_S:.0f} do.")
    stretches = _stretches(midi, tempo, end)
    if stretches and _share_on_grid(parts, stretches) < ON_GRID_SHARE:
        parts, stretches = _heard_beats(data, parts, tempo, end)
    pieces = [piece for stretch in stretches for piece in _songs_of(parts, stretch)]
    if not pieces:
        raise InvalidNotes(
            f"No {SHORTEST_BARS} bars of it are in two, three or four beats and have pitched notes."
        )
    family = f"midi/{_digest(pieces)}"
    return [Song(family, piece.header, piece.chords, piece.notes) for piece in pieces]


class _TempoMap:
    """Beats of a file and seconds."""

    def __init__(self, midi: mido.MidiFile) -> None:
        changes = {0.0: DEFAULT_TEMPO_US}
        for track in midi.tracks:
            tick = 0
            for event in track:
                tick += event.time
                if event.type == "set_tempo":
                    changes[tick / midi.ticks_per_beat] = event.tempo
        self._beats = np.array(sorted(changes))
        self._slopes = np.array([changes[beat] for beat in sorted(changes)]) / 1e6
        lengths = np.diff(self._beats) * self._slopes[:-1]
        self._seconds = np.concatenate([[0.0], np.cumsum(lengths)])

    def seconds_at(self, beat: float) -> float:
        """Seconds of a beat of the file."""
        index = int(np.searchsorted(self._beats, beat, side="right")) - 1
        return float(self._seconds[index] + (beat - self._beats[index]) * self._slopes[index])


def _meter(numerator: int, denominator: int) -> tuple[float, int] | None:
    """(length of a beat in beats of the file, beats of a bar of ours); None where there is none.

    Eighths in threes are beats of three eighths; two bars of two beats are one of four.

    >>> _meter(12, 8), _meter(3, 4), _meter(2, 2), _meter(7, 8)
    ((1.5, 4), (1.0, 3), (1.0, 4), None)
    """
    compound = denominator == 8 and numerator % 3 == 0 and numerator > 3
    beat, beats = (1.5, numerator / 3) if compound else (1.0, 4 * numerator / denominator)
    bar = {2: 4, 3: 3, 4: 4, 6: 3, 8: 4}.get(int(beats)) if beats == int(beats) else None
    return (beat, bar) if bar else None


def _stretches(midi: mido.MidiFile, tempo: _TempoMap, end: float) -> list[Stretch]:
    """Where the file's time signatures are of a meter that bars can have."""
    signatures = {0.0: (4, 4)}
    for track in midi.tracks:
        tick = 0
        for event in track:
            tick += event.time
            if event.type == "time_signature":
                signatures[tick / midi.ticks_per_beat] = (event.numerator, event.denominator)
    found: list[Stretch] = []
    starts = sorted(beat for beat in signatures if beat < end)
    for begin, stop in zip(starts, [*starts[1:], end], strict=True):
        meter = _meter(*signatures[begin])
        if meter is None:
            continue
        beat, beats = meter
        last = found[-1] if found else None
        goes_on = (
            last is not None
            and (last.end, last.beat, last.beats_per_bar) == (begin, beat, beats)
            and (begin - last.begin) % (beat * beats) == 0
        )
        if goes_on and last is not None:
            begin = last.begin
            found.pop()
        minutes = (tempo.seconds_at(stop) - tempo.seconds_at(begin)) / 60
        bpm = (stop - begin) / beat / max(minutes, 1e-9)
        found.append(Stretch(begin, stop, beat, beats, bpm))
    return found


def _share_on_grid(parts: Sequence[Part], stretches: Sequence[Stretch]) -> float:
    """Of the onsets: those near a sixteenth or a triplet."""
    near = total = 0
    for stretch in stretches:
        onsets = np.array(
            [n[0] for p in parts for n in p.notes if stretch.begin <= n[0] < stretch.end]
        )
        places = np.unique(np.round((onsets - stretch.begin) / stretch.beat, 4))
        away = np.minimum(*(np.abs(places * n - np.round(places * n)) / n for n in (4, 3)))
        near += int((away <= ON_GRID_BEATS).sum())
        total += len(places)
    return near / max(total, 1)


def _heard_beats(
    data: bytes, parts: Sequence[Part], tempo: _TempoMap, end: float
) -> tuple[list[Part], list[Stretch]]:
    """Parts and bars on the beats that are heard in them."""
    tracks = read_midi(data)
    length_s = end_of(tracks)
    grid = find_grid(tracks, length_s)

    def beat_at(beat: float) -> float:
        return float(grid.beat_at(tempo.seconds_at(beat))) - grid.first_downbeat

    moved = [
        Part(part.track, part.rank, [
            (beat_at(onset), beat_at(onset + length) - beat_at(onset), pitch, velocity)
            for onset, length, pitch, velocity in part.notes
        ])
        for part in parts
    ]  # fmt: skip
    bars = Stretch(0.0, beat_at(end), 1.0, grid.beats_per_bar, grid.tempo_bpm)
    return moved, [bars]


def _songs_of(parts: Sequence[Part], stretch: Stretch) -> Iterator[Song]:
    """A stretch as songs of at most 512 bars, from the first bar that has a note to the last."""
    steps = STEPS_PER_BEAT * stretch.beats_per_bar
    bar = stretch.beat * stretch.beats_per_bar
    onsets = [n[0] for p in parts for n in p.notes if stretch.begin <= n[0] < stretch.end]
    if not onsets:
        return
    first = int((min(onsets) - stretch.begin) // bar)
    last = int((max(onsets) - stretch.begin) // bar) + 1
    for index in range(first, last, LONGEST_BARS):
        bars = min(LONGEST_BARS, last - index)
        begin = stretch.begin + index * bar
        notes = _playable(grid_notes(parts, begin, bars * stretch.beats_per_bar, stretch.beat))
        pitched = notes[notes[:, 0] != DRUMS]
        if bars >= SHORTEST_BARS and len(pitched):
            header = (stretch.beats_per_bar, tempo_class(stretch.tempo_bpm), 0)
            yield Song("", header, _chords(pitched, bars, steps), notes)


def _playable(notes: STEPS) -> STEPS:
    """At most so many notes struck at once as the grammar lets a role strike.

    The bass keeps its lowest one, all others their highest.
    """
    kept, counts = [], Counter[tuple[int, int]]()
    for index in np.lexsort((np.where(notes[:, 0] == 1, 1, -1) * notes[:, 3],)).tolist():
        key = int(notes[index, 0]), int(notes[index, 1])
        counts[key] += 1
        if counts[key] <= STRUCK_AT_ONCE[key[0]]:
            kept.append(index)
    return notes[sorted(kept)]


def _chords(pitched: STEPS, bars: int, steps: int) -> STEPS:
    """[bars, 2], what the finder hears in the notes; steps stand for seconds."""
    notes = [Note(onset, length, pitch, velocity) for _, onset, length, pitch, velocity
             in pitched.tolist()]  # fmt: skip
    lines = np.arange(bars + 1) * steps
    edges = np.sort(np.concatenate((lines, lines[:-1] + 2 * STEPS_PER_BEAT))).astype(np.float64)
    profiles = pitch_class_profiles(notes, edges)
    tonic, mode = find_key(profiles.sum(axis=0))
    return estimate_chords(profiles, tonic, mode).reshape(bars, 2).astype(np.int16)


def _digest(pieces: Sequence[Song]) -> str:
    """Of what is played: another tempo, loudness, name or key does not make another piece."""
    heard = hashlib.sha256()
    for piece in pieces:
        notes: npt.NDArray[np.int64] = piece.notes[:, [0, 1, 3]].astype(np.int64)
        pitched = notes[:, 0] != DRUMS
        notes[pitched, 2] -= notes[pitched, 2].min()
        heard.update(notes.tobytes())
    return heard.hexdigest()[:16]


def make_midi_songs(folder: Path, out: Path) -> Counter[str]:
    """Reads a folder into files of songs; goes on where it was interrupted.

    Args:
        folder: of MIDI files, at any depth.
        out: gets `songs-NNNN.npz` and `skipped-NNNN.tsv`, 500 MIDI files each.

    Returns:
        How many files were skipped, by reason.

    Raises:
        InvalidNotes: the folder has no MIDI files, or `out` holds the songs of other files.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InvalidNotes(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}.")
    names = [path.relative_to(folder).as_posix() for path in paths]
    listing = hashlib.sha256("\n".join(names).encode()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    source = out / "source.sha256"
    if (source.exists() and source.read_text() != listing) or (
        not source.exists() and any(out.glob("songs-????.npz"))
    ):
        raise InvalidNotes(
            f"{out} holds the songs of other files than {folder} has now.",
            remedy="Choose another folder for the songs, or empty this one.",
        )
    source.write_text(listing)
    known: set[str] = set()
    for index, begin in enumerate(range(0, len(paths), FILES_AT_ONCE)):
        _make_file(
            {paths[i]: names[i] for i in range(begin, min(begin + FILES_AT_ONCE, len(paths)))},
            out / f"songs-{index:04}.npz",
            out / f"skipped-{index:04}.tsv",
            known,
        )
    rows = [
        line.split("\t")[1]
        for path in sorted(out.glob("skipped-????.tsv"))
        for line in path.read_text().splitlines()
    ]
    return Counter(rows)


def _make_file(paths: dict[Path, str], songs_path: Path, skipped: Path, known: set[str]) -> None:
    """One file of songs; `known` gets the pieces in it."""
    if not skipped.exists():
        songs, rows = list[Song](), list[str]()
        for path, name in paths.items():
            try:
                found = read_songs(path)
                if found[0].family in {*known, *(song.family for song in songs)}:
                    raise InvalidNotes("Its notes are those of another file.")
                songs += found
            except (InvalidNotes, OSError) as error:
                rows.append(f"{name}\t{' '.join(str(error).split())}\n")
        if songs:
            save_songs(songs_path.with_suffix(".partial.npz"), songs)
            songs_path.with_suffix(".partial.npz").rename(songs_path)
        skipped.with_suffix(".partial").write_text("".join(rows))
        skipped.with_suffix(".partial").rename(skipped)  # says that the file of songs is whole
    if songs_path.exists():
        known.update(song.family for song in load_songs(songs_path))


def report(skipped: Counter[str], out: Path) -> None:
    """Prints what was read, and the commonest reasons why files were not."""
    songs = [s for path in sorted(out.glob("songs-????.npz")) for s in load_songs(path)]
    pieces, notes = {song.family for song in songs}, sum(len(song.notes) for song in songs)
    print(
        f"{len(pieces)} pieces, {len(songs)} songs, {notes} notes in {out}; "
        f"{skipped.total()} files skipped"
    )
    for reason, count in skipped.most_common(10):
        print(f"{count:6}  {reason}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(".cache/training/midi-songs"))
    arguments = parser.parse_args()
    report(make_midi_songs(arguments.folder, arguments.out), arguments.out)


if __name__ == "__main__":
    main()
