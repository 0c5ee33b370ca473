"""The batcher: who waits is merged, who fails fails alone, who has gone costs nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.errors import DeadlineExceeded, InvalidAudio, QueueFull
from remix.stages import Tensors
from runners.adaptive_batcher import AdaptiveBatcher, Workers


class GatedModel:
    """Doubles its input; computes only while its gate is open, and remembers its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[int] = []

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        assert self.gate.wait(10)
        self.batches.append(len(inputs["x"]))
        if np.isnan(inputs["x"]).any():
            raise InvalidAudio("not finite")
        return {"y": inputs["x"] * 2}


def batcher_of(
    model: GatedModel, max_batch_rows: int = 4, max_queue_rows: int = 100
) -> AdaptiveBatcher:
    return AdaptiveBatcher(
        "test", model, Workers(1), max_batch_rows=max_batch_rows, max_queue_rows=max_queue_rows
    )


def item(value: float, rows: int = 1, width: int = 3) -> dict[str, NDArray[Any]]:
    return {"x": np.full((rows, width), value, np.float32)}


async def settle() -> None:
    """Let every task that can run reach its next wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_that_wait_are_merged_up_to_the_limit() -> None:
    async def scenario() -> None:
        model = GatedModel()
        batcher = batcher_of(model)
        calls = [asyncio.create_task(batcher.submit(item(value))) for value in range(7)]
        await settle()
        model.gate.set()
        results = await asyncio.gather(*calls)
        for value, (outputs, _) in enumerate(results):
            np.testing.assert_array_equal(outputs["y"], np.full((1, 3), 2 * value))
        # The worker was free at the first dispatch, when all seven already waited.
        assert model.batches == [4, 3]

    asyncio.run(scenario())


def test_windows_of_different_shapes_are_not_merged() -> None:
    async def scenario() -> None:
        model = GatedModel()
        model.gate.set()
        batcher = batcher_of(model)
        await asyncio.gather(*(batcher.submit(item(1, width=width)) for width in (3, 4, 3, 4)))
        assert sorted(model.batches) == [2, 2]

    asyncio.run(scenario())


def test_a_bad_request_fails_alone() -> None:
    async def scenario() -> None:
        model = GatedModel()
        batcher = batcher_of(model)
        values = [1.0, float("nan"), 3.0]
        calls = [asyncio.create_task(batcher.submit(item(value))) for value in values]
        await settle()
        model.gate.set()
        good, bad, also_good = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(bad, InvalidAudio)
        assert not isinstance(good, BaseException)
        assert not isinstance(also_good, BaseException)

    asyncio.run(scenario())


def test_a_cancelled_request_is_not_computed() -> None:
    async def scenario() -> None:
        model = GatedModel()
        batcher = batcher_of(model, max_batch_rows=1)
        calls = [asyncio.create_task(batcher.submit(item(value))) for value in range(3)]
        await settle()
        calls[1].cancel()
        await settle()
        model.gate.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert model.batches == [1, 1]

    asyncio.run(scenario())


def test_an_overdue_request_is_not_computed() -> None:
    async def scenario() -> None:
        model = GatedModel()
        batcher = batcher_of(model, max_batch_rows=1)
        first = asyncio.create_task(batcher.submit(item(0)))
        await settle()
        late = asyncio.create_task(batcher.submit(item(1), time.monotonic() + 0.01))
        await asyncio.sleep(0.05)
        model.gate.set()
        await first
        with pytest.raises(DeadlineExceeded):
            await late
        assert model.batches == [1]

    asyncio.run(scenario())


def test_a_full_queue_refuses() -> None:
    async def scenario() -> None:
        model = GatedModel()
        batcher = batcher_of(model, max_batch_rows=1, max_queue_rows=2)
        calls = []
        for value in range(3):
            calls.append(asyncio.create_task(batcher.submit(item(value))))
            await settle()
        with pytest.raises(QueueFull, match="2 windows waiting, and takes 2"):
            await batcher.submit(item(9))
        model.gate.set()
        await asyncio.gather(*calls)

    asyncio.run(scenario())
