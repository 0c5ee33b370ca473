"""band songs -> generator: trains the transformer that writes bars under given chords.

One command, resumable, on CPU or CUDA; songs are made first where `--data` holds none:

    python -m training.generate_notes --data .cache/training/songs --out .cache/training/generate_notes \\
        --minutes 70 --threads 1

The same command continues an interrupted run from its last checkpoint. Every batch is drawn from
(seed, step), so a resumed run sees what the uninterrupted one would have seen.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from export.band_transformer import BandTransformer, ModelSize
from remix.note_tokens import (
    BAR,
    BAR_TOKENS,
    DRUMS,
    HIGHEST,
    LOWEST,
    ROLES,
    STEPS_PER_BEAT,
    TRACK_VELOCITY,
    VELOCITY_LEVELS,
    VOCABULARY_HASH,
    Bar,
    BarConditions,
    GridNote,
    Header,
    density_level,
    encode_bar,
    encode_header,
    nearest_duration_steps,
)
from training.band_songs import Song, load_songs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IGNORE = -100
HELD_OUT_FAMILIES = 12  # one groove file in 12 is never trained on


@dataclass(frozen=True)
class TrainingOptions:
    """What a run is made of; the defaults made the starter model.

    Args:
        minutes: time budget, pauses not counted; the learning rate falls to 0 at its end.
        decay: the last part of the budget, in which the learning rate falls linearly.
    """

    data: Path
    out: Path
    minutes: float = 70.0
    steps: int = 1_000_000
    batch: int = 2
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay: float = 0.35
    seed: int = 1
    threads: int = 1
    evaluate_every: int = 200
    device: str = "cpu"
    size: ModelSize = field(default_factory=ModelSize)


@dataclass(frozen=True)
class Augmentation:
    """How one pass over a song differs from the song as it was made.

    Args:
        transpose: semitones.
        tracks: bit mask of the tracks that are kept.
        style_known: whether the header names the style.
        density_known: whether bars name their density.
    """

    transpose: int = 0
    tracks: int = 2 ** len(ROLES) - 1
    style_known: bool = True
    density_known: bool = True


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """Any key; in two of five passes some tracks missing; style and density given or not."""
    tracks = 2 ** len(ROLES) - 1
    if rng.random() < 0.4:
        tracks = int(rng.integers(1, 2 ** len(ROLES)))
    return Augmentation(
        int(rng.integers(-6, 6)), tracks, bool(rng.random() < 0.75), bool(rng.random() < 0.75)
    )


def is_held_out(song: Song) -> bool:
    """Whether the song's groove file belongs to the held-out part."""
    digest = hashlib.sha256(song.family.encode()).digest()
    return digest[0] % HELD_OUT_FAMILIES == 0


def _transposed_chord(chord: int, semitones: int) -> int:
    qualities, no_chord = 7, 84
    return chord if chord == no_chord else (chord + qualities * semitones) % no_chord


def song_bar(song: Song, index: int, augmentation: Augmentation) -> Bar:
    """Bar `index` of a song, on the token grid."""
    beats = song.header[0]
    steps = beats * STEPS_PER_BEAT
    begin, end = np.searchsorted(_bar_of(song), (index, index + 1))
    rows = song.notes[_bar_order(song)[begin:end]].tolist()
    notes: dict[tuple[int, int, int], int] = {}
    loudness: dict[int, list[int]] = {}
    for track, onset, duration, pitch, velocity in rows:
        if not augmentation.tracks >> track & 1:
            continue
        if track != DRUMS:
            pitch += augmentation.transpose
            pitch += 12 * ((pitch < LOWEST[track]) - (pitch > HIGHEST[track]))
        length = 1 if track == DRUMS else nearest_duration(duration)
        key = (track, onset - index * steps, pitch)
        notes[key] = max(notes.get(key, 0), length)
        loudness.setdefault(track, []).append(velocity)
    grid = tuple(sorted(GridNote(t, o, length, p) for (t, o, p), length in notes.items()))
    onsets = len({(note.track, note.onset_steps) for note in grid})
    level = density_level(onsets, len(loudness), beats) if augmentation.density_known else 0
    first, second = song.chords[index].tolist()
    chords = (
        _transposed_chord(first, augmentation.transpose),
        _transposed_chord(second, augmentation.transpose),
    )
    conditions = BarConditions(chords, level, sum(1 << track for track in loudness))
    levels = {
        track: min(round(sum(values) / len(values)) * VELOCITY_LEVELS // 128, VELOCITY_LEVELS - 1)
        for track, values in loudness.items()
    }
    return Bar(conditions, levels, grid)


_NEAREST = [nearest_duration_steps(steps) for steps in range(1025)]
_INDEX: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}


def nearest_duration(steps: int) -> int:
    """`nearest_duration_steps` from a table."""
    return _NEAREST[min(steps, 1024)]


def _indexed(song: Song) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    found = _INDEX.get(id(song))
    if found is None:
        bars = song.notes[:, 1].astype(np.int64) // (song.header[0] * STEPS_PER_BEAT)
        order = np.argsort(bars, kind="stable")
        found = _INDEX[id(song)] = (bars[order], order)
    return found


def _bar_of(song: Song) -> npt.NDArray[np.int64]:
    return _indexed(song)[0]


def _bar_order(song: Song) -> npt.NDArray[np.int64]:
    return _indexed(song)[1]


def song_tokens(
    song: Song, first_bar: int, count: int, augmentation: Augmentation
) -> tuple[list[int], list[bool]]:
    """A header and bars from `first_bar` on, at most `count` tokens; and which are given."""
    beats, tempo, style = song.header
    tokens = encode_header(Header(beats, tempo, style if augmentation.style_known else 0))
    for index in range(first_bar, len(song.chords)):
        bar = encode_bar(song_bar(song, index, augmentation))
        if len(tokens) >= count or len(bar) >= BAR_TOKENS:
            break
        tokens += bar
    given = [token < TRACK_VELOCITY and token != BAR for token in tokens]
    return tokens[:count], given[:count]


def sequences(
    songs: Sequence[Song], count: int, context: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [count, context] each; given tokens and padding are not targets."""
    inputs = np.zeros((count, context), np.int64)
    targets = np.full((count, context), IGNORE, np.int64)
    row = 0
    while row < count:
        song = songs[int(rng.integers(len(songs)))]
        first_bar = int(rng.integers(max(len(song.chords) - 8, 1)))
        tokens, given = song_tokens(song, first_bar, context + 1, draw_augmentation(rng))
        if len(tokens) < context // 4:
            continue
        length = len(tokens) - 1
        inputs[row, :length] = tokens[:-1]
        targets[row, :length] = np.where(given[1:], IGNORE, tokens[1:])
        row += 1
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class Trainer:
    """A run: model, optimisers, log and checkpoint."""

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.device = torch.device(options.device)
        self.model = BandTransformer(options.size).to(self.device)
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        # Muon (Jordan et al. 2024) scaled to AdamW's step size (Liu et al. 2025): both optimisers
        # take one learning rate.
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        options.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()
        self.songs: list[Song] = []
        self.held_out: list[Song] = []
        self._files: set[Path] = set()
        self.read_songs()

    def read_songs(self) -> None:
        """Takes up song files that have appeared since the last call."""
        for path in sorted(self.options.data.glob("songs-????.npz")):
            if path not in self._files:
                self._files.add(path)
                for song in load_songs(path):
                    (self.held_out if is_held_out(song) else self.songs).append(song)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        assert state["vocabulary"] == VOCABULARY_HASH, "the checkpoint speaks another vocabulary"
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            "vocabulary": VOCABULARY_HASH,
            "size": self.options.size.as_dict(),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, by steps or by time, whichever is further."""
        return max(self.step / self.options.steps, self.seconds / 60 / self.options.minutes)

    def learning_rate(self) -> float:
        """Warm-up, a plateau, and a linear fall to 0."""
        warm = min((self.step + 1) / self.options.warmup_steps, 1.0)
        fall = min((1.0 - self.progress) / self.options.decay, 1.0)
        return self.options.learning_rate * warm * max(fall, 0.0)

    def train_step(self) -> tuple[float, float]:
        """One update; returns its loss (nats a token) and accuracy."""
        rng = np.random.default_rng((self.options.seed, self.step))
        inputs, targets = sequences(
            self.songs, self.options.batch, self.options.size.context_tokens, rng
        )
        loss, accuracy = self._loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate()
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return float(loss.detach()), accuracy

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(inputs)
        keep = targets != IGNORE
        kept, wanted = logits[keep].float(), targets[keep]
        accuracy = (kept.argmax(-1) == wanted).float().mean()
        return F.cross_entropy(kept, wanted), float(accuracy)

    @torch.no_grad()
    def evaluate(self, batches: int = 6) -> tuple[float, float]:
        """Loss and accuracy on held-out grooves, always on the same sequences."""
        results = []
        for index in range(batches):
            rng = np.random.default_rng((10**6, index))
            inputs, targets = sequences(
                self.held_out[:400], 4, self.options.size.context_tokens, rng
            )
            loss, accuracy = self._loss(inputs, targets)
            results.append((float(loss), accuracy))
        loss_mean, accuracy_mean = np.mean(results, axis=0).tolist()
        return loss_mean, accuracy_mean

    def run(self) -> None:
        """Trains until the budget is spent."""
        recent: list[tuple[float, float]] = []
        begin = time.monotonic() - self.seconds
        while self.progress < 1:
            recent.append(self.train_step())
            self.seconds = time.monotonic() - begin
            if self.step % self.options.evaluate_every == 0 or self.progress >= 1:
                self._note(recent)
                recent.clear()
                self.read_songs()

    def _note(self, recent: list[tuple[float, float]]) -> None:
        loss, accuracy = np.mean(recent, axis=0).tolist()
        held_out_loss, held_out_accuracy = self.evaluate()
        row = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "songs": len(self.songs),
            "loss": round(loss, 4),
            "accuracy": round(accuracy, 4),
            "held_out_loss": round(held_out_loss, 4),
            "held_out_perplexity": round(math.exp(held_out_loss), 3),
            "held_out_accuracy": round(held_out_accuracy, 4),
        }
        self.log.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        plot(self.log, self.options.out / "curve.png")


def plot(log: Sequence[dict[str, float]], path: Path) -> None:
    """Loss and accuracy over the steps, trained on and held out, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [row["step"] for row in log]
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("nats a token", ""), strict=True):
        axis.plot(steps, [row[name] for row in log], label="training grooves")
        axis.plot(steps, [row[f"held_out_{name}"] for row in log], label="held-out grooves")
        axis.set(xlabel="step", ylabel=f"{name} {unit}".strip(), title=name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache/training/songs"))
    parser.add_argument("--out", type=Path, default=Path(".cache/training/generate_notes"))
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(TrainingOptions(**vars(parser.parse_args())))
    trainer.run()


if __name__ == "__main__":
    main()
