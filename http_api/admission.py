"""How long a request is worked for: until its caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from remix.errors import Cancelled

Result = TypeVar("Result")


async def while_wanted(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, and cancel it when the caller goes away.

    Args:
        request: its body must have been read: what comes next is the caller's leaving.
        work: is cancelled, and has ended, when this returns.

    Raises:
        Cancelled: the caller went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("The caller closed the connection before the answer was ready.")
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
