"""A model of two weights, y = x w + b + 1, and the arrays that a package would carry for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WEIGHTS: dict[str, dict[str, Any]] = {
    "w": {"array": "model.w", "transpose": [1, 0]},
    "b": {"array": "model.b"},
}


def source_arrays() -> dict[str, NDArray[Any]]:
    """The weights as their source has them: `w` lies transposed there."""
    return {
        "model.w": np.arange(6, dtype=np.float32).reshape(3, 2),
        "model.b": np.array([0.5, -0.5, 2.0], np.float32),
    }


def toy_graph() -> onnx.ModelProto:
    """The complete model: x [B, 2] to y [B, 3]."""
    arrays = source_arrays()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["xwb"]),
            helper.make_node("Add", ["xwb", "one"], ["y"]),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])],
        [
            numpy_helper.from_array(np.ascontiguousarray(arrays["model.w"].T), "w"),
            numpy_helper.from_array(arrays["model.b"], "b"),
            numpy_helper.from_array(np.array(1, np.float32), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
