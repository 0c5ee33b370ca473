"""song, remix -> how alike they are: the paper's cross-correlation, spectrograms, and a picture.

The correlation of two songs that share nothing but their length is near 0, that of a song with
itself 1. The paper gives raw sums, which grow with length and level: both are given here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

from remix.audio import Audio, Samples
from remix.errors import InvalidAudio
from remix.resample import resample, to_mono

SAMPLE_RATE_HZ = 22_050
"""Of the comparison: what a spectrogram shows and the ear compares lies below 11 kHz. The raw
correlation is scaled back to what it would be at 44.1 kHz, the paper's rate."""

PAPER_RATE_HZ = 44_100

FFT_SAMPLES = 1024
PICTURE_FRAMES = 1200
PICTURE_BINS = 256
"""Size of a spectrogram in the picture: about a pixel each."""

FLOOR_DB = -80.0


@dataclass(frozen=True)
class Similarity:
    """How alike two sounds are.

    Args:
        max_abs_correlation: largest magnitude of the cross-correlation, a sum over samples at
            44.1 kHz, as the paper gives it.
        normalised_correlation: the same, divided by the energies: 0 to 1; 0 for silence.
        lag_s: by how much the second is behind the first where that is.
        durations_s: of the first and of the second.
    """

    max_abs_correlation: float
    normalised_correlation: float
    lag_s: float
    durations_s: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return {**asdict(self), "durations_s": list(self.durations_s)}


@dataclass(frozen=True)
class Comparison:
    """A similarity, and what the picture shows.

    Args:
        similarity: the figures.
        lags_s: [K], lags of the correlation, thinned out.
        correlation: [K], normalised; at each the one of largest magnitude around it.
        spectrograms_db: [PICTURE_BINS, frames] of the first and of the second.
    """

    similarity: Similarity
    lags_s: NDArray[np.float64]
    correlation: NDArray[np.float64]
    spectrograms_db: tuple[NDArray[np.float32], NDArray[np.float32]]


def compare(song: Audio, remix: Audio) -> Comparison:
    """Correlate two sounds over every lag.

    Args:
        song: [C, T] at any rate.
        remix: [C', T'] at any rate.

    Raises:
        InvalidAudio: one of them has no samples.

    Source: the paper's evaluation: the inverse transform of one spectrum times the conjugate of
    the other.
    """
    first, second = (_mono(audio) for audio in (song, remix))
    size = next_fast_len(len(first) + len(second) - 1, real=True)
    product = np.conj(rfft(first, size))
    product *= rfft(second, size)
    circular = irfft(product, size)
    # Lags from -(len(first) - 1), the remix early, to len(second) - 1, the remix late.
    correlation = np.concatenate([circular[size - len(first) + 1 :], circular[: len(second)]])
    lags = np.arange(-(len(first) - 1), len(second))
    energy = float(np.linalg.norm(first.astype(np.float64)) * np.linalg.norm(second))
    best = int(np.abs(correlation).argmax())
    largest = float(np.abs(correlation[best]))
    similarity = Similarity(
        max_abs_correlation=largest * PAPER_RATE_HZ / SAMPLE_RATE_HZ,
        normalised_correlation=min(largest / energy, 1.0) if energy > 0 else 0.0,
        lag_s=float(lags[best]) / SAMPLE_RATE_HZ if energy > 0 else 0.0,
        durations_s=(song.duration_s, remix.duration_s),
    )
    thin_lags, thin = _thinned(lags, correlation / energy if energy > 0 else correlation)
    return Comparison(
        similarity, thin_lags / SAMPLE_RATE_HZ, thin, (_spectrogram(first), _spectrogram(second))
    )


def draw(comparison: Comparison, names: tuple[str, str] = ("song", "remix")) -> bytes:
    """The report's picture, PNG: two spectrograms and the correlation over lag."""
    # Here, not above: it takes a third of a second, and only the composer draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1)
    similarity = comparison.similarity
    shown = zip(names, comparison.spectrograms_db, similarity.durations_s, strict=True)
    for axis, (name, spectrogram, duration_s) in zip(axes, shown, strict=False):
        axis.imshow(
            spectrogram,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=FLOOR_DB,
            vmax=0.0,
            extent=(0.0, duration_s, 0.0, SAMPLE_RATE_HZ / 2000),
        )
        axis.set(
            title=name,
            xlim=(0.0, max(similarity.durations_s)),
            xlabel="time, s",
            ylabel="frequency, kHz",
        )
    axes[2].plot(comparison.lags_s, comparison.correlation, linewidth=0.6)
    axes[2].axvline(similarity.lag_s, color="tab:red", linewidth=0.6, linestyle="--")
    axes[2].set(
        title=(
            f"cross-correlation: largest {similarity.normalised_correlation:.3f} (raw "
            f"{similarity.max_abs_correlation:.1f}) at {similarity.lag_s:+.3f} s"
        ),
        xlabel="lag, s",
        ylabel="normalised",
    )
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    # Artists and canvas refer to each other and wait for the garbage collector: not with their
    # arrays and pixels.
    figure.clear()
    del canvas.renderer
    return png.getvalue()


def report_similarity(song: Audio, remix: Audio) -> tuple[dict[str, Any], bytes]:
    """The figures, ready for JSON, and the picture, PNG."""
    comparison = compare(song, remix)
    return comparison.similarity.to_json(), draw(comparison)


def _mono(audio: Audio) -> NDArray[np.float32]:
    if audio.samples.shape[1] == 0:
        raise InvalidAudio("One of the sounds to compare has 0 samples; at least 1 is needed.")
    mono: Samples = resample(to_mono(audio.samples), audio.sample_rate_hz, SAMPLE_RATE_HZ)
    return np.asarray(mono[0])


def _thinned(
    lags: NDArray[np.int64], correlation: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A few thousand points: of each stretch of lags the one of largest magnitude."""
    width = -(-len(lags) // 4000)
    padded = np.pad(correlation, (0, -len(correlation) % width)).reshape(-1, width)
    best = np.abs(padded).argmax(axis=1)
    at = np.minimum(np.arange(len(padded)) * width + best, len(lags) - 1)
    return lags[at].astype(np.float64), correlation[at].astype(np.float64)


def _spectrogram(mono: NDArray[np.float32]) -> NDArray[np.float32]:
    """[PICTURE_BINS, frames], dB below the loudest, magnitude of the short-time transform."""
    padded = np.pad(mono, FFT_SAMPLES // 2)
    hop = max(1, -(-len(mono) // PICTURE_FRAMES))
    window = np.hanning(FFT_SAMPLES + 1)[:-1].astype(np.float32)
    frames = sliding_window_view(padded, FFT_SAMPLES)[::hop]
    magnitude: NDArray[np.float32] = np.abs(rfft(frames * window, axis=1))
    magnitude = magnitude[:, : 2 * PICTURE_BINS]
    magnitude = np.asarray(magnitude.reshape(len(magnitude), PICTURE_BINS, 2).max(axis=2).T)
    loudest = float(magnitude.max(initial=0.0))
    if loudest == 0:
        return np.full(magnitude.shape, FLOOR_DB, np.float32)
    floor = loudest * 10 ** (FLOOR_DB / 20)
    return np.asarray(20 * np.log10(np.maximum(magnitude, floor) / loudest), np.float32)
