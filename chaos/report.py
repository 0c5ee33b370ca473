"""Outcomes -> a table for who waits, and JSON for who counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.world import Outcome

COLUMNS = (
    ("scenario", 40), ("jobs", 5), ("again", 6), ("back s", 8), ("ended s", 8),
    ("whole s", 8), ("calm s", 7),
)  # fmt: skip

LEGEND = """\
again: jobs begun more than once; back: from the fault until what was struck served again;
ended: from the fault until the last job had ended; whole: from the first submission; calm: the
same jobs, undisturbed"""


def head() -> str:
    """The table's first line."""
    return "".join(f"{title:>{width}}" if n else f"{title:{width}}"
                   for n, (title, width) in enumerate(COLUMNS))  # fmt: skip


def line(outcome: Outcome) -> str:
    """A scenario in a line, and one for each violation."""
    values = (
        outcome.jobs, outcome.again, outcome.back_s, outcome.ended_s, outcome.whole_s,
        outcome.calm_s,
    )  # fmt: skip
    cells = [f"{outcome.name:{COLUMNS[0][1]}}"]
    for value, (_, width) in zip(values, COLUMNS[1:], strict=True):
        text = "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
        cells.append(f"{text:>{width}}")
    verdict = "VIOLATED" if outcome.violations else "ok"
    return "\n".join(["".join(cells) + f"  {verdict}"] + [f"    {v}" for v in outcome.violations])


def write(
    folder: Path, facts: dict[str, Any], outcomes: Sequence[Outcome], took_s: float
) -> tuple[Path, Path]:
    """`chaos.json` and `chaos.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table = folder / "chaos.json", folder / "chaos.txt"
    report = {
        "environment": facts,
        "took_s": round(took_s, 1),
        "violations": sum(len(outcome.violations) for outcome in outcomes),
        "scenarios": [asdict(outcome) for outcome in outcomes],
    }
    data.write_text(json.dumps(report, indent=2))
    table.write_text("\n".join([head(), *map(line, outcomes), LEGEND, ""]))
    return data, table
