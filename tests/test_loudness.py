"""Loudness against the standard's own figures and another library; the limiter against physics."""

from __future__ import annotations

from math import inf

import numpy as np
import pyloudnorm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from remix.audio import Audio, Samples
from remix.loudness import (
    Limiter,
    LoudnessMeter,
    _k_weighting,
    gated_lufs,
    loudness_lufs,
    true_peak_db,
)

RATE_HZ = 44_100


def sine(frequency_hz: float, level_db: float, duration_s: float, phase: float = 0.0) -> Samples:
    """[2, T]."""
    at = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ
    tone = 10 ** (level_db / 20) * np.sin(2 * np.pi * frequency_hz * at + phase)
    return np.array([tone, tone], np.float32)


def test_filters_are_the_standards_own_at_48_khz() -> None:
    shelf, high_pass = _k_weighting(48_000)
    # ITU-R BS.1770-5, tables 1 and 2.
    expected = [1.53512485958697, -2.69169618940638, 1.19839281085285, 1.0,
                -1.69065929318241, 0.73248077421585]  # fmt: skip
    assert np.abs(shelf - expected).max() < 1e-9
    assert np.abs(high_pass[4:] - [-1.99004745483398, 0.99007225036621]).max() < 1e-9


def test_loudness_of_stereo_sine_of_minus_23_db_is_minus_23() -> None:
    # EBU Tech 3341, case 1: 1 kHz at -23 dBFS in both channels reads -23.0 LUFS, +- 0.1.
    assert abs(loudness_lufs(Audio(sine(1_000, -23, 20), RATE_HZ)) + 23) < 0.1


def test_loudness_is_gated() -> None:
    # EBU Tech 3341, case 3: 10 s at -36, 60 s at -23, 10 s at -36 dBFS reads -23.0.
    parts = [sine(1_000, level_db, length_s) for level_db, length_s in ((-36, 10), (-23, 60))]
    samples = np.concatenate([*parts, parts[0]], axis=1)
    assert abs(loudness_lufs(Audio(samples, RATE_HZ)) + 23) < 0.1


@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000])
def test_loudness_agrees_with_pyloudnorm(rate_hz: int) -> None:
    rng = np.random.default_rng(0)
    envelope = np.repeat(10 ** (rng.uniform(-40, -10, 20) / 20), rate_hz // 2)
    noise = np.cumsum(rng.standard_normal((2, len(envelope))), axis=1) * 0.01
    samples = (envelope * (noise - noise.mean() + rng.standard_normal(noise.shape))).astype("f4")
    expected = pyloudnorm.Meter(rate_hz).integrated_loudness(samples.T.astype(np.float64))
    # Its filters approximate the standard's: 0.1 LU.
    assert abs(loudness_lufs(Audio(samples, rate_hz)) - expected) < 0.15


@pytest.mark.parametrize("length", [0, 1, 44_100])
def test_loudness_and_peak_of_silence_are_minus_infinity(length: int) -> None:
    silence = Audio(np.zeros((2, length), np.float32), RATE_HZ)
    assert loudness_lufs(silence) == -inf
    assert true_peak_db(silence.samples) == -inf
    assert np.array_equal(limit_true_peak(silence, -1.0).samples, silence.samples)


def test_loudness_of_less_than_a_block_is_that_of_the_sound_going_on() -> None:
    short, long = Audio(sine(1_000, -20, 0.1), RATE_HZ), Audio(sine(1_000, -20, 4), RATE_HZ)
    assert abs(loudness_lufs(short) - loudness_lufs(long)) < 0.1  # the filter's start


@pytest.mark.parametrize(("divisor", "phase"), [(4, np.pi / 4), (6, 0.0), (8, np.pi / 8)])
def test_true_peak_lies_between_the_samples(divisor: int, phase: float) -> None:
    # EBU Tech 3341, cases 15 to 18: a sine that its samples miss at its top; +0.2 and -0.4 dB.
    samples = sine(RATE_HZ / divisor, -6, 0.5, phase)
    fade = np.minimum(1, np.arange(samples.shape[1]) / 2_000).astype(np.float32)
    samples *= fade * fade[::-1]
    assert 20 * np.log10(np.abs(samples).max()) < -6.2
    assert -0.4 < true_peak_db(samples) + 6 < 0.2


def test_true_peak_finds_the_one_peak_of_a_long_quiet_sound() -> None:
    samples = 0.01 * np.random.default_rng(0).standard_normal((2, 300_000)).astype(np.float32)
    samples[1, 234_567:234_569] = 0.5  # two equal samples: the peak lies between them
    assert 20 * np.log10(0.55) < true_peak_db(samples) < 20 * np.log10(0.7)


def limit_true_peak(audio: Audio, ceiling_db: float, *cuts: int) -> Audio:
    """Through a limiter, in the pieces between the cuts."""
    limiter = Limiter(audio.sample_rate_hz, ceiling_db)
    pieces = np.split(audio.samples, cuts, axis=1)
    given = [limiter.push(piece) for piece in pieces[:-1]]
    given.append(limiter.push(pieces[-1], is_last=True))
    return Audio(np.concatenate(given, axis=1), audio.sample_rate_hz)


def reference_peak_db(samples: Samples) -> float:
    """Oversampled 8 times by another implementation and a longer filter."""
    padded = np.pad(samples.astype(np.float64), ((0, 0), (100, 100)))
    return float(20 * np.log10(np.abs(resample_poly(padded, 8, 1, axis=1)).max() + 1e-12))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    gain_db=st.floats(-20, 40),
    length=st.integers(1, 30_000),
    kind=st.sampled_from(["noise", "clicks", "sine", "steps"]),
)
def test_limiter_holds_the_ceiling_whatever_comes(
    seed: int, gain_db: float, length: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    shapes = {
        "noise": rng.standard_normal((2, length)),
        "clicks": np.where(rng.random((2, length)) < 1e-3, 1.0, 0.0),
        "sine": np.sin(np.arange(length) * rng.uniform(0.01, 3))[None] * np.ones((2, 1)),
        "steps": np.sign(np.sin(np.arange(length) * 0.03))[None] * np.ones((2, 1)),
    }
    audio = Audio((10 ** (gain_db / 20) * shapes[kind]).astype(np.float32), RATE_HZ)
    cuts = sorted(rng.integers(0, length + 1, rng.integers(0, 4)).tolist())
    limited = limit_true_peak(audio, -1.0, *cuts)
    # However it arrives: the logarithms of the release are summed from another start.
    whole = limit_true_peak(audio, -1.0)
    assert np.abs(limited.samples - whole.samples).max() < 1e-6
    assert limited.samples.shape == audio.samples.shape
    assert limited.samples.dtype == np.float32
    assert true_peak_db(limited.samples) <= -1.0
    # Another filter, twice the rate: near the Nyquist frequency, where white noise and clicks
    # have their share, two interpolators differ by some tenths of a decibel.
    assert reference_peak_db(limited.samples) <= -0.8


@given(cuts=st.lists(st.integers(0, 50_000), max_size=5).map(sorted), level=st.floats(1e-3, 1))
@settings(max_examples=20, deadline=None)
def test_meter_measures_the_same_however_the_sound_arrives(cuts: list[int], level: float) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 50_000)) * level
    audio = Audio(noise.astype(np.float32), RATE_HZ)
    meter = LoudnessMeter(RATE_HZ)
    for piece in np.split(audio.samples, cuts, axis=1):
        meter.push(piece)
    assert gated_lufs(meter.powers) == pytest.approx(loudness_lufs(audio), abs=1e-9)


def test_powers_of_unlike_sounds_add_up() -> None:
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal((2, 10 * RATE_HZ)).astype(np.float32) * 0.1 for _ in range(2)]
    meters = [LoudnessMeter(RATE_HZ) for _ in sounds]
    for meter, sound in zip(meters, sounds, strict=True):
        meter.push(sound)
    together = loudness_lufs(Audio(sounds[0] + sounds[1], RATE_HZ))
    # Independent noise: the cross term of 10 s averages to a hundredth.
    assert abs(gated_lufs(meters[0].powers + meters[1].powers) - together) < 0.05


def test_limiter_leaves_alone_what_is_below() -> None:
    audio = Audio(sine(440, -3, 1), RATE_HZ)
    assert np.array_equal(limit_true_peak(audio, -1.0).samples, audio.samples)


def test_limiter_turns_down_only_around_the_peak() -> None:
    samples = sine(440, -12, 2)
    samples[:, RATE_HZ : RATE_HZ + 50] *= 6
    limited = limit_true_peak(Audio(samples, RATE_HZ), -6.0).samples
    before, after = slice(0, RATE_HZ - 500), slice(RATE_HZ * 7 // 4, None)
    assert np.abs(limited - samples)[:, before].max() == 0
    # Nine times the release later: 10 dB / e^9 are a thousandth of a decibel, of 0.25.
    assert np.abs(limited - samples)[:, after].max() < 1e-4
    # The gain is smooth: it moves by less than a decibel in a hop of 0.7 ms.
    loud = np.abs(samples[0]) > 0.1
    gain_db = 20 * np.log10(limited[0, loud] / samples[0, loud])
    assert np.abs(np.diff(gain_db)).max() < 3
