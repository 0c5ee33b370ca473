"""Errors -> `google.rpc.Status`: the gRPC error table.

Every leaf of `remix.errors` stands in `KINDS`, and a test says so. Source of the details' meaning:
https://google.aip.dev/193 and google/rpc/error_details.proto.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from remix import errors
from telemetry.refusals import REFUSALS
from telemetry.traces import trace_id

DOMAIN = "philharmonics"

DETAILS_KEY = "grpc-status-details-bin"
"""Where `google.rpc.Status` travels. Source: grpc_status/_common.py."""

MAX_TEXT = 1_000
"""Characters of a message or of a value: clients take 8 KB of metadata, and the message is in it
twice (grpc.max_metadata_size)."""


@dataclass(frozen=True)
class Kind:
    """How an error is told.

    Args:
        code: of the call.
        reason: of the ErrorInfo.
        field: of the request that is to be mended, for a BadRequest; empty where it is another one
            each time, and the message names it; None for no BadRequest.
        quota: what is used up, for a QuotaFailure; empty for none.
        retry_after_s: for a RetryInfo, where the error does not know better; None for none.
    """

    code: grpc.StatusCode
    reason: str
    field: str | None = None
    quota: str = ""
    retry_after_s: float | None = None


INTERNAL = Kind(grpc.StatusCode.INTERNAL, "INTERNAL")

KINDS: Mapping[type[errors.RemixError], Kind] = {
    errors.InvalidAudio: Kind(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO", field="chunk"),
    errors.InvalidNotes: Kind(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NOTES", field="chunk"),
    errors.InvalidOption: Kind(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_OPTION", field=""),
    errors.LimitExceeded: Kind(grpc.StatusCode.OUT_OF_RANGE, "LIMIT_EXCEEDED", field=""),
    errors.NotFound: Kind(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.NoConsent: Kind(grpc.StatusCode.PERMISSION_DENIED, "NO_CONSENT"),
    errors.Conflict: Kind(grpc.StatusCode.ALREADY_EXISTS, "CONFLICT"),
    errors.InvalidModel: Kind(grpc.StatusCode.FAILED_PRECONDITION, "INVALID_MODEL"),
    errors.ModelFailed: Kind(grpc.StatusCode.INTERNAL, "MODEL_FAILED"),
    errors.Unauthenticated: Kind(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.Forbidden: Kind(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    # A remix takes minutes: sooner is refused again.
    errors.QueueFull: Kind(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", quota="work at once", retry_after_s=30.0
    ),
    errors.DeadlineExceeded: Kind(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.Cancelled: Kind(grpc.StatusCode.CANCELLED, "CANCELLED"),
    errors.RunnerUnavailable: Kind(
        grpc.StatusCode.UNAVAILABLE, "RUNNER_UNAVAILABLE", retry_after_s=10.0
    ),
    errors.StorageUnavailable: Kind(
        grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE", retry_after_s=10.0
    ),
}

KINDS_BY_NAME: Mapping[str, Kind] = {error.__name__: kind for error, kind in KINDS.items()}
"""By the name that `jobs.job.JobFailure` has for an error."""


def kind_of(error: BaseException) -> Kind:
    """The row of an error: its own class's, or that of the nearest base that has one."""
    for base in type(error).__mro__:
        if base in KINDS:
            return KINDS[base]
    return INTERNAL


def status_of(error: BaseException) -> Status:
    """What a caller is told of an error."""
    kind = kind_of(error)
    # What went wrong inside is for the log; a stranger learns nothing useful from it.
    message = "Something failed that should not have. The server's log has the details."
    info = details.ErrorInfo(reason=kind.reason, domain=DOMAIN)
    if found := trace_id():
        info.metadata["trace_id"] = found
    status = Status(code=kind.code.value[0], message=message)
    if not isinstance(error, errors.RemixError):
        _add(status, info)
        return status
    status.message = str(error)[:MAX_TEXT]
    for name, value in (("value", error.value), ("limit", error.limit)):
        if value is not None:
            info.metadata[name] = as_json(value)
    if error.remedy is not None:
        info.metadata["remedy"] = error.remedy[:MAX_TEXT]
    _add(status, info)
    if kind.field is not None:
        _add(
            status,
            details.BadRequest(
                field_violations=[
                    details.BadRequest.FieldViolation(field=kind.field, description=status.message)
                ]
            ),
        )
    if kind.quota:
        _add(
            status,
            details.QuotaFailure(
                violations=[
                    details.QuotaFailure.Violation(subject=kind.quota, description=status.message)
                ]
            ),
        )
    if (wait_s := _wait_s(error, kind)) is not None:
        delay = Duration()
        delay.FromMilliseconds(round(wait_s * 1000))
        _add(status, details.RetryInfo(retry_delay=delay))
    return status


def as_json(value: object) -> str:
    """A value or a limit, as JSON has it; cut where it is long.

    >>> as_json([1, "a"]), as_json("x" * 2000)[-3:]
    ('[1, "a"]', '..."')
    """
    text = json.dumps(value)
    return text if len(text) <= MAX_TEXT else json.dumps(text[: MAX_TEXT // 2] + "...")


async def refuse(context: Any, error: BaseException) -> NoReturn:
    """End a call with what an error is to its caller."""
    kind, status = kind_of(error), status_of(error)
    REFUSALS.labels("grpc", kind.reason.lower().replace("_", "-")).inc()
    await context.abort(kind.code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort raises")


def _wait_s(error: errors.RemixError, kind: Kind) -> float | None:
    return kind.retry_after_s if error.retry_after_s is None else error.retry_after_s


def _add(status: Status, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)
