"""The quote against the truth: what `POST /v1/quote` foretells, and what the jobs then took.

    python -m benchmarks.quote [--fit] [--songs 12] [--bursts 3]

The real service with the real models and no cache; songs of 10 to 60 s, of random lengths. First
one after the other on an idle server, then bursts of four at once, of which two run and two wait:
each is quoted just before it is submitted. The error is |quoted - taken| / taken, of the seconds
until the job is done. A quote knows the jobs before it; the ones that come after it, it cannot.

--fit measures as many other songs first, fits `jobs/cost_model.json` to them, and starts the
service anew with it. Writes benchmarks/results/quote.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import soundfile

from benchmarks.remix import ROOT
from client.local_server import local_server
from export.demo_song import write_demo_song
from jobs.estimate import MODEL_FILE, fit_line
from remix.audio import Audio
from remix.audio_codec import encode
from remix.stages import STAGES

RESULT = ROOT / "benchmarks/results/quote.json"

SHORTEST_S, LONGEST_S = 10.0, 60.0
BURST = 4
PAIRS = 3


class Songs:
    """The demo song, turned to a random place, over and over, cut to a random length.

    Args:
        seed: of the places and lengths.
    """

    def __init__(self, seed: int) -> None:
        cache = ROOT / ".cache"
        write_demo_song(cache / "demo_song.mp3", cache / "sources")
        self._samples, self._rate_hz = soundfile.read(
            cache / "demo_song.mp3", dtype="float32", always_2d=True
        )
        self._rng = random.Random(seed)

    def next(self) -> tuple[float, bytes]:
        """Seconds, and a WAV file."""
        duration_s = round(self._rng.uniform(SHORTEST_S, LONGEST_S), 2)
        frames = round(duration_s * self._rate_hz)
        turned = np.roll(self._samples, self._rng.randrange(len(self._samples)), axis=0)
        tiled = np.tile(turned, (-(-frames // len(turned)), 1))[:frames]
        sound = Audio(np.ascontiguousarray(tiled.T), self._rate_hz)
        return duration_s, encode(sound, "wav16")


async def quoted_job(http: httpx.AsyncClient, duration_s: float, song: bytes) -> dict[str, Any]:
    """A quote, then the job, to its end."""
    answer = await http.post("/v1/quote", json={"duration_s": duration_s})
    quote = answer.raise_for_status().json()
    start_s = time.perf_counter()
    answer = await http.post("/v1/jobs", files={"song": ("song.wav", song)})
    job = answer.raise_for_status().json()
    async with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        async for _ in events.aiter_lines():
            pass
    took_s = time.perf_counter() - start_s
    job = (await http.get(f"/v1/jobs/{job['id']}")).raise_for_status().json()
    assert job["state"] == "done", job
    return {
        "duration_s": duration_s,
        "quoted_s": quote["done_in_s"],
        "took_s": round(took_s, 2),
        "error": round(abs(quote["done_in_s"] - took_s) / took_s, 3),
        "job": job,
    }


async def measure(url: str, songs: Songs, count: int, bursts: int) -> dict[str, Any]:
    """Single ones, then bursts."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as http:
        await quoted_job(http, *songs.next())  # what is loaded once, is
        alone = [shown(await quoted_job(http, *songs.next())) for _ in range(count)]
        together = []
        for _ in range(bursts):
            # Submitted a moment apart, so that each is quoted with those before it at work.
            tasks = []
            for song in [songs.next() for _ in range(BURST)]:
                tasks.append(asyncio.create_task(quoted_job(http, *song)))
                await asyncio.sleep(2.0)
            together += [shown(job) for job in await asyncio.gather(*tasks)]
    return {
        "alone": summary(alone),
        "first_of_alone_error": alone[0]["error"],
        "bursts_of_four": summary(together),
        "jobs": {"alone": alone, "bursts_of_four": together},
    }


async def fit(url: str, songs: Songs, count: int) -> dict[str, Any]:
    """The cost model of this machine, as `jobs/cost_model.json` has it."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as http:
        await quoted_job(http, *songs.next())
        rows = [await quoted_job(http, *songs.next()) for _ in range(count)]
        stages: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
        for row in rows:
            report = await http.get(f"/v1/jobs/{row['job']['id']}/artifacts/report.json")
            times = report.raise_for_status().json()["times"]["stages"]
            for stage in STAGES:
                stages[stage].append((row["duration_s"], times[stage]["compute_s"]))
        gains = []
        for _ in range(PAIRS):
            (first_s, first), (second_s, second) = songs.next(), songs.next()
            one = await quoted_job(http, first_s, first)
            other = await quoted_job(http, second_s, second)
            start_s = time.perf_counter()
            # With a seed of their own: else they would be given what was just made.
            await asyncio.gather(
                *(seeded(http, song, seed) for seed, song in enumerate((first, second), 1))
            )
            both_s = time.perf_counter() - start_s
            gains.append((one["took_s"] + other["took_s"]) / both_s)
    return {
        "machine": machine(),
        "stages": {stage: vars(fit_line(points)) for stage, points in stages.items()},
        "alone": vars(fit_line([(row["duration_s"], row["took_s"]) for row in rows])),
        "gain": round(min(2.0, max(1.0, statistics.median(gains))), 2),
    }


async def seeded(http: httpx.AsyncClient, song: bytes, seed: int) -> None:
    """A job with a seed, to its end."""
    options = {"options": json.dumps({"seed": seed})}
    answer = await http.post("/v1/jobs", files={"song": ("song.wav", song)}, data=options)
    path = f"/v1/jobs/{answer.raise_for_status().json()['id']}/events"
    async with http.stream("GET", path) as events:
        async for _ in events.aiter_lines():
            pass


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Without the job, and printed."""
    kept = {name: value for name, value in row.items() if name != "job"}
    print(json.dumps(kept), flush=True)
    return kept


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the errors."""
    errors = sorted(row["error"] for row in rows)
    return {
        "jobs": len(errors),
        "median_error": round(statistics.median(errors), 3),
        "largest_error": errors[-1],
    }


def machine() -> str:
    """In words."""
    name = platform.processor() or platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, cpu"


@contextmanager
def server() -> Iterator[str]:
    """One of our own, with nothing in its cache."""
    with tempfile.TemporaryDirectory(prefix="philharmonics-") as folder:
        os.environ.update(PHILHARMONICS_DATA_DIR=folder, PHILHARMONICS_CACHE_BYTES="0")
        with local_server(notify=print) as url:
            yield url


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--songs", type=int, default=12)
    parser.add_argument("--bursts", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.fit:
        with server() as url:
            model = asyncio.run(fit(url, Songs(seed=1), arguments.songs))
        MODEL_FILE.write_text(json.dumps(model, indent=2) + "\n")
        print(json.dumps(model, indent=2))
    load_before = os.getloadavg()[0]
    with server() as url:
        figures = asyncio.run(measure(url, Songs(seed=2), arguments.songs, arguments.bursts))
    result = {
        "benchmark": "quote",
        "command": f"python -m benchmarks.quote{' --fit' if arguments.fit else ''} "
        f"--songs {arguments.songs} --bursts {arguments.bursts}",
        "machine": machine(),
        "load_average_before": round(load_before, 1),
        "model": json.loads(MODEL_FILE.read_text()),
        **figures,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "jobs"}, indent=2))


if __name__ == "__main__":
    main()
