"""ONNX graphs -> callables. The only importer of onnxruntime in what serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from remix.errors import InvalidModel
from remix.manifest import ModelEntry, ModelFile, TensorSpec
from remix.settings import Settings
from remix.stages import Tensors
from runners.open_graph import check_signature

DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(bool)": "BOOL",
}
"""ONNX Runtime's names of types -> the Open Inference Protocol's."""

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


class OnnxSession:
    """A verified graph, ready to run. Safe to call from several threads at once."""

    def __init__(self, entry: ModelEntry, file: ModelFile, settings: Settings) -> None:
        """Load the graph.

        Raises:
            InvalidModel: its checksum or its signature is not the manifest's, or the device
                cannot be used.
        """
        wanted = PROVIDERS[settings.device][0]
        if wanted not in onnxruntime.get_available_providers():
            raise InvalidModel(
                f"The device {settings.device} needs {wanted}, and this onnxruntime has only "
                f"{', '.join(onnxruntime.get_available_providers())}: install onnxruntime-gpu, or "
                "set PHILHARMONICS_DEVICE=cpu."
            )
        path = entry.verified_path(settings.models_dir, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        # Several runners share the cores of one machine; a spinning thread would steal them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=PROVIDERS[settings.device]
            )
        except Exception as error:  # the runtime's own exceptions share no public base
            raise InvalidModel(f"{path} of model {entry.name} cannot be loaded: {error}") from error
        self.inputs = _specs(self._session.get_inputs())
        self.outputs = _specs(self._session.get_outputs())
        self.facts: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        check_signature(path, "input", self.inputs, file.inputs)
        check_signature(path, "output", self.outputs, file.outputs)
        self._output_names = [spec.name for spec in self.outputs]

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the graph: named arrays in, named arrays out."""
        feed = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        return dict(
            zip(self._output_names, self._session.run(self._output_names, feed), strict=True)
        )


def _specs(arguments: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            argument.name,
            DATATYPES.get(argument.type, argument.type),
            tuple(size if isinstance(size, int) else -1 for size in argument.shape),
        )
        for argument in arguments
    )
