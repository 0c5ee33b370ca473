"""samples -> percentiles, intervals, and whether a run was steady.

Percentiles come from the list of all latencies, not from a histogram: a run has at most some ten
thousand requests, a list of them is exact, small, and keeps the order that the intervals need. (An
HDR histogram holds 3 digits in constant memory; that is for millions of requests.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""[R, N] -> [R], along the last axis."""

RESAMPLES = 2_000

AT_ONCE = 100
"""Resamples in memory at once: 8 MB for 10,000 samples."""

AGREE = 0.10
"""Two windows whose medians differ by less agree in any case."""

PERCENTILES = (50, 90, 95, 99)


def percentile(values: ArrayLike, percent: float) -> float:
    """The smallest value that at least `percent` % of all do not exceed.

    No interpolation: with fewer than 100 values the 99th percentile is the maximum.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0], 99)
    (2.0, 4.0)
    """
    return float(np.percentile(np.asarray(values), percent, method="inverted_cdf"))


def percentile_of_rows(percent: float) -> Statistic:
    """`percentile`, as a statistic of resamples."""
    return lambda rows: np.percentile(rows, percent, axis=-1, method="inverted_cdf")


def mean_of_rows(rows: Floats) -> Floats:
    """The mean, as a statistic of resamples."""
    return np.asarray(rows.mean(axis=-1))


def bootstrap(values: ArrayLike, statistic: Statistic, seed: int) -> Floats:
    """A statistic of `RESAMPLES` resamples of a series: [R].

    Neighbours in a queue have similar latencies, and independent draws would take the series for
    more certain than it is. So blocks of `ceil(N^(1/3))` neighbours are drawn, around the end too.

    Args:
        values: [N], in the order of their times.
        statistic: of each resample.
        seed: of the draws.

    Source: Politis and Romano 1992, A circular block-resampling procedure for stationary data;
    the block's length after Hall, Horowitz and Jing 1995.
    """
    series = np.asarray(values, np.float64)
    size = len(series)
    block = int(np.ceil(size ** (1 / 3)))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES // AT_ONCE):
        starts = rng.integers(0, size, (AT_ONCE, -(-size // block), 1))
        places = (starts + np.arange(block)).reshape(AT_ONCE, -1)[:, :size] % size
        found.append(statistic(series[places]))
    return np.concatenate(found)


def interval(draws: Floats, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of some draws."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def windows_agree(first: Sequence[float], second: Sequence[float], seed: int = 0) -> bool:
    """Whether two consecutive windows have the same median latency, as far as can be told.

    They do if the medians differ by less than 10 %, or if their ratio's 95 % interval holds 1.
    """
    if not first or not second:
        return False
    ratio = percentile(second, 50) / percentile(first, 50)
    if abs(ratio - 1) < AGREE:
        return True
    median = percentile_of_rows(50)
    low, high = interval(bootstrap(second, median, seed) / bootstrap(first, median, seed + 1), 0.95)
    return low <= 1 <= high


def is_queue_flat(begins_s: Sequence[float], ends_s: Sequence[float], within_s: float) -> bool:
    """Whether what is under way does not grow over a run: the queue is bounded.

    The line through the numbers under way rises by at most 3, or by at most their mean.

    Args:
        begins_s: when each request was due.
        ends_s: when each was answered.
        within_s: length of the run; both are counted from its start.
    """
    times = np.linspace(0, within_s, 201)
    begun = np.searchsorted(np.sort(begins_s), times, side="right")
    ended = np.searchsorted(np.sort(ends_s), times, side="right")
    under_way = begun - ended
    slope = np.polyfit(times, under_way, 1)[0]
    return bool(slope * within_s <= max(3.0, float(under_way.mean())))
