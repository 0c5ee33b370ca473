"""How well the generator writes, against limits: on grooves, charts and records it never saw.

    make eval-generate                 # or: python -m benchmarks.eval_generate --model FILE

- Perplexity a token (given tokens not counted) on songs of held-out groove files: below half of
  that of a 5-gram of the songs that are trained on; the untrained network's beside it. Without a
  limit, the same on ten pieces of a game (Debian planetblupi-music-midi), read as any folder
  of MIDI files is.
- Chord agreement: at least 85 % of the sounding time of what is written under held-out charts.
- Beats: at least 95 % of the written onsets within 10 ms of a sixteenth or a triplet of the song's
  real beats, in the MIDI file.
- Progressions: passages written under one of twelve are told from the others', half of them at
  least (chance: one in twelve).
- Habits: median repetition, and onsets per beat of each track, within the 5th to 95th percentile of
  held-out pieces.
- Files: of 200 seeds every one valid, not empty, within its length.
- Records of bands, where Debian's packages are to be had: our tempo within 2 % of a reference
  library's, our key a library's, and of the onsets that are generated on beats 90 % at least within
  70 ms of the beats of one of three references (librosa, Essentia, the song's chart).

A miss is named, and ends it with 1. Beside these, without a limit: how many chords are found in
damaged notes, and how long a song of three minutes takes. Songs are made by MMA where the folder
has none. Writes benchmarks/results/eval_generate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.generation import Check
from benchmarks.generation.perplexity import perplexities
from benchmarks.generation.real_songs import checks_of_songs, compare, fetch
from benchmarks.generation.written import (
    Band,
    accompaniment,
    best_scale,
    habits,
    progressions_apart,
    validity,
)
from remix.chords import estimate_chords, pitch_class_profiles
from remix.errors import NotFound
from remix.generate_notes import plan_song
from remix.manifest import MANIFEST_PATH
from remix.note_tokens import CHORD_QUALITIES, DRUMS, NO_CHORD
from remix.notes import BeatGrid, Note
from remix.options import GenerateOptions
from training.band_songs import Song, find_mma, make_songs
from training.debian import unpack
from training.generate_notes import split_songs
from training.midi_songs import read_songs

ROOT = MANIFEST_PATH.parent
RESULT = ROOT / "benchmarks/results/eval_generate.json"
OTHER_MUSIC = "planetblupi-music-midi"


def chord_recognition(songs: Sequence[Song]) -> dict[str, float]:
    """Share of half bars whose chord `remix.chords` finds from MMA's notes, damaged.

    30 % of the notes are missing, 15 % of those left have a false one beside them (an overtone or
    a neighbour), and confidence is random.
    """
    rng = np.random.default_rng(0)
    root = both = total = 0
    for song in songs:
        notes = []
        for track, onset, length, pitch, _ in song.notes.tolist():
            if track != DRUMS and rng.random() > 0.3:
                notes.append(Note(onset, length, pitch, int(rng.integers(40, 127))))
                if rng.random() < 0.15:
                    false = min(pitch + int(rng.choice([12, 19, 24, -12, 7, 1, 2])), 127)
                    notes.append(Note(onset, length, false, int(rng.integers(30, 70))))
        starts = np.arange(len(song.chords) + 1) * 12 * song.header[0]
        edges = np.sort(np.concatenate((starts, starts[:-1] + 24))).astype(np.float64)
        tonic = best_scale(song, len(song.chords))[0]
        found = estimate_chords(pitch_class_profiles(notes, edges), tonic, "major")
        wanted = song.chords.ravel()
        known = wanted != NO_CHORD
        total += int(known.sum())
        both += int((found == wanted)[known].sum())
        size = len(CHORD_QUALITIES)
        root += int((found // size == wanted // size)[known].sum())
    return {"root": round(root / total, 4), "root_and_quality": round(both / total, 4)}


def other_music() -> dict[str, list[Song]]:
    """Pieces that nothing was trained on, of a game; none where they are not to be had."""
    try:
        [folder] = unpack(OTHER_MUSIC)
    except NotFound as error:
        print(f"{error} It is left out.")
        return {}
    paths = sorted(folder.rglob("*.mid"))
    return {OTHER_MUSIC: [song for path in paths for song in read_songs(path)]}


def speed(band: Band) -> dict[str, float]:
    """A song of 180 s at 120 bpm, five tracks, one window after the other, one thread."""
    grid = BeatGrid(np.arange(400.0) / 2, 0, 4, 120.0, 0, "major")
    options = GenerateOptions(seed=1)
    plan = plan_song({}, grid, 180.0, options)
    before, begin_s, begin_cpu_s = band.tokens, time.perf_counter(), time.process_time()
    band.write(plan, grid, 180.0, options)
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    tokens = band.tokens - before
    return {
        "bars": len(plan.bars),
        "tokens": tokens,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure, and how long each part took."""
    train, held_out = split_songs(arguments.data)
    band = Band(arguments.model)
    charts = held_out[: arguments.charts]  # songs are in random order
    steps: dict[str, Callable[[], Any]] = {
        "perplexity": lambda: perplexities(
            arguments.model,
            train,
            {"held_out": held_out, **other_music()},
            arguments.sequences,
        ),
        "accompaniment": lambda: accompaniment(band, charts, 16),
        "progressions": lambda: progressions_apart(band, held_out, 12, arguments.repeats),
        "habits": lambda: habits(band, charts, 32),
        "files": lambda: validity(band, arguments.seeds),
        "real_songs": lambda: compare(band, fetch()[: arguments.records]),
        "chord_recognition": lambda: chord_recognition(held_out[:60]),
        "speed": lambda: speed(band),
    }
    result: dict[str, Any] = {
        "model": arguments.model.name,
        "songs": {"trained_on": len(train), "held_out": len(held_out)},
        "processors": os.cpu_count(),
    }
    seconds: dict[str, float] = {}
    if arguments.only:
        known = json.loads(arguments.out.read_text())
        result, seconds = {**known, **result}, known["seconds"]
    if unknown := set(arguments.only or ()) - set(steps):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: there are {', '.join(steps)}.")
    for name in arguments.only or steps:
        begin_s = time.perf_counter()
        result[name] = steps[name]()
        seconds[name] = round(time.perf_counter() - begin_s, 1)
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    return {**result, "seconds": seconds}


def checks_of(result: dict[str, Any]) -> list[Check]:
    """What must show, and whether it does."""
    perplexity, files = result["perplexity"]["held_out"], result["files"]
    agreement = result["accompaniment"]["chord_agreement"]
    grid = result["accompaniment"]["onsets_on_grid"]
    apart, limit = result["progressions"], 0.5 * perplexity["5-gram"]
    checks = [
        Check(
            "perplexity a token, held-out grooves",
            f"{perplexity['model']} (5-gram {perplexity['5-gram']}, "
            f"untrained {perplexity['untrained']})",
            f"below {limit:.2f}",
            perplexity["model"] < min(limit, perplexity["untrained"]),
        ),
        Check(
            "sounding time in the given chord",
            f"{agreement['model']:.1%} (MMA {agreement['mma']:.1%}, "
            f"random notes in key {agreement['random_notes_in_key']:.1%})",
            "85 % at least",
            agreement["model"] >= 0.85,
        ),
        Check(
            "onsets on the beat grid",
            f"{grid['model']:.1%} (MMA {grid['mma']:.1%}, random {grid['random']:.1%})",
            "95 % at least",
            grid["model"] >= 0.95,
        ),
        Check(
            "passages given to their progression",
            f"{apart['passages']:.1%} (single bars {apart['single_bars']:.1%}, "
            f"chance {apart['chance']:.1%})",
            "50 % at least",
            apart["passages"] >= 0.5,
        ),
    ]
    for name, habit in result["habits"].items():
        low, high = habit["held_out_5th"], habit["held_out_95th"]
        checks.append(
            Check(
                f"{name.replace('_', ' ')}, median",
                f"{habit['written_median']} (held-out median {habit['held_out_median']}; "
                f"{habit['written_within']:.0%} of the pieces within)",
                f"{low} to {high}",
                low <= habit["written_median"] <= high,
            )
        )
    checks.append(
        Check(
            "files valid, not empty, within length",
            f"{files['valid']} of {files['seeds']}",
            "all",
            files["valid"] == files["seeds"],
        )
    )
    return checks + checks_of_songs(result["real_songs"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "starter/generate_notes.onnx")
    parser.add_argument("--data", type=Path, default=ROOT / ".cache/training/songs")
    parser.add_argument("--songs", type=int, default=1000, help="made where --data has none")
    parser.add_argument("--sequences", type=int, default=48, help="of held-out tokens")
    parser.add_argument("--charts", type=int, default=24, help="held-out ones that are played")
    parser.add_argument("--repeats", type=int, default=8, help="of each progression")
    parser.add_argument("--seeds", type=int, default=200, help="whole files")
    parser.add_argument("--records", type=int, default=8, help="real songs")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="+", help="parts to measure anew; others are --out's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not any(arguments.data.glob("songs-????.npz")):
        make_songs(find_mma(), arguments.data, arguments.songs)
    result = measure(arguments)
    checks = checks_of(result)
    missed = [check.name for check in checks if not check.holds]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**result, "missed": missed}, indent=1) + "\n")
    for check in checks:
        mark = "holds " if check.holds else "MISSED"
        print(f"{mark}  {check.name}: {check.value}; limit: {check.limit}")
    if missed:
        raise SystemExit(f"{len(missed)} of {len(checks)} limits are missed.")


if __name__ == "__main__":
    main()
