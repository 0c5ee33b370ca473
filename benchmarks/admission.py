"""Five times more jobs than can be done: what is refused, how fast, and who gets the rest.

    python -m benchmarks.admission [--seconds 60] [--song-s 10]

The real service with the real models, keys on, no cache. First its capacity: jobs of 10 s songs,
always some of them waiting. Then an open loop at five times that, four of five requests by one key:
goodput, how long refusals take (from the first byte sent to the answer), what each key got, memory.
At last a runner is stopped (SIGSTOP, so that it hangs): how soon it is noticed, and how long
refusals take then. Writes benchmarks/results/admission.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.remix import ROOT, song_of
from client.local_server import local_server
from jobs.database import Database, open_database
from jobs.keys import KeyStore
from load_tests.generator import go_first

RESULT = ROOT / "benchmarks/results/admission.json"

OVERLOAD = 5
MANY_OF_FIVE = 4
WAITING = 8
"""Jobs that may wait: a few, so that the queue is full within seconds."""

CAPACITY_S = 40.0
PROBES, PROBE_EVERY_S = 100, 0.05
NOTICE_S = 60.0

SEEDS = count()


@dataclass
class Answers:
    """What was answered to one key.

    Args:
        refused_s: seconds that each 429 took.
        accepted: ids of the jobs.
        others: how often which other status came.
    """

    refused_s: list[float] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    others: Counter[int] = field(default_factory=Counter)


class Caller:
    """One key, and what it was answered."""

    def __init__(self, http: httpx.AsyncClient, key: str, song: bytes) -> None:
        self.answers = Answers()
        self._http = http
        self._headers = {"Authorization": f"Bearer {key}"}
        self._song = song

    async def submit(self) -> int:
        """A job; the status of the answer."""
        # Each with a seed of its own: a second job for the same result would be given the first's.
        options = json.dumps({"seed": next(SEEDS)})
        start_s = time.perf_counter()
        answer = await self._http.post(
            "/v1/jobs",
            files={"song": ("song.wav", self._song)},
            data={"options": options},
            headers=self._headers,
        )
        took_s = time.perf_counter() - start_s
        if answer.status_code == 429:
            self.answers.refused_s.append(took_s)
        elif answer.status_code == 202:
            self.answers.accepted.append(answer.json()["id"])
        else:
            self.answers.others[answer.status_code] += 1
        return answer.status_code

    async def jobs(self) -> list[dict[str, Any]]:
        """Every job of the key."""
        found: list[dict[str, Any]] = []
        parameters: dict[str, Any] = {"page_size": 200}
        while True:
            page = await self._http.get("/v1/jobs", params=parameters, headers=self._headers)
            page.raise_for_status()
            found += page.json()["jobs"]
            parameters["page_token"] = page.json()["next_page_token"]
            if parameters["page_token"] is None:
                return found

    async def done_s(self, start_s: float, end_s: float) -> list[float]:
        """When jobs were done in that time, by the server's clock."""
        jobs = [job for job in await self.jobs() if job["state"] == "done"]
        return sorted(job["ended_s"] for job in jobs if start_s <= job["ended_s"] < end_s)

    async def cancel_all(self) -> None:
        """Leave nothing to do."""
        for job in await self.jobs():
            if job["state"] in {"queued", "running"}:
                await self._http.delete(f"/v1/jobs/{job['id']}", headers=self._headers)


async def capacity(caller: Caller) -> float:
    """Jobs a second while there are always some to do."""
    began_s = time.time()
    while time.time() < began_s + CAPACITY_S:
        jobs = await caller.jobs()
        if sum(job["state"] == "queued" for job in jobs) < 2:
            await caller.submit()
        else:
            await asyncio.sleep(0.1)
    done_s = await caller.done_s(began_s, time.time())
    await caller.cancel_all()
    return rate_of(done_s)


def rate_of(done_s: list[float]) -> float:
    """Jobs a second from the first that was done to the last."""
    return (len(done_s) - 1) / (done_s[-1] - done_s[0])


async def overload(callers: list[Caller], rate: float, seconds: float) -> dict[str, Any]:
    """Submit so many a second, whatever is answered; what came of it."""
    rng = random.Random(1)
    begin_s, began_s = time.perf_counter(), time.time()
    at_s, late_s, tasks = 0.0, [], []
    memory = [memory_mb()]
    while at_s < seconds:
        at_s += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
        late_s.append(time.perf_counter() - begin_s - at_s)
        caller = callers[0] if rng.randrange(OVERLOAD) < MANY_OF_FIVE else callers[1]
        tasks.append(asyncio.create_task(caller.submit()))
        if len(tasks) % 50 == 0:
            memory.append(memory_mb())
    await asyncio.gather(*tasks)
    memory.append(memory_mb())
    done_s = [await caller.done_s(began_s, began_s + seconds) for caller in callers]
    refused_s = sorted(s for caller in callers for s in caller.answers.refused_s)
    return {
        "offered": len(tasks),
        "accepted": [len(caller.answers.accepted) for caller in callers],
        "refused": len(refused_s),
        "other_answers": dict(sum((c.answers.others for c in callers), Counter[int]())),
        "done_by_key": [len(each) for each in done_s],
        "done_per_s": round(rate_of(sorted(chain(*done_s))), 4),
        "refusal_ms": percentiles_ms(refused_s),
        "generator_late_ms": percentiles_ms(late_s),
        "memory_mb": memory,
    }


async def hang(caller: Caller) -> dict[str, Any]:
    """Stop a runner; how soon and how fast requests are refused."""
    runner = next(p for p in server_processes() if "GenerateNotes" in p.cmdline())
    runner.send_signal(signal.SIGSTOP)
    try:
        stopped_s = time.perf_counter()
        while await caller.submit() != 503:
            if time.perf_counter() - stopped_s > NOTICE_S:
                return {"noticed_after_s": None}
            await asyncio.sleep(PROBE_EVERY_S)
        noticed_s = time.perf_counter() - stopped_s
        took_s = []
        for _ in range(PROBES):
            start_s = time.perf_counter()
            status = await caller.submit()
            if status == 503:
                took_s.append(time.perf_counter() - start_s)
            await asyncio.sleep(PROBE_EVERY_S)
        return {
            "noticed_after_s": round(noticed_s, 2),
            "refused": len(took_s),
            "refusal_ms": percentiles_ms(took_s),
        }
    finally:
        runner.send_signal(signal.SIGCONT)


def server_processes() -> list[psutil.Process]:
    """Those that were started from here."""
    found: list[psutil.Process] = psutil.Process().children(recursive=True)
    return found


def memory_mb() -> int:
    """What they hold that is theirs alone."""
    total = 0
    for process in server_processes():
        try:
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return round(total / 1e6)


def percentiles_ms(took_s: list[float]) -> dict[str, float]:
    """The median, the 99th and the longest."""
    if len(took_s) < 2:
        return {}
    cuts = statistics.quantiles(took_s, n=100, method="inclusive")
    figures = {"p50": cuts[49], "p99": cuts[98], "max": max(took_s)}
    return {name: round(1e3 * value, 1) for name, value in figures.items()}


@contextmanager
def keys_in(folder: Path) -> Iterator[dict[str, str]]:
    """Two keys in a new database; the service that is started in the block uses it."""
    os.environ.update(
        PHILHARMONICS_DATA_DIR=str(folder),
        PHILHARMONICS_KEYS="on",
        PHILHARMONICS_CACHE_BYTES="0",
        PHILHARMONICS_MAX_WAITING_JOBS=str(WAITING),
    )
    database = Database(open_database(f"sqlite:///{folder / 'jobs.db'}"))

    async def make() -> dict[str, str]:
        store = KeyStore(database)
        return {n: (await store.add(n, ["remix"], 10**6, 10**6))[0] for n in ("many", "few")}

    try:
        yield asyncio.run(make())
    finally:
        database.close()


async def measure(url: str, keys: dict[str, str], song: bytes, seconds: float) -> dict[str, Any]:
    """All of it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as http:
        first = Caller(http, keys["many"], song)
        per_s = await capacity(first)
        print(f"capacity: {per_s:.3f} jobs a second")
        callers = [Caller(http, keys[name], song) for name in ("many", "few")]
        loaded = await overload(callers, OVERLOAD * per_s, seconds)
        print(json.dumps(loaded))
        for caller in callers:
            await caller.cancel_all()
        hung = await hang(callers[0])
        for caller in callers:
            await caller.cancel_all()
    many, few = loaded["done_by_key"]
    return {
        "capacity_per_s": round(per_s, 4),
        "goodput_of_capacity": round(loaded["done_per_s"] / per_s, 3),
        "share_of_the_key_with_a_fifth_of_the_requests": round(few / max(1, many + few), 3),
        "overload": loaded,
        "hung_runner": hung,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--song-s", type=float, default=10.0)
    arguments = parser.parse_args()
    song = song_of(arguments.song_s, ROOT / ".cache").read_bytes()
    load_before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(prefix="philharmonics-") as folder,
        keys_in(Path(folder)) as keys,
        local_server(notify=print) as url,
    ):
        go_first()
        figures = asyncio.run(measure(url, keys, song, arguments.seconds))
    result = {
        "benchmark": "admission",
        "command": f"python -m benchmarks.admission --seconds {arguments.seconds:.0f} "
        f"--song-s {arguments.song_s:.0f}",
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, cpu",
        "load_average_before": round(load_before, 1),
        **figures,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
