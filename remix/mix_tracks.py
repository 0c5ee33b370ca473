"""converted vocal, band (and stems of the original, if wanted) -> the remix, finished.

The vocal goes back to where it was sung: a voice model may give it out a little late or early.
Vocal and band then stand to each other as vocal and accompaniment did in the song, within bounds;
the whole is brought to a loudness, and its true peaks below a ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from remix.audio import Audio, Samples
from remix.loudness import loudness_lufs, master, true_peak_db
from remix.notes import ROLES, Role
from remix.options import MixOptions
from remix.resample import to_stereo

SAMPLE_RATE_HZ = 44_100

PEAK_CEILING_DB = -1.0
"""Of the remix, dBTP."""

ROLE_LUFS: Mapping[Role, float] = {
    "drums": 0.0,
    "bass": -1.0,
    "guitar": -4.0,
    "piano": -3.0,
    "strings": -6.0,
}
"""Loudness of each track beside the drums', LU: a choice, not a measurement: rhythm leads, chords
carry, strings lie behind."""

MAX_TRACK_GAIN_DB = 15.0
"""A track that the band plays softly is lifted by no more."""

ROLE_PAN: Mapping[Role, float] = {
    "drums": 0.0,
    "bass": 0.0,
    "guitar": -0.35,
    "piano": 0.3,
    "strings": 0.1,
}
"""Place of each track, -1 left to 1 right; the lowest and the beat stay in the middle."""

MIN_BALANCE_LU, MAX_BALANCE_LU = -3.0, 6.0
"""Bounds of the vocal's loudness beside the band's, a choice: a singer further down is hard to
understand, one further up stands alone."""

NO_VOCAL_LU = -18.0
"""A vocal stem so far below the accompaniment is what leaked into it, not a singer: it is not
lifted. Songs with a singer lie above -6."""

DEFAULT_BALANCE_LU = 1.0
"""Where the original has no vocal or no accompaniment to measure."""

MAX_LAG_S = 0.05
"""How far the converted vocal is looked for beside the original, either way."""

MIN_CORRELATION = 0.3
"""Of the envelopes, below which the lag found says nothing, and nothing is moved."""

ENVELOPE_HOP_SAMPLES = 44
"""Of the envelopes that are correlated: 1 ms."""

FADE_S = 0.02
"""At the end, where the song's length cuts what still rings."""


@dataclass(frozen=True)
class MixParts:
    """What a remix is made of; all at 44.1 kHz, [1 or 2, about T] each.

    Args:
        length_samples: T, the song's.
        vocal: as converted.
        band: its tracks by role.
        original_vocal: sets the vocal's time and its balance.
        original_accompaniment: all of the song but its vocal; the other half of the balance.
        kept: stems of the original that are to sound beside the band, by name.
    """

    length_samples: int
    vocal: Samples
    band: Mapping[Role, Samples]
    original_vocal: Samples
    original_accompaniment: Samples
    kept: Mapping[str, Samples] = field(default_factory=dict)


@dataclass(frozen=True)
class MixReport:
    """What the mix found and did; None where there was silence.

    Args:
        vocal_lag_ms: how late the converted vocal was; it was moved back by that.
        lag_correlation: of the envelopes at that lag, 0 to 1.
        original_balance_lu: loudness of the song's vocal beside its accompaniment.
        balance_lu: loudness of the remix's vocal beside its band.
        loudness_lufs: of the remix.
        true_peak_db: of the remix, dBTP.
        warnings: what was left out, and why.
    """

    vocal_lag_ms: float
    lag_correlation: float
    original_balance_lu: float | None
    balance_lu: float | None
    loudness_lufs: float | None
    true_peak_db: float | None
    warnings: tuple[str, ...] = ()


def mix_tracks(parts: MixParts, options: MixOptions) -> tuple[Audio, MixReport]:
    """Mix a remix.

    Args:
        parts: what it is made of.
        options: loudness, and the vocal's level beside what was found.

    Returns:
        [2, T] at 44.1 kHz, finite, its true peak at most -1 dBTP; and the report. Where every
        part is silent, so is the mix.
    """
    length = parts.length_samples
    original_vocal = fit(parts.original_vocal, length)
    vocal = fit(parts.vocal, length)
    lag, correlation = find_lag(original_vocal, vocal)
    vocal = _shifted(vocal, -lag)

    accompaniment_lufs = _lufs(fit(parts.original_accompaniment, length))
    original_balance_lu = _difference(_lufs(original_vocal), accompaniment_lufs)
    balance_lu = DEFAULT_BALANCE_LU if original_balance_lu is None else original_balance_lu
    warnings: tuple[str, ...] = ()
    if balance_lu < NO_VOCAL_LU:
        warnings = (
            f"The vocal stem is {-balance_lu:.0f} LU below the accompaniment, a singer's at most "
            f"{-NO_VOCAL_LU:.0f}: no vocal was found, and what is in the stem stays that low.",
        )
    else:
        balance_lu = float(np.clip(balance_lu, MIN_BALANCE_LU, MAX_BALANCE_LU))
    balance_lu += options.vocal_gain_db

    mix = _backing(parts, accompaniment_lufs)
    backing_lufs = _lufs(mix)
    vocal_lufs = _lufs(vocal)
    gain_db = _difference(backing_lufs + balance_lu, vocal_lufs)
    mix += vocal * _factor(gain_db or 0.0)

    fade = min(round(FADE_S * SAMPLE_RATE_HZ), length // 4)
    if fade:
        mix[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    finished = master(Audio(mix, SAMPLE_RATE_HZ), options.loudness_lufs, PEAK_CEILING_DB)
    assert np.isfinite(finished.samples).all()
    report = MixReport(
        vocal_lag_ms=1000 * lag / SAMPLE_RATE_HZ,
        lag_correlation=correlation,
        original_balance_lu=original_balance_lu,
        balance_lu=None if gain_db is None else balance_lu,
        loudness_lufs=_finite(loudness_lufs(finished)),
        true_peak_db=_finite(true_peak_db(finished.samples)),
        warnings=warnings,
    )
    return finished, report


def find_lag(reference: Samples, moved: Samples) -> tuple[int, float]:
    """How many samples `moved` is behind `reference`, and how sure that is.

    The slopes of the logarithmic envelopes are correlated, not the samples: another voice has
    another timbre, and may sing an octave up, but begins and ends its syllables at the same time.

    Args:
        reference: [C, T].
        moved: [C, T].

    Returns:
        The lag, within `MAX_LAG_S`, and the normalised correlation there, 0 to 1; both are 0
        where the two have too little in common.
    """
    slopes = [_envelope_slope(samples) for samples in (reference, moved)]
    energy = float(np.sqrt(np.prod([np.square(slope).sum() for slope in slopes])))
    frames = len(slopes[0])
    reach = min(round(MAX_LAG_S * SAMPLE_RATE_HZ / ENVELOPE_HOP_SAMPLES), frames - 1)
    if energy == 0 or reach < 1:
        return 0, 0.0
    size = next_fast_len(frames + reach, real=True)
    spectra = [rfft(slope, size) for slope in slopes]
    circular = irfft(np.conj(spectra[0]) * spectra[1], size)
    correlations = np.concatenate([circular[-reach:], circular[: reach + 1]]) / energy
    best = int(correlations.argmax())
    correlation = float(correlations[best])
    if correlation < MIN_CORRELATION:
        return 0, 0.0
    lag = best - reach + _vertex(correlations, best)
    return round(lag * ENVELOPE_HOP_SAMPLES), min(correlation, 1.0)


def fit(samples: Samples, length: int) -> Samples:
    """Stereo of exactly `length` samples: [1 or 2, T] -> [2, length], cut or with silence after."""
    stereo = to_stereo(samples)[:, :length]
    missing = length - stereo.shape[1]
    return np.pad(stereo, ((0, 0), (0, missing))) if missing else stereo


def pan(samples: Samples, place: float) -> Samples:
    """Stereo moved sideways at constant power, place from -1 (left) to 1 (right).

    >>> pan(np.ones((2, 1), np.float32), 0.0).round(3).tolist()
    [[1.0], [1.0]]
    """
    angle = (place + 1) * np.pi / 4
    gains = np.sqrt(2) * np.array([[np.cos(angle)], [np.sin(angle)]])
    return np.asarray(samples * gains, np.float32)


def _backing(parts: MixParts, accompaniment_lufs: float) -> Samples:
    """The band at the loudness of the song's accompaniment, and the kept stems as they were."""
    mix = np.zeros((2, parts.length_samples), np.float32)
    for role in ROLES:
        if role in parts.band:
            track = fit(parts.band[role], parts.length_samples)
            gain_db = _difference(ROLE_LUFS[role] - 23.0, _lufs(track))
            if gain_db is not None:
                mix += pan(track * _factor(min(gain_db, MAX_TRACK_GAIN_DB)), ROLE_PAN[role])
    gain_db = _difference(accompaniment_lufs, _lufs(mix))
    if gain_db is not None:
        mix *= _factor(gain_db)
    for samples in parts.kept.values():
        mix += fit(samples, parts.length_samples)
    return mix


def _envelope_slope(samples: Samples) -> NDArray[np.float64]:
    """[frames]: how fast the level changes, by hop."""
    frames = samples.shape[1] // ENVELOPE_HOP_SAMPLES
    mono = samples.mean(axis=0, dtype=np.float64)[: frames * ENVELOPE_HOP_SAMPLES]
    power = np.square(mono).reshape(frames, ENVELOPE_HOP_SAMPLES).mean(axis=1)
    if frames < 2 or power.max() == 0:
        return np.zeros(frames)
    # Over 15 ms: longer than a period of the lowest voice, whose pulses would else be taken for
    # syllables, and which another octave has not.
    window = np.hanning(17)[1:-1]
    smooth = np.convolve(power, window / window.sum(), "same")
    level = np.log(smooth + 1e-3 * smooth.max())
    return np.asarray(np.gradient(level))


def _vertex(values: NDArray[np.float64], index: int) -> float:
    """Where, beside `index`, the parabola through the values around it has its vertex."""
    if not 0 < index < len(values) - 1:
        return 0.0
    before, here, after = values[index - 1 : index + 2]
    bend = before - 2 * here + after
    return float(0.5 * (before - after) / bend) if bend < 0 else 0.0


def _shifted(samples: Samples, by: int) -> Samples:
    """Later by so many samples (earlier if below 0), with silence where nothing is left."""
    shifted = np.zeros_like(samples)
    if by >= 0:
        shifted[:, by:] = samples[:, : samples.shape[1] - by]
    else:
        shifted[:, :by] = samples[:, -by:]
    return shifted


def _lufs(samples: Samples) -> float:
    return loudness_lufs(Audio(samples, SAMPLE_RATE_HZ))


def _difference(a_lufs: float, b_lufs: float) -> float | None:
    """A - b, where neither is silence."""
    return a_lufs - b_lufs if a_lufs > -inf and b_lufs > -inf else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _factor(gain_db: float) -> np.float32:
    return np.float32(10 ** (gain_db / 20))
