"""Wake whoever waits for news of a job, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from weakref import WeakValueDictionary


class Bells:
    """One for each job that somebody waits for, and no longer."""

    def __init__(self) -> None:
        self._bells: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def listen(self, uid: str) -> Callable[[float], Awaitable[None]]:
        """From now on; await the result to hear it, for so many seconds at most."""
        bell = self._bells.get(uid)
        if bell is None:
            bell = self._bells[uid] = asyncio.Event()

        async def hear(timeout_s: float) -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), timeout_s)

        return hear

    def ring(self, uid: str) -> None:
        """There is news."""
        if (bell := self._bells.pop(uid, None)) is not None:
            bell.set()
