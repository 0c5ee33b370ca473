"""`make load`: everything that can be measured of this machine's server within a time.

    each runner     single_stream, offline, and server at 0.7 times the offline rate
    songs           single_stream cold and warm; offline over lengths from 10 to 120 s
    the knee        for songs of 30 s
    around it       0.5, 0.8, 1, 1.5 and 3 times the knee
    faults          at half the knee: the composer stopped for 6 s, then a runner killed

What the time does not suffice for is named in the report.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from load_tests.environment import environment
from load_tests.generator import Event
from load_tests.growth import growth
from load_tests.knee import Knee, find_knee
from load_tests.own_server import OwnServer
from load_tests.processes import difference, faults, metrics_of, processes_of, watching
from load_tests.runs import (
    WARM_UP_SHARE,
    Load,
    Objective,
    Result,
    offline,
    server,
    single_stream,
    summary,
)
from load_tests.songs import LONGEST_S
from load_tests.traffic import (
    Door,
    Songs,
    Traffic,
    end_to_end,
    models_of,
    one_model,
)

MULTIPLES = (0.5, 0.8, 1.0, 1.5, 3.0)

RUNNER_OBJECTIVE = Objective(1.0, 0.5)
"""For windows of one model."""

RUNNER_SHARE_OF_TIME = 0.25
"""Seconds of a run of one model for each minute of the whole: there are three for each model."""

RUNNER_IN_FLIGHT = 16
"""Windows under way in its offline run: several batches."""

RUNNER_RATE = 0.7
"""Of a runner's offline rate: that of its server run."""

FIRST_SHARE = 0.6
"""Of the offline rate: the search for the knee begins there."""

MAX_PROBES = 5

FAULTS_RUN_SHARE = 1.5
"""The run with faults is longer than another."""

STOP_S = 6.0

DRAIN_SHARE_OF_TIME = 0.8
"""Seconds for each minute of the whole that a run takes beyond its schedule: the last answers."""

COMPOSER, KILLED = "remix", "SeparateStems"
"""Services that the faults hit, by BentoML's names."""

Measure = Callable[[], Awaitable[Result]]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        minutes: for everything, the server's start included.
        songs: of the knee; other lengths are taken where it says so.
        objective: for a song.
        kind: `remix` or `jobs`.
        in_flight: songs at once in the offline scenario.
        seed: of every schedule.
        like: a report whose rates are used again, so that the two can be compared.
    """

    minutes: float
    songs: Songs
    objective: Objective
    kind: str
    in_flight: int
    seed: int
    like: Mapping[str, Any] | None = None


@dataclass
class Whole:
    """A measurement in progress."""

    server: OwnServer
    plan: Plan
    begin_s: float
    runs: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    knee: dict[str, Any] | None = None

    @property
    def left_s(self) -> float:
        """Of the time."""
        return self.begin_s + self.plan.minutes * 60 - time.monotonic()

    @property
    def drain_s(self) -> float:
        """What a run takes beyond its schedule, about."""
        return DRAIN_SHARE_OF_TIME * self.plan.minutes

    async def measure(self, name: str, needs_s: float, run: Measure) -> Result | None:
        """Do a run and keep its summary; unless it would not end in time."""
        if needs_s > self.left_s:
            self.skipped.append(name)
            return None
        before = metrics_of(self.server.url)
        result = await run()
        counted = difference(before, metrics_of(self.server.url))
        self.runs.append({**summary(result), "metrics": counted})
        print(line(self.runs[-1]), flush=True)
        return result

    def rate_hz(self, name: str, rate_hz: float) -> float:
        """The rate of a run: as it was in the report that this one is to be like."""
        for run in (self.plan.like or {}).get("runs", ()):
            if run["name"] == name:
                return float(run["settings"]["rate_hz"])
        return rate_hz

    def songs(self, kind: str = "", **changes: Any) -> AbstractAsyncContextManager[Traffic]:
        """Traffic of whole songs, other ones for each run."""
        kind = kind or self.plan.kind
        address = self.server.grpc if kind == "grpc" else self.server.url
        seed = self.plan.songs.seed * 1_000 + len(self.runs)
        return end_to_end(Door(kind, address), replace(self.plan.songs, seed=seed, **changes))


async def whole(own: OwnServer, plan: Plan, begin_s: float) -> dict[str, Any]:
    """Measure everything; the report."""
    state = Whole(own, plan, begin_s)
    facts = environment()
    with watching(own.pid, own.url, series=False) as watch:
        for model in models_of(own.url):
            await _runner(state, model)
        offline_hz = await _songs(state)
        if offline_hz is None:
            state.skipped.append("the knee")
        else:
            await _knee(state, offline_hz)
    return {
        "environment": facts,
        "server": {"start_s": round(own.start_s, 2), "target": plan.kind},
        "plan": {
            "minutes": plan.minutes,
            "seed": plan.seed,
            "song_s": plan.songs.length_s,
            "objective": {"a_s": plan.objective.a_s, "b": plan.objective.b},
        },
        "took_s": round(time.monotonic() - begin_s, 1),
        "runs": state.runs,
        "skipped": state.skipped,
        "knee": state.knee,
        "processes": growth(watch.samples),
    }


async def _runner(state: Whole, model: Mapping[str, Any]) -> None:
    name, seed, run_s = model["name"], state.plan.seed, RUNNER_SHARE_OF_TIME * state.plan.minutes
    address = state.server.runner(model["stage"])
    source = state.plan.songs.sources[0]
    async with one_model(address, name, model["sample_rate_hz"], source, seed) as traffic:
        works = traffic.take(10_000)
        alone = await state.measure(
            f"{name} single_stream",
            2 * run_s,
            lambda: single_stream(
                f"{name} single_stream", traffic.target, name, works, RUNNER_OBJECTIVE, run_s
            ),
        )
        if alone is None:
            return
        together = await state.measure(
            f"{name} offline",
            2 * run_s,
            lambda: offline(
                f"{name} offline",
                traffic.target,
                name,
                works[: max(8, int(len(alone.records) / alone.measured_s * run_s))],
                RUNNER_OBJECTIVE,
                RUNNER_IN_FLIGHT,
            ),
        )
        if together is None:
            return
        rate_hz = RUNNER_RATE * len(together.records) / together.measured_s
        load = Load(state.rate_hz(f"{name} server", rate_hz), 1.5 * run_s, seed=seed)
        await state.measure(
            f"{name} server",
            3 * run_s,
            lambda: server(
                f"{name} server", traffic.target, name, load, traffic.works, RUNNER_OBJECTIVE
            ),
        )


async def _songs(state: Whole) -> float | None:
    """Songs cold, warm and over gRPC; the offline rate, in songs of the knee's length a second."""
    plan = state.plan
    for title, kind, warm, count in (
        ("songs cold", plan.kind, False, 5),
        ("songs warm", plan.kind, True, 5),
        ("songs grpc", "grpc", False, 3),
    ):
        await _alone(state, f"{title} single_stream", kind, count, warm=warm)
    async with state.songs(length_s=None) as traffic:
        works = traffic.take(6)
        result = await state.measure(
            "songs offline",
            4.0 * plan.minutes,
            lambda: offline(
                "songs offline",
                traffic.target,
                traffic.name,
                works,
                plan.objective,
                plan.in_flight,
            ),
        )
    if result is None:
        return None
    audio_s = sum(record.audio_s for record in result.records if record.is_ok)
    return audio_s / result.measured_s / (plan.songs.length_s or 30.0)


async def _alone(state: Whole, name: str, kind: str, count: int, *, warm: bool) -> None:
    plan = state.plan
    async with state.songs(kind, warm=warm) as traffic:
        works = traffic.take(count)
        await state.measure(
            name,
            4.0 * plan.minutes,
            lambda: single_stream(
                name, traffic.target, traffic.name, works, plan.objective, 3.0 * plan.minutes
            ),
        )


async def _knee(state: Whole, offline_hz: float) -> None:
    """The knee, and the runs around it, in what is left of the time."""
    plan = state.plan
    runs = MAX_PROBES + len(MULTIPLES) + FAULTS_RUN_SHARE
    # Past the knee some are waited for until patience ends.
    past = sum(multiple > 1 for multiple in MULTIPLES)
    waits_s = past * plan.objective.patience_s(plan.songs.length_s or LONGEST_S)
    measured_s = ((state.left_s - waits_s) / runs - state.drain_s) / (1 + WARM_UP_SHARE)

    async def probe(rate_hz: float) -> bool:
        result = await _at_rate(state, f"probe {rate_hz:.4g}/s", rate_hz, measured_s, stops=True)
        return result is not None and not result.failures()

    knee = await find_knee(probe, FIRST_SHARE * offline_hz, tolerance=0.15, max_probes=MAX_PROBES)
    reference_hz = knee.sustained_hz or offline_hz / 2
    state.knee = _knee_facts(knee, reference_hz, offline_hz)
    for multiple in MULTIPLES:
        name = f"{multiple:g} times the knee"
        await _at_rate(state, name, state.rate_hz(name, multiple * reference_hz), measured_s)
    await _at_rate(
        state,
        "faults",
        state.rate_hz("faults", reference_hz / 2),
        FAULTS_RUN_SHARE * measured_s,
        events=_faults(state.server.pid, FAULTS_RUN_SHARE * measured_s),
    )


async def _at_rate(
    state: Whole,
    name: str,
    rate_hz: float,
    measured_s: float,
    *,
    stops: bool = False,
    events: list[Event] | None = None,
) -> Result | None:
    plan = state.plan
    load = Load(rate_hz, measured_s, seed=plan.seed)
    async with state.songs() as traffic:
        return await state.measure(
            name,
            (1 + WARM_UP_SHARE) * measured_s + state.drain_s,
            lambda: server(
                name,
                traffic.target,
                traffic.name,
                load,
                traffic.works,
                plan.objective,
                events=events or (),
                stops_when_lost=stops,
            ),
        )


def _faults(pid: int, measured_s: float) -> list[Event]:
    """A stop early in the measured time, a kill in its second half."""
    pids = {process.name: process.pid for process in processes_of(pid)}
    return [
        *faults(pids[COMPOSER], "stop", 0.4 * measured_s, STOP_S),
        *faults(pids[KILLED], "kill", 0.8 * measured_s),
    ]


def _knee_facts(knee: Knee, reference_hz: float, offline_hz: float) -> dict[str, Any]:
    return {
        "sustained_hz": round(knee.sustained_hz, 5),
        "failed_hz": None if knee.failed_hz == float("inf") else round(knee.failed_hz, 5),
        "probes": knee.probes,
        "reference_hz": round(reference_hz, 5),
        "offline_hz": round(offline_hz, 5),
    }


def line(run: Mapping[str, Any]) -> str:
    """A run in a line, for whoever waits."""
    latency = run["latency_s"]
    times = f"p50 {latency['p50']:.3f} s, p99 {latency['p99']:.3f} s" if latency else "no answer"
    valid = "" if run["generator"]["is_valid"] else "  INVALID: the generator was late"
    why = f"  ({', '.join(run['failures'])})" if run["failures"] else ""
    return (
        f"{run['name']:36} {run['requests']:5} requests, {run['good_per_s']:.3f} good/s, "
        f"{times}{why}{valid}"
    )
