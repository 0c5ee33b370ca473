"""samples -> loudness (ITU-R BS.1770) and true peak; and samples that have the wanted ones.

Silence has the loudness minus infinity, and every function takes it.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, isfinite, log10, pi, tan

import numpy as np
import scipy  # its parts load when they are first used: signal takes a second
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter1d

from remix.audio import Audio, Samples

BLOCK_S = 0.4
STEP_S = 0.1
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
OFFSET_LU = -0.691
"""Gating of ITU-R BS.1770-5, annex 1: blocks of 0.4 s that overlap by three quarters."""

OVERSAMPLING = 4
"""Of the true peak: BS.1770-5, annex 2, asks for 4 at 48 kHz."""

PEAK_ZERO_CROSSINGS = 12
"""Of its interpolating sinc on each side; the standard's filter has six."""

HOP_SAMPLES = 32
"""Of the limiter's gain: 0.7 ms at 44.1 kHz, between which it runs straight."""

LOOK_AHEAD_HOPS = 4
"""How long before a peak the gain begins to fall, and how smooth it falls: 3 ms."""

RELEASE_S = 0.08
"""In which a reduction falls to 1/e of its decibels: a deep one, after a click, is gone quickly, a
shallow one, under a bass tone, lasts longer than the tone's period and does not distort it."""

PEAK_MARGIN_DB = 0.4
"""How far below the ceiling the limiter aims: so much, at most, do other interpolators differ
from this one (white noise, 8 times oversampled: 0.31 dB; music: less)."""

LOUDNESS_TOLERANCE_LU = 0.1
MAX_ROUNDS = 10
SMALLEST_SHARE = 0.2
"""A limiter takes loudness away; the gain before it is raised by what is missing, again and
again, until nothing is, or so little of it comes through that the sound would suffer for nothing.
Dense music needs two rounds, a sparse and peaky one more."""


def loudness_lufs(audio: Audio) -> float:
    """Integrated loudness of mono or stereo sound.

    Args:
        audio: [C, T], C is 1 or 2. What is shorter than a block of 0.4 s is measured as if it
            went on over and over.

    Returns:
        LUFS; minus infinity for silence.

    Source: ITU-R BS.1770-5, annex 1.

    >>> loudness_lufs(Audio(np.zeros((2, 44_100), np.float32), 44_100))
    -inf
    """
    rate_hz, length = audio.sample_rate_hz, audio.samples.shape[1]
    step = round(STEP_S * rate_hz)
    steps_in_block = round(BLOCK_S / STEP_S)
    samples = audio.samples
    if length == 0:
        return -inf
    if length < step * steps_in_block:
        samples = np.tile(samples, -(-step * steps_in_block // length))
    powers = np.zeros(samples.shape[1] // step)
    for channel in samples:
        weighted = scipy.signal.sosfilt(_k_weighting(rate_hz), channel.astype(np.float64))
        steps = weighted[: len(powers) * step].reshape(-1, step)
        powers += np.einsum("ij,ij->i", steps, steps) / step
    blocks = np.convolve(powers, np.full(steps_in_block, 1 / steps_in_block), "valid")
    loud = blocks[blocks >= _power(ABSOLUTE_GATE_LUFS)]
    if len(loud) == 0:
        return -inf
    loud = loud[loud > loud.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
    return OFFSET_LU + 10 * log10(float(loud.mean()))


def true_peak_db(samples: Samples) -> float:
    """The highest level that the sound reaches between its samples, dBTP.

    Args:
        samples: [C, T].

    Source: ITU-R BS.1770-5, annex 2.
    """
    peak = float(_peaks(samples).max(initial=0.0))
    return 20 * log10(peak) if peak > 0 else -inf


def limit_true_peak(audio: Audio, ceiling_db: float) -> Audio:
    """Bring every true peak below a ceiling, by a gain that falls before it and returns after it.

    Args:
        audio: [C, T]; one gain holds for all channels, so that nothing moves sideways.
        ceiling_db: dBTP.

    Returns:
        [C, T], its true peak at most `ceiling_db`, which is measured; the input, if it is so
        already.
    """
    if true_peak_db(audio.samples) <= ceiling_db:
        return audio
    return _checked(_limited(audio, _peaks(audio.samples), ceiling_db), ceiling_db)


def master(audio: Audio, target_lufs: float, ceiling_db: float) -> Audio:
    """The same sound at a loudness, with its true peaks below a ceiling.

    Args:
        audio: [C, T].
        target_lufs: what the integrated loudness becomes, to 0.1 LU; less only where the sound
            is so sparse that no limiter could give it more.
        ceiling_db: dBTP.

    Returns:
        [C, T], its true peak at most `ceiling_db`, which is measured.
    """
    missing_lu = target_lufs - loudness_lufs(audio)
    if not isfinite(missing_lu):  # silence, or so near it that no block passes the gate
        return limit_true_peak(audio, ceiling_db)
    peaks = _peaks(audio.samples)
    gain_db, step_db, limited = 0.0, missing_lu, audio
    for _ in range(MAX_ROUNDS):
        gain_db += step_db
        gain = np.float32(10 ** (gain_db / 20))
        raised = Audio(audio.samples * gain, audio.sample_rate_hz)
        limited = _limited(raised, peaks * gain, ceiling_db)
        before_lu, missing_lu = missing_lu, target_lufs - loudness_lufs(limited)
        if abs(missing_lu) <= LOUDNESS_TOLERANCE_LU:
            break
        # The secant: how much of the last step's gain came through the limiter.
        share = min(1.0, max(SMALLEST_SHARE, (before_lu - missing_lu) / step_db))
        step_db = missing_lu / share
    return _checked(limited, ceiling_db)


def _limited(audio: Audio, peaks: NDArray[np.float32], ceiling_db: float) -> Audio:
    """Limited by the peaks that were measured; they are not measured again."""
    aim = 10 ** ((ceiling_db - PEAK_MARGIN_DB) / 20)
    if peaks.max(initial=0.0) <= aim:
        return audio
    gain = _gain(peaks / aim, audio.sample_rate_hz, audio.samples.shape[1])
    return Audio(audio.samples * gain, audio.sample_rate_hz)


def _checked(audio: Audio, ceiling_db: float) -> Audio:
    """Below the ceiling for certain: the gain's own slope can lift a peak by a trace."""
    excess_db = true_peak_db(audio.samples) - ceiling_db
    if excess_db <= 0:
        return audio
    return Audio(audio.samples * np.float32(10 ** (-excess_db / 20) * (1 - 1e-6)),
                 audio.sample_rate_hz)  # fmt: skip


def _gain(excess: NDArray[np.float32], rate_hz: int, length: int) -> NDArray[np.float32]:
    """[T]: gain by sample, out of each hop's true peak as a multiple of what is allowed."""
    need_db = 20 * np.log10(np.maximum(excess, 1.0).astype(np.float64))
    # A reduction falls by no more than the release: r[n] = max over m <= n of
    # need[m] d^(n - m), whose logarithm is (max over m <= n of log need[m] - m log d) + n log d.
    decay = np.arange(len(need_db)) * (HOP_SAMPLES / rate_hz / RELEASE_S)
    logarithm = np.log(np.maximum(need_db, 1e-9)) + decay
    held_db = np.exp(np.maximum.accumulate(logarithm) - decay)
    # Each hop's gain is a mean over the hops around it, and a sample's gain lies between the
    # gains of two hops: with the minimum taken over one hop more than the mean is wide, neither
    # can exceed what the hop itself needs.
    reach = LOOK_AHEAD_HOPS + 1
    gain = minimum_filter1d(10 ** (-held_db / 20), 2 * reach + 1, mode="nearest")
    window = np.hanning(2 * LOOK_AHEAD_HOPS + 3)[1:-1]
    padded = np.pad(gain, LOOK_AHEAD_HOPS, mode="edge")
    gain = np.convolve(padded, window / window.sum(), "valid")
    middles = (np.arange(len(gain)) + 0.5) * HOP_SAMPLES
    return np.asarray(np.interp(np.arange(length), middles, gain), np.float32)


def _peaks(samples: Samples) -> NDArray[np.float32]:
    """[ceil(T / HOP_SAMPLES)]: true peak of each hop, over all channels.

    Stretches that stay below half of the loudest sample are not oversampled: a peak between their
    samples is not the one that matters, neither to a limiter nor to a measurement.
    """
    channels, length = samples.shape
    hops = -(-length // HOP_SAMPLES)
    padded = np.zeros((channels, hops * HOP_SAMPLES), np.float32)
    np.abs(samples, out=padded[:, :length])
    peaks: NDArray[np.float32] = (
        padded.max(axis=0, initial=0.0).reshape(hops, HOP_SAMPLES).max(axis=1, initial=0.0)
    )
    loud = peaks > 0.5 * peaks.max(initial=0.0)
    reach = PEAK_ZERO_CROSSINGS
    chunk_hops = 1 << 12
    for start in range(0, hops, chunk_hops):
        if not loud[start : start + chunk_hops].any():
            continue
        begin, end = start * HOP_SAMPLES, min((start + chunk_hops) * HOP_SAMPLES, length)
        around = samples[:, max(0, begin - reach) : end + reach]
        between = np.abs(scipy.signal.upfirdn(_interpolator(), around, OVERSAMPLING, axis=1)).max(
            axis=0
        )
        # Output m lies at input sample (m - reach * OVERSAMPLING) / OVERSAMPLING of `around`.
        first = (reach + begin - max(0, begin - reach)) * OVERSAMPLING
        between = between[first : first + (end - begin) * OVERSAMPLING]
        width = HOP_SAMPLES * OVERSAMPLING
        between = np.pad(between, (0, -len(between) % width)).reshape(-1, width).max(axis=1)
        stretch = peaks[start : start + len(between)]
        np.maximum(stretch, between, out=stretch)
    return peaks


@lru_cache(maxsize=1)
def _interpolator() -> NDArray[np.float32]:
    half = PEAK_ZERO_CROSSINGS * OVERSAMPLING
    at = np.arange(-half, half + 1)
    return np.asarray(np.sinc(at / OVERSAMPLING) * np.kaiser(2 * half + 1, 6.0), np.float32)


@lru_cache(maxsize=8)
def _k_weighting(rate_hz: int) -> NDArray[np.float64]:
    """[2, 6]: the shelf of a head, then a high pass, as second-order sections.

    Source: libebur128 1.2.6, `ebur128_init_filter`: BS.1770's 48 kHz filters as analogue
    prototypes, warped to any rate.
    """
    k, q = tan(pi * 1681.974450955533 / rate_hz), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    a0 = 1 + k / q + k * k
    shelf = [
        (high + band * k / q + k * k) / a0,
        2 * (k * k - high) / a0,
        (high - band * k / q + k * k) / a0,
        1.0,
        2 * (k * k - 1) / a0,
        (1 - k / q + k * k) / a0,
    ]
    k, q = tan(pi * 38.13547087602444 / rate_hz), 0.5003270373238773
    a0 = 1 + k / q + k * k
    high_pass = [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0]
    return np.array([shelf, high_pass])


def _power(lufs: float) -> float:
    return float(10 ** ((lufs - OFFSET_LU) / 10))
