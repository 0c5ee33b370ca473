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


@dataclass(frozen=True)
class SoundChunk:
    """A stretch of the band's sound, finished.

    Args:
        start_sample: where it begins in the song.
        n_samples: t, its length.
        tracks: [2, t] by role, of those that sound in it.
    """

    start_sample: int
    n_samples: int
    tracks: dict[Role, Samples]


async def synthesize_audio(
    chunks: AsyncIterator[NotesChunk],
    length_samples: int,
    synthesizer: Synthesizer,
    infer: Infer,
    *,
    progress: Progress | None = None,
) -> AsyncIterator[SoundChunk]:
    """Play tracks while they are being written.

    Args:
        chunks: the notes in order of time; a chunk's notes begin before its end.
        length_samples: of the song: notes ring until there.
        synthesizer: the band.
        infer: runs it: {"notes": [B, N, 4], "program": [B, 1]} -> {"samples": [B, 2, T]}.
        progress: is told after every window.

    Yields:
        A chunk for each window, in order; together they have the song's length.
    """
    song = _Song(length_samples, synthesizer, infer, progress)
    writing = asyncio.create_task(song.write_all(chunks))
    try:
        while (window := await song.begun.get()) is not None:
            sounds = await asyncio.gather(*window.sounds.values())
            tracks = dict(zip(window.sounds, sounds, strict=True))
            yield SoundChunk(window.start_sample, window.n_samples, tracks)
        await writing
    finally:
        await song.close(writing)


async def join_chunks(
    chunks: AsyncIterator[SoundChunk], length_samples: int
) -> dict[Role, Samples]:
    """Whole tracks, [2, length_samples] by role, for each role that sounds."""
    joined: dict[Role, Samples] = {}
    async for chunk in chunks:
        for role, samples in chunk.tracks.items():
            track = joined.setdefault(role, np.zeros((2, length_samples), np.float32))
            track[:, chunk.start_sample : chunk.start_sample + chunk.n_samples] = samples
    return {role: joined[role] for role in ROLES if role in joined}


async def synthesize_tracks(
    tracks: Tracks,
    length_samples: int,
    synthesizer: Synthesizer,
    infer: Infer,
    *,
    progress: Progress | None = None,
) -> dict[Role, Samples]:
    """Play tracks that are all there: [2, length_samples] by role, for each role that sounds."""

    async def whole() -> AsyncIterator[NotesChunk]:
        yield NotesChunk(0.0, length_samples / synthesizer.sample_rate_hz, tracks)

    played = synthesize_audio(whole(), length_samples, synthesizer, infer, progress=progress)
    return await join_chunks(played, length_samples)


@dataclass(frozen=True)
class _Window:
    """A window whose notes are known; its tracks are being rendered."""

    start_sample: int
    n_samples: int
    sounds: Mapping[Role, asyncio.Task[Samples]]


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
        self._done = 0
        self._count = -(-length_samples // synthesizer.window_samples)
        self._room = asyncio.Semaphore(WINDOWS_AT_ONCE)
        self._windows: list[_Window] = []
        self._n_sounds = 0
        self.begun: asyncio.Queue[_Window | None] = asyncio.Queue()
        """The windows in order, then None."""

    async def write_all(self, chunks: AsyncIterator[NotesChunk]) -> None:
        """Take notes as they come, and begin every window."""
        try:
            async for chunk in chunks:
                self._write(chunk.tracks, chunk.end_s)
            self._write({}, float("inf"))
        finally:
            self.begun.put_nowait(None)

    def _write(self, tracks: Tracks, known_to_s: float) -> None:
        """Take notes, and begin the windows in which, with them, everything is known."""
        for role, notes in tracks.items():
            if notes:
                self._notes[role] = without_overlaps(self._notes.get(role, []) + notes)
        window_s = self._synthesizer.window_samples / self._synthesizer.sample_rate_hz
        while (index := len(self._windows)) < self._count and (index + 1) * window_s <= known_to_s:
            window = self._begin(index)
            self._windows.append(window)
            self._n_sounds += len(window.sounds)
            self.begun.put_nowait(window)

    async def close(self, writing: asyncio.Task[None]) -> None:
        tasks = [writing, *(task for window in self._windows for task in window.sounds.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, index: int) -> _Window:
        start = index * self._synthesizer.window_samples
        n_samples = min(self._synthesizer.window_samples, self._length_samples - start)
        rate_hz, sounds = self._synthesizer.sample_rate_hz, {}
        for role, track in self._notes.items():
            notes = notes_in_window(
                track,
                start / rate_hz,
                (start + self._synthesizer.window_samples) / rate_hz,
                self._synthesizer.tail_s[role],
            )
            if len(notes):
                sounds[role] = asyncio.create_task(self._render(role, notes, n_samples))
        return _Window(start, n_samples, sounds)

    async def _render(self, role: Role, notes: NDArray[np.float32], n_samples: int) -> Samples:
        inputs: Tensors = {NOTES: notes[None], PROGRAM: np.array([[program_of(role)]], np.int64)}
        async with self._room:
            outputs = await self._infer(self._synthesizer.name, inputs)
        self._done += 1
        if self._progress:
            # Windows that are not begun yet count with as many tracks as there are now.
            rest = (self._count - len(self._windows)) * len(self._notes)
            self._progress("synthesize_audio", self._done / (self._n_sounds + rest))
        sound: Samples = outputs[OUTPUT][0][:, :n_samples]
        return sound


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
