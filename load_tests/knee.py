"""probes -> the knee: the highest rate that a server sustains.

Sustained means: at most 0.1 % errors, 99 % of the requests within the objective, and a queue that
does not grow (`runs.Result.failures`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

RAMP = 1.5
"""Each step of the ramp; the search then halves what lies between, on a logarithmic scale."""

Probe = Callable[[float], Awaitable[bool]]
"""A rate -> whether it is sustained."""


@dataclass(frozen=True)
class Knee:
    """Where the knee lies.

    Args:
        sustained_hz: the highest rate that was sustained; 0 if none was.
        failed_hz: the lowest rate above it that was not; infinite if none was tried.
        probes: how many rates were tried.
    """

    sustained_hz: float
    failed_hz: float
    probes: int


async def find_knee(
    probe: Probe, start_hz: float, *, tolerance: float = 0.1, max_probes: int = 10
) -> Knee:
    """Ramp geometrically until a rate fails (downwards, if the first does), then bisect.

    Args:
        probe: tries a rate.
        start_hz: the first one.
        tolerance: the bracket's width at the end, as a share of its lower rate.
        max_probes: the search ends after as many, with a wider bracket.
    """
    sustained, failed, probes, rate = 0.0, float("inf"), 0, start_hz
    while probes < max_probes and failed > sustained * (1 + tolerance):
        probes += 1
        if await probe(rate):
            sustained = rate
        else:
            failed = rate
        if failed == float("inf"):
            rate = sustained * RAMP
        elif sustained == 0:
            rate = failed / RAMP
        else:
            rate = (sustained * failed) ** 0.5
    return Knee(sustained, failed, probes)
