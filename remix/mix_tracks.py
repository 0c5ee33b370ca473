"""converted vocal, band -> the remix, finished, block by block while both are being made.

The vocal goes back to where it was sung: a voice model may give it out a little late or early.
Vocal and band stand to each other as vocal and accompaniment do in the song, within bounds, and
the remix grows as loud as the song does: the song is known as a whole from the start, and what is
measured of the rest only moves gains slowly. So a block is final as soon as it is mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from remix.audio import Audio, Samples
from remix.loudness import (
    Limiter,
    LoudnessMeter,
    find_gain,
    gated_lufs,
    loudness_lufs,
    true_peak_db,
)
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

BLOCK_SAMPLES = 423_360
"""9.6 s, in which the gains are decided anew: 96 of the loudness meter's steps."""

RAMP_S = 2.0
"""In which a gain goes to its new value."""

MAX_STEP_DB = 3.0
"""By which a gain changes from one block to the next, at most."""

QUIETEST_START_LU = -6.0
"""A song that begins quietly is followed down to there, beside its whole loudness."""

FADE_S = 0.02
"""At the end, where the song's length cuts what still rings."""


@dataclass(frozen=True)
class MixParts:
    """What a remix is made of; all at 44.1 kHz, [1 or 2, about T] each.

    Args:
        song: [2, T], the original; sets the loudness.
        original_vocal: of the song; sets the vocal's time and its balance.
        vocal: as converted.
        band: its tracks by role.
    """

    song: Samples
    original_vocal: Samples
    vocal: Samples
    band: Mapping[Role, Samples]


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
    """Mix a remix whose parts are all there.

    Args:
        parts: what it is made of.
        options: loudness, and the vocal's level beside what was found.

    Returns:
        [2, T] at 44.1 kHz, finite, its true peak at most -1 dBTP; and the report. Where every
        part is silent, so is the mix.
    """
    mixer, length = Mixer(parts.song, options), parts.song.shape[1]
    mixer.add_original_vocal(fit(parts.original_vocal, length))
    mixer.add_vocal(fit(parts.vocal, length))
    mixer.add_band({role: fit(track, length) for role, track in parts.band.items()}, length)
    return Audio(mixer.take(), SAMPLE_RATE_HZ), mixer.report()


class Mixer:
    """Mixes a song's remix while its parts arrive, each in order and without gaps.

    What comes out depends on the parts alone, not on the pieces in which they arrive.

    Args:
        song: [2, T], the original.
        options: loudness, and the vocal's level beside what was found.
    """

    def __init__(self, song: Samples, options: MixOptions) -> None:
        self._song, self._options = song, options
        self._length = song.shape[1]
        self._arrived = {name: _Stretch() for name in ("original", "vocal", "band")}
        self._mixed = 0
        self._lag: int | None = None
        self._lag_correlation = 0.0
        meter = LoudnessMeter(SAMPLE_RATE_HZ)
        meter.push(song)
        self._song_powers = meter.powers
        self._original, self._accompaniment = _Track(), _Track()
        self._vocal, self._roles = _Track(), {role: _Track() for role in ROLES}
        self._band_gain, self._master_gain = _Gain(), _Gain()
        self._backing_powers = self._sum_powers = self._raised_powers = np.zeros(0)
        self._limiter = Limiter(SAMPLE_RATE_HZ, PEAK_CEILING_DB)
        self._finished = LoudnessMeter(SAMPLE_RATE_HZ)
        self._last = np.zeros((2, 0), np.float32)
        self._peak_db = -inf

    def add_original_vocal(self, samples: Samples) -> None:
        """The next samples of the song's own vocal, [1 or 2, t]."""
        self._arrived["original"].push(to_stereo(samples))

    def add_vocal(self, samples: Samples) -> None:
        """The next samples of the converted vocal, [1 or 2, t]."""
        self._arrived["vocal"].push(to_stereo(samples))

    def add_band(self, tracks: Mapping[Role, Samples], n_samples: int) -> None:
        """The next samples of the band, [2, n_samples] by role; who is left out is silent."""
        stacked = np.zeros((2 * len(ROLES), n_samples), np.float32)
        for index, role in enumerate(ROLES):
            if role in tracks:
                stacked[2 * index : 2 * index + 2] = tracks[role]
        self._arrived["band"].push(stacked)

    def take(self) -> Samples:
        """What is finished since the last call, [2, t]; in the end all T samples were given."""
        given = [np.zeros((2, 0), np.float32)]
        while (end := self._next_end()) is not None:
            given.append(self._mix(self._mixed, end))
            self._mixed = end
        return np.concatenate(given, axis=1)

    def report(self) -> MixReport:
        """What was found and done; once all is taken."""
        balance_lu = self._original_balance_lu()
        warnings: tuple[str, ...] = ()
        if balance_lu is not None and balance_lu < NO_VOCAL_LU:
            warnings = (
                f"The vocal stem is {-balance_lu:.0f} LU below the accompaniment, a singer's at "
                f"most {-NO_VOCAL_LU:.0f}: no vocal was found, and what is in the stem stays that "
                "low.",
            )
        return MixReport(
            vocal_lag_ms=1000 * (self._lag or 0) / SAMPLE_RATE_HZ,
            lag_correlation=self._lag_correlation,
            original_balance_lu=balance_lu,
            balance_lu=_difference(
                gated_lufs(self._vocal.applied), gated_lufs(self._backing_powers)
            ),
            loudness_lufs=_finite(gated_lufs(self._finished.powers)),
            true_peak_db=_finite(self._peak_db),
            warnings=warnings,
        )

    def _next_end(self) -> int | None:
        """Where the next block ends, if all that it needs is there."""
        end = min(self._mixed + BLOCK_SAMPLES, self._length)
        needed = {"original": end, "band": end}
        needed["vocal"] = min(end + round(MAX_LAG_S * SAMPLE_RATE_HZ), self._length)
        is_there = all(self._arrived[name].end >= need for name, need in needed.items())
        return end if is_there and end > self._mixed else None

    def _mix(self, start: int, end: int) -> Samples:
        original = self._arrived["original"].read(start, end)
        band = self._arrived["band"].read(start, end).reshape(len(ROLES), 2, end - start)
        lag = self._find_lag(original, start, end)
        vocal = self._arrived["vocal"].read(start + lag, end + lag)
        for stretch in self._arrived.values():
            stretch.drop(end - round(MAX_LAG_S * SAMPLE_RATE_HZ))

        self._original.measure(original)
        self._accompaniment.measure(self._song[:, start:end] - original)
        self._vocal.measure(vocal)
        for role, track in zip(ROLES, band, strict=True):
            self._roles[role].measure(track)
        self._decide_gains(end)

        mix = vocal * self._ramp(end - start, self._vocal.gain)
        for role, track in zip(ROLES, band, strict=True):
            if track.any():
                ramp = self._ramp(end - start, self._roles[role].gain, self._band_gain)
                mix += pan(track, ROLE_PAN[role]) * ramp
        fade = min(round(FADE_S * SAMPLE_RATE_HZ), self._length // 4)
        if end == self._length and fade:
            fade = min(fade, end - start)
            mix[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        return self._finish(mix, end)

    def _decide_gains(self, end: int) -> None:
        """Set the gains of this block out of all that was measured up to its end."""
        for role, track in self._roles.items():
            missing_lu = _difference(ROLE_LUFS[role] - 23.0, track.lufs)
            track.gain.set(None if missing_lu is None else min(missing_lu, MAX_TRACK_GAIN_DB))
        applied = [track.apply(track.gain) for track in self._roles.values()]
        roles = np.sum(applied, axis=0)
        wanted_lufs = self._accompaniment.lufs + self._lift_lu(end)
        self._band_gain.set(_difference(wanted_lufs, gated_lufs(roles)))
        self._backing_powers = _grown(self._backing_powers, roles, self._band_gain)
        backing_lufs = gated_lufs(self._backing_powers)
        if backing_lufs == -inf:
            backing_lufs = wanted_lufs

        balance_lu = self._original_balance_lu()
        if balance_lu is None:
            balance_lu = DEFAULT_BALANCE_LU
        elif balance_lu >= NO_VOCAL_LU:
            balance_lu = float(np.clip(balance_lu, MIN_BALANCE_LU, MAX_BALANCE_LU))
        balance_lu += self._options.vocal_gain_db
        self._vocal.gain.set(_difference(backing_lufs + balance_lu, self._vocal.lufs))
        self._vocal.apply(self._vocal.gain)
        self._sum_powers = self._vocal.applied + self._backing_powers

    def _finish(self, mix: Samples, end: int) -> Samples:
        """The block at its loudness, below the ceiling."""
        is_last = end == self._length
        wanted_lufs = self._options.loudness_lufs + self._lift_lu(end) + self._so_far_lu(end)
        raised_lufs = gated_lufs(self._raised_powers)
        if isfinite(raised_lufs):
            lost_lu = max(0.0, raised_lufs - gated_lufs(self._finished.powers))
            missing_lu = _difference(wanted_lufs, gated_lufs(self._sum_powers))
            self._master_gain.set(None if missing_lu is None else missing_lu + lost_lu)
        elif isfinite(measured := loudness_lufs(Audio(mix, SAMPLE_RATE_HZ))):

            def limited(gain_db: float) -> tuple[Samples, float]:
                trial = deepcopy(self._limiter).push(mix * _factor(gain_db), is_last=True)
                return trial, loudness_lufs(Audio(trial, SAMPLE_RATE_HZ))

            self._master_gain.set(find_gain(limited, measured, wanted_lufs))
        self._raised_powers = _grown(self._raised_powers, self._sum_powers, self._master_gain)
        raised = mix * self._ramp(mix.shape[1], self._master_gain)
        finished = self._limiter.push(raised, is_last=is_last)
        assert np.isfinite(finished).all()
        self._finished.push(finished)
        around = np.concatenate([self._last, finished], axis=1)
        self._peak_db = max(self._peak_db, true_peak_db(around))
        self._last = around[:, -32:]  # more than the peak filter's reach
        return finished

    def _find_lag(self, original: Samples, start: int, end: int) -> int:
        """The lag, once there is a block in which it shows."""
        if self._lag is None:
            lag, correlation = find_lag(original, self._arrived["vocal"].read(start, end))
            self._lag_correlation = max(self._lag_correlation, correlation)
            if correlation > 0:
                self._lag = lag
        return self._lag or 0

    def _so_far_lu(self, end: int) -> float:
        """Loudness of the song until here beside all of it; 0 where either is silent."""
        steps = round(len(self._song_powers) * end / self._length)
        until_here = gated_lufs(self._song_powers[:steps])
        return _difference(until_here, gated_lufs(self._song_powers)) or 0.0

    def _lift_lu(self, end: int) -> float:
        """How much more than the song's a quiet beginning is lifted."""
        return max(0.0, QUIETEST_START_LU - self._so_far_lu(end))

    def _original_balance_lu(self) -> float | None:
        return _difference(self._original.lufs, self._accompaniment.lufs)

    @staticmethod
    def _ramp(length: int, *gains: _Gain) -> NDArray[np.float32] | np.float32:
        """The product of gains, from what they were to what they are."""
        begin = float(np.prod([_factor(gain.before_db) for gain in gains]))
        end = float(np.prod([_factor(gain.db) for gain in gains]))
        if begin == end:
            return np.float32(end)
        ramp = np.full(length, end, np.float32)
        rising = min(round(RAMP_S * SAMPLE_RATE_HZ), length)
        ramp[:rising] = np.linspace(begin, end, rising)
        return ramp


class _Stretch:
    """Samples that have arrived and are still needed; silence around them."""

    def __init__(self) -> None:
        self._pieces: list[Samples] = []
        self._start = self.end = 0

    def push(self, samples: Samples) -> None:
        self._pieces.append(samples)
        self.end += samples.shape[1]

    def read(self, start: int, end: int) -> Samples:
        whole = np.concatenate(self._pieces, axis=1)
        self._pieces = [whole]
        read = np.zeros((whole.shape[0], end - start), np.float32)
        first, last = max(start, self._start), min(end, self.end)
        if last > first:
            read[:, first - start : last - start] = whole[
                :, first - self._start : last - self._start
            ]
        return read

    def drop(self, before: int) -> None:
        """Forget what lies before."""
        if before > self._start:
            self._pieces = [np.concatenate(self._pieces, axis=1)[:, before - self._start :]]
            self._start = before


class _Gain:
    """A gain in dB that is decided block by block."""

    def __init__(self) -> None:
        self.before_db = self.db = 0.0
        self._is_set = False

    def set(self, db: float | None) -> None:
        """Go to a value, or towards it; None keeps the last one."""
        self.before_db = self.db
        if db is None:
            return
        if self._is_set:
            self.db = float(np.clip(db, self.db - MAX_STEP_DB, self.db + MAX_STEP_DB))
        else:  # nothing of it was heard yet
            self.before_db = self.db = db
        self._is_set = True


class _Track:
    """What is measured of a track, and its gain."""

    def __init__(self) -> None:
        self._meter = LoudnessMeter(SAMPLE_RATE_HZ)
        self.gain = _Gain()
        self.applied = np.zeros(0)

    def measure(self, samples: Samples) -> None:
        self._meter.push(samples)

    @property
    def lufs(self) -> float:
        return gated_lufs(self._meter.powers)

    def apply(self, gain: _Gain) -> NDArray[np.float64]:
        """[steps]: powers of all so far, what is new with this gain."""
        self.applied = _grown(self.applied, self._meter.powers, gain)
        return self.applied


def _grown(
    applied: NDArray[np.float64], powers: NDArray[np.float64], gain: _Gain
) -> NDArray[np.float64]:
    """Powers of steps, the new ones with a gain."""
    return np.append(applied, powers[len(applied) :] * float(_factor(gain.db)) ** 2)


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


def _difference(a_lufs: float, b_lufs: float) -> float | None:
    """A - b, where neither is silence."""
    return a_lufs - b_lufs if a_lufs > -inf and b_lufs > -inf else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _factor(gain_db: float) -> np.float32:
    return np.float32(10 ** (gain_db / 20))
