"""Results -> response bodies: audio files, notes, ZIP archives."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import BinaryIO, cast

import anyio.to_thread
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from remix.audio import Audio
from remix.audio_codec import Format, encode
from remix.composer import Composer, NotesOnGrid
from remix.note_json import write_json
from remix.report import MadeRemix
from remix.result_files import remix_files, stem_files

WAV, FLAC, MP3, ZIP = "audio/wav", "audio/flac", "audio/mpeg", "application/zip"
MIDI, JSON = "audio/midi", "application/json"

AUDIO_FORMATS: dict[str, Format] = {WAV: "wav16", FLAC: "flac", MP3: "mp3"}
"""What `encode` is asked for: 16-bit WAV, because every player plays it."""

CHUNK_BYTES = 1 << 18

FILE_MODE = 0o644
"""Of files that are unpacked from an archive."""


async def of_remix(made: MadeRemix, composer: Composer, media_type: str) -> Response:
    """The remix alone, or all there is of it."""
    if media_type == ZIP:
        parts = remix_files(made, composer.manifest, composer.models_dir)
        return FileAnswer(await anyio.to_thread.run_sync(write_zip, parts), ZIP)
    return await of_audio(made.remix.audio, media_type)


async def of_stems(stems: Mapping[str, Audio]) -> Response:
    """Stems, as they came out of the separation: floats, not clipped."""
    return FileAnswer(await anyio.to_thread.run_sync(write_zip, stem_files(stems)), ZIP)


async def of_audio(audio: Audio, media_type: str) -> Response:
    """An audio file."""
    content = await anyio.to_thread.run_sync(encode, audio, AUDIO_FORMATS[media_type])
    return Response(content, media_type=media_type)


def of_notes(notes: NotesOnGrid, media_type: str) -> Response:
    """A MIDI file, or JSON."""
    content = notes.midi() if media_type == MIDI else write_json(notes.tracks)
    return Response(content, media_type=media_type)


class FileAnswer(StreamingResponse):
    """Sends a file that has no name, and closes it however the sending ends.

    Args:
        file: its whole content is sent.
        media_type: of the content.
    """

    def __init__(self, file: BinaryIO, media_type: str) -> None:
        self._file = file
        size_bytes = file.seek(0, 2)
        file.seek(0)
        super().__init__(self._chunks(), 200, {"Content-Length": str(size_bytes)}, media_type)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while chunk := await anyio.to_thread.run_sync(self._file.read, CHUNK_BYTES):
            yield chunk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def write_zip(parts: Iterable[tuple[str, bytes]]) -> BinaryIO:
    """An archive in a file that has no name; one part at a time is in memory.

    Sound does not get smaller by deflating, and the rest is small: nothing is compressed.
    """
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the answer closes it
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in parts:
                entry = zipfile.ZipInfo(name, time.localtime()[:6])
                entry.external_attr = FILE_MODE << 16
                archive.writestr(entry, content)
    except BaseException:
        file.close()
        raise
    return file
