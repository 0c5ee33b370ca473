"""How the tests call over gRPC: files in chunks, answers put together, refusals taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status

from remix_v1 import remix_pb2_grpc as protocol

CHUNK_BYTES = 100_000


@contextmanager
def calling(address: str) -> Iterator[Any]:
    """A stub."""
    with grpc.insecure_channel(address) as channel:
        yield protocol.RemixServiceStub(channel)


def upload(request: Any, head: Any, data: bytes, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Any]:
    """The messages of a call: `request(head=...)`, then `request(chunk=...)` to the end."""
    yield request(head=head)
    for start in range(0, len(data), chunk_bytes):
        yield request(chunk=data[start : start + chunk_bytes])


@dataclass
class Answer:
    """What came back of work within a call."""

    files: dict[str, bytes] = field(default_factory=dict)
    infos: dict[str, Any] = field(default_factory=dict)
    progress: list[tuple[str, float]] = field(default_factory=list)


def collect(events: Iterable[Any]) -> Answer:
    """Put the answer of such a call together."""
    answer, name = Answer(), ""
    for event in events:
        match event.WhichOneof("event"):
            case "progress":
                answer.progress.append((event.progress.stage, event.progress.fraction))
            case "file":
                name = event.file.name
                answer.infos[name], answer.files[name] = event.file, b""
            case "chunk":
                answer.files[name] += event.chunk
    return answer


@dataclass(frozen=True)
class Refusal:
    """How a call was refused.

    Args:
        code: of the call.
        message: for a person.
        reason: for a program.
        value, limit, remedy: of the error; nothing where it has none.
        details: every message in the status, by its name.
    """

    code: grpc.StatusCode
    message: str
    reason: str
    value: Any
    limit: Any
    remedy: str | None
    details: dict[str, Any]


def refusal_of(error: Any) -> Refusal:
    """Take a refusal apart; it must be a whole one."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} without details: {error.details()}"
    found: dict[str, Any] = {}
    for packed in status.details:
        kind = getattr(details, packed.TypeName().rsplit(".", 1)[-1])
        found[kind.__name__] = message = kind()
        assert packed.Unpack(message)
    info = found["ErrorInfo"]
    assert info.domain == "philharmonics"
    metadata = dict(info.metadata)
    return Refusal(
        code=error.code(),
        message=status.message,
        reason=info.reason,
        value=json.loads(metadata.pop("value", "null")),
        limit=json.loads(metadata.pop("limit", "null")),
        remedy=metadata.pop("remedy", None),
        details=found,
    )
