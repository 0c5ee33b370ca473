"""samples <-> spectra: the short-time Fourier transform and its inverse, in numpy.

Frame n begins at sample `n hop - lead`; what it takes from before or after the samples is made
by padding. The window is the periodic Hann window, w[i] = sin^2(pi i / size).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from remix.overlap_add import overlap_add

Spectra = NDArray[np.complex64]
"""[..., N, F] complex64: N frames of F = size / 2 + 1 bins, not scaled."""

SMALLEST_WINDOW_POWER = 1e-8
"""Where the summed squares of the windows are below this, nothing was seen, and 0 comes back."""


@dataclass(frozen=True)
class Framing:
    """How samples are cut into frames.

    Args:
        size_samples: of a frame, even.
        hop_samples: from one frame to the next.
        lead_samples: how far frame 0 begins before sample 0.
        padding: what stands before the first and after the last sample.
        silent_frames: frames of silence that the inverse takes to stand on each side of the
            given ones; with size / hop - 1 of them the edges fade, without any they are exact.
    """

    size_samples: int
    hop_samples: int
    lead_samples: int
    padding: Literal["reflect", "constant"] = "reflect"
    silent_frames: int = 0

    def frame_count(self, n_samples: int) -> int:
        """N = ceil(T / hop)."""
        return -(-n_samples // self.hop_samples)


def stft(samples: NDArray[np.float32], framing: Framing) -> Spectra:
    """Spectra of overlapping, windowed frames.

    Args:
        samples: [..., T], float32.
        framing: how they are cut.

    Returns:
        [..., N, F], N = ceil(T / hop), F = size / 2 + 1.

    >>> stft(np.zeros((2, 4096), np.float32), Framing(1024, 256, 384)).shape
    (2, 16, 513)
    """
    n_samples = samples.shape[-1]
    size, hop = framing.size_samples, framing.hop_samples
    n_frames = framing.frame_count(n_samples)
    tail = (n_frames - 1) * hop - framing.lead_samples + size - n_samples
    sides = [(0, 0)] * (samples.ndim - 1) + [(framing.lead_samples, max(0, tail))]
    padded = np.pad(samples, sides, mode=framing.padding)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size, axis=-1)[..., ::hop, :]
    spectra: Spectra = fft.rfft(frames[..., :n_frames, :] * _hann(size), axis=-1)
    return spectra


def istft(spectra: Spectra, framing: Framing, n_samples: int) -> NDArray[np.float32]:
    """Samples whose spectra are nearest to the given ones.

    The frames are windowed again, added where they belong, and divided by the summed squares of
    the windows: the least-squares inverse (Griffin and Lim 1984, equation 6). It undoes `stft`.

    Args:
        spectra: [..., N, F].
        framing: how `stft` cut them.
        n_samples: T.

    Returns:
        [..., T], float32.

    >>> framing, noise = Framing(64, 16, 24), np.random.default_rng(0).standard_normal(100, "f4")
    >>> bool(np.allclose(istft(stft(noise, framing), framing, 100), noise, atol=1e-5))
    True
    """
    size, lead = framing.size_samples, framing.lead_samples
    frames = fft.irfft(spectra, n=size, axis=-1)
    frames *= _hann(size)
    summed = overlap_add(frames, framing.hop_samples)[..., lead : lead + n_samples]
    summed *= _inverse_window_power(framing, spectra.shape[-2], n_samples)
    return summed


@lru_cache(maxsize=8)
def _hann(size: int) -> NDArray[np.float32]:
    return np.asarray(np.sin(np.pi * np.arange(size) / size) ** 2, np.float32)


@lru_cache(maxsize=8)
def _inverse_window_power(framing: Framing, n_frames: int, n_samples: int) -> NDArray[np.float32]:
    squares = _hann(framing.size_samples).astype(np.float64) ** 2
    all_frames = np.broadcast_to(squares, (n_frames + 2 * framing.silent_frames, len(squares)))
    start = framing.lead_samples + framing.silent_frames * framing.hop_samples
    power = overlap_add(all_frames, framing.hop_samples)[start : start + n_samples]
    safe = np.maximum(power, SMALLEST_WINDOW_POWER)
    return np.asarray(np.where(power < SMALLEST_WINDOW_POWER, 0.0, 1.0 / safe), np.float32)
