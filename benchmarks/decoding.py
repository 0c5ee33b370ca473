"""Tokens a second: the generator as its runner serves it, against Hugging Face `generate`.

    python -m benchmarks.decoding [--rounds 5]

The starter's weights are put into transformers' Llama, which has the same architecture; that both
say the same is checked first. A window of four bars is written after 640 tokens of history. Ours
goes through the batcher, with the grammar, on as many workers as the runner has; the peer's
`generate` has its cache, the same temperature and top-p, all cores, no grammar, and writes as many
tokens. In turn: one window alone; eight at once (the peer: as one batch of eight). And how long a
window takes beside 0 to 4 others. Writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from export.band_transformer import ModelSize
from export.generate_notes import empty_cache
from remix.generate_notes import HISTORY_TOKENS, WINDOW_BARS
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.note_tokens import BarConditions, Header, encode_header
from remix.settings import Settings, read_settings
from remix.stages import Tensors
from runners.adaptive_batcher import Workers
from runners.band_transformer import BandTransformer
from runners.open_graph import Graph, open_graph
from runners.runner import Runner

ROOT = MANIFEST_PATH.parent
RESULT = ROOT / "benchmarks/results/decoding.json"
MODEL = "band-transformer-2m"
TEMPERATURE, TOP_P = 1.0, 0.95
AT_ONCE = 8
WORKERS = Runner.workers
LARGEST_ERROR = 1e-3
"""Of a logit, as in export/generate_notes.py."""


def load_llama(path: Path) -> Any:
    """The graph's weights in transformers' Llama; multi-query attention, tied embeddings."""
    graph = onnx.load(path)
    size = ModelSize()
    stored = {
        item.name.removesuffix(".fp16"): torch.from_numpy(
            numpy_helper.to_array(item).astype(np.float32)
        )
        for item in graph.graph.initializer
        if item.name.endswith(".fp16")
    }
    config = LlamaConfig(
        vocab_size=size.vocabulary_size,
        hidden_size=size.channels,
        intermediate_size=size.hidden_channels,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=1,
        max_position_embeddings=2 * size.context_tokens,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = {"model.embed_tokens.weight": stored["embedding"], "model.norm.weight": stored["norm"]}
    cuts = [size.channels, size.head_channels, size.head_channels]
    for index in range(size.layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        query, key, value = torch.split(stored[f"{ours}.qkv"].T, cuts)
        gate, up = stored[f"{ours}.gate_up"].T.chunk(2)
        state |= {
            f"{theirs}.self_attn.q_proj.weight": query * size.head_channels**0.5,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": stored[f"{ours}.output"].T,
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": stored[f"{ours}.down"].T,
            f"{theirs}.input_layernorm.weight": stored[f"{ours}.attention_norm"],
            f"{theirs}.post_attention_layernorm.weight": stored[f"{ours}.feed_norm"],
        }
    model: Any = LlamaForCausalLM(config)
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"], missing
    assert not missing.unexpected_keys, missing
    model.tie_weights()
    return model.eval()


def window(seed: int, history: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Four bars for five tracks, after a history."""
    padded = np.full((1, HISTORY_TOKENS), -1)
    padded[0, : len(history)] = history
    roots = np.random.default_rng(seed).integers(0, 12, WINDOW_BARS).tolist()
    conditions = [BarConditions((7 * root, 7 * root), 3, 31).tokens for root in roots]
    return {
        "history": padded,
        "conditions": np.array([conditions]),
        "first_bar": np.array([[8]]),
        "seed": np.array([[seed]]),
        "temperature": np.array([[TEMPERATURE]], np.float32),
        "top_p": np.array([[TOP_P]], np.float32),
    }


def full_history(model: BandTransformer) -> NDArray[np.int64]:
    """Header and music, exactly as long as a history may be."""
    tokens = np.array(encode_header(Header(4, 3)))
    for seed in range(8):
        written = model(window(seed, tokens[:HISTORY_TOKENS]))["tokens"][0]
        tokens = np.concatenate([tokens, written[written >= 0]])
        if len(tokens) >= HISTORY_TOKENS:
            break
    return tokens[:HISTORY_TOKENS]


async def submitted(
    model: BandTransformer, windows: Sequence[Tensors]
) -> tuple[list[float], list[int]]:
    """All at once, as a runner is asked: seconds and tokens of each."""
    batcher = model.batcher(Workers(WORKERS), 100)

    async def one(inputs: Tensors) -> tuple[float, int]:
        start_s = time.perf_counter()
        outputs, _ = await batcher.submit(inputs)
        return time.perf_counter() - start_s, int((outputs["tokens"] >= 0).sum())

    results = await asyncio.gather(*map(one, windows))
    return [took_s for took_s, _ in results], [count for _, count in results]


@torch.no_grad()
def generated(llama: Any, prompt: NDArray[np.int64], rows: int, count: int) -> float:
    """Seconds of `generate` for so many rows and tokens."""
    tokens = torch.from_numpy(np.tile(prompt, (rows, 1)))
    start_s = time.perf_counter()
    out = llama.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        min_new_tokens=count,
        max_new_tokens=count,
        use_cache=True,
        pad_token_id=0,
    )
    assert out.shape[1] == len(prompt) + count
    return time.perf_counter() - start_s


def largest_difference(llama: Any, graph: Graph, tokens: NDArray[np.int64]) -> float:
    """Of a logit after some tokens: both must be the same model."""
    size = ModelSize()
    outputs = graph({
        "tokens": tokens[None],
        "positions": np.arange(len(tokens))[None],
        "last": np.array([len(tokens) - 1]),
        "past_length": np.array([0]),
        **empty_cache(size, 1, 0),
    })  # fmt: skip
    with torch.no_grad():
        theirs = llama(torch.from_numpy(tokens[None])).logits[0, -1].numpy()
    return float(np.abs(outputs["logits"][0] - theirs).max())


def run(rounds: int, settings: Settings) -> dict[str, Any]:
    """Both sides in turn."""
    entry = read_manifest()[MODEL]
    graph = open_graph(entry, replace(settings, threads=1))
    model = BandTransformer(MODEL, graph, graph.facts, entry.max_batch["cpu"])
    llama = load_llama(settings.models_dir / entry.files[0].path)
    history = full_history(model)
    difference = largest_difference(llama, graph, history)
    assert difference <= LARGEST_ERROR, f"the two differ by {difference}"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    windows = [window(seed, history) for seed in range(AT_ONCE)]
    rates: dict[str, list[float]] = {}
    alone_s: dict[int, list[float]] = {}
    asyncio.run(submitted(model, windows))
    generated(llama, history, 2, 8)
    for number in range(rounds):
        for rows in (1, AT_ONCE):
            start_s = time.perf_counter()
            _, counts = asyncio.run(submitted(model, windows[:rows]))
            ours_s = time.perf_counter() - start_s
            rates.setdefault(f"ours_{rows}", []).append(sum(counts) / ours_s)
            mean = round(sum(counts) / rows)
            theirs_s = generated(llama, history, rows, mean)
            rates.setdefault(f"theirs_{rows}", []).append(rows * mean / theirs_s)
        for beside in range(5):
            # Its neighbours are written before it and after it, too.
            others = [windows[1 + index] for index in range(beside)]
            took_s, _ = asyncio.run(submitted(model, [windows[0], *others]))
            alone_s.setdefault(beside, []).append(took_s[0])
        print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.0f}" for k, v in rates.items()))
    median = {name: statistics.median(values) for name, values in rates.items()}
    lone = {beside: statistics.median(values) for beside, values in alone_s.items()}
    return {
        "benchmark": "decoding",
        "command": f"python -m benchmarks.decoding --rounds {rounds}",
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores",
        "transformers_logits_differ_by": difference,
        "tokens_per_s": {name: [round(v) for v in values] for name, values in rates.items()},
        "times_as_fast_alone": round(median["ours_1"] / median["theirs_1"], 2),
        "times_as_fast_at_once": round(median[f"ours_{AT_ONCE}"] / median[f"theirs_{AT_ONCE}"], 2),
        "ours_at_once_against_theirs_alone": round(
            median[f"ours_{AT_ONCE}"] / median["theirs_1"], 2
        ),
        "window_s_beside_others": {str(beside): round(s, 3) for beside, s in lone.items()},
        "slower_per_neighbour": {
            str(beside): round((s / lone[0] - 1) / beside, 3)
            for beside, s in lone.items()
            if beside
        },
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    result = run(parser.parse_args().rounds, read_settings())
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
