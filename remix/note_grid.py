"""notes without a song -> the beats that they sit on."""

from __future__ import annotations

import io

import mido
import numpy as np
from numpy.typing import NDArray

from remix.audio import Audio
from remix.beats import find_beats, find_key
from remix.notes import BeatGrid, Note, Tracks

SAMPLE_RATE_HZ = 11_025
"""Of the tones by which beats are found: the highest piano key is at 4.2 kHz."""

RING_S = 0.2
"""A tone halves in loudness in so long: the next onset stands out."""

DEFAULT_TEMPO_US = 500_000
"""Microseconds a beat where a MIDI file says nothing. Source: the Standard MIDI File 1.0."""


def find_grid(tracks: Tracks, duration_s: float) -> BeatGrid:
    """Beats and key of notes, found as they are found in a song: by listening to them."""
    samples = np.zeros(round((duration_s + 1.0) * SAMPLE_RATE_HZ), np.float32)
    for role, notes in tracks.items():
        for note in notes:
            _add_tone(samples, note, is_drum=role == "drums")
    return find_beats(Audio(samples[None], SAMPLE_RATE_HZ))


def read_grid(midi: bytes, tracks: Tracks, duration_s: float) -> BeatGrid:
    """Beats of a MIDI file's own tempo map; the key is that of its notes.

    Args:
        midi: a file that `remix.midi.read_midi` has read.
        tracks: its notes.
        duration_s: how far the grid must reach.
    """
    file = mido.MidiFile(file=io.BytesIO(midi), clip=True)
    tempos, beats_per_bar, first_bar_tick = {0: DEFAULT_TEMPO_US}, 4, 0
    for track in file.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                tempos[tick] = message.tempo
            elif message.type == "time_signature":
                beats_per_bar = 3 if message.numerator % 3 == 0 else 4
                first_bar_tick = tick
    beat_times_s = _beat_times(tempos, file.ticks_per_beat, duration_s)
    tonic, mode = find_key(_chroma(tracks))
    return BeatGrid(
        beat_times_s=beat_times_s,
        first_downbeat=round(first_bar_tick / file.ticks_per_beat) % beats_per_bar,
        beats_per_bar=beats_per_bar,
        tempo_bpm=float(60.0 / np.median(np.diff(beat_times_s))),
        tonic=tonic,
        mode=mode,
    )


def _beat_times(
    tempos: dict[int, int], ticks_per_beat: int, duration_s: float
) -> NDArray[np.float64]:
    """Seconds of each beat from tick 0 to a bar past `duration_s`."""
    ticks = np.array(sorted(tempos), np.float64)
    seconds_per_tick = np.array([tempos[int(t)] for t in ticks]) / 1e6 / ticks_per_beat
    starts_s = np.concatenate([[0.0], np.cumsum(np.diff(ticks) * seconds_per_tick[:-1])])
    end_s = duration_s + 5 * seconds_per_tick[-1] * ticks_per_beat
    end_tick = ticks[-1] + max(0.0, end_s - starts_s[-1]) / seconds_per_tick[-1]
    beats = np.arange(0.0, end_tick + ticks_per_beat, ticks_per_beat)
    segment = np.searchsorted(ticks, beats, side="right") - 1
    return np.asarray(starts_s[segment] + (beats - ticks[segment]) * seconds_per_tick[segment])


def _chroma(tracks: Tracks) -> NDArray[np.float64]:
    chroma = np.zeros(12)
    for role, notes in tracks.items():
        if role != "drums":
            for note in notes:
                chroma[note.pitch % 12] += note.duration_s
    return chroma


def _add_tone(samples: NDArray[np.float32], note: Note, *, is_drum: bool) -> None:
    start = round(note.onset_s * SAMPLE_RATE_HZ)
    length = min(
        round((0.05 if is_drum else note.duration_s) * SAMPLE_RATE_HZ), len(samples) - start
    )
    if length <= 0:
        return
    at_s = np.arange(length) / SAMPLE_RATE_HZ
    level = note.velocity / 127 * np.exp2(-at_s / RING_S)
    if is_drum:
        samples[start : start + length] += level * np.random.default_rng(note.pitch).uniform(
            -0.3, 0.3, length
        )
        return
    frequency_hz = 440.0 * 2 ** ((note.pitch - 69) / 12)
    if frequency_hz < SAMPLE_RATE_HZ / 2:
        samples[start : start + length] += 0.1 * level * np.sin(2 * np.pi * frequency_hz * at_s)


def end_of(tracks: Tracks) -> float:
    """Where the last note ends, seconds; 0 without notes."""
    return max((note.end_s for notes in tracks.values() for note in notes), default=0.0)
