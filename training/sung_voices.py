"""recordings of speech -> a sung take: WORLD gives the words a melody's pitch and longer vowels.

What is spoken keeps its words and its voice; its pitch becomes the melody's, with glides and
vibrato, and voiced sounds are drawn out. It is no singing, but it has what a separator must know
a voice by: formants, consonants, harmonics that glide. Recordings of 16 kHz get noise above 7 kHz,
shaped by what is below it, so that a voice is not what ends at 8 kHz.

Source: Morise, Yokomori, Ozawa 2016, "WORLD: a vocoder-based high-quality speech synthesis
system"; the analysis is its DIO, StoneMask, CheapTrick and D4C (pyworld 0.3.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyworld
from numpy.typing import NDArray

from training.melodies import MelodyNote

Floats = NDArray[np.float64]

SAMPLE_RATE_HZ = 44_100
FRAME_S = 0.005
"""WORLD's frame period."""

LOWEST_HZ, HIGHEST_HZ = 70.0, 500.0
"""Of spoken pitch."""

SUFFIXES = frozenset({".g722", ".ogg", ".wav", ".flac", ".mp3"})

BAND_LIMIT = 0.45
"""Of a recording's rate: what is above is the codec's filter, not the voice."""


@dataclass(frozen=True)
class Voice:
    """Recordings of one speaker.

    Args:
        name: whose; the unit of the train/held-out split.
        recordings: files that FFmpeg reads.
    """

    name: str
    recordings: tuple[Path, ...]


@dataclass(frozen=True)
class _Analysis:
    """F0 [N] in Hz (0: unvoiced), envelope and aperiodicity [N, bins at 44.1 kHz]."""

    f0_hz: Floats
    envelope: Floats
    aperiodicity: Floats


def read_mono(path: Path) -> tuple[Floats, int]:
    """Samples [T] of a recording, and its rate in Hz."""
    with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as container:
        rate_hz = int(container.streams.audio[0].rate)
        resampler = av.AudioResampler("flt", "mono", rate_hz)
        parts = [
            part.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float64), rate_hz


def sing(
    voice: Voice,
    melody: Sequence[MelodyNote],
    middle: int,
    length_samples: int,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """A take: [length_samples] at 44.1 kHz, mono, dry, peak 0.5.

    Args:
        voice: who sings; recordings are drawn at random.
        melody: its pitches are semitones from the middle.
        middle: MIDI pitch; moved by octaves to a little above where the voice speaks.
        length_samples: of the take.
        rng: draws recordings, tempo of speech, vibrato.
    """
    take = np.zeros(length_samples)
    middle_hz = 0.0
    for phrase in _phrases(melody):
        at_s, end_s = phrase[0].onset_s, phrase[-1].onset_s + phrase[-1].duration_s
        for analysis in _spoken(voice, rng):
            voiced = analysis.f0_hz[analysis.f0_hz > 0]
            if not middle_hz:
                middle_hz = _in_range(middle, float(np.median(voiced)), rng)
            frames = _drawn_out(analysis.f0_hz > 0, rng.uniform(1.2, 2.2))
            frames = frames[: round((end_s - at_s) / FRAME_S)]
            times_s: Floats = at_s + FRAME_S * np.arange(len(frames), dtype=np.float64)
            pitch_hz = middle_hz * 2.0 ** (_pitch_curve(phrase, times_s, rng) / 12)
            f0_hz = np.where(analysis.f0_hz[frames] > 0, pitch_hz, 0.0)
            sound = pyworld.synthesize(
                f0_hz,
                np.ascontiguousarray(analysis.envelope[frames]),
                np.ascontiguousarray(analysis.aperiodicity[frames]),
                SAMPLE_RATE_HZ,
                1000 * FRAME_S,
            )
            first = round(at_s * SAMPLE_RATE_HZ)
            sound = sound[: max(length_samples - first, 0)]
            level = np.sqrt(np.mean(np.square(sound))) if len(sound) else 0.0
            take[first : first + len(sound)] += sound / max(level, 1e-6)
            at_s += len(frames) * FRAME_S
            if at_s > end_s - 0.3:
                break
    peak = np.abs(take).max()
    return (take * (0.5 / peak if peak > 0 else 1.0)).astype(np.float32)


def _in_range(middle: int, spoken_hz: float, rng: np.random.Generator) -> float:
    """The octave of a MIDI pitch that is nearest to what the voice would sing in, in Hz."""
    middle_hz = 440.0 * 2.0 ** ((middle - 69) / 12)
    comfortable_hz = spoken_hz * 2.0 ** rng.uniform(0.1, 0.6)
    return float(middle_hz * 2.0 ** np.round(np.log2(comfortable_hz / middle_hz)))


def _phrases(melody: Sequence[MelodyNote]) -> list[list[MelodyNote]]:
    """Notes, parted where nothing sounds for a fifth of a second."""
    phrases: list[list[MelodyNote]] = []
    end_s = -np.inf
    for note in melody:
        if note.onset_s > end_s + 0.2:
            phrases.append([])
        phrases[-1].append(note)
        end_s = note.onset_s + note.duration_s
    return phrases


def _spoken(voice: Voice, rng: np.random.Generator) -> Iterator[_Analysis]:
    """Recordings at random, analysed; those with little voice in them are passed over."""
    for _ in range(200):
        path = voice.recordings[int(rng.integers(len(voice.recordings)))]
        samples, rate_hz = read_mono(path)
        loud = np.flatnonzero(np.abs(samples) > 0.02)
        if len(loud) < 0.2 * rate_hz:
            continue
        samples = samples[loud[0] : loud[-1]][: 6 * rate_hz]
        f0_hz, times_s = pyworld.dio(
            samples, rate_hz, f0_floor=LOWEST_HZ, f0_ceil=HIGHEST_HZ, frame_period=1000 * FRAME_S
        )
        f0_hz = pyworld.stonemask(samples, f0_hz, times_s, rate_hz)
        if np.mean(f0_hz > 0) > 0.3:
            yield _analyse(samples, rate_hz, f0_hz, times_s)
    raise ValueError(f"{voice.name} has no recordings with a voice in them.")


def _analyse(samples: Floats, rate_hz: int, f0_hz: Floats, times_s: Floats) -> _Analysis:
    envelope = pyworld.cheaptrick(samples, f0_hz, times_s, rate_hz, f0_floor=LOWEST_HZ)
    fft_samples = pyworld.get_cheaptrick_fft_size(rate_hz, LOWEST_HZ)
    aperiodicity = pyworld.d4c(samples, f0_hz, times_s, rate_hz, fft_size=fft_samples)
    bins_hz = np.linspace(0, rate_hz / 2, envelope.shape[1])
    out_bins = pyworld.get_cheaptrick_fft_size(SAMPLE_RATE_HZ, LOWEST_HZ) // 2 + 1
    out_hz = np.linspace(0, SAMPLE_RATE_HZ / 2, out_bins)
    limit_hz = BAND_LIMIT * rate_hz
    # Above the limit the envelope goes on from its last octave's half, falling by 9 dB an octave
    # where a voice sounds and by 4 dB where breath does; all of it is noise.
    log_envelope = np.log(envelope + 1e-16)
    known = (bins_hz > 0.7 * limit_hz) & (bins_hz < limit_hz)
    fall_db = np.where(f0_hz > 0, 9.0, 4.0)
    octaves = np.log2(np.maximum(out_hz / limit_hz, 1.0))
    beyond = log_envelope[:, known].mean(1, keepdims=True) - (
        fall_db[:, None] * octaves * (np.log(10) / 10)
    )
    inside = _at(out_hz, bins_hz, log_envelope)
    is_beyond = out_hz > limit_hz
    return _Analysis(
        f0_hz,
        np.exp(np.where(is_beyond, beyond, inside)),
        np.where(is_beyond, 1.0, np.clip(_at(out_hz, bins_hz, aperiodicity), 0.0, 1.0)),
    )


def _at(out_hz: Floats, bins_hz: Floats, values: Floats) -> Floats:
    """Rows of values at bins_hz, read at out_hz."""
    place = np.minimum(out_hz / (bins_hz[1] - bins_hz[0]), len(bins_hz) - 1.000001)
    low, part = place.astype(int), place % 1
    result: Floats = values[:, low] * (1 - part) + values[:, low + 1] * part
    return result


def _drawn_out(voiced: NDArray[np.bool_], stretch: float) -> NDArray[Any]:
    """Indices of frames: voiced ones last `stretch` times as long."""
    ends = np.cumsum(np.where(voiced, stretch, 1.0))
    return np.searchsorted(ends, np.arange(int(ends[-1])), side="right").clip(0, len(voiced) - 1)


def _pitch_curve(phrase: Sequence[MelodyNote], times_s: Floats, rng: np.random.Generator) -> Floats:
    """Semitones at each time: steps made glides of 80 ms, vibrato, a slow drift of some cents."""
    onsets = np.array([note.onset_s for note in phrase])
    held = np.searchsorted(onsets, times_s, side="right").clip(1) - 1
    steps = np.array([note.pitch for note in phrase], float)[held]
    width = round(0.08 / FRAME_S)
    padded = np.pad(steps, (width // 2, width - 1 - width // 2), mode="edge")
    glide = np.convolve(padded, np.ones(width) / width, "valid")
    held_s = times_s - onsets[held]
    depth = rng.uniform(0.0, 0.5) * np.clip((held_s - 0.2) / 0.3, 0.0, 1.0)
    vibrato = depth * np.sin(2 * np.pi * rng.uniform(4.8, 6.5) * times_s)
    drift = 0.15 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6) * times_s + rng.uniform(0, 6))
    result: Floats = glide + vibrato + drift
    return result
