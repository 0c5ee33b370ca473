"""Whether the service answers: `grpc.health.v1.Health`.

Not the servicer of grpcio-health-checking: of several watchers of a name, the first that leaves
takes the news from the others (1.81.1, `_async.py`: `del self._server_watchers[...]`), and every
name that anybody asks for stays in memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as messages
from grpc_health.v1 import health_pb2_grpc as protocol

HEALTH: str = messages.DESCRIPTOR.services_by_name["Health"].full_name


class Health(protocol.HealthServicer):  # type: ignore[misc]
    """Tells of all services together, by the name of each.

    Args:
        names: of the services; the empty name stands for the server.
    """

    def __init__(self, *names: str) -> None:
        self._names = {"", *names}
        self._is_serving = False
        self._is_over = False
        self._changed = asyncio.Event()

    def tell(self, is_serving: bool) -> None:
        """Whether calls are answered from now on."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake()

    def end(self) -> None:
        """Nothing is served any more, and watchers are told so and sent away."""
        self._is_serving, self._is_over = False, True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        """How it is now."""
        if request.service not in self._names:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"There is no service {request.service[:80]!r}; there are {sorted(self._names)}.",
            )
        return messages.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> None:
        """How it is, now and whenever that changes."""
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                await context.write(messages.HealthCheckResponse(status=status))
                told = status
            if self._is_over:
                return
            await changed.wait()

    def _status(self, name: str) -> Any:
        statuses = messages.HealthCheckResponse
        if name not in self._names:
            return statuses.SERVICE_UNKNOWN
        return statuses.SERVING if self._is_serving else statuses.NOT_SERVING

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
