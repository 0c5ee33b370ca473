"""Errors -> `application/problem+json` (RFC 9457): the HTTP error table.

Every leaf of `remix.errors` stands in `PROBLEMS`, and a test says so. What only HTTP knows (a
path, a method, a media type) is a `Refusal`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from remix import errors
from remix.errors import excerpt
from telemetry.refusals import REFUSALS
from telemetry.traces import trace_id

MEDIA_TYPE = "application/problem+json"

CHALLENGE = 'Bearer realm="philharmonics"'
"""What a 401 asks for (RFC 6750)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """A type of problem: its status, its name in the type URI, its title."""

    status: int
    name: str
    title: str
    retry_after_s: int | None = None

    @property
    def uri(self) -> str:
        """The problem type."""
        return f"urn:philharmonics:problem:{self.name}"


INTERNAL = Kind(500, "internal", "The service failed")

PROBLEMS: Mapping[type[errors.RemixError], Kind] = {
    errors.InvalidAudio: Kind(422, "invalid-audio", "The audio cannot be used"),
    errors.InvalidNotes: Kind(422, "invalid-notes", "The notes cannot be used"),
    errors.InvalidOption: Kind(422, "invalid-option", "An option is wrong"),
    errors.LimitExceeded: Kind(413, "limit-exceeded", "The input is larger than the service takes"),
    errors.NotFound: Kind(404, "not-found", "No such voice, model or job"),
    errors.Conflict: Kind(409, "conflict", "The id stands for another request"),
    errors.InvalidModel: Kind(500, "invalid-model", "A model of the service is damaged"),
    errors.ModelFailed: Kind(500, "model-failed", "A model of the service failed"),
    errors.Unauthenticated: Kind(401, "unauthenticated", "An API key is needed"),
    errors.Forbidden: Kind(403, "forbidden", "The API key does not reach so far"),
    errors.NoConsent: Kind(403, "no-consent", "The voice may not be used"),
    # Where the error does not know better. A remix takes minutes: sooner is refused again.
    errors.QueueFull: Kind(429, "queue-full", "The service is busy", retry_after_s=30),
    errors.DeadlineExceeded: Kind(504, "deadline-exceeded", "The time ran out"),
    # 499 is nginx's "client closed request"; nobody is left to read it but the access log.
    errors.Cancelled: Kind(499, "cancelled", "The caller went away"),
    errors.RunnerUnavailable: Kind(
        503, "runner-unavailable", "A stage is not reachable", retry_after_s=10
    ),
    errors.StorageUnavailable: Kind(
        503, "storage-unavailable", "The database or the files are away", retry_after_s=10
    ),
}

NO_SUCH_REQUEST = Kind(404, "no-such-request", "No such request to watch")

_FRAMEWORK: Mapping[int, str] = {
    400: "malformed-request",
    404: "no-such-route",
    405: "method-not-allowed",
    406: "not-acceptable",
    409: "request-id-in-use",
    415: "unsupported-media-type",
    422: "malformed-request",
    503: "not-ready",
}


class Refusal(HTTPException):
    """What only HTTP can refuse: a media type, a form, a request id.

    Not a leaf of `remix.errors`, because no other transport knows these.

    Args:
        status: HTTP status.
        detail: the value, the limit and the remedy, in a sentence or two.
        value: what was sent.
        limit: what would have been taken.
        remedy: what to do.
        headers: of the answer.
        kind: of the problem; the status's own if left out.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        value: object = None,
        limit: object = None,
        remedy: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: Kind | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.kind = kind
        self.value = value
        self.limit = limit
        self.remedy = remedy


def kind_of(error: Exception) -> Kind:
    """The row of an error: its own class's, or that of the nearest base that has one."""
    for base in type(error).__mro__:
        if base in PROBLEMS:
            return PROBLEMS[base]
    if isinstance(error, Refusal) and error.kind is not None:
        return error.kind
    if isinstance(error, HTTPException):
        return kind_of_status(error.status_code)
    return INTERNAL


def kind_of_status(status: int) -> Kind:
    """The row of a status that the framework gave."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    return Kind(status, _FRAMEWORK.get(status, INTERNAL.name), title)


def problem(error: Exception) -> JSONResponse:
    """The answer to a request that ended in `error`."""
    kind = kind_of(error)
    headers = dict(getattr(error, "headers", None) or {})
    retry_after_s = getattr(error, "retry_after_s", None) or kind.retry_after_s
    if retry_after_s is not None:
        headers.setdefault("Retry-After", str(math.ceil(retry_after_s)))
    if kind.status == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    return _Problem(body_of(error), kind, headers)


class _Problem(JSONResponse):
    """An answer that is counted when it is given."""

    def __init__(self, body: dict[str, Any], kind: Kind, headers: Mapping[str, str]) -> None:
        super().__init__(body, kind.status, headers, MEDIA_TYPE)
        self._reason = kind.name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        REFUSALS.labels("http", self._reason).inc()
        await super().__call__(scope, receive, send)


def body_of(error: Exception) -> dict[str, Any]:
    """The JSON of that answer."""
    kind = kind_of(error)
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    if kind is INTERNAL:
        # What went wrong inside is for the log; a stranger learns nothing useful from it.
        detail = "Something failed that should not have. The server's log has the details."
    body: dict[str, Any] = {
        "type": kind.uri,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
    }
    if isinstance(error, errors.RemixError | Refusal):
        members = {"value": error.value, "limit": error.limit, "remedy": error.remedy}
        body.update({name: found for name, found in members.items() if found is not None})
    if found := trace_id():
        body["trace_id"] = found
    return body


def framework_refusal(
    status: int, detail: str, request: Request, headers: Mapping[str, str]
) -> Refusal:
    """What the framework refused in its own terse words, with value, limit and remedy."""
    path, method = request.url.path, request.method
    if status == 404:
        remedy = "GET /openapi.json lists every route."
        detail = f"There is nothing at {path}. {remedy}"
        return Refusal(404, detail, value=path, limit="a route of /openapi.json", remedy=remedy)
    if status == 405:
        allowed = next((v for k, v in headers.items() if k.lower() == "allow"), "another method")
        return Refusal(
            405,
            f"{path} does not take {method}; it takes {allowed}.",
            value=method,
            limit=allowed,
            remedy=f"Use {allowed}.",
            headers=headers,
        )
    if status == 503:
        remedy = "Wait until every runner is ready; GET /readyz answers 200 then."
        detail = f"The service is not ready. {remedy}"
        return Refusal(503, detail, value="not ready", limit="ready", remedy=remedy)
    return Refusal(
        status,
        detail,
        value=excerpt(detail or status),
        limit="a request as /openapi.json describes it",
        remedy="Compare the request with GET /openapi.json.",
        headers=headers,
    )


async def answer_problem(request: Request, error: Exception) -> JSONResponse:
    """Starlette's exception handler for everything."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])
        remedy = f"Send {name} as GET /openapi.json describes it."
        if first["type"] == "missing":
            detail = f"The request has 0 parameters named {name}; it must have one. {remedy}"
            error = Refusal(422, detail, value=0, limit=1, remedy=remedy)
        else:
            value = excerpt(first.get("input"))
            detail = f"{name} is {value!r}: {first['msg']}. {remedy}"
            error = Refusal(422, detail, value=value, limit=first["msg"], remedy=remedy)
    if isinstance(error, HTTPException) and not isinstance(error, Refusal):
        error = framework_refusal(error.status_code, error.detail, request, error.headers or {})
    if kind_of(error).status >= 500:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(error)
