"""A stream of a head and chunks -> what is wanted, and the file."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jobs.desk import Desk
from remix.errors import InvalidOption, LimitExceeded


@dataclass(frozen=True)
class Upload:
    """What a caller sent.

    Args:
        head: the call's first message.
        path: the song, vocal or notes, for as long as the call is served.
    """

    head: Any
    path: Path


@asynccontextmanager
async def read_upload(
    requests: AsyncIterator[Any], desk: Desk, max_bytes: int
) -> AsyncIterator[Upload]:
    """Read a call's messages to their end.

    Args:
        requests: each has `head` or `chunk`.
        desk: lets so many upload at once, for so long.
        max_bytes: of the file; counted while it comes, and nothing is kept of a longer one.

    Raises:
        DeadlineExceeded, InvalidOption, LimitExceeded, QueueFull: see `remix.errors`.
    """
    with tempfile.NamedTemporaryFile(prefix="philharmonics-") as file:
        async with desk.uploading():
            head = await _read(requests, file, max_bytes)
        yield Upload(head, Path(file.name))


async def _read(requests: AsyncIterator[Any], file: IO[bytes], max_bytes: int) -> Any:
    head, size_bytes = None, 0
    async for request in requests:
        part = request.WhichOneof("part")
        if (head is None) != (part == "head"):
            raise _misplaced(part, "chunk" if head is not None else "head")
        if head is None:
            head = request.head
            continue
        size_bytes += len(request.chunk)
        if size_bytes > max_bytes:
            raise LimitExceeded(
                f"The file has {size_bytes:,} bytes or more; at most {max_bytes:,} are taken.",
                value=size_bytes,
                limit=max_bytes,
                remedy="Send a shorter song, or a compressed one (FLAC, MP3, Opus).",
            )
        await asyncio.to_thread(file.write, request.chunk)
    if head is None:
        raise _misplaced(None, "head")
    await asyncio.to_thread(file.flush)
    return head


def _misplaced(found: str | None, expected: str) -> InvalidOption:
    return InvalidOption(
        f"Where a message with {expected} was due, there was {found or 'nothing'}.",
        value=found or "nothing",
        limit=expected,
        remedy="Send one message with the head, then the file in messages with a chunk each.",
    )
