"""song -> remix: the whole flow.

Both branches run at once, and a stage starts on the first windows of the stage before:

    song ─┬─ separate_stems ─┬─ convert_voice ────────────────────────────────────────┬─ mix_tracks
          │                  └─ transcribe_notes ─┬─ generate_notes ─ synthesize_audio ┘
          └─ find_beats ──────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from remix.audio import Audio, Samples
from remix.beats import find_beats
from remix.broadcast import Broadcast
from remix.convert_voice import ConvertedVocal, Vocal, convert_voice
from remix.generate_notes import generate_notes, plan_song
from remix.generate_notes import join_chunks as join_notes
from remix.mix_tracks import SAMPLE_RATE_HZ, MixParts, MixReport, mix_tracks
from remix.models import Models
from remix.notes import BeatGrid, Note, Role, Tracks
from remix.options import RemixOptions
from remix.resample import resample_audio, to_stereo
from remix.separate_stems import StemsChunk, join_chunks, separate_stems
from remix.stages import Infer, Progress
from remix.synthesize_audio import synthesize_audio
from remix.transcribe_notes import transcribe_stems

VOCALS = "vocals"


@dataclass(frozen=True)
class NewBand:
    """The instrumental branch: what was heard, written and played.

    Args:
        heard: notes of the pitched stems, by stem.
        grid: the song's beats and key.
        written: notes by role.
        played: [2, T] by role.
        warnings: what had to be assumed.
    """

    heard: Mapping[str, Sequence[Note]]
    grid: BeatGrid
    written: Tracks
    played: Mapping[Role, Samples]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Remix:
    """All that comes out of the flow; every sound at the mix's rate and of the song's length.

    Args:
        audio: the remix.
        song: what went in, in stereo.
        stems: of the song, [2, T] by name.
        band: the new one.
        voice: the converted vocal.
        mix: what the mix found and did.
    """

    audio: Audio
    song: Audio
    stems: Mapping[str, Samples]
    band: NewBand
    voice: ConvertedVocal
    mix: MixReport


async def remix_song(
    song: Audio, options: RemixOptions, models: Models, infer: Infer, progress: Progress
) -> Remix:
    """Turn a song into a remix.

    Args:
        song: any rate, 1 to 8 channels.
        options: of every stage.
        models: what to run.
        infer: runs it.
        progress: is told how far each stage is.

    Raises:
        RemixError: of the first stage that failed; the others are cancelled.
    """
    mixture = await asyncio.to_thread(to_mixture, song)
    length = mixture.samples.shape[1]
    stems = Broadcast(separate_stems(mixture, models.separator, infer, progress=progress))
    to_keep, to_sing, to_hear = stems.reader(), stems.reader(), stems.reader()
    try:
        async with asyncio.TaskGroup() as group:
            kept = group.create_task(join_chunks(to_keep))
            voice = group.create_task(
                convert_voice(
                    _vocals(to_sing),
                    Vocal(length, SAMPLE_RATE_HZ),
                    models.voice,
                    infer,
                    octaves=options.octaves,
                    noise_seed=options.noise_seed,
                    progress=progress,
                )
            )
            band = group.create_task(
                replace_band(to_hear, mixture, models, infer, options, progress)
            )
            await stems.run()
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    vocals = kept.result()[VOCALS]
    parts = MixParts(
        length_samples=length,
        vocal=voice.result().audio.samples,
        band=band.result().played,
        original_vocal=vocals,
        original_accompaniment=mixture.samples - vocals,
    )
    audio, report = await asyncio.to_thread(mix_tracks, parts, options)
    return Remix(audio, mixture, kept.result(), band.result(), voice.result(), report)


async def replace_band(
    stems: AsyncIterator[StemsChunk],
    mixture: Audio,
    models: Models,
    infer: Infer,
    options: RemixOptions,
    progress: Progress,
) -> NewBand:
    """The instrumental branch: hear the stems, write new notes on the song's beats, play them."""
    length = mixture.samples.shape[1]
    beats = asyncio.create_task(asyncio.to_thread(find_beats, mixture))
    try:
        chunks = _told(stems, length, progress)
        heard = await transcribe_stems(chunks, SAMPLE_RATE_HZ, models.transcriber, infer)
        grid = await beats
    finally:
        beats.cancel()
    plan = await asyncio.to_thread(plan_song, heard, grid, mixture.duration_s, options)
    notes = Broadcast(
        generate_notes(
            plan, grid, mixture.duration_s, models.generator, infer, options, progress=progress
        )
    )
    to_join, to_play = notes.reader(), notes.reader()
    async with asyncio.TaskGroup() as group:
        written = group.create_task(join_notes(to_join))
        played = group.create_task(
            synthesize_audio(to_play, length, models.synthesizer, infer, progress=progress)
        )
        await notes.run()
    return NewBand(heard, grid, written.result(), played.result(), plan.warnings)


def to_mixture(song: Audio) -> Audio:
    """The song as the flow takes it: stereo at the mix's rate."""
    return resample_audio(Audio(to_stereo(song.samples), song.sample_rate_hz), SAMPLE_RATE_HZ)


async def _vocals(chunks: AsyncIterator[StemsChunk]) -> AsyncIterator[Samples]:
    async for chunk in chunks:
        yield chunk.stems[VOCALS]


async def _told(
    chunks: AsyncIterator[StemsChunk], length: int, progress: Progress
) -> AsyncIterator[StemsChunk]:
    """The same chunks; when the next one is asked for, the last one's notes are under way."""
    async for chunk in chunks:
        yield chunk
        done = chunk.start_sample + chunk.stems[VOCALS].shape[1]
        progress("transcribe_notes", done / length)


def _first(errors: BaseException) -> BaseException:
    """The first error of a task group, whichever depth it is at."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
