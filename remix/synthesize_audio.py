"""tracks -> sound, each track by itself, window by window, by a sampled band.

A window holds what sounds in it: the notes that begin in it, and those that began before and
still ring. So windows can be rendered in any order, at once, and while later notes are not
written yet, and joined end to end they are the whole, but for a block of 1.5 ms at the start of a
few notes, which depends on the voice that played before: the test renders both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remix.audio import Samples
from remix.errors import InvalidModel
from remix.generate_notes import NotesChunk
from remix.manifest import ModelEntry
from remix.midi import PROGRAMS, without_overlaps
from remix.notes import ROLES, Note, Role, Tracks
from remix.stages import Infer, Progress, Tensors

NOTES = "notes"
"""[B, N, 4], FP32: name of the input tensor with onset and duration in seconds from the window's
start, MIDI pitch and velocity. A row whose velocity is below 1 is no note."""

PROGRAM = "program"
"""[B, 1], INT64: name of the other one, with a General MIDI program or `DRUM_KIT`."""

OUTPUT = "samples"
"""[B, 2, T], FP32: name of the output tensor."""

DRUM_KIT = 128
"""Program that stands for the percussion bank's standard kit."""

WINDOWS_AT_ONCE = 8
"""Windows of a song that are asked for at once: more than a small machine has cores, and 56 MB."""


@dataclass(frozen=True)
class Synthesizer:
    """What the flow knows of a sampled band; all of it stands in its manifest entry.

    Args:
        name: of the manifest entry.
        sample_rate_hz: of what it plays.
        window_samples: T, the length of a window.
        tail_s: how long a note of each role can ring after its end, until it is below -80 dBFS.
    """

    name: str
    sample_rate_hz: int
    window_samples: int
    tail_s: Mapping[Role, float]

    @classmethod
    def of(cls, entry: ModelEntry) -> Synthesizer:
        """Read the facts of a manifest entry.

        Raises:
            InvalidModel: a fact is missing.
        """
        try:
            return cls(
                name=entry.name,
                sample_rate_hz=entry.sample_rate_hz,
                window_samples=entry.facts["window_samples"],
                tail_s={role: entry.facts["tail_s"][role] for role in ROLES},
            )
        except KeyError as error:
            raise InvalidModel(f"models.toml: {entry.name} lacks the fact {error}.") from error


def program_of(role: Role) -> int:
    """What plays a role, as the tensor `PROGRAM` has it."""
    return DRUM_KIT if role == "drums" else PROGRAMS[role]


async def synthesize_audio(
    chunks: AsyncIterator[NotesChunk],
    length_samples: int,
    synthesizer: Synthesizer,
    infer: Infer,
    *,
    progress: Progress | None = None,
) -> dict[Role, Samples]:
    """Play tracks while they are being written.

    Args:
        chunks: the notes in order of time; a chunk's notes begin before its end.
        length_samples: of the song: notes ring until there.
        synthesizer: the band.
        infer: runs it: {"notes": [B, N, 4], "program": [B, 1]} -> {"samples": [B, 2, T]}.
        progress: is told after every window.

    Returns:
        [2, length_samples] by role, for each role that has a note.
    """
    song = _Song(length_samples, synthesizer, infer, progress)
    try:
        async for chunk in chunks:
            song.write(chunk.tracks, chunk.end_s)
        song.write({}, float("inf"))
        return await song.stems()
    finally:
        await song.close()


async def synthesize_tracks(
    tracks: Tracks,
    length_samples: int,
    synthesizer: Synthesizer,
    infer: Infer,
    *,
    progress: Progress | None = None,
) -> dict[Role, Samples]:
    """Play tracks that are all there: see `synthesize_audio`."""

    async def whole() -> AsyncIterator[NotesChunk]:
        yield NotesChunk(0.0, length_samples / synthesizer.sample_rate_hz, tracks)

    return await synthesize_audio(whole(), length_samples, synthesizer, infer, progress=progress)


class _Song:
    """The windows of one song's tracks, each begun as soon as its notes are known."""

    def __init__(
        self,
        length_samples: int,
        synthesizer: Synthesizer,
        infer: Infer,
        progress: Progress | None,
    ) -> None:
        self._length_samples = length_samples
        self._synthesizer = synthesizer
        self._infer = infer
        self._progress = progress
        self._notes: dict[Role, list[Note]] = {}
        self._stems: dict[Role, Samples] = {}
        self._begun = self._done = 0
        self._count = -(-length_samples // synthesizer.window_samples)
        self._room = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self._tasks: list[asyncio.Task[None]] = []

    def write(self, tracks: Tracks, known_to_s: float) -> None:
        """Take notes, and begin the windows in which, with them, everything is known."""
        for role, notes in tracks.items():
            if notes:
                self._notes[role] = without_overlaps(self._notes.get(role, []) + notes)
                self._stems.setdefault(role, np.zeros((2, self._length_samples), np.float32))
        window_s = self._synthesizer.window_samples / self._synthesizer.sample_rate_hz
        while self._begun < self._count and (
            (self._begun + 1) * window_s <= known_to_s or known_to_s == float("inf")
        ):
            for role in self._notes:
                self._begin(role, self._begun)
            self._begun += 1

    async def stems(self) -> dict[Role, Samples]:
        """All of them, when the last window is done."""
        await asyncio.gather(*self._tasks)
        return {role: self._stems[role] for role in ROLES if role in self._stems}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, role: Role, index: int) -> None:
        start = index * self._synthesizer.window_samples
        rate_hz = self._synthesizer.sample_rate_hz
        notes = notes_in_window(
            self._notes[role],
            start / rate_hz,
            (start + self._synthesizer.window_samples) / rate_hz,
            self._synthesizer.tail_s[role],
        )
        if len(notes):
            self._tasks.append(asyncio.create_task(self._render(role, start, notes)))

    async def _render(self, role: Role, start: int, notes: NDArray[np.float32]) -> None:
        inputs: Tensors = {NOTES: notes[None], PROGRAM: np.array([[program_of(role)]], np.int64)}
        async with self._room:
            outputs = await self._infer(self._synthesizer.name, inputs)
        stretch = self._stems[role][:, start : start + self._synthesizer.window_samples]
        stretch[:] = outputs[OUTPUT][0][:, : stretch.shape[1]]
        self._done += 1
        if self._progress:
            # Windows that are not begun yet count with as many tracks as there are now.
            rest = (self._count - self._begun) * len(self._notes)
            self._progress("synthesize_audio", self._done / (len(self._tasks) + rest))


def notes_in_window(
    notes: list[Note], start_s: float, end_s: float, tail_s: float
) -> NDArray[np.float32]:
    """The notes that sound in a window, with their onsets counted from its start.

    Args:
        notes: of one track.
        start_s: of the window.
        end_s: of the window.
        tail_s: how long a note rings after its end.

    Returns:
        [N, 4]: onset and duration in seconds, pitch, velocity.

    >>> notes_in_window([Note(1.0, 2.0, 60, 90), Note(9.0, 1.0, 62, 90)], 4.0, 8.0, 2.0).tolist()
    [[-3.0, 2.0, 60.0, 90.0]]
    """
    rows = [
        (note.onset_s - start_s, note.duration_s, note.pitch, note.velocity)
        for note in notes
        if note.onset_s < end_s and note.end_s + tail_s > start_s
    ]
    return np.array(rows, np.float32).reshape(-1, 4)
