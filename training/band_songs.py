"""random chord charts -> band songs with known chords, by MMA (Musical MIDI Accompaniment).

MMA (GPL-2 or later; Debian package `mma` 21.09) turns a chord chart and the name of a groove into
drums, bass, chords and arpeggios. Since the chart is ours, the chords of every half bar are known
exactly: they are what the generator is conditioned on. Nothing of MMA is shipped; what is kept of
its output is quantised notes.

    python -m training.band_songs --songs 1000
"""

import argparse
import itertools
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path

import mido
import numpy as np
import numpy.typing as npt

from remix.errors import InvalidNotes
from remix.midi import DRUM_CHANNEL
from remix.note_tokens import (
    CHORD_QUALITIES,
    DRUMS,
    DURATIONS_STEPS,
    HIGHEST,
    LOWEST,
    NO_CHORD,
    ROLES,
    STEPS_PER_BEAT,
    STYLES,
    tempo_class,
)
from training.debian import unpack

MMA = Path("/usr/share/mma")
"""Where Debian's package puts it."""

FILE_SONGS = 100
LONGEST_STEPS = DURATIONS_STEPS[-1]
BARS = 64
SECTION_BARS = 8
STEPS = npt.NDArray[np.int16]

_NAMES = "C C# D Eb E F F# G Ab A Bb B".split()
_MMA_QUALITIES = {
    "maj": ("", "", "6"),
    "min": ("m",),
    "7": ("7", "7", "9"),
    "maj7": ("M7",),
    "min7": ("m7",),
    "dim": ("dim", "dim7", "m7b5"),
    "sus4": ("sus4",),
}

# Roman numerals by semitones above the tonic: 4 or 8 bars, "/" joins the chords of one bar.
_MAJOR = """
0 7 9m 5|0 9m 5 7|0 5 7 5|9m 5 0 7|0 4m 5 7|0 7 5 5|5 7 0 9m|0 2m 5 7|2m 7 0 0|0 9m 2m 7
0 0 5 7|0 5 0 7|0 0/5 0 7|9m 4m 5 0|0 10 5 0|5 5m 0 0|0 47 9m 5|0 97 27 7|0 7/5 0/5 7
0 9m/7 5 7s/7|5 0/4m 2m 7|0 4d/97 2m 7|0 2m/7 0 2m/7|0 7 9m 4m 5 0 5 7|0 07 5 5m 0 97 27 7
0 0 0 0 5 5 0 0|07 57 07 07 57 57 07 97|27 7 0 9m 2m 7 0 0|0 1d 2m 3d 4m 97 2m 7|5 7 4m 9m 2m 7 0 07
0 8 10 0|0 3 5 0|0 5s/5 0 7s/7|9m 5 7 7|0 11d/47 9m/07 5|0/4m 5/7 0/9m 27/7
"""
_MINOR = """
0m 8 3 10|0m 5m 7 0m|0m 10 8 7|0m 0m 5m 7|0m 3 10 5|0m 8 5m 7|0m 10 8 10|2d 7 0m 0m|0m 5m 10 3
0m/10 8/7 0m 7|5m 10 3 8 2d 7 0m 0m|0m 7 0m 7|0m 8 10 0m|8 10 0m 0m|0m 0m 8 8 3 3 10 10
0m 5 0m 5|0m 5m 0m 5m 8 7 0m 7|0m 3/10 8 7s/7|0m 10/5m 0m 7
"""

_STYLE_PATTERNS = (
    ("latin", "bossa|samba|salsa|r[hu]umba|mambo|cha|beguine|bolero|tango|calypso|latin|merengue"
              "|^son|cuban|afro|quando|desert"),
    ("march", "march|polka|waltz|34"),
    ("country", "country|cntry|western|bluegrass|hill|zydeco"),
    ("blues", "blues|shuffle|bog"),
    ("dance", "dance|house|techno|trance|rave|disco|dnb|electric"),
    ("ballad", "ballad|slow|lullaby|hymn|spiritual|arpeggio|serenade|ambient|mellow|bald"),
    ("swing", "swing|jazz|bebop|bigband|dixie|charleston|foxtrot|quickstep|evans|broadway|ragtime"
              "|strut|showtune|basie|softshoe"),
    ("funk", "funk|soul|rb|rnb|r.b|hip|fus|motown|boneym|trip"),
    ("folk", "folk"),
    ("rock", "rock|metal|punk|thr|mtl|hrk|twi|jive|ska|reggae"),
    ("pop", "pop|beat|."),
)  # fmt: skip
_TEMPO_PATTERNS = (
    ("slow|ballad|lullaby|hymn|spiritual|ambient|bald|serenade", (55.0, 95.0)),
    ("fast|bebop|quickstep|samba|polka|dnb|punk|vienese|gypsy|bluegrass", (135.0, 210.0)),
    ("dance|house|techno|trance|rave|disco", (112.0, 142.0)),
    (".", (75.0, 155.0)),
)
_NOT_SECTIONS = re.compile("intro|end|fill|metronome|count|none|break", re.IGNORECASE)


@dataclass(frozen=True)
class GrooveFile:
    """A file of MMA's library: one style of playing, in several variations.

    Args:
        family: path without suffix, "stdlib/swing": the unit of the train/held-out split.
        beats_per_bar: 3 or 4.
    """

    family: str
    beats_per_bar: int
    grooves: tuple[str, ...]
    fills: tuple[str, ...]


@dataclass(frozen=True)
class Song:
    """A band song on the grid.

    Args:
        family: the groove file that played it, or `midi/` and the digest of a piece: the unit of
            the train/held-out split.
        header: (beats per bar, tempo class, style index).
        chords: [bars, 2], chord indices of each half bar.
        notes: [notes, 5], (track, onset in steps, duration in steps, pitch, velocity), sorted.
    """

    family: str
    header: tuple[int, int, int]
    chords: STEPS
    notes: STEPS

    @cached_property
    def by_bar(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The bars of its notes, ascending, and which note each is of."""
        bars = self.notes[:, 1].astype(np.int64) // (self.header[0] * STEPS_PER_BEAT)
        order = np.argsort(bars, kind="stable")
        return bars[order], order


def find_mma() -> Path:
    """The system's MMA, or Debian's package, unpacked into .cache/ and not installed.

    Raises:
        NotFound: neither is to be had.
    """
    if MMA.is_dir():
        return MMA
    [folder] = unpack("mma")
    return folder / "usr/share/mma"


def groove_files(mma: Path) -> list[GrooveFile]:
    """The groove files of MMA's library in 3/4 and 4/4 (12/8 counts as 4/4 in triplets)."""
    found = []
    for path in sorted((mma / "lib").rglob("*.mma")):
        beats, names = 4.0, defaultdict[float, list[str]](list)
        for line in path.read_text(errors="replace").splitlines():
            words = line.split()
            if (
                len(words) >= 2
                and words[0].lower() == "time"
                and words[1].replace(".", "").isdigit()
            ):
                beats = float(words[1])
            elif len(words) >= 2 and words[0].lower() == "defgroove":
                names[beats].append(words[1])
        for beats, grooves in names.items():
            sections = tuple(name for name in grooves if not _NOT_SECTIONS.search(name))
            fills = tuple(name for name in grooves if "fill" in name.lower())
            if beats in (3, 4) and sections:
                family = path.relative_to(mma / "lib").with_suffix("").as_posix()
                found.append(GrooveFile(family, int(beats), sections, fills))
    return found


def song_style(family: str) -> int:
    """Index into `STYLES` of a groove file, by its name."""
    name = family.split("/")[-1].lower()
    return next(STYLES.index(style) for style, hint in _STYLE_PATTERNS if re.search(hint, name))


def _degrees(rng: random.Random, minor: bool) -> list[list[str]]:
    """Eight bars of one or two degrees each."""
    draw = rng.random()
    if draw < 0.75:
        lines = [
            line for line in (_MINOR if minor else _MAJOR).replace("\n", "|").split("|") if line
        ]
        bars: list[list[str]] = []
        while len(bars) < SECTION_BARS:
            bars += [bar.split("/") for bar in rng.choice(lines).split()]
            if len(bars) == 4 and rng.random() < 0.5:
                bars += bars
        return bars[:SECTION_BARS]
    # Anything may follow anything: the chord, not the habit, has to decide the notes.
    pool = "0 2m 4m 5 7 9m 77 57 27 47 97 10 3 8 0m 5m 11d 7s 2d 1 6d".split()
    pool = pool[:9] if draw < 0.9 else pool
    return [rng.sample(pool, 2 if rng.random() < 0.3 else 1) for _ in range(SECTION_BARS)]


def _chord(degree: str, tonic: int, sevenths: float, rng: random.Random) -> int:
    match = re.fullmatch(r"(1[01]|\d)([md7s]?)", degree)
    assert match, degree
    root, kind = (int(match[1]) + tonic) % 12, match[2]
    quality = {"m": "min", "d": "dim", "7": "7", "s": "sus4", "": "maj"}[kind]
    if rng.random() < sevenths:
        dominant = int(match[1]) in (7, 2, 4)
        quality = {"maj": "7" if dominant else "maj7", "min": "min7"}.get(quality, quality)
    elif rng.random() < 0.03:
        quality = "sus4"
    return root * len(CHORD_QUALITIES) + CHORD_QUALITIES.index(quality)


def _mma_chord(chord: int, rng: random.Random) -> str:
    if chord == NO_CHORD:
        return "z"
    root, quality = divmod(chord, len(CHORD_QUALITIES))
    return _NAMES[root] + rng.choice(_MMA_QUALITIES[CHORD_QUALITIES[quality]])


def compose(groove: GrooveFile, rng: random.Random) -> tuple[str, STEPS, float]:
    """A random chart of eight sections for MMA, its chords [BARS, 2], and its tempo."""
    tonic, minor = rng.randrange(12), rng.random() < 0.4
    sevenths = rng.choice((0.9, 0.5)) if song_style(groove.family) in (4, 5, 7, 9) else 0.0
    sevenths = rng.choice((sevenths, 0.0, 0.15, 0.4))
    low, high = next(span for hint, span in _TEMPO_PATTERNS if re.search(hint, groove.family))
    tempo_bpm = round(rng.uniform(low, high))
    form = rng.choice("aabacaba ababcbab aabbccaa abacabad aabaccdc abcdabcd".split())
    sections = {
        name: (_degrees(rng, minor), rng.choice(groove.grooves), rng.choice("mp m mf f".split()))
        for name in "abcd"
    }
    lines = [f"RndSeed {rng.randrange(10**6)}", f"Tempo {tempo_bpm}"]
    chords = np.zeros((BARS, 2), np.int16)
    for index, name in enumerate(form):
        bars, variation, volume = sections[name]
        prefix = f"{groove.family}:"
        lines += [f"Volume {volume}", f"Groove {prefix}{variation}"]
        for bar, degrees in enumerate(bars):
            if bar == SECTION_BARS - 1 and groove.fills and rng.random() < 0.5:
                lines.append(f"Groove {prefix}{rng.choice(groove.fills)}")
            pair = [_chord(degree, tonic, sevenths, rng) for degree in degrees]
            if rng.random() < 0.01:
                pair = [NO_CHORD]
            names = [_mma_chord(chord, rng) for chord in pair]
            lines.append(f"{index * SECTION_BARS + bar + 1} {' / '.join(names)}")
            chords[index * SECTION_BARS + bar] = (pair[0], pair[-1])
    return "\n".join(lines) + "\n", chords, float(tempo_bpm)


@dataclass(frozen=True)
class Part:
    """What one channel of one track of a MIDI file plays.

    Args:
        track: index into `ROLES`.
        rank: within a role only the parts of the lowest rank are kept.
        notes: (onset, duration, pitch, velocity), in beats of the file, sorted.
    """

    track: int
    rank: int
    notes: list[tuple[float, float, int, int]]


def _role(name: str, program: int, pitches: list[int]) -> tuple[int, int]:
    """(track, rank) of a pitched part; track -1 for what no role plays."""
    low = float(np.median(pitches)) < 50
    if 32 <= program < 40 or (name.startswith(("Bass", "Walk")) and low):
        return ROLES.index("bass"), 0
    guitar, piano, strings = (ROLES.index(role) for role in ("guitar", "piano", "strings"))
    for start, stop, track, rank in (
        *((0, 8, piano, 0), (8, 16, piano, 1), (16, 24, strings, 2), (24, 32, guitar, 0)),
        *((40, 56, strings, 0), (56, 88, strings, 3), (88, 96, strings, 1), (104, 109, guitar, 1)),
    ):
        if start <= program < stop:
            return track, rank
    return -1, 9


def midi_parts(midi: mido.MidiFile) -> list[Part]:
    """The parts of a MIDI file that a role plays: drums by channel 10, others by program.

    A channel that changes its program counts as the program that plays most of its notes.
    """
    found = []
    for track in midi.tracks:
        name, time = "", 0.0
        program: dict[int, int] = {}
        programs: dict[int, Counter[int]] = defaultdict(Counter)
        sounding: dict[tuple[int, int], tuple[float, int]] = {}
        notes: dict[int, list[tuple[float, float, int, int]]] = defaultdict(list)
        for event in track:
            time += event.time / midi.ticks_per_beat
            if event.type == "track_name":
                name = event.name
            elif event.type == "program_change":
                program[event.channel] = event.program
            elif event.type in ("note_on", "note_off"):
                key = event.channel, event.note
                if key in sounding:
                    onset, velocity = sounding.pop(key)
                    notes[event.channel].append((onset, time - onset, event.note, velocity))
                if event.type == "note_on" and event.velocity > 0:
                    sounding[key] = (time, event.velocity)
                    programs[event.channel][program.get(event.channel, 0)] += 1
        for channel, played in notes.items():
            usual = programs[channel].most_common(1)[0][0]
            is_drums = channel == DRUM_CHANNEL
            role = (DRUMS, 0) if is_drums else _role(name, usual, [note[2] for note in played])
            if role[0] >= 0:
                found.append(Part(*role, sorted(played)))
    return found


def grid_notes(parts: Sequence[Part], begin: float, beats: int, beat: float = 1.0) -> STEPS:
    """Parts as grid notes of five roles: [notes, 5] like `Song.notes`.

    Strummed chords are gathered: notes that follow each other within a twentieth of a beat share
    the first one's onset. Notes outside their role's range are moved by octaves.

    Args:
        parts: of a file.
        begin: the song's start, in beats of the file.
        beats: how many of the song's beats are taken.
        beat: length of one of them, in beats of the file.
    """
    best: dict[int, int] = {}
    for part in parts:
        best[part.track] = min(best.get(part.track, part.rank), part.rank)
    grid: dict[tuple[int, int, int], tuple[int, int]] = {}
    for part in parts:
        track = part.track
        if part.rank != best[track]:
            continue
        first = last = -inf
        for note_onset, note_length, pitch, velocity in part.notes:
            onset, duration = (note_onset - begin) / beat, note_length / beat
            near = onset - last <= 1 / 20 and onset - first <= 1 / 5
            first, last = (first if near and track != DRUMS else onset), onset
            low, high = LOWEST[track], HIGHEST[track]
            if track == DRUMS and not low <= pitch <= high:
                continue
            pitch += 12 * -(-max(low - pitch, 0) // 12) - 12 * -(-max(pitch - high, 0) // 12)
            step = round(first * STEPS_PER_BEAT)
            length = min(max(round(duration * STEPS_PER_BEAT), 1), LONGEST_STEPS)
            if 0 <= step < beats * STEPS_PER_BEAT:
                key = (track, step, pitch)
                known = grid.get(key, (0, 0))
                grid[key] = (max(known[0], length), max(known[1], velocity))
    rows = [(t, s, length, p, v) for (t, s, p), (length, v) in sorted(grid.items())]
    return np.array(rows, np.int16).reshape(-1, 5)


def prepare_mma(mma: Path, folder: Path) -> Path:
    """A working copy of MMA with its groove database, made once; returns its folder."""
    home = folder.resolve() / "mma"  # MMA runs in it, and is called by its whole path
    if not (home / "ready").exists():
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(mma, home)
        if not (home / "mma.py").exists():
            shutil.copy(mma.parents[1] / "bin" / "mma", home / "mma.py")
        (home / "plugins").mkdir(exist_ok=True)
        subprocess.run(["python3", "mma.py", "-G"], cwd=home, check=True, capture_output=True)
        (home / "ready").touch()
    return home


def make_song(home: Path, groove: GrooveFile, rng: random.Random) -> Song | None:
    """One random song; None where MMA refuses the chart or fewer than two roles play."""
    chart, chords, tempo_bpm = compose(groove, rng)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "song.mma"), Path(folder, "song.mid")
        source.write_text(chart)
        command = ["python3", str(home / "mma.py"), "-f", str(target), str(source)]
        done = subprocess.run(command, cwd=home, capture_output=True, timeout=600, check=False)
        if done.returncode or not target.exists():
            return None
        parts = midi_parts(mido.MidiFile(target))
    notes = grid_notes(parts, 0.0, BARS * groove.beats_per_bar)
    if len(set(notes[:, 0].tolist())) < 2:
        return None
    header = (groove.beats_per_bar, tempo_class(tempo_bpm), song_style(groove.family))
    return Song(groove.family, header, chords, notes)


def save_songs(path: Path, songs: list[Song]) -> None:
    """Songs as one .npz of plain arrays."""
    np.savez_compressed(
        path,
        families=np.array([song.family for song in songs]),
        headers=np.array([song.header for song in songs], np.int16),
        chord_counts=np.array([len(song.chords) for song in songs]),
        note_counts=np.array([len(song.notes) for song in songs]),
        chords=np.concatenate([song.chords for song in songs]),
        notes=np.concatenate([song.notes for song in songs]),
    )


def load_songs(path: Path) -> list[Song]:
    """Inverse of `save_songs`."""
    with np.load(path, allow_pickle=False) as data:
        chords = np.split(data["chords"], np.cumsum(data["chord_counts"])[:-1])
        notes = np.split(data["notes"], np.cumsum(data["note_counts"])[:-1])
        families, headers = data["families"].tolist(), data["headers"].tolist()
    return [
        Song(family, (header[0], header[1], header[2]), chords[index], notes[index])
        for index, (family, header) in enumerate(zip(families, headers, strict=True))
    ]


def make_songs(mma: Path, folder: Path, count: int) -> None:
    """Fills the folder with files of at most 100 songs until it holds `count`; file n has seed n.

    Files are made side by side, one on each processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = -(-count // FILE_SONGS)
    missing = files - len(list(folder.glob("songs-????.npz")))
    free = (seed for seed in itertools.count() if not (folder / f"songs-{seed:04}.npz").exists())
    seeds = list(itertools.islice(free, max(missing, 0)))
    if not seeds:
        return
    home = prepare_mma(mma, folder)
    with ThreadPoolExecutor(min(len(seeds), os.cpu_count() or 1)) as pool:
        made = [
            pool.submit(_make_file, home, folder, seed, min(count, FILE_SONGS)) for seed in seeds
        ]
        for file in as_completed(made):
            print(file.result(), flush=True)


def _make_file(home: Path, folder: Path, seed: int, count: int) -> Path:
    """One file of songs, whole or not at all."""
    path = folder / f"songs-{seed:04}.npz"
    grooves = groove_files(home)
    rng, songs = random.Random(seed), list[Song]()
    refused = 0
    while len(songs) < count:
        song = make_song(home, rng.choice(grooves), rng)
        if song is not None:
            songs.append(song)
            continue
        refused += 1
        if refused > 2 * count + 20:
            raise InvalidNotes(
                f"MMA in {home} refused {refused} charts and played {len(songs)}.",
                remedy=f"See what `python3 {home / 'mma.py'} CHART` says.",
            )
    save_songs(path.with_suffix(".partial.npz"), songs)
    path.with_suffix(".partial.npz").rename(path)
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mma", type=Path, help="folder of its `lib` and `MMA`")
    parser.add_argument("--songs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(".cache/training/songs"))
    arguments = parser.parse_args()
    make_songs(arguments.mma or find_mma(), arguments.out, arguments.songs)


if __name__ == "__main__":
    main()
