"""Resampling and downmix: what physics says of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.errors import LimitExceeded
from remix.resample import StreamingResampler, resample, to_mono, to_stereo


def tone(frequency_hz: float, sample_rate_hz: int, duration_s: float = 0.5) -> np.ndarray:
    """[1, T] sine of amplitude 1."""
    at = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    return np.sin(2 * np.pi * frequency_hz * at, dtype=np.float64).astype(np.float32)[None]


RATES = [
    (44_100, 48_000),
    (48_000, 44_100),
    (44_100, 22_050),
    (44_100, 16_000),
    (8_000, 44_100),
    (192_000, 44_100),
    (44_100, 44_099),
]


@pytest.mark.parametrize(("old_hz", "new_hz"), RATES)
def test_resample_of_tone_is_the_tone_at_the_new_rate(old_hz: int, new_hz: int) -> None:
    frequency_hz = 0.3 * min(old_hz, new_hz) / 2
    got = resample(tone(frequency_hz, old_hz), old_hz, new_hz)
    expected = tone(frequency_hz, new_hz)[:, : got.shape[1]]
    inner = slice(got.shape[1] // 4, 3 * got.shape[1] // 4)
    # 80 dB of stop band and its ripple: 1e-4, and float32 sums.
    assert np.abs(got[:, inner] - expected[:, inner]).max() < 3e-4


@pytest.mark.parametrize(("old_hz", "new_hz"), RATES)
def test_resample_of_constant_stays_constant(old_hz: int, new_hz: int) -> None:
    got = resample(np.ones((1, old_hz // 4), np.float32), old_hz, new_hz)
    assert got.shape[1] == -(-(old_hz // 4) * new_hz // old_hz)
    inner = slice(got.shape[1] // 4, 3 * got.shape[1] // 4)
    assert np.abs(got[:, inner] - 1).max() < 2e-4  # the filter's ripple, 80 dB


def test_resample_kills_what_the_new_rate_cannot_hold() -> None:
    got = resample(tone(9_000, 44_100), 44_100, 16_000)
    assert np.abs(got[:, 1000:-1000]).max() < 2e-4  # 80 dB of stop band


@settings(max_examples=30, deadline=None)
@given(
    rates=st.sampled_from(RATES[:-1]),
    cuts=st.lists(st.integers(0, 5000), max_size=8),
    seed=st.integers(0, 99),
)
def test_stream_of_chunks_equals_the_whole(
    rates: tuple[int, int], cuts: list[int], seed: int
) -> None:
    old_hz, new_hz = rates
    samples = np.random.default_rng(seed).standard_normal((2, 5000)).astype(np.float32)
    stream = StreamingResampler(old_hz, new_hz, 2)
    edges = [0, *sorted(cuts), 5000]
    parts = [stream.push(samples[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    got = np.concatenate([*parts, stream.flush()], axis=1)
    expected = resample(samples, old_hz, new_hz)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("length", [0, 1, 7])
def test_resample_of_very_short_input_has_the_stated_length(length: int) -> None:
    got = resample(np.zeros((2, length), np.float32), 44_100, 48_000)
    assert got.shape == (2, -(-length * 48_000 // 44_100))


@pytest.mark.parametrize("channels", range(1, 9))
def test_downmix_keeps_left_left_and_within_full_scale(channels: int) -> None:
    stereo = to_stereo(np.ones((channels, 4), np.float32))
    assert stereo.shape == (2, 4)
    assert np.abs(stereo).max() <= 1 + 1e-6
    if channels > 1:
        left_only = np.zeros((channels, 4), np.float32)
        left_only[0] = 1
        left, right = to_stereo(left_only)
        assert left.min() > 0.3
        assert np.abs(right).max() == 0


def test_downmix_follows_the_speakers_that_the_file_names() -> None:
    samples = np.zeros((3, 4), np.float32)
    samples[2] = 1
    assert to_stereo(samples, ("FL", "FR", "LFE")).max() == 0
    assert to_stereo(samples).min() > 0.3


def test_downmix_of_nine_channels_is_refused() -> None:
    with pytest.raises(LimitExceeded, match=r"9 channels.*1 to 8.*Mix it down"):
        to_stereo(np.zeros((9, 4), np.float32))


def test_mono_is_the_mean() -> None:
    assert to_mono(np.array([[1, 3], [3, 5]], np.float32)).tolist() == [[2, 4]]
