"""Two reports -> better, worse or noise, run by run.

    python -m load_tests all --out before
    python -m load_tests all --out after --like before/load.json    (the same rates again)
    python -m load_tests.compare before/load.json after/load.json

A figure is better or worse if the 99 % interval of its ratio, after / before, lies wholly beyond
2 %; else it is noise. The intervals are of a block bootstrap over each run's requests. They know
nothing of what differs from one start of a server to the next: repeat what matters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from load_tests.figures import (
    Floats,
    Statistic,
    bootstrap,
    interval,
    mean_of_rows,
    percentile_of_rows,
)

Verdict = Literal["better", "worse", "noise"]

CONFIDENCE = 0.99

SMALLEST = 0.02
"""Changes below are noise whatever the interval says."""

SAME_RATE = 0.01

FEWEST: Mapping[str, int] = {"p50": 8, "p90": 30, "p99": 300}
"""Requests below which a percentile is left out: it would rest on fewer than three of them."""


@dataclass(frozen=True)
class Change:
    """One figure of one run, in two reports.

    Args:
        run: its name.
        figure: which.
        ratio: after / before.
        low: of the ratio's interval.
        high: of the ratio's interval.
        verdict: what follows.
    """

    run: str
    figure: str
    ratio: float
    low: float
    high: float
    verdict: Verdict

    def __str__(self) -> str:
        """A line."""
        change, low, high = ((value - 1) * 100 for value in (self.ratio, self.low, self.high))
        return (
            f"{self.run:28} {self.figure:12} {change:+7.1f} % "
            f"[{low:+6.1f}, {high:+6.1f}]  {self.verdict}"
        )


def change(
    run: str, figure: str, before: Floats, after: Floats, statistic: Statistic, *, seed: int = 0
) -> Change:
    """Compare a statistic of two series of which less is better."""
    draws = bootstrap(after, statistic, seed + 1) / bootstrap(before, statistic, seed)
    low, high = interval(draws, CONFIDENCE)
    ratio = float(statistic(after[None])[0] / statistic(before[None])[0])
    verdict: Verdict = "noise"
    if low > 1 + SMALLEST:
        verdict = "worse"
    elif high < 1 - SMALLEST:
        verdict = "better"
    return Change(run, figure, ratio, low, high, verdict)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Every figure of the runs that both reports have, at one rate, by a generator in time."""
    runs = {run["name"]: run for run in after["runs"]}
    for run in before["runs"]:
        other = runs.get(run["name"])
        if other and _are_comparable(run, other):
            yield from _compare_runs(run, other)
    if before.get("knee") and after.get("knee"):
        yield _compare_knees(before["knee"], after["knee"])


def _are_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether only the server differs: twice the rate is another run (`all --like`)."""
    valid = all(run["generator"]["is_valid"] for run in (before, after))
    one, two = (run["settings"].get("rate_hz", 1.0) for run in (before, after))
    return valid and abs(one / two - 1) < SAME_RATE


def _compare_runs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    name = before["name"]
    one, two = _latencies(before), _latencies(after)
    for figure, fewest in FEWEST.items():
        if min(len(one), len(two)) >= fewest:
            yield change(name, figure, one, two, percentile_of_rows(float(figure[1:])))
    if before["scenario"] == "offline":
        gaps = [_gaps(run) for run in (before, after)]
        if min(map(len, gaps)) >= FEWEST["p50"]:
            yield change(name, "s each", gaps[0], gaps[1], mean_of_rows)


def _latencies(run: Mapping[str, Any]) -> Floats:
    each = run["each"]
    answered = [
        latency_s
        for latency_s, status in zip(each["latency_s"], each["status"], strict=True)
        if status in ("ok", "timeout")
    ]
    return np.array(answered, np.float64)


def _gaps(run: Mapping[str, Any]) -> Floats:
    """Between answers: their mean is the inverse of the throughput."""
    each = run["each"]
    ends = np.sort(np.add(each["intended_s"], each["latency_s"]))
    return np.diff(ends, prepend=min(each["intended_s"]))


def _compare_knees(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    """By their brackets: only where these are apart is one better."""
    verdict: Verdict = "noise"
    if after["sustained_hz"] >= (before["failed_hz"] or np.inf):
        verdict = "better"
    elif (after["failed_hz"] or np.inf) <= before["sustained_hz"]:
        verdict = "worse"
    least = 1e-9  # a knee that was not found is 0
    return Change(
        "knee",
        "rate",
        after["sustained_hz"] / max(before["sustained_hz"], least),
        after["sustained_hz"] / (before["failed_hz"] or np.inf),
        (after["failed_hz"] or np.inf) / max(before["sustained_hz"], least),
        verdict,
    )


def main() -> int:
    """Print each change; exit status 1 if anything is worse."""
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="load.json of the one")
    parser.add_argument("after", type=Path, help="load.json of the other")
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in (arguments.before, arguments.after)]
    if reports[0]["environment"]["machine"]["cpu"] != reports[1]["environment"]["machine"]["cpu"]:
        print("These are of two kinds of machine: what differs may be theirs.")
    changes = list(compare(*reports))
    for one in changes:
        print(one)
    if not changes:
        print("The reports have no valid run in common with requests enough to compare.")
    return int(any(one.verdict == "worse" for one in changes))


if __name__ == "__main__":
    sys.exit(main())
