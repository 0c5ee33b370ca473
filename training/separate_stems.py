"""songs with separate stems -> a small Hybrid Transformer Demucs of four stems.

One command, resumable, on CPU or CUDA; any folder in MUSDB's layout (training/stem_data.py):

    python -m training.separate_stems --data .cache/training/stems --minutes 600

The same command continues an interrupted run from its last checkpoint, which is a minute old at
most. `--minutes` is the whole budget, at whose end the learning rate is 0; `--leave-after 9` ends
one call early, with a checkpoint, where commands have a limit. `OUT/model.th` is what it has come
to: the moving average, in fp16, as demucs writes it. `python -m export` reads that, and another
run can begin with it (`--begin-with`), on a machine that does not have the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from demucs.htdemucs import HTDemucs
from torch import Tensor

from training.stem_data import (
    SAMPLE_RATE_HZ,
    STEMS,
    Augmentation,
    Examples,
    Track,
    batches,
    example,
    find_tracks,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORK: Mapping[str, Any] = {
    "sources": list(STEMS),
    "channels": 32,
    "t_layers": 3,
    "t_hidden_scale": 2.0,
    "dconv_mode": 3,
    "segment": Fraction(39, 5),
}
"""The published HTDemucs, smaller: 7,477,048 parameters, 15.0 MB in fp16."""

SMOKE_NETWORK: Mapping[str, Any] = {
    **NETWORK,
    "channels": 8,
    "t_layers": 1,
    "t_heads": 2,
}
"""A network that learns something on a CPU within minutes, and not much."""

NETWORKS = {"small": NETWORK, "smoke": SMOKE_NETWORK}

SPECTRUM_FFTS = (4096, 1024, 256)
"""Samples; the hop is a quarter. Source: the multi-resolution loss of BS-RoFormer (Lu et al. 2023,
section 2.4: mean absolute difference of complex spectra), with three of its five windows."""

SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class TrainingOptions:
    """What a run is made of.

    Args:
        minutes: time budget, pauses not counted; the learning rate falls to 0 at its end.
        leave_after: minutes after which this call ends, with a checkpoint.
        segment_s: length of an example; the network is served 7.8 s.
        learning_rate: as demucs' (Adam, 3e-4), times two for the shorter run.
        decay: the last part of the budget, in which the learning rate falls linearly.
        averaging: of the exponential moving average of the weights, a step.
    """

    data: Path
    out: Path
    minutes: float = 600.0
    steps: int = 1_000_000
    leave_after: float = float("inf")
    batch: int = 32
    segment_s: float = 6.0
    learning_rate: float = 6e-4
    warmup_steps: int = 200
    decay: float = 0.4
    averaging: float = 0.999
    spectra_weight: float = 0.5
    seed: int = 1
    threads: int = 1
    workers: int = 0
    evaluate_every: int = 250
    evaluation_songs: int = 16
    device: str = "cpu"
    autocast: bool = False
    begin_with: Path | None = None
    network: Mapping[str, Any] = field(default_factory=lambda: NETWORK)
    augmentation: Augmentation = field(default_factory=Augmentation)


def spectra_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of complex spectra, over three resolutions.

    Args:
        estimate: [..., T].
        target: of the same shape.
    """
    total = estimate.new_zeros(())
    difference = (estimate - target).flatten(0, -2)  # the transform is linear
    for n_fft in SPECTRUM_FFTS:
        window = torch.hann_window(n_fft, device=estimate.device)
        spectra = torch.stft(
            difference, n_fft, n_fft // 4, window=window, normalized=True, return_complex=True
        )
        total = total + torch.view_as_real(spectra).abs().mean()
    return total / len(SPECTRUM_FFTS)


def sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """[B, S]: 10 log10 of the target's energy by the error's, of [B, S, C, T].

    Source: the `utility SDR` of the Sound Demixing Challenge (Fabbro et al. 2023), section 3.
    """
    energy = target.square().sum((2, 3))
    error = (target - estimate).square().sum((2, 3))
    return 10 * torch.log10((energy + 1e-7) / (error + 1e-7))


class Trainer:
    """A run: network, moving average, optimiser, log and checkpoint."""

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.device = torch.device(options.device)
        self.model = HTDemucs(**options.network).to(self.device)
        self.average = HTDemucs(**options.network).to(self.device).eval()
        if options.begin_with:
            self.model.load_state_dict(read_weights(options.begin_with, options.network))
        self.average.load_state_dict(self.model.state_dict())
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=0.0
        )
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        options.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()
        self.tracks, held_out = find_tracks(options.data)
        self.held_out = held_out[: options.evaluation_songs]
        if not self.tracks or not self.held_out:
            raise SystemExit(
                f"{options.data} has {len(self.tracks)} songs to train on and {len(held_out)} held "
                "out; at least 1 of each is needed (training/stem_songs.py makes some)."
            )

    @property
    def n_samples(self) -> int:
        """Length of an example."""
        return round(self.options.segment_s * SAMPLE_RATE_HZ)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        _require_same(self.checkpoint, state["network"], self.options.network)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def save(self) -> None:
        """Writes checkpoint, then model, each whole or not at all."""
        state = {
            "network": _as_text(self.options.network),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        average = {name: value.half().cpu() for name, value in self.average.state_dict().items()}
        package = {
            "klass": HTDemucs,
            "args": (),
            "kwargs": dict(self.options.network),
            "state": average,
        }
        for content, path in ((state, self.checkpoint), (package, self.options.out / "model.th")):
            partial = path.with_suffix(".partial")
            torch.save(content, partial)
            partial.rename(path)

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, by steps or by time, whichever is further."""
        return max(self.step / self.options.steps, self.seconds / 60 / self.options.minutes)

    def learning_rate(self) -> float:
        """Warm-up, a plateau, and a linear fall to 0."""
        warm = min((self.step + 1) / self.options.warmup_steps, 1.0)
        fall = min((1.0 - self.progress) / self.options.decay, 1.0)
        return self.options.learning_rate * warm * max(fall, 0.0)

    def _loss(self, model: HTDemucs, mixture: Tensor, stems: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the estimate."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
            estimate = model(mixture)
        estimate = estimate.float()
        waves = (estimate - stems).abs().mean()
        return waves + self.options.spectra_weight * spectra_loss(estimate, stems), estimate

    def train_step(self, mixture: Tensor, stems: Tensor) -> float:
        """One update; returns its loss."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate()
        loss, _ = self._loss(
            self.model,
            mixture.to(self.device, non_blocking=True),
            stems.to(self.device, non_blocking=True),
        )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimiser.step()
        self.step += 1
        share = 1 - min(self.options.averaging, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, share)
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and SDR of the moving average, always on the same excerpts of held-out songs."""
        self.average.segment = Fraction(self.n_samples, SAMPLE_RATE_HZ)
        losses, ratios = [], []
        for index, track in enumerate(self.held_out):
            mixture, stems = _excerpt(track, self.n_samples, index)
            loss, estimate = self._loss(
                self.average, mixture.to(self.device), stems.to(self.device)
            )
            ratio = sdr_db(estimate.cpu(), stems)[0]
            ratio[stems[0].square().mean((1, 2)) < 1e-4] = float("nan")  # nothing to be heard
            losses.append(float(loss))
            ratios.append(ratio.numpy())
        means = np.nanmedian(np.array(ratios), axis=0).tolist()
        return {
            "held_out_loss": round(float(np.mean(losses)), 5),
            **{f"sdr_{stem}": round(mean, 3) for stem, mean in zip(STEMS, means, strict=True)},
        }

    def run(self) -> None:
        """Trains until the budget is spent, or until this call has to leave."""
        call_begin = saved_at = time.monotonic()
        if self.progress >= 1:
            return
        if not self.log:
            self._note([])
        recent: list[float] = []
        options = self.options
        examples = Examples(self.tracks, self.n_samples, options.augmentation, options.seed)
        is_cuda = self.device.type == "cuda"
        loader = batches(examples, self.step, options.batch, options.workers, is_cuda)
        begin = time.monotonic() - self.seconds
        for mixture, stems in loader:
            recent.append(self.train_step(mixture, stems))
            now = time.monotonic()
            self.seconds = now - begin
            is_over = self.progress >= 1 or now - call_begin > 60 * options.leave_after
            if self.step % options.evaluate_every == 0 or is_over:
                self._note(recent)
                recent.clear()
                saved_at = now
            elif now - saved_at > SAVE_EVERY_S:
                self.save()
                saved_at = now
            if is_over:
                return

    def _note(self, recent: Sequence[float]) -> None:
        row = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "songs": len(self.tracks),
            **({"loss": round(float(np.mean(recent)), 5)} if recent else {}),
            **self.evaluate(),
        }
        self.log.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        plot(self.log, self.options.out / "curve.png")


def _excerpt(track: Track, n_samples: int, index: int) -> tuple[Tensor, Tensor]:
    """[1, 2, T] and [1, 4, 2, T] of a held-out song, the same every time."""
    pair = example([track], n_samples, None, np.random.default_rng((10**6, index)))
    return torch.from_numpy(pair[0])[None], torch.from_numpy(pair[1])[None]


def read_weights(path: Path, network: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays of a `model.th` of the same network."""
    with torch.serialization.safe_globals([HTDemucs, Fraction]):
        package = torch.load(path, map_location="cpu", weights_only=True)
    _require_same(path, _as_text(package["kwargs"]), network)
    return {name: value.float() for name, value in package["state"].items()}


def _require_same(path: Path, found: str, network: Mapping[str, Any]) -> None:
    if found != (wanted := _as_text(network)):
        raise SystemExit(
            f"{path} holds the network {found}, this run trains {wanted}: give its --network, or "
            "another --out."
        )


def _as_text(network: Mapping[str, Any]) -> str:
    return json.dumps({key: str(value) for key, value in sorted(network.items())})


def plot(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and SDR over the steps, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("loss", "held_out_loss"):
        rows = [row for row in log if name in row]
        axes[0].plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    for stem in STEMS:
        axes[1].plot([row["step"] for row in log], [row[f"sdr_{stem}"] for row in log], label=stem)
    for axis, title in zip(axes, ("loss", "median SDR of held-out songs (dB)"), strict=True):
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where `--must-fall` was asked for and the held-out loss did not."""
    is_cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(".cache/training/stems"))
    parser.add_argument("--out", type=Path, default=Path(".cache/training/separate_stems"))
    parser.add_argument("--network", choices=list(NETWORKS), default="small")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--leave-after", type=float, default=float("inf"), metavar="MINUTES")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=32 if is_cuda else 2)
    parser.add_argument("--segment-s", type=float, default=6.0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--averaging", type=float, default=0.999)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(cores - 2, 1) if is_cuda else 0)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--evaluation-songs", type=int, default=16)
    parser.add_argument("--begin-with", type=Path, help="a model.th of the same network")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if is_cuda else "cpu")
    parser.add_argument("--autocast", action="store_true", default=is_cuda, help="bfloat16")
    parser.add_argument("--must-fall", action="store_true", help="exit 1 if the loss did not")
    settings = vars(parser.parse_args(arguments))
    must_fall = settings.pop("must_fall")
    trainer = Trainer(TrainingOptions(**{**settings, "network": NETWORKS[settings["network"]]}))
    trainer.run()
    first, last = trainer.log[0]["held_out_loss"], trainer.log[-1]["held_out_loss"]
    print(
        f"held-out loss {first} -> {last} in {trainer.step} steps, {trainer.seconds / 60:.1f} min"
    )
    if must_fall and not last < first:
        print("FAILED: the loss did not fall.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
