"""real recordings -> the windows that a remix sends to each model.

Samples are cut from real songs. What other models compute (content, melody, notes) is drawn by a
seed instead: how long a model takes does not depend on it, but for the generator, which writes as
many tokens as it likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from load_tests.songs import Recording

Inputs = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

METER_4, TEMPO_3, STYLE_ANY = 1, 2 + 3, 2 + 8
"""Tokens that open every history: 4/4, 100 to 115 bpm, any style. Source: remix/note_tokens.py."""

CHORD, DENSITY_3, ALL_TRACKS = 23, 108 + 3, 114 + 31
"""Tokens that are given for a bar: the first chord, a medium density, five tracks."""

MAJOR_CHORDS = (0, 35, 49, 0)
"""C F G C, a bar each: chord 7 * root."""

GENERATED_S = 8.0
"""Four bars of 4/4 at 120 bpm."""

NOTES = 60
"""In a window of the synthesizer, 20 s: a piano at 3 notes a second."""

FRAMES_HZ = 100
"""Of the voice model."""

MODEL_HZ = 16_000
"""Of the models that have no audio of their own rate: content and melody."""


def windows(
    shapes: Shapes, sample_rate_hz: int, recording: Recording, seed: int
) -> Iterator[tuple[Inputs, float]]:
    """Windows without end, and the seconds of audio that each is about.

    Args:
        shapes: of the model's inputs, [1, ...]; they tell which model it is.
        sample_rate_hz: of the model.
        recording: that samples are cut from.
        seed: from where they are cut, and what is drawn.

    Raises:
        ValueError: a model with other inputs than any of ours.
    """
    rng = np.random.default_rng(seed)
    if "history" in shapes:
        make = _generation
    elif "notes" in shapes:
        make = _synthesis
    elif "content" in shapes:
        make = _voice
    elif len(shapes) == 1:
        yield from _samples(shapes, sample_rate_hz or MODEL_HZ, recording, rng)
        return
    else:
        raise ValueError(f"No window is known for a model with the inputs {sorted(shapes)}.")
    while True:
        yield make(shapes, rng)


def _samples(
    shapes: Shapes, sample_rate_hz: int, recording: Recording, rng: np.random.Generator
) -> Iterator[tuple[Inputs, float]]:
    """Cuts at the model's rate, in the model's form: [1, 2, T], [1, T] or [1, T, 1]."""
    ((name, shape),) = shapes.items()
    divisor = gcd(sample_rate_hz, recording.sample_rate_hz)
    resampled = resample_poly(
        recording.samples, sample_rate_hz // divisor, recording.sample_rate_hz // divisor, axis=0
    )
    at_rate = Recording(resampled.astype(np.float32), sample_rate_hz)
    duration_s = max(shape) / sample_rate_hz
    while True:
        cut = at_rate.cut(int(rng.integers(len(resampled))), duration_s)
        # A mono recording sounds on both sides.
        cut = np.broadcast_to(cut.T, (2, len(cut))) if shape[1] == 2 else cut.mean(axis=1)
        yield {name: np.ascontiguousarray(cut, np.float32).reshape(shape)}, duration_s


def _voice(shapes: Shapes, rng: np.random.Generator) -> tuple[Inputs, float]:
    frames = shapes["f0_hz"][1]
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    drawn["f0_hz"] = np.full(shapes["f0_hz"], 220.0, np.float32)
    drawn["voiced"] = np.ones(shapes["voiced"], np.float32)
    return {**drawn, "speaker": np.zeros(shapes["speaker"], np.int64)}, frames / FRAMES_HZ


def _generation(shapes: Shapes, rng: np.random.Generator) -> tuple[Inputs, float]:
    history = np.full(shapes["history"], -1, np.int64)
    history[0, :3] = METER_4, TEMPO_3, STYLE_ANY
    bars = [[CHORD + chord, CHORD + chord, DENSITY_3, ALL_TRACKS] for chord in MAJOR_CHORDS]
    return {
        "history": history,
        "conditions": np.array([bars], np.int64),
        "first_bar": np.zeros((1, 1), np.int64),
        "seed": rng.integers(2**31, size=(1, 1)),
        "temperature": np.ones((1, 1), np.float32),
        "top_p": np.full((1, 1), 0.95, np.float32),
    }, GENERATED_S


def _synthesis(shapes: Shapes, rng: np.random.Generator) -> tuple[Inputs, float]:
    notes = np.empty((1, NOTES, 4), np.float32)  # onset_s, duration_s, pitch, velocity
    notes[0, :, 0] = np.arange(NOTES) / 3
    notes[0, :, 1] = 0.5
    notes[0, :, 2] = rng.integers(48, 84, NOTES)
    notes[0, :, 3] = 80
    return {"notes": notes, "program": np.zeros((1, 1), np.int64)}, NOTES / 3
