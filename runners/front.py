"""What answers on a runner's HTTP port where BentoML has nothing: its metrics, or a refusal.

Mounted at the root of every runner. BentoML itself refuses pickle only on the routes that it has
made of methods; a runner has none.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import Receive, Scope, Send

from telemetry.exposition import MEDIA_TYPE, metrics

PICKLE = b"application/vnd.bentoml+pickle"


async def front(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI app: the metrics, 415 to a pickle, 404 to everything else; no body is read."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
        text = await asyncio.to_thread(metrics)
        await _answer(send, 200, MEDIA_TYPE, text if scope["method"] == "GET" else b"")
    else:
        await _refuse(scope, send)


async def _refuse(scope: Scope, send: Send) -> None:
    media_type = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
    if media_type == PICKLE:
        status, title = 415, "Unsupported Media Type"
        detail = "A pickle runs what it carries, and is not taken here."
    else:
        status, title = 404, "Not Found"
        detail = f"There is nothing at {scope['path']}."
    remedy = "Call the runner over gRPC, by the Open Inference Protocol."
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": f"{detail} {remedy}",
        "value": media_type.decode("latin-1") if status == 415 else scope["path"],
        "limit": "Open Inference Protocol over gRPC",
        "remedy": remedy,
    }
    await _answer(send, status, "application/problem+json", json.dumps(problem).encode())


async def _answer(send: Send, status: int, media_type: str, body: bytes) -> None:
    headers = [
        (b"content-type", media_type.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
