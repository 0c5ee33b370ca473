"""song -> its beats, bars, tempo and key.

Onsets are where the spectrum grows; the tempo is the period with which they recur; the beats are
the path through the onsets that keeps to that period; bars begin on the beats on which the bass
enters and the harmony changes. The grid then reaches over the whole song, silence included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts load when they are first used: signal takes a second
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.ndimage import uniform_filter1d

from remix.audio import Audio
from remix.notes import BeatGrid
from remix.resample import resample, to_mono

Floats = NDArray[np.float64]

SAMPLE_RATE_HZ = 22_050
HOP_SAMPLES = 256
FFT_SAMPLES = 1024
FRAME_RATE_HZ = SAMPLE_RATE_HZ / HOP_SAMPLES

CHROMA_HOP_SAMPLES = 2048
CHROMA_FFT_SAMPLES = 8192
"""Of the harmony: 2.7 Hz, a quarter of a semitone's distance at 185 Hz."""

MIN_BPM, MAX_BPM = 60.0, 180.0
USUAL_BPM = 115.0
PRIOR_OCTAVES = 0.7
"""Log-normal prior of the tempo. Source: Ellis, Beat Tracking by Dynamic Programming (2007), 3.2,
whose centre is 120 bpm and whose width is 0.9 octaves; narrower here, because what lies out of
`MIN_BPM` to `MAX_BPM` is counted in halves or doubles anyway."""

TIGHTNESS = 100.0
"""How much a beat's distance from the last may differ from the period, against how strong an
onset it hits (Ellis 2007, 2, alpha)."""

MEL_BANDS = 40
LOW_HZ = 150.0
"""Below: kick drum and bass."""

ONSET_DELAY_S = 0.012
"""How much later an attack is than the frame in which the spectrum grows most: 0.017 s of clicks
after silence, 0.007 s of rendered bands."""

STEADY_BEATS = 0.1
STEADY_SHARE = 0.6
"""A song counts as played to a ruler where so many of its beats lie within so much of a beat of
one: then its beats are the ruler's."""

RULER_BEATS = 24
"""Length of the passage on which the ruler is first laid."""

SMOOTHED_BEATS = 9
"""Else each beat is moved onto the line through so many beats around it."""

TRIPLE_ADVANTAGE = 1.25
TRIPLE_CONTRAST = 3.0
"""How much better bars of three must explain the accents than bars of four, and how much better,
in standard errors, than no bars at all."""

MAJOR_PROFILE = (0.748, 0.060, 0.488, 0.082, 0.670, 0.460, 0.096, 0.715, 0.104, 0.366, 0.057, 0.400)
MINOR_PROFILE = (0.712, 0.084, 0.474, 0.618, 0.049, 0.460, 0.105, 0.747, 0.404, 0.067, 0.133, 0.330)
"""Share of a key's segments in which each degree sounds. Source: Temperley, Music and Probability
(2007), table 6.1, from the Kostka-Payne corpus."""


@dataclass(frozen=True)
class _Frames:
    """What is read off the spectrum.

    Args:
        onset: [N], growth over all mel bands, by hop of 12 ms.
        low_onset: [N], growth below `LOW_HZ`, by hop of 12 ms.
        chroma: [M, 12], level by pitch class, by hop of 93 ms.
    """

    onset: Floats
    low_onset: Floats
    chroma: Floats


def find_beats(song: Audio) -> BeatGrid:
    """The grid of beats that a song is played on.

    Args:
        song: [C, T] at any rate, of any length.

    Returns:
        Beats from before 0 to a bar past the song's end. Without onsets (silence, a single
        tone): 120 bpm from 0, four beats a bar, C major.
    """
    mono = resample(to_mono(song.samples), song.sample_rate_hz, SAMPLE_RATE_HZ)[0]
    frames = _analyse(mono)
    duration_s = song.duration_s
    tonic, mode = find_key(frames.chroma.sum(axis=0))
    onset = _normalised(frames.onset)
    period = _period_frames(onset)
    if period is None:
        beats_s = np.arange(0.0, duration_s + 4.0, 0.5)
        return BeatGrid(beats_s, 0, 4, 120.0, tonic, mode)
    beats = _steady(_track(onset, period) / FRAME_RATE_HZ + ONSET_DELAY_S, period / FRAME_RATE_HZ)
    beats_per_bar, phase = _meter(frames, beats)
    return _covering(beats, duration_s, beats_per_bar, phase, tonic, mode)


def find_key(chroma: Floats) -> tuple[int, Literal["major", "minor"]]:
    """The key whose degrees sound as the pitch classes do.

    Args:
        chroma: [12], how much of each pitch class sounds, from C.

    Returns:
        Tonic, 0 = C to 11 = B, and mode; C major for silence.

    Source: Krumhansl, Cognitive Foundations of Musical Pitch (1990), chapter 4: the highest
    correlation with a key's profile.

    >>> find_key(np.array([0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0.5]))
    (2, 'major')
    """
    if np.ptp(chroma) == 0:
        return 0, "major"
    profiles = [np.roll(p, k) for p in (MAJOR_PROFILE, MINOR_PROFILE) for k in range(12)]
    best = int(np.argmax([np.corrcoef(chroma, profile)[0, 1] for profile in profiles]))
    return best % 12, "major" if best < 12 else "minor"


# From samples to frames


def _analyse(mono: NDArray[np.float32]) -> _Frames:
    bands, fold = _mel_bands(), _chroma_fold()
    low_bins = round(LOW_HZ * FFT_SAMPLES / SAMPLE_RATE_HZ) + 1
    mel, low = [], []
    for magnitude in _magnitudes(mono, FFT_SAMPLES, HOP_SAMPLES):
        mel.append(magnitude @ bands)
        low.append(magnitude[:, 1:low_bins].sum(axis=1, keepdims=True))
    chroma = [np.sqrt(m) @ fold for m in _magnitudes(mono, CHROMA_FFT_SAMPLES, CHROMA_HOP_SAMPLES)]
    return _Frames(
        onset=_growth(np.concatenate(mel)),
        low_onset=_growth(np.concatenate(low)),
        chroma=np.concatenate(chroma).astype(np.float64),
    )


def _magnitudes(mono: NDArray[np.float32], fft: int, hop: int) -> Iterator[NDArray[np.float32]]:
    """[n, F] at a time: frame k is centred on sample k hop."""
    window = np.hanning(fft + 1)[:-1].astype(np.float32)
    frames = sliding_window_view(np.pad(mono, fft // 2), fft)[::hop]
    chunk = (1 << 20) // fft  # 4 MB of samples
    for start in range(0, len(frames), chunk):
        yield np.abs(rfft(frames[start : start + chunk] * window, axis=1))


def _growth(level: NDArray[np.float32]) -> Floats:
    """[N, bands] -> [N]: how much louder each frame is than the last but one, by band, in the mean.

    The logarithm is that of Klapuri (1999): with it a soft onset counts beside a loud one.
    """
    loudest = float(level.max(initial=0.0))
    if loudest < 1e-6:
        return np.zeros(len(level))
    logarithm = np.log1p(1_000 / loudest * level)
    difference = logarithm[2:] - logarithm[:-2]
    return np.concatenate([np.zeros(1), np.maximum(difference, 0).mean(axis=1), np.zeros(1)])[
        : len(level)
    ].astype(np.float64)


def _normalised(onset: Floats) -> Floats:
    """What rises above the second around it, in units of its deviation over the song."""
    raised = np.maximum(onset - uniform_filter1d(onset, round(FRAME_RATE_HZ), mode="nearest"), 0)
    deviation = raised.std()
    return raised / deviation if deviation > 1e-9 else np.zeros_like(raised)


def _mel_bands() -> NDArray[np.float32]:
    """[F, MEL_BANDS]: triangles of equal height, 30 Hz to 10 kHz. Source: O'Shaughnessy (1987)."""

    def mel(hz: Floats | float) -> Floats:
        return np.asarray(2595 * np.log10(1 + np.asarray(hz) / 700))

    edges = np.linspace(mel(30.0), mel(10_000.0), MEL_BANDS + 2)
    at = mel(np.arange(FFT_SAMPLES // 2 + 1) * SAMPLE_RATE_HZ / FFT_SAMPLES)[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.asarray(np.maximum(0, np.minimum(rising, falling)), np.float32)


def _chroma_fold() -> NDArray[np.float32]:
    """[F, 12]: the pitch class of each bin, from C, at A = 440 Hz.

    From 60 Hz, where two bins are a whole tone, to 2.1 kHz. A bin between two pitch classes
    counts for both.
    """
    hz = np.arange(CHROMA_FFT_SAMPLES // 2 + 1) * SAMPLE_RATE_HZ / CHROMA_FFT_SAMPLES
    hz[0] = 1.0
    pitch = 69 + 12 * np.log2(hz / 440)
    away = np.abs((pitch[:, None] - np.arange(12) + 6) % 12 - 6)
    weights = np.maximum(0, 1 - away) * ((hz > 60) & (hz < 2_100))[:, None]
    # Bins lie denser the higher the pitch: each octave is to count alike.
    return np.asarray(weights / hz[:, None], np.float32)


# From frames to beats


def _period_frames(onset: Floats) -> float | None:
    """The beat's period in frames; None where nothing recurs.

    A period is as good as its multiples are, two and four of them or three and six: bars recur
    too, where a chance distance between two onsets does not.
    """
    if not onset.any():
        return None
    length = len(onset)
    size = next_fast_len(2 * length, real=True)
    centred = onset - onset.mean()
    recurrence = irfft(np.abs(rfft(centred, size)) ** 2, size)[:length]
    # The mean product, not the sum, so that long lags of short songs count too.
    recurrence = recurrence / recurrence[0] / np.maximum(1 - np.arange(length) / length, 0.25)
    shortest, longest = 60 * FRAME_RATE_HZ / MAX_BPM, 60 * FRAME_RATE_HZ / MIN_BPM
    periods = np.arange(shortest, longest, 0.1)
    multiples = periods[:, None] * np.array([1.0, 2.0, 3.0, 4.0, 6.0])
    one, two, three, four, six = np.interp(multiples.T, np.arange(length), recurrence, right=0.0)
    comb = one + np.maximum(0.7 * (two + four), 0.7 * (three + six))
    octaves = np.log2(60 * FRAME_RATE_HZ / periods / USUAL_BPM)
    score = np.maximum(comb, 0) * np.exp(-0.5 * (octaves / PRIOR_OCTAVES) ** 2)
    return float(periods[score.argmax()]) if score.max() > 0 else None


def _track(onset: Floats, period: float) -> Floats:
    """Frames of the beats, fractional: the best path. Source: Ellis (2007), sections 2 and 3.3."""
    local = np.convolve(onset, np.exp(-0.5 * (np.arange(-32, 33) * 32 / period) ** 2), "same")
    length = len(onset)
    steps = np.arange(round(period / 2), round(2 * period) + 1)
    penalty = TIGHTNESS * np.log(steps / period) ** 2
    score, before = local.copy(), np.full(length, -1)
    for frame in range(length):
        # Beats before the first frame score nothing, so that a path may begin anywhere.
        reachable = np.searchsorted(steps, frame, side="right")
        if reachable == 0:
            continue
        candidates = score[frame - steps[:reachable]] - penalty[:reachable]
        best = int(candidates.argmax())
        if candidates[best] > 0:
            score[frame] += candidates[best]
            before[frame] = frame - steps[best]
    last_period = slice(max(0, length - round(period)), length)
    frame = last_period.start + int(score[last_period].argmax())
    beats = []
    while frame >= 0:
        beats.append(frame + _vertex(local, frame))
        frame = int(before[frame])
    return np.array(beats[::-1])


def _vertex(values: Floats, index: int) -> float:
    """Where, beside a maximum at `index`, the parabola through its neighbours has its vertex."""
    if not 0 < index < len(values) - 1:
        return 0.0
    before, here, after = values[index - 1 : index + 2]
    bend = before - 2 * here + after
    return float(np.clip(0.5 * (before - after) / bend, -0.5, 0.5)) if bend < 0 else 0.0


def _steady(beats_s: Floats, period_s: float) -> Floats:
    """The beats without the jitter of their measurement; strictly increasing, two at least.

    A song that most of its beats show to be played to a ruler gets the ruler: a passage of
    off-beats, in which the path has slipped by half a beat, then does not turn the bars around.
    """
    count = len(beats_s)
    if count < SMOOTHED_BEATS:  # too few to tell a period: it is the tempo's
        index = np.arange(max(count, 2))
        start_s = (beats_s - period_s * index[:count]).mean()
        return np.asarray(start_s + period_s * index)
    ruler = _ruler(beats_s)
    away_s = np.abs((beats_s - ruler.start_s) / ruler.period_s % 1 - 0.5)
    on_it = 0.5 - away_s < STEADY_BEATS
    if on_it.mean() > STEADY_SHARE:
        first, last = np.round((beats_s[[0, -1]] - ruler.start_s) / ruler.period_s)
        return ruler.start_s + ruler.period_s * np.arange(first, max(last, first + 1) + 1)
    return np.asarray(scipy.signal.savgol_filter(beats_s, SMOOTHED_BEATS, 1, mode="interp"))


@dataclass(frozen=True)
class _Ruler:
    start_s: float
    period_s: float


def _ruler(beats_s: Floats) -> _Ruler:
    """The ruler on which most beats lie, laid on the steadiest passage and then lengthened."""
    count = len(beats_s)
    width = min(count, RULER_BEATS)
    fits = [_fit(np.arange(width), beats_s[at : at + width]) for at in range(count - width + 1)]
    steadiest = int(np.argmin([residual for _, residual in fits]))
    ruler, middle = fits[steadiest][0], steadiest + width // 2
    while width < count:
        width = min(2 * width, count)
        part = beats_s[max(0, middle - width) : middle + width]
        index = np.round((part - ruler.start_s) / ruler.period_s)
        away = np.abs((part - ruler.start_s) / ruler.period_s - index)
        on_it = away < STEADY_BEATS
        if on_it.sum() >= 2 and np.ptp(index[on_it]) > 0:
            ruler, _ = _fit(index[on_it], part[on_it])
    return ruler


def _fit(index: Floats | NDArray[np.int64], beats_s: Floats) -> tuple[_Ruler, float]:
    """The ruler of least squares, and how far the beats are from it in the mean."""
    period_s, start_s = np.polyfit(index, beats_s, 1)
    residual = np.abs(beats_s - start_s - period_s * index).mean()
    return _Ruler(float(start_s), float(period_s)), float(residual)


def _meter(frames: _Frames, beats_s: Floats) -> tuple[int, int]:
    """Beats per bar, 3 or 4, and which beat (counted from the first) begins a bar."""
    accents = _accents(frames, beats_s)
    found = {}
    for beats_per_bar in (4, 3):
        if len(accents) < 2 * beats_per_bar:
            continue
        place = np.arange(len(accents)) % beats_per_bar
        for phase in range(beats_per_bar):
            strong, weak = accents[place == phase], accents[place != phase]
            error = np.sqrt(1 / len(strong) + 1 / len(weak))
            found[beats_per_bar, phase] = float((strong.mean() - weak.mean()) / error)
    if not found:
        return 4, 0
    best = {n: max((c, p) for (m, p), c in found.items() if m == n) for n in {m for m, _ in found}}
    if best.get(3, (0.0, 0))[0] > max(TRIPLE_CONTRAST, TRIPLE_ADVANTAGE * best.get(4, (0.0, 0))[0]):
        return 3, best[3][1]
    return 4, best.get(4, (0.0, 0))[1]


def _accents(frames: _Frames, beats_s: Floats) -> Floats:
    """[beats]: how much each beat is one on which bars begin."""
    at = np.round(beats_s * FRAME_RATE_HZ).astype(int)
    ends_s = np.append(beats_s, 2 * beats_s[-1] - beats_s[-2])
    bounds = np.round(ends_s * SAMPLE_RATE_HZ / CHROMA_HOP_SAMPLES).astype(int)
    bounds = np.clip(bounds, 0, len(frames.chroma) - 1)
    inside = (at >= 0) & (at < len(frames.onset))

    def peak_at_beats(values: Floats) -> Floats:
        return np.array([values[max(0, b - 3) : b + 4].max(initial=0.0) for b in at])

    harmony = np.array([
        frames.chroma[start : max(start + 1, end)].mean(axis=0)
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ])  # fmt: skip
    norm = np.linalg.norm(harmony, axis=1, keepdims=True)
    harmony = harmony / np.maximum(norm, 1e-9)
    change = 1 - np.concatenate([[1.0], (harmony[1:] * harmony[:-1]).sum(axis=1)])
    parts = (1.0, peak_at_beats(frames.low_onset)), (2.0, change)
    return _standard(
        np.asarray(sum(weight * _standard(values) for weight, values in parts) * inside)
    )


def _standard(values: Floats) -> Floats:
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 1e-9 else np.zeros_like(values)


def _covering(
    beats_s: Floats,
    duration_s: float,
    beats_per_bar: int,
    phase: int,
    tonic: int,
    mode: Literal["major", "minor"],
) -> BeatGrid:
    """The grid from a bar's line at or before 0 to a bar past the end."""
    intervals = np.diff(beats_s)
    first_s, last_s = float(np.median(intervals[:8])), float(np.median(intervals[-8:]))
    before = max(0, int(np.ceil(beats_s[0] / first_s)))
    after = max(0, int(np.ceil((duration_s - beats_s[-1]) / last_s))) + beats_per_bar
    grid = np.concatenate([
        beats_s[0] - first_s * np.arange(before, 0, -1),
        beats_s,
        beats_s[-1] + last_s * np.arange(1, after + 1),
    ])  # fmt: skip
    return BeatGrid(
        beat_times_s=grid,
        first_downbeat=(phase + before) % beats_per_bar,
        beats_per_bar=beats_per_bar,
        tempo_bpm=60 / float(np.median(np.diff(grid))),
        tonic=tonic,
        mode=mode,
    )
