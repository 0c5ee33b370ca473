"""The exported generator against torch: logits, and the music that is written with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.band_transformer import BandTransformer, ModelSize
from export.generate_notes import empty_cache, export, largest_difference
from remix.manifest import MANIFEST_PATH

STARTER = MANIFEST_PATH.parent / "starter" / "generate_notes.onnx"


def starter_in_torch() -> BandTransformer:
    """The starter model, its weights read back out of its graph."""
    graph = onnx.load(STARTER)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    size = ModelSize(
        **{name: int(facts[name]) for name in ModelSize().as_dict()},
    )
    stored = {
        tensor.name.removesuffix(".fp16"): torch.from_numpy(
            numpy_helper.to_array(tensor).astype(np.float32)
        )
        for tensor in graph.graph.initializer
        if tensor.name.endswith(".fp16")
    }
    state = {"embedding.weight": stored["embedding"], "norm.weight": stored["norm"]}
    for index in range(size.layers):
        name = f"blocks.{index}"
        projection = stored[f"{name}.qkv"].T
        query, key_value = projection[: size.channels], projection[size.channels :]
        state[f"{name}.query.weight"] = query * size.head_channels**0.5
        state[f"{name}.key_value.weight"] = key_value
        for norm in ("attention_norm", "feed_norm"):
            state[f"{name}.{norm}.weight"] = stored[f"{name}.{norm}"]
        for matrix in ("output", "gate_up", "down"):
            state[f"{name}.{matrix}.weight"] = stored[f"{name}.{matrix}"].T
    model = BandTransformer(size)
    model.load_state_dict(state)
    return model.eval()


def test_starter_graph_says_what_torch_says() -> None:
    # Logits span about 20, and torch sums in another order: 1e-4 is float32's own noise.
    assert largest_difference(starter_in_torch(), STARTER, tokens=256) < 1e-4


@pytest.mark.parametrize(
    "size",
    [ModelSize(), ModelSize(layers=2, channels=64, heads=4, hidden_channels=96)],
    ids=["starter", "another shape"],
)
def test_graph_of_any_shape_says_what_torch_says(size: ModelSize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BandTransformer(size).eval()
    # Weights as they will be stored: what is compared is the graph, not the rounding.
    model.load_state_dict({name: w.half().float() for name, w in model.state_dict().items()})
    export(model, {}, tmp_path / "model.onnx")
    assert largest_difference(model, tmp_path / "model.onnx") < 1e-4


def test_export_is_the_same_bytes_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BandTransformer(ModelSize(layers=1)).eval()
    for name in ("first", "second"):
        export(model, {"model": "m"}, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_starter_file_is_small_and_whole() -> None:
    assert STARTER.stat().st_size < 16_000_000
    graph = onnx.load(STARTER, load_external_data=False)
    assert not any(tensor.external_data for tensor in graph.graph.initializer)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert {"model", "stage", "licence", "training", "vocabulary", "context_tokens"} <= set(facts)
    assert len(empty_cache(ModelSize(), 1, 1)) == 2 * int(facts["layers"])
