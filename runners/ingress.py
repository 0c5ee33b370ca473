"""SIGTERM -> new requests are refused, those inside end, then the server stops.

The server itself, told to stop, closes its port at once, and a balancer that had not heard of it
would run into the closed door. So requests are first refused in words (503, and `/readyz` says
the same), for as long as others are still being served.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from remix.errors import RemixError, RunnerUnavailable

HEALTH = ("/livez", "/healthz", "/readyz", "/metrics")
"""Paths that answer to the end."""

_log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0
"""For requests that are cut off: to answer that they are."""

NOTICE_S = 1.0
"""For which requests are refused in words at least: whoever asks now and then hears of the end."""

THRESHOLD_S = 0.2
"""For connections that are through the door, and whose requests are on their way."""


class Ingress:
    """Who is inside, and whether anybody may still come in.

    Args:
        limit_s: how long requests may take after the signal.
    """

    def __init__(self, limit_s: float) -> None:
        self.is_stopping = False
        self.is_over = False
        self.requests: set[asyncio.Task[Any]] = set()
        self.watchers: set[asyncio.Task[Any]] = set()
        self._limit_s = limit_s
        self._actions: list[Callable[[], Awaitable[object]]] = []
        self._stopping: asyncio.Task[None] | None = None

    def on_stop(self, action: Callable[[], Awaitable[object]]) -> None:
        """Have `action` begin at the signal, and be waited for as requests are."""
        self._actions.append(action)

    def heed_signals(self) -> None:
        """Stand before the server's handlers; called when the server has set them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin, number, signal.getsignal(number))

    def stopping_error(self) -> RunnerUnavailable:
        """What is said to those who come too late."""
        return RunnerUnavailable(
            "The service is stopping; it must be ready.",
            value="stopping",
            limit="ready",
            remedy="Try again: another one, or its successor, will answer.",
            retry_after_s=2,
        )

    def _begin(self, number: int, server: Any) -> None:
        if self.is_stopping:  # told a second time: now
            server(number, None)
            return
        self.is_stopping = True
        self._stopping = asyncio.create_task(self._stop(number, server))

    async def _stop(self, number: int, server: Any) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                # Who watches goes on elsewhere: now, while this one can still say that he must.
                for task in self.watchers:
                    task.cancel()
                ends = [asyncio.sleep(NOTICE_S), *(action() for action in self._actions)]
                for end in await asyncio.gather(*ends, return_exceptions=True):
                    if isinstance(end, Exception):
                        _log.error("Something did not stop in order", exc_info=end)
                while self.requests:
                    await asyncio.wait(self.requests)
        except TimeoutError:
            pass
        finally:
            self.is_over = True
            left = self.requests | self.watchers
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=LAST_WORDS_S)
            _close_door(server)
            await asyncio.sleep(THRESHOLD_S)
            server(number, None)


class Draining:
    """ASGI middleware, the outermost: counts requests, and refuses them when it is time.

    Args:
        app: that answers.
        ingress: the process's.
        answer: makes an answer of an error.
    """

    def __init__(
        self, app: ASGIApp, ingress: Ingress, answer: Callable[[RemixError], ASGIApp]
    ) -> None:
        self._app = app
        self._ingress = ingress
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in HEALTH:
            await self._app(scope, receive, send)
            return
        ingress, has_begun = self._ingress, False
        task = asyncio.current_task()
        assert task is not None

        async def farewell(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = list(message.get("headers", []))
                if ingress.is_stopping:
                    message = {**message, "headers": [*headers, (b"connection", b"close")]}
                if (b"content-type", b"text/event-stream") in _media_types(headers):
                    # Who watches does not hold up the end; the stream can be taken up elsewhere.
                    ingress.requests.discard(task)
                    ingress.watchers.add(task)
                    if ingress.is_stopping:
                        task.cancel()
            await send(message)

        if ingress.is_stopping:
            await self._answer(ingress.stopping_error())(scope, receive, farewell)
            return
        ingress.requests.add(task)
        try:
            await self._app(scope, receive, farewell)
        except asyncio.CancelledError:
            if not (ingress.is_over or task in ingress.watchers):
                raise
            task.uncancel()
            if has_begun:
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._answer(ingress.stopping_error())(scope, receive, farewell)
        finally:
            ingress.requests.discard(task)
            ingress.watchers.discard(task)


def _media_types(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value.split(b";")[0].strip()) for name, value in headers]


def _close_door(server: Any) -> None:
    """Have connections refused from now on.

    BentoML's first process holds the listening socket too: closed here alone, it would take
    connections that nobody answers, until that process has ended.
    """
    for listener in getattr(getattr(server, "__self__", None), "servers", ()):
        for listening in listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as door:
                door.shutdown(socket.SHUT_RDWR)
