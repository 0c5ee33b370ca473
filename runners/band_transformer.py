"""bars to write -> their tokens: decodes the band transformer, windows of bars token by token.

A window is stateless: its history is sent again, so that it can be retried, cancelled, written
beside windows of other songs, or by another replica. Windows that are written at once share each
step of the graph, and come and go between steps. Each bar draws from its own random stream, made
of the window's seed and the bar's index; with rows that never see each other in the graph, the
same seed gives the same music whoever else is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from runners.inference_protocol import SteppedModel
from runners.step_batcher import Writer

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Graph = Callable[[Tensors], dict[str, NDArray[Any]]]

TOKENS = Counter("philharmonics_generator_tokens", "Tokens that were written", ["model"])

CACHE_TOKENS = 128
"""The cache grows in steps of this. What lies beyond a row's end is weighed with exact zeros, so a
row's result does not depend on how long its neighbours are."""


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How bold a sample is: temperature above 0, top-p in (0, 1]."""

    temperature: float
    top_p: float


class Row:
    """One window of bars while it is being written.

    Args:
        history: header and earlier bars.
        conditions: of the bars to write, in order.
        first_bar: index of the first of them in the song.
        seed: of its randomness.
        options: how bold its samples are.
    """

    logits: Floats
    """[V], after its last token."""

    def __init__(
        self,
        history: list[int],
        conditions: list[BarConditions],
        first_bar: int,
        seed: int,
        options: SampleOptions,
    ) -> None:
        self.tokens: list[int] = []
        self._beats_per_bar = decode_header(history).beats_per_bar
        self._conditions = conditions
        self._first_bar = first_bar
        self._seed = seed
        self._options = options
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

    def write(self) -> int:
        """The next token, given or sampled; it is the row's from here on."""
        if self._forced:
            token = self._forced.pop(0)
        else:
            allowed = self._grammar.allowed()
            token = sample(self.logits, allowed, self._options, next(self._uniform))
            self._grammar.push(token)
            if self._grammar.done:  # the sampled BAR is the first of the next bar's given tokens
                self._next_bar()
                self._forced = self._forced[1:]
                if self.is_done:
                    return token
        self.tokens.append(token)
        return token


class Cache:
    """Keys and values of the rows that are being written, in all layers; grown as they grow.

    Args:
        layers: of the transformer.
        channels: D, of a key.
    """

    def __init__(self, layers: int, channels: int) -> None:
        self._layers = range(layers)
        self._channels = channels
        self._lengths: list[int] = []
        self._make(rows=1, tokens=0)

    def _make(self, rows: int, tokens: int) -> None:
        """Room for so many rows of so many tokens: [L, R, 1, D, P] and [L, R, 1, P, D]."""
        shape = (len(self._layers), rows, 1)
        self._keys = np.zeros((*shape, self._channels, tokens), np.float32)
        self._values = np.zeros((*shape, tokens, self._channels), np.float32)

    def _fit(self) -> None:
        """Room for one more token of each row, and not much more than that."""
        rows, tokens = self._keys.shape[1], self._keys.shape[4]
        if len(self._lengths) > rows:
            rows *= 2
        needed = -(-(max(self._lengths, default=0) + 1) // CACHE_TOKENS) * CACHE_TOKENS
        if not needed <= tokens <= needed + 2 * CACHE_TOKENS:
            tokens = needed
        if (rows, tokens) == (self._keys.shape[1], self._keys.shape[4]):
            return
        keys, values = self._keys, self._values
        self._make(rows, tokens)
        for row, length in enumerate(self._lengths[: keys.shape[1]]):
            kept = min(length, keys.shape[4])
            self._keys[:, row, ..., :kept] = keys[:, row, ..., :kept]
            self._values[:, row, :, :kept] = values[:, row, :, :kept]

    def add(self, length: int, first_pass: Tensors) -> None:
        """One more row, of so many tokens."""
        self._lengths.append(length)
        self._fit()
        row = len(self._lengths) - 1
        for layer in self._layers:
            self._keys[layer, row, ..., :length] = first_pass[f"key_{layer}"][0]
            self._values[layer, row, :, :length] = first_pass[f"value_{layer}"][0]

    def append(self, result: Tensors) -> None:
        """One more token of each row."""
        for layer in self._layers:
            keys, values = result[f"key_{layer}"], result[f"value_{layer}"]
            for row, length in enumerate(self._lengths):
                self._keys[layer, row, 0, :, length] = keys[row, 0, :, 0]
                self._values[layer, row, 0, length] = values[row, 0, 0]
        self._lengths = [length + 1 for length in self._lengths]
        self._fit()

    def remove(self, row: int) -> None:
        """Forgets a row; the last one takes its place."""
        last = len(self._lengths) - 1
        length = self._lengths[last]
        if row < last:
            self._keys[:, row, ..., :length] = self._keys[:, last, ..., :length]
            self._values[:, row, :, :length] = self._values[:, last, :, :length]
            self._lengths[row] = length
        self._lengths.pop()
        self._fit()

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """As the graph takes them, for one more token of each row."""
        rows = len(self._lengths)
        lengths = np.array(self._lengths)
        return {
            "positions": lengths[:, None],
            "last": np.zeros(rows, np.int64),
            "past_length": lengths,
            **{f"past_key_{layer}": self._keys[layer, :rows] for layer in self._layers},
            **{f"past_value_{layer}": self._values[layer, :rows] for layer in self._layers},
        }


class BandWriter(Writer):
    """Windows that are written together, a token of each a step."""

    def __init__(self, name: str, graph: Graph, layers: int, channels: int) -> None:
        """With none yet; `channels` are those of a key."""
        self._name = name
        self._graph = graph
        nothing = np.zeros((1, 1, channels, 0), np.float32)
        self._no_past = {f"past_key_{layer}": nothing for layer in range(layers)}
        self._no_past |= {f"past_value_{layer}": nothing.mT for layer in range(layers)}
        self._cache = Cache(layers, channels)
        self._rows: list[Row] = []
        self._windows: dict[int, list[Row]] = {}

    def join(self, key: int, inputs: Tensors) -> None:
        """See `Writer.join`."""
        rows = [_row(*arrays) for arrays in zip(*(inputs[n] for n in _ROW_INPUTS), strict=True)]
        self._windows[key] = rows
        for row in rows:
            if row.is_done:
                continue
            n_tokens = len(row.prompt)
            first_pass = self._graph({
                **self._no_past,
                "tokens": np.array([row.prompt]),
                "positions": np.arange(n_tokens)[None],
                "last": np.array([n_tokens - 1]),
                "past_length": np.array([0]),
            })  # fmt: skip
            row.logits = first_pass["logits"][0]
            self._cache.add(n_tokens, first_pass)
            self._rows.append(row)

    def leave(self, key: int) -> None:
        """See `Writer.leave`."""
        for row in self._windows.pop(key):
            if row in self._rows:
                self._remove(self._rows.index(row))

    def step(self) -> dict[int, dict[str, NDArray[Any]]]:
        """See `Writer.step`."""
        tokens = [row.write() for row in self._rows]
        for place in reversed(range(len(self._rows))):
            if self._rows[place].is_done:
                self._remove(place)
                tokens[place] = tokens[-1]
                tokens.pop()
        if self._rows:
            result = self._graph({"tokens": np.array(tokens)[:, None], **self._cache.inputs})
            self._cache.append(result)
            for row, logits in zip(self._rows, result["logits"], strict=True):
                row.logits = logits
        done = [key for key, rows in self._windows.items() if all(row.is_done for row in rows)]
        return {key: self._outputs(self._windows.pop(key)) for key in done}

    def _outputs(self, rows: list[Row]) -> dict[str, NDArray[Any]]:
        tokens = np.full((len(rows), WINDOW_TOKENS), -1, np.int64)
        for row, target in zip(rows, tokens, strict=True):
            target[: len(row.tokens)] = row.tokens
        TOKENS.labels(self._name).inc(sum(len(row.tokens) for row in rows))
        return {"tokens": tokens}

    def _remove(self, place: int) -> None:
        """A row, whose place the last one takes."""
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._cache.remove(place)


class BandTransformer(SteppedModel):
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

    def __init__(self, name: str, graph: Graph, facts: dict[str, str], max_batch: int) -> None:
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
        self._graph = graph
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

    def writer(self) -> BandWriter:
        """See `SteppedModel.writer`."""
        return BandWriter(self.name, self._graph, self._layers, self._channels)


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
    [tokens] = allowed.nonzero()
    scaled = logits[tokens].astype(np.float64) / options.temperature
    probability = np.exp(scaled - scaled.max())
    order = (-probability).argsort(kind="stable")
    reached = probability[order].cumsum()
    # The likeliest tokens up to the one with which their mass reaches top-p, that one included.
    size = int(reached.searchsorted(options.top_p * reached[-1])) + 1
    size = min(size, len(tokens))
    rank = int(reached[:size].searchsorted(uniform * reached[size - 1], side="right"))
    return int(tokens[order[min(rank, size - 1)]])


_ROW_INPUTS = ("history", "conditions", "first_bar", "seed", "temperature", "top_p")
_GIVEN_SPANS = tuple(SPANS[name] for name in ("chord", "chord", "density", "tracks"))


def _row(
    history: Ints,
    conditions: Ints,
    first_bar: Ints,
    seed: Ints,
    temperature: Floats,
    top_p: Floats,
) -> Row:
    """A row from its arrays.

    Raises:
        InvalidOption: a token out of its place, a temperature or a top-p that cannot be.
    """
    options = SampleOptions(float(temperature[0]), float(top_p[0]))
    if not (options.temperature > 0 and 0 < options.top_p <= 1):
        raise InvalidOption("temperature must be above 0, and top_p in (0, 1].")
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
    return Row(tokens, bars, int(first_bar[0]), int(seed[0]), options)


def _bar_conditions(given: list[int]) -> BarConditions:
    for token, (start, stop) in zip(given, _GIVEN_SPANS, strict=True):
        if not start <= token < stop:
            raise InvalidOption(f"conditions hold token {token}: send {start} to {stop - 1}.")
    first, second, density, tracks = (
        token - start for token, (start, _) in zip(given, _GIVEN_SPANS, strict=True)
    )
    return BarConditions((first, second), density, tracks)
