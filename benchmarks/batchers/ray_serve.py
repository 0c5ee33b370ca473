"""Ray Serve's batching behind a port: python -m benchmarks.batchers.ray_serve PORT."""

from __future__ import annotations

import signal
import sys
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from benchmarks.batchers.model import COUNT, MAX_BATCH, WAIT_S, Model


@serve.deployment(max_ongoing_requests=1000)
class Peer:
    """One batched method."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S
    )
    async def predict(self, numbers: list[int]) -> list[float]:
        """Rows."""
        return self.model(np.array(numbers)).tolist()  # type: ignore[no-any-return]

    async def __call__(self, request: Request) -> Response:
        """One number."""
        number = int((await request.json())["x"])
        if number == COUNT:
            return JSONResponse({"y": self.model.computed})
        try:
            return JSONResponse({"y": await self.predict(number)})
        except ValueError:
            return JSONResponse({"error": "model failed"}, 500)


def main() -> Any:
    """Serve until ended."""
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=True, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Peer.bind(), route_prefix="/predict")  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.pause()


if __name__ == "__main__":
    main()
