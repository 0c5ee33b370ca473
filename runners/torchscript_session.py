"""TorchScript archives -> callables. Imports torch, which a serving image has only if told to."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidModel
from remix.manifest import ModelEntry, ModelFile
from remix.settings import Settings
from remix.stages import Tensors

FACTS = "facts.json"
"""Member of the archive beside the code: metadata, and the names of inputs and outputs."""


class TorchScriptSession:
    """A verified archive, ready to run. Safe to call from several threads at once."""

    def __init__(self, entry: ModelEntry, file: ModelFile, settings: Settings) -> None:
        """Load the archive.

        Raises:
            InvalidModel: torch is not there, the checksum is not the manifest's, the archive is
                none, or the device cannot be used.
        """
        try:
            import torch
        except ImportError as error:
            raise InvalidModel(
                f"The backend of {entry.name} on {settings.device} is torchscript, and torch is "
                "not installed here: install it (requirements/export.txt has the version), or set "
                f'backend = {{ {settings.device} = "onnx" }} in models.toml.'
            ) from error
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise InvalidModel(
                f"The device cuda needs a GPU, and torch {torch.__version__} finds none: set "
                "PHILHARMONICS_DEVICE=cpu."
            )
        path = entry.verified_path(settings.models_dir, file)
        extra = {FACTS: ""}
        try:
            module = torch.jit.load(  # type: ignore[no-untyped-call]
                path, settings.device, _extra_files=extra
            )
        except (RuntimeError, ValueError) as error:
            raise InvalidModel(f"{path} of model {entry.name} cannot be loaded: {error}") from error
        if not extra[FACTS]:
            raise InvalidModel(f"{path} of model {entry.name} has no {FACTS}: export it again.")
        self.facts: dict[str, str] = json.loads(extra[FACTS])
        self.inputs, self.outputs = file.inputs, file.outputs
        self._input_names: list[str] = json.loads(self.facts["inputs"])
        self._output_names: list[str] = json.loads(self.facts["outputs"])
        compute_on(module, settings.device)
        self._torch, self._module, self._device = torch, module.eval(), settings.device
        torch.set_num_threads(settings.threads)

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the module: named arrays in, named arrays out."""
        torch = self._torch
        tensors = [
            torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._device)
            for name in self._input_names
        ]
        with torch.inference_mode():
            results = self._module(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        return {
            name: result.float().cpu().numpy()
            for name, result in zip(self._output_names, results, strict=True)
        }


def compute_on(module: Any, device: str) -> None:
    """Have a traced module make its constants on a device.

    A trace holds the device that it was made on wherever a tensor is made (`arange`), and
    `torch.jit.load` moves parameters only. Source of the remedy: openai/CLIP, clip.py, `load`.
    """
    for part in module.modules():
        for name in part._c._method_names():
            for node in getattr(part, name).graph.findAllNodes("prim::Constant"):
                if str(node.output().type()) == "Device":
                    node.s_("value", device)
