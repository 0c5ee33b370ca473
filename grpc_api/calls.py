"""What each call does that works within itself: a file and what is wanted -> files."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from grpc_api.convert import options_of
from remix.audio import Audio
from remix.audio_codec import Format, encode
from remix.composer import Composer, NotesOnGrid
from remix.errors import InvalidOption
from remix.note_json import write_json
from remix.options import ConvertOptions, GenerateOptions, RemixOptions, SeparateOptions
from remix.result_files import remix_files, stem_files
from remix.stages import Progress
from remix_v1 import remix_pb2 as messages

Files = Iterator[tuple[str, bytes]]
"""Name and content, made one by one as they are asked for."""

Work = Callable[[Composer, Path, Any, Progress], Coroutine[Any, Any, Files]]
"""(composer, file, head, progress) -> files."""

AUDIO_FORMATS: dict[int, tuple[str, Format]] = {
    messages.AUDIO_FORMAT_UNSPECIFIED: ("wav", "wav16"),
    messages.AUDIO_FORMAT_WAV: ("wav", "wav16"),
    messages.AUDIO_FORMAT_FLAC: ("flac", "flac"),
    messages.AUDIO_FORMAT_MP3: ("mp3", "mp3"),
}
"""The name's suffix, and what `encode` is asked for."""

NOTES_FORMATS: dict[int, str] = {
    messages.NOTES_FORMAT_UNSPECIFIED: "mid",
    messages.NOTES_FORMAT_MIDI: "mid",
    messages.NOTES_FORMAT_JSON: "json",
}
"""The name's suffix."""


async def remix(composer: Composer, song: Path, head: Any, progress: Progress) -> Files:
    """The remix alone, or all there is of it."""
    options = options_of(RemixOptions, head.options)
    suffix, form = _choose(AUDIO_FORMATS, head.format)
    made = await composer.remix(song, options, progress)
    if head.everything:
        return remix_files(made, composer.manifest, composer.models_dir)
    return _audio_file(f"remix.{suffix}", made.remix.audio, form)


async def separate(composer: Composer, song: Path, head: Any, progress: Progress) -> Files:
    """Stems."""
    return stem_files(
        await composer.separate(song, options_of(SeparateOptions, head.options), progress)
    )


async def transcribe(composer: Composer, song: Path, head: Any, progress: Progress) -> Files:
    """Notes that were heard."""
    suffix = _choose(NOTES_FORMATS, head.format)
    return _notes_file("notes", await composer.transcribe(song, progress), suffix)


async def generate(composer: Composer, notes: Path, head: Any, progress: Progress) -> Files:
    """Notes that were written."""
    options = options_of(GenerateOptions, head.options)
    suffix = _choose(NOTES_FORMATS, head.format)
    return _notes_file("generated", await composer.generate(notes, options, progress), suffix)


async def convert(composer: Composer, vocals: Path, head: Any, progress: Progress) -> Files:
    """The vocal by another voice."""
    options = options_of(ConvertOptions, head.options)
    suffix, form = _choose(AUDIO_FORMATS, head.format)
    return _audio_file(f"voice.{suffix}", await composer.convert(vocals, options, progress), form)


async def synthesize(composer: Composer, notes: Path, head: Any, progress: Progress) -> Files:
    """The sound of notes."""
    suffix, form = _choose(AUDIO_FORMATS, head.format)
    return _audio_file(f"band.{suffix}", await composer.synthesize(notes, progress), form)


def _choose(formats: dict[int, Any], wanted: int) -> Any:
    """The row of a format; a newer client may know one that is not here."""
    if wanted not in formats:
        raise InvalidOption(
            f"format is {wanted}; it must be one of {sorted(formats)}.",
            value=wanted,
            limit=sorted(formats),
            remedy="Leave it out, or send one that remix.proto names.",
        )
    return formats[wanted]


def _audio_file(name: str, audio: Audio, form: Format) -> Files:
    yield name, encode(audio, form)


def _notes_file(stem: str, notes: NotesOnGrid, suffix: str) -> Files:
    yield f"{stem}.{suffix}", notes.midi() if suffix == "mid" else write_json(notes.tracks)
