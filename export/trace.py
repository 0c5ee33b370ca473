"""torch module -> ONNX graph or TorchScript archive, with its parameters' own names."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

OPSET = 17

Axes = Mapping[str, Sequence[str | int]]
"""Of every input and output: a name where the size is free."""


def to_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Axes,
    opsets: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """The module as a graph whose initializers are its parameters.

    Args:
        module: in evaluation mode.
        inputs: an example of each.
        axes: of every input, then of every output, in the module's order.
        opsets: beside ONNX's own, whose operators the module uses.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every size; `compare` tries others
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            input_names=list(inputs),
            output_names=[name for name in axes if name not in inputs],
            dynamic_axes={
                name: {axis: size for axis, size in enumerate(sizes) if isinstance(size, str)}
                for name, sizes in axes.items()
            },
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            custom_opsets=opsets,
        )
    model = onnx.load_from_string(buffer.getvalue())
    for node in model.graph.node:
        node.doc_string = ""  # paths of this machine
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.CopyFrom(
            onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, axes[value.name])
        )
    model.producer_name = "deep-philharmonics"
    onnx.checker.check_model(model)
    return model


def to_torchscript(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    facts: Mapping[str, str],
) -> bytes:
    """The module traced, as the archive that `runners.torchscript_session` reads.

    Args:
        module: in evaluation mode; sizes that it fixes while it is traced stay fixed.
        inputs: an example of each.
        outputs: their names, in order.
        facts: what the ONNX file would have in its metadata.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace  # has no types
        traced = trace(module, tuple(inputs.values()), check_trace=False)
    named = {**facts, "inputs": json.dumps(list(inputs)), "outputs": json.dumps(list(outputs))}
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, {"facts.json": json.dumps(named)})
    return buffer.getvalue()


def outputs_of_scope(model: onnx.ModelProto, scope: str) -> list[str]:
    """Tensors that a submodule of the traced module hands on, in order.

    Args:
        model: of `to_onnx`.
        scope: its path, such as `/encoder.1/`, with which the names of its nodes begin.
    """
    produced = {
        name
        for node in model.graph.node
        if node.name.startswith(scope) and node.op_type != "Constant"
        for name in node.output
    }
    used: dict[str, None] = {}
    for node in model.graph.node:
        if not node.name.startswith(scope):
            used |= {name: None for name in node.input if name in produced}
    return list(used)


def write(content: bytes, path: Path) -> None:
    """Replace a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
