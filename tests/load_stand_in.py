"""A stand-in for the service, for the tests of the load generator: it computes nothing.

    python -m tests.load_stand_in HTTP_PORT GRPC_PORT SOCKET SECONDS --service-name remix

It listens for inferences and jobs on GRPC_PORT and on SOCKET, and starts a process that stands for
a runner's.
`POST /v1/remix` and `ModelInfer` answer after SECONDS; jobs take as long, one at a time, but for
those whose body is `SLOW`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

from remix_v1 import remix_pb2 as remix
from remix_v1.remix_pb2_grpc import RemixServiceServicer, add_RemixServiceServicer_to_server

SLOW = b"slow"
"""The body of a job that ends by being cancelled."""


MODEL = {
    "name": "any",
    "stage": "separate_stems",
    "weights": "random",
    "sample_rate_hz": 16_000,
    "installed": True,
    "default": True,
}

RUNNER = [sys.executable, "-c", "import sys; sys.stdin.read()", "--service-name", "SeparateStems"]
"""Ends with the process that started it."""


class StandIn(protocol.GRPCInferenceServiceServicer, RemixServiceServicer):  # type: ignore[misc]
    """Every face."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._alone = asyncio.Lock()

    async def ready(self, request: Request) -> Response:
        return Response()

    async def remix(self, request: Request) -> Response:
        await request.body()
        await asyncio.sleep(self._service_s)
        return Response(b"RIFF" * 1000, media_type="audio/wav")

    async def refuse(self, request: Request) -> Response:
        return Response(status_code=429, headers={"Retry-After": "0.01"})

    async def submit(self, request: Request) -> Response:
        service_s = 3600.0 if await request.body() == SLOW else self._service_s
        self._jobs[request.path_params["id"]] = asyncio.create_task(self._work(service_s))
        return JSONResponse({"state": "queued"}, 202)

    async def _work(self, service_s: float) -> None:
        async with self._alone:
            await asyncio.sleep(service_s)

    async def job(self, request: Request) -> Response:
        task = self._jobs[request.path_params["id"]]
        state = "running"
        if task.done():
            state = "cancelled" if task.cancelled() else "done"
        return JSONResponse({"state": state})

    async def states(self, request: Request) -> Response:
        return JSONResponse(
            ["cancelled" if job.cancelled() else job.done() for job in self._jobs.values()]
        )

    async def cancel(self, request: Request) -> Response:
        self._jobs[request.path_params["id"]].cancel()
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b": here\n\n"
            await asyncio.wait([self._jobs[request.path_params["id"]]])

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def audio(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b"RIFF"
            await asyncio.wait([self._jobs[request.path_params["id"]]])
            yield b"data"

        return StreamingResponse(stream(), media_type="audio/wav")

    def report(self) -> dict[str, Any]:
        return {"times": {"stages": {"separate_stems": {"compute_s": self._service_s}}}}

    async def report_file(self, request: Request) -> Response:
        return JSONResponse(self.report())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"models": [MODEL]})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(f"# HELP\njobs_total {len(self._jobs)}.0\n")

    async def SubmitRemix(self, requests: Any, context: Any) -> Any:  # noqa: N802
        parts = [request async for request in requests]
        head, body = parts[0].head, b"".join(part.chunk for part in parts)
        service_s = 3600.0 if body == SLOW else self._service_s
        self._jobs[head.job_id] = asyncio.create_task(self._work(service_s))
        return remix.Job(id=head.job_id, state=remix.JOB_STATE_QUEUED, options=head.options)

    async def StreamAudio(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield remix.AudioChunk(chunk=b"RIFF")
        await asyncio.wait([self._jobs[request.job_id]])
        yield remix.AudioChunk(chunk=b"data")

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await asyncio.wait([self._jobs[request.job_id]])
        yield remix.JobEvent(id=1, progress=remix.Progress(stage="separate_stems", fraction=1.0))
        yield remix.JobEvent(id=2, state=remix.JOB_STATE_DONE)

    async def GetArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield remix.FilePart(file=remix.File(name=request.name))
        yield remix.FilePart(chunk=json.dumps(self.report()).encode())

    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._jobs[request.job_id].cancel()
        return remix.Job(id=request.job_id, state=remix.JOB_STATE_CANCELLED)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        tensor = messages.ModelMetadataResponse.TensorMetadata(
            name="samples", datatype="FP32", shape=[-1, 1600]
        )
        return messages.ModelMetadataResponse(name=request.name, inputs=[tensor])

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.sleep(self._service_s)
        response = messages.ModelInferResponse(model_name=request.model_name)
        response.parameters["queue_s"].double_param = 0.0
        response.parameters["compute_s"].double_param = self._service_s
        response.parameters["batch_rows"].int64_param = 1
        response.outputs.add(name="samples", datatype="FP32", shape=[1, 250_000])
        response.raw_output_contents.append(bytes(1_000_000))
        return response


async def main(http_port: int, grpc_port: int, socket: str, service_s: float) -> None:
    stand_in = StandIn(service_s)
    server = grpc.aio.server()
    protocol.add_GRPCInferenceServiceServicer_to_server(stand_in, server)
    add_RemixServiceServicer_to_server(stand_in, server)
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    routes = [
        Route("/readyz", stand_in.ready),
        Route("/metrics", stand_in.metrics),
        Route("/v1/models", stand_in.models),
        Route("/v1/remix", stand_in.remix, methods=["POST"]),
        Route("/full/v1/remix", stand_in.refuse, methods=["POST"]),
        Route("/states", stand_in.states),
        Route("/v1/jobs/{id}", stand_in.submit, methods=["PUT"]),
        Route("/v1/jobs/{id}", stand_in.job, methods=["GET"]),
        Route("/v1/jobs/{id}", stand_in.cancel, methods=["DELETE"]),
        Route("/v1/jobs/{id}/events", stand_in.events),
        Route("/v1/jobs/{id}/audio", stand_in.audio),
        Route("/v1/jobs/{id}/artifacts/report.json", stand_in.report_file),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes), port=http_port, log_level="warning", lifespan="off"
    )
    await asyncio.create_subprocess_exec(*RUNNER, stdin=asyncio.subprocess.PIPE)
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
