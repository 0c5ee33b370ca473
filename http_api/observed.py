"""Around every request, the outermost: how long it took, by the route's template."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telemetry.exposition import LONG_SECONDS

HTTP_SECONDS = Histogram(
    "philharmonics_http_seconds",
    "Time to answer a request; the route is its template",
    ["method", "route", "status"],
    buckets=LONG_SECONDS,
)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

LEFT = 499
"""nginx's "client closed request"."""


class Observed:
    """ASGI middleware: sees what is answered, and how.

    Args:
        app: that answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Observe one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_s, status = time.monotonic(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            status = LEFT
            raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.monotonic() - begin_s
            HTTP_SECONDS.labels(method, route_of(scope), str(status)).observe(seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that a request went to: one of a few, whatever was asked for."""
    return getattr(scope.get("route"), "path", "") or "other"
