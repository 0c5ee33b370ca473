"""recordings of a voice -> what enrolment trains on: judged, cleaned, cut into 10 s; or a refusal.

Every threshold says what was measured to choose it. "The voices" are the five of Debian's
asterisk-core-sounds 1.6.1 (g722): Allison (en, es), June (fr), Carlo (it), Maxim's service (ru);
66 recordings of each, about 6 minutes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.pitch_estimator import load_pitch_estimator
from remix.audio_codec import Limits, decode
from remix.consent import Consent
from remix.errors import InvalidAudio, NoConsent, RemixError
from remix.loudness import LoudnessMeter, gated_lufs
from remix.pitch import MIN_CONFIDENCE, clean_pitch, loud_level_db
from remix.resample import resample, to_mono
from remix.vocal_frames import FRAME_SAMPLES, SAMPLE_RATE_HZ, frame_level_db, next_phrase
from training.speaker_embedding import embed_windows, mean_embedding
from training.voice_data import estimate_pitch

Floats = NDArray[np.float32]

LIMITS = Limits(duration_s=3600.0)
"""Of one recording: a lecture."""

SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"}
"""What is looked for in a folder."""

SILENT_DBFS = -50.0
"""A recording whose loud frames are softer is left out: the voices' are at -15 to -12, their
recordings of silence (a room's noise) below -50."""

GATE_DB = 35.0
"""Below its loud frames a recording is a pause."""

PAUSE_FRAMES = 25
"""Of a pause, 0.25 s are kept: as much as `voice_data` puts between recordings."""

MIN_SPEECH_S = 60.0
"""A choice, not a measurement: six segments, of which one is held out."""

SEGMENT_FRAMES = 1000
"""10 s, the paper's."""

MAX_CLIPPED_SHARE = 0.001
"""Of the samples. The voices have 0; driven 6 dB higher, into full scale, 0.0001 to 0.005, 12 dB
higher 0.03 to 0.09."""

CLIPPED = 0.999
"""Of full scale; three samples in a row, as no clean peak has them."""

MIN_SNR_DB = 15.0
"""Voiced frames over the 5th percentile of all. The voices have 30 to 60; with white noise at 30,
20, 15 and 10 dB it reads 27 to 31, 20 to 21, 15 to 16 and 10 to 11. Training copies the noise."""

MAX_TONAL_SHARE = 0.6
"""Of the quietest fifth of all frames: where a voice pauses, music goes on. The voices have 0 to
0.32 and, with white noise at 5 dB, up to 0.38; the demo song 0.77 to 0.86, its accompaniment 0.87,
a remix of ours 0.89; its vocal, separated, 0.00."""

LOUDNESS_LUFS, PEAK = -17.0, 0.9
"""Of what is trained on; the voices of the base are at -17.4 and -16.3 LUFS, their peaks at 0.8."""

WINDOWS, ONE_SPEAKER, FEW = 4, 0.85, 0.1
"""Windows of 3.9 s are parted into two groups. Of one of the voices the groups' similarity is 0.90
to 0.98, of two, by halves, 0.58 to 0.77 (Allison's English and Spanish: 0.83). Three of fifteen
stretches of two minutes are at 0.63 to 0.66: a seventh of them is other sounds than that voice, and
is refused rightly. A tenth may be."""

SAME_SPEAKER = 0.85
"""Of 4 s against minutes of the same voice 97 in 100 have it (some of the recordings hold other
sounds than speech); of another person none, 0.82 is the highest. Allison's Spanish against her
English has 0.76 on average: a statement in another language may have to be recorded again."""

MIN_STATEMENT_S = 3.0
"""Of speech in a statement: three windows of the speaker encoder."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A file of samples.

    Args:
        name: of the file.
        samples: [T], mono, 16 kHz.
        clipped_share: of its samples.
    """

    name: str
    samples: Floats
    clipped_share: float


@dataclass(frozen=True)
class Judgement:
    """What was measured of samples that will do.

    Args:
        speech_s: without pauses.
        snr_db: of voiced frames over the quietest.
        low_hz: F0, 5th percentile.
        high_hz: F0, 95th percentile.
        clipped_share: of all samples.
        speaker_similarity: of the two most different groups of windows.
        left_out: recordings that are silent.
    """

    speech_s: float
    snr_db: float
    low_hz: float
    high_hz: float
    clipped_share: float
    speaker_similarity: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Samples:
    """Samples that will do.

    Args:
        segments: [t] each, at most 10 s.
        embedding: of the speaker.
        judgement: what was measured.
    """

    segments: tuple[Floats, ...]
    embedding: Floats
    judgement: Judgement


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """Files, and what audio the folders among them hold.

    Raises:
        InvalidAudio: there is none.
    """
    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [p for p in inside if not path.is_dir() or p.suffix.lower() in SUFFIXES]
    if not found:
        raise InvalidAudio(
            f"There are 0 recordings in {', '.join(map(str, paths))}; at least 1 is needed.",
            value=0,
            limit=1,
            remedy=f"Give files, or folders with {', '.join(sorted(SUFFIXES))}.",
        )
    return found


def read_recording(path: Path) -> Recording:
    """A file of any format that the service takes.

    Raises:
        InvalidAudio, LimitExceeded: as `remix.audio_codec.decode`.
    """
    try:
        audio = asyncio.run(decode(path, LIMITS))
    except RemixError as error:  # of how many files, which
        parts = {**error.parts(), "message": f"{path.name}: {error.message}"}
        raise type(error)(**parts) from error
    at_edge = (np.abs(audio.samples) >= CLIPPED).any(axis=0)
    runs = np.convolve(at_edge, np.ones(3), "same") >= 3
    mono = resample(to_mono(audio.samples), audio.sample_rate_hz, SAMPLE_RATE_HZ)[0]
    return Recording(path.name, mono, float(runs.mean()))


def judge(recordings: Sequence[Recording]) -> Samples:
    """Clean, measure, cut.

    Raises:
        InvalidAudio: with the first reason for which they will not do.
    """
    heard, clipped = audible(recordings)
    whole = np.concatenate([level(whole_frames(r.samples)) for r in heard])
    level_db = frame_level_db(whole)
    f0_hz, confidence = estimate_pitch(load_pitch_estimator(), whole)
    tonal = tonal_share(confidence, level_db)
    if tonal > MAX_TONAL_SHARE:
        raise _unfit(
            f"The samples sound like music: {tonal:.0%} of their quietest parts have a pitch",
            round(tonal, 2),
            f"at most {MAX_TONAL_SHARE:.0%} is taken as one voice alone",
            MAX_TONAL_SHARE,
            "Give the voice without accompaniment.",
        )
    track = clean_pitch(f0_hz, confidence, level_db, loud_level_db(level_db))
    kept = np.concatenate([sounding(r.samples) for r in heard])
    speech, voiced = whole.reshape(-1, FRAME_SAMPLES)[kept].ravel(), track.voiced[kept]
    spoken_db = float(np.median(level_db[track.voiced])) if track.voiced.any() else -np.inf
    snr_db = max(spoken_db - float(np.percentile(level_db, 5)), 0.0)
    if snr_db < MIN_SNR_DB:
        raise _unfit(
            f"The speech is {snr_db:.0f} dB above the samples' noise",
            round(snr_db),
            f"at least {MIN_SNR_DB:.0f} dB are needed",
            MIN_SNR_DB,
            "Record in a quieter room, nearer to the microphone.",
        )
    embeddings = embed_windows(speech)
    similarity, share = part_in_two(embeddings)
    if similarity < ONE_SPEAKER and share >= FEW:
        raise _unfit(
            f"Several speakers: {share:.0%} of the samples have a similarity of "
            f"{similarity:.2f} to the rest",
            round(similarity, 2),
            f"one speaker has at least {ONE_SPEAKER}",
            ONE_SPEAKER,
            "Leave out whatever is not the one speaker.",
        )
    speech_s = len(speech) / SAMPLE_RATE_HZ
    if speech_s < MIN_SPEECH_S:
        raise _unfit(
            f"There are {speech_s:.0f} s of speech in the samples",
            round(speech_s),
            f"at least {MIN_SPEECH_S:.0f} s are needed",
            MIN_SPEECH_S,
            "Record more: some minutes make a better voice.",
        )
    low_hz, high_hz = np.percentile(track.f0_hz[track.voiced], [5, 95])
    left_out = tuple(r.name for r in recordings if r not in heard)
    judgement = Judgement(
        round(speech_s, 1),
        round(snr_db, 1),
        round(float(low_hz), 1),
        round(float(high_hz), 1),
        clipped,
        round(similarity, 3),
        left_out,
    )
    return Samples(tuple(cut(speech, voiced)), mean_embedding(embeddings), judgement)


def audible(recordings: Sequence[Recording]) -> tuple[list[Recording], float]:
    """The recordings that are not silent, and how much of them is clipped.

    Raises:
        InvalidAudio: all are silent, or too much is clipped.
    """
    loud_db = [loud_level_db(frame_level_db(r.samples)) for r in recordings]
    heard = [r for r, loud in zip(recordings, loud_db, strict=True) if loud >= SILENT_DBFS]
    if not heard:
        raise _unfit(
            f"The samples are silent: their loud parts are at {max(loud_db):.0f} dBFS",
            round(max(loud_db)),
            f"at least {SILENT_DBFS:.0f} dBFS is speech",
            SILENT_DBFS,
            "Record nearer to the microphone, or raise its level.",
        )
    lengths = [len(r.samples) for r in heard]
    clipped = float(np.average([r.clipped_share for r in heard], weights=lengths))
    if clipped > MAX_CLIPPED_SHARE:
        raise _unfit(
            f"{clipped:.1%} of the samples are clipped",
            clipped,
            f"at most {MAX_CLIPPED_SHARE:.1%} is taken",
            MAX_CLIPPED_SHARE,
            "Record again with the level lower.",
        )
    return heard, clipped


def require_same_speaker(consent: Consent, statement: Recording, speaker: Floats) -> float:
    """The similarity of who states the consent to who speaks in the samples.

    Args:
        consent: whose statement it is.
        statement: the recording.
        speaker: embedding of the samples.

    Raises:
        NoConsent: the statement is too short, or somebody else's.
    """
    is_silent = loud_level_db(frame_level_db(statement.samples)) < SILENT_DBFS
    speech_s = 0.0 if is_silent else len(speech_of(statement.samples)) / SAMPLE_RATE_HZ
    if speech_s < MIN_STATEMENT_S:
        raise NoConsent(
            f"The statement of {consent.who} has {speech_s:.1f} s of speech; at least "
            f"{MIN_STATEMENT_S:.0f} s are needed.",
            value=round(speech_s, 1),
            limit=MIN_STATEMENT_S,
            remedy="Record them saying what they allow, in a sentence or two.",
        )
    similarity = float(speaker_of(statement.samples) @ speaker)
    if similarity < SAME_SPEAKER:
        raise NoConsent(
            f"The statement of {consent.who} and the samples are of different speakers: their "
            f"similarity is {similarity:.2f}, one speaker's at least {SAME_SPEAKER}.",
            value=round(similarity, 2),
            limit=SAME_SPEAKER,
            remedy="Only who speaks in the samples can allow it: record their statement, with the "
            "same microphone.",
        )
    return similarity


def speaker_of(samples: Floats) -> Floats:
    """The embedding of who speaks in a recording: [T] -> [256]."""
    return mean_embedding(embed_windows(level(speech_of(samples))))


def speech_of(samples: Floats) -> Floats:
    """A recording without its pauses."""
    kept = sounding(samples)
    return np.asarray(whole_frames(samples).reshape(-1, FRAME_SAMPLES)[kept].ravel(), np.float32)


def level(samples: Floats) -> Floats:
    """As loud as what is trained on, peaks below full scale."""
    meter = LoudnessMeter(SAMPLE_RATE_HZ)
    meter.push(samples[None])
    loudness = gated_lufs(meter.powers)
    gain = 10.0 ** ((LOUDNESS_LUFS - loudness) / 20.0) if isfinite(loudness) else 1.0
    peak = float(np.abs(samples).max(initial=1e-6))
    return np.asarray(samples * np.float32(min(gain, PEAK / peak)), np.float32)


def whole_frames(samples: Floats) -> Floats:
    """Without what is left over at the end."""
    return samples[: len(samples) // FRAME_SAMPLES * FRAME_SAMPLES]


def sounding(samples: Floats) -> NDArray[np.bool_]:
    """Frames without what is longer than 0.25 s and `GATE_DB` below the loud ones: [N]."""
    level_db = frame_level_db(samples)
    sounds = (level_db >= loud_level_db(level_db) - GATE_DB).astype(np.float32)
    near = np.convolve(np.pad(sounds, PAUSE_FRAMES // 2), np.ones(PAUSE_FRAMES), "valid")
    return np.asarray(near > 0.5)


def tonal_share(confidence: Floats, level_db: Floats) -> float:
    """How many of the quietest fifth of all frames have a pitch.

    Args:
        confidence: of the pitch estimator, [N].
        level_db: [N].
    """
    quietest = level_db <= np.percentile(level_db, 20)
    return float((confidence[quietest] >= MIN_CONFIDENCE).mean())


def part_in_two(embeddings: Floats) -> tuple[float, float]:
    """The most different two groups of windows: their similarity, and the smaller one's share.

    Args:
        embeddings: [N, 256], of 1.6 s each.

    Returns:
        (1, 0) where there are not two.
    """
    starts = range(0, max(len(embeddings) - WINDOWS, 0) + 1, WINDOWS)
    windows = np.stack([mean_embedding(embeddings[at : at + WINDOWS]) for at in starts])
    first = windows[np.argmin(windows @ windows.mean(axis=0))]
    second = windows[np.argmin(windows @ first)]
    is_first = windows @ first > windows @ second
    for _ in range(20):  # k-means on the sphere
        if is_first.all() or not is_first.any():
            return 1.0, 0.0
        first, second = mean_embedding(windows[is_first]), mean_embedding(windows[~is_first])
        is_first = windows @ first > windows @ second
    share = float(is_first.mean())
    return float(first @ second), min(share, 1.0 - share)


def cut(speech: Floats, voiced: NDArray[np.bool_]) -> list[Floats]:
    """Segments of at most 10 s, cut where it is quiet."""
    level_db = frame_level_db(speech)
    segments, start = [], 0
    while start < len(level_db):
        # a phrase leaves room for its context, which a segment has not
        stop = next_phrase(level_db, voiced, start, SEGMENT_FRAMES + 50).stop
        segments.append(speech[start * FRAME_SAMPLES : stop * FRAME_SAMPLES])
        start = stop
    return segments


def _unfit(what: str, value: object, bound: str, limit: object, remedy: str) -> InvalidAudio:
    return InvalidAudio(f"{what}; {bound}.", value=value, limit=limit, remedy=remedy)
