"""Correlation of sounds that are known to be alike, or not; and a picture that is one."""

from __future__ import annotations

import gc
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from remix.audio import Audio, Samples
from remix.errors import InvalidAudio
from remix.similarity import SAMPLE_RATE_HZ, compare, draw, report_similarity


def noise(seed: int, length: int = 60_000) -> Samples:
    """[2, T], the same on both sides, below the comparison's 11 kHz."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[length // 5 :] = 0  # above 8.8 kHz at 44.1 kHz
    return np.array([np.fft.irfft(spectrum, length)] * 2, np.float32)


def test_sound_is_wholly_like_itself() -> None:
    song = Audio(noise(0), 44_100)
    similarity = compare(song, song).similarity
    assert similarity.normalised_correlation == pytest.approx(1, abs=1e-5)
    assert similarity.lag_s == 0
    # The paper's figure: the sum of squares at its own rate. The resampler's ripple is 1e-4.
    expected = float(np.square(song.samples[0], dtype=np.float64).sum())
    assert similarity.max_abs_correlation == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("lag", [-4_410, -2, 0, 88, 8_820])
@pytest.mark.parametrize("gain", [1.0, -0.2])
def test_lag_is_found_at_any_level_and_sign(lag: int, gain: float) -> None:
    song = noise(1)
    moved = gain * np.roll(np.pad(song, ((0, 0), (10_000, 10_000))), lag, axis=1)
    similarity = compare(
        Audio(np.pad(song, ((0, 0), (10_000, 10_000))), 44_100),
        Audio(moved.astype(np.float32), 44_100),
    ).similarity
    assert abs(similarity.lag_s - lag / 44_100) <= 0.5 / SAMPLE_RATE_HZ + 1e-9
    assert similarity.normalised_correlation > 0.9  # an odd lag falls between the samples


def test_correlation_by_transform_is_the_sum_over_products() -> None:
    first, second = (Audio(noise(seed, 300)[:1], SAMPLE_RATE_HZ) for seed in (2, 3))
    comparison = compare(first, second)
    direct = np.correlate(
        second.samples[0].astype(np.float64), first.samples[0].astype(np.float64), "full"
    )
    energy = np.linalg.norm(first.samples) * np.linalg.norm(second.samples)
    assert np.allclose(comparison.correlation, direct / energy, atol=1e-5)  # float32 transforms
    assert comparison.lags_s[0] == -299 / SAMPLE_RATE_HZ
    assert comparison.similarity.max_abs_correlation == pytest.approx(
        2 * np.abs(direct).max(), rel=1e-4
    )


def test_sounds_that_share_nothing_are_not_alike() -> None:
    pair = (Audio(noise(seed), 44_100) for seed in (4, 5))
    assert compare(*pair).similarity.normalised_correlation < 0.05


def test_silence_is_like_nothing_and_can_be_drawn() -> None:
    silence = Audio(np.zeros((2, 5_000), np.float32), 44_100)
    for pair in ((silence, silence), (silence, Audio(noise(6), 44_100))):
        figures, png = report_similarity(*pair)
        assert figures["normalised_correlation"] == 0
        assert figures["lag_s"] == 0
        assert png.startswith(b"\x89PNG")


def test_sounds_of_other_lengths_rates_and_channels_are_compared() -> None:
    song = Audio(noise(7), 44_100)
    mono = Audio(noise(7)[:1, :40_000], 44_100)
    assert 0.7 < compare(song, mono).similarity.normalised_correlation < 0.9  # sqrt(2 / 3)
    short = Audio(np.ones((1, 1), np.float32), 8_000)
    assert 0 <= compare(song, short).similarity.normalised_correlation <= 1


def test_sound_without_samples_is_refused() -> None:
    with pytest.raises(InvalidAudio, match="0 samples"):
        compare(Audio(noise(8), 44_100), Audio(np.zeros((2, 0), np.float32), 44_100))


def test_report_is_json_and_a_picture() -> None:
    figures, png = report_similarity(Audio(noise(9), 44_100), Audio(noise(10), 44_100))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    picture = imread(BytesIO(png))
    assert picture.shape[:2] == (900, 1000)
    assert picture.std() > 0.1


def test_drawing_again_and_again_leaves_no_memory() -> None:
    comparison = compare(Audio(noise(11), 44_100), Audio(noise(12), 44_100))

    def resident_kib() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

    for _ in range(5):  # fonts and caches
        draw(comparison)
    gc.collect()
    before_kib = resident_kib()
    for _ in range(10):
        draw(comparison)
    gc.collect()
    # A figure holds 4 MB of pixels and 2 MB of data: ten kept ones would be 60 MB.
    assert resident_kib() - before_kib < 15_000
