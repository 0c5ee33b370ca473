"""trained band transformer -> ONNX with a key-value cache, and proof that both say the same.

One graph serves the first pass over a history (S tokens) and every later step (1 token):

    tokens [B, S], positions [B, S], last [B],
    past_key and past_value [layers, B, P, D], past_length [B]
        -> logits [B, V] after token `last`, key and value [layers, B, S, D] of the new tokens

The cache belongs to the caller, who writes the new keys and values behind the old ones; rows may
hold different lengths, what lies behind `past_length` is never looked at, and new tokens that pad
a row come last, so that no real token sees them.

    python -m export.generate_notes --checkpoint .cache/training/generate_notes/checkpoint.pt \\
        --out starter/generate_notes.onnx
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from export.band_transformer import BandTransformer, ModelSize, rotary
from remix.note_tokens import VOCABULARY_HASH

OPSET = 17
LARGEST_ERROR = 1e-3
"""Of a logit, between torch and ONNX Runtime; logits span about 20."""


class CachedBandTransformer(nn.Module):
    """The transformer as one step over a cache that the caller keeps."""

    def __init__(self, model: BandTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        last: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        past_length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's head."""
        size = self.model.size
        batch, steps, past = tokens.shape[0], tokens.shape[1], past_key.shape[2]
        cos, sin = rotary(positions, size.head_channels)
        # [B, 1, S, P + S]: the filled part of the cache, and the new tokens up to one's own.
        filled = torch.arange(past).unsqueeze(0) < past_length.unsqueeze(1)
        row = torch.arange(steps)
        causal = row.unsqueeze(0) <= row.unsqueeze(1)
        mask = torch.cat(
            (
                filled.view(batch, 1, 1, past).expand(batch, 1, steps, past),
                causal.view(1, 1, steps, steps).expand(batch, 1, steps, steps),
            ),
            dim=-1,
        )
        bias = torch.where(mask, 0.0, -1e9)
        x = self.model.embedding(tokens)
        keys, values = [], []
        for layer, block in enumerate(self.model.layers()):
            query, key, value = block.project(x, cos, sin)
            keys.append(key.squeeze(1))
            values.append(value.squeeze(1))
            query = query * size.head_channels**-0.5
            scores = torch.cat(
                (
                    query @ past_key[layer].unsqueeze(1).transpose(2, 3),
                    query @ key.transpose(2, 3),
                ),
                dim=-1,
            )
            weights = torch.softmax(scores + bias, dim=-1)
            attended = weights[..., :past] @ past_value[layer].unsqueeze(1)
            x = block.finish(x, attended + weights[..., past:] @ value)
        x = x[torch.arange(batch), last]
        return self.model.logits(x), torch.stack(keys), torch.stack(values)


INPUTS = ("tokens", "positions", "last", "past_key", "past_value", "past_length")
OUTPUTS = ("logits", "key", "value")
AXES = {
    "tokens": {0: "B", 1: "S"},
    "positions": {0: "B", 1: "S"},
    "last": {0: "B"},
    "past_key": {1: "B", 2: "P"},
    "past_value": {1: "B", 2: "P"},
    "past_length": {0: "B"},
    "logits": {0: "B"},
    "key": {1: "B", 2: "S"},
    "value": {1: "B", 2: "S"},
}


def load_model(checkpoint: Path) -> tuple[BandTransformer, dict[str, float]]:
    """The trained model, its weights rounded to fp16 as they will be stored; and its last log row.

    Raises:
        ValueError: the checkpoint was trained on another vocabulary.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["vocabulary"] != VOCABULARY_HASH:
        raise ValueError(
            f"{checkpoint} was trained on vocabulary {state['vocabulary']}, "
            f"this tree has {VOCABULARY_HASH}: train again."
        )
    model = BandTransformer(ModelSize(**state["size"]))
    weights = {name: tensor.half().float() for name, tensor in state["model"].items()}
    model.load_state_dict(weights)
    return model.eval(), {**state["log"][-1], "step": state["step"]}


def store_as_fp16(graph: onnx.ModelProto) -> None:
    """Stores the large float weights as fp16, each with a Cast that the runtime folds at load."""
    kept, casts = [], []
    for tensor in graph.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size >= 64:
            stored = numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.fp16")
            casts.append(
                onnx.helper.make_node(
                    "Cast", [stored.name], [tensor.name], to=onnx.TensorProto.FLOAT
                )
            )
            kept.append(stored)
        else:
            kept.append(tensor)
    nodes = [*casts, *graph.graph.node]
    del graph.graph.initializer[:], graph.graph.node[:]
    graph.graph.initializer.extend(kept)
    graph.graph.node.extend(nodes)


def export(model: BandTransformer, facts: Mapping[str, str], path: Path) -> None:
    """Writes the graph with its facts in `metadata_props`."""
    example = random_step(model.size, batch=2, steps=3, past=8, seed=0)
    tensors = tuple(torch.from_numpy(example[name]) for name in INPUTS)
    with warnings.catch_warnings():
        # The TorchScript exporter warns of its age and of shapes that it traces as constants;
        # `check_parity` runs other shapes than the traced ones.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            CachedBandTransformer(model),
            tensors,
            path,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_axes=AXES,
            opset_version=OPSET,
            dynamo=False,
        )
    graph = onnx.load(path)
    cache: list[str | int | None] = [model.size.layers, "B", "S", model.size.head_channels]
    for output, shape in zip(
        graph.graph.output, (["B", model.size.vocabulary_size], cache, cache), strict=True
    ):
        output.CopyFrom(
            onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape)
        )
    store_as_fp16(graph)
    onnx.helper.set_model_props(graph, dict(facts))
    graph.producer_name = "deep-philharmonics"
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def random_step(
    size: ModelSize, *, batch: int, steps: int, past: int, seed: int
) -> dict[str, NDArray[np.generic]]:
    """Inputs of one call with random tokens behind a random cache."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, past + 1, batch)
    cache = (size.layers, batch, past, size.head_channels)
    return {
        "tokens": rng.integers(0, size.vocabulary_size, (batch, steps)),
        "positions": lengths[:, None] + np.arange(steps),
        "last": rng.integers(0, steps, batch),
        "past_key": rng.standard_normal(cache, np.float32),
        "past_value": rng.standard_normal(cache, np.float32),
        "past_length": lengths,
    }


@torch.no_grad()
def largest_difference(model: BandTransformer, path: Path, tokens: int = 96) -> float:
    """Largest difference of a logit: torch over whole sequences against the graph step by step.

    Two sequences of different length share the batch: a first pass over both (the shorter one
    padded), then single steps, the cache kept as a caller keeps it.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    size = model.size
    rng = np.random.default_rng(1)
    sequences = rng.integers(0, size.vocabulary_size, (2, tokens))
    expected = model(torch.from_numpy(sequences)).numpy()
    lengths = np.array([tokens // 2, tokens // 3])
    cache = [np.zeros((size.layers, 2, tokens, size.head_channels), np.float32) for _ in range(2)]
    steps = int(lengths.max())
    feed = {
        "tokens": np.where(np.arange(steps) < lengths[:, None], sequences[:, :steps], 0),
        "positions": np.tile(np.arange(steps), (2, 1)),
        "last": lengths - 1,
        "past_length": np.zeros(2, np.int64),
    }
    worst, done = 0.0, np.zeros(2, np.int64)
    while True:
        logits, *new = session.run(
            list(OUTPUTS), {**feed, "past_key": cache[0], "past_value": cache[1]}
        )
        for store, fresh in zip(cache, new, strict=True):
            for row in range(2):
                store[:, row, done[row] : lengths[row]] = fresh[:, row, : lengths[row] - done[row]]
        rows = np.arange(2)
        worst = max(worst, float(np.abs(logits - expected[rows, lengths - 1]).max()))
        if lengths.max() == tokens:
            return worst
        done = lengths.copy()
        feed = {
            "tokens": sequences[rows, lengths][:, None],
            "positions": lengths[:, None],
            "last": np.zeros(2, np.int64),
            "past_length": done,
        }
        lengths = lengths + 1


def main() -> None:
    """Exports a checkpoint, and fails unless torch and the graph agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="band-transformer-2m", help="name in models.toml")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, trained = load_model(arguments.checkpoint)
    facts = {
        "model": arguments.model,
        "stage": "generate_notes",
        "vocabulary": VOCABULARY_HASH,
        **{name: str(value) for name, value in model.size.as_dict().items()},
        "training": json.dumps(trained),
        "training_command": "python -m training.generate_notes",
        "data": "songs by Debian mma 21.09 from random chord charts (training/band_songs.py)",
        "licence": "Apache-2.0",
    }
    export(model, facts, arguments.out)
    difference = largest_difference(model, arguments.out)
    print(f"{arguments.out}: largest difference of a logit {difference:.1e}")
    if difference > LARGEST_ERROR:
        raise SystemExit(f"The graph differs by {difference:.1e}, above {LARGEST_ERROR:.0e}.")


if __name__ == "__main__":
    main()
