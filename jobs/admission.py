"""What is refused before a request is read: there is no room, or a runner is away.

Nothing here waits for a runner: who is away is known from probes that go on all the time, and who
is inside is counted. Everything that waits is bounded:

    what waits                  its bound                                  beyond it
    jobs, in all composers      Settings.max_waiting_jobs                  429
    jobs of a key that wait     the places that are left                   429
    jobs of a key               its jobs_at_once                           429
    requests of a key           its rate, a minute's at once               429
    songs in requests           Settings.max_remixes, none waits           429
    calls of single stages      STAGE_CALLS_PER_REMIX x max_remixes        429
    uploads                     UPLOADS_PER_REMIX x max_remixes            429
    windows of a song           a few ahead in each stage (`remix/`)       the stage before waits
    windows in a runner         Settings.max_queue_rows of a model         the song waits
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jobs.door import ANYBODY, Caller
from jobs.forecast import Forecast
from remix.errors import QueueFull, RunnerUnavailable
from remix.stages import Stage

REMEMBERED = 15
"""Stays from whose median it is told when the next one will be over."""

LEAST_WAIT_S = 1.0
"""What is promised to whom the figures promise less."""


class Slots:
    """So many requests at once; the next one is refused, not queued.

    Args:
        limit: requests at once.
        what: their name, for the refusal.
        clock: seconds, from anywhere.
    """

    def __init__(self, limit: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._what = what
        self._clock = clock
        self._since_s: list[float] = []
        self._stays_s: deque[float] = deque(maxlen=REMEMBERED)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            QueueFull: none is free.
        """
        self.check()
        since_s = self._clock()
        self._since_s.append(since_s)
        try:
            yield
        finally:
            self._since_s.remove(since_s)
            self._stays_s.append(self._clock() - since_s)

    def check(self) -> None:
        """Refuse what `hold` would.

        Raises:
            QueueFull: none is free. It tells when one will be, if this stay is as long as the
                last ones.
        """
        taken = len(self._since_s)
        if taken < self._limit:
            return
        retry_after_s = None
        if self._stays_s:
            left_s = statistics.median(self._stays_s) - (self._clock() - self._since_s[0])
            retry_after_s = max(LEAST_WAIT_S, left_s)
        raise QueueFull(
            f"{taken} {self._what} are running, and this service runs at most "
            f"{self._limit} at once.",
            value=taken,
            limit=self._limit,
            remedy="Try again when Retry-After has passed.",
            retry_after_s=retry_after_s,
        )


def check_runners(needed: Sequence[Stage], away: Sequence[Stage]) -> None:
    """Refuse what a runner that is away is needed for.

    Raises:
        RunnerUnavailable: at least one is.
    """
    missing = [stage for stage in needed if stage in away]
    if missing:
        raise RunnerUnavailable(
            f"The runner {' and '.join(missing)} does not answer; it is needed.",
            value=missing,
            limit="ready",
            remedy="Try again when GET /readyz answers 200.",
        )


def check_room(
    caller: Caller, arriving: Mapping[str, int], expected: Forecast, max_waiting: int
) -> None:
    """Refuse a job where as many wait as may, or too many of one key.

    A key may have a job more waiting while it has fewer than places are left: so one alone gets
    half of the queue, the next one half of the rest, and whoever comes late finds room.

    Args:
        caller: who asks.
        arriving: how many jobs of each owner are being submitted: their places are taken. Without
            them all who come while a song is decoded would find its place free.
        expected: of every job.
        max_waiting: jobs.

    Raises:
        QueueFull: it tells when the first of them will begin.

    Source: A. K. Choudhury, E. L. Hahne, "Dynamic queue length thresholds for shared-memory packet
    switches", IEEE/ACM Transactions on Networking 6(2), 1998, with a factor of 1.
    """
    waiting = len(expected.waiting) + sum(arriving.values())
    free = max_waiting - waiting
    own = sum(job.owner == caller.owner for job, _ in expected.waiting)
    own += arriving.get(caller.owner, 0)
    if free <= 0:
        value, limit = waiting, max_waiting
        message = (
            f"{waiting} jobs wait or arrive, and this service lets at most {max_waiting} wait."
        )
    elif caller is not ANYBODY and own >= free:
        value, limit = own, free
        message = (
            f"{own} jobs of this API key wait or arrive; it may have fewer than the {free} places "
            f"that are left of {max_waiting}."
        )
    else:
        return
    start_s = expected.waiting[0][1].start_s if expected.waiting else 0.0
    raise QueueFull(
        message,
        value=value,
        limit=limit,
        remedy="Try again when Retry-After has passed.",
        retry_after_s=max(LEAST_WAIT_S, start_s),
    )


def check_share(caller: Caller, in_requests: int, expected: Forecast) -> None:
    """Refuse a job of a key that has as many as it may.

    Args:
        caller: with the key.
        in_requests: songs of the key that are in requests at this moment.
        expected: of every job.

    Raises:
        QueueFull: it tells when the first of the key's jobs will be done.
    """
    spans = expected.of_owner(caller.owner)
    taken = len(spans) + in_requests
    if caller.jobs_at_once is not None and taken >= caller.jobs_at_once:
        ends_s = min((span.end_s for span in spans), default=LEAST_WAIT_S)
        raise QueueFull(
            f"{taken} songs of this API key are not done, and it may have {caller.jobs_at_once} "
            "at once.",
            value=taken,
            limit=caller.jobs_at_once,
            remedy="Try again when one of them is done, or cancel one.",
            retry_after_s=max(LEAST_WAIT_S, ends_s),
        )
