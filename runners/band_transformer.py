"""bars to write -> their tokens: decodes the band transformer, one window of bars a row.

A window is stateless: its history is sent again, so that it can be retried, cancelled, batched
with windows of other songs, or computed by another replica. Each bar of a row draws from its own
random stream, made of the row's seed and the bar's index; with rows that never see each other in
the graph, the same seed gives the same music whoever shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from remix.errors import InvalidModel, InvalidOption
from remix.generate_notes import HISTORY_TOKENS, WINDOW_BARS, WINDOW_TOKENS
from remix.manifest import TensorSpec
from remix.note_tokens import (
    BAR,
    BAR_TOKENS,
    GIVEN_TOKENS,
    HEADER_TOKENS,
    METER,
    SPANS,
    STYLE,
    TEMPO,
    VOCABULARY_HASH,
    BarConditions,
    BarGrammar,
    Header,
    decode_header,
    encode_header,
)
from remix.stages import Tensors
from runners.inference_protocol import ServedModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Step = Callable[[Tensors], dict[str, NDArray[Any]]]

TOKENS = Counter("philharmonics_generator_tokens", "Tokens that were written", ["model"])

CACHE_TOKENS = 128
"""The cache grows in steps of this. What lies beyond a row's end is weighed with exact zeros, so a
row's result does not depend on how long its neighbours are."""


class Row:
    """One window while it is being written.

    Args:
        history: header and earlier bars.
        conditions: of the bars to write, in order.
        first_bar: index of the first of them in the song.
    """

    def __init__(
        self, history: list[int], conditions: list[BarConditions], first_bar: int, seed: int
    ) -> None:
        self.prompt = history
        self.tokens: list[int] = []
        self._beats_per_bar = decode_header(history).beats_per_bar
        self._conditions = conditions
        self._first_bar = first_bar
        self._seed = seed
        self._bar = -1
        self._forced: list[int] = []
        self._next_bar()
        self.prompt = [*history, *self._forced]
        self.tokens += self._forced
        self._forced = []

    def _next_bar(self) -> None:
        """Opens the next bar: its given tokens are waiting, its grammar and randomness fresh."""
        self._bar += 1
        if self.is_done:
            return
        conditions = self._conditions[self._bar]
        self._forced = [BAR, *conditions.tokens]
        self._grammar = BarGrammar(self._beats_per_bar, conditions)
        random = np.random.default_rng((self._seed, self._first_bar + self._bar))
        self._uniform: Iterator[float] = iter(random.random(BAR_TOKENS).tolist())

    @property
    def is_done(self) -> bool:
        """Whether every bar is written."""
        return self._bar == len(self._conditions)

    @property
    def forced(self) -> int | None:
        """The next token, where it is given."""
        return self._forced[0] if self._forced else None

    def allowed(self) -> NDArray[np.bool_]:
        """[V], the tokens that may be sampled next."""
        return self._grammar.allowed()

    def uniform(self) -> float:
        """The random number that the next sample is drawn with."""
        return next(self._uniform)

    def push(self, token: int) -> None:
        """Takes the next token, given or sampled."""
        if self._forced:
            self._forced.pop(0)
        else:
            self._grammar.push(token)
            if self._grammar.done:  # the sampled BAR is the first of the next bar's given tokens
                self._next_bar()
                self._forced = self._forced[1:]
                if self.is_done:
                    return
        self.tokens.append(token)


class Cache:
    """Keys [B, D, P] and values [B, P, D] of every layer, grown as rows grow.

    Args:
        layers: of the transformer.
        channels: D, of a key.
        lengths: [B], tokens that each row has already.
    """

    def __init__(self, layers: int, channels: int, lengths: Ints) -> None:
        self.lengths = lengths
        self._layers = range(layers)
        self._keys = [np.zeros((len(lengths), channels, 0), np.float32) for _ in self._layers]
        self._values = [np.zeros((len(lengths), 0, channels), np.float32) for _ in self._layers]

    def fill(self, result: Tensors) -> None:
        """Takes the first pass: what pads the shorter rows is never looked at."""
        room = -(-(int(self.lengths.max()) + 1) // CACHE_TOKENS) * CACHE_TOKENS
        for layer in self._layers:
            key, value = result[f"key_{layer}"], result[f"value_{layer}"]
            behind = (0, max(room - key.shape[2], 0))
            self._keys[layer] = np.pad(key, ((0, 0), (0, 0), behind))
            self._values[layer] = np.pad(value, ((0, 0), behind, (0, 0)))

    def append(self, result: Tensors) -> None:
        """Adds one token to each row."""
        rows = np.arange(len(self.lengths))
        for layer in self._layers:
            self._keys[layer][rows, :, self.lengths] = result[f"key_{layer}"][:, :, 0]
            self._values[layer][rows, self.lengths] = result[f"value_{layer}"][:, 0]
        self.lengths = self.lengths + 1
        if int(self.lengths.max()) == self._keys[0].shape[2]:
            behind = (0, CACHE_TOKENS)
            self._keys = [np.pad(key, ((0, 0), (0, 0), behind)) for key in self._keys]
            self._values = [np.pad(value, ((0, 0), behind, (0, 0))) for value in self._values]

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows but these."""
        self._keys = [np.ascontiguousarray(key[rows]) for key in self._keys]
        self._values = [np.ascontiguousarray(value[rows]) for value in self._values]
        self.lengths = self.lengths[rows]

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """As the graph takes them."""
        keys = {f"past_key_{layer}": self._keys[layer] for layer in self._layers}
        values = {f"past_value_{layer}": self._values[layer] for layer in self._layers}
        return {**keys, **values}


class BandTransformer(ServedModel):
    """The generator on windows.

    Inputs, [B, ...]:
        history: [B, 640] int64, header and the latest bars before the window, then -1.
        conditions: [B, 4, 4] int64, the given tokens of each bar to write; bars of -1 are none.
        first_bar, seed: [B, 1] int64.
        temperature, top_p: [B, 1] float32.

    Output:
        tokens: [B, 768] int64, the written bars with their given tokens, then -1.
    """

    inputs = (
        TensorSpec("history", "INT64", (-1, HISTORY_TOKENS)),
        TensorSpec("conditions", "INT64", (-1, WINDOW_BARS, GIVEN_TOKENS)),
        TensorSpec("first_bar", "INT64", (-1, 1)),
        TensorSpec("seed", "INT64", (-1, 1)),
        TensorSpec("temperature", "FP32", (-1, 1)),
        TensorSpec("top_p", "FP32", (-1, 1)),
    )
    outputs = (TensorSpec("tokens", "INT64", (-1, WINDOW_TOKENS)),)

    def __init__(self, name: str, step: Step, facts: dict[str, str], max_batch: int) -> None:
        """Wrap a graph that `export/generate_notes.py` wrote.

        Raises:
            InvalidModel: the model speaks another vocabulary.
        """
        if facts.get("vocabulary") != VOCABULARY_HASH:
            raise InvalidModel(
                f"{name} speaks vocabulary {facts.get('vocabulary')}, this version "
                f"{VOCABULARY_HASH}: run `make models`, or train it again."
            )
        self.name = name
        self.max_batch = max_batch
        self._step = step
        self._layers = int(facts["layers"])
        self._channels = int(facts["channels"]) // int(facts["heads"])

    def warm_up(self) -> None:
        """Write one bar of one track."""
        history = np.full((1, HISTORY_TOKENS), -1)
        history[0, :HEADER_TOKENS] = encode_header(Header(4, 3))
        conditions = np.full((1, WINDOW_BARS, GIVEN_TOKENS), -1)
        conditions[0, 0] = BarConditions((0, 0), 0, 1).tokens
        zero, one = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)
        self({
            "history": history, "conditions": conditions, "first_bar": zero, "seed": zero,
            "temperature": one, "top_p": one,
        })  # fmt: skip

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Write the windows of a batch.

        Raises:
            InvalidOption: a token, a temperature or a top-p that cannot be.
        """
        rows = [_row(*arrays) for arrays in zip(*(inputs[n] for n in _ROW_INPUTS), strict=True)]
        temperature, top_p = inputs["temperature"], inputs["top_p"]
        if not ((temperature > 0).all() and (top_p > 0).all() and (top_p <= 1).all()):
            raise InvalidOption("temperature must be above 0, and top_p in (0, 1].")
        self._write(rows, temperature, top_p)
        tokens = np.full((len(rows), WINDOW_TOKENS), -1, np.int64)
        for row, target in zip(rows, tokens, strict=True):
            target[: len(row.tokens)] = row.tokens
        TOKENS.labels(self.name).inc(int((tokens >= 0).sum()))
        return {"tokens": tokens}

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """Prompts are filled up to the longest; who is done takes no further part in its batch."""
        prompts = (inputs["history"] >= 0).sum(axis=1)
        written = (outputs["tokens"] >= 0).sum(axis=1)
        longest = prompts.max()
        return float(((longest - prompts) / (longest + written)).sum())

    def _write(self, rows: list[Row], temperature: Floats, top_p: Floats) -> None:
        live = [index for index, row in enumerate(rows) if not row.is_done]
        if not live:
            return
        logits, cache = self._first_pass([rows[index].prompt for index in live])
        while True:
            chosen = self._choose(
                [rows[index] for index in live], logits, temperature[live], top_p[live]
            )
            for index, token in zip(live, chosen, strict=True):
                rows[index].push(token)
            left = [place for place, index in enumerate(live) if not rows[index].is_done]
            if not left:
                return
            if len(left) < len(live):
                cache.keep(left)
                live = [live[place] for place in left]
                chosen = [chosen[place] for place in left]
            result = self._step({
                "tokens": np.array(chosen)[:, None],
                "positions": cache.lengths[:, None],
                "last": np.zeros(len(live), np.int64),
                "past_length": cache.lengths,
                **cache.tensors,
            })  # fmt: skip
            cache.append(result)
            logits = result["logits"]

    def _first_pass(self, prompts: list[list[int]]) -> tuple[Floats, Cache]:
        """Logits after each prompt, and the cache of all; shorter prompts are padded behind."""
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.zeros((len(prompts), int(lengths.max())), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        cache = Cache(self._layers, self._channels, lengths)
        result = self._step({
            "tokens": tokens,
            "positions": np.tile(np.arange(tokens.shape[1]), (len(prompts), 1)),
            "last": lengths - 1,
            "past_length": np.zeros(len(prompts), np.int64),
            **cache.tensors,
        })  # fmt: skip
        cache.fill(result)
        return result["logits"], cache

    @staticmethod
    def _choose(rows: list[Row], logits: Floats, temperature: Floats, top_p: Floats) -> list[int]:
        """The next token of each row: the given one, or a sample."""
        chosen = []
        for place, row in enumerate(rows):
            token = row.forced
            if token is None:
                options = SampleOptions(float(temperature[place, 0]), float(top_p[place, 0]))
                token = sample(logits[place], row.allowed(), options, row.uniform())
            chosen.append(token)
        return chosen


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How bold a sample is: temperature above 0, top-p in (0, 1]."""

    temperature: float
    top_p: float


def sample(
    logits: Floats, allowed: NDArray[np.bool_], options: SampleOptions, uniform: float
) -> int:
    """Draws a token: grammar, temperature, softmax, then the nucleus of mass top-p.

    Args:
        logits: [V].
        allowed: [V], at least one True.
        options: temperature and top-p.
        uniform: in [0, 1).

    Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1.

    >>> sample(np.array([0.0, 9.0, 1.0]), np.array([True, False, True]), SampleOptions(1, 0.5), 0.9)
    2
    """
    tokens = np.flatnonzero(allowed)
    scaled = logits[tokens].astype(np.float64) / options.temperature
    probability = np.exp(scaled - scaled.max())
    order = np.argsort(-probability, kind="stable")
    reached = np.cumsum(probability[order])
    # The likeliest tokens up to the one with which their mass reaches top-p, that one included.
    size = int(np.searchsorted(reached, options.top_p * reached[-1])) + 1
    size = min(size, len(tokens))
    rank = int(np.searchsorted(reached[:size], uniform * reached[size - 1], side="right"))
    return int(tokens[order[min(rank, size - 1)]])


_ROW_INPUTS = ("history", "conditions", "first_bar", "seed")
_GIVEN_SPANS = tuple(SPANS[name] for name in ("chord", "chord", "density", "tracks"))


def _row(history: Ints, conditions: Ints, first_bar: Ints, seed: Ints) -> Row:
    """A row from its arrays.

    Raises:
        InvalidOption: a token out of its place.
    """
    tokens = history[history >= 0].tolist()
    header = tokens[:HEADER_TOKENS]
    if len(header) < HEADER_TOKENS or not (
        METER <= header[0] < TEMPO <= header[1] < STYLE <= header[2] < BAR
    ):
        raise InvalidOption(f"history begins with {header}: send METER, TEMPO and STYLE first.")
    if any(token >= SPANS["pitch"][1] for token in tokens):
        raise InvalidOption(f"history holds token {max(tokens)}: send tokens of the vocabulary.")
    if first_bar[0] < 0 or seed[0] < 0:
        raise InvalidOption(f"first_bar is {first_bar[0]} and seed {seed[0]}: send 0 or more.")
    bars = [_bar_conditions(given) for given in conditions.tolist() if given[0] >= 0]
    return Row(tokens, bars, int(first_bar[0]), int(seed[0]))


def _bar_conditions(given: list[int]) -> BarConditions:
    for token, (start, stop) in zip(given, _GIVEN_SPANS, strict=True):
        if not start <= token < stop:
            raise InvalidOption(f"conditions hold token {token}: send {start} to {stop - 1}.")
    first, second, density, tracks = (
        token - start for token, (start, _) in zip(given, _GIVEN_SPANS, strict=True)
    )
    return BarConditions((first, second), density, tracks)
