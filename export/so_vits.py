"""so-vits-svc-fork's SynthesizerTrn, imported from its own package, with its randomness as inputs.

The package's modules import, at the top, libraries that only its command line uses (torchaudio,
whose wheel wants CUDA, transformers, torchcrepe, librosa with numba). During the import they are
replaced by empty stand-ins: so `pip install --no-deps so-vits-svc-fork` suffices.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Imported by so-vits-svc-fork 4.2.30 at module level, unused by its networks.
UNUSED_LIBRARIES = (
    "cm_time",
    "joblib",
    "librosa",
    "requests",
    "rich",
    "torchaudio",
    "torchcrepe",
    "tqdm",
    "transformers",
)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules for the libraries that the networks do not use."""

    def __init__(self, libraries: Sequence[str]) -> None:
        self.libraries = libraries

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        library = name.split(".")[0]
        if library not in self.libraries:
            return None
        if library in sys.modules and not isinstance(sys.modules[library], _StandIn):
            return None  # somebody uses the real one, and its other modules are real too
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StandIn(ModuleType):
    """A module whose every public attribute is a placeholder class without behaviour."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Placeholder,), {})


class _Placeholder(logging.NullHandler):
    """A class that takes any arguments; a log handler, because the package makes one at import."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()


@contextlib.contextmanager
def stand_ins(libraries: Sequence[str]) -> Iterator[None]:
    """While open, the named libraries import as empty modules."""
    finder = _StandInFinder(libraries)
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]  # nobody else shall take a stand-in for the library


def fork_module(name: str) -> Any:
    """Imports `so_vits_svc_fork.<name>`."""
    with stand_ins(UNUSED_LIBRARIES):
        return importlib.import_module(f"so_vits_svc_fork.{name}")


class ServedVoice(nn.Module):
    """SynthesizerTrn.infer with everything random, and the excitation's phase, as inputs.

    That makes windows of one song agree where they overlap, and parity testable. Noise that the
    original adds to nine harmonics before it sums them is added to the sum: the same Gaussian.

    Source: so-vits-svc-fork 4.2.30, `SynthesizerTrn.infer`, `SineGen`, `SourceModuleHnNSF`.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.has_excitation = net.type_ == "hifi-gan"
        attentions = fork_module("modules.attentions")
        for module in net.enc_p.modules():
            if isinstance(module, attentions.MultiHeadAttention):
                # not as a submodule: those are looked up after the class's own methods
                object.__setattr__(module, "attention", RelativeAttention(module))
        rates = net.upsample_rates if self.has_excitation else [
            *net.upsample_rates, net.gen_istft_hop_size, net.subbands
        ]  # fmt: skip
        self.frame_samples = math.prod(rates)

    def forward(
        self,
        content: Tensor,
        f0_hz: Tensor,
        voiced: Tensor,
        speaker: Tensor,
        noise: Tensor,
        phase: Tensor | None = None,
        source_noise: Tensor | None = None,
    ) -> Tensor:
        """One batch of windows.

        Args:
            content: [B, N, F].
            f0_hz: [B, N]; what it is where the voice is unvoiced is up to the model's training.
            voiced: [B, N], 0 or 1.
            speaker: [B, 1], int64.
            noise: [B, N, inter_channels], Gaussian, of the deviation that is wanted (the
                original: 0.35 or 0.4).
            phase: [B, N, harmonics], cycles: the phase of each harmonic where a frame begins.
            source_noise: [B, N * frame_samples], Gaussian of deviation 1.

        Returns:
            [B, N * frame_samples].
        """
        net = self.net
        voice = net.emb_g(speaker).transpose(1, 2)
        mask = torch.ones_like(f0_hz)[:, None]
        x = net.pre(content.transpose(1, 2)) + net.emb_uv(voiced.long()).transpose(1, 2)
        x = x + net.enc_p.f0_emb(f0_to_coarse(f0_hz)).transpose(1, 2)
        x = net.enc_p.enc_(x, mask)
        mean, log_scale = net.enc_p.proj(x).split(net.inter_channels, dim=1)
        latent = mean + noise.transpose(1, 2) * log_scale.exp()
        latent = net.flow(latent, mask, g=voice, reverse=True)
        if phase is None or source_noise is None:
            return multistream_istft(net.dec, latent)[:, 0]
        excitation = self.excitation(f0_hz, phase, source_noise)
        return nsf_hifigan(net.dec, latent, excitation, voice)[:, 0]

    def excitation(self, f0_hz: Tensor, phase: Tensor, source_noise: Tensor) -> Tensor:
        """Sines at F0 and its harmonics where F0 > 0, noise elsewhere: [B, 1, T]."""
        source = self.net.dec.m_source
        sines = source.l_sin_gen
        harmonic = torch.arange(1, sines.dim + 1)
        step = f0_hz[:, :, None] * harmonic / sines.sampling_rate  # cycles a sample, [B, N, H]
        sample = torch.arange(1, self.frame_samples + 1)[:, None]
        cycles = phase[:, :, None] + step[:, :, None] * sample  # [B, N, frame_samples, H]
        is_voiced = (f0_hz > sines.voiced_threshold).to(torch.float32)[:, :, None]
        wave = torch.sin(cycles * (2.0 * math.pi)) * (sines.sine_amp * is_voiced)[..., None]
        weight = source.l_linear.weight
        loudness = is_voiced * sines.noise_std + (1.0 - is_voiced) * (sines.sine_amp / 3.0)
        noise = source_noise.reshape(-1, f0_hz.shape[1], self.frame_samples)
        noise = noise * loudness * weight.norm()
        merged = (wave * weight[0]).sum(3) + source.l_linear.bias + noise
        excitation: Tensor = merged.tanh().flatten(1)[:, None]
        return excitation


class RelativeAttention(nn.Module):
    """Self-attention with relative positions, at any length in an exported graph.

    The original pads its relative embeddings by Python integers, which a graph freezes; here
    the band of nearby positions is gathered.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.n_heads, self.reach = original.n_heads, original.window_size
        self.scale = float(original.k_channels) ** -0.5
        self.keys, self.values = original.emb_rel_k, original.emb_rel_v  # [1, 2 reach + 1, D]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query, key, value: [B, C, N] -> [B, C, N]; all positions count."""
        query, key, value = (
            x.reshape(x.shape[0], self.n_heads, -1, x.shape[2]).transpose(2, 3)
            for x in (query, key, value)
        )
        query = query * self.scale
        position = torch.arange(query.shape[2])
        distance = position[None, :] - position[:, None] + self.reach  # [N, N]
        is_near = (distance >= 0) & (distance <= 2 * self.reach)
        near = (query @ self.keys.transpose(1, 2)).gather(
            3, distance.clamp(0, 2 * self.reach).expand(query.shape[0], self.n_heads, -1, -1)
        )
        weights = (query @ key.transpose(2, 3) + near * is_near).softmax(dim=3)
        band = position[:, None] + torch.arange(2 * self.reach + 1)  # [N, 2 reach + 1]
        padded = F.pad(weights, (self.reach, self.reach))
        near_weights = padded.gather(3, band.expand(query.shape[0], self.n_heads, -1, -1))
        mixed = weights @ value + near_weights @ self.values
        return mixed.transpose(2, 3).flatten(1, 2), weights


def f0_to_coarse(f0_hz: Tensor) -> Tensor:
    """F0 in 255 steps of the mel scale from 50 to 1100 Hz; unvoiced (0 Hz) is 1.

    Source: so-vits-svc-fork 4.2.30, `f0.f0_to_coarse`.
    """
    low, high = (1127.0 * math.log(1.0 + limit_hz / 700.0) for limit_hz in (50.0, 1100.0))
    mel = 1127.0 * (1.0 + f0_hz / 700.0).log()
    return (((mel - low) * 254.0 / (high - low) + 1.0).clamp(1.0, 255.0) + 0.5).long()


def nsf_hifigan(decoder: Any, latent: Tensor, excitation: Tensor, voice: Tensor) -> Tensor:
    """NSFHifiGANGenerator.forward with a given excitation: [B, C, N] -> [B, 1, T]."""
    x = decoder.conv_pre(latent) + decoder.cond(voice)
    for index, up in enumerate(decoder.ups):
        x = up(F.leaky_relu(x, 0.1)) + decoder.noise_convs[index](excitation)
        x = _resblocks(decoder, index, x)
    wave: Tensor = decoder.conv_post(F.leaky_relu(x)).tanh()
    return wave


def multistream_istft(decoder: Any, latent: Tensor) -> Tensor:
    """Multistream_iSTFT_Generator.forward in real arithmetic: [B, C, N] -> [B, 1, T]."""
    x = decoder.conv_pre(latent)
    for index, up in enumerate(decoder.ups):
        x = _resblocks(decoder, index, up(F.leaky_relu(x, 0.1)))
    x = decoder.subband_conv_post(decoder.reflection_pad(F.leaky_relu(x)))
    n_fft, hop, streams = decoder.post_n_fft, decoder.gen_istft_hop_size, decoder.subbands
    bins = x.reshape(-1, n_fft + 2, x.shape[2])  # [B * streams, n_fft + 2, N]
    magnitude = bins[:, : n_fft // 2 + 1].exp()
    angle = math.pi * bins[:, n_fft // 2 + 1 :].sin()
    spectrum = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=1)
    wave = inverse_stft(spectrum, n_fft, hop)
    wave = wave.reshape(-1, streams, wave.shape[2])
    wave = F.conv_transpose1d(wave, decoder.updown_filter * streams, stride=streams)
    joined: Tensor = decoder.multistream_conv_post(wave)
    return joined


def inverse_stft(spectrum: Tensor, n_fft: int, hop: int) -> Tensor:
    """torch.istft with a Hann window and centred frames, as a transposed convolution.

    Args:
        spectrum: [B, n_fft + 2, N], real parts, then imaginary parts.
        n_fft: of a frame, samples.
        hop: from frame to frame, samples.

    Returns:
        [B, 1, hop * (N - 1)].
    """
    sample = torch.arange(n_fft)[None, :]
    frequency_bin = torch.arange(n_fft // 2 + 1)[:, None]
    angle = 2.0 * math.pi / n_fft * (sample * frequency_bin).remainder(n_fft).to(torch.float32)
    is_paired = (frequency_bin > 0) & (frequency_bin < n_fft // 2)  # stands for -f besides f
    scale = (1.0 + is_paired.to(torch.float32)) / n_fft
    hann = 0.5 - 0.5 * (2.0 * math.pi / n_fft * sample.to(torch.float32)).cos()
    basis = torch.cat([angle.cos() * scale, -angle.sin() * scale]) * hann
    summed = F.conv_transpose1d(spectrum, basis[:, None], stride=hop)
    envelope = F.conv_transpose1d(torch.ones_like(spectrum[:, :1]), (hann**2)[:, None], stride=hop)
    trim = slice(n_fft // 2, -(n_fft // 2))
    return summed[:, :, trim] / envelope[:, :, trim]


def _resblocks(decoder: Any, level: int, x: Tensor) -> Tensor:
    first, count = level * decoder.num_kernels, decoder.num_kernels
    total = decoder.resblocks[first](x)
    for block in decoder.resblocks[first + 1 : first + count]:
        total = total + block(x)
    mean: Tensor = total / count
    return mean


def fuse_weight_norms(module: nn.Module) -> None:
    """Replaces every weight norm by the weight that it makes."""
    for part in module.modules():
        for name in [
            hook.name for hook in part._forward_pre_hooks.values() if hasattr(hook, "name")
        ]:
            nn.utils.remove_weight_norm(part, name)
