"""Our batcher against BentoML's, Ray Serve's and LitServe's: same model, same load.

    make bench-batchers [ROUNDS=5]

Four servers, each with one model on all cores and batches of at most 4, are asked in turn, round by
round, so that whatever else the machine does falls on all of them:

    lone        one request after another: what a request costs that nobody shares a batch with
    crowd       32 callers, each with its next request as soon as the last is answered
    stream      requests at times that are the same for all sides (Poisson, 60 % of what the slowest
                side did with the crowd); latency counts from these times
    bad         16 at once, one of which breaks its batch: how many of the 15 others fail with it
    left        32 at once, whose callers leave when the first is answered: how many are computed

Writes benchmarks/results/batchers.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.batchers.model import BAD, COUNT, MAX_BATCH, WAIT_S

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/batchers.json"

START_S = 240.0
CROWD = 32
LONE = 20
STREAM_SHARE = 0.6
QUIET_S = 2.0
"""So long nothing more may have been computed before it is said how much was."""


@dataclass(frozen=True)
class Side:
    """A server.

    Args:
        name: of it.
        command: that starts it; the port is added.
        packages: whose versions are told.
        body: of a request, from its number.
        read: the number in an answer.
    """

    name: str
    command: list[str]
    packages: tuple[str, ...]
    body: Callable[[int], Any] = lambda number: {"x": number}
    read: Callable[[Any], float] = lambda answer: float(answer["y"])


PYTHON = [sys.executable, "-m"]
SIDES = (
    Side("ours", [*PYTHON, "benchmarks.batchers.ours"], ()),
    Side(
        "BentoML batchable",
        [*PYTHON, "bentoml", "serve", "benchmarks.batchers.bento:Peer", "--port"],
        ("bentoml",),
        body=lambda number: {"x": [number]},
        read=lambda answer: float(answer[0]),
    ),
    Side("Ray Serve batch", [*PYTHON, "benchmarks.batchers.ray_serve"], ("ray",)),
    Side("LitServe", [*PYTHON, "benchmarks.batchers.lit"], ("litserve",)),
)


class Asked:
    """A side that runs.

    Args:
        side: which one.
        url: where.
    """

    def __init__(self, side: Side, url: str) -> None:
        self.side = side
        self.url = f"{url}/predict"
        self.lone_s: list[float] = []
        self.crowd_per_s: list[float] = []
        self.crowd_s: list[float] = []
        self.stream_s: list[float] = []
        self.failed_beside_bad: list[int] = []
        self.computed_after_leaving: list[int] = []
        self.errors = 0

    async def ask(self, http: httpx.AsyncClient, number: int) -> bool:
        """Whether a request is answered well."""
        answer = await http.post(self.url, json=self.side.body(number))
        return answer.status_code == 200

    async def computed(self, http: httpx.AsyncClient) -> int:
        """Rows so far."""
        answer = await http.post(self.url, json=self.side.body(COUNT))
        return round(self.side.read(answer.raise_for_status().json()))

    async def lone(self, http: httpx.AsyncClient) -> None:
        """One after another."""
        for number in range(LONE):
            start_s = time.perf_counter()
            self.errors += not await self.ask(http, number)
            self.lone_s.append(time.perf_counter() - start_s)

    async def crowd(self, http: httpx.AsyncClient, seconds: float) -> None:
        """Each caller's next request follows its last."""
        until_s, done = time.perf_counter() + seconds, 0

        async def caller(number: int) -> None:
            nonlocal done
            while time.perf_counter() < until_s:
                start_s = time.perf_counter()
                self.errors += not await self.ask(http, number)
                self.crowd_s.append(time.perf_counter() - start_s)
                done += 1

        start_s = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(CROWD)))
        self.crowd_per_s.append(done / (time.perf_counter() - start_s))

    async def stream(self, http: httpx.AsyncClient, at_s: list[float]) -> None:
        """At given times, whatever became of the others."""
        begin_s = time.perf_counter()

        async def one(number: int, due_s: float) -> None:
            await asyncio.sleep(begin_s + due_s - time.perf_counter())
            self.errors += not await self.ask(http, number)
            self.stream_s.append(time.perf_counter() - begin_s - due_s)

        await asyncio.gather(*(one(number, due_s) for number, due_s in enumerate(at_s)))

    async def bad(self, http: httpx.AsyncClient) -> None:
        """One of sixteen breaks its batch."""
        numbers = [*range(8), BAD, *range(8, 15)]
        good = await asyncio.gather(*(self.ask(http, number) for number in numbers))
        self.failed_beside_bad.append(15 - sum(good))

    async def left(self, http: httpx.AsyncClient) -> None:
        """All callers leave."""
        before = await self.computed(http)
        async with httpx.AsyncClient(timeout=None, limits=UNLIMITED, trust_env=False) as leaving:
            calls = [asyncio.create_task(self.ask(leaving, n)) for n in range(CROWD)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        last = await self.computed(http)
        while True:
            await asyncio.sleep(QUIET_S)
            if (now := await self.computed(http)) == last:
                break
            last = now
        self.computed_after_leaving.append(last - before)

    def figures(self) -> dict[str, Any]:
        """What was found."""
        return {
            "lone_p50_ms": _ms(self.lone_s, 50),
            "crowd_per_s": round(statistics.median(self.crowd_per_s), 2),
            "crowd_p50_ms": _ms(self.crowd_s, 50),
            "crowd_p99_ms": _ms(self.crowd_s, 99),
            "stream_p50_ms": _ms(self.stream_s, 50),
            "stream_p99_ms": _ms(self.stream_s, 99),
            "failed_beside_a_bad_one_of_15": self.failed_beside_bad,
            "computed_of_32_that_left": self.computed_after_leaving,
            "errors": self.errors,
            "crowd_per_s_by_round": [round(rate, 2) for rate in self.crowd_per_s],
        }


UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def _ms(times_s: list[float], percentile: float) -> float:
    return round(1000 * float(np.percentile(times_s, percentile, method="higher")), 1)


@contextmanager
def running(side: Side) -> Iterator[Asked]:
    """A side's server, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (ROOT / f".cache/batchers-{side.name.split()[0]}.log").open("w")
    process = subprocess.Popen(
        [*side.command, str(port)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0",
             "RAY_SERVE_ENABLE_HA_PROXY": "0"},
    )  # fmt: skip
    try:
        asked = Asked(side, f"http://127.0.0.1:{port}")
        until_s = time.monotonic() + START_S
        while True:
            with suppress(httpx.HTTPError, ValueError):
                if httpx.post(asked.url, json=side.body(0), timeout=10.0).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"{side.name} did not start: see {log.name}")
            time.sleep(0.5)
        yield asked
    finally:
        # Some start processes in sessions of their own, and leave them.
        family: list[Any] = [process]
        with suppress(psutil.NoSuchProcess):
            family += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        log.close()


async def measure(sides: list[Asked], rounds: int, seconds: float) -> None:
    """All of it, in turn."""
    rng = np.random.default_rng(0)
    async with httpx.AsyncClient(timeout=None, limits=UNLIMITED, trust_env=False) as http:
        for number in range(rounds):
            for side in sides:
                await side.lone(http)
            for side in sides:
                await side.crowd(http, seconds)
            rate_hz = STREAM_SHARE * min(side.crowd_per_s[-1] for side in sides)
            gaps_s = rng.exponential(1 / rate_hz, round(rate_hz * seconds))
            for side in sides:
                await side.stream(http, np.cumsum(gaps_s).tolist())
            for side in sides:
                await side.bad(http)
                await side.left(http)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.batchers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a crowd, and of a stream")
    options = parser.parse_args()
    load_before = [round(load, 1) for load in os.getloadavg()]
    with ExitStack() as stack:
        sides = [stack.enter_context(running(side)) for side in SIDES]
        asyncio.run(measure(sides, options.rounds, options.seconds))
    result = {
        "what": "Basic Pitch on windows, one model on all cores, batches of at most "
        f"{MAX_BATCH}, those who wait for company wait {1000 * WAIT_S:g} ms",
        "rounds": options.rounds,
        "seconds": options.seconds,
        "versions": {name: version(name) for side in SIDES for name in side.packages},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": load_before,
        },
        "sides": {asked.side.name: asked.figures() for asked in sides},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
