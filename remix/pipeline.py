"""song -> remix: the whole flow.

Both branches run at once, a stage starts on the first windows of the stage before, and the mix is
finished from the song's beginning on while its end is still being separated:

    song ─┬─ separate_stems ─┬─ convert_voice ────────────────────────────────────────┬─ mix_tracks
          │                  └─ transcribe_notes ─┬─ generate_notes ─ synthesize_audio ┘
          └─ find_beats ──────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from remix.audio import Audio, Samples
from remix.beats import find_beats
from remix.broadcast import Broadcast
from remix.convert_voice import ConvertedVocal, Vocal, VocalChunk, convert_voice
from remix.convert_voice import join_chunks as join_vocal
from remix.generate_notes import SongPlan, generate_notes, plan_while_heard
from remix.generate_notes import join_chunks as join_notes
from remix.mix_tracks import SAMPLE_RATE_HZ, Mixer, MixReport
from remix.models import Models
from remix.notes import BeatGrid, Note, Tracks
from remix.options import RemixOptions
from remix.resample import resample_audio, to_stereo
from remix.separate_stems import StemsChunk, separate_stems
from remix.separate_stems import join_chunks as join_stems
from remix.stages import Infer, Progress
from remix.synthesize_audio import SoundChunk, synthesize_audio
from remix.transcribe_notes import Section, transcribe_stems

Item = TypeVar("Item")

VOCALS = "vocals"


@dataclass(frozen=True)
class NewBand:
    """The instrumental branch: what was heard, written and played.

    Args:
        heard: notes of the pitched stems, by stem.
        grid: the song's beats and key.
        written: notes by role.
        warnings: what had to be assumed.
    """

    heard: Mapping[str, Sequence[Note]]
    grid: BeatGrid
    written: Tracks
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


class Listen(Protocol):
    """Is given the remix, stretch by stretch, while it is being made."""

    def __call__(self, stretch: Samples) -> None:
        """Take the next samples, [2, t] at the mix's rate; they are final."""
        ...


async def remix_song(
    song: Audio,
    options: RemixOptions,
    models: Models,
    infer: Infer,
    progress: Progress,
    listen: Listen | None = None,
) -> Remix:
    """Turn a song into a remix.

    Args:
        song: any rate, 1 to 8 channels.
        options: of every stage.
        models: what to run.
        infer: runs it.
        progress: is told how far each stage is.
        listen: is given what is finished of the remix, in order.

    Raises:
        RemixError: of the first stage that failed; the others are cancelled.
    """
    mixture = await asyncio.to_thread(to_mixture, song)
    length = mixture.samples.shape[1]
    stems = Broadcast(separate_stems(mixture, models.separator, infer, progress=progress))
    to_keep, to_sing, to_hear, to_mix = (stems.reader() for _ in range(4))
    vocal = Vocal(length, SAMPLE_RATE_HZ)
    voice = Broadcast(
        convert_voice(
            _vocals(to_sing),
            vocal,
            models.voice,
            infer,
            octaves=options.octaves,
            noise_seed=options.noise_seed,
            progress=progress,
        )
    )
    band = _NewBand(mixture, models, infer, options, progress)
    mixing = _Mixing(mixture.samples, options, listen)
    try:
        async with asyncio.TaskGroup() as group:
            kept = group.create_task(join_stems(to_keep))
            sung = group.create_task(join_vocal(voice.reader(), vocal))
            group.create_task(mixing.take_originals(_vocals(to_mix)))
            group.create_task(mixing.take_vocal(voice.reader()))
            group.create_task(mixing.take_band(band.sounds()))
            made = group.create_task(band.make(to_hear))
            group.create_task(voice.run())
            await stems.run()
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    return Remix(
        Audio(mixing.remix(), SAMPLE_RATE_HZ),
        mixture,
        kept.result(),
        made.result(),
        sung.result(),
        mixing.report(),
    )


class _NewBand:
    """The instrumental branch: hears the stems, writes notes on the song's beats, plays them."""

    def __init__(
        self,
        mixture: Audio,
        models: Models,
        infer: Infer,
        options: RemixOptions,
        progress: Progress,
    ) -> None:
        self._mixture, self._models, self._infer = mixture, models, infer
        self._options, self._progress = options, progress
        self._sections: asyncio.Queue[Section | None] = asyncio.Queue()
        self._sounds: asyncio.Queue[SoundChunk | None] = asyncio.Queue()

    async def make(self, stems: AsyncIterator[StemsChunk]) -> NewBand:
        """All of it."""
        mixture, models, infer = self._mixture, self._models, self._infer
        length, duration_s = mixture.samples.shape[1], mixture.duration_s
        async with asyncio.TaskGroup() as group:
            heard = group.create_task(self._hear(stems))
            grid = await asyncio.to_thread(find_beats, mixture)
            plans = Broadcast(
                plan_while_heard(_until_none(self._sections), grid, duration_s, self._options)
            )
            notes = Broadcast(
                generate_notes(
                    plans.reader(),
                    grid,
                    duration_s,
                    models.generator,
                    infer,
                    self._options,
                    progress=self._progress,
                )
            )
            to_play = notes.reader()
            written = group.create_task(join_notes(notes.reader()))
            warnings = group.create_task(_last_warnings(plans.reader()))
            group.create_task(plans.run())
            group.create_task(notes.run())
            played = synthesize_audio(
                to_play, length, models.synthesizer, infer, progress=self._progress
            )
            async for sound in played:
                self._sounds.put_nowait(sound)
            self._sounds.put_nowait(None)
        return NewBand(heard.result(), grid, written.result(), warnings.result())

    def sounds(self) -> AsyncIterator[SoundChunk]:
        """What is played, for one reader."""
        return _until_none(self._sounds)

    async def _hear(self, stems: AsyncIterator[StemsChunk]) -> dict[str, list[Note]]:
        heard = await transcribe_stems(
            _told(stems, self._mixture.samples.shape[1], self._progress),
            SAMPLE_RATE_HZ,
            self._models.transcriber,
            self._infer,
            on_section=self._sections.put_nowait,
        )
        self._sections.put_nowait(None)
        return heard


class _Mixing:
    """The mix, fed by three streams; whoever completes a block has it mixed."""

    def __init__(self, song: Samples, options: RemixOptions, listen: Listen | None) -> None:
        self._song, self._options, self._listen = song, options, listen
        self._mixer: Mixer | None = None
        self._lock = asyncio.Lock()
        self._stretches: list[Samples] = []

    async def take_originals(self, vocals: AsyncIterator[Samples]) -> None:
        async for samples in vocals:
            await self._take(partial(Mixer.add_original_vocal, samples=samples))

    async def take_vocal(self, vocal: AsyncIterator[VocalChunk]) -> None:
        async for chunk in vocal:
            await self._take(partial(Mixer.add_vocal, samples=chunk.samples))

    async def take_band(self, band: AsyncIterator[SoundChunk]) -> None:
        async for sound in band:
            await self._take(
                partial(Mixer.add_band, tracks=sound.tracks, n_samples=sound.n_samples)
            )

    def remix(self) -> Samples:
        """All of it, once the streams have ended."""
        return np.concatenate(self._stretches, axis=1)

    def report(self) -> MixReport:
        assert self._mixer is not None
        return self._mixer.report()

    async def _take(self, add: Callable[[Mixer], None]) -> None:
        async with self._lock:
            stretch = await asyncio.to_thread(self._add, add)
            self._stretches.append(stretch)
            if self._listen and stretch.shape[1]:
                self._listen(stretch)

    def _add(self, add: Callable[[Mixer], None]) -> Samples:
        if self._mixer is None:
            self._mixer = Mixer(self._song, self._options)
        add(self._mixer)
        return self._mixer.take()


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


async def _until_none(queue: asyncio.Queue[Item | None]) -> AsyncIterator[Item]:
    while (item := await queue.get()) is not None:
        yield item


async def _last_warnings(plans: AsyncIterator[SongPlan]) -> tuple[str, ...]:
    warnings: tuple[str, ...] = ()
    async for plan in plans:
        warnings = plan.warnings
    return warnings


def _first(errors: BaseException) -> BaseException:
    """The first error of a task group, whichever depth it is at."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
