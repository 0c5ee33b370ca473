"""vocal, voice -> the vocal sung by that voice, while it arrives.

Three models take turns, each on windows of a fixed size: a content encoder (what is sung), a pitch
estimator (the melody), and the voice. What belongs to the song as a whole is decided here, once:
the octave, the melody's clean-up, the places to breathe, and the noise, so that windows which
overlap sing the same. Nothing waits for the vocal's end: what is decided depends on how far into
the song the analysis has come, never on how fast it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from remix.audio import Audio, Samples
from remix.errors import InvalidModel, NotFound, excerpt
from remix.manifest import ModelEntry
from remix.pitch import PitchTrack, clean_pitch, loud_level_db, octaves_to_range
from remix.resample import StreamingResampler, to_mono
from remix.stages import Infer, Progress, Tensors
from remix.vocal_frames import (
    CONTENT_SAMPLES,
    CONTEXT_SAMPLES,
    CORE_SAMPLES,
    FADE_FRAMES,
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    Floats,
    Phrase,
    add_phrase,
    cut_frames,
    expand_content,
    follow_loudness,
    grow_level_db,
    join_windows,
    next_phrase,
    repeat_content,
)

Result = TypeVar("Result")

_Queue: TypeAlias = "asyncio.Queue[asyncio.Task[Result] | None]"

SAMPLES, CONTENT, F0, CONFIDENCE = "samples", "content", "f0_hz", "confidence"
"""Tensors of the content encoder and of the pitch estimator."""

VOICED, SPEAKER, NOISE, PHASE = "voiced", "speaker", "noise", "phase"
SOURCE_NOISE, AUDIO = "source_noise", "audio"
"""The other tensors of a voice."""

HARMONICS = 9
"""Of the excitation. Source: so-vits-svc-fork 4.2.30, `NSFHifiGANGenerator` (harmonic_num 8)."""

WINDOWS_AT_ONCE = 2
"""Windows of a song that are analysed at once, and phrases that are sung: more than a small
machine has cores, and few enough that the analysis does not run far ahead of the singing."""

SETTLING_FRAMES = 50
"""Estimates, 0.5 s, that must be known after one before it is final: twice as far as the clean-up
looks (`pitch.SLIP_CONTEXT_FRAMES`)."""

FOLLOWED_FRAMES = 8
"""Of the loudness envelope, on each side: more than `SMOOTHING_FRAMES` reach."""

OCTAVE_FRAMES = 500
"""Voiced frames, 5 to 6 s, of which the octave is decided."""

CLEAR_DBFS = -45.0
"""A singer is louder, what leaks from an accompaniment mostly softer."""

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
class Vocal:
    """Length, in samples of a channel, and rate of a vocal whose samples are still to come."""

    n_samples: int
    sample_rate_hz: int


@dataclass(frozen=True)
class Melody:
    """What was found in a vocal, as far as it was heard.

    Args:
        octaves: how far it is transposed.
        voiced_share: of all frames.
        median_hz: F0 of the vocal as it was; 0 if nothing is voiced.
    """

    octaves: int = 0
    voiced_share: float = 0.0
    median_hz: float = 0.0


@dataclass(frozen=True)
class VocalChunk:
    """A stretch of the converted vocal, finished.

    Args:
        samples: [1, t], at the vocal's rate.
        melody: as far as it was heard.
    """

    samples: Samples
    melody: Melody


@dataclass(frozen=True)
class ConvertedVocal:
    """A vocal sung by another voice, and what was found on the way.

    Args:
        audio: [1, T], as long as the vocal, at its rate.
        melody: of the whole.
    """

    audio: Audio
    melody: Melody


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
) -> AsyncIterator[VocalChunk]:
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
        octaves: transposition; None fits the voice's range, by the first `OCTAVE_FRAMES` that
            are voiced.
        noise_seed: the same seed gives the same sound.
        progress: is told after every window; analysis is the first third.

    Yields:
        Chunks that follow each other without a gap and together have the vocal's length.

    Raises:
        What `infer` raises.
    """
    work = _Work(infer, progress)
    analysis = _Analysis(vocal, voice)
    singer = _Singer(analysis, octaves, noise_seed, work)
    windows: _Queue[_Window] = asyncio.Queue()
    phrases: _Queue[_SungPhrase] = asyncio.Queue()
    tasks = (
        work.begin(_hear(chunks, analysis, windows, work)),
        work.begin(_begin_phrases(analysis, singer, windows, phrases, work)),
    )
    resampler = StreamingResampler(voice.sample_rate_hz, vocal.sample_rate_hz, 1)
    given = 0

    def chunk_of(samples: Samples) -> VocalChunk:
        nonlocal given
        kept = samples[:, : vocal.n_samples - given]  # the last frame reaches beyond the vocal
        given += kept.shape[1]
        return VocalChunk(kept, analysis.melody(singer.octaves))

    try:
        while (phrase := await phrases.get()) is not None:
            sung = await asyncio.to_thread(singer.join, await phrase)
            yield chunk_of(await asyncio.to_thread(resampler.push, sung[None]))
        for task in tasks:
            await task
        yield chunk_of(resampler.flush())
        work.tell(1.0)
    finally:
        await work.close()


async def join_chunks(chunks: AsyncIterator[VocalChunk], vocal: Vocal) -> ConvertedVocal:
    """The whole vocal."""
    joined, melody = [np.zeros((1, 0), np.float32)], Melody()
    async for chunk in chunks:
        joined.append(chunk.samples)
        melody = chunk.melody
    return ConvertedVocal(Audio(np.concatenate(joined, axis=1), vocal.sample_rate_hz), melody)


def harmonic_phases(
    f0_hz: Floats,
    start: NDArray[np.float64],
    frame_samples: int = FRAME_SAMPLES,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
) -> Floats:
    """Phase of F0 and its overtones where each frame begins.

    Args:
        f0_hz: [N], from the song's beginning; 0 where unvoiced: there the phase rests.
        start: [HARMONICS], cycles: where they start.
        frame_samples: of a frame.
        sample_rate_hz: of the excitation.

    Returns:
        [N, HARMONICS], cycles in [0, 1).

    Source: so-vits-svc-fork 4.2.30, `SineGen._f02sine`.
    """
    harmonic = np.arange(1, HARMONICS + 1)
    step = f0_hz.astype(np.float64) * frame_samples / sample_rate_hz
    begin = np.cumsum(step) - step
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


@dataclass(frozen=True)
class _Window:
    """What the models say of a window of the vocal."""

    content: Floats
    f0_hz: Floats
    confidence: Floats


async def _hear(
    chunks: AsyncIterator[Samples], analysis: _Analysis, windows: _Queue[_Window], work: _Work
) -> None:
    """Begin every analysis window as soon as its samples are there; then put None."""

    def begin(window: Floats) -> None:
        windows.put_nowait(work.begin(_analyse_window(window, analysis.voice, work)))

    try:
        async for chunk in chunks:
            for window in await asyncio.to_thread(analysis.push, to_mono(chunk)):
                begin(window)
        for window in await asyncio.to_thread(analysis.end):
            begin(window)
    finally:
        windows.put_nowait(None)


async def _analyse_window(samples: Floats, voice: Voice, work: _Work) -> _Window:
    inputs = {SAMPLES: samples[None]}
    async with work.room_to_hear:
        content, pitch = await asyncio.gather(
            work.infer(voice.content_model, inputs), work.infer(voice.pitch_model, inputs)
        )
    return _Window(content[CONTENT][0], pitch[F0][0], pitch[CONFIDENCE][0])


async def _begin_phrases(
    analysis: _Analysis,
    singer: _Singer,
    windows: _Queue[_Window],
    phrases: _Queue[_SungPhrase],
    work: _Work,
) -> None:
    """Begin every phrase as soon as all that it depends on is known; then put None."""
    try:
        while (window := await windows.get()) is not None:
            await asyncio.to_thread(analysis.add, await window)
            work.tell(analysis.n_frames / max(analysis.total_frames, 1) / 3)
            for phrase in await asyncio.to_thread(singer.next_phrases):
                phrases.put_nowait(work.begin(singer.sing(phrase)))
        await asyncio.to_thread(analysis.finish)
        for phrase in await asyncio.to_thread(singer.next_phrases):
            phrases.put_nowait(work.begin(singer.sing(phrase)))
    finally:
        phrases.put_nowait(None)


class _Analysis:
    """A vocal as the voice needs it, growing from its beginning, one window's core at a time.

    Attributes:
        content: [M, F], 50 features/s.
        track: the melody, in the voice's frames; as many as are final.
        level_db: of those frames.
    """

    def __init__(self, vocal: Vocal, voice: Voice) -> None:
        self.voice = voice
        self._is_resampled = voice.sample_rate_hz != SAMPLE_RATE_HZ
        self._resampler = StreamingResampler(vocal.sample_rate_hz, SAMPLE_RATE_HZ, 1)
        self._voice_resampler = StreamingResampler(vocal.sample_rate_hz, voice.sample_rate_hz, 1)
        n_samples, n_voice_samples = (
            -(-vocal.n_samples * rate_hz // vocal.sample_rate_hz)
            for rate_hz in (SAMPLE_RATE_HZ, voice.sample_rate_hz)
        )
        self._n_estimates = -(-n_samples // FRAME_SAMPLES)
        self._n_windows = -(-n_samples // CORE_SAMPLES)
        self.total_frames = -(-n_voice_samples // voice.frame_samples)
        self._n_features = content_features(n_samples, voice)
        # Features per frame of the voice, counted as the encoder does.
        self._content_ratio = self._n_features / max(n_voice_samples // voice.frame_samples, 1)
        self._heard = np.zeros(CONTEXT_SAMPLES, np.float32)  # 16 kHz; silence before the vocal
        self._begun = 0
        self._windows: list[_Window] = []
        self._heard_by_voice = np.zeros(0, np.float32)
        self._estimates_db = self.level_db = np.zeros(0, np.float32)
        self._estimates = self.track = PitchTrack(np.zeros(0, np.float32), np.zeros(0, np.bool_))
        self.content = np.zeros((0, 0), np.float32)
        self.is_whole = False

    @property
    def samples(self) -> Floats:
        """[T], the vocal at the voice's rate, mono, as far as it is there."""
        return self._heard_by_voice if self._is_resampled else self._heard[CONTEXT_SAMPLES:]

    @property
    def n_frames(self) -> int:
        """Frames of the voice that are final."""
        return len(self.track.voiced)

    def push(self, mono: Samples) -> list[Floats]:
        """Take the vocal's next samples, [1, t]; the windows that they complete."""
        self._heard = np.append(self._heard, self._resampler.push(mono)[0])
        if self._is_resampled:
            new = self._voice_resampler.push(mono)[0]
            self._heard_by_voice = np.append(self._heard_by_voice, new)
        # The window of core k needs the vocal up to one context beyond the core.
        return self._windows_to((len(self._heard) - 2 * CONTEXT_SAMPLES) // CORE_SAMPLES)

    def end(self) -> list[Floats]:
        """The windows that are left: there are no more samples, only silence."""
        self._heard = np.append(self._heard, self._resampler.flush()[0])
        if self._is_resampled:
            new = self._voice_resampler.flush()[0]
            self._heard_by_voice = np.append(self._heard_by_voice, new)
        return self._windows_to(self._n_windows)

    def add(self, window: _Window) -> None:
        """Take what the models say of the next window."""
        self._windows.append(window)
        self.content = join_windows([w.content for w in self._windows], self._n_features)
        known = min(len(self._windows) * CORE_SAMPLES // FRAME_SAMPLES, self._n_estimates)
        self._grow(known, max(known - SETTLING_FRAMES, 0))

    def finish(self) -> None:
        """Nothing follows: all frames are final."""
        self.is_whole = True
        self._grow(self._n_estimates, self._n_estimates)

    def content_of(self, first: int) -> Floats:
        """[voice.window_frames, F]: the content from a frame on."""
        if self.voice.content_expansion == "linear":
            return expand_content(self.content, first, self.voice.window_frames)
        return repeat_content(self.content, first, self.voice.window_frames, self._content_ratio)

    def melody(self, octaves: int | None) -> Melody:
        """What is known of it."""
        voiced_hz = self.track.f0_hz[self.track.voiced]
        return Melody(
            octaves or 0,
            float(self.track.voiced.mean()) if self.n_frames else 0.0,
            float(np.median(voiced_hz)) if len(voiced_hz) else 0.0,
        )

    def _windows_to(self, count: int) -> list[Floats]:
        begun, self._begun = self._begun, max(self._begun, min(count, self._n_windows))
        return [
            cut_frames(self._heard, index * CORE_SAMPLES, WINDOW_SAMPLES)
            for index in range(begun, self._begun)
        ]

    def _grow(self, known: int, final: int) -> None:
        """Clean the melody of `known` estimates, and keep what more is final of it."""
        self._estimates_db = grow_level_db(
            self._estimates_db, self._heard[CONTEXT_SAMPLES:], known, FRAME_SAMPLES
        )
        done = len(self._estimates.voiced)
        if final > done:
            # From the last voiced frame on, so that gaps are bridged from both sides.
            last_voiced = np.flatnonzero(self._estimates.voiced)[-1:]
            begin = max(min([done - 2 * SETTLING_FRAMES, *last_voiced.tolist()]), 0)
            clean = clean_pitch(
                join_windows([window.f0_hz for window in self._windows], known)[begin:],
                join_windows([window.confidence for window in self._windows], known)[begin:],
                self._estimates_db[begin:],
                loud_level_db(self._estimates_db),
            )
            new = slice(done - begin, final - begin)
            self._estimates = PitchTrack(
                np.append(self._estimates.f0_hz, clean.f0_hz[new]),
                np.append(self._estimates.voiced, clean.voiced[new]),
            )
        per_estimate = self.voice.sample_rate_hz / SAMPLE_RATE_HZ * FRAME_SAMPLES
        n_frames = int((final - 0.5) * per_estimate / self.voice.frame_samples + 0.5)
        n_frames = self.total_frames if self.is_whole else max(n_frames, self.n_frames)
        self.track = track_in_frames(self._estimates, n_frames, self.voice)
        self.level_db = grow_level_db(
            self.level_db, self.samples, self.n_frames, self.voice.frame_samples
        )


class _Singer:
    """Cuts a vocal into phrases, has each sung, and joins them."""

    def __init__(
        self, analysis: _Analysis, octaves: int | None, noise_seed: int, work: _Work
    ) -> None:
        self.octaves = octaves
        self._analysis, self._voice, self._work = analysis, analysis.voice, work
        voice, n_frames = analysis.voice, analysis.total_frames
        rng = np.random.default_rng(noise_seed)
        self._phase_start = np.append(0.0, rng.random(HARMONICS - 1))
        self._noise = rng.standard_normal((n_frames, voice.latent_channels), np.float32)
        self._noise *= np.float32(voice.noise_scale)
        self._source_noise = rng.standard_normal(n_frames * voice.frame_samples, np.float32)
        self._f0_hz, self._phase = np.zeros(0, np.float32), np.zeros((0, HARMONICS), np.float32)
        self._cut = 0  # frames that belong to a phrase
        self._vocal = np.zeros(n_frames * voice.frame_samples, np.float32)
        self._given = 0  # frames

    def next_phrases(self) -> list[Phrase]:
        """The phrases that can be sung now, after the last ones."""
        known, voice, track = self._analysis.n_frames, self._voice, self._analysis.track
        self._decide_octaves()
        track = track.shifted(self.octaves or 0)
        self._f0_hz = track.f0_hz * track.voiced if voice.unvoiced_f0 == "zero" else track.f0_hz
        self._phase = harmonic_phases(
            self._f0_hz, self._phase_start, voice.frame_samples, voice.sample_rate_hz
        )
        phrases = []
        while self._cut < known:
            # A phrase's window, and the frames in which it may end, must be known.
            if self._cut + voice.window_frames > known and not self._analysis.is_whole:
                break
            phrase = next_phrase(
                self._analysis.level_db, track.voiced, self._cut, voice.window_frames
            )
            if self.octaves is None and self._depends_on_octaves(phrase):
                break
            phrases.append(phrase)
            self._cut = phrase.stop
        return phrases

    async def sing(self, phrase: Phrase) -> _SungPhrase:
        """Its window's samples; None is silence."""
        analysis, voice = self._analysis, self._voice
        if self._is_silent(phrase):
            return _SungPhrase(phrase, None)
        first, length, hop = phrase.first, voice.window_frames, voice.frame_samples
        voiced = analysis.track.voiced.astype(np.float32)
        inputs: dict[str, NDArray[Any]] = {
            CONTENT: analysis.content_of(first)[None],
            F0: cut_frames(self._f0_hz, first, length)[None],
            VOICED: cut_frames(voiced, first, length)[None],
            SPEAKER: np.array([[voice.speaker]], np.int64),
            NOISE: cut_frames(self._noise, first, length)[None],
        }
        if voice.has_excitation:
            inputs[PHASE] = cut_frames(self._phase, first, length)[None]
            inputs[SOURCE_NOISE] = cut_frames(self._source_noise, first, length, hop)[None]
        async with self._work.room_to_sing:
            outputs = await self._work.infer(voice.model, inputs)
        self._work.tell(1 / 3 + 2 / 3 * phrase.stop / analysis.total_frames)
        return _SungPhrase(phrase, np.asarray(outputs[AUDIO][0]))

    def join(self, sung: _SungPhrase) -> Floats:
        """Take the next phrase; what no later one can change, [t] at the voice's rate."""
        hop, total = self._voice.frame_samples, self._analysis.total_frames
        add_phrase(self._vocal, sung.phrase, sung.window, hop)
        is_last = sung.phrase.stop == total
        final = total if is_last else sung.phrase.stop - FADE_FRAMES
        begin = max(self._given - FOLLOWED_FRAMES, 0)
        end = final if is_last else final - FOLLOWED_FRAMES
        if end <= self._given:
            return np.zeros(0, np.float32)
        original = cut_frames(self._analysis.samples, begin, final - begin, hop)
        followed = follow_loudness(self._vocal[begin * hop : final * hop], original, hop)
        given = followed[(self._given - begin) * hop : (end - begin) * hop]
        self._given = end
        return given

    def _is_silent(self, phrase: Phrase) -> bool:
        return bool(self._analysis.level_db[phrase.start : phrase.stop].max() < SILENT_DBFS)

    def _depends_on_octaves(self, phrase: Phrase) -> bool:
        if self._is_silent(phrase):
            return False
        around = slice(max(phrase.first, 0), phrase.first + self._voice.window_frames)
        is_voiced = bool(self._analysis.track.voiced[around].any())
        return is_voiced or self._voice.unvoiced_f0 == "interpolated"

    def _decide_octaves(self) -> None:
        """Once for the song: when enough of its singer was heard."""
        if self.octaves is None:
            track, level_db = self._analysis.track, self._analysis.level_db
            # What leaked into the vocal before the singer begins is no melody.
            clear = track.voiced & (level_db > CLEAR_DBFS)
            if self._analysis.is_whole and not clear.any():
                clear = track.voiced
            if self._analysis.is_whole or clear.sum() >= OCTAVE_FRAMES:
                self.octaves = octaves_to_range(
                    PitchTrack(track.f0_hz, clear), self._voice.low_hz, self._voice.high_hz
                )


@dataclass(frozen=True)
class _SungPhrase:
    """A phrase, and its window's samples; None is silence."""

    phrase: Phrase
    window: Floats | None


class _Work:
    """The calls of one song: a few at once, all of them ended when the song is."""

    def __init__(self, infer: Infer, progress: Progress | None) -> None:
        self._infer = infer
        self._progress = progress
        self._furthest = 0.0
        self.room_to_hear = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self.room_to_sing = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self._tasks: list[asyncio.Task[Any]] = []

    async def infer(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
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
        self._tasks.clear()  # one that was cancelled refers to this, and its results to much
