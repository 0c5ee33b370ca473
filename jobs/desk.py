"""What every transport shares: who does the work, and how much of it is let in at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from jobs.door import Door
from jobs.keys import KeyStore
from remix.composer import Composer
from remix.errors import DeadlineExceeded, QueueFull, RunnerUnavailable

UPLOAD_S = 600.0
"""How long a caller may take to send a request: 200 MB at 3 Mbit/s."""

WORK_S = 3_000.0
"""How long the work of one request may take: five times the longest song."""

UPLOADS_PER_REMIX = 8
"""Uploads at once for each remix at once: a slow one takes no slot of the work, but disk."""

STAGE_CALLS_PER_REMIX = 4
"""Calls of single stages that are let in for each remix that is: each holds less."""


class Slots:
    """So many requests at once; the next one is refused, not queued.

    Args:
        limit: requests at once.
        what: their name, for the refusal.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self.taken = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            QueueFull: none is free.
        """
        if self.taken >= self._limit:
            raise QueueFull(
                f"{self.taken} {self._what} are running, and this service runs at most "
                f"{self._limit} at once.",
                value=self.taken,
                limit=self._limit,
                remedy="Try again when Retry-After has passed.",
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Desk:
    """One for the process: the composer, who may come to it, and the slots of their requests.

    Args:
        max_remixes: whole songs at once.
        asks_for_keys: whether callers must have API keys.
    """

    def __init__(self, max_remixes: int, asks_for_keys: bool = False) -> None:
        self._composer: Composer | None = None
        self.door = Door(asks_for_keys)
        self.keys: KeyStore | None = None
        self.uploads = Slots(max_remixes * UPLOADS_PER_REMIX, "uploads")
        self.slots = {
            True: Slots(max_remixes, "remixes"),
            False: Slots(max_remixes * STAGE_CALLS_PER_REMIX, "calls of single stages"),
        }
        """By whether it is the whole flow."""

    def open(self, composer: Composer | None) -> None:
        """Take requests for this composer from now on; for none, refuse them."""
        self._composer = composer

    @property
    def composer(self) -> Composer:
        """Who does the work.

        Raises:
            RunnerUnavailable: the service is starting or stopping.
        """
        if self._composer is None:
            raise RunnerUnavailable(
                "The service is starting or stopping; it must be ready.",
                value="not ready",
                limit="ready",
                remedy="Try again when GET /readyz answers 200.",
            )
        return self._composer

    @asynccontextmanager
    async def uploading(self) -> AsyncIterator[None]:
        """While a request arrives.

        Raises:
            DeadlineExceeded: it takes too long.
            QueueFull: too many upload at once.
        """
        with self.uploads.hold():
            async with _within(UPLOAD_S, "The request was not here", "Send a smaller file."):
                yield

    @asynccontextmanager
    async def working(self, is_whole_flow: bool) -> AsyncIterator[None]:
        """While the work of a request is done.

        Raises:
            DeadlineExceeded: it takes too long.
            QueueFull: too much is under way at once.
        """
        remedy = "Send a shorter song, or ask for the stages one by one."
        with self.slots[is_whole_flow].hold():
            async with _within(WORK_S, "The work was not done", remedy):
                yield


@asynccontextmanager
async def _within(limit_s: float, failure: str, remedy: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"{failure} after {limit_s:g} s, which is the service's limit.",
            value=f"more than {limit_s:g} s",
            limit=limit_s,
            remedy=remedy,
        ) from error
