"""band songs -> generator: trains the transformer that writes bars under given chords.

One command, resumable, on CPU or CUDA; songs are made first, by MMA or out of a folder of MIDI
files:

    python -m training.generate_notes --minutes 84 --threads 1
    python -m training.generate_notes --midi FOLDER --steps 4000

The same command continues an interrupted run from its last checkpoint. Every batch is drawn from
(seed, step) and nothing else is random, so a resumed run sees what the uninterrupted one would have
seen; where the budget is `--steps`, not the clock, it ends with the same weights. It ends with 1
where the loss did not fall.
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
import torch
import torch.nn.functional as F
from torch import Tensor

from export.band_transformer import BandTransformer, ModelSize
from remix.errors import InvalidNotes, InvalidOption
from remix.note_tokens import (
    BAR,
    BAR_TOKENS,
    DRUMS,
    HIGHEST,
    LOWEST,
    ROLES,
    STEPS_PER_BEAT,
    TEMPO_EDGES_BPM,
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
from training.band_songs import FILE_SONGS, Song, find_mma, load_songs, make_songs
from training.midi_songs import make_midi_songs, report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IGNORE = -100
HELD_OUT_FAMILIES = 12  # one groove file, or one piece, in 12 is never trained on


@dataclass(frozen=True)
class TrainingOptions:
    """What a run is made of; the defaults made the starter model.

    Args:
        minutes: time budget, pauses not counted; the learning rate falls to 0 at its end.
        decay: the last part of the budget, in which the learning rate falls linearly.
    """

    data: Path
    out: Path
    minutes: float = 84.0
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
        swing: whether straight quavers are swung, and swung ones made straight.
        louder: velocity levels up or down.
        faster: tempo classes up or down, a sixth or so of the tempo each.
        drummer: another song of the same meter, whose drums are heard instead.
    """

    transpose: int = 0
    tracks: int = 2 ** len(ROLES) - 1
    style_known: bool = True
    density_known: bool = True
    swing: bool = False
    louder: int = 0
    faster: int = 0
    drummer: Song | None = None


def draw_augmentation(song: Song, songs: Sequence[Song], rng: np.random.Generator) -> Augmentation:
    """Any key; often without some tracks; now and then another feel, tempo or drummer."""
    tracks = 2 ** len(ROLES) - 1
    if rng.random() < 0.4:
        tracks = int(rng.integers(1, 2 ** len(ROLES)))
    drummer = songs[int(rng.integers(len(songs)))]
    swapped = rng.random() < 0.2 and drummer.header[0] == song.header[0]
    swing = bool(rng.random() < 0.2)
    return Augmentation(
        transpose=int(rng.integers(-6, 6)),
        tracks=tracks,
        style_known=bool(rng.random() < 0.75) and not swing,
        density_known=bool(rng.random() < 0.75),
        swing=swing,
        louder=int(rng.integers(-1, 2)),
        faster=int(rng.choice((-1, 1))) if rng.random() < 0.3 else 0,
        drummer=drummer if swapped else None,
    )


def is_held_out(song: Song) -> bool:
    """Whether the song's groove file, or piece, belongs to the held-out part."""
    digest = hashlib.sha256(song.family.encode()).digest()
    return digest[0] % HELD_OUT_FAMILIES == 0


def _transposed_chord(chord: int, semitones: int) -> int:
    qualities, no_chord = 7, 84
    return chord if chord == no_chord else (chord + qualities * semitones) % no_chord


def song_bar(song: Song, index: int, augmentation: Augmentation) -> Bar:
    """Bar `index` of a song, on the token grid."""
    beats = song.header[0]
    notes: dict[tuple[int, int, int], int] = {}
    loudness: dict[int, list[int]] = {}
    feel = _swing_table(song) if augmentation.swing else None
    for track, onset, duration, pitch, velocity in _bar_rows(song, index, augmentation.drummer):
        if not augmentation.tracks >> track & 1:
            continue
        if track != DRUMS:
            pitch += augmentation.transpose
            pitch += 12 * ((pitch < LOWEST[track]) - (pitch > HIGHEST[track]))
        length = 1 if track == DRUMS else nearest_duration(duration)
        step = onset if feel is None else onset - onset % 12 + feel[onset % 12]
        key = (track, step, pitch)
        notes[key] = max(notes.get(key, 0), length)
        loudness.setdefault(track, []).append(velocity)
    grid = tuple(sorted(GridNote(t, o, length, p) for (t, o, p), length in notes.items()))
    onsets = len({(note.track, note.onset_steps) for note in grid})
    density = density_level(onsets, len(loudness), beats) if augmentation.density_known else 0
    first, second = song.chords[index].tolist()
    chords = (
        _transposed_chord(first, augmentation.transpose),
        _transposed_chord(second, augmentation.transpose),
    )
    conditions = BarConditions(chords, density, sum(1 << track for track in loudness))
    levels = {}
    for track, values in loudness.items():
        level = round(sum(values) / len(values)) * VELOCITY_LEVELS // 128 + augmentation.louder
        levels[track] = min(max(level, 0), VELOCITY_LEVELS - 1)
    return Bar(conditions, levels, grid)


def _bar_rows(song: Song, index: int, drummer: Song | None) -> list[list[int]]:
    """Notes of a bar, (track, onset in the bar, duration, pitch, velocity)."""
    steps = song.header[0] * STEPS_PER_BEAT
    rows = []
    for source in (song, drummer or song):
        bars, order = source.by_bar
        begin, end = np.searchsorted(bars, (index, index + 1))
        for track, onset, duration, pitch, velocity in source.notes[order[begin:end]].tolist():
            is_wanted = drummer is None or (track == DRUMS) == (source is drummer)
            if is_wanted:
                rows.append([track, onset - index * steps, duration, pitch, velocity])
        if drummer is None:
            break
    return rows


_SWUNG = [round(r * 4 / 3) if r < 6 else 8 + (r - 6) * 2 // 3 for r in range(STEPS_PER_BEAT)]
_STRAIGHT = [round(r * 3 / 4) if r < 8 else 6 + (r - 8) * 3 // 2 for r in range(STEPS_PER_BEAT)]


def _swing_table(song: Song) -> list[int]:
    """Where each twelfth of a beat goes: straight quavers to swung ones, or back."""
    places = np.bincount(song.notes[:, 1] % STEPS_PER_BEAT, minlength=STEPS_PER_BEAT)
    return _SWUNG if places[6] >= places[8] else _STRAIGHT


_NEAREST = [nearest_duration_steps(steps) for steps in range(1025)]


def nearest_duration(steps: int) -> int:
    """`nearest_duration_steps` from a table."""
    return _NEAREST[min(steps, 1024)]


def song_tokens(
    song: Song, first_bar: int, count: int, augmentation: Augmentation
) -> tuple[list[int], list[bool]]:
    """A header and bars from `first_bar` on, at most `count` tokens; and which are given."""
    beats, tempo, style = song.header
    tempo = min(max(tempo + augmentation.faster, 0), len(TEMPO_EDGES_BPM))
    tokens = encode_header(Header(beats, tempo, style if augmentation.style_known else 0))
    for index in range(first_bar, len(song.chords)):
        bar = encode_bar(song_bar(song, index, augmentation))
        if len(tokens) >= count or len(bar) >= BAR_TOKENS:
            break
        tokens += bar
    given = [token < TRACK_VELOCITY and token != BAR for token in tokens]
    return tokens[:count], given[:count]


def split_songs(data: Path) -> tuple[list[Song], list[Song]]:
    """The songs of a folder that are trained on, and those that are held out: at least one family.

    Raises:
        InvalidNotes: there are fewer than two families of songs.
    """
    songs = [song for path in sorted(data.glob("songs-????.npz")) for song in load_songs(path)]
    families = {song.family for song in songs}
    if len(families) < 2:
        raise InvalidNotes(
            f"{data} holds {len(families)} groove files or pieces; training needs two at least: "
            "one is held out."
        )
    held_out = {song.family for song in songs if is_held_out(song)} or {min(families)}
    if held_out == families:
        held_out.remove(min(families))
    kept = [song for song in songs if song.family not in held_out]
    return kept, [song for song in songs if song.family in held_out]


def _digest(songs: Sequence[Song]) -> str:
    found = hashlib.sha256()
    for song in songs:
        found.update(song.notes.tobytes() + song.chords.tobytes())
    return found.hexdigest()[:16]


def sequences(
    songs: Sequence[Song],
    count: int,
    context: int,
    rng: np.random.Generator,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [count, context] each; given tokens and padding are not targets.

    `plain` songs are taken as they were made.

    Raises:
        InvalidNotes: of 1,000 draws none held a quarter of the context in notes.
    """
    inputs = np.zeros((count, context), np.int64)
    targets = np.full((count, context), IGNORE, np.int64)
    row = misses = 0
    while row < count:
        song = songs[int(rng.integers(len(songs)))]
        first_bar = int(rng.integers(max(len(song.chords) - 8, 1)))
        augmentation = Augmentation() if plain else draw_augmentation(song, songs, rng)
        tokens, given = song_tokens(song, first_bar, context + 1, augmentation)
        if len(tokens) < context // 4:
            misses += 1
            if misses == 1_000:
                raise InvalidNotes(
                    f"In {len(songs)} songs there are no {context // 4} tokens in a row.",
                    remedy="Train on longer songs, or more of them.",
                )
            continue
        misses = 0
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
        self.songs, self.held_out = split_songs(options.data)
        self.identity = {
            "vocabulary": VOCABULARY_HASH,
            "seed": options.seed,
            "size": options.size.as_dict(),
            "songs": _digest([*self.songs, *self.held_out]),
        }
        if self.checkpoint.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise InvalidOption(
                    f"{self.checkpoint} was made with {name} {state.get(name)}, "
                    f"this run has {value}.",
                    remedy="Choose another --out, or remove the checkpoint.",
                )
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {
            **self.identity,
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
                self.held_out[:50], 4, self.options.size.context_tokens, rng, plain=True
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

    @property
    def loss_fell(self) -> bool:
        """Whether both losses ended below where the log begins."""
        first, last = self.log[0], self.log[-1]
        return all(last[name] < first[name] for name in ("loss", "held_out_loss"))

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
    parser.add_argument("--midi", type=Path, help="train on the MIDI files of this folder")
    parser.add_argument("--data", type=Path, help="of songs; made where it is empty")
    parser.add_argument("--mma", type=Path, help="folder of MMA's `lib` and `MMA`")
    parser.add_argument("--songs", type=int, default=1000, help="made by MMA, up to this many")
    parser.add_argument("--out", type=Path, help="gets checkpoint and curve")
    parser.add_argument("--minutes", type=float, default=84.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args())
    midi, mma, songs = (arguments.pop(name) for name in ("midi", "mma", "songs"))
    prefix = "midi-" if midi else ""
    data = arguments["data"] = arguments["data"] or Path(".cache/training", f"{prefix}songs")
    arguments["out"] = arguments["out"] or Path(".cache/training", f"{prefix}generate_notes")
    if midi:
        report(make_midi_songs(midi, data), data)
    elif len(list(data.glob("songs-????.npz"))) * FILE_SONGS < songs:
        make_songs(mma or find_mma(), data, songs)
    trainer = Trainer(TrainingOptions(**arguments))
    trainer.run()
    first, last = trainer.log[0], trainer.log[-1]
    print(
        f"{trainer.checkpoint}: {trainer.step} steps, loss {first['loss']} -> {last['loss']}, held "
        f"out {first['held_out_loss']} -> {last['held_out_loss']}"
    )
    if not trainer.loss_fell:
        raise SystemExit("The loss did not fall.")


if __name__ == "__main__":
    main()
