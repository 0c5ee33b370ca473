"""A stand-in for the service, for the tests of the load generator: it computes nothing.

    python -m tests.load_stand_in HTTP_PORT GRPC_PORT SECONDS

`POST /v1/remix` and `ModelInfer` answer after SECONDS; jobs take as long, one at a time, but for
those whose body is `SLOW`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

SLOW = b"slow"
"""The body of a job that ends by being cancelled."""


class StandIn(protocol.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Both faces."""

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

    async def artifact(self, request: Request) -> Response:
        if request.path_params["name"] == "report.json":
            stages = {"separate_stems": {"compute_s": self._service_s, "cache": "miss"}}
            return JSONResponse({"times": {"stages": stages}})
        return Response(b"RIFF", media_type="audio/wav")

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
        return response


async def main(http_port: int, grpc_port: int, service_s: float) -> None:
    stand_in = StandIn(service_s)
    runner = grpc.aio.server()
    protocol.add_GRPCInferenceServiceServicer_to_server(stand_in, runner)
    runner.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await runner.start()
    routes = [
        Route("/readyz", stand_in.ready),
        Route("/v1/remix", stand_in.remix, methods=["POST"]),
        Route("/full/v1/remix", stand_in.refuse, methods=["POST"]),
        Route("/states", stand_in.states),
        Route("/v1/jobs/{id}", stand_in.submit, methods=["PUT"]),
        Route("/v1/jobs/{id}", stand_in.job, methods=["GET"]),
        Route("/v1/jobs/{id}", stand_in.cancel, methods=["DELETE"]),
        Route("/v1/jobs/{id}/events", stand_in.events),
        Route("/v1/jobs/{id}/artifacts/{name}", stand_in.artifact),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes), port=http_port, log_level="warning", lifespan="off"
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
