"""notes of a window -> its samples, by FluidSynth and a SoundFont of the manifest.

A row of a batch is one window of one track; each is rendered on a thread of its own, outside of
Python's lock, so a song's tracks sound on all cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import bentoml
import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidOption
from remix.manifest import ModelEntry, TensorSpec, installed, read_manifest
from remix.midi import PROGRAMS
from remix.settings import Settings
from remix.stages import Tensors
from remix.synthesize_audio import DRUM_KIT, NOTES, OUTPUT, PROGRAM, Synthesizer, program_of
from runners.inference_protocol import ServedModel
from runners.runner import SERVICE, Runner
from runners.soundfont_player import BLOCK_SAMPLES, SoundFontPlayer

MAX_NOTES = 16_384
"""In one window: 20 s of 800 notes a second."""

MAX_REACH_S = 600.0
"""How long before a window its notes may begin: what lies between is rendered too."""


class SampledBand(ServedModel):
    """A SoundFont on windows: {"notes": [B, N, 4], "program": [B, 1]} -> {"samples": [B, 2, T]}."""

    def __init__(self, entry: ModelEntry, player: SoundFontPlayer) -> None:
        """Serve a player.

        Args:
            entry: of the manifest.
            player: with the entry's SoundFont.
        """
        synthesizer = Synthesizer.of(entry)
        assert synthesizer.window_samples % BLOCK_SAMPLES == 0
        self.name = entry.name
        self.max_batch = entry.max_batch["cpu"]
        self.inputs = (
            TensorSpec(NOTES, "FP32", (-1, -1, 4)),
            TensorSpec(PROGRAM, "INT64", (-1, 1)),
        )
        self.outputs = (TensorSpec(OUTPUT, "FP32", (-1, 2, synthesizer.window_samples)),)
        self._synthesizer = synthesizer
        self._player = player

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Render each row.

        Raises:
            InvalidOption: a note or a program is out of its range.
        """
        rows = list(zip(inputs[NOTES], inputs[PROGRAM][:, 0].tolist(), strict=True))
        for notes, program in rows:
            check_notes(notes, program)
        samples = [self._render(notes, program) for notes, program in rows]
        return {OUTPUT: np.stack(samples)}

    def warm_up(self) -> None:
        """Read the instruments of every role, then render once."""
        for role in PROGRAMS:
            self._player.prepare(program_of(role))
        super().warm_up()

    def _render(self, notes: NDArray[np.float32], program: int) -> NDArray[np.float32]:
        played = notes[notes[:, 3] >= 1].copy()
        played[:, :2] *= self._synthesizer.sample_rate_hz
        return self._player.render(played, program, self._synthesizer.window_samples)


def check_notes(notes: NDArray[np.float32], program: int) -> None:
    """Refuse what no player should be asked for.

    Raises:
        InvalidOption: too many notes, or one whose values are out of range.
    """
    if not 0 <= program <= DRUM_KIT:
        raise InvalidOption(
            f"The program is {program}; General MIDI has 0 to 127, and {DRUM_KIT} for drums."
        )
    if len(notes) > MAX_NOTES:
        raise InvalidOption(
            f"The window has {len(notes)} notes; at most {MAX_NOTES} are taken: use less."
        )
    onset_s, duration_s, pitch, velocity = notes.T
    in_range = (
        np.isfinite(notes).all(axis=1)
        & (np.abs(onset_s) <= MAX_REACH_S)
        & (duration_s <= MAX_REACH_S)
        & ((velocity < 1) | ((pitch >= 0) & (pitch <= 127) & (velocity <= 127) & (duration_s >= 0)))
    )
    if not in_range.all():
        wrong = int(np.flatnonzero(~in_range)[0])
        raise InvalidOption(
            f"Note {wrong} of the window is {notes[wrong].tolist()} (onset and duration in "
            f"seconds, pitch, velocity); onsets lie within {MAX_REACH_S:.0f} s of the window, "
            f"durations are 0 to {MAX_REACH_S:.0f} s, pitch and velocity at most 127."
        )


@bentoml.service(**SERVICE)
class SynthesizeAudio(Runner):
    """The runner of this stage."""

    stage = "synthesize_audio"
    workers = len(os.sched_getaffinity(0))

    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """See `Runner.load`."""
        for entry in installed(read_manifest(), self.stage, settings.models_dir):
            path = entry.verified_path(settings.models_dir, entry.files[0])
            yield SampledBand(entry, SoundFontPlayer(path, entry.sample_rate_hz))
