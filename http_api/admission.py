"""How long a request is worked for: until its caller leaves, or its time has run out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from remix.errors import Cancelled, DeadlineExceeded

Result = TypeVar("Result")


async def while_wanted(
    request: Request, work: Coroutine[Any, Any, Result], deadline_s: float
) -> Result:
    """Await `work`, and cancel it when the caller goes away or the time has run out.

    Args:
        request: its body must have been read: what comes next is the caller's leaving.
        work: is cancelled, and has ended, when this returns.
        deadline_s: from now.

    Raises:
        Cancelled: the caller went away.
        DeadlineExceeded: the work took longer than `deadline_s`.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({task, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise Cancelled("The caller closed the connection before the answer was ready.")
        raise DeadlineExceeded(
            f"The work was not done after {deadline_s:g} s, which is the service's limit.",
            value=f"more than {deadline_s:g} s",
            limit=deadline_s,
            remedy="Send a shorter song, or ask for the stages one by one.",
        )
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
