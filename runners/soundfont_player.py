"""notes -> samples, by FluidSynth; of what serves the only importer of its library.

The same notes always give the same samples, whatever was played before: each request has a new
synthesizer (a used voice starts its next note from the last one's pan), and reverb and chorus,
whose modulation runs on from note to note, are off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import fluidsynth
import numpy as np
from numpy.typing import NDArray

from remix.audio import Samples
from remix.errors import InvalidModel

BLOCK_SAMPLES = 64
"""FluidSynth computes in blocks of so many samples; a note starts and ends with a block
(1.5 ms at 44.1 kHz). Source: FLUID_BUFSIZE in fluidsynth 2.3.1, src/utils/fluidsynth_priv.h."""

DRUMS = 128
"""Program number that stands for the percussion bank's standard kit."""

GAIN = 0.4
"""Of the whole synthesizer. The library's own default changed between 2.3 and 2.4."""

SETTINGS: dict[str, int] = {
    "synth.reverb.active": 0,
    "synth.chorus.active": 0,
    # Only the instruments that are played are read: a tenth of the time and the memory.
    "synth.dynamic-sample-loading": 1,
    # So many that no voice is ever stolen: 128 sounding notes of four layers each.
    "synth.polyphony": 512,
    "synth.cpu-cores": 1,
    "synth.lock-memory": 0,
}

_write_float = fluidsynth.cfunc(
    "fluid_synth_write_float",
    ctypes.c_int,
    ("synth", ctypes.c_void_p, 1),
    ("len", ctypes.c_int, 1),
    ("lbuf", ctypes.c_void_p, 1),
    ("loff", ctypes.c_int, 1),
    ("lincr", ctypes.c_int, 1),
    ("rbuf", ctypes.c_void_p, 1),
    ("roff", ctypes.c_int, 1),
    ("rincr", ctypes.c_int, 1),
)
"""pyfluidsynth has only the 16-bit call, which clips."""

_set_log_function = fluidsynth.cfunc(
    "fluid_set_log_function",
    ctypes.c_void_p,
    ("level", ctypes.c_int, 1),
    ("fun", ctypes.c_void_p, 1),
    ("data", ctypes.c_void_p, 1),
)


@dataclass(frozen=True, order=True, slots=True)
class _Event:
    """What happens before a block is computed; at the same block ends come before starts."""

    block: int
    is_start: bool
    pitch: int
    velocity: int


class SoundFontPlayer:
    """A SoundFont whose instruments stay in memory; may be used by many threads at once."""

    def __init__(self, path: Path, sample_rate_hz: int) -> None:
        """Open the SoundFont; its instruments are read when they are first prepared or played.

        Args:
            path: of a verified SoundFont file, `.sf2` or `.sf3`.
            sample_rate_hz: of what is rendered.

        Raises:
            InvalidModel: FluidSynth cannot read the file.
        """
        for level in range(5):  # its messages go to standard error, past the log
            _set_log_function(level, None, None)
        self._path = path
        self._sample_rate_hz = sample_rate_hz
        # FluidSynth keeps samples in memory as long as a synthesizer has selected them: this
        # one plays nothing, and selects each program on a channel of its own.
        self._keeper, self._font = self._open()
        self._kept: set[int] = set()
        self._lock = Lock()

    def close(self) -> None:
        """Give the memory back; the player is then used up."""
        self._keeper.delete()

    def prepare(self, program: int) -> None:
        """Read a program's samples, if they were not read yet."""
        with self._lock:
            if program in self._kept:
                return
            channel = _CHANNEL_OF_DRUMS if program == DRUMS else _MELODIC_CHANNELS[program]
            _select(self._keeper, channel, self._font, program)
            self._kept.add(program)

    def render(self, notes: NDArray[np.float32], program: int, length_samples: int) -> Samples:
        """The sound of one window of one track.

        Args:
            notes: [N, 4]: onset and duration in samples, MIDI pitch, velocity. Notes may begin
                before the window, with an onset below 0, and end after it. Of a pitch's notes
                each ends, at the latest, where the next one begins.
            program: General MIDI program from 0, or `DRUMS`.
            length_samples: of the window, a multiple of `BLOCK_SAMPLES`.

        Returns:
            [2, length_samples], unclipped.
        """
        self.prepare(program)
        events = sorted(_events(notes))
        first = min((event.block for event in events), default=0)
        first, last = min(first, 0), length_samples // BLOCK_SAMPLES
        output = np.zeros((2, (last - first) * BLOCK_SAMPLES), np.float32)
        synth, font = self._open()
        try:
            channel = _CHANNEL_OF_DRUMS if program == DRUMS else 0
            _select(synth, channel, font, program)
            at = 0
            for event in events:
                if event.block >= last:
                    break
                at = _write(synth, output, at, (event.block - first) * BLOCK_SAMPLES)
                if event.is_start:
                    synth.noteon(channel, event.pitch, event.velocity)
                else:
                    synth.noteoff(channel, event.pitch)
            _write(synth, output, at, output.shape[1])
        finally:
            synth.delete()
        return output[:, output.shape[1] - length_samples :]

    def _open(self) -> tuple[Any, int]:
        """A new synthesizer, and its handle of the SoundFont."""
        synth = fluidsynth.Synth(GAIN, self._sample_rate_hz, **SETTINGS)
        font = int(synth.sfload(str(self._path)))
        if font < 0:
            synth.delete()
            raise InvalidModel(
                f"FluidSynth cannot read {self._path}: remove the file and run `make models`."
            )
        return synth, font


_CHANNEL_OF_DRUMS = 9
_MELODIC_CHANNELS = [channel for channel in range(256) if channel % 16 != _CHANNEL_OF_DRUMS]


def _select(synth: Any, channel: int, font: int, program: int) -> None:
    bank, number = (128, 0) if program == DRUMS else (0, program)
    synth.program_select(channel, font, bank, number)


def _write(synth: Any, output: Samples, start: int, end: int) -> int:
    """Compute the samples from `start` to `end`; returns `end`."""
    if end > start:
        left, right = output[0].ctypes.data, output[1].ctypes.data
        # ctypes lets other threads run meanwhile.
        _write_float(synth.synth, end - start, left, start, 1, right, start, 1)
    return end


def _events(notes: NDArray[np.float32]) -> Iterator[_Event]:
    """Starts and ends of notes, in blocks; in no order."""
    by_pitch: dict[int, dict[int, tuple[int, int]]] = {}
    for onset, duration, pitch, velocity in notes.tolist():
        first = round(onset / BLOCK_SAMPLES)
        end = max(first + 1, round((onset + duration) / BLOCK_SAMPLES))
        of_pitch = by_pitch.setdefault(int(pitch), {})
        # Two notes of a pitch in one block: the louder one.
        if first not in of_pitch or of_pitch[first][1] < velocity:
            of_pitch[first] = (end, int(velocity))
    for pitch, of_pitch in by_pitch.items():
        starts = sorted(of_pitch)
        for first, following in zip(starts, [*starts[1:], None], strict=True):
            end, velocity = of_pitch[first]
            yield _Event(first, True, pitch, velocity)
            # An end after the next start would cut that one short.
            yield _Event(end if following is None else min(end, following), False, pitch, 0)
