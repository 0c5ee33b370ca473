"""recordings -> training streams: audio, clean F0, and content features of perturbed copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import fftconvolve, firwin2, resample_poly

from export.content_encoder import WhisperEncoder, load_whisper_encoder
from export.pitch_estimator import PitchEstimator, load_pitch_estimator
from export.read_arrays import read_arrays
from remix.pitch import clean_pitch, loud_level_db
from remix.vocal_frames import (
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    analysis_windows,
    frame_level_db,
    join_windows,
)

Floats = NDArray[np.float32]

# Copies whose speed differs move pitch and formants together by as much: the content branch then
# cannot tell the speaker from them. The first copy is the recording itself.
SPEEDS = (Fraction(1), Fraction(4, 5), Fraction(7, 8), Fraction(8, 7), Fraction(5, 4))
GAP_SAMPLES = 4000  # 0.25 s of silence between recordings, so that silence is learned too
HELD_OUT_EVERY = 25


@dataclass(frozen=True)
class Stream:
    """All recordings of one speaker, one after another.

    Args:
        samples: [T], 16 kHz.
        f0_hz: [N], interpolated where unvoiced; N = T / 160.
        voiced: [N].
        content: one [N / 2 / speed, 384] per entry of `speeds`.
        speeds: how much faster than the recording each copy was played to the encoder.
    """

    samples: Floats
    f0_hz: Floats
    voiced: NDArray[np.bool_]
    content: list[NDArray[np.float16]]
    speeds: list[float]

    @property
    def n_frames(self) -> int:
        """Frames of 160 samples."""
        return len(self.f0_hz)


def read_recording(path: Path) -> Floats:
    """Mono samples at 16 kHz of any file that FFmpeg reads."""
    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE_HZ)
    with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as container:
        frames = [
            part.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    return np.concatenate([*frames, np.zeros(0, np.float32)]).astype(np.float32)


def split_recordings(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on and, of those over 2 s, every 25th held out."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in {".g722", ".wav", ".flac", ".mp3"})
    long = [path for path in paths if path.stat().st_size >= 2 * 8000]  # G.722: 8000 bytes a second
    held_out = long[::HELD_OUT_EVERY]
    return [path for path in paths if path not in held_out], held_out


def load_stream(recordings: Sequence[Path], cache: Path, arrays: Path, copies: int) -> Stream:
    """The stream of the recordings; what was computed once is read from `cache`.

    Args:
        recordings: audio files of one speaker.
        cache: folder.
        arrays: `model.bin` of the Whisper package.
        copies: how many entries of SPEEDS to encode.
    """
    done = cache / "done.json"
    if not done.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _analyse(recordings, cache, arrays, copies)
        done.write_text(json.dumps({"recordings": len(recordings), "copies": copies}))
    return Stream(
        np.load(cache / "samples.npy"),
        np.load(cache / "f0_hz.npy"),
        np.load(cache / "voiced.npy"),
        [np.load(cache / f"content{index}.npy", mmap_mode="r") for index in range(copies)],
        [float(speed) for speed in SPEEDS[:copies]],
    )


def _analyse(recordings: Sequence[Path], cache: Path, arrays: Path, copies: int) -> None:
    gap = np.zeros(GAP_SAMPLES, np.float32)
    samples = np.concatenate([part for path in recordings for part in (read_recording(path), gap)])
    samples = samples[: len(samples) // (2 * FRAME_SAMPLES) * (2 * FRAME_SAMPLES)]
    np.save(cache / "samples.npy", samples)

    f0_hz, confidence = estimate_pitch(load_pitch_estimator(), samples)
    level_db = frame_level_db(samples)
    track = clean_pitch(f0_hz, confidence, level_db, loud_level_db(level_db))
    np.save(cache / "f0_hz.npy", track.f0_hz)
    np.save(cache / "voiced.npy", track.voiced)

    encoder = load_whisper_encoder(read_arrays(arrays.read_bytes()))
    rng = np.random.default_rng(0)
    for index, speed in enumerate(SPEEDS[:copies]):
        heard = resample_poly(samples, speed.denominator, speed.numerator).astype(np.float32)
        heard = heard if index == 0 else _recolour(heard, rng)
        np.save(cache / f"content{index}.npy", _content(encoder, heard).astype(np.float16))
        print(f"  content of copy {index} (speed {speed})", flush=True)


def _recolour(samples: Floats, rng: np.random.Generator) -> Floats:
    """Every 10 s another microphone: +-8 dB of smooth equaliser, gain, and 25 to 50 dB of SNR."""
    coloured = samples.copy()
    block = 10 * SAMPLE_RATE_HZ
    for start in range(0, len(samples), block):
        part = samples[start : start + block]
        gains = 10.0 ** (rng.uniform(-8.0, 8.0, 7) / 20.0)
        filtered = fftconvolve(part, firwin2(129, np.linspace(0.0, 1.0, 7), gains), mode="same")
        noise_rms = float(np.sqrt(np.mean(part**2))) * 10.0 ** (-rng.uniform(25.0, 50.0) / 20.0)
        noisy = filtered + noise_rms * rng.standard_normal(len(part))
        coloured[start : start + block] = noisy * 10.0 ** (rng.uniform(-12.0, 6.0) / 20.0)
    return coloured


def estimate_pitch(estimator: PitchEstimator, samples: Floats) -> tuple[Floats, Floats]:
    """F0 and confidence of every frame of a recording: [T] -> [N], [N]."""
    with torch.inference_mode():
        windows = [
            estimator(torch.from_numpy(window[None])) for window in analysis_windows(samples)
        ]
    n_frames = len(samples) // FRAME_SAMPLES
    f0_hz = join_windows([f0[0].numpy() for f0, _ in windows], n_frames)
    return f0_hz, join_windows([confidence[0].numpy() for _, confidence in windows], n_frames)


def _content(encoder: WhisperEncoder, samples: Floats) -> Floats:
    with torch.inference_mode():
        windows = [
            encoder(torch.from_numpy(window[None]))[0].numpy()
            for window in analysis_windows(samples)
        ]
    return join_windows(windows, -(-len(samples) // (2 * FRAME_SAMPLES)))
