"""ONNX graphs -> callables on OpenVINO, which computes what may be coarser in bfloat16.

Where the graph's metadata names a stretch (`bf16`: tensors from which, tensors to which) and the
processor multiplies bfloat16 in hardware (AVX512_BF16, AMX), the graph is cut there into three:
before it and after it all is float32, as in the original. Everywhere else all of it is float32.
"""

from __future__ import annotations

import json
import os
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidModel
from remix.manifest import ModelEntry, ModelFile, TensorSpec
from remix.settings import Settings
from remix.stages import Tensors
from runners.open_graph import check_signature

BF16 = "bf16"
"""Key of the metadata: {"from": [tensor, …], "to": [tensor, …]}."""

DATATYPES = {"f32": "FP32", "f16": "FP16", "i64": "INT64", "i32": "INT32", "boolean": "BOOL"}
"""OpenVINO's names of types -> the Open Inference Protocol's."""


class OpenVinoSession:
    """A verified graph, ready to run. Safe to call from several threads at once."""

    def __init__(self, entry: ModelEntry, file: ModelFile, settings: Settings) -> None:
        """Load and compile the graph.

        Raises:
            InvalidModel: the device is no CPU, the checksum or the signature is not the
                manifest's, or the graph cannot be compiled.
        """
        import openvino

        if settings.device != "cpu":
            raise InvalidModel(
                f"The backend openvino runs on cpu, and PHILHARMONICS_DEVICE is {settings.device}: "
                f"set another backend for it in models.toml, entry {entry.name}."
            )
        path = entry.verified_path(settings.models_dir, file)
        core = openvino.Core()
        try:
            model = core.read_model(path)
            self.facts = _metadata(model)
            stretch = json.loads(self.facts.get(BF16, "null"))
            parts = [(model, "f32")]
            if stretch and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                before, within, after = cut(model, stretch["from"], stretch["to"])
                parts = [(before, "f32"), (within, "bf16"), (after, "f32")]
            self._parts = [
                core.compile_model(
                    part,
                    "CPU",
                    {
                        "INFERENCE_PRECISION_HINT": precision,
                        # Of one call at a time: a second one's memory would be as much again.
                        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
                        "NUM_STREAMS": 1,
                        "ENABLE_CPU_PINNING": False,  # other runners have these cores too
                    },
                )
                for part, precision in parts
            ]
        except RuntimeError as error:
            raise InvalidModel(f"{path} of model {entry.name} cannot be loaded: {error}") from error
        self.inputs, self.outputs = _specs(model.inputs), _specs(model.outputs)
        check_signature(path, "input", self.inputs, file.inputs)
        check_signature(path, "output", self.outputs, file.outputs)
        self._requests = [part.create_infer_request() for part in self._parts]
        self._turn = Lock()

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the graph: named arrays in, named arrays out."""
        values = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        with self._turn:
            for part, request in zip(self._parts, self._requests, strict=True):
                wanted = {port.any_name for port in part.inputs}
                given = {name: values[name] for name in wanted}
                results = request.infer(given, share_inputs=True, share_outputs=True)
                values |= {port.any_name: results[port] for port in part.outputs}
                if len(self._parts) > 1:
                    # One part's working memory at a time: 250 MB less of HTDemucs, 0.1 s a window.
                    part.release_memory()
            return {spec.name: values[spec.name].copy() for spec in self.outputs}


def cut(model: Any, begin: list[str], end: list[str]) -> tuple[Any, Any, Any]:
    """Three models that do one's work: all that `begin` needs, from `begin` to `end`, the rest.

    Args:
        model: an `openvino.Model`.
        begin: names of tensors.
        end: names of tensors that are computed from them.

    Returns:
        Models whose inputs and outputs have the names of the tensors that they exchange.
    """
    crossing = _crossing(model, begin, end)
    outputs = [port.any_name for port in model.outputs]
    return (
        _part(model, [], [*begin, *(name for name in crossing if name not in begin)]),
        _part(model, begin, end),
        _part(model, [*end, *crossing], outputs),
    )


def _part(model: Any, inputs: list[str], outputs: list[str]) -> Any:
    """A model from some tensors to some tensors of another, which stays as it is."""
    from openvino import Model, opset13

    copy = model.clone()
    produced = _by_name(copy)
    ends = [opset13.result(produced[name]) for name in outputs]
    parameters = list(copy.get_parameters())
    for name in inputs:
        output = produced[name]
        parameter = opset13.parameter(output.get_partial_shape(), output.get_element_type(), name)
        for target in output.get_target_inputs():
            target.replace_source_output(parameter.output(0))
        parameter.output(0).set_names({name})
        parameters.append(parameter)
    for name, end in zip(outputs, ends, strict=True):
        end.output(0).set_names({name})
    needed = {op.get_name() for op in _operations_behind(ends)}
    return Model(ends, [p for p in parameters if p.get_name() in needed])


def _crossing(model: Any, begin: list[str], end: list[str]) -> list[str]:
    """Names of the numbers that are computed before the stretch and used after it.

    Shapes are not among them: the last part takes them from its own inputs, so that it knows as
    much of its sizes as the whole model does.
    """
    produced = _by_name(model)
    before = {op.get_name() for op in _operations_behind([produced[n].get_node() for n in begin])}
    depends = _operations_with_input(model)
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = [port.get_node() for port in model.outputs]
    while waiting:
        for value in waiting.pop().input_values():
            op, names = value.get_node(), value.get_names()
            if names & set(end) or op.get_name() in seen:
                continue
            is_computed = op.get_name() in depends and op.get_type_name() != "Parameter"
            if op.get_name() in before and is_computed and value.get_element_type().is_real():
                if not names:
                    value.set_names({f"crossing {op.get_name()} {value.get_index()}"})
                found[value.get_any_name()] = None
            else:
                seen.add(op.get_name())
                waiting.append(op)
    return list(found)


def _by_name(model: Any) -> dict[str, Any]:
    """Every named tensor of a model, as the output that it is of."""
    return {
        name: output
        for op in model.get_ops()
        if op.get_type_name() != "Result"
        for output in op.outputs()
        for name in output.get_names()
    }


def _operations_behind(ops: list[Any]) -> list[Any]:
    """Some operations and all that they need."""
    found: dict[str, Any] = {}
    waiting = list(ops)
    while waiting:
        op = waiting.pop()
        if op.get_name() not in found:
            found[op.get_name()] = op
            waiting.extend(value.get_node() for value in op.input_values())
    return list(found.values())


def _operations_with_input(model: Any) -> set[str]:
    """Names of the operations whose result depends on an input; the others are weights."""
    found: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Parameter" or any(
            value.get_node().get_name() in found for value in op.input_values()
        ):
            found.add(op.get_name())
    return found


def _metadata(model: Any) -> dict[str, str]:
    """`metadata_props` of the ONNX file that a model was read from."""
    return dict(model.get_rt_info(["framework"]).value) if model.has_rt_info("framework") else {}


def _specs(ports: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            port.any_name,
            DATATYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape()),
        )
        for port in ports
    )
