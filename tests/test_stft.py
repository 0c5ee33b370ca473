"""The Fourier transform of frames: what physics and algebra say of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.stft import Framing, istft, stft

DEMUCS = Framing(4096, 1024, 1536, silent_frames=2)
SPLEETER = Framing(4096, 1024, 1536)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3000), st.sampled_from([(64, 16), (64, 32), (128, 32)]), st.integers(0, 2**32)
)
def test_istft_of_stft_is_the_signal(length: int, sizes: tuple[int, int], seed: int) -> None:
    size, hop = sizes
    framing = Framing(size, hop, (size - hop) // 2, "constant")
    samples = np.random.default_rng(seed).standard_normal((2, length), np.float32)
    back = istft(stft(samples, framing), framing, length)
    # float32 sums of a few terms around 1; the window's square sum is nowhere small.
    np.testing.assert_allclose(back, samples, atol=2e-5)


def test_istft_with_silent_frames_is_exact_where_no_silent_frame_reaches() -> None:
    samples = np.random.default_rng(0).standard_normal((2, 40_000), np.float32)
    back = istft(stft(samples, DEMUCS), DEMUCS, 40_000)
    inner = slice(1536, 40_000 - 1536 - 1024)
    np.testing.assert_allclose(back[:, inner], samples[:, inner], atol=2e-5)


def test_stft_of_tone_has_its_energy_in_the_tones_bin() -> None:
    at = np.arange(44_100)
    spectra = stft(np.cos(2 * np.pi * 100 / 4096 * at).astype(np.float32), SPLEETER)
    inner = np.abs(spectra[4:-4])
    assert (inner.argmax(axis=1) == 100).all()
    # A Hann window of 4096 samples sums to 2048; half of a cosine is at the positive frequency.
    np.testing.assert_allclose(inner[:, 100], 1024, rtol=1e-4)


@pytest.mark.parametrize("length", [1536 + 1, 343_980, 524_288])
def test_stft_has_a_frame_for_every_begun_hop(length: int) -> None:
    samples = np.zeros((1, 2, length), np.float32)
    assert stft(samples, DEMUCS).shape == (1, 2, -(-length // 1024), 2049)


def test_stft_stays_in_single_precision() -> None:
    spectra = stft(np.zeros((2, 8192), np.float32), DEMUCS)
    assert spectra.dtype == np.complex64
    assert istft(spectra, DEMUCS, 8192).dtype == np.float32
