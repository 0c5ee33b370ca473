"""ONNX graphs -> callables. The only importer of onnxruntime in what serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pynvml
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


CPU_BY_CHOICE = "set PHILHARMONICS_DEVICE=cpu to run on the processor."


def check_cuda() -> None:
    """Refuse the device `cuda` where there is none.

    Raises:
        InvalidModel: this onnxruntime has no CUDA, or the machine shows no GPU.
    """
    found = onnxruntime.get_available_providers()
    if PROVIDERS["cuda"][0] not in found:
        raise InvalidModel(
            f"The device cuda needs {PROVIDERS['cuda'][0]}, and this onnxruntime has only "
            f"{', '.join(found)}: use the GPU image or install onnxruntime-gpu, or {CPU_BY_CHOICE}"
        )
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise InvalidModel(
            f"The device cuda needs NVIDIA's driver, and there is none here ({error}): give the "
            f"container a GPU (NVIDIA's container toolkit, `--gpus`), or {CPU_BY_CHOICE}"
        ) from error
    if not count:
        raise InvalidModel(
            f"The device cuda needs a GPU, and the driver shows 0: give one, or {CPU_BY_CHOICE}"
        )


class OnnxSession:
    """A verified graph, ready to run. Safe to call from several threads at once."""

    def __init__(self, entry: ModelEntry, file: ModelFile, settings: Settings) -> None:
        """Load the graph.

        Raises:
            InvalidModel: its checksum or its signature is not the manifest's, or the device
                cannot be used.
        """
        if settings.device == "cuda":
            check_cuda()
            onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's packages
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
        # It would fall back to the processor, and say so in its log only.
        if self._session.get_providers()[0] != PROVIDERS[settings.device][0]:
            raise InvalidModel(
                f"{path} of model {entry.name} runs on {self._session.get_providers()[0]}, not on "
                f"{settings.device}: the log has what CUDA says; mend it, or {CPU_BY_CHOICE}"
            )
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
