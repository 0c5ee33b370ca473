"""The flow of voice conversion: melody, windows, phrases, loudness. The singer is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.audio import Samples
from remix.convert_voice import (
    HARMONICS,
    ConvertedVocal,
    Melody,
    Vocal,
    Voice,
    content_features,
    convert_voice,
    harmonic_phases,
    join_chunks,
    track_in_frames,
)
from remix.errors import InvalidModel, NotFound, RunnerUnavailable
from remix.manifest import read_manifest
from remix.pitch import (
    PitchTrack,
    clean_pitch,
    correct_octave_slips,
    interpolate_unvoiced,
    loud_level_db,
    octaves_to_range,
    voiced_frames,
)
from remix.vocal_frames import (
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    Floats,
    Mask,
    Phrase,
    add_phrase,
    analysis_windows,
    expand_content,
    follow_loudness,
    frame_level_db,
    grow_level_db,
    join_windows,
    next_phrase,
    repeat_content,
)
from runners.convert_voice import served_models

VOICE = Voice("tone", "voice", 0, 150.0, 320.0, "content", "pitch", 400, 4, 0.35)
FULL_SIZE = replace(
    VOICE, sample_rate_hz=44100, frame_samples=512, window_frames=512,
    content_expansion="repeat", unvoiced_f0="interpolated",
)  # fmt: skip
"""As so-vits-svc 4.0 counts: 86.13 frames/s, HuBERT's features repeated."""
VOICES = pytest.mark.parametrize("voice", [VOICE, FULL_SIZE], ids=["16 kHz", "44.1 kHz"])


class SineSinger:
    """An Infer whose pitch estimator takes the strongest partial and whose voice sings a sine."""

    def __init__(self, gain: float = 0.5, voice: Voice = VOICE) -> None:
        self.gain = gain
        self.voice = voice
        self.calls: list[str] = []

    async def __call__(
        self, model: str, inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        self.calls.append(model)
        await asyncio.sleep(0)
        if model == "content":
            n_features = content_features(WINDOW_SAMPLES, self.voice)
            return {"content": np.ones((1, n_features, 3), np.float32)}
        if model == "pitch":
            frames = inputs["samples"].reshape(1, -1, 10 * FRAME_SAMPLES)
            spectra = np.abs(np.fft.rfft(frames * np.hanning(frames.shape[2]), 16000, axis=2))
            f0_hz = np.repeat(spectra.argmax(axis=2), 10, axis=1).astype(np.float32)
            return {"f0_hz": f0_hz, "confidence": np.ones_like(f0_hz)}
        hop, rate_hz = self.voice.frame_samples, self.voice.sample_rate_hz
        step = inputs["f0_hz"][:, :, None] / rate_hz * np.arange(1, hop + 1)
        wave = np.sin(2 * np.pi * (inputs["phase"][:, :, :1] + step)) * inputs["voiced"][:, :, None]
        return {"audio": (self.gain * wave).reshape(1, -1).astype(np.float32)}


def tone(hz: float, seconds: float, rate_hz: int = 44100) -> Samples:
    time_s = np.arange(int(seconds * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * hz * time_s)).astype(np.float32)[None]


def convert(
    vocal: Samples, infer: SineSinger, rate_hz: int = 44100, chunk: int = 50_000, **options: Any
) -> ConvertedVocal:
    async def chunks() -> AsyncIterator[Samples]:
        for start in range(0, vocal.shape[1], chunk):
            yield vocal[:, start : start + chunk]

    length = Vocal(vocal.shape[1], rate_hz)
    sung = convert_voice(chunks(), length, infer.voice, infer, **options)
    return asyncio.run(join_chunks(sung, length))


def dominant_hz(samples: NDArray[np.float32], rate_hz: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * len(samples)))
    return float(np.argmax(spectrum)) * rate_hz / (4 * len(samples))


@VOICES
@pytest.mark.parametrize(("hz", "octaves"), [(220.0, 0), (440.0, -1), (110.0, 1), (1000.0, -2)])
def test_pitch_follows_the_vocal_in_whole_octaves(hz: float, octaves: int, voice: Voice) -> None:
    sung = convert(tone(hz, 6.0), SineSinger(voice=voice))
    assert sung.melody.octaves == octaves
    middle = sung.audio.samples[0, 44100:-44100]
    cents = 1200 * np.log2(dominant_hz(middle, 44100) / (hz * 2.0**octaves))
    assert abs(cents) < 15  # 1 Hz at 110 Hz, which the fake estimator rounds to


def test_octaves_are_taken_from_the_caller_when_given() -> None:
    sung = convert(tone(220.0, 2.0), SineSinger(), octaves=1)
    assert sung.melody.octaves == 1
    assert dominant_hz(sung.audio.samples[0], 44100) == pytest.approx(440.0, abs=5)


@VOICES
@pytest.mark.parametrize("n_samples", [0, 1, 159, 44100, 44100 * 9 + 7, 737_352, 44100 * 21])
def test_length_is_that_of_the_vocal_at_any_length(n_samples: int, voice: Voice) -> None:
    vocal = tone(220.0, 22.0)[:, :n_samples]
    assert convert(vocal, SineSinger(voice=voice)).audio.samples.shape == (1, n_samples)


def test_result_does_not_depend_on_how_the_vocal_was_chunked() -> None:
    vocal = tone(220.0, 12.0)
    first, second = (convert(vocal, SineSinger(), chunk=size) for size in (7_001, 10**7))
    np.testing.assert_allclose(first.audio.samples, second.audio.samples, atol=1e-6)


def test_windows_are_analysed_before_the_vocal_has_ended() -> None:
    singer = SineSinger()
    seen_before_last: list[int] = []

    async def chunks() -> AsyncIterator[Samples]:
        vocal = tone(220.0, 20.0)
        for start in range(0, vocal.shape[1], 44100):
            await asyncio.sleep(0.001)
            seen_before_last.append(len(singer.calls))
            yield vocal[:, start : start + 44100]

    length = Vocal(20 * 44100, 44100)
    asyncio.run(join_chunks(convert_voice(chunks(), length, VOICE, singer), length))
    assert seen_before_last[-1] >= 4  # two windows, two models each


def test_silence_stays_silence_between_sung_lines() -> None:
    silence = np.zeros((1, 3 * 44100), np.float32)
    vocal = np.concatenate([silence, tone(220.0, 3.0), silence], axis=1)
    sung = convert(vocal, SineSinger()).audio.samples[0]
    for quiet in (sung[: int(2.9 * 44100)], sung[int(6.1 * 44100) :]):
        assert np.sqrt(np.mean(quiet**2)) < 1e-3  # -60 dBFS
    assert np.sqrt(np.mean(sung[4 * 44100 : 5 * 44100] ** 2)) > 0.1


def test_silent_vocal_runs_no_voice_model() -> None:
    singer = SineSinger()
    sung = convert(np.zeros((2, 5 * 44100), np.float32), singer)
    assert not sung.audio.samples.any()
    assert "voice" not in singer.calls
    assert sung.melody == Melody()


def test_dynamics_of_the_original_are_kept_whatever_the_voice_does() -> None:
    vocal = tone(220.0, 8.0)
    vocal[:, : 4 * 44100] *= 0.1
    sung = convert(vocal, SineSinger(gain=0.2)).audio.samples[0]
    for second in (1, 2, 5, 6):
        span = slice(second * 44100, (second + 1) * 44100)
        ratio = np.std(sung[span]) / np.std(vocal[0, span])
        assert abs(20 * np.log10(ratio)) < 1.0


@VOICES
def test_joins_leave_no_step_in_a_steady_tone(voice: Voice) -> None:
    sung = convert(tone(220.0, 20.0), SineSinger(voice=voice)).audio.samples[0, 4410:-4410]
    curvature = np.abs(np.diff(sung, 2))
    # A click would stand out; a sine of 220 Hz has the same curvature all over.
    assert curvature.max() < 1.5 * np.percentile(curvature, 99)


def test_same_seed_same_sound() -> None:
    vocal = tone(220.0, 2.0)
    first, second = (convert(vocal, SineSinger(), noise_seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.audio.samples, second.audio.samples)


def test_failing_runner_ends_the_conversion_and_leaves_no_task() -> None:
    class Failing(SineSinger):
        async def __call__(
            self, model: str, inputs: Mapping[str, NDArray[Any]]
        ) -> dict[str, NDArray[Any]]:
            raise RunnerUnavailable("gone")

    async def run() -> int:
        async def chunks() -> AsyncIterator[Samples]:
            yield tone(220.0, 30.0)

        with pytest.raises(RunnerUnavailable):
            length = Vocal(30 * 44100, 44100)
            await join_chunks(convert_voice(chunks(), length, VOICE, Failing()), length)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(run()) == 0


def test_progress_grows_to_the_end() -> None:
    told: list[float] = []
    convert(tone(220.0, 20.0), SineSinger(), progress=lambda stage, share: told.append(share))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_windows_joined_are_the_whole() -> None:
    samples = np.arange(3 * SAMPLE_RATE_HZ * 8 + 480, dtype=np.float32)
    windows = analysis_windows(samples)
    np.testing.assert_array_equal(join_windows(windows, len(samples)), samples)


def cut_phrases(level_db: Floats, voiced: Mask) -> list[Phrase]:
    phrases = [next_phrase(level_db, voiced, 0, 400)]
    while phrases[-1].stop < len(level_db):
        phrases.append(next_phrase(level_db, voiced, phrases[-1].stop, 400))
    return phrases


def test_level_of_a_growing_sound_is_that_of_the_whole() -> None:
    samples = np.random.default_rng(0).standard_normal(FRAME_SAMPLES * 50).astype(np.float32)
    samples *= np.linspace(0, 1, len(samples), dtype=np.float32)
    grown = np.zeros(0, np.float32)
    for n_frames in (0, 1, 2, 17, 49, 50):
        known = samples[: (n_frames + 3) * FRAME_SAMPLES]
        grown = grow_level_db(grown, known, n_frames)
    np.testing.assert_allclose(grown, frame_level_db(samples), atol=1e-4)


def test_phrases_cover_the_vocal_and_fit_their_windows() -> None:
    rng = np.random.default_rng(0)
    level_db = rng.uniform(-60, -10, 2345).astype(np.float32)
    phrases = cut_phrases(level_db, level_db > -30)
    assert phrases[0].start == 0
    assert phrases[-1].stop == 2345
    assert all(a.stop == b.start for a, b in zip(phrases, phrases[1:], strict=False))
    assert all(0 < phrase.stop - phrase.start <= 350 for phrase in phrases)


def test_phrases_are_cut_in_the_quietest_frame() -> None:
    level_db = np.full(500, -20.0, np.float32)
    level_db[300] = -50.0
    assert next_phrase(level_db, np.ones(500, np.bool_), 0, 400).stop == 300


def test_phrases_that_agree_are_joined_exactly() -> None:
    phrases = cut_phrases(np.zeros(1000, np.float32), np.ones(1000, np.bool_))
    vocal = np.random.default_rng(0).standard_normal(1000 * FRAME_SAMPLES).astype(np.float32)
    padded = np.pad(vocal, 500 * FRAME_SAMPLES)
    windows = [
        padded[(phrase.first + 500) * FRAME_SAMPLES :][: 400 * FRAME_SAMPLES] for phrase in phrases
    ]
    joined = np.zeros_like(vocal)
    for phrase, window in zip(phrases, windows, strict=True):
        add_phrase(joined, phrase, window)
    np.testing.assert_allclose(joined, vocal, atol=1e-5)


def test_constant_content_stays_constant_when_expanded() -> None:
    content = np.full((50, 3), 2.0, np.float32)
    np.testing.assert_array_equal(expand_content(content, -5, 120), np.full((120, 3), 2.0))


def test_linear_content_stays_linear_when_expanded() -> None:
    content = np.arange(50, dtype=np.float32)[:, None]
    # Frame i is centred at sample 160 i + 80, feature j at 320 j.
    np.testing.assert_allclose(expand_content(content, 10, 4)[:, 0], [5.25, 5.75, 6.25, 6.75])


def test_repeated_content_keeps_its_order_and_its_count() -> None:
    content = np.arange(50, dtype=np.float32)[:, None]
    repeated = repeat_content(content, -3, 92, 50 / 86)[:, 0]
    np.testing.assert_array_equal(repeated[:3], 0.0)
    np.testing.assert_array_equal(repeated[-3:], 49.0)
    assert set(np.diff(repeated)) == {0.0, 1.0}


def test_melody_at_another_frame_rate_is_the_same_melody() -> None:
    time_s = (np.arange(1000) + 0.5) / 100
    track = PitchTrack((220.0 * 2.0 ** (time_s / 10)).astype(np.float32), time_s > 5.0)
    moved = track_in_frames(track, 861, FULL_SIZE)
    begin_s = np.arange(861) * 512 / 44100
    inside = (begin_s > 0.005) & (begin_s < 9.995)  # before the first estimate it is held
    expected = 220.0 * 2.0 ** (begin_s / 10)
    np.testing.assert_allclose(moved.f0_hz[inside], expected[inside], rtol=1e-5)
    assert np.argmax(moved.voiced) == pytest.approx(5.0 * 44100 / 512, abs=1)


def test_loudness_follows_the_original_and_silence_wins() -> None:
    rng = np.random.default_rng(0)
    original = rng.standard_normal(16000).astype(np.float32) * 0.1
    original[8000:] = 0.0
    followed = follow_loudness(rng.standard_normal(16000).astype(np.float32), original)
    assert np.std(followed[1600:6400]) == pytest.approx(0.1, rel=0.05)
    assert np.abs(followed[9000:]).max() < 1e-3


def test_level_of_a_full_scale_sine_is_minus_3_db() -> None:
    level_db = frame_level_db(tone(1000.0, 1.0, 16000)[0] / 0.3)
    np.testing.assert_allclose(level_db, -3.01, atol=0.01)


def test_octave_slips_are_moved_back() -> None:
    f0_hz = np.full(300, 220.0, np.float32)
    f0_hz[100:110] *= 2
    f0_hz[200:205] /= 2
    corrected = correct_octave_slips(f0_hz, np.ones(300, np.bool_))
    np.testing.assert_allclose(corrected, 220.0)


def test_sung_octave_leap_is_kept() -> None:
    f0_hz = np.concatenate([np.full(100, 220.0), np.full(100, 440.0)]).astype(np.float32)
    np.testing.assert_array_equal(correct_octave_slips(f0_hz, np.ones(200, np.bool_)), f0_hz)


def test_unvoiced_frames_are_interpolated_and_the_mask_is_kept() -> None:
    f0_hz = np.array([100.0] * 20 + [999.0] * 20 + [400.0] * 20, np.float32)
    confidence = np.array([1.0] * 20 + [0.0] * 20 + [1.0] * 20, np.float32)
    track = clean_pitch(f0_hz, confidence, np.full(60, -20.0, np.float32), -20.0)
    assert track.voiced.tolist() == [True] * 20 + [False] * 20 + [True] * 20
    assert np.all(np.diff(track.f0_hz[19:41]) > 0)
    assert track.f0_hz[29] == pytest.approx(200.0, rel=0.05)  # half way in log frequency


def test_bleed_far_below_the_singer_is_unvoiced() -> None:
    level_db = np.array([-15.0] * 50 + [-58.0] * 50, np.float32)
    voiced = voiced_frames(np.ones(100, np.float32), level_db, loud_level_db(level_db))
    assert voiced[:50].all()
    assert not voiced[50:].any()


def test_melody_without_a_voiced_frame_has_a_pitch_all_the_same() -> None:
    f0_hz = interpolate_unvoiced(np.zeros(5, np.float32), np.zeros(5, np.bool_))
    assert np.isfinite(f0_hz).all()
    assert octaves_to_range(PitchTrack(f0_hz, np.zeros(5, np.bool_)), 150.0, 320.0) == 0


@pytest.mark.parametrize(
    ("median_hz", "octaves"), [(151.0, 0), (319.0, 0), (330.0, -1), (140.0, 1), (700.0, -2)]
)
def test_fewest_octaves_bring_the_median_into_the_range(median_hz: float, octaves: int) -> None:
    f0_hz = np.array([median_hz * 0.5, median_hz, median_hz * 1.5], np.float32)
    assert octaves_to_range(PitchTrack(f0_hz, np.ones(3, np.bool_)), 150.0, 320.0) == octaves


def test_phase_of_the_fundamental_is_the_sum_of_its_steps() -> None:
    f0_hz = np.array([100.0, 250.0, 0.0, 100.0], np.float32)
    phase = harmonic_phases(f0_hz, np.zeros(HARMONICS))
    np.testing.assert_allclose(phase[:, 0], [0.0, 0.0, 0.5, 0.5], atol=1e-6)  # cycles of 10 ms


def test_voices_of_the_manifest_are_complete() -> None:
    entry = read_manifest()["voice-starter"]
    for name in ("allison", "carlo"):
        voice = Voice.of(entry, name)
        assert voice.high_hz >= 2 * voice.low_hz  # so that some whole octave always fits
    with pytest.raises(NotFound, match="allison"):
        Voice.of(entry, "nobody")


def test_voice_of_another_content_encoder_is_refused() -> None:
    manifest = read_manifest()
    entries = [manifest["voice-starter"], manifest["whisper-tiny-en-encoder"]]

    class Session:
        def __init__(self, content: str) -> None:
            self.facts = {"content": content}

    sessions: Any = {
        "voice-starter": Session("contentvec, layer 12"),
        "whisper-tiny-en-encoder": Session("whisper-tiny.en, layer 4"),
    }
    with pytest.raises(InvalidModel, match="contentvec"):
        list(served_models(entries, sessions, "cpu"))
