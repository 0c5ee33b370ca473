"""vocal, voice -> the vocal sung by that voice, analysed while it arrives.

Three models take turns, each on windows of a fixed size: a content encoder (what is sung), a pitch
estimator (the melody), and the voice. What belongs to the whole song is decided here, once: the
melody's clean-up, the octave, the places to breathe, and the noise, so that windows which overlap
sing the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from remix.audio import Audio, Samples
from remix.errors import InvalidModel, NotFound, excerpt
from remix.manifest import ModelEntry
from remix.pitch import PitchTrack, clean_pitch, octaves_to_range
from remix.resample import StreamingResampler, resample, to_mono
from remix.stages import Infer, Progress, Tensors
from remix.vocal_frames import (
    CONTENT_SAMPLES,
    CONTEXT_SAMPLES,
    CORE_SAMPLES,
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    Floats,
    Phrase,
    cut_frames,
    cut_phrases,
    expand_content,
    follow_loudness,
    frame_level_db,
    join_phrases,
    join_windows,
    repeat_content,
)

Result = TypeVar("Result")

SAMPLES, CONTENT, F0, CONFIDENCE = "samples", "content", "f0_hz", "confidence"
"""Tensors of the content encoder and of the pitch estimator."""

VOICED, SPEAKER, NOISE, PHASE = "voiced", "speaker", "noise", "phase"
SOURCE_NOISE, AUDIO = "source_noise", "audio"
"""The other tensors of a voice."""

HARMONICS = 9
"""Of the excitation. Source: so-vits-svc-fork 4.2.30, `NSFHifiGANGenerator` (harmonic_num 8)."""

WINDOWS_AT_ONCE = 4
"""Windows of a song that are asked for at once: more than a small machine has cores."""

SILENT_DBFS = -60.0

HUBERT_SAMPLES = 400
"""What one feature of a HuBERT sees: 25 ms."""


@dataclass(frozen=True)
class Voice:
    """What the flow knows of a voice; all of it stands in its model's manifest entry.

    Args:
        name: how callers choose it.
        model: name of the manifest entry; one model may have several voices.
        speaker: its number in the model.
        low_hz: of the range that it sings well.
        high_hz: of the range that it sings well.
        content_model: name of the content encoder that the model was trained with.
        pitch_model: name of the pitch estimator.
        window_frames: of a window.
        latent_channels: of the noise.
        noise_scale: deviation of the noise.
        sample_rate_hz: of what it sings.
        frame_samples: of a frame, at its rate.
        content_expansion: how it was trained to find the content of a frame: "linear" between the
            features (`expand_content`), or "repeat" them (`repeat_content`).
        unvoiced_f0: F0 where nothing is voiced, as it was trained: "zero", or "interpolated".
        has_excitation: whether it takes the phases and the noise of a sine excitation.
    """

    name: str
    model: str
    speaker: int
    low_hz: float
    high_hz: float
    content_model: str
    pitch_model: str
    window_frames: int
    latent_channels: int
    noise_scale: float
    sample_rate_hz: int = SAMPLE_RATE_HZ
    frame_samples: int = FRAME_SAMPLES
    content_expansion: Literal["linear", "repeat"] = "linear"
    unvoiced_f0: Literal["zero", "interpolated"] = "zero"
    has_excitation: bool = True

    @classmethod
    def of(cls, entry: ModelEntry, name: str) -> Voice:
        """Read the facts of a manifest entry.

        Raises:
            NotFound: the model has no such voice.
            InvalidModel: a fact is missing.
        """
        names = voice_names(entry)
        if name not in names:
            raise NotFound(
                f"Model {entry.name} has no voice {excerpt(name)!r}; it has {', '.join(names)}.",
                value=excerpt(name),
                limit=list(names),
                remedy="Use one of these names.",
            )
        try:
            facts, voice = entry.facts, entry.facts["voices"][name]
            return cls(
                name=name,
                model=entry.name,
                speaker=voice["speaker"],
                low_hz=voice["low_hz"],
                high_hz=voice["high_hz"],
                content_model=facts["content_model"],
                pitch_model=facts["pitch_model"],
                window_frames=facts["window_frames"],
                latent_channels=facts["latent_channels"],
                noise_scale=facts["noise_scale"],
                sample_rate_hz=entry.sample_rate_hz,
                frame_samples=facts["frame_samples"],
                content_expansion=facts["content_expansion"],
                unvoiced_f0=facts["unvoiced_f0"],
                has_excitation=any(spec.name == PHASE for spec in entry.files[0].inputs),
            )
        except KeyError as error:
            raise InvalidModel(f"models.toml: {entry.name} lacks the fact {error}.") from error


@dataclass(frozen=True)
class ConvertedVocal:
    """A vocal sung by another voice, and what was found on the way.

    Args:
        audio: [1, T], as long as the vocal, at its rate.
        octaves: how far it was transposed.
        voiced_share: of all frames.
        median_hz: F0 of the vocal as it was; 0 if nothing is voiced.
    """

    audio: Audio
    octaves: int
    voiced_share: float
    median_hz: float


def voice_names(entry: ModelEntry) -> list[str]:
    """Voices of a manifest entry, the default first; none if it is another kind of model."""
    return list(entry.facts.get("voices", {}))


async def convert_voice(
    chunks: AsyncIterator[Samples],
    vocal: Vocal,
    voice: Voice,
    infer: Infer,
    *,
    octaves: int | None = None,
    noise_seed: int = 0,
    progress: Progress | None = None,
) -> ConvertedVocal:
    """Sings a vocal with another voice.

    Args:
        chunks: of the vocal, [C, t] each, in order; each is analysed as soon as it is there.
        vocal: how long they are together.
        voice: who sings.
        infer: runs the three models:
            content encoder {"samples": [B, 160000]} -> {"content": [B, M, F]}, 50 features/s,
            pitch estimator {"samples": [B, 160000]} -> {"f0_hz", "confidence": [B, 1000]},
            voice {"content": [B, N, F], "f0_hz", "voiced": [B, N], "speaker": [B, 1],
            "noise": [B, N, latent]} and, with an excitation, {"phase": [B, N, 9],
            "source_noise": [B, N * hop]} -> {"audio": [B, N * hop]}.
        octaves: transposition; None fits the voice's range.
        noise_seed: the same seed gives the same sound.
        progress: is told after every window; analysis is the first third.

    Raises:
        What `infer` raises.
    """
    work = _Work(infer, progress)
    try:
        analysis = await _analyse(chunks, vocal, voice, work)
        track = analysis.track
        if octaves is None:
            octaves = octaves_to_range(track, voice.low_hz, voice.high_hz)
        sung = await _sing(analysis, track.shifted(octaves), voice, noise_seed, work)
    finally:
        await work.close()
    sung = await asyncio.to_thread(follow_loudness, sung, analysis.samples, voice.frame_samples)
    samples = await asyncio.to_thread(
        resample, sung[None], voice.sample_rate_hz, vocal.sample_rate_hz
    )
    work.tell(1.0)
    voiced_hz = track.f0_hz[track.voiced]
    return ConvertedVocal(
        Audio(cut_frames(samples[0], 0, vocal.n_samples)[None], vocal.sample_rate_hz),
        octaves,
        float(track.voiced.mean()) if len(track.voiced) else 0.0,
        float(np.median(voiced_hz)) if len(voiced_hz) else 0.0,
    )


@dataclass(frozen=True)
class Vocal:
    """Length, in samples of a channel, and rate of a vocal whose samples are still to come."""

    n_samples: int
    sample_rate_hz: int


@dataclass(frozen=True)
class Analysis:
    """A whole vocal as the voice needs it.

    Args:
        samples: [N * hop], mono, at the voice's rate.
        content: [M, F], 50 features/s.
        content_ratio: features per frame of the voice, counted as the encoder does.
        track: its melody, 100 frames/s.
        level_db: [N].
    """

    samples: Floats
    content: Floats
    content_ratio: float
    track: PitchTrack
    level_db: Floats

    def content_of(self, first: int, voice: Voice) -> Floats:
        """[voice.window_frames, F]: the content from a frame on."""
        if voice.content_expansion == "linear":
            return expand_content(self.content, first, voice.window_frames)
        return repeat_content(self.content, first, voice.window_frames, self.content_ratio)


def harmonic_phases(
    f0_hz: Floats,
    rng: np.random.Generator,
    frame_samples: int = FRAME_SAMPLES,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
) -> Floats:
    """Phase of F0 and its overtones where each frame begins, one random start for the song.

    Args:
        f0_hz: [N], 0 where unvoiced: there the phase rests.
        rng: draws where the overtones start.
        frame_samples: of a frame.
        sample_rate_hz: of the excitation.

    Returns:
        [N, HARMONICS], cycles in [0, 1).

    Source: so-vits-svc-fork 4.2.30, `SineGen._f02sine`.
    """
    harmonic = np.arange(1, HARMONICS + 1)
    step = f0_hz.astype(np.float64) * frame_samples / sample_rate_hz
    begin = np.cumsum(step) - step
    start = np.concatenate([[0.0], rng.random(HARMONICS - 1)])
    return np.asarray(np.mod(begin[:, None] * harmonic + start, 1.0), np.float32)


def content_features(n_samples: int, voice: Voice) -> int:
    """How many content features a vocal has; a voice that repeats them counts whole ones only.

    Args:
        n_samples: of the vocal at 16 kHz.
        voice: that will sing them.

    Source: HuBERT's convolutions see 400 samples every 320 (Hsu et al. 2021, section III-B).
    """
    if voice.content_expansion == "linear":
        return -(-n_samples // CONTENT_SAMPLES)
    return max(n_samples - HUBERT_SAMPLES, 0) // CONTENT_SAMPLES + 1


def track_in_frames(track: PitchTrack, n_frames: int, voice: Voice) -> PitchTrack:
    """The melody where each frame of a voice begins; the same if the voice has 100 frames/s.

    F0 is interpolated in log frequency, voicing is that of the nearest estimate.

    Args:
        track: 100 frames/s, frame i centred 5 ms after its beginning.
        n_frames: of the vocal, in the voice's frames.
        voice: whose frames.

    Source: so-vits-svc-fork 4.2.30, `f0.compute_f0`: F0 at multiples of the hop.
    """
    if not n_frames or voice.sample_rate_hz * FRAME_SAMPLES == voice.frame_samples * SAMPLE_RATE_HZ:
        return track
    begin_s = np.arange(n_frames) * (voice.frame_samples / voice.sample_rate_hz)
    position = begin_s * (SAMPLE_RATE_HZ / FRAME_SAMPLES) - 0.5
    log_f0 = np.interp(position, np.arange(len(track.f0_hz)), np.log2(track.f0_hz))
    nearest = np.clip(np.round(position).astype(np.int64), 0, len(track.voiced) - 1)
    return PitchTrack(np.exp2(log_f0).astype(np.float32), track.voiced[nearest])


async def _analyse(
    chunks: AsyncIterator[Samples], vocal: Vocal, voice: Voice, work: _Work
) -> Analysis:
    resampler = StreamingResampler(vocal.sample_rate_hz, SAMPLE_RATE_HZ, 1)
    pieces = [np.zeros(CONTEXT_SAMPLES, np.float32)]  # silence before the vocal
    voice_resampler = StreamingResampler(vocal.sample_rate_hz, voice.sample_rate_hz, 1)
    voice_pieces: list[Floats] = []  # of the vocal at the voice's rate, if that is another
    tasks: list[asyncio.Task[_Window]] = []
    n_windows = -(-vocal.n_samples * SAMPLE_RATE_HZ // vocal.sample_rate_hz // CORE_SAMPLES)

    def begin_windows(is_last: bool) -> None:
        # The window of core k needs the vocal up to one context beyond the core.
        while (start := len(tasks) * CORE_SAMPLES) + WINDOW_SAMPLES <= (length := _length(pieces)):
            whole = np.concatenate(pieces)
            pieces[:] = [whole]
            window = whole[start : start + WINDOW_SAMPLES]
            share = (len(tasks) + 1) / max(n_windows, 1) / 3.0
            tasks.append(work.begin(_analyse_window(window, voice, work, share)))
        if is_last and start + CONTEXT_SAMPLES < length:
            pieces.append(np.zeros(WINDOW_SAMPLES - (length - start), np.float32))
            begin_windows(is_last=False)

    async for chunk in chunks:
        mono = to_mono(chunk)
        pieces.append(resampler.push(mono)[0])
        if voice.sample_rate_hz != SAMPLE_RATE_HZ:
            voice_pieces.append(voice_resampler.push(mono)[0])
        begin_windows(is_last=False)
    pieces.append(resampler.flush()[0])
    n_samples = _length(pieces) - CONTEXT_SAMPLES
    n_frames = -(-n_samples // FRAME_SAMPLES)
    begin_windows(is_last=True)
    windows = await asyncio.gather(*tasks)

    heard = np.concatenate(pieces)[CONTEXT_SAMPLES:][:n_samples]
    level_db = frame_level_db(cut_frames(heard, 0, n_frames, FRAME_SAMPLES))
    f0_hz = join_windows([window.f0_hz for window in windows], n_frames)
    confidence = join_windows([window.confidence for window in windows], n_frames)
    track = await asyncio.to_thread(clean_pitch, f0_hz, confidence, level_db)

    if voice.sample_rate_hz != SAMPLE_RATE_HZ:
        heard = np.concatenate([*voice_pieces, voice_resampler.flush()[0]])
    hop = voice.frame_samples
    n_voice_frames = -(-len(heard) // hop)
    samples = cut_frames(heard, 0, n_voice_frames, hop)
    n_features = content_features(n_samples, voice)
    return Analysis(
        samples,
        join_windows([window.content for window in windows], n_features),
        n_features / max(len(heard) // hop, 1),
        track_in_frames(track, n_voice_frames, voice),
        frame_level_db(samples, hop),
    )


@dataclass(frozen=True)
class _Window:
    content: Floats
    f0_hz: Floats
    confidence: Floats


async def _analyse_window(samples: Floats, voice: Voice, work: _Work, share: float) -> _Window:
    inputs = {SAMPLES: samples[None]}
    content, pitch = await asyncio.gather(
        work.infer(voice.content_model, inputs), work.infer(voice.pitch_model, inputs)
    )
    work.tell(share)
    return _Window(content[CONTENT][0], pitch[F0][0], pitch[CONFIDENCE][0])


async def _sing(
    analysis: Analysis, track: PitchTrack, voice: Voice, noise_seed: int, work: _Work
) -> Floats:
    """[T]: the phrases of a vocal, sung and joined."""
    phrases = cut_phrases(analysis.level_db, track.voiced, voice.window_frames)
    rng = np.random.default_rng(noise_seed)
    n_frames = len(track.voiced)
    f0_hz = track.f0_hz * track.voiced if voice.unvoiced_f0 == "zero" else track.f0_hz
    hop, length = voice.frame_samples, voice.window_frames
    phase = harmonic_phases(f0_hz, rng, hop, voice.sample_rate_hz)
    noise = rng.standard_normal((n_frames, voice.latent_channels), np.float32) * voice.noise_scale
    source_noise = rng.standard_normal(n_frames * hop, np.float32)

    async def sing(index: int, phrase: Phrase) -> Floats | None:
        if analysis.level_db[phrase.start : phrase.stop].max() < SILENT_DBFS:
            return None
        first = phrase.first
        inputs: dict[str, NDArray[Any]] = {
            CONTENT: analysis.content_of(first, voice)[None],
            F0: cut_frames(f0_hz, first, length)[None],
            VOICED: cut_frames(track.voiced.astype(np.float32), first, length)[None],
            SPEAKER: np.array([[voice.speaker]], np.int64),
            NOISE: cut_frames(noise, first, length)[None].astype(np.float32),
        }
        if voice.has_excitation:
            inputs[PHASE] = cut_frames(phase, first, length)[None]
            inputs[SOURCE_NOISE] = cut_frames(source_noise, first, length, hop)[None]
        outputs = await work.infer(voice.model, inputs)
        work.tell(1 / 3 + 2 / 3 * (index + 1) / len(phrases))
        return np.asarray(outputs[AUDIO][0])

    tasks = [work.begin(sing(index, phrase)) for index, phrase in enumerate(phrases)]
    return join_phrases(phrases, await asyncio.gather(*tasks), hop)


class _Work:
    """The calls of one song: a few at once, all of them ended when the song is."""

    def __init__(self, infer: Infer, progress: Progress | None) -> None:
        self._infer = infer
        self._progress = progress
        self._furthest = 0.0
        self._room = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self._tasks: list[asyncio.Task[Any]] = []

    async def infer(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        async with self._room:
            return await self._infer(model, inputs)

    def begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    def tell(self, fraction: float) -> None:
        self._furthest = max(self._furthest, min(fraction, 1.0))
        if self._progress:
            self._progress("convert_voice", self._furthest)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _length(pieces: Sequence[Floats]) -> int:
    return sum(len(piece) for piece in pieces)
