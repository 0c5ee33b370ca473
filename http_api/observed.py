"""Around every request, the outermost: its trace, its line in the log, how long it took."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext

from opentelemetry.trace import Span
from prometheus_client import Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from telemetry import traces
from telemetry.exposition import LONG_SECONDS
from telemetry.logs import fact

HTTP_SECONDS = Histogram(
    "philharmonics_http_seconds",
    "Time to answer a request; the route is its template",
    ["method", "route", "status"],
    buckets=LONG_SECONDS,
)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

UNTOLD = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
"""Asked for every few seconds: no trace and no line in the log."""

TRACE_ID = b"x-trace-id"
"""Header of every other answer."""

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
        caller = Headers(scope=scope).get(traces.HEADER)
        with nullcontext() if scope["path"] in UNTOLD else traces.serving("HTTP", caller) as span:
            extra = [(TRACE_ID, traces.trace_id().encode())] if span is not None else []

            async def note(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message = {**message, "headers": [*message.get("headers", []), *extra]}
                await send(message)

            try:
                await self._app(scope, receive, note)
            except asyncio.CancelledError:
                status = LEFT
                raise
            finally:
                _tell(scope, status, time.monotonic() - begin_s, span)


def _tell(scope: Scope, status: int, seconds: float, span: Span | None) -> None:
    method = scope["method"] if scope["method"] in METHODS else "other"
    route = route_of(scope)
    HTTP_SECONDS.labels(method, route, str(status)).observe(seconds)
    if span is not None:
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        fact(
            "request",
            method=method,
            route=route,
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
        )


def route_of(scope: Scope) -> str:
    """The template of the route that a request went to: one of a few, whatever was asked for."""
    return getattr(scope.get("route"), "path", "") or "other"
