"""posteriors -> notes: Basic Pitch's decoding, without its loops over the whole roll.

Source: basic-pitch 0.4.0, note_creation.py, `output_to_notes_polyphonic`, `get_infered_onsets`
and `model_frames_to_time` (Bittner et al. 2022, A Lightweight Instrument-Agnostic Model for
Polyphonic Note Transcription, section 3). The notes are theirs, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remix.notes import Note

SAMPLE_RATE_HZ = 22_050
FRAME_HOP_SAMPLES = 256
LOWEST_PITCH = 21
"""MIDI number of bin 0, the piano's lowest A."""

WINDOW_SAMPLES = 2 * SAMPLE_RATE_HZ - FRAME_HOP_SAMPLES
"""43,844: what the model sees at once."""

WINDOW_FRAMES = 2 * (SAMPLE_RATE_HZ // FRAME_HOP_SAMPLES)
"""172: what it gives for it."""

SUSTAIN_FRAMES = 11
"""A note ends where it stays below the threshold for so long (`energy_tol`)."""

ONSET_DIFFERENCES = 2
"""A jump of the note posterior counts as an onset if it holds against so many earlier frames."""

_FIRST_LOOK_FRAMES = 64
_FADED = bytes([True] * SUSTAIN_FRAMES)

Roll = NDArray[np.float32]
"""[N, 88] posteriors of frames and piano keys, in [0, 1]."""


@dataclass(frozen=True)
class DecodingOptions:
    """Thresholds of the decoding; the defaults are Basic Pitch's.

    Args:
        onset_threshold: least posterior of an onset.
        frame_threshold: least posterior of a sounding note.
        shortest_note_ms: what is not longer is dropped.
    """

    onset_threshold: float = 0.5
    frame_threshold: float = 0.3
    shortest_note_ms: float = 127.7

    @property
    def shortest_note_frames(self) -> int:
        """11 by default."""
        return round(self.shortest_note_ms / 1000 * (SAMPLE_RATE_HZ / FRAME_HOP_SAMPLES))


@dataclass(frozen=True, order=True)
class HeardNote:
    """A note as the model hears it.

    Args:
        onset_frame: first frame.
        end_frame: first frame after it.
        pitch: MIDI number.
        amplitude: mean posterior, 0 to 1.
    """

    onset_frame: int
    end_frame: int
    pitch: int
    amplitude: float


def decode_notes(
    frames: Roll, onsets: Roll, options: DecodingOptions | None = None
) -> list[HeardNote]:
    """Find the notes in a roll.

    First, from the latest onset to the earliest, each onset's note is followed until it fades,
    and its energy and that of the neighbouring keys are taken out. Then ("melodia trick") the
    strongest energy that is left is followed in both directions, until none is left.

    Args:
        frames: [N, 88], posterior of "this key sounds".
        onsets: [N, 88], posterior of "this key begins".
        options: thresholds.

    Returns:
        The notes in the order in which they were found.

    >>> roll = np.zeros((40, 88), np.float32); roll[5:30, 39] = 0.9
    >>> onset = np.zeros_like(roll); onset[5, 39] = 0.8
    >>> [(note.onset_frame, note.end_frame, note.pitch) for note in decode_notes(roll, onset)]
    [(5, 30, 60)]
    """
    options = options or DecodingOptions()
    n_frames = frames.shape[0]
    if n_frames < 3 or not frames.any():
        return []
    energy = np.array(frames.T, np.float64, order="C")  # [88, N]: each key in one piece
    threshold, shortest = options.frame_threshold, options.shortest_note_frames
    notes: list[HeardNote] = []

    def add(start: int, end: int, key: int) -> None:
        amplitude = float(np.mean(frames[start:end, key]))
        notes.append(HeardNote(start, end, key + LOWEST_PITCH, amplitude))

    for start, key in _onsets_backwards(onsets, frames, options.onset_threshold):
        # The last frame is never looked at, upstream and here.
        last, _ = _follow(energy[key, start + 1 : n_frames - 1], threshold)
        end = start + 1 + last
        if end - start > shortest:
            energy[max(0, key - 1) : key + 2, start:end] = 0
            add(start, end, key)

    for middle, key in _strongest_first(energy, threshold):
        if energy[key, middle] == 0:  # taken out since
            continue
        energy[key, middle] = 0
        beside = slice(max(0, key - 1), key + 2)
        last, seen = _follow(energy[key, middle + 1 : n_frames - 1], threshold)
        energy[beside, middle + 1 : middle + 1 + seen] = 0
        end = middle + last
        last, seen = _follow(energy[key, 1:middle][::-1], threshold)
        energy[beside, middle - seen : middle] = 0
        start = middle - last
        if end - start > shortest:
            add(start, end, key)
    return notes


def frame_times_s(n_frames: int) -> NDArray[np.float64]:
    """When each frame of joined windows begins, seconds.

    A window gives 142 frames for a hop of 141.27, so times drift unless each window is put back.
    """
    index = np.arange(n_frames)
    offset_s = (FRAME_HOP_SAMPLES / SAMPLE_RATE_HZ) * (
        WINDOW_FRAMES - WINDOW_SAMPLES / FRAME_HOP_SAMPLES
    ) + 0.0018  # upstream's own constant, found there by alignment
    times = index * FRAME_HOP_SAMPLES / float(SAMPLE_RATE_HZ)
    return np.asarray(times - offset_s * np.floor(index / WINDOW_FRAMES))


def to_notes(heard: list[HeardNote], n_frames: int) -> list[Note]:
    """Heard notes on the clock, sorted; the velocity is 127 times the amplitude."""
    times_s = frame_times_s(n_frames)
    return sorted(
        Note(
            onset_s=float(times_s[note.onset_frame]),
            duration_s=float(times_s[note.end_frame] - times_s[note.onset_frame]),
            pitch=note.pitch,
            velocity=int(np.clip(np.round(127 * note.amplitude), 1, 127)),
        )
        for note in heard
    )


def _onsets_backwards(onsets: Roll, frames: Roll, threshold: float) -> list[tuple[int, int]]:
    """(frame, key) of the local maxima in time that reach the threshold, the last first."""
    strength = _with_inferred_onsets(onsets, frames)
    inner = strength[1:-1]
    is_peak = (inner > strength[:-2]) & (inner > strength[2:]) & (inner >= threshold)
    at = np.argwhere(is_peak)[::-1] + (1, 0)
    return [(int(frame), int(key)) for frame, key in at if frame < len(onsets) - 1]


def _with_inferred_onsets(onsets: Roll, frames: Roll) -> NDArray[np.float64]:
    """The larger of the onsets and the rises of the frames, these scaled to the onsets' maximum."""
    rises = np.full(frames.shape, np.inf)
    for n in range(1, ONSET_DIFFERENCES + 1):
        before = np.concatenate([np.zeros((n, frames.shape[1])), frames[:-n]])
        rises = np.minimum(rises, frames - before)
    rises[rises < 0] = 0
    rises[:ONSET_DIFFERENCES] = 0
    if (largest := np.max(rises)) > 0:  # upstream divides by 0 here
        rises = np.max(onsets) * rises / largest
    return np.asarray(np.maximum(onsets, rises))


def _strongest_first(energy: NDArray[np.float64], threshold: float) -> list[tuple[int, int]]:
    """(frame, key) above the threshold by falling energy, ties in the roll's order.

    Energy is only ever taken out, so going down this list and passing over what has been taken
    out is what looking for the maximum again and again gives.
    """
    roll = energy.T
    above = np.argwhere(roll > threshold)
    order = np.argsort(-roll[above[:, 0], above[:, 1]], kind="stable")
    return [(frame, key) for frame, key in above[order].tolist()]


def _follow(energy: NDArray[np.float64], threshold: float) -> tuple[int, int]:
    """How far a note goes on.

    Args:
        energy: [n], of the frames that follow it.
        threshold: below which it may be fading.

    Returns:
        The number of frames until its last one that is loud enough, and the number looked at:
        until `SUSTAIN_FRAMES` in a row were too quiet.
    """
    look = _FIRST_LOOK_FRAMES
    while True:
        quiet = (energy[:look] < threshold).tobytes()
        if (last := quiet.find(_FADED)) >= 0:
            return last, last + SUSTAIN_FRAMES
        if look >= len(energy):
            return len(quiet.rstrip(_FADED)), len(quiet)
        look *= 4
