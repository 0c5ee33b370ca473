"""Requests -> batches: windows of whoever is waiting are computed together.

A batch is taken when a worker is free, from what waits then: nobody waits for company, and
under load batches grow by themselves, up to the model's limit for the device. Abandoned and
overdue requests are dropped before they cost anything: what is already being computed for them,
one window, is the last of it. A request that fails its batch fails alone. Why not BentoML's own:
it sheds load instead of waiting, fails a whole batch for one bad item, and computes what nobody
waits for any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge, Histogram

from remix.errors import DeadlineExceeded, ModelFailed, QueueFull, RemixError
from remix.stages import Tensors
from telemetry.exposition import SECONDS

QUEUE_SECONDS = Histogram(
    "philharmonics_queue_seconds", "Time a request waited for a worker", ["model"], buckets=SECONDS
)
COMPUTE_SECONDS = Histogram(
    "philharmonics_compute_seconds",
    "Time a batch took to compute; a request, where requests come and go between steps",
    ["model"],
    buckets=SECONDS,
)
BATCH_WINDOWS = Histogram(
    "philharmonics_batch_windows",
    "Windows in a batch; where they come and go, beside how many one was computed on average",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
QUEUE_WINDOWS = Gauge(
    "philharmonics_queue_windows", "Windows that wait now", ["model"], multiprocess_mode="livesum"
)
QUEUE_AGE_SECONDS = Gauge(
    "philharmonics_queue_age_seconds",
    "How long the oldest of them has waited, 0 where none waits",
    ["model"],
    multiprocess_mode="livemax",
)
COMPUTING_WINDOWS = Gauge(
    "philharmonics_computing_windows",
    "Windows that are computed now",
    ["model"],
    multiprocess_mode="livesum",
)
WINDOWS = Counter(
    "philharmonics_windows",
    "Windows: computed; cancelled or overdue before they cost anything; wasted, because their "
    "caller went away while they were computed; failed",
    ["model", "outcome"],
)
WINDOW_OUTCOMES = ("computed", "cancelled", "overdue", "wasted", "failed")
PADDING_WINDOWS = Counter(
    "philharmonics_padding_windows",
    "Computed padding, as parts of a window: silence behind a song's end",
    ["model"],
)
REQUESTS = Counter(
    "philharmonics_requests",
    "Requests by how they ended: done, failed, cancelled, refused",
    ["model", "outcome"],
)
REQUEST_OUTCOMES = ("done", "failed", "cancelled", "refused")

_log = logging.getLogger(__name__)

Compute = Callable[[Tensors], dict[str, NDArray[Any]]]

Padding = Callable[[Tensors, Tensors], float]
"""(inputs, outputs) -> how many windows' worth of what was computed was padding."""


def no_padding(inputs: Tensors, outputs: Tensors) -> float:
    """Of a model that nothing is filled up for."""
    return 0.0


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, and how many rows its batch had."""

    queue_s: float
    compute_s: float
    batch_rows: int


@dataclass(eq=False)
class Request:
    """One that waits or is computed."""

    inputs: Tensors
    rows: int
    signature: tuple[Any, ...]
    deadline_s: float
    arrival_s: float
    future: asyncio.Future[tuple[dict[str, NDArray[Any]], Timing]]


class Workers:
    """The threads that compute batches; models that share a device share them."""

    def __init__(self, count: int) -> None:
        """Make room for `count` batches at once."""
        self.executor: Executor = ThreadPoolExecutor(count, thread_name_prefix="compute")
        self.free = asyncio.Semaphore(count)
        self._claimants: list[object] = []

    @asynccontextmanager
    async def one_for(self, claimant: object) -> AsyncIterator[None]:
        """A worker, when one is free."""
        self._claimants.append(claimant)
        try:
            await self.free.acquire()
        finally:
            self._claimants.remove(claimant)
        try:
            yield
        finally:
            self.free.release()

    def are_wanted_besides(self, claimant: object) -> bool:
        """Whether somebody else waits for one."""
        return any(other is not claimant for other in self._claimants)


class AdaptiveBatcher:
    """Merges concurrent requests for one model into batches."""

    def __init__(
        self,
        name: str,
        compute: Compute,
        workers: Workers,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        padding: Padding = no_padding,
    ) -> None:
        """Prepare; nothing runs until the first `submit`.

        Args:
            name: of the model, for metrics and messages.
            compute: {input: [B, ...]} -> {output: [B, ...]}; called on a worker's thread.
            workers: who computes.
            max_batch_rows: the largest B; a single larger request is computed alone.
            max_queue_rows: rows that may wait; more are refused.
            padding: tells how much of a batch was waste.
        """
        self._name = name
        self._compute = compute
        self._workers = workers
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._padding = padding
        self._waiting: deque[Request] = deque()
        self._dispatches: set[asyncio.Task[None]] = set()
        # What has not happened yet is 0, not unknown: a rate sees the first of it.
        PADDING_WINDOWS.labels(name)
        for outcome in WINDOW_OUTCOMES:
            WINDOWS.labels(name, outcome)
        for outcome in REQUEST_OUTCOMES:
            REQUESTS.labels(name, outcome)
        self.show_queue()

    async def submit(
        self, inputs: Tensors, deadline_s: float = float("inf")
    ) -> tuple[dict[str, NDArray[Any]], Timing]:
        """Compute the outputs for one request's inputs.

        Args:
            inputs: {name: [B, ...]}, the same B for all.
            deadline_s: on `time.monotonic`'s clock; work that has not begun by then is dropped.

        Raises:
            QueueFull: as many rows wait as may.
            DeadlineExceeded: the deadline passed in the queue.
            ModelFailed: the model broke on this request.
        """
        rows = len(next(iter(inputs.values())))
        waiting_rows = sum(request.rows for request in self._waiting)
        if self._waiting and waiting_rows + rows > self._max_queue_rows:
            REQUESTS.labels(self._name, "refused").inc()
            raise QueueFull(
                f"{self._name} has {waiting_rows} windows waiting, and takes "
                f"{self._max_queue_rows}.",
                value=waiting_rows,
                limit=self._max_queue_rows,
                remedy="Try again later, or start another runner.",
            )
        signature = tuple((n, a.dtype.str, a.shape[1:]) for n, a in sorted(inputs.items()))
        request = Request(
            inputs,
            rows,
            signature,
            deadline_s,
            time.monotonic(),
            asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(request)
        self.show_queue()
        dispatch = asyncio.create_task(self._dispatch())
        self._dispatches.add(dispatch)  # the loop itself holds tasks only weakly
        dispatch.add_done_callback(self._dispatches.discard)
        try:
            result = await request.future
        except asyncio.CancelledError:
            REQUESTS.labels(self._name, "cancelled").inc()
            self._drop(request)
            raise
        except Exception:
            REQUESTS.labels(self._name, "failed").inc()
            raise
        REQUESTS.labels(self._name, "done").inc()
        return result

    def _drop(self, request: Request) -> None:
        """Out of the queue, if it is there still: its place is somebody else's."""
        if request in self._waiting:
            self._waiting.remove(request)
            self._count(request, "cancelled")
            self.show_queue()

    def _count(self, request: Request, outcome: str) -> None:
        WINDOWS.labels(self._name, outcome).inc(request.rows)

    def show_queue(self) -> None:
        """Tell the metrics how long the queue is, and since when; its age grows by itself."""
        QUEUE_WINDOWS.labels(self._name).set(sum(request.rows for request in self._waiting))
        now_s = time.monotonic()
        oldest_s = min((request.arrival_s for request in self._waiting), default=now_s)
        QUEUE_AGE_SECONDS.labels(self._name).set(now_s - oldest_s)

    async def _dispatch(self) -> None:
        async with self._workers.one_for(self):
            if batch := self._take():
                await self._run(batch)

    def _take(self) -> list[Request]:
        """The oldest live request and those that fit beside it, out of the queue."""
        batch: list[Request] = []
        left: deque[Request] = deque()
        rows = 0
        while self._waiting:
            request = self._waiting.popleft()
            if not self._is_live(request):
                continue
            if not batch or (
                request.signature == batch[0].signature
                and rows + request.rows <= self._max_batch_rows
            ):
                batch.append(request)
                rows += request.rows
            else:
                left.append(request)
        self._waiting = left
        self.show_queue()
        return batch

    def _is_live(self, request: Request) -> bool:
        """Whether somebody still waits for it, as far as its deadline goes."""
        if request.future.done():  # its caller has gone, and is about to say so
            self._count(request, "cancelled")
            return False
        if time.monotonic() > request.deadline_s:
            self._count(request, "overdue")
            request.future.set_exception(self._overdue(request))
            return False
        return True

    def _overdue(self, request: Request) -> DeadlineExceeded:
        waited_s = round(time.monotonic() - request.arrival_s, 3)
        given_s = round(request.deadline_s - request.arrival_s, 3)
        return DeadlineExceeded(
            f"A window waited {waited_s:g} s for {self._name}; its caller gave it {given_s:g} s.",
            value=waited_s,
            limit=given_s,
            remedy="Give it longer, or try again later.",
        )

    async def _run(self, batch: list[Request]) -> None:
        rows = sum(request.rows for request in batch)
        computing = COMPUTING_WINDOWS.labels(self._name)
        computing.inc(rows)
        try:
            outputs, timing_of = await asyncio.get_running_loop().run_in_executor(
                self._workers.executor, self._compute_batch, batch
            )
        except Exception as error:  # noqa: BLE001 - the model's errors belong to the requests
            computing.dec(rows)
            await self._blame(batch, error)
            return
        computing.dec(rows)
        for request, output in zip(batch, outputs, strict=True):
            if request.future.done():
                self._count(request, "wasted")
            else:
                self._count(request, "computed")
                request.future.set_result((output, timing_of(request)))

    async def _blame(self, batch: list[Request], error: Exception) -> None:
        """Fail the request that fails by itself; the others of its batch are computed again."""
        if len(batch) > 1:
            for request in batch:
                if request.future.done():
                    self._count(request, "wasted")
                else:
                    await self._run([request])
            return
        self._fail(batch[0], error)

    def _fail(self, request: Request, error: Exception) -> None:
        """Tell its caller, who may have gone."""
        self._count(request, "failed")
        if not isinstance(error, RemixError):
            _log.error("%s failed", self._name, exc_info=error)
            error = _model_failed(self._name, error)
        if not request.future.done():
            request.future.set_exception(error)

    def _compute_batch(
        self, batch: list[Request]
    ) -> tuple[list[dict[str, NDArray[Any]]], Callable[[Request], Timing]]:
        start_s = time.monotonic()
        rows = sum(request.rows for request in batch)
        inputs = batch[0].inputs
        if len(batch) == 1:
            computed = self._compute(inputs)
            outputs = [computed]
        else:
            inputs = {
                name: np.concatenate([request.inputs[name] for request in batch]) for name in inputs
            }
            computed = self._compute(inputs)
            ends = np.cumsum([request.rows for request in batch])
            outputs = [
                {name: array[end - request.rows : end] for name, array in computed.items()}
                for request, end in zip(batch, ends, strict=True)
            ]
        compute_s = time.monotonic() - start_s
        COMPUTE_SECONDS.labels(self._name).observe(compute_s)
        BATCH_WINDOWS.labels(self._name).observe(rows)
        PADDING_WINDOWS.labels(self._name).inc(self._padding(inputs, computed))
        for request in batch:
            QUEUE_SECONDS.labels(self._name).observe(start_s - request.arrival_s)
        return outputs, lambda r: Timing(start_s - r.arrival_s, compute_s, rows)


def _model_failed(name: str, cause: Exception) -> ModelFailed:
    failed = ModelFailed(
        f"The model {name} broke on a window: {type(cause).__name__}.",
        value=type(cause).__name__,
        limit="a window that it can compute",
        remedy="The runner's log has the details; report it.",
    )
    failed.__cause__ = cause
    return failed
