"""The application: every route, its form, its answers, its refusals."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, StreamingResponse

from http_api.admission import while_wanted
from http_api.catalogue import ModelList, VoiceList, model_list, voice_list
from http_api.guard import caller_of
from http_api.job_routes import add_job_routes
from http_api.key_routes import add_key_routes
from http_api.negotiation import choose
from http_api.openapi import DESCRIPTION, SECURITY_SCHEME, Problem, form, form_answers, problems
from http_api.problems import NO_SUCH_REQUEST, answer_problem, kind_of_status
from http_api.progress_board import ProgressBoard
from http_api.quote_route import add_quote_route
from http_api.stage_routes import FORM_ROUTES, FormRoute
from http_api.uploads import read_upload
from jobs.desk import Desk
from remix.errors import RemixError
from remix.options import parse_options
from telemetry.exposition import MEDIA_TYPE, metrics


async def serve(
    desk: Desk, board: ProgressBoard, request: Request, route: FormRoute[Any]
) -> Response:
    """One request, from its headers to its answer; nothing of it is left behind."""
    caller = caller_of(request)
    with board.entry(caller.owner, request.headers.get("x-request-id")) as progress:
        media_type = choose(request.headers.get("accept"), route.offers)
        async with AsyncExitStack() as stack:
            desk.check(route.stages)
            async with desk.uploading():
                upload = await stack.enter_async_context(read_upload(request, route.part))
            # Not while it uploads: slow callers would keep the others out.
            async with desk.working(route.stages, caller):
                options = parse_options(route.options, upload.options)
                work = route.work(desk.composer, upload.path, options, media_type, progress)
                return await while_wanted(request, work)


def build_app(desk: Desk) -> FastAPI:
    """The application that `service.py` mounts."""
    board = ProgressBoard()
    app = FastAPI(
        title="Deep Philharmonics",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            RemixError: answer_problem,
            HTTPException: answer_problem,
            RequestValidationError: answer_problem,
        },
    )
    for route in FORM_ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(desk, board, route),
            methods=["POST"],
            name=route.path.rsplit("/", 1)[-1],
            summary=route.summary,
            description=route.description,
            response_class=Response,
            responses=form_answers(route.answer, route.offers),
            openapi_extra=form(route.part, route.takes, route.options, route.example),
        )
    _add_lists(app, desk)
    _add_progress(app, board)
    add_key_routes(app, desk)
    add_job_routes(app, desk)
    add_quote_route(app, desk)
    _add_metrics(app)
    _add_docs(app)
    return app


def _endpoint(
    desk: Desk, board: ProgressBoard, route: FormRoute[Any]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await serve(desk, board, request, route)

    return endpoint


def _add_lists(app: FastAPI, desk: Desk) -> None:
    unready = problems(kind_of_status(503))

    @app.get("/v1/voices", summary="Who can sing", responses=unready)
    async def voices() -> VoiceList:
        """Voices by name, the default first."""
        return voice_list(desk.composer)

    @app.get("/v1/models", summary="Which models there are", responses=unready)
    async def models() -> ModelList:
        """The manifest: what each model is, its checksums and licence, whether it is installed.

        `weights` says whose they are: `published` (its authors'), `trained-here`, or `random`
        (for measurements only; what they make is noise).
        """
        return model_list(desk.composer)


def _add_progress(app: FastAPI, board: ProgressBoard) -> None:
    @app.get(
        "/v1/progress",
        summary="Watch a request",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "Events `progress` (stage, fraction done), then `end`.",
                "content": {
                    "text/event-stream": {
                        "schema": {"type": "string"},
                        "example": 'event: progress\ndata: {"stage": "separate_stems", '
                        '"fraction": 0.25}\n\nevent: end\ndata: {"outcome": "done"}\n\n',
                    }
                },
            },
            **problems(kind_of_status(400), NO_SUCH_REQUEST, kind_of_status(422)),
        },
    )
    async def progress(request_id: str, request: Request) -> StreamingResponse:
        """Server-sent events of the request whose caller sent this `X-Request-Id`.

        It may be asked for shortly before the request itself arrives. Known are the requests of
        this process that run or have ended not long ago.
        """
        entry = await board.watch(caller_of(request).owner, request_id)
        return StreamingResponse(
            entry.events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


def _add_metrics(app: FastAPI) -> None:
    @app.get("/metrics", include_in_schema=False)
    def text() -> Response:
        return Response(metrics(), media_type=MEDIA_TYPE)


def _add_docs(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        # BentoML's own copy of Swagger UI: the page works without a network.
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/static_content/swagger-ui-bundle.js",
            swagger_css_url="/static_content/swagger-ui.css",
            swagger_favicon_url="/static_content/favicon-light-32x32.png",
        )

    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        schema["components"]["securitySchemes"] = {"key": SECURITY_SCHEME}
        schema["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
