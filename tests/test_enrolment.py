"""Enrolment: samples are judged for what they are; training begins with the base, and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from remix.consent import Consent, consent_of
from remix.errors import Conflict, InvalidAudio, InvalidOption, NoConsent
from remix.vocal_frames import FRAME_SAMPLES, SAMPLE_RATE_HZ, frame_level_db
from tests.conftest import ROOT
from tests.test_own_voices import CONSENT, write_voice
from training.convert_voice import Best, TrainingOptions, VoiceTrainer
from training.enrol import check_name, fine_tuning
from training.samples import (
    MAX_TONAL_SHARE,
    SEGMENT_FRAMES,
    Recording,
    cut,
    find_recordings,
    judge,
    level,
    part_in_two,
    require_same_speaker,
    sounding,
    speaker_of,
)
from training.speaker_embedding import embed_windows
from training.voice_base import BASE, load_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*return_complex=False:UserWarning"),  # torch, of FCPE's
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),  # the fork's
]

Floats = NDArray[np.float32]
RATE = SAMPLE_RATE_HZ


def say(seconds: float, f0_hz: float, formants_hz: tuple[float, ...], seed: int = 0) -> Floats:
    """Syllables of a buzz with formants, and pauses: no speech, but measured as it."""
    rng = np.random.default_rng(seed)
    out: list[Floats] = []
    while sum(map(len, out)) < seconds * RATE:
        n = int(rng.uniform(0.15, 0.5) * RATE)
        begin, end = map(float, rng.uniform(-0.25, 0.25, 2))
        pitch = f0_hz * np.exp2(np.linspace(begin, end, n))
        phase = np.cumsum(pitch) / RATE
        shift = rng.uniform(0.9, 1.1)
        wave = np.zeros(n)
        for harmonic in range(1, int(7000 / f0_hz)):
            gain = sum(
                1.0 / (1.0 + ((harmonic * f0_hz - formant * shift) / 150.0) ** 2)
                for formant in formants_hz
            )
            wave += gain * np.sin(2 * np.pi * harmonic * phase)
        wave *= np.hanning(n) * 0.3 / np.abs(wave).max()
        out += [wave.astype(np.float32), np.zeros(int(rng.uniform(0.05, 0.3) * RATE), np.float32)]
    return np.concatenate(out)[: int(seconds * RATE)]


def recording(samples: Floats, name: str = "a.wav", clipped_share: float = 0.0) -> Recording:
    return Recording(name, samples, clipped_share)


SHE, HE = (210.0, (850.0, 1700.0, 2900.0)), (95.0, (450.0, 900.0, 2300.0))


@pytest.fixture(scope="module")
def her() -> Floats:
    return say(75.0, *SHE)


def test_samples_of_one_voice_will_do_and_are_cut_into_segments(her: Floats) -> None:
    quiet = recording(np.zeros(RATE, np.float32), "empty.wav")
    samples = judge([recording(her[: 40 * RATE], "1.wav"), recording(her[40 * RATE :]), quiet])
    assert 60 < samples.judgement.speech_s <= 75
    assert samples.judgement.left_out == ("empty.wav",)
    assert 150 < samples.judgement.low_hz < 210 < samples.judgement.high_hz < 280
    lengths = [len(segment) for segment in samples.segments]
    assert max(lengths) <= SEGMENT_FRAMES * FRAME_SAMPLES
    # The judgement is rounded to tenths of a second.
    assert sum(lengths) == pytest.approx(samples.judgement.speech_s * RATE, abs=0.051 * RATE)


def test_each_unfit_sample_is_refused_with_its_own_reason(her: Floats) -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(12 * RATE) / RATE
    chord = sum(np.sin(2 * np.pi * hz * seconds) for hz in (220.0, 277.2, 329.6, 440.0))
    music = (0.1 * chord * (1.2 + np.sin(2 * np.pi * 2 * seconds))).astype(np.float32)
    hiss = 0.06 * rng.standard_normal(15 * RATE).astype(np.float32)
    both = np.concatenate([her[: 12 * RATE], say(12.0, *HE)])
    cases = [
        ("silent", recording(np.float32(0.0001) * her)),
        ("clipped", recording(her, clipped_share=0.02)),
        ("music", recording(music)),
        ("3 s of speech", recording(her[: 3 * RATE])),
        ("noise", recording(her[: 15 * RATE] + hiss)),
        ("Several speakers", recording(both)),
    ]
    for words, unfit in cases:
        with pytest.raises(InvalidAudio, match=words) as caught:
            judge([unfit])
        error = caught.value
        assert error.value is not None and error.limit is not None and error.remedy, words


def test_no_recordings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("la la")
    with pytest.raises(InvalidAudio, match="0 recordings"):
        find_recordings([tmp_path])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.FLAC").write_bytes(b"")
    assert find_recordings([tmp_path]) == [tmp_path / "in" / "a.FLAC"]


def test_consent_must_be_stated_by_who_speaks_in_the_samples(her: Floats) -> None:
    consent: Consent = consent_of(CONSENT)
    speaker = speaker_of(her[: 30 * RATE])
    hers, his = say(8.0, *SHE, seed=5), say(8.0, *HE, seed=5)
    assert require_same_speaker(consent, recording(hers), speaker) > 0.85
    with pytest.raises(NoConsent, match="different speakers"):
        require_same_speaker(consent, recording(his), speaker)
    for short in (hers[:RATE], np.zeros(9 * RATE, np.float32)):
        with pytest.raises(NoConsent, match="of speech"):
            require_same_speaker(consent, recording(short), speaker)


def test_pauses_are_shortened_and_sound_is_kept() -> None:
    samples = np.zeros(4 * RATE, np.float32)
    samples[RATE : 2 * RATE] = 0.1
    kept = sounding(samples)
    assert len(kept) == 400
    assert kept[100:200].all()
    assert 100 < kept.sum() <= 100 + 2 * 14  # a quarter of a second in all, and the level's smear


def test_levels_are_made_equal_and_never_clip() -> None:
    tone = np.sin(np.arange(4 * RATE) * 0.2).astype(np.float32)
    loud, soft = level(tone), level(0.001 * tone)
    np.testing.assert_allclose(loud, soft, atol=1e-4)
    spike = 0.001 * tone
    spike[100] = 0.9
    assert np.abs(level(spike)).max() <= 0.9001


def test_one_voice_is_not_parted_and_few_windows_are_no_second_voice(her: Floats) -> None:
    embeddings = embed_windows(her)
    assert part_in_two(embeddings)[0] > 0.85
    assert part_in_two(embeddings[:2]) == (1.0, 0.0)


def test_segments_are_the_speech_again(her: Floats) -> None:
    voiced = frame_level_db(her) > -40
    assert np.array_equal(np.concatenate(cut(her, voiced)), her)


def test_threshold_lies_between_what_was_measured() -> None:
    assert 0.38 < MAX_TONAL_SHARE < 0.77  # see its docstring


@pytest.mark.parametrize("name", ["", "June", "a/b", "../x", "1st", "x" * 33])
def test_name_that_no_folder_should_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOption):
        check_name(name, tmp_path)


def test_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    check_name("june", tmp_path)
    write_voice(tmp_path, "june")
    for name in ("june", "allison"):
        with pytest.raises(Conflict, match="already"):
            check_name(name, tmp_path)


# --- training ---------------------------------------------------------------------------------


def test_base_fits_the_network_and_the_repository() -> None:
    assert BASE.stat().st_size < 16e6
    trainer = VoiceTrainer(TrainingOptions(), 1)
    fresh = {name: weight.clone() for name, weight in trainer.state_dict().items()}
    load_base(trainer, BASE)
    same = [n for n, w in trainer.state_dict().items() if torch.equal(w, fresh[n])]
    assert all(name.startswith(("net.f0_decoder", "mel_loss")) for name in same)
    assert trainer.content_scale.min() > 0


def test_training_stops_when_the_best_is_long_ago() -> None:
    options = fine_tuning(1000)
    best = Best(100, 0.6)
    last = 100 + options.patience * options.judge_every
    assert not best.is_long_ago(last - 1, options)
    assert best.is_long_ago(last, options)
    assert not Best().is_long_ago(10**6, TrainingOptions())


TRAIN = """
import sys
from pathlib import Path

import numpy as np
import torch

from training.convert_voice import TrainingOptions, train
from training.voice_base import BASE
from training.voice_data import Stream

torch.set_num_threads(1)
rng, n = np.random.default_rng(0), 300
stream = Stream(
    0.1 * rng.standard_normal(n * 160).astype(np.float32),
    np.full(n, 200.0, np.float32),
    np.ones(n, bool),
    [rng.standard_normal((n // 2, 384)).astype(np.float16)],
    [1.0],
)
options = TrainingOptions(
    steps=8, batch=2, n_prior=1, judge_every=4, save_every=2, patience=2, copies=1
)
train([stream], [stream], ["noise"], options, Path(sys.argv[1]), BASE)
"""


def test_training_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    killed = run(tmp_path)
    until_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < until_s:
        time.sleep(0.001)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    at_kill = torch.load(checkpoint, weights_only=True)["step"]
    again = run(tmp_path)
    said, _ = again.communicate(timeout=120)
    assert (again.returncode, f"resumed at step {at_kill}" in said) == (0, True), said
    state = torch.load(checkpoint, weights_only=True)
    measured = {point["step"]: point["held_out_mel"] for point in state["curves"]}
    assert state["step"] == 8
    assert list(measured) == [4.0, 8.0]
    assert state["best"]["held_out_mel"] == pytest.approx(min(measured.values()), abs=1e-4)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def run(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
