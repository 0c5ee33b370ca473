"""samples -> loudness (ITU-R BS.1770), true peak; and a limiter that holds a true peak.

Silence has the loudness minus infinity, and every function takes it.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, log10, pi, tan

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter1d
from scipy.signal import sosfilt, upfirdn

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

RELEASE_DB_PER_S = 60.0
"""How fast the gain returns: 6 dB in 0.1 s, the shortest that does not distort a bass tone."""


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
        weighted = sosfilt(_k_weighting(rate_hz), channel.astype(np.float64))
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
        [C, T], its true peak at most `ceiling_db`, which is measured.
    """
    ceiling = 10 ** (ceiling_db / 20)
    samples = audio.samples
    peaks = _peaks(samples)
    if peaks.max(initial=0.0) > ceiling:
        samples = samples * _gain(peaks, ceiling, audio.sample_rate_hz, samples.shape[1])
    # The gain's own slope can lift a peak between samples by a trace: take that off the whole.
    excess = float(_peaks(samples).max(initial=0.0)) / ceiling
    if excess > 1:
        samples = samples * np.float32(1 / excess * (1 - 1e-6))
    return Audio(samples, audio.sample_rate_hz)


def _gain(
    peaks: NDArray[np.float32], ceiling: float, rate_hz: int, length: int
) -> NDArray[np.float32]:
    """[T]: gain by sample, out of the true peak of each hop."""
    need_db = 20 * np.log10(np.maximum(peaks / ceiling, 1.0).astype(np.float64))
    # The reduction falls by no more than the release: r[n] = max over m <= n of
    # need[m] - slope (n - m) = (max over m <= n of need[m] + slope m) - slope n.
    fall_db = np.arange(len(need_db)) * (RELEASE_DB_PER_S * HOP_SAMPLES / rate_hz)
    held_db = np.maximum.accumulate(need_db + fall_db) - fall_db
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
    peaks = padded.max(axis=0, initial=0.0).reshape(hops, HOP_SAMPLES).max(axis=1, initial=0.0)
    loud = peaks > 0.5 * peaks.max(initial=0.0)
    reach = PEAK_ZERO_CROSSINGS
    chunk_hops = 1 << 12
    for start in range(0, hops, chunk_hops):
        if not loud[start : start + chunk_hops].any():
            continue
        begin, end = start * HOP_SAMPLES, min((start + chunk_hops) * HOP_SAMPLES, length)
        around = samples[:, max(0, begin - reach) : end + reach]
        between = np.abs(upfirdn(_interpolator(), around, OVERSAMPLING, axis=1)).max(axis=0)
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
