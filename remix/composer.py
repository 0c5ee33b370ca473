"""file, options -> result: the calls that every transport offers, and nothing of any transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from remix.audio import Audio
from remix.audio_codec import Limits, decode
from remix.manifest import Manifest, ModelEntry, installed
from remix.midi import read_midi, write_midi
from remix.note_json import read_json
from remix.notes import BeatGrid, Tracks
from remix.settings import Settings
from remix.stages import STAGES, Infer


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

    Args:
        settings: limits, and where the models are.
        manifest: the models.
        infer_for_song: makes an `Infer` that keeps the times of one song.
    """

    def __init__(
        self, settings: Settings, manifest: Manifest, infer_for_song: Callable[[], Infer]
    ) -> None:
        self.manifest = manifest
        self.models_dir = settings.models_dir
        self._infer_for_song = infer_for_song
        self._limits = Limits(duration_s=settings.max_duration_s)

    def default_models(self) -> set[str]:
        """Names of the models that work when nobody asks for others."""
        found = (installed(self.manifest, stage, self.models_dir) for stage in STAGES)
        return {models[0].name for models in found if models}

    def voices(self) -> list[tuple[str, ModelEntry]]:
        """Every voice that can sing, and the model that it is of; the default first."""
        return []

    async def decode(self, song: Path) -> Audio:
        """The sound of an uploaded file, at its own rate.

        Raises:
            InvalidAudio, LimitExceeded: see `remix.audio_codec`.
        """
        return await decode(song, self._limits)


def read_notes(file: Path) -> Tracks:
    """The notes of an uploaded file: MIDI, or JSON as `remix.note_json` has it.

    Raises:
        InvalidInput: it is neither, or is damaged.
        LimitExceeded: more notes than are taken.
    """
    data = file.read_bytes()
    return read_midi(data) if data.startswith(b"MThd") else read_json(data)
