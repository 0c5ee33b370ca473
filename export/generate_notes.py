"""trained band transformer -> ONNX with a key-value cache, and proof that both say the same.

One graph serves the first pass over a history (S tokens) and every later step (1 token):

    tokens [B, S], positions [B, S], last [B], past_length [B],
    past_key_i [B, 1, D, P], past_value_i [B, 1, P, D] of each layer
        -> logits [B, V] after token `last`; of the new tokens key_i [B, 1, D, S],
           value_i [B, 1, S, D]

The cache belongs to the caller, who writes the new keys and values behind the old ones; rows may
hold different lengths, what lies behind `past_length` is never looked at, and new tokens that pad
a row come last, so that no real token sees them. Keys lie transposed, as the product wants them.

The graph is written node by node: at one token a step most nodes cost what it costs to start them,
and an exporter writes 445 of them where these 160 do (0.54 ms a step, 0.3 ms without).

    python -m export.generate_notes --checkpoint .cache/training/generate_notes/checkpoint.pt \\
        --out starter/generate_notes.onnx
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.array_names import require_same_names
from export.band_transformer import BandTransformer, Block, ModelSize
from export.exporter import Architecture, Arrays, Case, Original, ServedCall
from export.random_weights import fill_at_random
from export.read_arrays import why_unread
from remix.errors import InvalidModel
from remix.note_tokens import VOCABULARY_HASH
from remix.stages import Tensors

OPSET = 17
IR_VERSION = 8
MASKED = -1e9
LARGEST_ERROR = 1e-3
"""Of a logit, between torch and ONNX Runtime; logits span about 20."""


class GraphWriter:
    """Collects nodes and weights; values are named by what makes them."""

    def __init__(self) -> None:
        """Start empty."""
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: Any, dtype: type = np.int64) -> str:
        """A small constant, stored as it is."""
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, tensor: torch.Tensor, name: str) -> str:
        """A weight, stored in fp16 with a Cast that the runtime folds when it loads the graph."""
        stored = tensor.detach().numpy().astype(np.float16)
        self.weights.append(numpy_helper.from_array(stored, f"{name}.fp16"))
        return self.node("Cast", f"{name}.fp16", to=TensorProto.FLOAT, output=name)

    def node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.split(kind, *inputs, outputs=[output] if output else 1, **attributes)[0]

    def split(
        self, kind: str, *inputs: str, outputs: int | list[str], **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        if isinstance(outputs, int):
            outputs = [f"{kind.lower()}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs


class TransformerGraph(GraphWriter):
    """The transformer as one step over a cache that the caller keeps."""

    def __init__(self, model: BandTransformer) -> None:
        """Write the graph of a model."""
        super().__init__()
        self.size = model.size
        self.epsilon = self.constant(1e-6, np.float32)
        self.two = self.constant(2.0, np.float32)
        self.heads = self.constant([0, 0, self.size.heads + 1, self.size.head_channels])
        self.merged = self.constant([0, 0, self.size.channels])
        self.one = self.constant([1])
        self._angles()
        self._masks()
        embedding = self.weight(model.embedding.weight, "embedding")
        x = self.node("Gather", embedding, "tokens", axis=0)
        for index, block in enumerate(model.layers()):
            x = self._block(x, block, index)
        # [B, S, C] at token `last` of each row, as [B, C].
        last = self.node("Unsqueeze", "last", self.constant([1]))
        x = self.node("GatherND", x, last, batch_dims=1)
        x = self._rms_norm(x, model.norm.weight, "norm")
        output = self.node("Transpose", embedding, perm=[1, 0])
        self.node("MatMul", x, output, output="logits")

    def _angles(self) -> None:
        """Cosine and sine, [B, S, 1, D]: both halves of a head turn by the same angles."""
        half = np.arange(0, self.size.head_channels, 2) / self.size.head_channels
        frequency = self.constant(np.tile(10_000.0**-half, 2), np.float32)
        position = self.node("Cast", "positions", to=TensorProto.FLOAT)
        position = self.node("Unsqueeze", position, self.constant([2, 3]))
        angle = self.node("Mul", position, frequency)
        self.cos, self.sin = self.node("Cos", angle), self.node("Sin", angle)

    def _masks(self) -> None:
        """What is added to the scores: against the cache [B, 1, 1, P], the new tokens [S, S]."""
        zero, one = self.constant(0), self.constant(1)
        seen, unseen = self.constant(0.0, np.float32), self.constant(MASKED, np.float32)
        past = self.node("Shape", "past_key_0", start=3, end=4)
        steps = self.node("Shape", "tokens", start=1, end=2)
        self.sizes = self.node("Concat", past, steps, axis=0)
        past_count, step_count = self.node("Squeeze", past), self.node("Squeeze", steps)
        slot = self.node("Range", zero, past_count, one)
        length = self.node("Unsqueeze", "past_length", self.constant([1, 2, 3]))
        self.past_bias = self.node("Where", self.node("Less", slot, length), seen, unseen)
        column = self.node("Range", zero, step_count, one)
        row = self.node("Unsqueeze", column, self.constant([1]))
        self.new_bias = self.node("Where", self.node("LessOrEqual", column, row), seen, unseen)

    def _rms_norm(self, x: str, weight: torch.Tensor, name: str) -> str:
        """In the form that ONNX Runtime fuses into one node."""
        mean = self.node("ReduceMean", self.node("Pow", x, self.two), axes=[-1], keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.epsilon))
        return self.node("Mul", self.node("Div", x, root), self.weight(weight, name))

    def _block(self, x: str, block: Block, index: int) -> str:
        """Attention and feed-forward of one layer."""
        size = self.size

        def weight(name: str, matrix: torch.Tensor) -> str:
            return self.weight(matrix.T, f"blocks.{index}.{name}")

        def cut(value: str, sizes: list[int], axis: int) -> list[str]:
            return self.split("Split", value, self.constant(sizes), outputs=len(sizes), axis=axis)

        norm = self._rms_norm(x, block.attention_norm.weight, f"blocks.{index}.attention_norm")
        # The scale of the scores is a power of two: exact in fp16.
        query = block.query.weight * size.head_channels**-0.5
        projection = weight("qkv", torch.cat((query, block.key_value.weight)))
        projected = self.node("MatMul", norm, projection)
        turned, value = cut(projected, [size.channels + size.head_channels, size.head_channels], 2)
        turned = self.node("Reshape", turned, self.heads)
        first, second = cut(turned, [size.head_channels // 2] * 2, 3)
        turned = self.node(
            "Add",
            self.node("Mul", turned, self.cos),
            self.node(
                "Mul",
                self.node("Concat", self.node("Neg", second), first, axis=-1),
                self.sin,
            ),
        )
        # Every head by itself, [B, H, S, D]: at one token a step its product is with a vector, for
        # which the runtime does not copy the cache into another layout first.
        turned, key = cut(turned, [size.heads, 1], 2)
        query = self.node("Transpose", turned, perm=[0, 2, 1, 3])
        key = self.node("Transpose", key, perm=[0, 2, 3, 1], output=f"key_{index}")
        value = self.node("Unsqueeze", value, self.one, output=f"value_{index}")
        past_scores = self.node("MatMul", query, f"past_key_{index}")
        new_scores = self.node("MatMul", query, key)
        scores = self.node(
            "Concat",
            self.node("Add", past_scores, self.past_bias),
            self.node("Add", new_scores, self.new_bias),
            axis=-1,
        )
        weights = self.node("Softmax", scores, axis=-1)
        past, new = self.split("Split", weights, self.sizes, outputs=2, axis=3)
        attended = self.node(
            "Add",
            self.node("MatMul", past, f"past_value_{index}"),
            self.node("MatMul", new, value),
        )
        attended = self.node("Transpose", attended, perm=[0, 2, 1, 3])
        attended = self.node("Reshape", attended, self.merged)
        attended = self.node("MatMul", attended, weight("output", block.output.weight))
        x = self.node("Add", x, attended)
        norm = self._rms_norm(x, block.feed_norm.weight, f"blocks.{index}.feed_norm")
        hidden = self.node("MatMul", norm, weight("gate_up", block.gate_up.weight))
        gate, up = cut(hidden, [size.hidden_channels] * 2, 2)
        gate = self.node("Mul", gate, self.node("Sigmoid", gate))
        hidden = self.node("Mul", gate, up)
        return self.node("Add", x, self.node("MatMul", hidden, weight("down", block.down.weight)))

    def model(self, facts: Mapping[str, str]) -> onnx.ModelProto:
        """The checked graph, with its facts in `metadata_props`."""
        whole, real = TensorProto.INT64, TensorProto.FLOAT
        layers, channels = range(self.size.layers), self.size.head_channels
        tensor = helper.make_tensor_value_info
        inputs = [tensor(name, whole, ["B", "S"]) for name in ("tokens", "positions")]
        inputs += [tensor(name, whole, ["B"]) for name in ("last", "past_length")]
        outputs = [tensor("logits", real, ["B", self.size.vocabulary_size])]
        for index in layers:
            inputs.append(tensor(f"past_key_{index}", real, ["B", 1, channels, "P"]))
            inputs.append(tensor(f"past_value_{index}", real, ["B", 1, "P", channels]))
            outputs.append(tensor(f"key_{index}", real, ["B", 1, channels, "S"]))
            outputs.append(tensor(f"value_{index}", real, ["B", 1, "S", channels]))
        graph = helper.make_graph(self.nodes, "band_transformer", inputs, outputs, self.weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="deep-philharmonics",
        )
        helper.set_model_props(model, dict(facts))
        onnx.checker.check_model(model, full_check=True)
        return model


def load_model(checkpoint: Path) -> tuple[BandTransformer, dict[str, float]]:
    """The trained model, its weights rounded to fp16 as they will be stored; and its last log row.

    Raises:
        InvalidModel: the file is damaged or names code, or was trained on another vocabulary.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        vocabulary, size = state["vocabulary"], ModelSize(**state["size"])
        weights = {name: tensor.half().float() for name, tensor in state["model"].items()}
        trained = {**state["log"][-1], "step": state["step"]}
    except Exception as error:  # torch's unpickler raises whatever the bytes make it raise
        reason = why_unread(error)
        raise InvalidModel(
            f"{checkpoint} is no checkpoint of training.generate_notes, and nothing in it was "
            f"executed: {reason}"
        ) from error
    if vocabulary != VOCABULARY_HASH:
        raise InvalidModel(
            f"{checkpoint} was trained on vocabulary {vocabulary}, "
            f"this tree has {VOCABULARY_HASH}: train again."
        )
    model = BandTransformer(size)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    require_same_names(checkpoint, {n: w.numpy() for n, w in weights.items()}, expected)
    model.load_state_dict(weights)
    return model.eval(), trained


class Generator(Original):
    """The band transformer, which is ours: the original is its own forward pass in torch.

    Inputs: tokens [B, S], and split [1]: so many tokens are a history, the rest follows one by
    one, as the runner writes. Output: logits [B, S - split + 1, V] after the history and after
    each token that follows.
    """

    stage = "generate_notes"
    sample_rate_hz = 0

    def __init__(self, model: BandTransformer) -> None:
        self.model = model
        self.facts: Mapping[str, Any] = {"architecture": "band-transformer"}

    @torch.no_grad()
    def reference(self, inputs: Tensors) -> Arrays:
        """Logits of the whole sequences."""
        logits = self.model(torch.from_numpy(inputs["tokens"]))
        return {"logits": logits[:, int(inputs["split"][0]) - 1 :].numpy()}

    def onnx(self) -> onnx.ModelProto:
        """See the module."""
        shape = {name: str(value) for name, value in self.model.size.as_dict().items()}
        return TransformerGraph(self.model).model({**shape, "vocabulary": VOCABULARY_HASH})

    def weights(self) -> Arrays:
        """As the graph stores them: in fp16, transposed, queries scaled, projections joined."""
        state = {name: w.numpy() for name, w in self.model.state_dict().items()}
        size, stored = self.model.size, {"embedding": state["embedding.weight"]}
        stored["norm"] = state["norm.weight"]
        for index in range(size.layers):
            name = f"blocks.{index}"
            query = state[f"{name}.query.weight"] * np.float32(size.head_channels**-0.5)
            stored[f"{name}.qkv"] = np.concatenate([query, state[f"{name}.key_value.weight"]]).T
            for norm in ("attention_norm", "feed_norm"):
                stored[f"{name}.{norm}"] = state[f"{name}.{norm}.weight"]
            for matrix in ("output", "gate_up", "down"):
                stored[f"{name}.{matrix}"] = state[f"{name}.{matrix}.weight"].T
        return {f"{name}.fp16": array.astype(np.float16) for name, array in stored.items()}

    def cases(self) -> Iterator[Case]:
        """Long and short histories, batches, steps over the cache."""
        for batch, n_tokens, split in ((1, 512, 512), (2, 96, 48), (5, 40, 7)):
            name = f"{batch} x {n_tokens} tokens, {n_tokens - split} of them in steps"
            yield Case(name, self._tokens(batch, n_tokens, split))

    def served(self, model: ServedCall, inputs: Tensors) -> Arrays:
        """The graph over a cache, as the runner drives it: the history, then token by token."""
        tokens, split = inputs["tokens"], int(inputs["split"][0])
        batch, n_tokens = tokens.shape
        cache = empty_cache(self.model.size, batch, n_tokens)
        logits = []
        for begin, end in zip(
            [0, *range(split, n_tokens)], range(split, n_tokens + 1), strict=True
        ):
            outputs = model({
                "tokens": tokens[:, begin:end],
                "positions": np.tile(np.arange(begin, end), (batch, 1)),
                "last": np.full(batch, end - begin - 1),
                "past_length": np.full(batch, begin),
                **cache,
            })  # fmt: skip
            for index in range(self.model.size.layers):
                cache[f"past_key_{index}"][..., begin:end] = outputs[f"key_{index}"]
                cache[f"past_value_{index}"][:, :, begin:end] = outputs[f"value_{index}"]
            logits.append(outputs["logits"])
        return {"logits": np.stack(logits, 1)}

    def speed_inputs(self, batch: int) -> Tensors:
        """A history, as the runner first sends it to the graph."""
        tokens = self._tokens(batch, 256, 256)["tokens"]
        return {
            "tokens": tokens,
            "positions": np.tile(np.arange(256), (batch, 1)),
            "last": np.full(batch, 255),
            "past_length": np.zeros(batch, np.int64),
            **empty_cache(self.model.size, batch, 0),
        }

    def _tokens(self, batch: int, n_tokens: int, split: int) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(n_tokens)
        tokens = rng.integers(0, self.model.size.vocabulary_size, (batch, n_tokens))
        return {"tokens": tokens, "split": np.array([split])}


def load_generator(checkpoint: Path) -> Generator:
    """The generator of a checkpoint of `training.generate_notes`.

    Raises:
        InvalidModel: see `load_model`.
    """
    return Generator(load_model(checkpoint)[0])


def write_random_generator(path: Path) -> None:
    """A checkpoint as training writes it, of seeded random weights."""
    model = BandTransformer(ModelSize())
    fill_at_random(model)
    torch.save(
        {
            "vocabulary": VOCABULARY_HASH,
            "size": model.size.as_dict(),
            "model": model.state_dict(),
            "log": [{}],
            "step": 0,
        },
        path,
    )


ARCHITECTURES = (
    Architecture("band-transformer", "generate_notes", load_generator, write_random_generator),
)


def export(model: BandTransformer, facts: Mapping[str, str], path: Path) -> None:
    """Writes the graph; the same model and facts give the same bytes."""
    graph = Generator(model).onnx()
    known = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, {**known, **facts})
    path.write_bytes(graph.SerializeToString(deterministic=True))


def empty_cache(size: ModelSize, rows: int, tokens: int) -> dict[str, NDArray[np.float32]]:
    """Room for `tokens` tokens of each row."""
    cache: dict[str, NDArray[np.float32]] = {}
    for index in range(size.layers):
        keys = np.zeros((rows, 1, size.head_channels, tokens), np.float32)
        cache |= {f"past_key_{index}": keys, f"past_value_{index}": keys.mT.copy()}
    return cache


@torch.no_grad()
def largest_difference(model: BandTransformer, path: Path, tokens: int = 96) -> float:
    """Largest difference of a logit: torch over whole sequences against the graph step by step.

    Two sequences of different length share the batch: a first pass over both (the shorter one
    padded), then single steps, the cache kept as a caller keeps it.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    sequences = np.random.default_rng(1).integers(0, model.size.vocabulary_size, (2, tokens))
    expected = model(torch.from_numpy(sequences)).numpy()
    cache = empty_cache(model.size, 2, tokens)
    rows, begin, end = np.arange(2), np.zeros(2, np.int64), np.array([tokens // 2, tokens // 3])
    worst = 0.0
    while end.max() <= tokens:
        steps = np.arange((end - begin).max())
        places = np.minimum(begin[:, None] + steps, tokens - 1)
        feed = {
            "tokens": sequences[rows[:, None], places],
            "positions": begin[:, None] + steps,
            "last": end - begin - 1,
            "past_length": begin,
        }
        outputs = dict(zip(names, session.run(names, {**feed, **cache}), strict=True))
        for row in rows:
            new, count = slice(begin[row], end[row]), end[row] - begin[row]
            for index in range(model.size.layers):
                key, value = outputs[f"key_{index}"], outputs[f"value_{index}"]
                cache[f"past_key_{index}"][row, ..., new] = key[row, ..., :count]
                cache[f"past_value_{index}"][row, :, new] = value[row, :, :count]
        worst = max(worst, float(np.abs(outputs["logits"] - expected[rows, end - 1]).max()))
        begin, end = end, end + 1
    return worst


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
        "training": json.dumps(trained),
        "training_command": "python -m training.generate_notes --minutes 84 --threads 1",
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
