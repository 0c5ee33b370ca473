"""song windows -> stem windows, by HTDemucs or by Spleeter.

Every model of this stage takes samples and gives samples; the Fourier transforms around its
graph are scipy's. Measured on two cores for one window of HTDemucs: 0.04 s against 2 to 4 s
in the graph, and as convolutions inside the graph they would be 110 billion operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import bentoml
import numpy as np
from numpy.typing import NDArray

from remix.audio import Samples
from remix.errors import InvalidModel
from remix.manifest import ModelEntry, TensorSpec, installed, read_manifest
from remix.separate_stems import INPUT, OUTPUT, Separator
from remix.settings import Settings
from remix.stages import Tensors
from remix.stft import Framing, istft, stft
from runners.inference_protocol import ServedModel, silent_ends
from runners.open_graph import open_graph
from runners.runner import LARGE_ARRAYS_MALLOC, SERVICE, Runner

FFT_SAMPLES = 4096
HOP_SAMPLES = 1024

LEAD_SAMPLES = HOP_SAMPLES // 2 * 3
"""Frame n is centred on the middle of hop n. Source: demucs 4.1.0, htdemucs.py, `_spec`."""

NYQUIST = FFT_SAMPLES // 2

Compute: TypeAlias = Callable[[Tensors], dict[str, NDArray[Any]]]
"""A graph, however it runs."""


class SeparationModel(ServedModel):
    """A separation model on windows: {"mixture": [B, 2, T]} -> {"stems": [B, S, 2, T]}.

    Args:
        entry: of the manifest.
        graph: in whatever runtime the manifest names.
        device: whose batch limit holds.
    """

    def __init__(self, entry: ModelEntry, graph: Compute, device: str) -> None:
        separator = Separator.of(entry)
        n_samples, n_stems = separator.window_samples, len(separator.stems)
        self.name = entry.name
        self.max_batch = entry.max_batch[device]
        self.inputs = (TensorSpec(INPUT, "FP32", (-1, 2, n_samples)),)
        self.outputs = (TensorSpec(OUTPUT, "FP32", (-1, n_stems, 2, n_samples)),)
        self._graph = graph

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Separate a batch of windows."""
        return {OUTPUT: self.separate(inputs[INPUT])}

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """See `ServedModel.padding`."""
        return silent_ends(inputs[INPUT][:, 0])

    def separate(self, mixture: Samples) -> Samples:
        """[B, 2, T] -> [B, S, 2, T]."""
        raise NotImplementedError


class HTDemucs(SeparationModel):
    """Hybrid Transformer Demucs: one branch on spectra, one on samples, added at the end."""

    framing = Framing(FFT_SAMPLES, HOP_SAMPLES, LEAD_SAMPLES, silent_frames=2)

    def separate(self, mixture: Samples) -> Samples:
        """See `SeparationModel.separate`.

        Source: demucs 4.1.0, htdemucs.py, `_spec`, `_magnitude`, `_mask`, `_ispec`; without its
        Nyquist bin, as there.
        """
        spectra = np.ascontiguousarray(stft(mixture, self.framing)[..., :NYQUIST])
        outputs = self._graph({
            "mixture": mixture,
            "spectra": spectra.view(np.float32).reshape(*spectra.shape, 2),
        })  # fmt: skip
        spectra_stems = np.ascontiguousarray(outputs["spectra_stems"]).view(np.complex64)[..., 0]
        stems = outputs["wave_stems"]
        for index in range(stems.shape[1]):  # one by one: the frames of all would be 170 MB
            stems[:, index] += istft(spectra_stems[:, index], self.framing, mixture.shape[-1])
        return stems


class Spleeter(SeparationModel):
    """Spleeter, two stems: a mask for the vocals; the accompaniment is what is left.

    The networks see the band below 11 kHz; the graph extends the mask above it.
    """

    framing = Framing(FFT_SAMPLES, HOP_SAMPLES, LEAD_SAMPLES)

    def separate(self, mixture: Samples) -> Samples:
        """See `SeparationModel.separate`."""
        spectra = stft(mixture, self.framing)
        mask = self._graph({"magnitudes": np.abs(spectra)})["vocals_mask"]
        vocals = istft(spectra * mask, self.framing, mixture.shape[-1])
        return np.stack([vocals, mixture - vocals], axis=1)


ARCHITECTURES: dict[str, type[SeparationModel]] = {"htdemucs": HTDemucs, "spleeter": Spleeter}
"""By the manifest's fact `architecture`."""


def served_model(entry: ModelEntry, settings: Settings) -> SeparationModel:
    """The model of a manifest entry, loaded.

    Raises:
        InvalidModel: the file is wrong, or the architecture is unknown.
    """
    architecture = str(entry.facts.get("architecture"))
    if architecture not in ARCHITECTURES:
        raise InvalidModel(
            f"models.toml: {entry.name} has the architecture {architecture!r}; this runner knows "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[architecture](entry, open_graph(entry, settings), settings.device)


@bentoml.service(**{**SERVICE, "envs": LARGE_ARRAYS_MALLOC})
class SeparateStems(Runner):
    """The runner of this stage."""

    stage = "separate_stems"

    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """See `Runner.load`.

        A model with random weights is served only where it stands alone, in a models folder made
        for measuring: 170 MB and some seconds are not spent on it beside real ones.
        """
        entries = installed(read_manifest(), self.stage, settings.models_dir)
        real = [entry for entry in entries if entry.weights != "random"]
        for entry in real or entries:
            yield served_model(entry, settings)
