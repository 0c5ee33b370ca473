"""A graph that was emptied and filled again is the graph; whatever does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.fill_weights import empty, fill
from remix.errors import InvalidModel
from tests.toy_graph import WEIGHTS, source_arrays, toy_graph


def weightless(tmp_path: Path) -> Path:
    path = tmp_path / "graph.onnx"
    onnx.save(empty(toy_graph(), WEIGHTS), path)
    return path


def without_metadata(model: onnx.ModelProto) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def test_fill_of_an_emptied_graph_is_the_graph(tmp_path: Path) -> None:
    out = tmp_path / "filled.onnx"
    fill(weightless(tmp_path), source_arrays(), out)
    assert without_metadata(onnx.load(out)) == without_metadata(toy_graph())
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "filled.onnx"}


def test_empty_leaves_no_weights_and_keeps_small_constants(tmp_path: Path) -> None:
    model = onnx.load(weightless(tmp_path))
    content = {tensor.name: tensor.raw_data for tensor in model.graph.initializer}
    assert content == {
        "w": b"",
        "b": b"",
        "one": numpy_helper.from_array(np.array(1, np.float32)).raw_data,
    }


def test_fill_is_the_same_every_time(tmp_path: Path) -> None:
    graph = weightless(tmp_path)
    for name in ("one", "two"):
        fill(graph, source_arrays(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_fill_widens_float16_and_ignores_what_the_graph_does_not_name(tmp_path: Path) -> None:
    arrays = {**source_arrays(), "other": np.zeros(3)}
    arrays["model.w"] = arrays["model.w"].astype(np.float16)
    fill(weightless(tmp_path), arrays, tmp_path / "out")
    initializers = {t.name: t for t in onnx.load(tmp_path / "out").graph.initializer}
    assert initializers["w"].data_type == TensorProto.FLOAT
    assert np.array_equal(numpy_helper.to_array(initializers["w"]), arrays["model.w"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.w": None}, "needs arrays that are missing: model.w"),
        ({"model.w": None, "model.b": None}, "missing: model.b, model.w"),
        ({"model.w": np.zeros((2, 2), np.float32)}, r"float32 \[2, 2\], the graph needs"),
        ({"model.w": np.zeros((3, 2), np.float64)}, r"float64 \[2, 3\], the graph needs float32"),
        ({"model.b": np.zeros(2, np.int32)}, r"int32 \[2\], the graph needs float32"),
    ],
)
def test_fill_names_what_does_not_fit(
    change: dict[str, NDArray[Any] | None], message: str, tmp_path: Path
) -> None:
    arrays = {k: v for k, v in {**source_arrays(), **change}.items() if v is not None}
    with pytest.raises(InvalidModel, match=message):
        fill(weightless(tmp_path), arrays, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fill_refuses_a_graph_that_says_nothing_of_an_empty_initializer(tmp_path: Path) -> None:
    model = empty(toy_graph(), WEIGHTS)
    helper.set_model_props(model, {"weights": '{"w": {"array": "model.w", "transpose": [1, 0]}}'})
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(InvalidModel, match="empty initializers without an array: b"):
        fill(tmp_path / "graph.onnx", source_arrays(), tmp_path / "out")


def test_fill_refuses_names_that_the_graph_does_not_have(tmp_path: Path) -> None:
    onnx.save(empty(toy_graph(), {**WEIGHTS, "c": {"array": "model.b"}}), tmp_path / "graph.onnx")
    with pytest.raises(InvalidModel, match="names initializers that it does not have: c"):
        fill(tmp_path / "graph.onnx", source_arrays(), tmp_path / "out")


def test_fill_refuses_a_graph_that_is_not_weightless(tmp_path: Path) -> None:
    onnx.save(toy_graph(), tmp_path / "graph.onnx")
    with pytest.raises(InvalidModel, match="no weightless graph"):
        fill(tmp_path / "graph.onnx", source_arrays(), tmp_path / "out")
