"""samples -> loudness (ITU-R BS.1770) and true peak; and samples that have the wanted ones.

Silence has the loudness minus infinity, and every function takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
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

DELAY_HOPS = 2 * LOOK_AHEAD_HOPS + 3
"""Around a hop, of which its gain is made: the minimum's and the mean's, and one for the line."""

SPAN_HOPS, GAP_HOPS = 1 << 12, 16
"""Of what is oversampled at once: small enough for the caches; and what lies between two spans."""

PEAK_MARGIN_DB = 0.4
"""How far below the ceiling the limiter aims: so much, at most, do other interpolators differ
from this one (white noise, 8 times oversampled: 0.31 dB; music: less)."""

LOUDNESS_TOLERANCE_LU = 0.1
MAX_ROUNDS = 10
SMALLEST_SHARE = 0.2
"""A limiter takes loudness away; the gain before it is raised by what is missing, again and
again, until nothing is, or so little of it comes through that the sound would suffer for nothing.
Dense music needs two rounds, a sparse and peaky one more."""


class LoudnessMeter:
    """Measures sound that arrives bit by bit.

    Args:
        sample_rate_hz: of the sound.

    Source: ITU-R BS.1770-5, annex 1.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self._filter = _k_weighting(sample_rate_hz)
        self._step = round(STEP_S * sample_rate_hz)
        self._state: NDArray[np.float64] | None = None
        self._left = np.zeros(0)
        self._powers: list[NDArray[np.float64]] = []

    def push(self, samples: Samples) -> None:
        """Measure the next samples, [C, t], C is 1 or 2."""
        if not samples.shape[1]:
            return
        if self._state is None:
            self._state = np.zeros((len(self._filter), samples.shape[0], 2))
        weighted, self._state = scipy.signal.sosfilt(
            self._filter, samples.astype(np.float64), axis=1, zi=self._state
        )
        energy = np.concatenate([self._left, np.einsum("ct,ct->t", weighted, weighted)])
        steps = len(energy) // self._step
        self._left = energy[steps * self._step :]
        self._powers.append(energy[: steps * self._step].reshape(steps, self._step).mean(axis=1))

    @property
    def powers(self) -> NDArray[np.float64]:
        """[T // step]: K-weighted power of each step of 0.1 s, summed over the channels.

        The powers of sounds that have nothing in common add up, so the loudness of a mix follows
        from those of its tracks. What is shorter than a step counts as one.
        """
        powers = np.concatenate([np.zeros(0), *self._powers])
        return powers if len(powers) or not len(self._left) else self._left.mean(keepdims=True)


def gated_lufs(powers: NDArray[np.float64]) -> float:
    """Integrated loudness out of the powers of steps, as `LoudnessMeter` measures them.

    Args:
        powers: [N]; fewer than a block's four steps count as if they went on.

    Returns:
        LUFS; minus infinity where no block passes the gates.
    """
    steps_in_block = round(BLOCK_S / STEP_S)
    if 0 < len(powers) < steps_in_block:
        powers = np.full(steps_in_block, powers.mean())
    if len(powers) == 0:
        return -inf
    blocks = np.convolve(powers, np.full(steps_in_block, 1 / steps_in_block), "valid")
    loud = blocks[blocks >= _power(ABSOLUTE_GATE_LUFS)]
    if len(loud) == 0:
        return -inf
    loud = loud[loud > loud.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
    return OFFSET_LU + 10 * log10(float(loud.mean()))


def loudness_lufs(audio: Audio) -> float:
    """Integrated loudness of mono or stereo sound.

    Args:
        audio: [C, T], C is 1 or 2. What is shorter than a block of 0.4 s is measured as if it
            went on over and over.

    Returns:
        LUFS; minus infinity for silence.

    >>> loudness_lufs(Audio(np.zeros((2, 44_100), np.float32), 44_100))
    -inf
    """
    samples, block = audio.samples, round(BLOCK_S * audio.sample_rate_hz)
    if 0 < samples.shape[1] < block:
        samples = np.tile(samples, -(-block // samples.shape[1]))
    meter = LoudnessMeter(audio.sample_rate_hz)
    meter.push(samples)
    return gated_lufs(meter.powers)


def true_peak_db(samples: Samples) -> float:
    """The highest level that the sound reaches between its samples, dBTP.

    Args:
        samples: [C, T].

    Source: ITU-R BS.1770-5, annex 2.
    """
    loudest = float(np.abs(samples).max(initial=0.0))
    peak = float(_peaks(samples, loudest).max(initial=0.0))
    return 20 * log10(peak) if peak > 0 else -inf


def master(audio: Audio, target_lufs: float, ceiling_db: float) -> Audio:
    """The same sound at a loudness, with its true peaks below a ceiling.

    Args:
        audio: [C, T].
        target_lufs: what the integrated loudness becomes, to 0.1 LU; less only where the sound
            is so sparse that no limiter could give it more.
        ceiling_db: dBTP.

    Returns:
        [C, T], its true peak at most `ceiling_db`.
    """
    limiter = Limiter(audio.sample_rate_hz, ceiling_db)

    def limited(gain_db: float) -> tuple[Samples, float]:
        raised = audio.samples * np.float32(10 ** (gain_db / 20))
        finished = deepcopy(limiter).push(raised, is_last=True)
        return finished, loudness_lufs(Audio(finished, audio.sample_rate_hz))

    measured = loudness_lufs(audio)
    # Silence, or so near it that no block passes the gate, stays as it is.
    gain_db = find_gain(limited, measured, target_lufs) if isfinite(measured) else 0.0
    return Audio(limited(gain_db)[0], audio.sample_rate_hz)


def find_gain(
    limited: Callable[[float], tuple[Samples, float]], measured_lufs: float, target_lufs: float
) -> float:
    """The gain before a limiter, dB, after which the sound has its loudness.

    Args:
        limited: gives what comes out of the limiter after a gain, and its loudness.
        measured_lufs: without gain and limiter.
        target_lufs: what is wanted behind the limiter.
    """
    gain_db, step_db, missing_lu = 0.0, target_lufs - measured_lufs, target_lufs - measured_lufs
    for _ in range(MAX_ROUNDS):
        gain_db += step_db
        before_lu, missing_lu = missing_lu, target_lufs - limited(gain_db)[1]
        if abs(missing_lu) <= LOUDNESS_TOLERANCE_LU:
            break
        # The secant: how much of the last step's gain came through the limiter.
        share = (before_lu - missing_lu) / step_db if step_db else 1.0
        step_db = missing_lu / min(1.0, max(SMALLEST_SHARE, share))
    return gain_db


class Limiter:
    """Brings every true peak below a ceiling, by a gain that falls before it and returns after it.

    One gain holds for all channels, so that nothing moves sideways. Sound arrives bit by bit, and
    comes out a moment later: `DELAY_HOPS` and the peak filter's reach.

    Args:
        sample_rate_hz: of the sound.
        ceiling_db: dBTP.
    """

    def __init__(self, sample_rate_hz: int, ceiling_db: float) -> None:
        self._aim = 10 ** ((ceiling_db - PEAK_MARGIN_DB) / 20)
        self._decay = HOP_SAMPLES / sample_rate_hz / RELEASE_S  # of the logarithm, a hop
        self._kept: Samples | None = None  # from hop `_kept_from` on
        self._kept_from = 0
        self._given_hops = 0
        self._held_db = np.zeros(0)  # of the hops from `_kept_from` on

    def push(self, samples: Samples, *, is_last: bool = False) -> Samples:
        """Take the next samples, [C, t], and give out what is finished, [C, t']."""
        kept = samples if self._kept is None else np.concatenate([self._kept, samples], axis=1)
        end = -(-kept.shape[1] // HOP_SAMPLES)  # counted from `_kept_from`, as all below
        if not is_last:  # hops whose true peak cannot change any more
            end = max((kept.shape[1] - PEAK_ZERO_CROSSINGS) // HOP_SAMPLES, len(self._held_db))
        self._hold(kept, end)
        first = self._given_hops - self._kept_from
        last = end if is_last else max(end - DELAY_HOPS, first)
        given = kept[:, first * HOP_SAMPLES : last * HOP_SAMPLES]
        if self._held_db.any():
            given = given * self._gain()[first * HOP_SAMPLES :][: given.shape[1]]
        self._given_hops += last - first
        outdated = max(0, last - DELAY_HOPS)
        self._kept = kept[:, outdated * HOP_SAMPLES :]
        self._held_db = self._held_db[outdated:]
        self._kept_from += outdated
        return np.asarray(given, np.float32)

    def _hold(self, kept: Samples, end: int) -> None:
        """Find the reductions of the hops up to `end`, which fall no faster than the release."""
        known = len(self._held_db)
        if end <= known:
            return
        reach = -(-PEAK_ZERO_CROSSINGS // HOP_SAMPLES)
        begin = max(0, known - reach)
        stretch = kept[:, begin * HOP_SAMPLES : end * HOP_SAMPLES + PEAK_ZERO_CROSSINGS]
        peaks = _peaks(stretch, self._aim)[known - begin : end - begin]
        need_db = 20 * np.log10(np.maximum(peaks / self._aim, 1.0).astype(np.float64))
        # r[n] = max over m <= n of need[m] d^(n - m), whose logarithm is
        # (max over m <= n of log need[m] - m log d) + n log d; and r[-1] is what was held.
        before = self._held_db[-1] if known else 0.0
        decay = np.arange(len(need_db) + 1) * self._decay
        logarithm = np.log(np.maximum(np.append(before, need_db), 1e-9)) + decay
        held_db = np.exp(np.maximum.accumulate(logarithm) - decay)[1:]
        held_db[held_db < 1e-6] = 0.0
        self._held_db = np.append(self._held_db, held_db)

    def _gain(self) -> NDArray[np.float32]:
        """Gain by sample from `_kept_from` on; right where `DELAY_HOPS` are known on each side."""
        # Each hop's gain is a mean over the hops around it, and a sample's gain lies between the
        # gains of two hops: with the minimum taken over one hop more than the mean is wide,
        # neither can exceed what the hop itself needs.
        width = 2 * (LOOK_AHEAD_HOPS + 1) + 1
        gain = minimum_filter1d(10 ** (-self._held_db / 20), width, mode="nearest")
        window = np.hanning(2 * LOOK_AHEAD_HOPS + 3)[1:-1]
        padded = np.pad(gain, LOOK_AHEAD_HOPS, mode="edge")
        gain = np.convolve(padded, window / window.sum(), "valid")
        middles = (np.arange(len(gain)) + 0.5) * HOP_SAMPLES
        at = np.arange(len(gain) * HOP_SAMPLES)
        return np.asarray(np.interp(at, middles, gain), np.float32)


def _peaks(samples: Samples, relevant: float) -> NDArray[np.float32]:
    """[ceil(T / HOP_SAMPLES)]: true peak of each hop, over all channels.

    Hops that stay below half of what is relevant are not oversampled: between two samples a sound
    hardly reaches twice their level.
    """
    channels, length = samples.shape
    hops = -(-length // HOP_SAMPLES)
    padded = np.zeros((channels, hops * HOP_SAMPLES), np.float32)
    np.abs(samples, out=padded[:, :length])
    peaks: NDArray[np.float32] = (
        padded.max(axis=0, initial=0.0).reshape(hops, HOP_SAMPLES).max(axis=1, initial=0.0)
    )
    reach, width = PEAK_ZERO_CROSSINGS, HOP_SAMPLES * OVERSAMPLING
    for first, last in _spans(peaks > 0.5 * relevant):
        begin, end = first * HOP_SAMPLES, min(last * HOP_SAMPLES, length)
        around = samples[:, max(0, begin - reach) : end + reach]
        between = scipy.signal.upfirdn(_interpolator(), around, OVERSAMPLING, axis=1)
        between = np.abs(between).max(axis=0)
        # Output m lies at input sample (m - reach * OVERSAMPLING) / OVERSAMPLING of `around`.
        start = (reach + begin - max(0, begin - reach)) * OVERSAMPLING
        between = between[start : start + (end - begin) * OVERSAMPLING]
        between = np.pad(between, (0, -len(between) % width)).reshape(-1, width).max(axis=1)
        np.maximum(peaks[first:last], between, out=peaks[first:last])
    return peaks


def _spans(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[first, last) of the hops that are marked, in spans of at most `SPAN_HOPS`.

    Gaps that are shorter than the work of another call are filled.
    """
    marked = np.flatnonzero(mask)
    if len(marked) == 0:
        return []
    new = np.flatnonzero(np.diff(marked) > GAP_HOPS)
    firsts = marked[np.append(0, new + 1)]
    lasts = marked[np.append(new, len(marked) - 1)] + 1
    return [
        (start, min(start + SPAN_HOPS, int(last)))
        for first, last in zip(firsts, lasts, strict=True)
        for start in range(int(first), int(last), SPAN_HOPS)
    ]


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
