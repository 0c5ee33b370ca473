"""weightless graph + named arrays -> the model's ONNX file.

A weightless graph is a model whose large float initializers have names, shapes and types, but no
content; `metadata_props["weights"]` tells which array of the source fills which initializer:

    {"conv.weight": {"array": "model.conv.weight", "transpose": [1, 0]}, …}

`empty` makes one (in `export/<stage>.py`), `fill` undoes it (in `make models`). The result depends
on nothing but the graph and the arrays, so that its checksum can stand in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from remix.errors import InvalidModel

WEIGHTS_KEY = "weights"

_LISTED = 6
"""Names that an error message lists before it only counts."""


def fill(graph_path: Path, arrays: Mapping[str, NDArray[Any]], out_path: Path) -> None:
    """Write a graph with its weights filled in.

    Args:
        graph_path: a weightless ONNX graph.
        arrays: the arrays that its `weights` entry names; others may be among them.
        out_path: is replaced at once when all is written.

    Raises:
        InvalidModel: an array is missing or has another shape or type than the graph says, or an
            initializer is empty and no array is named for it.
    """
    model = onnx.load(graph_path, load_external_data=False)
    recipe = _recipe(model, graph_path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    _refuse(graph_path, "names initializers that it does not have", recipe.keys() - initializers)
    wanted = {name: row["array"] for name, row in recipe.items()}
    _refuse(graph_path, "needs arrays that are missing", set(wanted.values()) - arrays.keys())
    unfilled = {name for name, tensor in initializers.items() if _is_empty(tensor)} - wanted.keys()
    _refuse(graph_path, "has empty initializers without an array", unfilled)

    for name, row in recipe.items():
        tensor = initializers[name]
        array = arrays[row["array"]]
        if "transpose" in row:
            array = array.transpose(row["transpose"])
        tensor.raw_data = _content(f"{graph_path}: {name} <- {row['array']}", array, tensor)

    partial = out_path.with_name(out_path.name + ".partial")
    out_path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(model.SerializeToString(deterministic=True))
    partial.replace(out_path)


def empty(model: onnx.ModelProto, weights: Mapping[str, Mapping[str, Any]]) -> onnx.ModelProto:
    """A copy of a model without the content of the initializers that `weights` names.

    Args:
        model: complete.
        weights: for every initializer to empty, `{"array": name in the source}` and, where the
            source has its axes in another order, `"transpose": [axis, …]`.

    Returns:
        The weightless graph, with `weights` in its metadata.
    """
    weightless = onnx.ModelProto()
    weightless.CopyFrom(model)
    for tensor in weightless.graph.initializer:
        if tensor.name in weights:
            content_free = onnx.TensorProto(
                name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
            )
            tensor.CopyFrom(content_free)
    metadata = {entry.key: entry.value for entry in weightless.metadata_props}
    metadata[WEIGHTS_KEY] = json.dumps(weights, sort_keys=True)
    onnx.helper.set_model_props(weightless, metadata)
    return weightless


def _recipe(model: onnx.ModelProto, graph_path: Path) -> dict[str, dict[str, Any]]:
    for entry in model.metadata_props:
        if entry.key == WEIGHTS_KEY:
            recipe: dict[str, dict[str, Any]] = json.loads(entry.value)
            return recipe
    raise InvalidModel(
        f"{graph_path} has no metadata_props[{WEIGHTS_KEY!r}]: it is no weightless graph."
    )


def _is_empty(tensor: onnx.TensorProto) -> bool:
    fields = {descriptor.name for descriptor, _ in tensor.ListFields()}
    return fields <= {"name", "dims", "data_type", "doc_string"} and 0 not in tensor.dims


def _content(label: str, array: NDArray[Any], tensor: onnx.TensorProto) -> bytes:
    """The array's bytes, little-endian; float16 widens to float32, nothing else converts."""
    shape = tuple(tensor.dims)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if array.dtype == np.float16 and dtype == np.float32:
        array = array.astype(np.float32)
    if array.shape != shape or array.dtype != dtype:
        raise InvalidModel(
            f"{label}: the array is {array.dtype} {list(array.shape)}, the graph needs {dtype} "
            f"{list(shape)}: the graph was made for other weights."
        )
    return np.ascontiguousarray(array).astype(dtype.newbyteorder("<")).tobytes()


def _refuse(graph_path: Path, problem: str, names: set[str]) -> None:
    if names:
        listed = ", ".join(sorted(names)[:_LISTED])
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise InvalidModel(f"{graph_path} {problem}: {listed}{more}.")
