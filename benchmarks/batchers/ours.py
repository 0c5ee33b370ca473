"""Ours behind a port: python -m benchmarks.batchers.ours PORT."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.batchers.model import COUNT, MAX_BATCH, Model
from http_api.admission import while_wanted
from remix.errors import Cancelled, ModelFailed
from runners.adaptive_batcher import AdaptiveBatcher, Workers

MODEL = Model()


def compute(inputs: Any) -> dict[str, Any]:
    """A batch."""
    return {"y": MODEL(inputs["x"][:, 0])[:, None]}


async def predict(request: Request) -> Response:
    """One number."""
    number = int((await request.json())["x"])
    if number == COUNT:
        return JSONResponse({"y": MODEL.computed})
    batcher: AdaptiveBatcher = request.app.state.batcher
    try:
        outputs, _ = await while_wanted(request, batcher.submit({"x": np.array([[number]])}))
    except ModelFailed:
        return JSONResponse({"error": "model failed"}, 500)
    except Cancelled:
        return JSONResponse({"error": "cancelled"}, 499)
    return JSONResponse({"y": float(outputs["y"][0, 0])})


app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
app.state.batcher = AdaptiveBatcher(
    "peer", compute, Workers(1), max_batch_rows=MAX_BATCH, max_queue_rows=10_000
)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
