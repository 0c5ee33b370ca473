"""A report's pictures, as SVG that stands inside its page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Runs = Sequence[Mapping[str, Any]]

SIZE_INCHES = (7.0, 3.4)


def rates(runs: Runs, knee: Mapping[str, Any]) -> str:
    """Good answers over offered load: past the knee they must not collapse."""
    figure, axes = _figure("requests offered a second", "requests a second")
    around = [run for run in runs if "knee" in run["name"]]
    found = sorted(around, key=lambda run: float(run["offered_per_s"]))
    offered = [run["offered_per_s"] for run in found]
    axes.plot(offered, [run["good_per_s"] for run in found], "o-", label="good")
    axes.plot(offered, [run["completed_per_s"] for run in found], ".:", label="completed")
    axes.plot(offered, offered, color="0.8", label="offered")
    if knee["sustained_hz"]:
        axes.axvline(knee["sustained_hz"], color="0.5", linestyle="--", label="knee")
    return _svg(figure, axes)


def percentiles(runs: Runs) -> str:
    """Latency over percentile, on a scale that stretches the tail as HDR histograms do."""
    figure, axes = _figure("percentile", "latency, s")
    for run in runs:
        latencies = np.sort(_latencies(run)[0])
        if len(latencies):
            rank = 1 / (1 - np.arange(len(latencies)) / len(latencies))
            axes.step(rank, latencies, where="post", label=run["name"])
    ticks = [1, 2, 10, 100, 1000]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * (1 - 1 / tick):g} %" for tick in ticks])
    axes.set_xticks([], minor=True)
    return _svg(figure, axes)


def over_time(run: Mapping[str, Any]) -> str:
    """Each request's latency at its intended time, the unanswered ones marked."""
    figure, axes = _figure("intended time, s", "latency, s")
    latencies, times = _latencies(run)
    axes.plot(times, latencies, ".", label="answered")
    each = run["each"]
    failed = [
        at_s
        for at_s, status in zip(each["intended_s"], each["status"], strict=True)
        if status != "ok"
    ]
    axes.plot(failed, np.zeros(len(failed)), "rx", label="not answered as asked")
    return _svg(figure, axes)


def by_length(run: Mapping[str, Any]) -> str:
    """Latency over the song's length."""
    figure, axes = _figure("seconds of audio", "latency, s")
    axes.plot(run["each"]["audio_s"], run["each"]["latency_s"], "o", label=run["name"])
    return _svg(figure, axes)


def memory(processes: Mapping[str, Any]) -> str:
    """Memory of each process over time."""
    figure, axes = _figure("s", "anonymous memory, MB")
    for name, held in processes["of"].items():
        axes.plot(processes["at_s"], np.array(held["memory_bytes"]) / 1e6, label=name)
    return _svg(figure, axes)


def lag(runs: Runs, limit_s: float) -> str:
    """The generator's own lag, run by run."""
    figure, axes = _figure("run", "p99, ms")
    for kind, mark in (("send_lag_s", "o"), ("loop_lag_s", "x")):
        values = [run["generator"][kind].get("p99", np.nan) * 1e3 for run in runs]
        axes.plot(values, mark, label=kind.removesuffix("_lag_s"))
    axes.axhline(limit_s * 1e3, color="0.5", linestyle="--", label="limit")
    return _svg(figure, axes)


def _latencies(run: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    each = run["each"]
    kept = [
        (latency_s, at_s)
        for latency_s, at_s, status in zip(
            each["latency_s"], each["intended_s"], each["status"], strict=True
        )
        if status in ("ok", "timeout")
    ]
    return [latency_s for latency_s, _ in kept], [at_s for _, at_s in kept]


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, axes: Axes) -> str:
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", frameon=False)
    file = io.StringIO()
    # A salt of its own keeps the ids of one page's pictures apart, and the file the same each time.
    with mpl.rc_context({"svg.hashsalt": axes.get_xlabel() + axes.get_ylabel()}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
