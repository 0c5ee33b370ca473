"""Errors <-> what gRPC carries beside a status: kind, value, limit and remedy cross the hop.

They travel as `google.rpc.ErrorInfo` in the trailing metadata, where any gRPC client finds them.

Source: https://google.aip.dev/193
"""

from __future__ import annotations

import json
import re
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from remix.errors import RemixError

KEY = "grpc-status-details-bin"

DOMAIN = "philharmonics"

MAX_TEXT = 1_000
"""Characters of a text on its way: gRPC refuses metadata of more than 8 KiB."""


def reason_of(kind: type[RemixError]) -> str:
    """The error's name in `ErrorInfo`.

    >>> from remix.errors import QueueFull
    >>> reason_of(QueueFull)
    'QUEUE_FULL'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()


def text_of(error: RemixError) -> str:
    """What the status says in words."""
    return str(error)[:MAX_TEXT]


def encode_error(error: RemixError, code: int) -> bytes:
    """The value of the trailing metadata `KEY`."""
    parts = {name: part for name, part in error.parts().items() if part is not None}
    info = ErrorInfo(
        reason=reason_of(type(error)),
        domain=DOMAIN,
        metadata={name: _bounded(part) for name, part in parts.items()},
    )
    status = Status(code=code, message=text_of(error))
    status.details.add().Pack(info)
    return bytes(status.SerializeToString())


def decode_error(data: bytes | None) -> RemixError | None:
    """The error again; None where somebody else speaks, or says nothing."""
    if data is None:
        return None
    info = ErrorInfo()
    try:
        for detail in Status.FromString(data).details:
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _KINDS:
                parts: dict[str, Any] = {n: json.loads(part) for n, part in info.metadata.items()}
                return _KINDS[info.reason](**parts)
    except (DecodeError, ValueError, TypeError):
        return None
    return None


def _bounded(part: object) -> str:
    text = json.dumps(part, default=str)
    return text if len(text) <= MAX_TEXT else json.dumps(str(part)[: MAX_TEXT // 2])


def _tree(kind: type[RemixError]) -> dict[str, type[RemixError]]:
    found = {reason_of(kind): kind}
    for below in kind.__subclasses__():
        found |= _tree(below)
    return found


_KINDS = _tree(RemixError)
