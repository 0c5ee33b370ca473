"""A run: what is asked of whom, how often, for how long; and what is said of it afterwards.

The scenarios are those of MLPerf Inference's LoadGen:

    single_stream    one request after the other             latency at the 90th percentile
    server           Poisson arrivals                        the highest rate within the objective
    offline          everything is there at the start        throughput

with fewer requests than LoadGen's rules demand (its minimum is 10 minutes and 270,336 queries for
Server): the intervals that `load_tests.compare` draws say what that leaves open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from load_tests.figures import PERCENTILES, is_queue_flat, percentile, windows_agree
from load_tests.generator import (
    NOT_SENT,
    TIMEOUT,
    Event,
    Lag,
    Record,
    Run,
    Target,
    Work,
    closed_loop,
    open_loop,
)
from load_tests.schedule import Arrivals, arrivals

MAX_ERROR_SHARE = 0.001

LATE_SHARE = 0.01
"""Of the requests may be later than the objective: it holds for the 99th percentile."""

WARM_UP_SHARE = 0.2
"""Of an open run's measured time, before it: sent, and left out of every figure."""

IN_FLIGHT = 256
"""Unanswered requests at once in an open run: far more than a server should let in."""

PATIENCE = 1.5
"""A request is given up after so many times its limit."""

LENGTH_EDGES_S = (20.0, 45.0, 90.0)
"""Part the songs by length in the figures."""


@dataclass(frozen=True)
class Objective:
    """How long an answer may take: a + b times the seconds of audio.

    >>> Objective(5.0, 0.5).limit_s(30.0)
    20.0
    """

    a_s: float
    b: float

    def limit_s(self, audio_s: float) -> float:
        """For a request about so many seconds of audio."""
        return self.a_s + self.b * audio_s

    def patience_s(self, audio_s: float) -> float:
        """After which a request is given up."""
        return PATIENCE * self.limit_s(audio_s)


@dataclass(frozen=True)
class Load:
    """An open run.

    Args:
        rate_hz: requests a second.
        measured_s: what counts, in two windows; the warm-up comes before it.
        arrivals: Poisson or constant.
        seed: of the schedule.
        in_flight: bound on unanswered requests.
    """

    rate_hz: float
    measured_s: float
    arrivals: Arrivals = "poisson"
    seed: int = 1
    in_flight: int = IN_FLIGHT

    @property
    def warm_up_s(self) -> float:
        """Before what counts."""
        return WARM_UP_SHARE * self.measured_s


@dataclass(frozen=True)
class Result:
    """A run and what belongs to its understanding.

    Args:
        name: of the run, the same in reports that are to be compared.
        scenario: `single_stream`, `server` or `offline`.
        target: what was asked: `remix`, `jobs` or a model's name.
        settings: rate, seeds, in-flight bound.
        objective: what good means.
        records: of the measured time.
        warm_up_s: when the measured time begins.
        end_s: when it ends.
        lag: of the generator, the whole run.
    """

    name: str
    scenario: str
    target: str
    settings: Mapping[str, Any]
    objective: Objective
    records: Sequence[Record]
    warm_up_s: float
    end_s: float
    lag: Lag

    @property
    def measured_s(self) -> float:
        """How long was measured."""
        return self.end_s - self.warm_up_s

    @property
    def error_share(self) -> float:
        """Requests that were not answered as asked, among all that were due."""
        return sum(not record.is_ok for record in self.records) / max(1, len(self.records))

    @property
    def latencies_s(self) -> list[float]:
        """Of what was answered, and of what was given up: at least so long."""
        return [r.latency_s for r in self.records if r.is_ok or r.answer.status == TIMEOUT]

    @property
    def is_within_objective(self) -> bool:
        """Whether 99 % of the requests were answered within their limits."""
        missed = sum(not is_good(record, self.objective) for record in self.records)
        return missed <= LATE_SHARE * len(self.records)

    @property
    def is_queue_flat(self) -> bool:
        """See `figures.is_queue_flat`."""
        return is_queue_flat(
            [record.intended_s - self.warm_up_s for record in self.records],
            [record.done_s - self.warm_up_s for record in self.records],
            self.measured_s,
        )

    @property
    def is_steady(self) -> bool:
        """Whether the measured time's two halves agree and the queue is flat."""
        middle_s = (self.warm_up_s + self.end_s) / 2
        first = [r.latency_s for r in self.records if r.is_ok and r.intended_s < middle_s]
        second = [r.latency_s for r in self.records if r.is_ok and r.intended_s >= middle_s]
        return windows_agree(first, second) and self.is_queue_flat

    def failures(self) -> list[str]:
        """Why the server does not sustain this load; none if it does."""
        found = []
        if self.error_share > MAX_ERROR_SHARE:
            found.append(f"{self.error_share:.1%} errors")
        if self.scenario != "server":
            return found
        if not self.is_within_objective:
            found.append("p99 above the objective")
        if not self.is_queue_flat:
            found.append("the queue grows")
        return found


def is_good(record: Record, objective: Objective) -> bool:
    """Whether a request was answered within its limit."""
    return record.is_ok and record.latency_s <= objective.limit_s(record.audio_s)


async def server(
    name: str,
    target: Target,
    target_name: str,
    load: Load,
    works: Iterator[Work],
    objective: Objective,
    *,
    events: Sequence[Event] = (),
    stops_when_lost: bool = False,
) -> Result:
    """An open run; its requests are made before it.

    Args:
        name: of the run.
        target: where to.
        target_name: what it is called.
        load: how much.
        works: what is sent.
        objective: what good means.
        events: faults.
        stops_when_lost: whether the run ends as soon as it is sure not to be sustained.
    """
    end_s = load.warm_up_s + load.measured_s
    times = arrivals(load.arrivals, load.rate_hz, end_s, load.seed)
    plan = [(float(at_s), next(works)) for at_s in times]
    may_miss = LATE_SHARE * sum(at_s >= load.warm_up_s for at_s in times)
    missed = 0

    def lost(record: Record) -> bool:
        nonlocal missed
        counts = record.intended_s >= load.warm_up_s
        missed += counts and not is_good(record, objective)
        return stops_when_lost and missed > may_miss

    run = await open_loop(
        target,
        plan,
        in_flight=load.in_flight,
        patience_s=objective.patience_s,
        events=events,
        stops=lost,
    )
    measured = [record for record in run.records if record.intended_s >= load.warm_up_s]
    settings = {**asdict(load), "stopped_early": run.stopped_s is not None}
    if run.stopped_s is not None:
        end_s = min(end_s, run.stopped_s)
    return Result(
        name, "server", target_name, settings, objective, measured, load.warm_up_s, end_s, run.lag
    )


async def single_stream(
    name: str,
    target: Target,
    target_name: str,
    works: Sequence[Work],
    objective: Objective,
    for_s: float,
) -> Result:
    """One after the other, the first one left out."""
    run = await closed_loop(
        target, works, in_flight=1, for_s=for_s, patience_s=objective.patience_s
    )
    counted = run.records[1:] or run.records
    return _closed(name, "single_stream", target_name, {"for_s": for_s}, objective, counted, run)


async def offline(
    name: str,
    target: Target,
    target_name: str,
    works: Sequence[Work],
    objective: Objective,
    in_flight: int,
) -> Result:
    """Everything at once, or as much of it as `in_flight` allows."""
    patience_s: Callable[[float], float] = lambda audio_s: (  # noqa: E731
        len(works) * objective.patience_s(audio_s)
    )
    run = await closed_loop(
        target, works, in_flight=in_flight, for_s=float("inf"), patience_s=patience_s
    )
    settings = {"requests": len(works), "in_flight": in_flight}
    return _closed(name, "offline", target_name, settings, objective, run.records, run)


def _closed(
    name: str,
    scenario: str,
    target_name: str,
    settings: Mapping[str, Any],
    objective: Objective,
    records: Sequence[Record],
    run: Run,
) -> Result:
    begin_s = records[0].intended_s
    end_s = max(record.done_s for record in records)
    return Result(
        name, scenario, target_name, settings, objective, records, begin_s, end_s, run.lag
    )


def summary(result: Result) -> dict[str, Any]:
    """A run as the report has it, every request included."""
    records, latencies = result.records, result.latencies_s
    completed = [record for record in records if record.is_ok]
    good = [record for record in records if is_good(record, result.objective)]
    seconds = result.measured_s
    statuses = Counter(record.answer.status for record in records)
    refusals = Counter(code for record in records for code in record.answer.refusals)
    return {
        "name": result.name,
        "scenario": result.scenario,
        "target": result.target,
        "settings": dict(result.settings),
        "objective": asdict(result.objective),
        "measured_s": round(seconds, 3),
        "requests": len(records),
        "not_sent": statuses[NOT_SENT],
        "statuses": dict(statuses),
        "refusals_before_an_answer": dict(refusals),
        "offered_per_s": round(len(records) / seconds, 4),
        "completed_per_s": round(len(completed) / seconds, 4),
        "good_per_s": round(len(good) / seconds, 4),
        "audio_s_per_s": round(sum(record.audio_s for record in completed) / seconds, 3),
        "latency_s": distribution(latencies),
        "first_byte_s": distribution(
            [r.answer.first_s for r in completed if r.answer.first_s is not None]
        ),
        "by_length": _by_length(result),
        "cached_share": _cached_share(completed),
        "server_says": _server_says(completed),
        "failures": result.failures(),
        "is_steady": result.is_steady,
        "generator": {
            "is_valid": result.lag.is_valid,
            "send_lag_s": distribution(result.lag.send_s),
            "loop_lag_s": distribution(result.lag.loop_s),
        },
        "each": {
            "intended_s": [round(record.intended_s, 4) for record in records],
            "latency_s": [round(record.latency_s, 4) for record in records],
            "audio_s": [record.audio_s for record in records],
            "status": [record.answer.status for record in records],
        },
    }


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Percentiles and maximum; empty of nothing."""
    if not values:
        return {}
    found = {f"p{percent}": round(percentile(values, percent), 5) for percent in PERCENTILES}
    return {**found, "max": round(max(values), 5)}


def _by_length(result: Result) -> dict[str, dict[str, Any]]:
    bounds = (0.0, *LENGTH_EDGES_S, float("inf"))
    found: dict[str, dict[str, Any]] = {}
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = [r for r in result.records if low <= r.audio_s < high]
        if inside:
            found[f"{low:g} to {high:g} s"] = {
                "requests": len(inside),
                "good": sum(is_good(record, result.objective) for record in inside),
                "latency_s": distribution([r.latency_s for r in inside if r.is_ok]),
            }
    return found


def _server_says(completed: Sequence[Record]) -> dict[str, dict[str, float]]:
    names = sorted({name for record in completed for name in record.answer.parts})
    return {
        name: distribution([r.answer.parts[name] for r in completed if name in r.answer.parts])
        for name in names
    }


def _cached_share(completed: Sequence[Record]) -> float | None:
    """Of all windows, those that a cache had; none where the server says nothing of them."""
    said = [item for record in completed for item in record.answer.parts.items()]
    computed = sum(value for name, value in said if name.endswith(" windows"))
    cached = sum(value for name, value in said if name.endswith(" cached"))
    return round(cached / (computed + cached), 4) if computed + cached else None
