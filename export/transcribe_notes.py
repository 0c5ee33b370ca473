"""Basic Pitch -> the graph that its authors publish, which is ONNX already.

What is exported is the file itself; what is checked is that the runner makes of it what
basic-pitch's own inference makes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.exporter import Architecture, Arrays, Case, Original
from export.fetch_package import fetch_wheel, read_member
from export.real_audio import mono_song
from remix.errors import InvalidModel
from remix.manifest import MANIFEST_PATH
from remix.piano_roll import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from remix.stages import Tensors

AUDIO = "serving_default_input_2:0"
OUTPUTS = {
    "note": "StatefulPartitionedCall:1",
    "onset": "StatefulPartitionedCall:2",
    "contour": "StatefulPartitionedCall:0",
}
"""basic-pitch's names -> the graph's. Source: basic-pitch 0.4.0, inference.py, `Model.predict`."""

REQUIREMENT = "basic-pitch==0.4.0"
MEMBER = "basic_pitch/saved_models/icassp_2022/nmp.onnx"

WEIGHT_NUMBERS = 16
"""Initializers of fewer numbers are shapes and constants, not weights."""


class BasicPitch(Original):
    """Basic Pitch in its own package's inference, which is ONNX Runtime's as well.

    Args:
        path: of the graph.
    """

    stage = "transcribe_notes"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, path: Path) -> None:
        self._graph = onnx.load(path)
        self.facts = {
            "tensors": {"audio": AUDIO, "note": OUTPUTS["note"], "onset": OUTPUTS["onset"]}
        }
        with warnings.catch_warnings():  # upstream's libraries are of their own time
            warnings.simplefilter("ignore")
            self._model: Any = importlib.import_module("basic_pitch.inference").Model(path)

    def reference(self, inputs: Tensors) -> Arrays:
        """`basic_pitch.inference.run_inference`: `Model.predict` of one window after the other."""
        predicted = [self._model.predict(window[None]) for window in inputs[AUDIO]]
        return {
            graph: np.concatenate([each[name] for each in predicted])
            for name, graph in OUTPUTS.items()
        }

    def onnx(self) -> onnx.ModelProto:
        """A copy."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._graph)
        return copy

    def weights(self) -> Arrays:
        """What stands in the published file."""
        return {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in self._graph.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= WEIGHT_NUMBERS
        }

    def cases(self) -> Iterator[Case]:
        """Windows of music, batches, silence; the graph's windows have one length."""
        for batch in (1, 2, 5):
            yield Case(f"music, batch {batch}", self.speed_inputs(batch))
        yield Case("silence", {AUDIO: np.zeros((1, WINDOW_SAMPLES, 1), np.float32)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows of music."""
        windows = mono_song(SAMPLE_RATE_HZ, WINDOW_SAMPLES / SAMPLE_RATE_HZ, batch)
        return {AUDIO: np.ascontiguousarray(windows[:, :WINDOW_SAMPLES, None])}


def load_basic_pitch(path: Path) -> BasicPitch:
    """Basic Pitch from its `nmp.onnx`.

    Raises:
        InvalidModel: the file is no ONNX graph, or another one.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf raises whatever the bytes make it raise
        raise InvalidModel(f"{path} is no ONNX graph: {error}") from error
    found = {value.name for value in [*graph.input, *graph.output]}
    if missing := {AUDIO, *OUTPUTS.values()} - found:
        raise InvalidModel(f"{path} is no Basic Pitch: it lacks {', '.join(sorted(missing))}.")
    return BasicPitch(path)


def write_random_basic_pitch(path: Path) -> None:
    """The published graph, every weight times a seeded number of its own, 0.5 to 1.5."""
    wheel = fetch_wheel(REQUIREMENT, MANIFEST_PATH.parent / ".cache" / "sources")
    model = onnx.load_from_string(read_member(wheel, MEMBER))
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= WEIGHT_NUMBERS:
            array = numpy_helper.to_array(tensor)
            factor = np.float32(0.5) + rng.random(array.shape, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array * factor, tensor.name))
    onnx.save(model, path)


ARCHITECTURES = (
    Architecture("basic-pitch", "transcribe_notes", load_basic_pitch, write_random_basic_pitch),
)
