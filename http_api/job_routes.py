"""`/v1/jobs`: hand a song over, watch it, hear it early, fetch the files, cancel it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, StreamingResponse

from http_api.guard import caller_of
from http_api.openapi import UPLOAD_PROBLEMS, form, problems
from http_api.problems import PROBLEMS, Kind, kind_of_status
from http_api.ranges import choose_part, is_known
from http_api.stage_routes import SONG
from http_api.uploads import read_upload
from jobs.desk import Desk
from jobs.job import Job, JobEvent, JobPage, State
from jobs.jobs import JOB_ID
from remix.errors import Conflict, InvalidOption, NotFound, RunnerUnavailable, StorageUnavailable
from remix.options import RemixOptions, parse_options
from remix.stages import Stage

MAX_PAGE = 200

SSE = "text/event-stream"

JobId = Annotated[str, Path(description="The job's id.", pattern=JOB_ID.pattern)]

Webhook = Annotated[
    str | None,
    Query(description="Is told when the job has ended, if the operator allows its host."),
]


class ArtifactFacts(BaseModel):
    """A file of a job."""

    name: str
    href: str = Field(description="Where it is.")
    media_type: str
    size_bytes: int
    sha256: str


class FailureFacts(BaseModel):
    """Why a job failed."""

    type: str
    detail: str
    value: Any = None
    limit: Any = None
    remedy: str | None = None


class JobFacts(BaseModel):
    """A job. Times are seconds since 1970."""

    id: str
    state: State
    options: dict[str, Any] = Field(description="As they were understood, defaults and all.")
    created_s: float
    started_s: float | None = None
    ended_s: float | None = None
    expires_s: float | None = Field(None, description="When it is deleted, files and all.")
    progress: dict[Stage, float] = Field(description="Fraction done, by stage.")
    position: int | None = Field(None, description="How many jobs are before it, while it waits.")
    estimate_s: float | None = Field(None, description="Seconds until it is done, about.")
    attempt: int = Field(description="How many times it was begun; above 1 after a crash.")
    error: FailureFacts | None = None
    trace_id: str = Field(description="Names the job in the server's logs and traces.")
    artifacts: list[ArtifactFacts] = Field(description="Its files, once it is done.")

    @classmethod
    def of(cls, job: Job) -> JobFacts:
        """As callers see it."""
        return cls.model_validate(
            {
                **{name: getattr(job, name) for name in cls.model_fields},
                "options": job.options.model_dump(mode="json"),
                "error": None if job.error is None else vars(job.error),
                "artifacts": [
                    {**vars(info), "href": f"{address_of(job)}/artifacts/{info.name}"}
                    for info in job.artifacts
                ],
            }
        )


class JobList(BaseModel):
    """A page of jobs, the newest first."""

    jobs: list[JobFacts]
    next_page_token: str | None = Field(None, description="Asks for the next page.")

    @classmethod
    def of(cls, page: JobPage) -> JobList:
        """As callers see it."""
        return cls(
            jobs=[JobFacts.of(job) for job in page.jobs], next_page_token=page.next_page_token
        )


def address_of(job: Job) -> str:
    """The path of a job."""
    return f"/v1/jobs/{job.id}"


_UNREADY: tuple[Kind, ...] = (PROBLEMS[RunnerUnavailable], PROBLEMS[StorageUnavailable])
_NO_JOB = problems(PROBLEMS[NotFound], PROBLEMS[InvalidOption], *_UNREADY)
_WAV = {"audio/wav": {"schema": {"type": "string", "format": "binary"}}}


def add_job_routes(app: FastAPI, desk: Desk) -> None:
    """All of them."""
    _add_submission(app, desk)
    _add_reading(app, desk)
    _add_events(app, desk)
    _add_files(app, desk)


def _add_submission(app: FastAPI, desk: Desk) -> None:
    described: dict[str, Any] = {
        "response_model": JobFacts,
        "status_code": 202,
        "responses": {
            **UPLOAD_PROBLEMS,
            **problems(kind_of_status(400), kind_of_status(415), PROBLEMS[Conflict]),
        },
        "openapi_extra": form("song", SONG, RemixOptions, {"seed": 1}),
    }

    async def submit(request: Request, job_id: str | None, webhook_url: str | None) -> Response:
        caller = caller_of(request)
        async with (
            desk.submitting(caller, job_id) as jobs,
            desk.uploading(),
            read_upload(request, "song") as upload,
        ):
            options = parse_options(RemixOptions, upload.options)
            job = await jobs.submit(upload.path, options, caller.owner, job_id, webhook_url)
        return JSONResponse(
            JobFacts.of(job).model_dump(mode="json"),
            200 if job.has_ended else 202,
            {"Location": address_of(job)},
        )

    @app.post("/v1/jobs", summary="Submit a song", **described)
    async def post_job(request: Request, webhook_url: Webhook = None) -> Response:
        """Answers as soon as the job is kept durably; it is carried out when its turn comes."""
        return await submit(request, None, webhook_url)

    @app.put("/v1/jobs/{job_id}", summary="Submit a song, by your own id", **described)
    async def put_job(job_id: JobId, request: Request, webhook_url: Webhook = None) -> Response:
        """May be sent again: the same request answers with the same job, another with 409."""
        return await submit(request, job_id, webhook_url)


def _add_reading(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/jobs", summary="Your jobs", responses=problems(*_UNREADY, kind_of_status(422)))
    async def list_jobs(
        request: Request,
        state: State | None = None,
        page_token: str | None = None,
        page_size: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> JobList:
        """The newest first."""
        owner = caller_of(request).owner
        return JobList.of(await desk.jobs.list(owner, state, page_token, page_size))

    @app.get("/v1/jobs/{job_id}", summary="A job", responses=_NO_JOB)
    async def get_job(job_id: JobId, request: Request) -> JobFacts:
        """State, progress by stage, place in the queue, estimate, files."""
        return JobFacts.of(await desk.jobs.get(job_id, caller_of(request).owner))

    @app.delete("/v1/jobs/{job_id}", summary="Cancel a job", responses=_NO_JOB)
    async def cancel_job(job_id: JobId, request: Request) -> JobFacts:
        """Its compute ends within a window. A job that has ended stays as it is."""
        return JobFacts.of(await desk.jobs.cancel(job_id, caller_of(request).owner))


def _add_events(app: FastAPI, desk: Desk) -> None:
    @app.get(
        "/v1/jobs/{job_id}/events",
        summary="Watch a job",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Server-sent events `state` and `progress`, each with an id; the "
                "last is the state in which the job ended.",
                "content": {
                    SSE: {
                        "schema": {"type": "string"},
                        "example": 'id: 7\nevent: progress\ndata: {"stage": "convert_voice", '
                        '"fraction": 0.5}\n\nid: 8\nevent: state\ndata: {"state": "done"}\n\n',
                    }
                },
            },
            204: {"description": "The job has ended, and nothing came after the last event."},
            **_NO_JOB,
        },
    )
    async def watch_job(
        job_id: JobId,
        request: Request,
        last_event_id: Annotated[int, Header(ge=0, description="Go on after this event.")] = 0,
    ) -> Response:
        """From the first event, or from the one after `Last-Event-ID`, to the last.

        Whoever comes back for more after the last event gets 204, which tells browsers to stop.
        """
        owner = caller_of(request).owner
        job = await desk.jobs.get(job_id, owner)
        events = desk.jobs.events(job_id, owner, last_event_id)
        first = [event async for event in events] if job.has_ended else []
        if job.has_ended and not first:
            return Response(status_code=204)

        async def stream() -> AsyncIterator[bytes]:
            for event in first:
                yield _sse(event)
            async for event in events:
                yield _sse(event)

        return StreamingResponse(stream(), media_type=SSE, headers={"Cache-Control": "no-store"})


def _sse(event: JobEvent | None) -> bytes:
    if event is None:
        return b": still there\n\n"
    kind, data = (
        ("state", {"state": event.state})
        if event.state is not None
        else ("progress", {"stage": event.stage, "fraction": event.fraction})
    )
    return f"id: {event.id}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _add_files(app: FastAPI, desk: Desk) -> None:
    @app.get(
        "/v1/jobs/{job_id}/audio",
        summary="Hear a job",
        response_class=StreamingResponse,
        responses={
            200: {"description": "WAV, 16 bits, stereo at 44.1 kHz.", "content": _WAV},
            **_NO_JOB,
        },
    )
    async def hear_job(job_id: JobId, request: Request) -> Response:
        """`remix.wav`, each part as soon as it is final, while later ones are being made."""
        owner = caller_of(request).owner
        sound = desk.jobs.audio(job_id, owner)
        first = await anext(sound)  # a job that fails before has a problem for its answer

        async def stream() -> AsyncIterator[bytes]:
            yield first
            async for piece in sound:
                yield piece

        return StreamingResponse(
            stream(), media_type="audio/wav", headers={"Cache-Control": "no-store"}
        )

    @app.head("/v1/jobs/{job_id}/artifacts/{name:path}", include_in_schema=False)
    @app.get(
        "/v1/jobs/{job_id}/artifacts/{name:path}",
        summary="Fetch a file of a job",
        response_class=StreamingResponse,
        responses={
            200: {"description": "The file.", "content": _WAV},
            206: {"description": "The part of it that `Range` asked for.", "content": _WAV},
            304: {"description": "You have it: `If-None-Match` named its `ETag`."},
            **_NO_JOB,
            **problems(kind_of_status(416)),
        },
    )
    async def fetch_artifact(job_id: JobId, name: str, request: Request) -> Response:
        """Their names: `remix.wav`, `stems/….wav`, `notes.mid`, `generated.mid`, and so on.

        A job's `artifacts` lists them. One range at a time.
        """
        artifact = await desk.jobs.artifact(job_id, caller_of(request).owner, name)
        info = artifact.info
        etag = f'"{info.sha256}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache"}
        if is_known(request.headers, etag):
            return Response(status_code=304, headers=headers)
        part = choose_part(request.headers, info.size_bytes, etag)
        headers["Content-Length"] = str(part.stop - part.start)
        if part.status == 206:
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{info.size_bytes}"
        if request.method == "HEAD":
            return Response(None, part.status, headers, info.media_type)
        content = artifact.read(part.start, part.stop)
        return StreamingResponse(content, part.status, headers, info.media_type)
