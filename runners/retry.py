"""When a call to a runner is made again, after how long, and how often.

Inference may be repeated: it changes nothing, and the same window has the same result. Why a call
ended decides:

    lost    the connection broke, the runner died, or it stops: again, when a runner answers, if
            it does within the patience; not more often than a window may kill its runner
    full    its queue takes no more: again after a pause, for as long as the caller waits
    slow    there was no answer within the window's time: once again

Whatever else a runner says is its answer. Repetitions draw on one budget, which first tries fill,
so that they cannot multiply an overload: at most a fifth of the calls, and a few a second besides,
lest a quiet service has none. A call that finds it empty waits; none fails for its sake.

While a runner is away only its watcher asks for it, once a second (`StageHealth`): calls that
were let in wait for what it finds, and whoever lets calls in refuses new ones by `is_away`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

from remix.errors import RemixError

Trouble = Literal["lost", "full", "slow"]

MAX_LOST = 5
"""Tries of one call that end with the connection: it may be the window that kills the runner."""

MAX_SLOW = 2

FIRST_PAUSE_S = 0.2

LONGEST_PAUSE_S = 5.0

PROBE_S = 1.0

AWAY_AFTER = 2
"""Probes that fail one after another before a runner counts as away; the first may be a hiccup."""


class RetryBudget:
    """Tokens for repetitions, shared by all calls of a process.

    Args:
        share: of a token, that each first try adds.
        least_per_s: tokens that come by themselves.
        most: tokens that are kept.
    """

    def __init__(self, share: float = 0.2, least_per_s: float = 5.0, most: float = 50.0) -> None:
        self._share = share
        self._least_per_s = least_per_s
        self._most = most
        self._tokens = most
        self._filled_s = time.monotonic()

    def earn(self) -> None:
        """A call is tried for the first time."""
        self._tokens = min(self._most, self._tokens + self._share)

    async def spend(self) -> None:
        """Wait for a token, and take it."""
        while not self._take():
            await asyncio.sleep(1.0 / self._least_per_s)

    def _take(self) -> bool:
        now_s = time.monotonic()
        by_themselves = (now_s - self._filled_s) * self._least_per_s
        self._tokens = min(self._most, self._tokens + by_themselves)
        self._filled_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class StageHealth:
    """Whether a stage's runner answers, by asking it every second, and at once when in doubt.

    Args:
        probe: asks; tells whether the runner is ready.
    """

    def __init__(self, probe: Callable[[], Awaitable[bool]]) -> None:
        self._probe = probe
        self._failures = AWAY_AFTER
        self._answers = asyncio.Event()
        self._doubted = asyncio.Event()

    @property
    def is_away(self) -> bool:
        """Whether several probes failed, one after another; True until the first one succeeds."""
        return self._failures >= AWAY_AFTER

    async def watch(self) -> None:
        """Probe, until cancelled."""
        while True:
            self._doubted.clear()
            if not await self._probe():
                self._failures += 1
                self._answers.clear()
            elif not self._doubted.is_set():  # else it may have died after it answered
                self._failures = 0
                self._answers.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await self._doubted.wait()

    def doubt(self) -> None:
        """A call was lost: believe in the runner again when it has answered anew."""
        self._answers.clear()
        self._doubted.set()

    async def answers(self) -> None:
        """Wait until the runner answers."""
        await self._answers.wait()


class Tries:
    """The tries of one call.

    Args:
        budget: that repetitions draw on.
        health: of the runner that is called.
        patience_s: how long a runner may be away, each time that it is.
    """

    def __init__(self, budget: RetryBudget, health: StageHealth, patience_s: float) -> None:
        self._budget = budget
        self._health = health
        self._patience_s = patience_s
        self._counts: dict[Trouble, int] = {"lost": 0, "full": 0, "slow": 0}
        budget.earn()

    async def again(self, trouble: Trouble, error: RemixError) -> None:
        """Return when the call is to be made again.

        Args:
            trouble: why the last try ended.
            error: what is raised if it is not made again.
        """
        self._counts[trouble] += 1
        if trouble == "lost":
            self._health.doubt()
            if self._counts["lost"] >= MAX_LOST or not await self._answers_in_time():
                raise error
        elif trouble == "slow" and self._counts["slow"] >= MAX_SLOW:
            raise error
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._counts[trouble] - 1))
        await asyncio.sleep(random.uniform(longest_s / 4, longest_s))
        await self._budget.spend()

    async def _answers_in_time(self) -> bool:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._health.answers()
        except TimeoutError:
            return False
        return True
