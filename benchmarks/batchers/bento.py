"""BentoML's adaptive batching behind a port: bentoml serve benchmarks.batchers.bento:Peer."""

from __future__ import annotations

import bentoml
import numpy as np
from numpy.typing import NDArray

from benchmarks.batchers.model import MAX_BATCH, Model

# Its `max_latency_ms` is no wait: what would take longer is refused with 503.
LATENCY_MS = 60_000


@bentoml.service(
    name="peer", workers=1, traffic={"timeout": 120}, logging={"access": {"enabled": False}}
)
class Peer:
    """One batchable method."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=LATENCY_MS
    )
    def predict(self, x: NDArray[np.int64]) -> NDArray[np.float64]:
        """[B] -> [B]."""
        return self.model(x)
