"""manifest entry -> its graph, ready to run, in the runtime that the manifest names for the device.

`backend = { cpu = "openvino", cuda = "torchscript" }` in a manifest entry; a device that is not
named there runs ONNX Runtime. Each runtime is imported only where it is chosen. OpenVINO runs the
same graph, only faster: where it is not installed, as in the container images, ONNX Runtime does.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from remix.errors import InvalidModel
from remix.manifest import ModelEntry, TensorSpec
from remix.settings import Settings
from remix.stages import Tensors

_log = logging.getLogger(__name__)


class Graph(Protocol):
    """Named arrays in, named arrays out. Safe to call from several threads at once."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: dict[str, str]
    """What the file itself says of the model: the metadata that its exporter wrote."""

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the graph."""
        ...


def open_graph(entry: ModelEntry, settings: Settings) -> Graph:
    """The verified graph of a manifest entry.

    Raises:
        InvalidModel: its checksum or its signature is not the manifest's, or the device or the
            back end cannot be used.
    """
    backend = entry.backend.get(settings.device, "onnx")
    if backend == "openvino" and importlib.util.find_spec("openvino") is None:
        _log.warning("openvino is not installed: %s runs in onnxruntime, slower", entry.name)
        backend = "onnx"
    file = entry.graph_file(backend)
    match backend:
        case "onnx":
            from runners.onnx_session import OnnxSession

            return OnnxSession(entry, file, settings)
        case "openvino":
            from runners.openvino_session import OpenVinoSession

            return OpenVinoSession(entry, file, settings)
        case "torchscript":
            from runners.torchscript_session import TorchScriptSession

            return TorchScriptSession(entry, file, settings)
    raise InvalidModel(
        f"models.toml: {entry.name} has the backend {backend!r} on {settings.device}; it must be "
        "onnx, openvino or torchscript."
    )


def check_device(entries: Sequence[ModelEntry], settings: Settings) -> None:
    """Refuse a device that is not there, before anything is loaded.

    Raises:
        InvalidModel: the graphs of these entries could not run on it.
    """
    if settings.device == "cuda" and any(
        entry.backend.get("cuda", "onnx") == "onnx" and file.path.endswith(".onnx")
        for entry in entries
        for file in entry.files
    ):
        from runners.onnx_session import check_cuda

        check_cuda()


def check_signature(
    path: Any, kind: str, found: tuple[TensorSpec, ...], expected: tuple[TensorSpec, ...]
) -> None:
    """Refuse a graph that is not what the manifest says.

    Raises:
        InvalidModel: the tensors differ.
    """
    if set(found) != set(expected):
        raise InvalidModel(
            f"{path} has the {kind}s {sorted(map(str, found))}; the manifest says "
            f"{sorted(map(str, expected))}: export the model again, or mend models.toml."
        )
