"""The mix: on time, in balance, at its loudness, below its ceiling, of the song's length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from remix.audio import Audio, Samples
from remix.loudness import loudness_lufs, master, true_peak_db
from remix.mix_tracks import (
    DEFAULT_BALANCE_LU,
    MAX_BALANCE_LU,
    MIN_BALANCE_LU,
    SAMPLE_RATE_HZ,
    Mixer,
    MixParts,
    find_lag,
    fit,
    mix_tracks,
    pan,
)
from remix.notes import ROLES, Role
from remix.options import MixOptions
from tests.test_loudness import reference_peak_db

LENGTH = 8 * SAMPLE_RATE_HZ + 123


def singing(seed: int = 0, pitch_hz: float = 220.0, harmonics: int = 12) -> Samples:
    """[1, T]: syllables at odd times with pauses, a glottal tone with vibrato."""
    rng = np.random.default_rng(seed)
    at = np.arange(LENGTH) / SAMPLE_RATE_HZ
    phase = 2 * np.pi * pitch_hz * at + 2 * np.sin(2 * np.pi * 5.5 * at)
    tone = sum(np.sin(k * phase) / k for k in range(1, harmonics))
    syllables = np.zeros(LENGTH)
    start = 0.2
    while start < 7.5:
        length_s = rng.uniform(0.12, 0.5)
        inside = np.clip(np.minimum(at - start, start + length_s - at) / 0.02, 0, 1)
        syllables += inside * rng.uniform(0.3, 1)
        start += length_s + rng.uniform(0.02, 0.2)
    return np.array([0.2 * syllables * tone], np.float32)


def band(seed: int = 1, level: float = 0.1) -> dict[Role, Samples]:
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(LENGTH) % 11_025 / 3_000)
    return {
        role: (level * decay * rng.standard_normal((2, LENGTH))).astype(np.float32)
        for role in ROLES
    }


def parts(vocal: Samples | None = None, **others: Any) -> MixParts:
    accompaniment = 0.1 * np.random.default_rng(2).standard_normal((2, LENGTH))
    values: dict[str, Any] = {
        "vocal": singing() if vocal is None else vocal,
        "band": band(),
        "original_vocal": singing(),
        "accompaniment": accompaniment.astype(np.float32),
    }
    values |= others
    song = fit(values["original_vocal"], LENGTH) + values.pop("accompaniment")
    return MixParts(song=song, **values)


SILENCE = np.zeros((2, LENGTH), np.float32)


def assert_is_finished(remix: Audio, length: int = LENGTH) -> None:
    assert remix.sample_rate_hz == 44_100
    assert remix.samples.shape == (2, length)
    assert remix.samples.dtype == np.float32
    assert np.isfinite(remix.samples).all()
    assert true_peak_db(remix.samples) <= -1
    assert reference_peak_db(remix.samples) <= -1  # by another, longer filter too


@pytest.mark.parametrize("target_lufs", [-15.5, -14.0, -9.5])
def test_mix_has_its_loudness_peak_and_length(target_lufs: float) -> None:
    remix, report = mix_tracks(parts(), MixOptions(loudness_lufs=target_lufs))
    assert_is_finished(remix)
    assert abs(loudness_lufs(remix) - target_lufs) < 0.3
    assert report.loudness_lufs == pytest.approx(loudness_lufs(remix))
    assert report.true_peak_db is not None
    assert report.true_peak_db <= -1


@pytest.mark.parametrize("decay_s", [0.02, 0.05, 0.2])
def test_drum_hits_alone_reach_the_loudness_by_the_limiter(decay_s: float) -> None:
    decay = np.exp(-(np.arange(LENGTH) % 11_025) / (decay_s * SAMPLE_RATE_HZ))
    hits = decay * np.random.default_rng(0).standard_normal((2, LENGTH))
    remix = master(Audio(hits.astype(np.float32), SAMPLE_RATE_HZ), -14.0, -1.0)
    assert_is_finished(remix)
    assert abs(loudness_lufs(remix) + 14) < 0.3


@pytest.mark.parametrize("lag_ms", [-45.0, -10.0, 0.0, 3.0, 20.0, 49.0])
@pytest.mark.parametrize("octave", [0.5, 1.0, 2.0])
def test_lag_of_another_voice_is_found(lag_ms: float, octave: float) -> None:
    rng = np.random.default_rng(5)
    other = singing(pitch_hz=220 * octave * 1.01, harmonics=5)
    other = 0.4 * other + 0.002 * rng.standard_normal(other.shape).astype(np.float32)
    lag = round(lag_ms / 1000 * SAMPLE_RATE_HZ)
    found, correlation = find_lag(singing(), np.roll(other, lag, axis=1))
    assert correlation > 0.5
    assert abs(found - lag) / SAMPLE_RATE_HZ < 0.0015  # a hop and a half of the envelope


def test_lag_of_the_same_voice_is_found_to_a_few_samples() -> None:
    found, correlation = find_lag(singing(), np.roll(singing(), 700, axis=1))
    assert abs(found - 700) <= 8
    assert correlation > 0.9


def test_lag_of_unlike_sounds_is_none() -> None:
    assert find_lag(singing(0), SILENCE) == (0, 0.0)
    assert find_lag(SILENCE, singing(0)) == (0, 0.0)
    assert find_lag(singing(0), singing(7)) == (0, 0.0)
    assert find_lag(SILENCE[:, :10], SILENCE[:, :10]) == (0, 0.0)


def test_what_leaked_into_a_vocal_stem_is_not_lifted() -> None:
    """A song without a singer: the stem is 40 LU down, and so it stays, and the report says so."""
    leak = (0.01 * singing()).astype(np.float32)
    _, with_singer = mix_tracks(parts(), MixOptions())
    _, report = mix_tracks(parts(leak, original_vocal=leak), MixOptions())
    assert with_singer.warnings == ()
    assert "no vocal was found" in report.warnings[0]
    assert report.balance_lu == pytest.approx(report.original_balance_lu)
    assert report.balance_lu is not None
    assert report.balance_lu < -18


def test_mix_moves_a_late_vocal_back() -> None:
    late = np.roll(singing(), 882, axis=1)
    remix, report = mix_tracks(parts(late, band={}), MixOptions())
    assert abs(report.vocal_lag_ms - 20) < 0.5
    on_time, _ = mix_tracks(parts(band={}), MixOptions())
    found, _ = find_lag(on_time.samples, remix.samples)
    assert abs(found) <= 8


def balance_of(remix_parts: MixParts, options: MixOptions) -> float:
    """Loudness of the vocal beside the band, as they are in the mix.

    The mix is linear before the limiter, and its gains do not depend on the vocal's sign.
    """
    turned = MixParts(**{**vars(remix_parts), "vocal": -remix_parts.vocal})
    quiet = options.model_copy(update={"loudness_lufs": -15.5})
    plus, minus = (mix_tracks(each, quiet)[0].samples for each in (remix_parts, turned))
    vocal, backing = (np.asarray(both / 2, np.float32) for both in (plus - minus, plus + minus))
    return loudness_lufs(Audio(vocal, 44_100)) - loudness_lufs(Audio(backing, 44_100))


@pytest.mark.parametrize("level", [0.4, 1.0, 1.7])
def test_balance_of_vocal_and_band_is_the_songs(level: float) -> None:
    song = parts(original_vocal=level * singing(), vocal=0.01 * singing())
    _, report = mix_tracks(song, MixOptions())
    assert report.original_balance_lu is not None
    expected = np.clip(report.original_balance_lu, MIN_BALANCE_LU, MAX_BALANCE_LU)
    assert report.balance_lu == pytest.approx(expected)
    # The limiter takes from the louder moments of the one more than of the other.
    assert abs(balance_of(song, MixOptions()) - expected) < 1.0


def test_balance_follows_the_option() -> None:
    difference = balance_of(parts(), MixOptions(vocal_gain_db=6)) - balance_of(
        parts(), MixOptions()
    )
    assert abs(difference - 6) < 1.0  # the limiter, as above


@pytest.mark.parametrize("silent", ["vocal", "original_vocal", "accompaniment", "band"])
def test_silence_in_a_part_is_no_trouble(silent: str) -> None:
    value: Any = {} if silent == "band" else SILENCE
    remix, report = mix_tracks(parts(**{silent: value}), MixOptions())
    assert_is_finished(remix)
    assert abs(loudness_lufs(remix) + 14) < 0.3
    if silent in ("original_vocal", "accompaniment"):
        assert report.original_balance_lu is None
        assert report.balance_lu == pytest.approx(DEFAULT_BALANCE_LU)
    if silent in ("vocal", "band"):
        assert report.balance_lu is None


def test_silence_in_everything_is_silence() -> None:
    silent = parts(SILENCE, band={}, original_vocal=SILENCE, accompaniment=SILENCE)
    remix, report = mix_tracks(silent, MixOptions())
    assert not remix.samples.any()
    assert report.loudness_lufs is None
    assert report.true_peak_db is None


@pytest.mark.parametrize("length", [1, 2, 100, 20_000])
def test_mix_of_very_short_song_has_its_length(length: int) -> None:
    short = MixParts(
        song=band()["piano"][:, :length],
        vocal=singing()[:, 20_000 : 20_000 + length],
        band={"drums": band()["drums"][:, :length]},
        original_vocal=singing()[:, 20_000 : 20_000 + length],
    )
    remix, _ = mix_tracks(short, MixOptions())
    assert_is_finished(remix, length)


def test_parts_that_are_too_short_or_too_long_are_fitted() -> None:
    uneven = parts(singing()[:, :-5_000], band={"bass": np.tile(band()["bass"], 2)})
    assert_is_finished(mix_tracks(uneven, MixOptions())[0])


def test_end_of_the_song_is_faded() -> None:
    remix, _ = mix_tracks(parts(), MixOptions())
    assert np.abs(remix.samples[:, -1]).max() == 0


def test_pan_keeps_the_power_and_the_length_is_kept() -> None:
    ones = np.ones((2, 4), np.float32)
    for place in (-1.0, -0.3, 0.0, 0.7, 1.0):
        assert np.square(pan(ones, place)).sum() == pytest.approx(8, rel=1e-6)
    assert pan(ones, 0.5)[1, 0] > pan(ones, 0.5)[0, 0]
    assert fit(np.ones((1, 3), np.float32), 5).tolist() == [[1, 1, 1, 0, 0]] * 2


def long_parts(seconds: float) -> MixParts:
    """Several blocks: the parts over and over, the band four times as loud from the middle on."""
    length = round(seconds * SAMPLE_RATE_HZ)

    def repeated(samples: Samples) -> Samples:
        return np.tile(samples, (1, -(-length // samples.shape[1])))[:, :length]

    once = parts()
    swell = np.where(np.arange(length) < length // 2, 0.25, 1).astype(np.float32)
    return MixParts(
        song=repeated(once.song),
        original_vocal=repeated(once.original_vocal),
        vocal=repeated(0.3 * singing(pitch_hz=440)),
        band={role: repeated(track) * swell for role, track in once.band.items()},
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_mix_is_the_same_however_its_parts_arrive(seed: int) -> None:
    whole, length = long_parts(31.0), round(31.0 * SAMPLE_RATE_HZ)
    rng = np.random.default_rng(seed)
    mixer, given = Mixer(whole.song, MixOptions()), []
    at = {"original": 0, "vocal": 0, "band": 0}
    while any(done < length for done in at.values()):
        name = str(rng.choice([name for name, done in at.items() if done < length]))
        piece = slice(at[name], min(length, at[name] + int(rng.integers(1, 500_000))))
        at[name] = piece.stop
        if name == "original":
            mixer.add_original_vocal(whole.original_vocal[:, piece])
        elif name == "vocal":
            mixer.add_vocal(whole.vocal[:, piece])
        else:
            tracks = {role: track[:, piece] for role, track in whole.band.items()}
            mixer.add_band(tracks, piece.stop - piece.start)
        given.append(mixer.take())
    expected, report = mix_tracks(whole, MixOptions())
    assert np.array_equal(np.concatenate(given, axis=1), expected.samples)
    assert mixer.report() == report


def test_first_block_is_finished_before_the_second_is_there() -> None:
    whole, early = long_parts(31.0), 11 * SAMPLE_RATE_HZ
    mixer = Mixer(whole.song, MixOptions())
    mixer.add_original_vocal(whole.original_vocal[:, :early])
    mixer.add_vocal(whole.vocal[:, :early])
    mixer.add_band({role: track[:, :early] for role, track in whole.band.items()}, early)
    first = mixer.take()
    assert first.shape[1] > 9.5 * SAMPLE_RATE_HZ
    expected, _ = mix_tracks(whole, MixOptions())
    assert np.array_equal(first, expected.samples[:, : first.shape[1]])


def test_long_mix_reaches_its_loudness_and_its_balance() -> None:
    whole = long_parts(61.0)
    remix, report = mix_tracks(whole, MixOptions())
    assert_is_finished(remix, whole.song.shape[1])
    # Gains are decided block by block, each seeing what came before: within half a unit.
    assert abs(loudness_lufs(remix) + 14) < 0.5
    assert report.balance_lu is not None
    assert report.original_balance_lu is not None
    assert abs(report.balance_lu - report.original_balance_lu) < 1.0


def test_quiet_beginning_stays_quiet() -> None:
    whole = long_parts(61.0)
    begin = 20 * SAMPLE_RATE_HZ
    swell = np.where(np.arange(whole.song.shape[1]) < begin, 0.4, 1).astype(np.float32)
    song = MixParts(
        whole.song * swell, whole.original_vocal * swell, whole.vocal * swell, whole.band
    )
    remix, _ = mix_tracks(song, MixOptions())
    start, rest = remix.samples[:, :begin], remix.samples[:, begin:]
    quieter_lu = loudness_lufs(Audio(rest, 44_100)) - loudness_lufs(Audio(start, 44_100))
    assert 3 < quieter_lu < 11  # 8 dB down in the song; a beginning is lifted to -6
