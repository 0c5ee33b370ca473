"""Jobs are cancelled at random moments: their compute ends with the window, and no trace stays."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import httpx

from chaos.caller import ENDED, Piece
from chaos.commit_points import TABLES
from chaos.servers import Server
from chaos.store import SqliteStore
from chaos.world import JOBS, Outcome, World, await_that
from load_tests.processes import metrics_of

CANCELS = 50

RETENTION_S = 5.0

GONE_S = 60.0
"""From the last job's end until nothing is left of any: retention, a sweep, and some more."""

SILENT_S = 0.3
"""In which a window would begin that still waited for something."""

COMPUTING = "philharmonics_computing_windows"

WINDOWS = "philharmonics_windows_total"

COMPUTED = ('outcome="computed"', 'outcome="wasted"')


@dataclass(frozen=True)
class Compute:
    """What a runner computes now, and has computed."""

    now: float
    ever: float


def cancels(world: World) -> Iterator[Outcome]:
    """50 jobs are cancelled, each at a random moment of its life."""
    # Nothing is in a cache, so that every job has all of its windows to compute.
    settings = {
        "PHILHARMONICS_RETENTION_S": str(RETENTION_S),
        "PHILHARMONICS_CACHE_BYTES": "0",
    }
    server = world.composer(settings=settings)
    with world.running(server), httpx.Client(timeout=60.0, trust_env=False) as client:
        outcome = Outcome("50 cancels", "DELETE at a random moment")
        begin_s, rng = time.monotonic(), random.Random(world.seed)
        life_s = _life_s(client, server, world.pieces(900)[0])
        after_s, late, number = list[float](), 0, 0
        while len(after_s) < CANCELS:
            piece = world.pieces(1_000 + number // JOBS)[number % JOBS]
            number += 1
            path = _submit(client, server, piece)
            time.sleep(rng.uniform(0.0, life_s))
            state = client.delete(path).json().get("state")  # none: it was done, and is forgotten
            answered_s, before = time.monotonic(), _computes(world)
            if state != "cancelled":
                late += 1
                continue
            await_that(
                "nothing is computed", lambda: not any(c.now for c in _computes(world).values())
            )
            after_s.append(time.monotonic() - answered_s)
            time.sleep(SILENT_S)
            for stage, after in _computes(world).items():
                begun = after.ever + after.now - before[stage].ever - before[stage].now
                if begun > 0:
                    outcome.violations.append(
                        f"{piece.name}: {stage} began {begun:g} windows after the cancel"
                    )
        outcome.jobs, outcome.whole_s = number, time.monotonic() - begin_s
        outcome.facts = {
            "ended_before_the_cancel": late,
            "longest_until_nothing_is_computed_s": round(max(after_s), 3),
            "alone_s": round(life_s, 2),
        }
        outcome.ended_s = max(after_s)
        _leave_no_trace(server, outcome)
        yield outcome


def _submit(client: httpx.Client, server: Server, piece: Piece) -> str:
    path = f"{server.url}/v1/jobs/c-{piece.name}"
    form = {"options": json.dumps(piece.options)}
    client.put(path, files={"song": piece.song}, data=form).raise_for_status()
    return path


def _life_s(client: httpx.Client, server: Server, piece: Piece) -> float:
    """How long a job takes alone."""
    begin_s, path = time.monotonic(), _submit(client, server, piece)
    await_that("a job ends", lambda: client.get(path).json()["state"] in ENDED)
    return time.monotonic() - begin_s


def _computes(world: World) -> dict[str, Compute]:
    found = {}
    for stage, runner in world.runners.items():
        series = metrics_of(runner.url)
        now = sum(v for name, v in series.items() if name.startswith(COMPUTING))
        ever = sum(
            value
            for name, value in series.items()
            if name.startswith(WINDOWS) and any(outcome in name for outcome in COMPUTED)
        )
        found[stage] = Compute(now, ever)
    return found


def _is_idle(world: World) -> bool:
    return not any(compute.now for compute in _computes(world).values())


def _leave_no_trace(server: Server, outcome: Outcome) -> None:
    """Rows and files of all jobs are gone when their time is over."""
    data_dir = server.data_dir
    store = SqliteStore(data_dir / "jobs.db")

    def left() -> dict[str, int]:
        files = [path for path in (data_dir / "artifacts").rglob("*") if path.is_file()]
        counts = {
            table: store.rows(f"SELECT count(*) FROM {table}")[0][0]  # noqa: S608
            for table in TABLES
        }
        return {name: n for name, n in {**counts, "files": len(files)}.items() if n}

    with suppress(TimeoutError):
        await_that("no trace is left", lambda: not left(), GONE_S)
    if traces := left():
        outcome.violations.append(f"{GONE_S:g} s after the last job there are {traces}")
