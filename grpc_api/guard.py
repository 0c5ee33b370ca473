"""Around every call of the port, health and reflection too: who may.

Default deny: a method that has no row here needs the scope `admin`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import grpc
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION

from grpc_api.health import HEALTH
from grpc_api.statuses import refuse
from jobs.door import Caller, Door
from jobs.keys import Scope
from remix.errors import RemixError
from remix_v1.remix_pb2 import DESCRIPTOR
from telemetry.traces import caller_in, serving

Need = Scope | Literal["any key", "nothing"]
"""What a call must have."""

SERVICE = DESCRIPTOR.services_by_name["RemixService"]

OPEN_TO_ANY_KEY = frozenset({"ListVoices", "ListModels"})

NEEDS: Mapping[str, Need] = {
    # Open, because an orchestrator asks without a key; it says nothing but yes or no.
    f"/{HEALTH}/Check": "nothing",
    f"/{HEALTH}/Watch": "nothing",
    f"/{REFLECTION}/ServerReflectionInfo": "any key",
    **{
        f"/{SERVICE.full_name}/{method}": "any key" if method in OPEN_TO_ANY_KEY else "remix"
        for method in SERVICE.methods_by_name
    },
}
"""By the full name of the method, as it stands in a request's path."""

_CALLER: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who made the call that is being answered."""
    return _CALLER.get()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses what the door refuses; health is asked for before anybody has a key.

    Args:
        door: knows who may.
    """

    def __init__(self, door: Door) -> None:
        self._door = door

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """The method's handler, or one that refuses."""
        need = NEEDS.get(details.method, "admin")
        handler = await continuation(details)
        if need == "nothing" or handler is None:
            return handler
        try:
            scope = None if need == "any key" else need
            _CALLER.set(await self._door.admit(_token(details), scope))
        except RemixError as error:
            return _refusal(handler, details, error)
        return handler


def _token(details: Any) -> str | None:
    """What follows `Bearer`; None where there is nothing of the kind."""
    for name, value in details.invocation_metadata or ():
        if name == "authorization":
            kind, _, token = value.partition(" ")
            return token.strip() or None if kind.lower() == "bearer" else None
    return None


def _refusal(handler: Any, details: Any, error: RemixError) -> Any:
    """A handler of the same kind that only refuses."""

    async def refusal(request: Any, context: Any) -> None:
        with serving(details.method, caller_in(details.invocation_metadata)):
            await refuse(context, error)

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(refusal, handler.request_deserializer, handler.response_serializer)
