"""samples of the server's processes -> what grew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from load_tests.figures import percentile
from load_tests.processes import Holding, Sample

WARM_UP_SHARE = 0.1
"""Of the samples, left out: what is loaded and cached once is not growth."""

LEVEL_SHARE = 0.1
"""Of the samples: the level at the beginning and at the end is their median."""

FIELDS = ("processes", "memory_bytes", "threads", "files")


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """What each process held, and by how much that grew after the warm-up.

    Returns:
        `at_s` and, for each name, the series of every field, and `grew`: the end's level over the
        beginning's, less one. A service that was away in between (a fault) is 0 there.
    """
    names = sorted({name for sample in samples for name in sample.holdings})
    found: dict[str, Any] = {"at_s": [round(sample.at_s, 2) for sample in samples], "of": {}}
    for name in names:
        holdings = [
            asdict(sample.holdings.get(name, Holding(0, 0, 0, 0, 0.0))) for sample in samples
        ]
        series = {field: [holding[field] for holding in holdings] for field in FIELDS}
        found["of"][name] = {
            **series,
            "cpu_s": round(max(holding["cpu_s"] for holding in holdings), 2),
            "grew": {field: grew(values) for field, values in series.items()},
        }
    counts = [sample.series for sample in samples if sample.series is not None]
    if counts:
        found["metric_series"] = {"counts": counts, "grew": grew(counts)}
    return found


def grew(values: Sequence[float]) -> float | None:
    """The level at the end over that after the warm-up, less one; none of too few values.

    >>> grew([5, 10, 10, 10, 10, 10, 10, 10, 10, 11])
    0.1
    """
    counted = values[int(len(values) * WARM_UP_SHARE) :]
    size = max(1, int(len(counted) * LEVEL_SHARE))
    if len(counted) < 4 * size:
        return None
    level: Callable[[Sequence[float]], float] = lambda some: percentile(some, 50)  # noqa: E731
    first = level(counted[:size])
    return round(level(counted[-size:]) / first - 1, 4) if first else None
