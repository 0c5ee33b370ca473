"""The step batcher: requests come and go between steps, and none changes another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.errors import DeadlineExceeded, InvalidOption, ModelFailed, QueueFull
from remix.stages import Tensors
from runners.adaptive_batcher import AdaptiveBatcher, Workers
from runners.step_batcher import Outputs, StepBatcher, Writer
from tests.test_adaptive_batcher import settle

SOON_S = 30.0
REFUSED, BREAKS = -1, 13
"""Numbers of steps: one that no writer takes, and one that breaks its steps."""


class Steps:
    """Lets a test decide when a step is made, and tells who took part in each."""

    def __init__(self, free: bool = False) -> None:
        self.made: list[list[int]] = []
        self.is_free = free
        self._turns = threading.Semaphore(0)

    def let(self, count: int = 1) -> None:
        for _ in range(count):
            self._turns.release()

    def let_all(self) -> None:
        self.is_free = True
        self._turns.release(1000)

    def turn(self, who: list[int]) -> None:
        if not self.is_free:
            assert self._turns.acquire(timeout=SOON_S)
        self.made.append(who)


class Counting(Writer):
    """Answers a request after as many steps as it asks for."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._asked: dict[int, int] = {}
        self._left: dict[int, int] = {}

    def join(self, key: int, inputs: Tensors) -> None:
        asked = int(inputs["steps"][0])
        if asked == REFUSED:
            raise InvalidOption("steps is -1; it must be at least 1.")
        self._asked[key] = self._left[key] = asked

    def leave(self, key: int) -> None:
        del self._asked[key], self._left[key]

    def step(self) -> dict[int, Outputs]:
        self._steps.turn(sorted(self._asked.values()))
        if BREAKS in self._asked.values():
            raise ArithmeticError("broken")
        for key in self._left:
            self._left[key] -= 1
        done = [key for key, left in self._left.items() if left == 0]
        outputs = {key: {"y": np.array([self._asked[key]])} for key in done}
        for key in done:
            self.leave(key)
        return outputs


def batcher_of(
    steps: Steps, workers: Workers, max_batch_rows: int = 4, max_queue_rows: int = 100
) -> StepBatcher:
    def alone(inputs: Tensors) -> dict[str, NDArray[Any]]:
        writer = Counting(Steps(free=True))
        writer.join(0, inputs)
        while not (done := writer.step()):
            pass
        return done[0]

    return StepBatcher(
        "test",
        alone,
        workers,
        writer=lambda: Counting(steps),
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
    )


def asking(steps: int) -> dict[str, NDArray[Any]]:
    return {"steps": np.array([steps])}


async def answer(batcher: StepBatcher, steps: int) -> int:
    outputs, _ = await batcher.submit(asking(steps))
    return int(outputs["y"][0])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(2 * SOON_S):
            await scenario()

    asyncio.run(whole())


def test_short_request_joins_a_long_one_and_leaves_before_it() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(1))
        long = asyncio.create_task(answer(batcher, 5))
        steps.let()
        await until(lambda: len(steps.made) == 1)
        short = asyncio.create_task(answer(batcher, 2))
        await settle()
        steps.let(3)
        assert await short == 2
        assert not long.done()
        steps.let_all()
        assert await long == 5
        assert steps.made[0] == [5]
        assert steps.made.count([2, 5]) == 2
        assert len(steps.made) == 5

    run(scenario)


def test_free_worker_is_taken_before_company() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(2))
        calls = [asyncio.create_task(answer(batcher, count)) for count in (3, 4)]
        await settle()
        calls += [asyncio.create_task(answer(batcher, count)) for count in (5, 6)]
        await settle()
        steps.let_all()
        assert await asyncio.gather(*calls) == [3, 4, 5, 6]
        assert max(map(len, steps.made)) == 2  # two places of two each

    run(scenario)


def test_no_more_rows_are_written_at_once_than_may_be() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(1), max_batch_rows=3, max_queue_rows=4)
        calls = [asyncio.create_task(answer(batcher, count)) for count in (2, 3, 4)]
        await settle()
        calls += [asyncio.create_task(answer(batcher, count)) for count in (5, 6, 7, 8)]
        await settle()
        with pytest.raises(QueueFull):
            await answer(batcher, 1)
        steps.let_all()
        assert await asyncio.gather(*calls) == list(range(2, 9))
        assert max(map(len, steps.made)) == 3

    run(scenario)


def test_request_whose_caller_has_gone_leaves_at_the_next_step() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(1))
        calls = [asyncio.create_task(answer(batcher, count)) for count in (8, 9)]
        await settle()
        steps.let(2)
        await until(lambda: len(steps.made) == 2)
        calls[0].cancel()
        await settle()
        steps.let_all()
        assert await calls[1] == 9
        # The step that waited for its turn when the caller left was the last with it.
        assert steps.made == [[8, 9]] * 3 + [[9]] * 6

    run(scenario)


def test_request_that_cannot_be_or_breaks_the_model_fails_alone() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(1))
        counts = (3, REFUSED, BREAKS, 4)
        calls = [asyncio.create_task(answer(batcher, count)) for count in counts]
        await settle()
        steps.let_all()
        good, refused, broken, also_good = await asyncio.gather(*calls, return_exceptions=True)
        assert (good, also_good) == (3, 4)
        assert isinstance(refused, InvalidOption)
        assert isinstance(broken, ModelFailed)
        assert await answer(batcher, 2) == 2

    run(scenario)


def test_overdue_request_is_not_begun() -> None:
    async def scenario() -> None:
        steps = Steps()
        batcher = batcher_of(steps, Workers(1), max_batch_rows=1)
        first = asyncio.create_task(answer(batcher, 3))
        await settle()
        late = asyncio.create_task(batcher.submit(asking(7), deadline_s=0.0))
        await settle()
        steps.let_all()
        assert await first == 3
        with pytest.raises(DeadlineExceeded):
            await late
        assert [7] not in steps.made

    run(scenario)


def test_another_model_gets_the_worker_though_requests_keep_coming() -> None:
    async def scenario() -> None:
        steps, workers = Steps(free=True), Workers(1)
        batcher = batcher_of(steps, workers)
        other = AdaptiveBatcher(
            "other", lambda inputs: dict(inputs), workers, max_batch_rows=1, max_queue_rows=8
        )
        is_over = False

        async def keep_asking() -> None:
            while not is_over:
                await answer(batcher, 50)

        callers = [asyncio.create_task(keep_asking()) for _ in range(3)]
        await settle()
        for _ in range(5):
            await other.submit({"x": np.zeros((1, 1))})
        is_over = True
        await asyncio.gather(*callers)

    run(scenario)


def test_every_request_is_answered_whatever_its_neighbours_do() -> None:
    async def scenario() -> None:
        rng = np.random.default_rng(1)
        batcher = batcher_of(Steps(free=True), Workers(2), max_batch_rows=3)

        async def caller(counts: list[int]) -> None:
            for count in counts:
                call = asyncio.create_task(answer(batcher, count))
                if count % 5 == 0:
                    await asyncio.sleep(0)
                    call.cancel()
                    await asyncio.wait([call])
                else:
                    assert await call == count

        callers = rng.integers(1, 12, (16, 100)).tolist()  # 13 breaks, and is not drawn
        await asyncio.gather(*(caller(counts) for counts in callers))

    run(scenario)
