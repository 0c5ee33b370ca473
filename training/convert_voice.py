"""recordings of speakers -> a so-vits-svc voice model: one command, resumable, on a CPU or CUDA.

    python -m training.convert_voice --speaker allison=FOLDER --speaker carlo=FOLDER \\
        --whisper MODEL.BIN --out FOLDER --steps 6000

The network is so-vits-svc-fork's SynthesizerTrn with its NSF decoder. It is trained by the losses
of VITS (mel, KL) without a discriminator, which a CPU cannot afford. Two things make up for it:
most of every batch is decoded from the prior (content and F0 alone, as in conversion) instead of
the posterior, so that the mel loss trains what will be used; and the decoder's F0 is 0 where the
singer is unvoiced, so that its excitation is noise there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.mel_filters import slaney_mel_filters
from export.so_vits import fork_module
from remix.vocal_frames import FRAME_SAMPLES, SAMPLE_RATE_HZ, expand_content
from training.voice_base import load_base
from training.voice_data import Stream, load_stream, split_recordings

SPECTRUM_FFT = 1024
MEL_RESOLUTIONS = ((320, 80, 40), (800, 200, 80), (1600, 400, 120))  # n_fft, hop, mels


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the result, besides the recordings."""

    steps: int = 6000
    batch: int = 8
    chunk_frames: int = 96  # seen by the encoders: 0.96 s
    slice_frames: int = 48  # of these, decoded
    learning_rate: float = 1.2e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 50
    mel_weight: float = 45.0  # as VITS
    kl_weight: float = 1.0
    prior_noise_scale: float = 0.35  # so-vits-svc-fork's default in conversion
    n_prior: int = 7  # of the batch, decoded from the prior
    speaker_weights: tuple[float, ...] = ()  # how often each is drawn; empty: alike
    copies: int = 5
    seed: int = 1
    judge_every: int = 250  # steps between two measurements on what is held out
    save_every: int = 100  # steps
    patience: int = 0  # measurements without a better one, after which it ends; 0: never
    network: Mapping[str, Any] = field(
        default_factory=lambda: {
            "inter_channels": 96,
            "hidden_channels": 96,
            "filter_channels": 256,
            "n_heads": 2,
            "n_layers": 3,
            "kernel_size": 3,
            "p_dropout": 0.1,
            # HiFi-GAN's cheapest generator, V3, with two stages: 2 kHz and 16 kHz
            "type_": "hifi-gan",
            "resblock": "2",
            "resblock_kernel_sizes": [3, 5, 7],
            "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
            "upsample_rates": [20, 8],
            "upsample_kernel_sizes": [40, 16],
            "upsample_initial_channel": 128,
            "gin_channels": 64,
            "ssl_dim": 384,
            "sampling_rate": SAMPLE_RATE_HZ,
            "spec_channels": SPECTRUM_FFT // 2 + 1,
            "segment_size": 64,
        }
    )


@dataclass(frozen=True)
class Batch:
    """One step's material: [B, F, N], [B, N], [B, N], [B, N * 160], [B, 1]."""

    content: Tensor
    f0_hz: Tensor
    voiced: Tensor
    samples: Tensor
    speaker: Tensor


def draw_batch(
    streams: Sequence[Stream], options: TrainingOptions, rng: np.random.Generator
) -> Batch:
    """Random chunks of random speakers; nine of ten are voiced for at least a quarter."""
    n_frames = options.chunk_frames
    weights = np.array(options.speaker_weights or [1.0] * len(streams))
    rows = []
    for speaker in rng.choice(len(streams), options.batch, p=weights / weights.sum()):
        stream = streams[speaker]
        for _ in range(8):
            first = int(rng.integers(0, stream.n_frames - n_frames))
            span = slice(first, first + n_frames)
            if stream.voiced[span].mean() > 0.25 or rng.random() < 0.1:
                break
        copy = int(rng.integers(len(stream.content)))
        rows.append(
            (
                expand_content(stream.content[copy], first, n_frames, stream.speeds[copy]).T,
                stream.f0_hz[span],
                stream.voiced[span],
                stream.samples[first * FRAME_SAMPLES : (first + n_frames) * FRAME_SAMPLES],
                np.array([speaker]),
            )
        )
    content, f0_hz, voiced, samples, speakers = (
        torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
    )
    return Batch(content, f0_hz, voiced.float(), samples, speakers)


def spectrum(samples: Tensor, n_fft: int, hop: int) -> Tensor:
    """Magnitudes [B, n_fft / 2 + 1, T / hop]; frames centred as so-vits-svc-fork's."""
    margin = (n_fft - hop) // 2
    padded = F.pad(samples[:, None], (margin, margin), mode="reflect")[:, 0]
    window = torch.hann_window(n_fft, device=samples.device)
    complex_bins = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True)
    return (complex_bins.real**2 + complex_bins.imag**2 + 1e-9).sqrt()


class MelLoss(nn.Module):
    """Mean absolute difference of log-mel spectrograms, over three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        for n_fft, _, n_mels in MEL_RESOLUTIONS:
            filters = slaney_mel_filters(SAMPLE_RATE_HZ, n_fft, n_mels, 0.0, SAMPLE_RATE_HZ / 2)
            self.register_buffer(f"filters_{n_fft}", filters)

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """ours, theirs: [B, T] -> scalar."""
        total = ours.new_zeros(())
        for n_fft, hop, _ in MEL_RESOLUTIONS:
            filters = self.get_buffer(f"filters_{n_fft}")
            a, b = (
                (filters @ spectrum(samples, n_fft, hop)).clamp(min=1e-5).log()
                for samples in (ours, theirs)
            )
            total = total + (a - b).abs().mean()
        return total / len(MEL_RESOLUTIONS)


class VoiceTrainer(nn.Module):
    """SynthesizerTrn with the two decoding paths of training."""

    content_mean: Tensor
    content_scale: Tensor

    def __init__(self, options: TrainingOptions, n_speakers: int) -> None:
        super().__init__()
        self.options = options
        synthesizer = fork_module("modules.synthesizers").SynthesizerTrn
        self.net = synthesizer(n_speakers=n_speakers, **options.network)
        self.coarse = fork_module("f0").f0_to_coarse
        self.kl = fork_module("modules.losses").kl_loss
        self.mel_loss = MelLoss()
        prepare_decoder(self.net.dec)
        channels = options.network["ssl_dim"]
        self.register_buffer("content_mean", torch.zeros(channels, 1))
        self.register_buffer("content_scale", torch.ones(channels, 1))

    def standardise(self, stream: Stream) -> None:
        """Learns how to shift and scale content: some channels are 20 times as loud as others."""
        some = torch.from_numpy(stream.content[0][:20000].astype(np.float32))
        self.content_mean.copy_(some.mean(0)[:, None])
        self.content_scale.copy_(some.std(0)[:, None])

    def prior(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, mean and log deviation of the latent, from content and F0 alone."""
        content = (batch.content - self.content_mean) / self.content_scale
        content = self.net.pre(content) * mask
        voicing = self.net.emb_uv(batch.voiced.long()).transpose(1, 2)
        pitch = self.coarse(batch.f0_hz * batch.voiced)
        scale = self.options.prior_noise_scale
        z, mean, log_scale, _ = self.net.enc_p(content + voicing, mask, f0=pitch, noice_scale=scale)
        return z, mean, log_scale

    def losses(self, batch: Batch, start: int, n_prior: int) -> tuple[Tensor, Tensor]:
        """Mel loss of the decoded slices, KL of the chunks that are decoded from the posterior.

        Args:
            batch: B chunks of N frames.
            start: first frame of the slice that is decoded.
            n_prior: the first n_prior of the batch are decoded from the prior.
        """
        n_frames = batch.f0_hz.shape[1]
        mask = torch.ones_like(batch.f0_hz)[:, None]
        span = slice(start, start + self.options.slice_frames)
        voice = self.net.emb_g(batch.speaker).transpose(1, 2)

        z_prior, mean, log_scale = self.prior(batch, mask)
        magnitudes = spectrum(batch.samples[n_prior:], SPECTRUM_FFT, FRAME_SAMPLES)
        rest, rest_voice = mask[n_prior:], voice[n_prior:]
        lengths = torch.full((len(rest),), n_frames, device=mask.device)
        z, _, log_scale_q, _ = self.net.enc_q(magnitudes, lengths, g=rest_voice)
        z_p = self.net.flow(z, rest, g=rest_voice)
        kl = self.kl(z_p, log_scale_q, mean[n_prior:], log_scale[n_prior:], rest)

        from_prior = self.net.flow(
            z_prior[:n_prior], mask[:n_prior], g=voice[:n_prior], reverse=True
        )
        latent = torch.cat([from_prior, z])[:, :, span]
        excited_hz = (batch.f0_hz * batch.voiced)[:, span]
        decoded = self.net.dec(latent, g=voice, f0=excited_hz)[:, 0].float()
        target = batch.samples[:, start * FRAME_SAMPLES : span.stop * FRAME_SAMPLES]
        with torch.autocast(decoded.device.type, enabled=False):
            return self.mel_loss(decoded, target), kl


def train(
    streams: Sequence[Stream],
    held_out: Sequence[Stream],
    names: Sequence[str],
    options: TrainingOptions,
    out: Path,
    base: Path | None = None,
) -> None:
    """Trains until `options.steps`, or until what is held out gets no better.

    It goes on from the last checkpoint in `out` if there is one; else it begins with the weights of
    `base`, or with none. With `options.patience`, the best network is kept, else the last.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    trainer = VoiceTrainer(options, len(names)).to(device)
    if base is None:
        trainer.standardise(streams[0])
    else:
        load_base(trainer, base)
    used = [p for name, p in trainer.net.named_parameters() if not name.startswith("f0_decoder")]
    optimizer = torch.optim.AdamW(used, options.learning_rate, betas=(0.8, 0.99), eps=1e-9)
    curves: list[dict[str, float]] = []
    step, best, network = 0, Best(), fold_standardisation(trainer)
    checkpoint_path = out / "checkpoint.pt"
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, weights_only=True, map_location=device)
        trainer.load_state_dict(checkpoint["trainer"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        curves, step = checkpoint["curves"], checkpoint["step"]
        best, network = Best(**checkpoint.get("best", {})), checkpoint["network"]
        print(f"resumed at step {step}", flush=True)
    description = {"speakers": list(names), "options": asdict(options)}
    (out / "model.json").write_text(json.dumps(description, indent=2))

    sums, counted, since = np.zeros(2), 0, time.monotonic()
    while step < options.steps and not best.is_long_ago(step, options):
        rng = np.random.default_rng((options.seed, step))  # a resumed run draws the same batches
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        trainer.train()
        batch = draw_batch(streams, options, rng)
        batch = Batch(**{key: value.to(device) for key, value in vars(batch).items()})
        start = int(rng.integers(0, options.chunk_frames - options.slice_frames + 1))
        with torch.autocast(device, torch.bfloat16):
            mel, kl = trainer.losses(batch, start, options.n_prior)
        optimizer.zero_grad()
        loss = options.mel_weight * mel + options.kl_weight * kl
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(used, 100.0)
        optimizer.step()
        step += 1
        sums, counted = sums + (float(mel.detach()), float(kl.detach())), counted + 1

        if step % 50 == 0 or step % options.judge_every == 0:
            mel_mean, kl_mean = sums / counted
            point = {"step": float(step), "mel": mel_mean, "kl": kl_mean}
            point["total"] = options.mel_weight * mel_mean + options.kl_weight * kl_mean
            if step % options.judge_every == 0:
                point["held_out_mel"] = held_out_mel(trainer, held_out, options, device)
                if options.patience and point["held_out_mel"] < best.held_out_mel:
                    best = Best(step, round(point["held_out_mel"], 5))
                    network = {k: v.clone() for k, v in fold_standardisation(trainer).items()}
            seconds = (time.monotonic() - since) / counted
            curves.append({key: round(float(value), 5) for key, value in point.items()})
            print(f"{curves[-1]} {seconds:.2f} s/step", flush=True)
            sums, counted, since = np.zeros(2), 0, time.monotonic()
        if step % options.save_every == 0 or step == options.steps:
            if not best.step:
                network = fold_standardisation(trainer)
            state = {
                "network": network,
                "best": asdict(best),
                "trainer": trainer.state_dict(),
                "optimizer": optimizer.state_dict(),
                "curves": curves,
                "step": step,
            }
            torch.save(state, checkpoint_path.with_suffix(".new"))
            checkpoint_path.with_suffix(".new").replace(checkpoint_path)
            plot_curves(curves, out / "curves.png")


@dataclass(frozen=True)
class Best:
    """When what is held out sounded best, and its mel loss then; step 0: not measured yet."""

    step: int = 0
    held_out_mel: float = math.inf

    def is_long_ago(self, step: int, options: TrainingOptions) -> bool:
        """Whether it is time to stop."""
        return bool(self.step and step - self.step >= options.patience * options.judge_every)


def prepare_decoder(decoder: Any) -> None:
    """Starts the decoder where excitation and content are equally loud.

    Its own start has weights of 0.01: content reaches the last stage at 0.2 % of the excitation,
    the excitation may lack its fundamental, and for a thousand steps the decoder hums at the
    frame rate instead of the pitch. Here the excitation has all harmonics, and upsampling
    interpolates between frames.
    """
    with torch.no_grad():
        decoder.m_source.l_linear.weight.fill_(5.0)
        decoder.m_source.l_linear.bias.zero_()
        for up in decoder.ups:
            n_in, n_out, kernel = up.weight_v.shape
            triangle = 1.0 - torch.linspace(-1.0, 1.0, kernel + 2)[1:-1].abs()
            up.weight_v.copy_(torch.randn(n_in, n_out, 1) * n_in**-0.5 * triangle)
            up.weight_g.copy_(up.weight_v.norm(dim=(1, 2), keepdim=True))
        for block in decoder.resblocks:
            for conv in block.convs:
                _start_conv(conv, 0.5)
        _start_conv(decoder.conv_post, 0.3)


def _start_conv(conv: Any, gain: float) -> None:
    fan_in = conv.weight_v.shape[1] * conv.weight_v.shape[2]
    conv.weight_v.normal_(0.0, gain * fan_in**-0.5)
    conv.weight_g.copy_(conv.weight_v.norm(dim=(1, 2), keepdim=True))


def fold_standardisation(trainer: VoiceTrainer) -> dict[str, Tensor]:
    """The network's state for content as the encoder makes it."""
    state: dict[str, Tensor] = trainer.net.state_dict()
    weight = state["pre.weight"] / trainer.content_scale
    bias = state["pre.bias"] - (weight * trainer.content_mean).sum(dim=(1, 2))
    return {**state, "pre.weight": weight, "pre.bias": bias}


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then half a cosine."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    fade = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return options.final_learning_rate + fade * (
        options.learning_rate - options.final_learning_rate
    )


@torch.no_grad()
def held_out_mel(
    trainer: VoiceTrainer, held_out: Sequence[Stream], options: TrainingOptions, device: str
) -> float:
    """Mel loss of the same chunks every time, of recordings that are never trained on."""
    trainer.eval()
    total = 0.0
    for index in range(4):
        batch = draw_batch(held_out, options, np.random.default_rng(index))
        batch = Batch(**{key: value.to(device) for key, value in vars(batch).items()})
        torch.manual_seed(index)
        mel, _ = trainer.losses(batch, 32, options.batch - 1)
        total += float(mel)
    return total / 4


def plot_curves(curves: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3))
    for axis, keys in zip(axes, (("mel", "held_out_mel"), ("kl",), ("total",)), strict=True):
        for key in keys:
            points = [(curve["step"], curve[key]) for curve in curves if key in curve]
            if points:
                axis.plot(*zip(*points, strict=True), label=key)
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speaker", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--whisper", type=Path, required=True, help="the package's model.bin")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TrainingOptions.steps)
    parser.add_argument("--weights", type=float, nargs="*", default=[], help="of the speakers")
    parser.add_argument("--threads", type=int, default=0, help="0: torch decides")
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    options = TrainingOptions(steps=parsed.steps, speaker_weights=tuple(parsed.weights))
    names, streams, held_out = [], [], []
    for speaker in parsed.speaker:
        name, _, folder = speaker.partition("=")
        training_files, held_out_files = split_recordings(Path(folder))
        print(f"{name}: {len(training_files)} recordings, {len(held_out_files)} held out")
        cache = parsed.out / "data" / name
        names.append(name)
        streams.append(load_stream(training_files, cache, parsed.whisper, options.copies))
        held_out.append(load_stream(held_out_files, cache / "held_out", parsed.whisper, 1))
    train(streams, held_out, names, options, parsed.out)


if __name__ == "__main__":
    main()
