"""What OpenAPI says of a form, an answer and a problem; FastAPI knows the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from http_api.problems import (
    MEDIA_TYPE,
    NO_SUCH_REQUEST,
    PROBLEMS,
    Kind,
    Refusal,
    body_of,
    kind_of,
    kind_of_status,
)
from http_api.uploads import FORM
from remix import errors
from remix.options import Options

DESCRIPTION = """
A song goes in, a remix comes out: its vocal sung by another voice, over an instrumental that a
model wrote from the song's own chords and rhythm.

    curl -F song=@song.mp3 -F 'options={"seed": 1}' -o remix.wav HOST/v1/remix
    curl -F song=@song.mp3 -H 'Accept: application/zip' -o remix.zip HOST/v1/remix

Every refusal is `application/problem+json` (RFC 9457) and says the value, the limit and the
remedy. Files are uploaded, never fetched from an address. To watch a request, send it with an
`X-Request-Id` of your own and read `/v1/progress?request_id=…`.
"""


SECURITY_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, `phk_…`. None is needed where the server runs without keys.",
}


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="Names the kind of problem; stable.")
    title: str = Field(description="The kind in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong with this request, and what to do.")
    value: Any = Field(None, description="What was sent.")
    limit: Any = Field(None, description="What would have been taken.")
    remedy: str | None = Field(None, description="What to do.")
    trace_id: str = Field("", description="Names the request in the server's logs and traces.")


_REFUSALS: Sequence[errors.RemixError | Refusal] = (
    errors.InvalidAudio(
        "The file is empty (0 bytes); at least 1 is needed.",
        value=0,
        limit=1,
        remedy="Send an audio file.",
    ),
    errors.InvalidNotes(
        "The file has 0 notes; at least 1 is needed.",
        value=0,
        limit=1,
        remedy="Send at least one note of one of the known instruments.",
    ),
    errors.InvalidOption(
        "Option temperature is 5: Input should be less than or equal to 2.",
        value=5,
        limit={"exclusiveMinimum": 0.0, "maximum": 2.0, "type": "number"},
        remedy="Send a value in this range, or leave the option out.",
    ),
    errors.LimitExceeded(
        "The audio is 601 s long; at most 600 s are taken.",
        value=601,
        limit=600,
        remedy="Cut it first.",
    ),
    errors.NotFound(
        "There is no voice 'nobody'; there are allison, carlo.",
        value="nobody",
        limit=["allison", "carlo"],
        remedy="Use one of these names.",
    ),
    errors.NoConsent(
        "The consent of June ended on 2026-11-01; today is 2026-11-24.",
        value="2026-11-24",
        limit="2026-11-01",
        remedy="Ask them for another, and enrol the voice again.",
    ),
    errors.Unauthenticated(
        "The request has no API key; it must have one.",
        value="no key",
        limit="a key that is valid",
        remedy="Send the header Authorization: Bearer KEY.",
    ),
    errors.Forbidden(
        "The API key has the scopes voices; this route needs remix.",
        value=["voices"],
        limit="remix",
        remedy="Use a key with this scope.",
    ),
    errors.Conflict(
        "Job 1 is there already, for another song or with other options.",
        value="1",
        limit="1 request for each id",
        remedy="Give each request an id of its own.",
    ),
    errors.StorageUnavailable(
        "The database does not answer; it must.",
        value="no answer",
        limit="an answer",
        remedy="Try again when Retry-After has passed.",
    ),
    errors.QueueFull(
        "2 remixes are running, and this service runs at most 2 at once.",
        value=2,
        limit=2,
        remedy="Try again when Retry-After has passed.",
    ),
    errors.DeadlineExceeded(
        "The work was not done after 3000 s, which is the service's limit.",
        value="more than 3000 s",
        limit=3000,
        remedy="Send a shorter song, or ask for the stages one by one.",
    ),
    errors.RunnerUnavailable(
        "The service is starting or stopping; it must be ready.",
        value="not ready",
        limit="ready",
        remedy="Try again when GET /readyz answers 200.",
    ),
    Refusal(
        400,
        "The form has 0 parts named song; it must have one, with the file.",
        value=0,
        limit=1,
        remedy="Send one part named song, as `curl -F song=@FILE` does.",
    ),
    Refusal(
        404,
        "No request with X-Request-Id 1 is running, and none came within 10 s. "
        "Send the id as the header X-Request-Id of the request.",
        value="1",
        limit="a request that runs, or comes within 10 s",
        remedy="Send the id as the header X-Request-Id of the request.",
        kind=NO_SUCH_REQUEST,
    ),
    Refusal(
        406,
        "Accept is 'image/png'; this route answers with one of audio/wav, audio/flac.",
        value="image/png",
        limit=["audio/wav", "audio/flac"],
        remedy="Send Accept: audio/wav.",
    ),
    Refusal(
        409,
        "X-Request-Id 1 is that of a request that is still running. Give each request its own.",
        value="1",
        limit="1 request at once with an id",
        remedy="Give each request its own X-Request-Id.",
    ),
    Refusal(
        415,
        "The request is text/plain; this route takes multipart/form-data with the file song and "
        "the JSON object options.",
        value="text/plain",
        limit=FORM,
        remedy="Send multipart/form-data, as `curl -F song=@FILE` does.",
    ),
    Refusal(
        422,
        "The request has 0 parameters named request_id; it must have one. "
        "Send request_id as GET /openapi.json describes it.",
        value=0,
        limit=1,
        remedy="Send request_id as GET /openapi.json describes it.",
    ),
    Refusal(
        503,
        "The service is not ready. Wait until every runner is ready; GET /readyz answers 200 then.",
        value="not ready",
        limit="ready",
        remedy="Wait until every runner is ready; GET /readyz answers 200 then.",
    ),
)
_EXAMPLES = {kind_of(error): body_of(error) for error in _REFUSALS}


def problems(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route."""
    answers: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        answer = answers.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {
                    MEDIA_TYPE: {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "examples": {},
                    }
                },
            },
        )
        answer["content"][MEDIA_TYPE]["examples"][kind.name] = {
            "value": {
                "type": kind.uri,
                "title": kind.title,
                "status": kind.status,
                "detail": kind.title,
                **_EXAMPLES.get(kind, {}),
            }
        }
        if kind.retry_after_s is not None:
            answer["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}
            }
    return answers


UPLOAD_PROBLEMS = problems(
    kind_of_status(400),
    kind_of_status(406),
    kind_of_status(409),
    kind_of_status(415),
    *(
        kind
        for error, kind in PROBLEMS.items()
        if error not in (errors.Cancelled, errors.InvalidModel, errors.ModelFailed)
    ),
)
"""What any route with a form can answer."""


def form(
    part: str, what: str, options: type[Options], example: Mapping[str, Any]
) -> dict[str, Any]:
    """The request body of a route that takes a file and options."""
    schema = options.model_json_schema()
    schema["examples"] = [dict(example)]
    return {
        "requestBody": {
            "required": True,
            "content": {
                FORM: {
                    "schema": {
                        "type": "object",
                        "required": [part],
                        "properties": {
                            part: {
                                "type": "string",
                                "format": "binary",
                                "contentMediaType": "application/octet-stream",
                                "description": what,
                            },
                            "options": schema,
                        },
                    },
                    "encoding": {"options": {"contentType": "application/json"}},
                }
            },
        },
        "parameters": [
            {
                "name": "X-Request-Id",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
                "description": "Your name for this request, to watch it by.",
            }
        ],
    }


def form_answers(description: str, offers: Sequence[str]) -> dict[int | str, dict[str, Any]]:
    """The 200 of a route, in each media type that it offers, and its problems."""
    content: dict[str, Any] = {
        offer: {"schema": {"type": "string", "contentMediaType": offer, "format": "binary"}}
        for offer in offers
    }
    return {200: {"description": description, "content": content}, **UPLOAD_PROBLEMS}
