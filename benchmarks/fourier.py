"""HTDemucs' Fourier transforms outside the graph (scipy) against inside it (convolutions).

    python -m benchmarks.fourier [--rounds 5]

One window of HTDemucs: spectra of two channels, and samples of eight (four stems) back from
theirs. Inside an ONNX graph both are convolutions with the cosines and sines of a frame, because
ONNX's own transform has no inverse for real numbers that ONNX Runtime computes fast. Both sides
with all cores, in turn. Writes benchmarks/results/fourier.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.compare import si_sdr_db
from export.report import machine
from export.separate_stems import FOUR_STEMS, PUBLISHED_HTDEMUCS, SAMPLE_RATE_HZ
from export.time_calls import cores
from export.trace import to_onnx
from remix.manifest import MANIFEST_PATH
from remix.stft import istft, stft
from runners.separate_stems import FFT_SAMPLES, HOP_SAMPLES, LEAD_SAMPLES, NYQUIST, HTDemucs

RESULT = MANIFEST_PATH.parent / "benchmarks/results/fourier.json"

WINDOW_SAMPLES = int(PUBLISHED_HTDEMUCS["segment"] * SAMPLE_RATE_HZ)
N_FRAMES = HTDemucs.framing.frame_count(WINDOW_SAMPLES)


class Transforms(nn.Module):
    """Spectra of a mixture, [B, 2, T] -> [B, 2, N, F, 2], and stems of spectra, as convolutions."""

    basis: Tensor
    power: Tensor

    def __init__(self) -> None:
        super().__init__()
        sample, frequency_bin = torch.arange(FFT_SAMPLES), torch.arange(NYQUIST)[:, None]
        angle = 2.0 * math.pi / FFT_SAMPLES * (sample * frequency_bin).remainder(FFT_SAMPLES)
        hann = torch.sin(math.pi * sample / FFT_SAMPLES) ** 2
        basis = torch.cat([angle.cos(), -angle.sin()]) * hann  # [2 F, size]
        self.register_buffer("basis", basis[:, None].float())
        frames = torch.ones(1, 1, N_FRAMES + 4)
        power = F.conv_transpose1d(frames, (hann**2)[None, None].float(), stride=HOP_SAMPLES)
        self.register_buffer("power", power[:, :, LEAD_SAMPLES + 2 * HOP_SAMPLES :])

    def forward(self, mixture: Tensor, spectra_stems: Tensor) -> tuple[Tensor, Tensor]:
        """Both transforms of a window."""
        tail = (N_FRAMES - 1) * HOP_SAMPLES - LEAD_SAMPLES + FFT_SAMPLES - WINDOW_SAMPLES
        padded = F.pad(mixture, (LEAD_SAMPLES, tail), mode="reflect").reshape(2, 1, -1)
        spectra = F.conv1d(padded, self.basis, stride=HOP_SAMPLES)  # [2, 2 F, N]
        parts = spectra_stems.reshape(2 * len(FOUR_STEMS), N_FRAMES, NYQUIST, 2)
        parts = parts.permute(0, 3, 2, 1).reshape(len(parts), 2 * NYQUIST, N_FRAMES)
        # Every bin but the first stands for its mirror image as well.
        double = torch.full((NYQUIST,), 2.0 / FFT_SAMPLES)
        double[0] = 1.0 / FFT_SAMPLES
        frames = parts * double.repeat(2)[:, None]
        summed = F.conv_transpose1d(frames, self.basis, stride=HOP_SAMPLES)
        summed = summed[:, :, LEAD_SAMPLES : LEAD_SAMPLES + WINDOW_SAMPLES]
        stems = summed / self.power[:, :, :WINDOW_SAMPLES]
        shaped = spectra.reshape(1, 2, 2, NYQUIST, N_FRAMES).permute(0, 1, 4, 3, 2)
        return shaped, stems.reshape(1, len(FOUR_STEMS), 2, WINDOW_SAMPLES)


def outside(mixture: Any, spectra_stems: Any) -> tuple[Any, Any]:
    """What the runner does."""
    spectra = np.ascontiguousarray(stft(mixture, HTDemucs.framing)[..., :NYQUIST])
    stems = np.ascontiguousarray(spectra_stems).view(np.complex64)[..., 0]
    return (
        spectra.view(np.float32).reshape(*spectra.shape, 2),
        istft(stems, HTDemucs.framing, WINDOW_SAMPLES),
    )


def inside(folder: Path) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The same in ONNX Runtime."""
    shape = [2, N_FRAMES, NYQUIST, 2]
    example = {
        "mixture": torch.randn(1, 2, WINDOW_SAMPLES),
        "spectra_stems": torch.randn(1, len(FOUR_STEMS), *shape),
    }
    axes = {
        "mixture": [1, 2, WINDOW_SAMPLES],
        "spectra_stems": [1, len(FOUR_STEMS), *shape],
        "spectra": [1, *shape],
        "stems": [1, len(FOUR_STEMS), 2, WINDOW_SAMPLES],
    }
    path = folder / "transforms.onnx"
    path.write_bytes(to_onnx(Transforms().eval(), example, axes).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(mixture: Any, spectra_stems: Any) -> tuple[Any, Any]:
        spectra, stems = session.run(None, {"mixture": mixture, "spectra_stems": spectra_stems})
        return spectra, stems

    return run


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    mixture = rng.standard_normal((1, 2, WINDOW_SAMPLES), np.float32)
    stems = rng.standard_normal((1, len(FOUR_STEMS), 2, N_FRAMES, NYQUIST, 2), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        sides = {"outside (scipy)": outside, "inside (ONNX Runtime)": inside(Path(folder))}
        times: dict[str, list[float]] = {name: [] for name in sides}
        outputs = {name: call(mixture, stems) for name, call in sides.items()}
        for _ in range(options.rounds):
            for name, call in sides.items():
                start = time.perf_counter()
                call(mixture, stems)
                times[name].append(round(time.perf_counter() - start, 4))
    ours, theirs = outputs.values()
    result = {
        "what": "Fourier transforms around one window of HTDemucs, 7.8 s, four stems",
        "machine": machine(),
        "runs_s": times,
        "median_s": {name: statistics.median(runs) for name, runs in times.items()},
        "agreement_db": [
            round(si_sdr_db(one, other), 1) for one, other in zip(ours, theirs, strict=True)
        ],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
