"""Perplexity a token on held-out songs: of the served graph, the untrained network, a 5-gram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.band_transformer import BandTransformer, ModelSize
from remix.note_tokens import VOCABULARY_SIZE
from training.band_songs import Song
from training.generate_notes import IGNORE, Augmentation, sequences, song_tokens

CONTEXT_TOKENS = 1024
START = VOCABULARY_SIZE
"""Stands before the first token of a song."""

Ints = NDArray[np.int64]


class NGram:
    """An interpolated n-gram of tokens. Source: Witten & Bell 1991, method C.

    Args:
        songs: their tokens.
        order: 5: a token after four others.
    """

    def __init__(self, songs: Sequence[Sequence[int]], order: int = 5) -> None:
        self._order = order
        before = [START] * (order - 1)
        tokens = np.concatenate([np.array([*before, *song], np.int64) for song in songs])
        real = tokens != START
        self._tables = []
        for length in range(1, order + 1):
            grams, counts = np.unique(_codes(tokens, length)[real], return_counts=True)
            contexts, first = np.unique(grams // (VOCABULARY_SIZE + 1), return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(grams)))
            self._tables.append((grams, counts, contexts, totals, kinds))

    def probabilities(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Of each token of a song, after those before it."""
        before = self._order - 1
        padded = np.concatenate([np.full(before, START), np.array(tokens, np.int64)])
        estimate = np.full(len(tokens), 1 / VOCABULARY_SIZE)
        for length, (grams, counts, contexts, totals, kinds) in enumerate(self._tables, 1):
            codes = _codes(padded, length)[before:]
            context, is_known = _find(contexts, codes // (VOCABULARY_SIZE + 1))
            gram, is_counted = _find(grams, codes)
            seen = np.where(is_counted, counts[gram], 0)
            mixed = (seen + kinds[context] * estimate) / (totals[context] + kinds[context])
            estimate = np.where(is_known, mixed, estimate)
        return estimate


def _codes(tokens: Ints, length: int) -> Ints:
    """One number for each token and the `length - 1` before it."""
    codes = np.zeros(len(tokens), np.int64)
    for back in range(length - 1, -1, -1):
        shifted = np.concatenate([np.full(back, START), tokens[: len(tokens) - back]])
        codes = codes * (VOCABULARY_SIZE + 1) + shifted
    return codes


def _find(table: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return place, table[place] == wanted


def perplexities(
    graph: Path, train: Sequence[Song], test: Mapping[str, Sequence[Song]], count: int
) -> dict[str, dict[str, float]]:
    """Of `count` sequences of each set of songs; given tokens are not counted."""
    ngram = NGram([song_tokens(song, 0, 10**6, Augmentation())[0] for song in train])
    found = {}
    for name, songs in test.items():
        rng = np.random.default_rng(2)
        inputs, targets = sequences(songs, count, CONTEXT_TOKENS, rng, plain=True)
        found[name] = {
            "model": round(_graph_perplexity(graph, inputs, targets), 3),
            "5-gram": round(_ngram_perplexity(ngram, inputs, targets), 3),
            "untrained": round(_untrained_perplexity(inputs, targets), 1),
        }
    return found


def _ngram_perplexity(ngram: NGram, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    nats = []
    for row, wanted in zip(inputs.numpy(), targets.numpy(), strict=True):
        # Targets are the inputs moved by one; the last of them is no input.
        whole = np.where(wanted != IGNORE, wanted, np.append(row[1:], 0))
        probability = ngram.probabilities([int(row[0]), *whole.tolist()])[1:]
        nats.append(-np.log(probability[wanted != IGNORE]))
    return math.exp(float(np.concatenate(nats).mean()))


@torch.no_grad()
def _untrained_perplexity(inputs: torch.Tensor, targets: torch.Tensor) -> float:
    torch.manual_seed(0)
    model = BandTransformer(ModelSize())
    losses = [
        F.cross_entropy(model(row[None])[0], wanted, ignore_index=IGNORE, reduction="none")[
            wanted != IGNORE
        ]
        for row, wanted in zip(inputs, targets, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))


def _graph_perplexity(path: Path, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Of the exported graph itself, token by token over its cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    layers = range(int(facts["layers"]))
    channels = int(facts["channels"]) // int(facts["heads"])
    rows, steps = inputs.shape
    cache: dict[str, NDArray[Any]] = {}
    for layer in layers:
        cache[f"past_key_{layer}"] = np.zeros((rows, 1, channels, steps), np.float32)
        cache[f"past_value_{layer}"] = np.zeros((rows, 1, steps, channels), np.float32)
    names = [output.name for output in session.get_outputs()]
    nats = []
    for step in range(steps):
        feed = {
            "tokens": inputs[:, step : step + 1].numpy(),
            "positions": np.full((rows, 1), step),
            "last": np.zeros(rows, np.int64),
            "past_length": np.full(rows, step),
        }
        room = -(-(step + 1) // 128) * 128  # what lies behind is not looked at, but costs time
        for layer in layers:
            feed[f"past_key_{layer}"] = cache[f"past_key_{layer}"][..., :room]
            feed[f"past_value_{layer}"] = cache[f"past_value_{layer}"][:, :, :room]
        found = dict(zip(names, session.run(names, feed), strict=True))
        for layer in layers:
            cache[f"past_key_{layer}"][..., step] = found[f"key_{layer}"][..., 0]
            cache[f"past_value_{layer}"][:, :, step] = found[f"value_{layer}"][:, :, 0]
        wanted = targets[:, step]
        logits = torch.from_numpy(found["logits"])[wanted != IGNORE]
        nats.append(F.cross_entropy(logits, wanted[wanted != IGNORE], reduction="none"))
    return math.exp(float(torch.cat(nats).mean()))
