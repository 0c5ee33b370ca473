"""Calls from their first to their last word: errors become statuses, and the server can stop."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from prometheus_client import Histogram

from grpc_api.statuses import kind_of, refuse
from remix.errors import RunnerUnavailable, full_disk
from telemetry.exposition import LONG_SECONDS
from telemetry.logs import fact
from telemetry.traces import caller_in, serving

SECONDS = Histogram(
    "philharmonics_grpc_seconds",
    "Time a call of gRPC took",
    ["method", "code"],
    buckets=LONG_SECONDS,
)

Answer = TypeVar("Answer")
Call = Callable[[Any, Any, Any], Awaitable[Answer]]
"""A servicer's method: (self, request or requests, context) -> answer."""

_log = logging.getLogger(__name__)


class Inside:
    """The calls that are being answered.

    Requests are waited for when the server stops; watchers are not, because they can go on at the
    next server.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self.requests: set[asyncio.Task[Any]] = set()
        self.watchers: set[asyncio.Task[Any]] = set()

    async def leave(self) -> None:
        """Send the watchers away and wait for the requests."""
        self.is_stopping = True
        for task in self.watchers:
            task.cancel()
        while left := self.requests | self.watchers:
            await asyncio.wait(left)


def answering(call: Call[Answer]) -> Call[Answer]:
    """A method that ends with the status of whatever error it raises."""

    @functools.wraps(call)
    async def answer(self: Any, request: Any, context: Any) -> Answer:
        task = _current_task()
        self.inside.requests.add(task)
        try:
            return await _refusing(call.__name__, call(self, request, context), context)
        finally:
            self.inside.requests.discard(task)

    return answer


def watching(call: Call[None]) -> Call[None]:
    """A method that ends likewise, and with UNAVAILABLE when the server stops."""

    @functools.wraps(call)
    async def answer(self: Any, request: Any, context: Any) -> None:
        task = _current_task()

        async def watch() -> None:
            self.inside.watchers.add(task)
            if self.inside.is_stopping:  # the others have been sent off already
                task.cancel()
            try:
                await call(self, request, context)
            except asyncio.CancelledError:
                if not self.inside.is_stopping:
                    raise
                task.uncancel()
                raise RunnerUnavailable(
                    "The service is stopping; it must be ready.",
                    value="stopping",
                    limit="ready",
                    remedy="Go on after the last event or byte that you have; another server, or "
                    "the next one, will answer.",
                    retry_after_s=2,
                ) from None
            finally:
                self.inside.watchers.discard(task)

        await _refusing(call.__name__, watch(), context)

    return answer


async def _refusing(name: str, call: Awaitable[Answer], context: Any) -> Answer:
    with serving(name, caller_in(context.invocation_metadata())):
        try:
            return await _timed(name, call)
        except Exception as error:  # noqa: BLE001 - the last one who can answer the caller
            if kind_of(error).code is grpc.StatusCode.INTERNAL:
                _log.error("%s failed", name, exc_info=error)
            await refuse(context, error)


async def _timed(name: str, call: Awaitable[Answer]) -> Answer:
    begin_s, code = time.monotonic(), grpc.StatusCode.OK
    try:
        with full_disk():
            return await call
    except asyncio.CancelledError:  # the caller left, or his deadline passed
        code = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        code = kind_of(error).code
        raise
    finally:
        seconds = time.monotonic() - begin_s
        SECONDS.labels(name, code.name).observe(seconds)
        fact("call", method=name, code=code.name, seconds=round(seconds, 4))


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
