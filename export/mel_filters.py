"""samples -> power spectra, and the mel filters over them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def power_spectrum(samples: Tensor, n_fft: int, hop_samples: int) -> Tensor:
    """Squared magnitudes of Hann-windowed frames; exported as ONNX's STFT, without a table.

    Args:
        samples: [B, T].
        n_fft: of a frame, samples.
        hop_samples: from frame to frame.

    Returns:
        [B, n_fft / 2 + 1, (T - n_fft) / hop_samples + 1].
    """
    real_and_imaginary = torch.stft(
        samples,
        n_fft,
        hop_samples,
        window=torch.hann_window(n_fft),
        center=False,
        return_complex=False,  # the exporter knows no complex numbers
    )
    return real_and_imaginary.square().sum(3)


def slaney_mel_filters(
    sample_rate_hz: int, n_fft: int, n_mels: int, low_hz: float, high_hz: float
) -> Tensor:
    """Triangular filters on Slaney's mel scale, each of equal area.

    Returns:
        [n_mels, n_fft / 2 + 1], float32.

    Source: librosa 0.10 `filters.mel(htk=False, norm="slaney")`.
    """
    edges_hz = mel_to_hz(np.linspace(hz_to_mel(low_hz), hz_to_mel(high_hz), n_mels + 2))
    edges = torch.tensor(edges_hz.astype(np.float32))
    bins = torch.arange(n_fft // 2 + 1).to(torch.float32) * (sample_rate_hz / n_fft)
    ramps = edges[:, None] - bins[None, :]
    widths = (edges[1:] - edges[:-1])[:, None]
    rising = -ramps[:-2] / widths[:-1]
    falling = ramps[2:] / widths[1:]
    area = 2.0 / (edges[2:] - edges[:-2])
    return torch.minimum(rising, falling).clamp(min=0.0) * area[:, None]


def hz_to_mel(frequency_hz: float) -> float:
    """Slaney's mel: linear, 3 mel per 200 Hz, to 1 kHz; then 27 mel per factor 6.4."""
    if frequency_hz < 1000.0:
        return frequency_hz * 3.0 / 200.0
    return 15.0 + math.log(frequency_hz / 1000.0) * 27.0 / math.log(6.4)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Inverse of hz_to_mel."""
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))
