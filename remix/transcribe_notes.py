"""stems -> notes, by Basic Pitch: each pitched stem by itself, while separation still runs.

Source: basic-pitch 0.4.0, inference.py: `get_audio_input`, `window_audio_file`, `unwrap_output`.
Windows, padding and trimming are theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

import numpy as np
from numpy.typing import NDArray

from remix.audio import Samples
from remix.errors import InvalidModel
from remix.manifest import ModelEntry
from remix.notes import Note
from remix.piano_roll import (
    FRAME_HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_FRAMES,
    WINDOW_SAMPLES,
    DecodingOptions,
    decode_notes,
    frame_times_s,
    to_notes,
)
from remix.resample import StreamingResampler, to_mono
from remix.separate_stems import StemsChunk
from remix.stages import Infer

UNPITCHED = frozenset({"drums", "vocals"})
"""Stems that are not transcribed: Basic Pitch hears no drums, and the voice stays a voice."""

TRIMMED_FRAMES = 15
"""Of a window's 172 frames, on each side: half of the 30 by which windows overlap."""

WINDOW_HOP_SAMPLES = WINDOW_SAMPLES - 2 * TRIMMED_FRAMES * FRAME_HOP_SAMPLES
"""43,844 - 7,680 = 36,164."""

LEAD_SAMPLES = TRIMMED_FRAMES * FRAME_HOP_SAMPLES
"""Silence before the song, so that its first frames are not trimmed away."""

FRAMES_PER_SECOND = SAMPLE_RATE_HZ // FRAME_HOP_SAMPLES
"""86: what upstream counts with, of the 86.13 there are."""

KEYS = 88


ROLL_FRAMES = WINDOW_FRAMES - 2 * TRIMMED_FRAMES
"""142: what is kept of a window."""

SECTION_FRAMES = 4 * ROLL_FRAMES
"""568, 6.6 s: what is decoded at once for those who do not wait for the whole."""

SECTION_CONTEXT_FRAMES = ROLL_FRAMES
"""1.6 s, before and after a section: notes reach into it, and are heard beyond."""


@dataclass(frozen=True)
class Section:
    """What was heard in a stretch of a song, as far as that can be said before all is heard.

    Args:
        end_s: where it ends; it begins where the last one ended.
        notes: that begin in it, sorted, by stem. One that lasts long may be cut.
    """

    end_s: float
    notes: dict[str, list[Note]]


@dataclass(frozen=True)
class Transcriber:
    """What the flow knows of a transcription model; all of it stands in its manifest entry.

    Args:
        name: of the manifest entry.
        audio: name of the input, [B, 43844, 1].
        note: name of the output that says "this key sounds", [B, 172, 88].
        onset: name of the output that says "this key begins", [B, 172, 88].
    """

    name: str
    audio: str
    note: str
    onset: str

    @classmethod
    def of(cls, entry: ModelEntry) -> Transcriber:
        """Read the facts of a manifest entry.

        Raises:
            InvalidModel: a fact is missing.
        """
        try:
            tensors = entry.facts["tensors"]
            return cls(entry.name, tensors["audio"], tensors["note"], tensors["onset"])
        except KeyError as error:
            raise InvalidModel(f"models.toml: {entry.name} lacks the fact {error}.") from error


async def transcribe_stems(
    chunks: AsyncIterator[StemsChunk],
    sample_rate_hz: int,
    transcriber: Transcriber,
    infer: Infer,
    options: DecodingOptions | None = None,
    *,
    on_section: Callable[[Section], None] | None = None,
) -> dict[str, list[Note]]:
    """Transcribe every pitched stem of a separation while it runs.

    Args:
        chunks: of the separation.
        sample_rate_hz: their rate.
        transcriber: the model, and how it wants to be fed.
        infer: runs it.
        options: thresholds of the decoding.
        on_section: is told every section as soon as it is heard, in order.

    Returns:
        Sorted notes by stem, for all stems but drums and vocals.
    """
    streams: dict[str, StemTranscription] = {}
    telling: asyncio.Task[None] | None = None
    try:
        async for chunk in chunks:
            for name, samples in chunk.stems.items():
                if name not in UNPITCHED:
                    if name not in streams:
                        streams[name] = StemTranscription(sample_rate_hz, transcriber, infer)
                    await streams[name].push(samples)
            if telling is None and on_section is not None:
                telling = asyncio.create_task(_tell_sections(streams, options, on_section))
        heard = {name: await stream.finish(options) for name, stream in streams.items()}
        if telling is not None:
            await telling
        return heard
    finally:
        for stream in streams.values():
            stream.cancel()
        if telling is not None:
            telling.cancel()


async def _tell_sections(
    streams: Mapping[str, StemTranscription],
    options: DecodingOptions | None,
    on_section: Callable[[Section], None],
) -> None:
    """The sections of all stems side by side; all stems are equally long."""
    readers = {name: stream.sections(options) for name, stream in streams.items()}
    index = 0
    while readers:
        notes: dict[str, list[Note]] = {}
        for name, reader in readers.items():
            section = await anext(reader, None)
            if section is None:
                return
            notes[name] = section
        index += 1
        end_s = float(frame_times_s(index * SECTION_FRAMES + 1)[-1])
        on_section(Section(end_s, notes))


class StemTranscription:
    """Transcribes one stem as it comes.

    Args:
        sample_rate_hz: of what is pushed.
        transcriber: the model.
        infer: runs it: several windows at once, each a call of its own, so that the runner may
            batch them with whatever else waits.
        windows_ahead: windows in flight before `push` waits.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        transcriber: Transcriber,
        infer: Infer,
        *,
        windows_ahead: int = 8,
    ) -> None:
        self._resampler = StreamingResampler(sample_rate_hz, SAMPLE_RATE_HZ, channels=1)
        self._transcriber = transcriber
        self._infer = infer
        self._free = asyncio.Semaphore(windows_ahead)
        self._windows: list[asyncio.Task[tuple[Samples, Samples]]] = []
        self._sent: asyncio.Queue[asyncio.Task[tuple[Samples, Samples]] | None] = asyncio.Queue()
        self._waiting = np.zeros(LEAD_SAMPLES, np.float32)
        self._n_samples = 0

    async def push(self, samples: Samples) -> None:
        """Take the stem's next samples, [C, t], and send the windows that they complete."""
        await self._take(self._resampler.push(to_mono(samples)))

    async def finish(self, options: DecodingOptions | None = None) -> list[Note]:
        """The notes; the stream is then used up."""
        await self._take(self._resampler.flush())
        while self._waiting.size:  # upstream sends a window for every hop that begins in the song
            await self._send(np.pad(self._waiting, (0, WINDOW_SAMPLES))[:WINDOW_SAMPLES])
        self._sent.put_nowait(None)
        rolls = await asyncio.gather(*self._windows)
        note, onset = _joined(rolls, self._n_frames)
        heard = await asyncio.to_thread(decode_notes, note, onset, options)
        return to_notes(heard, len(note))

    async def sections(self, options: DecodingOptions | None = None) -> AsyncIterator[list[Note]]:
        """The notes that begin in each section; for one reader, while others push."""
        rolls, index, is_last = [], 0, False
        while not is_last:
            window = await self._sent.get()
            if window is None:
                is_last, known = True, self._n_frames
            else:
                rolls.append(await window)
                known = len(rolls) * ROLL_FRAMES
            while (start := index * SECTION_FRAMES) < known and (
                is_last or start + SECTION_FRAMES + SECTION_CONTEXT_FRAMES <= known
            ):
                first = max(start - SECTION_CONTEXT_FRAMES, 0)
                around = slice(first // ROLL_FRAMES, (start + SECTION_FRAMES) // ROLL_FRAMES + 1)
                roll = _joined(rolls[around], known - first)
                yield await asyncio.to_thread(_decode_section, *roll, first, start, options)
                index += 1

    @property
    def _n_frames(self) -> int:
        """Frames of all that was pushed."""
        # As a fraction first: upstream's product, rounding and all.
        return floor(self._n_samples * (FRAMES_PER_SECOND / SAMPLE_RATE_HZ))

    def cancel(self) -> None:
        """Give up the windows in flight."""
        for window in self._windows:
            window.cancel()

    async def _take(self, samples: Samples) -> None:
        self._n_samples += samples.shape[1]
        self._waiting = np.concatenate([self._waiting, samples[0]])
        while self._waiting.size >= WINDOW_SAMPLES:
            await self._send(self._waiting[:WINDOW_SAMPLES])

    async def _send(self, window: NDArray[np.float32]) -> None:
        await self._free.acquire()
        self._windows.append(asyncio.create_task(self._roll_of(window)))
        self._sent.put_nowait(self._windows[-1])
        self._waiting = self._waiting[WINDOW_HOP_SAMPLES:]

    async def _roll_of(self, window: NDArray[np.float32]) -> tuple[Samples, Samples]:
        """Posteriors of notes and onsets of a window, [142, 88] each, its edges trimmed."""
        try:
            if not window.any():  # the model divides silence by silence
                silence = np.zeros((WINDOW_FRAMES - 2 * TRIMMED_FRAMES, KEYS), np.float32)
                return silence, silence
            names = self._transcriber
            outputs = await self._infer(names.name, {names.audio: window[None, :, None]})
            inner = slice(TRIMMED_FRAMES, -TRIMMED_FRAMES)
            note, onset = (
                np.nan_to_num(outputs[name][0, inner]) for name in (names.note, names.onset)
            )
            return note, onset
        finally:
            self._free.release()


def _joined(rolls: Sequence[tuple[Samples, Samples]], n_frames: int) -> tuple[Samples, Samples]:
    """Posteriors of notes and onsets, [n_frames, 88] each, of windows that follow each other."""
    if not rolls:
        empty = np.zeros((0, KEYS), np.float32)
        return empty, empty
    note, onset = (np.concatenate(parts)[:n_frames] for parts in zip(*rolls, strict=True))
    return note, onset


def _decode_section(
    note: Samples, onset: Samples, first: int, start: int, options: DecodingOptions | None
) -> list[Note]:
    """The notes that begin in the section from frame `start` on; the roll begins at `first`."""
    heard = [
        replace(found, onset_frame=found.onset_frame + first, end_frame=found.end_frame + first)
        for found in decode_notes(note, onset, options)
        if start <= found.onset_frame + first < start + SECTION_FRAMES
    ]
    return to_notes(heard, first + len(note) + 1)
