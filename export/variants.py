"""graph in fp32 -> smaller or faster ones: weights in int8, all of it in fp16."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from export.exporter import Original
from remix.errors import InvalidModel


def int8(graph: Path, out: Path) -> None:
    """Matrix products in int8: weights per column, activations as they come.

    Source: onnxruntime 1.32.0, `quantization.quantize_dynamic`, on the graph with its constants
    folded, because here weights are made from the checkpoint's by operators.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        quantize_dynamic(
            folded, out, op_types_to_quantize=["MatMul"], per_channel=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    _keep_facts(graph, out)


def fp16(graph: Path, out: Path) -> None:
    """Everything in half precision, inputs and outputs as they were; for GPUs.

    Source: onnxruntime 1.32.0, `transformers.float16`.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: Any = convert_float_to_float16(onnx.load(graph), keep_io_types=True)
    onnx.save(converted, out)


def _keep_facts(source: Path, target: Path) -> None:
    """Give a graph the metadata of the one that it was made from."""
    facts = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    model = onnx.load(target)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, target)


def reduce_precision(precision: str, graph: Path, out: Path, original: Original) -> None:
    """Write a graph in one of `PRECISIONS`; in int8 in the model's own way, if it has one.

    Raises:
        InvalidModel: the graph has something that the converter does not know.
    """
    try:
        if precision != "int8" or not original.int8(graph, out):
            PRECISIONS[precision](graph, out)
    except Exception as error:  # the converters raise whatever a graph makes them raise
        raise InvalidModel(f"{graph.name} cannot be had in {precision}: {error!r:.200}") from error


PRECISIONS: dict[str, Callable[[Path, Path], None]] = {"int8": int8, "fp16": fp16}
"""What `--precision` takes, beside fp32."""
