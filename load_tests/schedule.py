"""rate, seed -> when each request is to be sent: made beforehand, so that no answer changes it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Arrivals = Literal["poisson", "constant"]


def poisson(rate_hz: float, duration_s: float, seed: int) -> NDArray[np.float64]:
    """Send times of independent callers: exponential gaps of mean `1 / rate_hz`.

    Args:
        rate_hz: requests a second, above 0.
        duration_s: of the schedule.
        seed: the same seed gives the same times.

    Returns:
        [N], ascending, in [0, duration_s), in seconds.

    Source: MLPerf Inference LoadGen, scenario Server.

    >>> bool((poisson(5, 60, seed=1) == poisson(5, 60, seed=1)).all())
    True
    """
    rng = np.random.default_rng(seed)
    # 6 standard deviations above the mean: with fewer than one in 10^8 schedules is it too short.
    draws = int(rate_hz * duration_s + 6 * np.sqrt(rate_hz * duration_s) + 20)
    times = np.cumsum(rng.exponential(1 / rate_hz, draws))
    return times[times < duration_s]


def constant(rate_hz: float, duration_s: float) -> NDArray[np.float64]:
    """Send times with equal gaps, the first at 0: [ceil(rate_hz * duration_s)].

    >>> constant(2, 2).tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    return np.arange(int(np.ceil(rate_hz * duration_s - 1e-9))) / rate_hz


def arrivals(kind: Arrivals, rate_hz: float, duration_s: float, seed: int) -> NDArray[np.float64]:
    """Send times of either kind."""
    if kind == "constant":
        return constant(rate_hz, duration_s)
    return poisson(rate_hz, duration_s, seed)
