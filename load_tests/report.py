"""A measurement -> load.json and load.html: one page, nothing to fetch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from load_tests import plots
from load_tests.generator import MAX_LAG_S

Report = Mapping[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } .no { color: #a00; font-weight: 600 }
svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
"""


@dataclass(frozen=True)
class Check:
    """A bound that issue or operator asks for, and whether it holds.

    Args:
        what: is bounded.
        value: as measured.
        bound: in words.
        holds: whether.
    """

    what: str
    value: str
    bound: str
    holds: bool


def checks(report: Report) -> Iterator[Check]:
    """The bounds that a whole measurement is held to."""
    runs = {run["name"]: run for run in report["runs"]}
    late = [run["name"] for run in report["runs"] if not run["generator"]["is_valid"]]
    yield Check(
        "the generator's lag",
        f"{len(late)} of {len(runs)} runs invalid" + (f": {', '.join(late)}" if late else ""),
        f"p99 below {MAX_LAG_S * 1e3:g} ms in every run",
        not late,
    )
    if (at_knee := runs.get("1 times the knee")) and (past := runs.get("3 times the knee")):
        share = past["good_per_s"] / max(at_knee["good_per_s"], 1e-9)
        yield Check(
            "goodput at 3 times the knee", f"{share:.0%}", "90 % of the knee's", share >= 0.9
        )
    if (below := runs.get("0.8 times the knee")) and below["latency_s"]:
        spread = below["latency_s"]["p99"] / below["latency_s"]["p50"]
        yield Check("p99 at 0.8 times the knee", f"{spread:.2f} medians", "3 medians", spread <= 3)
    if report["skipped"]:
        yield Check("runs left out", ", ".join(report["skipped"]), "none", False)


def write(folder: Path, report: Report) -> tuple[Path, Path]:
    """Write both files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "load.json", folder / "load.html"
    complete = {**report, "checks": [vars(check) for check in checks(report)]}
    data.write_text(json.dumps(complete, indent=1) + "\n")
    page.write_text(html(complete))
    return data, page


def html(report: Report) -> str:
    """The page."""
    facts, runs = report["environment"], report["runs"]
    machine = facts["machine"]
    parts = [
        "<h1>Load test</h1>",
        f"<p>{escape(facts['at'])}, commit {escape(facts['commit'][:12])}"
        f"{' with changed files' if facts['changed_files'] else ''}; {escape(machine['cpu'])}, "
        f"{machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; load before "
        f"{machine['busy_before']}. It took {report['took_s'] / 60:.1f} minutes.</p>",
        "<p>Latency counts from the time at which a request was due. Percentiles are values that "
        "occurred: of fewer than 100 requests the 99th is the slowest. Good: answered within "
        f"{report['plan']['objective']['a_s']:g} s + {report['plan']['objective']['b']:g} s for "
        "each second of audio (windows of a runner: 1 s + 0.5 s).</p>",
        _table(
            ["", "measured", "bound", "holds"],
            [[c["what"], c["value"], c["bound"], _yes(c["holds"])] for c in report["checks"]],
        ),
    ]
    if report["knee"]:
        parts += ["<h2>The knee</h2>", _knee(report), _picture(plots.rates(runs, report["knee"]))]
    parts += ["<h2>Runs</h2>", _runs(runs)]
    songs = [run for run in runs if run["target"] in ("remix", "jobs")]
    if songs:
        parts += [_picture(plots.percentiles([run for run in songs if "probe" not in run["name"]]))]
    for run in songs:
        if run["name"] == "faults" or run["settings"].get("faults"):
            parts += [
                "<h2>Faults</h2>",
                "<p>What stood still or died, and how long the requests that were due noticed.</p>",
                _picture(plots.over_time(run)),
            ]
        if run["scenario"] == "offline":
            parts += ["<h2>Lengths</h2>", _picture(plots.by_length(run))]
    parts += ["<h2>Where the time went</h2>", _server_says(runs), _metrics(runs)]
    if report["processes"]:
        parts += ["<h2>The server's processes</h2>", _processes(report["processes"])]
        parts += [_picture(plots.memory(report["processes"]))]
    parts += ["<h2>The generator</h2>", _picture(plots.lag(runs, MAX_LAG_S))]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts += [f"<p>{escape(versions)}.</p>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _knee(report: Report) -> str:
    knee = report["knee"]
    failed = f"{knee['failed_hz']:.3f}/s was not" if knee["failed_hz"] else "no rate was not"
    found = (
        f"{knee['sustained_hz']:.3f} songs a second were sustained, {failed}"
        if knee["sustained_hz"]
        else f"No rate was sustained; the runs below refer to {knee['reference_hz']:.3f}/s"
    )
    return (
        f"<p>{found} ({knee['probes']} probes, songs of {report['plan']['song_s']:g} s). The "
        f"offline rate is {knee['offline_hz']:.3f}/s.</p>"
    )


def _runs(runs: Sequence[Report]) -> str:
    rows = []
    for run in runs:
        latency = run["latency_s"]
        codes = {**run["statuses"]}
        codes.pop("ok", None)
        rows.append([
            run["name"], run["requests"], f"{run['offered_per_s']:.3g}",
            f"{run['completed_per_s']:.3g}", f"{run['good_per_s']:.3g}",
            f"{run['audio_s_per_s']:.3g}",
            *(f"{latency[key]:.3f}" if latency else "" for key in ("p50", "p90", "p99", "max")),
            "" if run["cached_share"] is None else f"{run['cached_share']:.0%}",
            ", ".join(f"{count} {code}" for code, count in codes.items()),
            "yes" if run["is_steady"] else "no",
            "" if run["generator"]["is_valid"] else "INVALID",
        ])  # fmt: skip
    return _table(
        ["run", "requests", "offered/s", "completed/s", "good/s", "audio s/s", "p50 s", "p90 s",
         "p99 s", "max s", "cached", "refused or failed", "steady", ""],
        rows,
    )  # fmt: skip


def _server_says(runs: Sequence[Report]) -> str:
    rows = [
        [run["name"], name, *(f"{values[key]:.4g}" for key in ("p50", "p90", "p99", "max"))]
        for run in runs
        if "probe" not in run["name"]
        for name, values in run["server_says"].items()
    ]
    table = _table(["run", "", "p50", "p90", "p99", "max"], rows)
    return f"<details><summary>What the server says of each answer</summary>{table}</details>"


def _metrics(runs: Sequence[Report]) -> str:
    rows = [
        [run["name"], name, f"{value:g}"]
        for run in runs
        for name, value in sorted(run.get("metrics", {}).items())
    ]
    table = _table(["run", "counted by the server", ""], rows)
    return f"<details><summary>The server's own counters</summary>{table}</details>"


def _processes(processes: Report) -> str:
    rows = []
    for name, held in processes["of"].items():
        grown = held["grew"]
        rows.append([
            name, f"{max(held['memory_bytes']) / 1e6:.0f}", _share(grown["memory_bytes"]),
            max(held["files"]), _share(grown["files"]), max(held["threads"]),
            _share(grown["threads"]), f"{held['cpu_s']:.1f}",
        ])  # fmt: skip
    return _table(
        ["", "memory, peak MB", "grew", "files", "grew", "threads", "grew", "CPU s"], rows
    )


def _share(grown: float | None) -> str:
    return "" if grown is None else f"{grown:+.1%}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cells(values: Sequence[object], tag: str) -> str:
        mark = {"NO": ' class="no"', "INVALID": ' class="no"'}
        return "".join(f"<{tag}{mark.get(str(v), '')}>{escape(str(v))}</{tag}>" for v in values)

    lines = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>\n{lines}</table>"


def _picture(svg: str) -> str:
    return f"<figure>{svg}</figure>"
