"""band songs, SoundFonts, voices -> songs with separate stems, in the layout of MUSDB.

    scripts/get-stem-material                         # Debian packages, unpacked into .cache
    python -m training.stem_songs --songs 200 --held-out-songs 20

Every part of a song of `training/band_songs.py` is played alone by FluidSynth: drawn instrument,
SoundFont and drum kit, its reverb and chorus varied; often a lead plays a melody over it. A voice
sings a melody over the same chords (`training/sung_voices.py`), with reverb and doubling.

    OUT/takes/train/0000.ogg                          dry sung takes
    OUT/train/song-0000/{drums,bass,other,vocals}.flac, song.json (what played, and its notes)
    OUT/test/...                                      a SoundFont, voices and grooves of its own

Of the same notes and SoundFonts song n is the same wherever it is made; what is there is not made
again. Song n is sung over by take n, or, where there are fewer takes, by one of another song:
training shuffles them anyway. So notes, SoundFonts and takes travel to a machine without voices and
pyworld, and songs are rendered there (CONTRIBUTING.md, "Four stems").
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import fluidsynth
import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from remix.note_tokens import DRUMS, ROLES, STEPS_PER_BEAT, TEMPO_EDGES_BPM
from training.band_songs import Song, load_songs, make_songs
from training.generate_notes import is_held_out
from training.melodies import MelodyNote, draw_melody

Floats = NDArray[np.float32]

SAMPLE_RATE_HZ = 44_100
STEMS = ("drums", "bass", "other", "vocals")

HELD_OUT_FONT = "TimGM6mb.sf2"
"""Not a relative of those below (MuseScore's is made from Fluid R3)."""

FONTS = (
    *("MuseScore_General_Lite.sf3", "FluidR3Mono_GM.sf3", "FluidR3_GM.sf2", "sf_GMbank.sf2"),
    *("Black_Pearl_4_LV2.sf2", "Red_Zeppelin_4_LV2.sf2"),
)
"""Those of them that are there are used; the last two are drum kits only."""

DRUM_FONTS = frozenset({"Black_Pearl_4_LV2.sf2", "Red_Zeppelin_4_LV2.sf2"})
DRUM_KITS = (0, 8, 16, 24, 25, 32, 40)
"""General MIDI level 2: standard, room, power, electronic, TR-808, jazz, brush."""

HELD_OUT_VOICES = frozenset({"it_IT_m_Carlo", "fr_CA_f_June"})
"""A man and a woman; among so few speakers a hash might hold out none."""

PROGRAMS: Mapping[str, tuple[int, ...]] = {
    "bass": tuple(range(32, 40)),
    "guitar": tuple(range(24, 32)),
    "piano": (*range(8), *range(16, 21), 11, 12),
    # No choirs (52 to 54, 85, 91): whether they are voices is a matter of opinion.
    "strings": (*range(40, 47), *range(48, 52), *range(60, 64), *range(88, 91), 92, 93, 94, 95),
    "lead": (*range(56, 80), *range(80, 85), 86, 87, 11, 22, 26, 29, 30, 40),
}
LEVELS_DB = {"drums": (-20.0, 3.0), "bass": (-21.0, 3.0), "other": (-20.0, 4.0), "vocals": (-19, 3)}
"""RMS of a stem, and its spread; then the song is brought to a peak of 0.9."""

PAD_S = 0.5
"""No sung note begins so close to the end."""


@dataclass(frozen=True)
class Part:
    """What one instrument plays.

    Args:
        stem: it belongs to.
        font: file name of its SoundFont.
        bank: 128 for drum kits, else 0.
        program: of the bank.
        notes: (onset_s, duration_s, pitch, velocity).
        effects: of FluidSynth: reverb room size, damping, width, send; chorus send.
    """

    stem: str
    font: str
    bank: int
    program: int
    notes: tuple[tuple[float, float, int, int], ...]
    effects: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Draw:
    """Song n of a split, decided but not played; `shift` semitones above its chords."""

    family: str
    beats_per_bar: int
    tempo_bpm: float
    chords: NDArray[np.int16]
    shift: int
    parts: tuple[Part, ...]
    seconds: float


@dataclass(frozen=True)
class Material:
    """What songs are made of.

    Args:
        songs: band songs of the split.
        fonts: SoundFont files by name, those of the split only.
        folder: OUT.
        split: `train` or `test`.
        seconds: length of a song.
        takes: how many sung takes there are.
        lossy: whether stems are written as Vorbis, a fifth as large.
    """

    songs: tuple[Song, ...]
    fonts: Mapping[str, Path]
    folder: Path
    split: str
    seconds: float
    takes: int
    lossy: bool = False


def find_fonts(folders: Sequence[Path], held_out: bool) -> dict[str, Path]:
    """The SoundFonts of a split that lie anywhere below the folders."""
    wanted = (HELD_OUT_FONT,) if held_out else FONTS
    found = {
        path.name: path
        for folder in reversed(folders)
        for path in sorted(folder.rglob("*.sf[23]"))
        if path.name in wanted
    }
    if not set(found) - DRUM_FONTS:
        raise SystemExit(
            f"None of {', '.join(wanted)} is below {', '.join(map(str, folders))}: "
            "run scripts/get-stem-material."
        )
    return {name: found[name] for name in wanted if name in found}


def generator(split: str, index: int, purpose: int) -> np.random.Generator:
    """What song `index` of a split is drawn by."""
    return np.random.default_rng((("train", "test").index(split), index, purpose))


def draw_song(material: Material, index: int) -> Draw:
    """Song `index`: an excerpt of a band song, who plays it on what, how fast, in which key."""
    rng = generator(material.split, index, 0)
    song = material.songs[int(rng.integers(len(material.songs)))]
    beats, tempo_class, _ = song.header
    edges = (60.0, *TEMPO_EDGES_BPM, 190.0)
    tempo_bpm = float(rng.uniform(edges[tempo_class], edges[tempo_class + 1]))
    bars = int(np.ceil(material.seconds * tempo_bpm / 60 / beats))
    first = int(rng.integers(max(len(song.chords) - bars, 0) + 1))
    chords = song.chords[first : first + bars]
    step_s = 60 / tempo_bpm / STEPS_PER_BEAT
    shift = int(rng.integers(-5, 7))
    parts = []
    for track, role in enumerate(ROLES):
        rows = song.notes[song.notes[:, 0] == track].astype(int)
        rows[:, 1] -= first * beats * STEPS_PER_BEAT
        rows = rows[(rows[:, 1] >= 0) & (rows[:, 1] * step_s < material.seconds)]
        if len(rows) and (role in ("drums", "bass") or rng.random() < 0.85):
            moved = 0 if track == DRUMS else shift
            notes = tuple(
                (onset * step_s, length * step_s, pitch + moved, velocity)
                for _, onset, length, pitch, velocity in rows.tolist()
            )
            parts.append(_part(material, role, notes, rng))
    if rng.random() < 0.5:
        middle = int(rng.integers(62, 80)) + shift
        melody = draw_melody(chords, beats, 60 / tempo_bpm, middle - shift, rng)
        notes = tuple(
            (note.onset_s, 0.95 * note.duration_s, middle + note.pitch, int(rng.integers(70, 115)))
            for note in melody
        )
        parts.append(_part(material, "lead", notes, rng))
    return Draw(song.family, beats, tempo_bpm, chords, shift, tuple(parts), material.seconds)


def _part(
    material: Material,
    role: str,
    notes: tuple[tuple[float, float, int, int], ...],
    rng: np.random.Generator,
) -> Part:
    fonts = [font for font in material.fonts if role == "drums" or font not in DRUM_FONTS]
    font = str(rng.choice(fonts))
    is_wet, has_chorus = rng.random() < 0.6, rng.random() < 0.25
    effects = (
        float(rng.uniform(0.1, 0.9)),
        float(rng.uniform(0.0, 0.8)),
        float(rng.uniform(0.3, 1.0)),
        float(rng.uniform(0.1, 0.7)) if is_wet else 0.0,
        float(rng.uniform(0.2, 0.8)) if has_chorus else 0.0,
    )
    if role == "drums":
        bank, program = (0, 0) if font in DRUM_FONTS else (128, int(rng.choice(DRUM_KITS)))
        return Part("drums", font, bank, program, notes, effects)
    program = int(rng.choice(PROGRAMS[role]))
    return Part("bass" if role == "bass" else "other", font, 0, program, notes, effects)


def play(part: Part, font: Path, seconds: float) -> Floats:
    """One part by FluidSynth: [2, T] at 44.1 kHz."""
    room, damping, width, wet, chorus = part.effects
    settings = {
        "synth.reverb.active": int(wet > 0),
        "synth.chorus.active": int(chorus > 0),
        "synth.dynamic-sample-loading": 1,
        "synth.polyphony": 256,
        "synth.cpu-cores": 1,
        "synth.lock-memory": 0,
    }
    synth = fluidsynth.Synth(0.2, SAMPLE_RATE_HZ, **settings)
    try:
        channel = 9 if part.bank else 0
        handle = synth.sfload(str(font))
        program = part.program if synth.sfpreset_name(handle, part.bank, part.program) else 0
        synth.program_select(channel, handle, part.bank, program)
        if wet:
            synth.set_reverb(room, damping, 100 * width, 0.9)
            synth.cc(channel, 91, round(127 * wet))
        if chorus:
            synth.cc(channel, 93, round(127 * chorus))
        events = sorted(
            (time_s, is_start, pitch, velocity)
            for onset_s, duration_s, pitch, velocity in part.notes
            for time_s, is_start in ((onset_s, True), (onset_s + duration_s, False))
            if 0 <= pitch < 128
        )
        blocks, at, length = [], 0, round(seconds * SAMPLE_RATE_HZ)
        for time_s, is_start, pitch, velocity in events:
            place = min(round(time_s * SAMPLE_RATE_HZ), length)
            if place > at:
                blocks.append(synth.get_samples(place - at))
                at = place
            if is_start:
                synth.noteon(channel, pitch, velocity)
            else:
                synth.noteoff(channel, pitch)
        blocks.append(synth.get_samples(length - at) if length > at else np.zeros(0, np.int16))
    finally:
        synth.delete()
    samples = np.concatenate(blocks).reshape(-1, 2).T
    return (samples / np.float32(32768)).astype(np.float32)


def room_of(rng: np.random.Generator) -> Floats:
    """[2, T]: an impulse response, decaying noise after the direct sound."""
    decay_s, wet = rng.uniform(0.2, 1.8), 10.0 ** (rng.uniform(-24, -9) / 20)
    times_s = np.arange(round(1.2 * decay_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tail = rng.standard_normal((2, len(times_s))) * np.exp(-6.9 * times_s / decay_s)
    tail[:, : round(rng.uniform(0.005, 0.04) * SAMPLE_RATE_HZ)] = 0.0
    tail *= wet / np.sqrt(np.square(tail).sum(1, keepdims=True))
    tail[:, 0] = 1.0
    return tail.astype(np.float32)


def produce_vocal(take: Floats, rng: np.random.Generator) -> Floats:
    """A dry take [T] as records have it: [2, T], often doubled, mostly in a room."""
    voice = np.stack([take, take])
    if rng.random() < 0.3:  # two more, a little late, left and right
        for side in (0, 1):
            late = int(rng.integers(400, 1600))
            copy = np.concatenate([np.zeros(late, np.float32), take[:-late]])
            voice[side] += np.float32(rng.uniform(0.4, 0.9)) * copy
            voice[1 - side] += np.float32(0.2) * copy
    if rng.random() < 0.8:
        voice = fftconvolve(voice, room_of(rng), axes=1)[:, : len(take)]
    return voice.astype(np.float32)


def make_song(material: Material, index: int) -> str:
    """Renders song `index` into its folder, if it is not there; its name."""
    folder = material.folder / material.split / f"song-{index:04}"
    if folder.exists():
        return ""
    draw, rng = draw_song(material, index), generator(material.split, index, 1)
    stems = {
        stem: np.zeros((2, round(draw.seconds * SAMPLE_RATE_HZ)), np.float32) for stem in STEMS
    }
    for part in draw.parts:
        sound = play(part, material.fonts[part.font], draw.seconds)
        level = np.sqrt(np.mean(np.square(sound)))
        if level > 1e-5:  # parts of a stem are about as loud as each other
            stems[part.stem] += sound * np.float32(10 ** (rng.uniform(-6, 0) / 20) / level)
    take, rate_hz = soundfile.read(take_path(material, index % material.takes), dtype="float32")
    assert rate_hz == SAMPLE_RATE_HZ
    stems["vocals"] += produce_vocal(np.resize(take, stems["vocals"].shape[1]), rng)
    for name, stem in stems.items():
        level = np.sqrt(np.mean(np.square(stem)))
        mean_db, spread_db = LEVELS_DB[name]
        wanted = 10 ** ((mean_db + rng.uniform(-spread_db, spread_db)) / 20)
        stems[name] = stem * np.float32(wanted / level if level > 1e-5 else 0.0)
    peak = max(np.abs(sum(stems.values())).max(), *(np.abs(stem).max() for stem in stems.values()))
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    for name, stem in stems.items():
        suffix, subtype = ("ogg", "VORBIS") if material.lossy else ("flac", "PCM_16")
        path = partial_folder / f"{name}.{suffix}"
        soundfile.write(path, (stem * (0.9 / peak)).T, SAMPLE_RATE_HZ, subtype)
    (partial_folder / "song.json").write_text(json.dumps(_facts(draw, index % material.takes)))
    partial_folder.rename(folder)
    return folder.name


def _facts(draw: Draw, take: int) -> dict[str, Any]:
    """What is known of a song: who plays, and the notes of the pitched stems."""
    notes: dict[str, list[list[float]]] = {"bass": [], "other": []}
    for part in draw.parts:
        if part.stem in notes:
            notes[part.stem] += [
                [round(onset, 4), round(duration, 4), pitch]
                for onset, duration, pitch, _ in part.notes
            ]
    return {
        "groove": draw.family,
        "tempo_bpm": round(draw.tempo_bpm, 2),
        "take": take,
        "parts": [[part.stem, part.font, part.bank, part.program] for part in draw.parts],
        "notes": {stem: sorted(rows) for stem, rows in notes.items()},
    }


def take_path(material: Material, index: int) -> Path:
    """Where sung take `index` of a split lies."""
    return material.folder / "takes" / material.split / f"{index:04}.ogg"


def make_take(material: Material, voices: Path, index: int) -> str:
    """Sings the melody over song `index`, if it is not sung yet; its name."""
    # Here, because a machine that only renders songs has no pyworld.
    from training.sung_voices import sing

    path = take_path(material, index)
    if path.exists():
        return ""
    draw, rng = draw_song(material, index), generator(material.split, index, 2)
    of_split = [
        voice
        for voice in find_voices(voices)
        if (voice.name in HELD_OUT_VOICES) == (material.split == "test")
    ]
    if not of_split:
        raise SystemExit(f"{voices} has no voice for {material.split}: scripts/get-stem-material.")
    voice = of_split[index % len(of_split)]
    middle = int(rng.integers(55, 67))
    melody: list[MelodyNote] = draw_melody(
        draw.chords, draw.beats_per_bar, 60 / draw.tempo_bpm, middle, rng
    )
    length = round(draw.seconds * SAMPLE_RATE_HZ)
    melody = [note for note in melody if note.onset_s < draw.seconds - PAD_S]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    take = sing(voice, melody, middle + draw.shift, length, rng)
    soundfile.write(partial_path, take, SAMPLE_RATE_HZ, "VORBIS", format="OGG")
    partial_path.rename(path)
    return f"take {path.name} by {voice.name}"


@cache
def find_voices(folder: Path) -> tuple[Any, ...]:
    """The speakers of the packages that scripts/get-stem-material unpacks."""
    from training.sung_voices import SUFFIXES, Voice

    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and (name := _speaker(path)):
            files.setdefault(name, []).append(path)
    return tuple(Voice(name, tuple(paths)) for name, paths in sorted(files.items()))


def _speaker(path: Path) -> str:
    """Whose voice a file of those packages has; empty where it is none."""
    parts = path.parts
    if "asterisk" in parts:
        known = path.parts[parts.index("sounds") + 1]
        # One woman speaks English and Spanish.
        return "Allison" if known.endswith("Allison") else known
    if "fillets-ng" in parts:  # scene-m-what: the small fish, scene-v-what: the big one
        role = path.stem.split("-")[1:2]
        return {"m": "fillets-small", "v": "fillets-big"}.get("".join(role), "")
    if "tuxpaint" in parts and "_desc" in path.stem:
        return "tuxpaint"  # dozens of speakers, and nothing says which
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/training/stems"))
    parser.add_argument("--material", type=Path, default=Path(".cache/stem_material"))
    parser.add_argument("--notes", type=Path, default=Path(".cache/training/songs"))
    parser.add_argument("--songs", type=int, default=200)
    parser.add_argument("--held-out-songs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=36.0, help="length of a song")
    parser.add_argument("--takes", type=int, default=40, help="sung takes; songs share them")
    parser.add_argument("--takes-only", action="store_true", help="what travels, but no songs")
    parser.add_argument("--lossy", action="store_true", help="Vorbis instead of FLAC")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if not list(options.notes.glob("songs-????.npz")):
        make_songs(options.material / "usr/share/mma", options.notes, 100)
    songs = [
        song for path in sorted(options.notes.glob("songs-????.npz")) for song in load_songs(path)
    ]
    for split, count in (("train", options.songs), ("test", options.held_out_songs)):
        held_out = split == "test"
        takes = min(max(count, 1), options.takes)
        material = Material(
            tuple(song for song in songs if is_held_out(song) == held_out),
            find_fonts([options.material, Path("/usr/share/sounds")], held_out) if count else {},
            options.out,
            split,
            options.seconds,
            takes,
            options.lossy,
        )
        if count:
            _make_all(partial(make_take, material, options.material), takes, options.workers)
        if not options.takes_only:
            _make_all(partial(make_song, material), count, options.workers)


def _make_all(make: Any, count: int, workers: int) -> None:
    """Makes 0 to count - 1 in several processes, and says how fast."""
    begin_s, made = time.monotonic(), 0
    for name in _made(make, count, workers):
        if name:
            made += 1
            seconds = (time.monotonic() - begin_s) / made
            print(f"{name}: {seconds:.1f} s each so far", flush=True)


def _made(make: Any, count: int, workers: int) -> Iterator[str]:
    if workers == 1:
        yield from map(make, range(count))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _remember, (make,)) as pool:
        yield from pool.imap_unordered(_make_one, range(count))


_make_in_worker: list[Any] = []


def _remember(make: Any) -> None:
    """In a worker, once: the material is tens of megabytes."""
    _make_in_worker.append(make)


def _make_one(index: int) -> str:
    name: str = _make_in_worker[0](index)
    return name


if __name__ == "__main__":
    main()
