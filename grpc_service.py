"""The composing service over gRPC: `remix.v1.RemixService`, health, reflection.

It lives in the composer's process, beside HTTP, over the same desk; `service.py` starts it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from grpc_api.answering import Inside
from grpc_api.guard import SERVICE, Guard
from grpc_api.health import HEALTH, Health
from grpc_api.servicer import RemixServicer
from jobs.desk import Desk
from remix.settings import PREFIX, Settings
from remix_v1.remix_pb2_grpc import add_RemixServiceServicer_to_server

MAX_CALLS = 512
"""At once, of all callers; most of them watch. Another one is RESOURCE_EXHAUSTED."""

OPTIONS = [
    # Files come in chunks: no message has a reason to be larger.
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.max_concurrent_streams", 100),  # of one connection
    # A caller who is gone without a word is found out after 40 s, and his work ends.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # As often may a caller ask whether we are there; gRPC's own limit is 5 min.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # Two servers on one port would share its calls, without anybody's having meant it.
    ("grpc.so_reuseport", 0),
]

LOOPBACK = "127.0.0.1"

LAST_WORDS_S = 1.0
"""For those who watch health, to be told how it is; who else lingers is cut off."""

HEALTH_S = 1.0
"""How often health is brought up to date."""


class GrpcService:
    """The port, and what stands behind it.

    Args:
        desk: what HTTP has too.
        settings: host, port and limits.
        is_ready: whether calls would be answered.
    """

    def __init__(self, desk: Desk, settings: Settings, is_ready: Callable[[], bool]) -> None:
        self._settings = settings
        self._is_ready = is_ready
        self._inside = Inside()
        self._telling: asyncio.Task[None] | None = None
        self._health = Health(SERVICE.full_name)
        self._server = grpc.aio.server(
            interceptors=[Guard(desk.door)], options=OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        servicer = RemixServicer(desk, settings.max_upload_bytes, self._inside)
        add_RemixServiceServicer_to_server(servicer, self._server)
        add_HealthServicer_to_server(self._health, self._server)
        enable_server_reflection((SERVICE.full_name, HEALTH, REFLECTION), self._server)

    async def start(self) -> None:
        """Listen; health says NOT_SERVING until the service is ready."""
        settings = self._settings
        self._server.add_insecure_port(_address(settings.grpc_host or LOOPBACK, settings.grpc_port))
        await self._server.start()
        self._telling = asyncio.create_task(self._tell_health())

    async def drain(self) -> None:
        """Take no new calls, send the watchers on, and wait for the requests."""
        self._health.end()
        # Callers are told to go elsewhere (GOAWAY), and new calls are refused, from now on.
        stopping = asyncio.create_task(self._server.stop(self._settings.drain_s))
        await self._inside.leave()
        await self.stop(LAST_WORDS_S)
        await stopping

    async def stop(self, grace_s: float = 0.0) -> None:
        """End whatever is still under way after so long."""
        if self._telling is not None:
            self._telling.cancel()
        await self._server.stop(grace_s)

    async def _tell_health(self) -> None:
        while True:
            self._health.tell(self._is_ready())
            await asyncio.sleep(HEALTH_S)


def check_port(host: str, port: int) -> None:
    """Refuse to start where the port is taken; ends the process with a line that says so.

    What ends here, before any worker is there, ends with a message; a worker that fails is
    started again and again.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"The gRPC address {_address(host, port)} cannot be had ({error.strerror}). Set "
                f"{PREFIX}GRPC_PORT to a free port, or to 0 for no gRPC."
            ) from error


def _address(host: str, port: int) -> str:
    """A gRPC target.

    >>> _address("::1", 3001)
    '[::1]:3001'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
