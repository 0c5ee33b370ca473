"""file, options -> result: the calls that every transport offers, and nothing of any transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from remix.audio import Audio, Samples
from remix.audio_codec import Limits, decode, encode
from remix.beats import find_beats
from remix.convert_voice import Vocal, convert_voice
from remix.convert_voice import join_chunks as join_vocal
from remix.errors import InvalidNotes, LimitExceeded
from remix.generate_notes import HeardNotes, generate_notes, one_plan, plan_song
from remix.generate_notes import join_chunks as join_notes
from remix.loudness import master
from remix.manifest import Manifest, ModelEntry, OwnVoices, installed
from remix.midi import read_midi, write_midi
from remix.mix_tracks import PEAK_CEILING_DB, SAMPLE_RATE_HZ
from remix.models import Models, choose_models, installed_voices
from remix.note_grid import end_of, find_grid, read_grid
from remix.note_json import read_json
from remix.notes import BeatGrid, Note, Tracks
from remix.options import ConvertOptions, GenerateOptions, MixOptions, RemixOptions, SeparateOptions
from remix.pipeline import Listen, remix_song, to_mixture
from remix.report import MadeRemix, StageTime
from remix.separate_stems import StemsChunk, join_chunks, separate_stems
from remix.settings import Settings
from remix.similarity import report_similarity
from remix.stages import STAGES, Infer, Progress, Stage
from remix.synthesize_audio import synthesize_tracks
from remix.transcribe_notes import transcribe_stems

MIDI_MAGIC = b"MThd"

RING_S = 3.0
"""How long the last notes of a file may ring."""


class TimedInfer(Infer, Protocol):
    """An `Infer` that remembers where the time went."""

    @property
    def times(self) -> Mapping[Stage, StageTime]:
        """By stage."""
        ...


@dataclass(frozen=True)
class NotesOnGrid:
    """Notes, and what a MIDI file needs besides.

    Args:
        tracks: notes by role.
        grid: the beats that they sit on.
        duration_s: of the song.
    """

    tracks: Tracks
    grid: BeatGrid
    duration_s: float

    def midi(self) -> bytes:
        """The bytes of a MIDI file."""
        return write_midi(self.tracks, self.grid, self.duration_s)


class Composer:
    """The whole flow, and each stage alone.

    Every call raises what of `remix.errors` applies to it: `InvalidInput` of any kind for the
    file and the options, `QueueFull` and `RunnerUnavailable` for a stage that cannot.

    Args:
        settings: limits, and where the models are.
        manifest: the models; enrolled voices are added to it as they come, and taken out.
        infer_for_song: makes an `Infer` that keeps the times of one song.
    """

    def __init__(
        self, settings: Settings, manifest: Manifest, infer_for_song: Callable[[], TimedInfer]
    ) -> None:
        self._manifest = manifest
        self._own_voices = OwnVoices(manifest, settings.models_dir)
        self.models_dir = settings.models_dir
        self._infer_for_song = infer_for_song
        self._limits = Limits(duration_s=settings.max_duration_s)

    @property
    def manifest(self) -> Manifest:
        """The models, and the voices that are enrolled now."""
        self._own_voices.refresh()
        return self._manifest

    async def remix(
        self,
        song: Path,
        options: RemixOptions,
        progress: Progress,
        listen: Listen | None = None,
    ) -> MadeRemix:
        """Song -> remix, which `listen` is given stretch by stretch while it is made."""
        models, infer = self._models(options), self._infer_for_song()
        start_s = time.monotonic()
        audio = await self.decode(song, SAMPLE_RATE_HZ)
        decoded_s = time.monotonic()
        made = await remix_song(audio, options, models, infer, progress, listen)
        return MadeRemix(
            remix=made,
            options=options,
            models=models,
            times=infer.times,
            decode_s=decoded_s - start_s,
            wall_s=time.monotonic() - decoded_s,
        )

    async def separate(
        self, song: Path, options: SeparateOptions, progress: Progress
    ) -> dict[str, Audio]:
        """Song -> stems by name, unclipped."""
        models = self._models(RemixOptions(separator=options.separator))
        mixture = await self._mixture(song)
        infer = self._infer_for_song()
        stems = await join_chunks(
            separate_stems(mixture, models.separator, infer, progress=progress)
        )
        return {name: Audio(stem, mixture.sample_rate_hz) for name, stem in stems.items()}

    async def transcribe(self, song: Path, progress: Progress) -> NotesOnGrid:
        """Song -> every note heard in it. Timbre is lost: all of them are the piano's."""
        models = self._models(RemixOptions())
        mixture = await self._mixture(song)
        beats = asyncio.create_task(asyncio.to_thread(find_beats, mixture))

        async def whole() -> AsyncIterator[StemsChunk]:
            yield StemsChunk(0, {"song": mixture.samples})

        try:
            heard = await transcribe_stems(
                whole(), mixture.sample_rate_hz, models.transcriber, self._infer_for_song()
            )
            progress("transcribe_notes", 1.0)
            return NotesOnGrid({"piano": heard["song"]}, await beats, mixture.duration_s)
        finally:
            beats.cancel()

    async def generate(
        self, notes: Path, options: GenerateOptions, progress: Progress
    ) -> NotesOnGrid:
        """Notes -> new music from them, on their own beats."""
        models = self._models(RemixOptions())
        given = await asyncio.to_thread(self._read_on_grid, notes)
        heard: HeardNotes = {role: track for role, track in given.tracks.items()}  # noqa: C416
        plan = await asyncio.to_thread(plan_song, heard, given.grid, given.duration_s, options)
        written = generate_notes(
            one_plan(plan),
            given.grid,
            given.duration_s,
            models.generator,
            self._infer_for_song(),
            options,
            progress=progress,
        )
        return NotesOnGrid(await join_notes(written), given.grid, given.duration_s)

    async def convert(self, vocals: Path, options: ConvertOptions, progress: Progress) -> Audio:
        """Vocal -> the same by another voice, at the rate of the file."""
        models = self._models(RemixOptions(voice=options.voice))
        audio = await self.decode(vocals)

        async def whole() -> AsyncIterator[Samples]:
            yield audio.samples

        vocal = Vocal(audio.samples.shape[-1], audio.sample_rate_hz)
        converted = convert_voice(
            whole(),
            vocal,
            models.voice,
            self._infer_for_song(),
            octaves=options.octaves,
            noise_seed=options.noise_seed,
            progress=progress,
        )
        return (await join_vocal(converted, vocal)).audio

    async def synthesize(self, notes: Path, progress: Progress) -> Audio:
        """Notes -> their sound, tracks as loud beside each other as they are written."""
        models = self._models(RemixOptions())
        tracks, duration_s = await asyncio.to_thread(self._read, notes)
        length_samples = round((duration_s + RING_S) * SAMPLE_RATE_HZ)
        played = await synthesize_tracks(
            tracks, length_samples, models.synthesizer, self._infer_for_song(), progress=progress
        )
        sound = Audio(np.sum(list(played.values()), axis=0), SAMPLE_RATE_HZ)
        loudness_lufs = MixOptions().loudness_lufs
        return await asyncio.to_thread(master, sound, loudness_lufs, PEAK_CEILING_DB)

    def default_models(self) -> set[str]:
        """Names of the models that work when nobody asks for others."""
        found = (installed(self.manifest, stage, self.models_dir) for stage in STAGES)
        return {models[0].name for models in found if models}

    async def decode(self, song: Path, new_hz: int | None = None) -> Audio:
        """The sound of an uploaded file, at its own rate or, resampled as it streams, at another.

        So a song of 192 kHz never takes more memory than one at the mix's rate.
        """
        return await decode(song, self._limits, new_hz)

    def voices(self) -> list[tuple[str, ModelEntry]]:
        """Every voice that can sing, and the model that it is of; the default first."""
        return installed_voices(self.manifest, self.models_dir)

    def _models(self, options: RemixOptions) -> Models:
        return choose_models(self.manifest, self.models_dir, options)

    async def _mixture(self, song: Path) -> Audio:
        return await asyncio.to_thread(to_mixture, await self.decode(song, SAMPLE_RATE_HZ))

    def _read(self, notes: Path) -> tuple[Tracks, float]:
        tracks = read_notes(notes)
        duration_s, limit_s = end_of(tracks), self._limits.duration_s
        if duration_s == 0.0:
            raise InvalidNotes(
                "The file has 0 notes; at least 1 is needed.",
                value=0,
                limit=1,
                remedy="Send at least one note of one of the known instruments.",
            )
        if duration_s > limit_s:
            raise LimitExceeded(
                f"The notes end at {duration_s:.0f} s; at most {limit_s:.0f} s are taken.",
                value=round(duration_s),
                limit=limit_s,
                remedy="Cut them first.",
            )
        return tracks, duration_s

    def _read_on_grid(self, notes: Path) -> NotesOnGrid:
        tracks, duration_s = self._read(notes)
        data = notes.read_bytes()
        if data.startswith(MIDI_MAGIC):
            return NotesOnGrid(tracks, read_grid(data, tracks, duration_s), duration_s)
        return NotesOnGrid(tracks, find_grid(tracks, duration_s), duration_s)


def warm_up() -> None:
    """Load what the first song would wait for: SciPy's parts, matplotlib's fonts, libsndfile."""
    second = Audio(np.zeros((2, SAMPLE_RATE_HZ), np.float32), SAMPLE_RATE_HZ)
    find_beats(second)
    report_similarity(second, second)
    encode(second, "wav16")


def tracks_of_stems(heard: Mapping[str, Sequence[Note]]) -> Tracks:
    """Heard notes by stem -> by role: the bass is the bass, whatever else there is the piano's.

    >>> tracks_of_stems({"bass": [], "other": [Note(0, 1, 60, 80)]})
    {'bass': [], 'piano': [Note(onset_s=0, duration_s=1, pitch=60, velocity=80)]}
    """
    tracks: Tracks = {}
    for stem, notes in heard.items():
        tracks.setdefault("bass" if stem == "bass" else "piano", []).extend(notes)
    return {role: sorted(notes) for role, notes in tracks.items()}


def read_notes(file: Path) -> Tracks:
    """The notes of an uploaded file: MIDI, or JSON as `remix.note_json` has it.

    Raises:
        InvalidNotes: it is neither, or is damaged.
        LimitExceeded: more notes than are taken.
    """
    data = file.read_bytes()
    return read_midi(data) if data.startswith(MIDI_MAGIC) else read_json(data)
