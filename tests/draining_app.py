"""A server that is stopped in order: `python -m tests.draining_app PORT LIMIT_S`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from http_api.problems import problem
from runners.ingress import Draining, Ingress

ingress = Ingress(float(sys.argv[2]) if __name__ == "__main__" else 0.0)


async def wait(request: Request) -> Response:
    """Answer after so many seconds."""
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("done")


async def events(request: Request) -> Response:
    """An event, and never another."""

    async def stream() -> AsyncIterator[str]:
        yield "event: progress\n\n"
        await asyncio.sleep(1e6)

    return StreamingResponse(stream(), media_type="text/event-stream")


async def readyz(request: Request) -> Response:
    """Answers to the end."""
    return PlainTextResponse("", 503 if ingress.is_stopping else 200)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """As the service does it."""
    ingress.heed_signals()
    yield


app = Starlette(
    routes=[Route("/wait", wait), Route("/events", events), Route("/readyz", readyz)],
    middleware=[Middleware(Draining, ingress=ingress, answer=problem)],
    lifespan=lifespan,
)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
