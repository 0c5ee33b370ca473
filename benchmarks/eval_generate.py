"""How well, and how fast, the starter generator writes: on grooves and charts that it never saw.

    python -m benchmarks.generate_notes --data .cache/training/songs

Perplexity a token (given tokens not counted) of the starter model, of the same network untrained
and of a 5-gram of the same training songs, all on songs of held-out groove files. Agreement: the
share of sounding time in which a pitched note belongs to the chord that was given, of what the
model writes under held-out charts, of what MMA itself played there, and of notes drawn evenly from
the song's key. Recognition: of chords from damaged notes. Speed: a song of three minutes, five
tracks, one window after the other, one thread. Writes
benchmarks/results/generate_notes.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.band_transformer import BandTransformer as TorchTransformer
from export.band_transformer import ModelSize
from remix.chords import estimate_chords, pitch_class_profiles
from remix.generate_notes import (
    NotesChunk,
    SongPlan,
    generate_notes,
    join_chunks,
    one_plan,
    plan_song,
)
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.note_tokens import (
    CHORD_QUALITIES,
    DRUMS,
    NO_CHORD,
    VOCABULARY_SIZE,
    Bar,
    BarConditions,
    Header,
    chord_pitch_classes,
    decode_bar,
    split_bars,
)
from remix.notes import ROLES, BeatGrid, Note
from remix.options import GenerateOptions
from remix.settings import Settings
from remix.stages import Tensors
from runners.band_transformer import BandTransformer
from runners.onnx_session import OnnxSession
from training.band_songs import Song, load_songs
from training.generate_notes import IGNORE, Augmentation, is_held_out, sequences, song_tokens

ROOT = MANIFEST_PATH.parent
RESULT = ROOT / "benchmarks/results/generate_notes.json"
MODEL = "band-transformer-2m"
MAJOR = (0, 2, 4, 5, 7, 9, 11)


class NGram:
    """An interpolated n-gram of tokens. Source: Witten & Bell 1991, method C."""

    def __init__(self, order: int = 5) -> None:
        self.order = order
        self._counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def learn(self, tokens: Sequence[int]) -> None:
        """Counts every token after each of its 0 to order - 1 predecessors."""
        for index, token in enumerate(tokens):
            for length in range(min(self.order - 1, index) + 1):
                self._counts[tuple(tokens[index - length : index])][token] += 1

    def probability(self, history: Sequence[int], token: int) -> float:
        """Of a token after its history."""
        estimate = 1.0 / VOCABULARY_SIZE
        for length in range(min(self.order - 1, len(history)) + 1):
            counts = self._counts.get(tuple(history[len(history) - length :]))
            if counts:
                kinds, total = len(counts), counts.total()
                estimate = (counts[token] + kinds * estimate) / (total + kinds)
        return estimate


def held_out_sequences(songs: Sequence[Song], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole songs as they were made, from random bars on: inputs and targets."""
    return sequences(songs, count, 1024, np.random.default_rng(2), plain=True)


def ngram_perplexity(train: Sequence[Song], inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Perplexity of a 5-gram of the training songs."""
    model = NGram()
    for song in train:
        tokens, _ = song_tokens(song, 0, 10**6, Augmentation())
        model.learn(tokens)
    nats = []
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        for index, token in enumerate(wanted):
            if token != IGNORE:
                history = row[max(index - 3, 0) : index + 1]
                nats.append(-math.log(model.probability(history, token)))
    return math.exp(float(np.mean(nats)))


@torch.no_grad()
def torch_perplexity(model: TorchTransformer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Perplexity of a network in torch."""
    losses = [
        F.cross_entropy(model(row[None])[0], wanted, ignore_index=IGNORE, reduction="none")[
            wanted != IGNORE
        ]
        for row, wanted in zip(inputs, targets, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))


def graph_perplexity(path: Path, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Perplexity of the exported graph itself, token by token."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    layers = int(facts["layers"])
    channels = int(facts["channels"]) // int(facts["heads"])
    rows, steps = inputs.shape
    cache = {f"past_key_{i}": np.zeros((rows, channels, steps), np.float32) for i in range(layers)}
    cache |= {
        f"past_value_{i}": np.zeros((rows, steps, channels), np.float32) for i in range(layers)
    }
    names = [output.name for output in session.get_outputs()]
    nats = []
    for step in range(steps):
        feed = {
            "tokens": inputs[:, step : step + 1].numpy(),
            "positions": np.full((rows, 1), step),
            "last": np.zeros(rows, np.int64),
            "past_length": np.full(rows, step),
            **cache,
        }
        found = dict(zip(names, session.run(names, feed), strict=True))
        for layer in range(layers):
            cache[f"past_key_{layer}"][:, :, step] = found[f"key_{layer}"][:, :, 0]
            cache[f"past_value_{layer}"][:, step] = found[f"value_{layer}"][:, 0]
        wanted = targets[:, step]
        logits = torch.from_numpy(found["logits"])[wanted != IGNORE]
        nats.append(F.cross_entropy(logits, wanted[wanted != IGNORE], reduction="none"))
    return math.exp(float(torch.cat(nats).mean()))


class Agreement:
    """Sounding time of pitched notes, and how much of it is in the chord."""

    def __init__(self) -> None:
        self.in_chord = self.total = 0.0

    def add(self, chord: int, pitch: int, steps: float) -> None:
        """One note under the chord of its onset."""
        classes = chord_pitch_classes(chord)
        if classes:
            self.total += steps
            self.in_chord += steps * (pitch % 12 in classes)

    @property
    def share(self) -> float:
        """0 to 1."""
        return round(self.in_chord / max(self.total, 1e-9), 4)


def chord_agreements(writer: BandTransformer, songs: Sequence[Song], bars: int) -> dict[str, float]:
    """Of the model's notes, MMA's own and notes of the key, under the same held-out charts."""
    ours, mma, random = Agreement(), Agreement(), Agreement()
    rng = np.random.default_rng(3)
    for seed, song in enumerate(songs):
        beats = song.header[0]
        half, whole = 24, 12 * beats
        for track, onset, length, pitch, _ in song.notes.tolist():
            if track != DRUMS and onset < bars * whole:
                chord = int(song.chords[onset // whole, int(onset % whole >= half)])
                mma.add(chord, pitch, length)
        scale = best_scale(song, bars)
        for chord in song.chords[:bars].ravel().tolist():
            for step in rng.choice(scale, 8).tolist():
                random.add(chord, step, 1.0)
        grid = BeatGrid(np.arange(bars * beats + 8.0) / 2, 0, beats, 120.0, 0, "major")
        tracks = 2 ** len(ROLES) - 1
        conditions = tuple(
            BarConditions((int(a), int(b)), 0, tracks) for a, b in song.chords[:bars].tolist()
        )
        plan = SongPlan(Header(beats, song.header[1]), conditions, 0, bars)
        for bar in written_bars(writer, plan, grid, seed):
            for note in bar.notes:
                if note.track != DRUMS:
                    chord = bar.conditions.chords[note.onset_steps >= half]
                    ours.add(chord, note.pitch, note.duration_steps)
    return {"model": ours.share, "mma": mma.share, "random_notes_in_key": random.share}


def best_scale(song: Song, bars: int) -> list[int]:
    """The major scale that holds most of the chart's chord notes."""
    counts = np.zeros(12)
    for chord in song.chords[:bars].ravel().tolist():
        counts[list(chord_pitch_classes(chord))] += 1
    root = max(range(12), key=lambda tonic: sum(counts[(tonic + s) % 12] for s in MAJOR))
    return [(root + step) % 12 for step in MAJOR]


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


def written_bars(writer: BandTransformer, plan: SongPlan, grid: BeatGrid, seed: int) -> list[Bar]:
    """Every bar that the model writes for a plan."""
    bars: list[Bar] = []

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        outputs = writer(inputs)
        tokens = outputs["tokens"][0]
        bars.extend(decode_bar(bar) for bar in split_bars(tokens[tokens >= 0].tolist()))
        return outputs

    async def run() -> list[NotesChunk]:
        options = GenerateOptions(seed=seed)
        return [
            chunk
            async for chunk in generate_notes(one_plan(plan), grid, 1e9, MODEL, infer, options)
        ]

    asyncio.run(run())
    return bars


def speed(writer: BandTransformer) -> dict[str, float]:
    """A song of 180 s at 120 bpm: seconds on the clock and of the processor, tokens."""
    grid = BeatGrid(np.arange(400.0) / 2, 0, 4, 120.0, 0, "major")
    options = GenerateOptions(seed=1)
    plan = plan_song({}, grid, 180.0, options)
    tokens = 0

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        nonlocal tokens
        outputs = writer(inputs)
        tokens += int((outputs["tokens"] >= 0).sum())
        return outputs

    begin_s, begin_cpu_s = time.perf_counter(), _cpu_s()
    asyncio.run(join_chunks(generate_notes(one_plan(plan), grid, 180.0, MODEL, infer, options)))
    wall_s, cpu_s = time.perf_counter() - begin_s, _cpu_s() - begin_cpu_s
    return {
        "bars": len(plan.bars),
        "tokens": tokens,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "tokens_per_cpu_s": round(tokens / cpu_s, 1),
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def starter_writer() -> BandTransformer:
    """The repository's model, as the runner has it."""
    entry = read_manifest()[MODEL]
    file = replace(entry.files[0], path="generate_notes.onnx")
    settings = Settings(ROOT / "starter", Path(tempfile.gettempdir()))
    session = OnnxSession(entry, file, settings)
    return BandTransformer(MODEL, session, session.facts, 8)


def quality(
    writer: BandTransformer, songs: list[Song], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What takes songs of grooves that were trained on, and of grooves that were not."""
    train = [song for song in songs if not is_held_out(song)]
    held_out = [song for song in songs if is_held_out(song)]
    inputs, targets = held_out_sequences(held_out, arguments.sequences)
    graph = ROOT / "starter/generate_notes.onnx"
    torch.manual_seed(0)
    untrained = TorchTransformer(ModelSize())
    return {
        "songs": {"trained_on": len(train), "held_out": len(held_out)},
        "chord_recognition": chord_recognition(held_out[:60]),
        "chord_agreement": chord_agreements(writer, held_out[: arguments.charts], arguments.bars),
        "held_out_perplexity": {
            "starter": round(graph_perplexity(graph, inputs, targets), 3),
            "untrained": round(torch_perplexity(untrained, inputs, targets), 1),
            "5-gram": round(ngram_perplexity(train, inputs, targets), 3),
        },
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / ".cache/training/songs")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--charts", type=int, default=24)
    parser.add_argument("--bars", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    writer = starter_writer()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    result["speed"] = speed(writer)
    songs = [s for path in sorted(arguments.data.glob("songs-????.npz")) for s in load_songs(path)]
    if songs:
        result |= quality(writer, songs, arguments)
    else:
        print(
            f"{arguments.data} has no songs: only the speed is measured. "
            "python -m training.band_songs makes some."
        )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
