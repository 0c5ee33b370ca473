"""One stream, several readers: what separation finishes goes to the voice and to the notes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Broadcast(Generic[Item]):
    """Hands every item of a source to every reader, in order.

    Nothing is dropped and nobody waits for a slower reader: the items are parts of one song,
    which is held in memory as a whole anyway.
    """

    def __init__(self, source: AsyncIterator[Item]) -> None:
        """Prepare; `run` draws from the source."""
        self._source = source
        self._queues: list[asyncio.Queue[Item | None]] = []

    def reader(self) -> AsyncIterator[Item]:
        """One more reader; to be asked for before `run` begins."""
        queue: asyncio.Queue[Item | None] = asyncio.Queue()
        self._queues.append(queue)
        return self._read(queue)

    async def run(self) -> None:
        """Draw the source to its end.

        If it fails, so does this, and the task group that holds the readers cancels them.
        """
        async for item in self._source:
            for queue in self._queues:
                queue.put_nowait(item)
        for queue in self._queues:
            queue.put_nowait(None)

    async def _read(self, queue: asyncio.Queue[Item | None]) -> AsyncIterator[Item]:
        while (item := await queue.get()) is not None:
            yield item
