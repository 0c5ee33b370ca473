"""A stream of a head and chunks -> what is wanted, and the file."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from remix.errors import InvalidOption, LimitExceeded


async def read_head(requests: AsyncIterator[Any]) -> Any:
    """The first message, which says what is wanted.

    Raises:
        InvalidOption: the first message is none, or there is none at all.
    """
    async for request in requests:
        if (part := request.WhichOneof("part")) != "head":
            raise _misplaced(part, "head")
        return request.head
    raise _misplaced(None, "head")


@asynccontextmanager
async def read_file(requests: AsyncIterator[Any], max_bytes: int) -> AsyncIterator[Path]:
    """The rest of the messages, in a file that is there until the block ends.

    Args:
        requests: each has a `chunk`.
        max_bytes: of the file; counted while it comes, and nothing is kept of a longer one.

    Raises:
        InvalidOption: another message comes between.
        LimitExceeded: the file is longer.
    """
    size_bytes = 0
    with tempfile.NamedTemporaryFile(prefix="philharmonics-") as file:
        async for request in requests:
            if (part := request.WhichOneof("part")) != "chunk":
                raise _misplaced(part, "chunk")
            size_bytes += len(request.chunk)
            if size_bytes > max_bytes:
                raise LimitExceeded(
                    f"The file has {size_bytes:,} bytes or more; at most {max_bytes:,} are taken.",
                    value=size_bytes,
                    limit=max_bytes,
                    remedy="Send a shorter song, or a compressed one (FLAC, MP3, Opus).",
                )
            await asyncio.to_thread(file.write, request.chunk)
        await asyncio.to_thread(file.flush)
        yield Path(file.name)


def _misplaced(found: str | None, expected: str) -> InvalidOption:
    return InvalidOption(
        f"Where a message with {expected} was due, there was {found or 'nothing'}.",
        value=found or "nothing",
        limit=expected,
        remedy="Send one message with the head, then the file in messages with a chunk each.",
    )
