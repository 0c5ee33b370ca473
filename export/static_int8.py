"""graph in fp32 -> the same with some of its convolutions in int8, their ranges calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from remix.stages import Tensors


class _Examples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, examples: Sequence[Tensors]) -> None:
        self._left: Iterator[Tensors] = iter(examples)

    def get_next(self) -> dict[str, Any] | None:
        """As the calibrator asks."""
        example = next(self._left, None)
        return None if example is None else dict(example)


def quantise_convolutions(
    graph: Path, out: Path, scopes: tuple[str, ...], examples: Sequence[Tensors]
) -> None:
    """Writes a graph whose convolutions in some scopes compute in int8.

    Weights have a scale for each output channel, activations one for each tensor, from the
    smallest to the largest value that the examples show. Neighbouring convolutions hand on
    8 bits; sums stay in float. ONNX Runtime runs it as QLinearConv, about four times as fast as
    float on a processor with VNNI; dynamic ConvInteger is slower than float there.

    Args:
        graph: in fp32.
        out: is written; may be `graph`.
        scopes: with one of which the name of a convolution begins.
        examples: inputs of the graph.

    Source: onnxruntime 1.32.0, `quantization.quantize_static`, in its QDQ format.
    """
    model = onnx.load(graph)
    names = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.name.startswith(scopes)
    ]
    facts = {entry.key: entry.value for entry in model.metadata_props}
    quantize_static(
        model,
        out,
        _Examples(examples),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        nodes_to_quantize=names,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    quantised = onnx.load(out)
    onnx.helper.set_model_props(quantised, facts)
    out.write_bytes(quantised.SerializeToString(deterministic=True))
