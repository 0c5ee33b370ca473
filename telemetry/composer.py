"""The composer's calls, observed: how long they take and how much sound they work on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prometheus_client import Counter, Histogram

from remix.audio import Audio, Samples
from remix.composer import Composer, NotesOnGrid
from remix.options import ConvertOptions, GenerateOptions, RemixOptions, SeparateOptions
from remix.pipeline import Listen
from remix.report import MadeRemix
from remix.stages import Progress
from telemetry import traces
from telemetry.exposition import LONG_SECONDS

REMIX_SECONDS = Histogram(
    "philharmonics_remix_seconds",
    "Time from a decoded song to its remix, by the song's length (at most so many seconds)",
    ["song_seconds"],
    buckets=LONG_SECONDS,
)
REMIX_PACE = Histogram(
    "philharmonics_remix_pace_ratio",
    "Seconds of work for each second of a song",
    buckets=(0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
AUDIO_SECONDS = Counter(
    "philharmonics_audio_seconds",
    "Seconds of sound that were worked on, by what was asked for",
    ["call"],
)

LENGTHS_S = (30, 60, 120, 300, 600)
"""Classes of songs by their length; a longer one is `+Inf`."""


class ObservedComposer(Composer):
    """See `remix.composer.Composer`, of which nothing is done differently."""

    async def remix(
        self,
        song: Path,
        options: RemixOptions,
        progress: Progress,
        listen: Listen | None = None,
    ) -> MadeRemix:
        """See `Composer.remix`."""
        with traces.song("remix") as spans:

            def mixed(stretch: Samples) -> None:
                spans.within("mix_tracks")
                spans.did("mix_tracks")
                if listen is not None:
                    listen(stretch)

            made = await super().remix(song, options, progress, mixed)
            made = replace(made, trace_id=traces.trace_id())
        duration_s = made.remix.song.duration_s
        REMIX_SECONDS.labels(length_class(duration_s)).observe(made.wall_s)
        REMIX_PACE.observe(made.wall_s / duration_s)
        AUDIO_SECONDS.labels("remix").inc(duration_s)
        return made

    async def separate(
        self, song: Path, options: SeparateOptions, progress: Progress
    ) -> dict[str, Audio]:
        """See `Composer.separate`."""
        with traces.song("separate"):
            stems = await super().separate(song, options, progress)
        AUDIO_SECONDS.labels("separate").inc(next(iter(stems.values())).duration_s)
        return stems

    async def transcribe(self, song: Path, progress: Progress) -> NotesOnGrid:
        """See `Composer.transcribe`."""
        with traces.song("transcribe"):
            notes = await super().transcribe(song, progress)
        AUDIO_SECONDS.labels("transcribe").inc(notes.duration_s)
        return notes

    async def generate(
        self, notes: Path, options: GenerateOptions, progress: Progress
    ) -> NotesOnGrid:
        """See `Composer.generate`."""
        with traces.song("generate"):
            written = await super().generate(notes, options, progress)
        AUDIO_SECONDS.labels("generate").inc(written.duration_s)
        return written

    async def convert(self, vocals: Path, options: ConvertOptions, progress: Progress) -> Audio:
        """See `Composer.convert`."""
        with traces.song("convert"):
            sung = await super().convert(vocals, options, progress)
        AUDIO_SECONDS.labels("convert").inc(sung.duration_s)
        return sung

    async def synthesize(self, notes: Path, progress: Progress) -> Audio:
        """See `Composer.synthesize`."""
        with traces.song("synthesize"):
            sound = await super().synthesize(notes, progress)
        AUDIO_SECONDS.labels("synthesize").inc(sound.duration_s)
        return sound

    async def decode(self, song: Path, new_hz: int | None = None) -> Audio:
        """See `Composer.decode`."""
        with traces.part("decode"):
            return await super().decode(song, new_hz)


def length_class(duration_s: float) -> str:
    """The class of a song.

    >>> length_class(29.5), length_class(61), length_class(3600)
    ('30', '120', '+Inf')
    """
    return next((str(limit_s) for limit_s in LENGTHS_S if duration_s <= limit_s), "+Inf")
