"""LitServe's batching behind a port: python -m benchmarks.batchers.lit PORT.

LitServe reads the annotations of `decode_request` at run time: none stands for a body of JSON.
"""

import sys
from typing import Any

import litserve
import numpy as np

from benchmarks.batchers.model import MAX_BATCH, WAIT_S, Model


class Peer(litserve.LitAPI):  # type: ignore[misc]
    """One model."""

    def setup(self, device: Any) -> None:
        """Load it."""
        self.model = Model()

    def decode_request(self, request) -> int:  # type: ignore[no-untyped-def] # noqa: ANN001
        """A body -> a number."""
        return int(request["x"])

    def batch(self, inputs: list[int]) -> Any:
        """Numbers -> a batch."""
        return np.array(inputs)

    def predict(self, x: Any) -> Any:
        """[B] -> [B]."""
        return self.model(x)

    def unbatch(self, output: Any) -> Any:
        """A batch -> rows."""
        return output.tolist()

    def encode_response(self, output: Any) -> Any:
        """A row -> a body."""
        return {"y": float(output)}


if __name__ == "__main__":
    api = Peer(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S)
    server = litserve.LitServer(api, accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False,
               log_level="error")  # fmt: skip
