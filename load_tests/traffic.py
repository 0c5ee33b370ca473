"""What is asked of a server: songs end to end, or windows of one model."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from load_tests.generator import Target, Work
from load_tests.grpc_target import GrpcTarget, song_file
from load_tests.http_targets import JobsTarget, RemixTarget, open_client, song_form
from load_tests.runner_target import RunnerTarget, inference, input_shapes, open_channel
from load_tests.songs import Recording, Song, cuts, lengths
from load_tests.windows import windows

END_TO_END = ("remix", "jobs", "grpc")

OPTIONS = {"seed": 1, "noise_seed": 1}
"""Of every remix: nothing but the song differs."""

WINDOWS = 16
"""Different windows that a runner is sent in turn."""


@dataclass(frozen=True)
class Traffic:
    """What is sent, and where to.

    Args:
        name: `remix`, `jobs` or the model's.
        target: of the requests.
        works: without end.
    """

    name: str
    target: Target
    works: Iterator[Work]

    def take(self, count: int) -> list[Work]:
        """The next few."""
        return list(itertools.islice(self.works, count))


@dataclass(frozen=True)
class Songs:
    """Which songs are sent.

    Args:
        sources: recordings that they are cut from.
        length_s: of each; none for lengths from 10 to 120 s.
        seed: of lengths and cuts.
        warm: whether one song is sent again and again, else none is.
    """

    sources: Sequence[Recording]
    length_s: float | None = None
    seed: int = 1
    warm: bool = False

    def works(self, encode: Callable[[Song], Work]) -> Iterator[Work]:
        """What is sent, without end; each song is cut and encoded when it is taken."""
        drawn = self._cold(encode)
        return itertools.repeat(next(drawn)) if self.warm else drawn

    def _cold(self, encode: Callable[[Song], Work]) -> Iterator[Work]:
        for number in itertools.count():
            seed = self.seed * 1_000_003 + number
            length_s = [self.length_s] if self.length_s else lengths(1, seed)
            for song in cuts(self.sources, length_s, seed):
                yield encode(song)


@dataclass(frozen=True)
class Door:
    """How whole songs go in.

    Args:
        kind: `remix`, `jobs`, or `grpc`, which is jobs too.
        address: URL of the server, or `host:port` of its gRPC.
        retries: whether a request that HTTP refuses comes again when it was told to.
        key: an API key, where the server wants one.
    """

    kind: str
    address: str
    retries: bool = False
    key: str = ""


@asynccontextmanager
async def end_to_end(door: Door, songs: Songs) -> AsyncIterator[Traffic]:
    """Whole songs, through a door."""
    if door.kind == "grpc":
        async with open_channel(door.address) as channel:
            target: Target = GrpcTarget(channel, OPTIONS, door.key)
            yield Traffic("grpc", target, songs.works(song_file))
        return
    async with open_client(door.address, door.key) as client:
        target = (JobsTarget if door.kind == "jobs" else RemixTarget)(client, retries=door.retries)
        yield Traffic(door.kind, target, songs.works(partial(song_form, options=OPTIONS)))


@asynccontextmanager
async def one_model(
    address: str, model: str, sample_rate_hz: int, source: Recording, seed: int
) -> AsyncIterator[Traffic]:
    """Windows of one model, one row each.

    Args:
        address: of its runner, `host:port` or `unix:path`.
        model: its name.
        sample_rate_hz: of its audio, as /v1/models says.
        source: that samples are cut from.
        seed: of the windows.
    """
    async with open_channel(address) as channel:
        shapes = await input_shapes(channel, model)
        drawn = windows(shapes, sample_rate_hz, source, seed)
        works = [inference(model, *window) for window in itertools.islice(drawn, WINDOWS)]
        yield Traffic(model, RunnerTarget(channel), itertools.cycle(works))


def models_of(url: str) -> list[dict[str, Any]]:
    """The models that a remix of this server uses, and the parts of its voices, by stage."""
    models = httpx.get(f"{url}/v1/models", timeout=10.0, trust_env=False).json()["models"]
    return [
        model
        for model in models
        if model["installed"]
        and (
            model["default"] or (model["stage"] == "convert_voice" and model["weights"] != "random")
        )
    ]
