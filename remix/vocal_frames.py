"""vocal -> windows and frames, phrases -> vocal: what voice conversion and its training share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

SAMPLE_RATE_HZ = 16000  # of content encoder, pitch estimator and the starter voices
FRAME_SAMPLES = 160  # 100 frames/s: F0 and starter voices; frame i is centred at 160 i + 80
CONTENT_SAMPLES = 320  # 50 frames/s: Whisper's feature j is centred at sample 320 j
WINDOW_SAMPLES = 10 * SAMPLE_RATE_HZ
CONTEXT_SAMPLES = 1 * SAMPLE_RATE_HZ  # Whisper's first and last features are poor
CORE_SAMPLES = WINDOW_SAMPLES - 2 * CONTEXT_SAMPLES

PHRASE_CONTEXT_FRAMES = 25  # 0.25 s: what the voice's convolutions see beyond a phrase
FADE_FRAMES = 5  # half of a crossfade: 50 ms on each side of a cut
VOICED_CUT_PENALTY_DB = 20.0  # a cut in an unvoiced frame is worth that much level
SMOOTHING_FRAMES = 7  # of the loudness envelope: 70 ms, shorter than a syllable
MAX_GAIN_DB = 20.0


def analysis_windows(samples: Floats) -> list[Floats]:
    """Cuts a vocal for the content encoder and the pitch estimator.

    Args:
        samples: [T].

    Returns:
        ceil(T / CORE_SAMPLES) windows of [WINDOW_SAMPLES]; window k keeps the core from
        k * CORE_SAMPLES on, in its middle. Outside of the vocal lies silence.
    """
    n_windows = -(-len(samples) // CORE_SAMPLES)
    padded = np.zeros(n_windows * CORE_SAMPLES + 2 * CONTEXT_SAMPLES, np.float32)
    padded[CONTEXT_SAMPLES : CONTEXT_SAMPLES + len(samples)] = samples
    starts = range(0, n_windows * CORE_SAMPLES, CORE_SAMPLES)
    return [padded[start : start + WINDOW_SAMPLES] for start in starts]


def join_windows(windows: Sequence[Floats], n_frames: int) -> Floats:
    """The cores of analysed windows, one after another.

    Args:
        windows: each [M, ...], M frames over WINDOW_SAMPLES; an encoder whose last frames would
            reach beyond the window leaves them out.
        n_frames: frames of the whole vocal.

    Returns:
        [n_frames, ...].
    """
    if not windows:
        return np.zeros(0, np.float32)
    context = round(len(windows[0]) * CONTEXT_SAMPLES / WINDOW_SAMPLES)
    core = context * CORE_SAMPLES // CONTEXT_SAMPLES
    cores = [window[context : context + core] for window in windows]
    return np.concatenate(cores)[:n_frames]


def expand_content(content: Floats, first: int, n_frames: int, speed: float = 1.0) -> Floats:
    """Content features at 50 frames/s, linearly between them at 100 frames/s.

    Args:
        content: [M, F].
        first: index of the first frame at 100 frames/s.
        n_frames: how many frames.
        speed: how much faster the encoder heard the recording (training only).

    Returns:
        [n_frames, F], float32.
    """
    centre_samples = (np.arange(first, first + n_frames) + 0.5) * FRAME_SAMPLES
    position = np.clip(centre_samples / (CONTENT_SAMPLES * speed), 0.0, len(content) - 1.0)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, len(content) - 1)
    share = (position - before).astype(np.float32)[:, None]
    low, high = content[before].astype(np.float32), content[after].astype(np.float32)
    return np.asarray(low + share * (high - low), np.float32)


def repeat_content(content: Floats, first: int, n_frames: int, ratio: float) -> Floats:
    """Content features repeated until there are as many as voice frames.

    Args:
        content: [M, F], of a whole vocal.
        first: index of the first voice frame.
        n_frames: how many voice frames.
        ratio: content features per voice frame, both counted over the whole vocal.

    Returns:
        [n_frames, F]; before and after the vocal its first and last feature.

    Source: so-vits-svc-fork 4.2.30, `utils.repeat_expand_2d` (torch's "nearest", its scale in
    float32), with which its voices are trained.
    """
    frame = np.arange(first, first + n_frames, dtype=np.float32)
    index = np.floor(frame * np.float32(ratio)).astype(np.int64)
    return np.asarray(content[np.clip(index, 0, len(content) - 1)], np.float32)


def frame_level_db(samples: Floats, frame_samples: int = FRAME_SAMPLES) -> Floats:
    """RMS of each frame, smoothed over three, in dBFS (silence: -120).

    Args:
        samples: [T].
        frame_samples: of a frame.

    Returns:
        [T / frame_samples].
    """
    n_frames = len(samples) // frame_samples
    if not n_frames:
        return np.zeros(0, np.float32)
    frames = samples[: n_frames * frame_samples].reshape(n_frames, frame_samples)
    power = np.square(frames.astype(np.float64)).mean(axis=1)
    smooth = np.convolve(np.pad(power, 1, mode="edge"), np.full(3, 1 / 3), mode="valid")
    return (10.0 * np.log10(smooth + 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Phrase:
    """A stretch of the vocal that the voice sings in one window.

    Args:
        start: its first frame.
        stop: one past its last frame.
        first: the window's first frame; may lie before the vocal.
    """

    start: int
    stop: int
    first: int


def grow_level_db(
    level_db: Floats, samples: Floats, n_frames: int, frame_samples: int = FRAME_SAMPLES
) -> Floats:
    """`frame_level_db` of a sound that grows: what is known stays, new frames are added.

    Args:
        level_db: [M], of the first frames.
        samples: [T], all that there are; at least a frame more than `n_frames`, unless that is
            where the sound ends.
        n_frames: how many are wanted.
        frame_samples: of a frame.

    Returns:
        [n_frames].
    """
    begin = max(len(level_db) - 1, 0)
    end = n_frames + 1 if len(samples) >= (n_frames + 1) * frame_samples else n_frames
    piece = cut_frames(samples, begin, max(end - begin, 0), frame_samples)
    new = frame_level_db(piece, frame_samples)[len(level_db) - begin : n_frames - begin]
    return np.append(level_db, new)


def next_phrase(level_db: Floats, voiced: Mask, start: int, window_frames: int) -> Phrase:
    """Cuts the next phrase of a vocal, where it is quiet.

    Args:
        level_db: [N].
        voiced: [N].
        start: where the last phrase stopped.
        window_frames: of every window; a phrase has PHRASE_CONTEXT_FRAMES around it.

    Returns:
        A phrase that fits into a window; it ends with the vocal if that fits.
    """
    longest = window_frames - 2 * PHRASE_CONTEXT_FRAMES
    stop = len(level_db)
    if stop - start > longest:
        may_stop = slice(start + longest // 2, start + longest + 1)
        cost = level_db[may_stop] + VOICED_CUT_PENALTY_DB * voiced[may_stop]
        stop = may_stop.start + int(np.argmin(cost))
    return Phrase(start, stop, start - PHRASE_CONTEXT_FRAMES)


def cut_frames(array: Floats, first: int, n_frames: int, frame: int = 1) -> Floats:
    """A window of an array along its first axis, zeros outside of it.

    Args:
        array: [N * frame, ...].
        first: first frame of the window, may be negative.
        n_frames: length of the window.
        frame: elements in a frame.

    Returns:
        [n_frames * frame, ...].
    """
    window = np.zeros((n_frames * frame, *array.shape[1:]), array.dtype)
    begin, end = max(first * frame, 0), min((first + n_frames) * frame, len(array))
    if end > begin:
        window[begin - first * frame : end - first * frame] = array[begin:end]
    return window


def add_phrase(
    vocal: Floats, phrase: Phrase, window: Floats | None, frame_samples: int = FRAME_SAMPLES
) -> None:
    """Add a phrase, faded at its cuts: overlapping windows sing the same, so amplitudes add.

    Args:
        vocal: [T], T = N * frame_samples, of the whole vocal; is changed.
        phrase: of `next_phrase`.
        window: its samples; None is silence.
        frame_samples: of a frame.
    """
    if window is None:
        return
    begin = max(phrase.start - FADE_FRAMES, 0) * frame_samples
    end = min((phrase.stop + FADE_FRAMES) * frame_samples, len(vocal))
    piece = window[begin - phrase.first * frame_samples :][: end - begin].copy()
    ramp = np.linspace(0.0, 1.0, 2 * FADE_FRAMES * frame_samples, dtype=np.float32)
    if phrase.start > 0:
        rising = ramp[-(phrase.start * frame_samples - begin) - len(ramp) // 2 :]
        piece[: len(rising)] *= rising[: len(piece)]
    if phrase.stop * frame_samples < len(vocal):
        falling = ramp[::-1][: len(ramp) // 2 + end - phrase.stop * frame_samples]
        piece[-len(falling) :] *= falling[-len(piece) :]
    vocal[begin:end] += piece


def follow_loudness(vocal: Floats, original: Floats, frame_samples: int = FRAME_SAMPLES) -> Floats:
    """The vocal with the original's loudness envelope; where the original is silent, silence.

    Args:
        vocal: [T], T a multiple of frame_samples.
        original: [T].
        frame_samples: of a frame.
    """
    n_frames = len(vocal) // frame_samples
    if not n_frames:
        return vocal
    wanted, found = (_envelope(samples, frame_samples) for samples in (original, vocal))
    # The smoothed envelope reaches into silence; what sounds within 15 ms does not.
    wanted = np.minimum(wanted, _nearest_peak(original, frame_samples))
    gain = np.minimum(wanted / np.maximum(found, 1e-6), 10.0 ** (MAX_GAIN_DB / 20.0))
    centre = (np.arange(n_frames) + 0.5) * frame_samples
    return np.asarray(vocal * np.interp(np.arange(len(vocal)), centre, gain), np.float32)


def _nearest_peak(samples: Floats, frame_samples: int) -> Floats:
    rms = np.sqrt(np.square(samples.reshape(-1, frame_samples).astype(np.float64)).mean(axis=1))
    padded = np.pad(rms, 1)
    return np.asarray(np.maximum(np.maximum(padded[:-2], padded[2:]), rms), np.float32)


def _envelope(samples: Floats, frame_samples: int) -> Floats:
    frames = samples.reshape(-1, frame_samples).astype(np.float64)
    power = np.pad(np.square(frames).mean(axis=1), SMOOTHING_FRAMES // 2, mode="edge")
    kernel = np.hanning(SMOOTHING_FRAMES + 2)[1:-1]
    smooth = np.convolve(power, kernel / kernel.sum(), mode="valid")
    return np.asarray(np.sqrt(smooth), np.float32)
