"""Around every route of the port, BentoML's own too: who may, no pickle, no endless body."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_api.problems import MEDIA_TYPE, Refusal, framework_refusal, problem
from http_api.scopes import need_of
from jobs.door import ANYBODY, Caller, Door
from remix.errors import LimitExceeded, RemixError, excerpt, full_disk

PICKLE = "application/vnd.bentoml+pickle"

DETAIL_BYTES = 1_000
"""How much of a foreign error's text is worth repeating."""

_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware of the whole service.

    Who may not, by `http_api.scopes`, is refused first. A body that is too large is refused by its
    declared length before a byte of it is read, or, if it has none, by the count, while it
    streams; nothing is kept of it. An error that is not yet a problem (the framework's own 404 and
    405, a crash) becomes one.

    Args:
        app: what is guarded.
        door: knows who may.
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, door: Door, max_body_bytes: int) -> None:
        self._app = app
        self._door = door
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        if scope["type"] == "websocket":
            # There are none: closed before it is accepted, it is answered 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            scope.setdefault("state", {})["caller"] = await self._admit(scope)
            self._refuse_at_sight(Headers(scope=scope))
            with full_disk():
                await self._app(scope, self._counted(receive), answer.send)
        except (RemixError, HTTPException) as error:
            await answer.close_with(error, scope, receive)
        except Exception as error:  # noqa: BLE001 - the last one who can answer the caller
            _log.exception("%s %s failed", scope["method"], scope["path"])
            await answer.close_with(error, scope, receive)
        else:
            await answer.finish(scope, receive)

    async def _admit(self, scope: Scope) -> Caller:
        need = need_of(scope["method"], scope["path"])
        if need == "nothing":
            return ANYBODY
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        is_key = kind.lower() == "bearer" and token
        return await self._door.admit(
            token.strip() if is_key else None, None if need == "any key" else need
        )

    def _refuse_at_sight(self, headers: Headers) -> None:
        media_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type == PICKLE:
            raise Refusal(
                415,
                f"{media_type} is not taken: a pickle runs what it carries. Send a form.",
                value=media_type,
                limit="multipart/form-data",
                remedy="Send multipart/form-data.",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refusal(
                400,
                f"Content-Length is {excerpt(length)!r}; it must be a number of bytes.",
                value=excerpt(length),
                limit="a number of bytes",
                remedy="Send the body's length, or none.",
            )
        if int(length) > self._max_body_bytes:
            raise self._too_large(int(length))

    def _counted(self, receive: Receive) -> Receive:
        received_bytes = 0

        async def count() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_body_bytes:
                raise self._too_large(received_bytes)
            return message

        return count

    def _too_large(self, size_bytes: int) -> LimitExceeded:
        return LimitExceeded(
            f"The request has {size_bytes:,} bytes or more; at most {self._max_body_bytes:,} are "
            "taken.",
            value=size_bytes,
            limit=self._max_body_bytes,
            remedy="Send a shorter song, or a compressed one (FLAC, MP3, Opus).",
        )


def caller_of(request: Request) -> Caller:
    """Who sent a request that the guard has let through."""
    caller: Caller = request.state.caller
    return caller


class _Answer:
    """What goes out: passed on, except that a foreign error is held back and made a problem."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self._foreign_status = 0
        self._foreign_body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            media_type = Headers(raw=message["headers"]).get("content-type", "")
            if message["status"] >= 400 and not media_type.startswith(MEDIA_TYPE):
                self._foreign_status = message["status"]
                self._foreign_headers = Headers(raw=message["headers"])
                return
            self.started = True
        elif self._foreign_status:
            self._foreign_body = (self._foreign_body + message.get("body", b""))[:DETAIL_BYTES]
            return
        await self._send(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Send the problem that stands for a foreign error, if there was one."""
        if not self._foreign_status:
            return
        kept = {k: v for k, v in self._foreign_headers.items() if k in ("allow", "retry-after")}
        detail = self._foreign_body.decode("utf-8", "replace").strip()
        refusal = framework_refusal(self._foreign_status, detail, Request(scope), kept)
        await problem(refusal)(scope, receive, self._send)

    async def close_with(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Send the problem that an exception is, unless an answer is on its way already."""
        if not self.started:
            await problem(error)(scope, receive, self._send)
