"""Requests -> steps: windows that are written token by token share every step.

Windows of different lengths would wait for the longest of their batch. Here they come and go
between steps (iteration-level batching): a new one joins those that are being written, one that is
done leaves at once, and so does one whose caller has gone. A worker that is free is taken first;
else the emptiest of the places at work. What waits, is refused, overdue or broken is treated as
`AdaptiveBatcher` does.

Source: Yu et al. 2022, Orca: A Distributed Serving System for Transformer-Based Generative Models,
section 3.1.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from remix.errors import RemixError
from remix.stages import Tensors
from runners.adaptive_batcher import (
    BATCH_WINDOWS,
    COMPUTE_SECONDS,
    COMPUTING_WINDOWS,
    QUEUE_SECONDS,
    AdaptiveBatcher,
    Compute,
    Request,
    Timing,
    Workers,
)

Outputs = dict[str, NDArray[Any]]


class Writer(ABC):
    """Requests that are written together, of one model, by one thread."""

    @abstractmethod
    def join(self, key: int, inputs: Tensors) -> None:
        """One more, from the next step on.

        Raises:
            RemixError: its inputs cannot be; nothing has changed.
        """

    @abstractmethod
    def leave(self, key: int) -> None:
        """One less, unfinished."""

    @abstractmethod
    def step(self) -> dict[int, Outputs]:
        """One token of each; those that are done, which have left."""


@dataclass(eq=False)
class _Share:
    """A request at work, and its share of the steps."""

    request: Request
    start_s: float
    steps: int = 0
    rows: int = 0
    """Summed over its steps: all that took part in them."""


class _Place:
    """Where a worker writes: what it was handed, until it has nothing left."""

    def __init__(self) -> None:
        """Open, and empty."""
        self.requests: set[Request] = set()
        """At work or about to be; the event loop's."""
        self._lock = Lock()
        self._inbox: list[Request] = []
        self._is_open = True

    @property
    def rows(self) -> int:
        """At work or about to be."""
        return sum(request.rows for request in self.requests)

    def hand(self, request: Request) -> bool:
        """One more; False if the worker has just gone."""
        with self._lock:
            if self._is_open:
                self._inbox.append(request)
                self.requests.add(request)
            return self._is_open

    def arrived(self, *, is_idle: bool) -> list[Request] | None:
        """What was handed since, for the worker; None, if it is idle: the place is closed."""
        with self._lock:
            arrived, self._inbox = self._inbox, []
            if is_idle and not arrived:
                self._is_open = False
                return None
            return arrived


class StepBatcher(AdaptiveBatcher):
    """Lets concurrent requests for one model share its steps."""

    def __init__(
        self,
        name: str,
        compute: Compute,
        workers: Workers,
        *,
        writer: Callable[[], Writer],
        max_batch_rows: int,
        max_queue_rows: int,
    ) -> None:
        """See `AdaptiveBatcher`; `writer` makes an empty one, `compute` writes a request alone."""
        super().__init__(
            name,
            compute,
            workers,
            max_batch_rows=max_batch_rows,
            max_queue_rows=max_queue_rows,
        )
        self._writer = writer
        self._places: list[_Place] = []

    async def _dispatch(self) -> None:
        if self._workers.free.locked():
            self._feed()
        if not self._waiting:
            return
        async with self._workers.one_for(self):
            await self._open_place()

    def _feed(self) -> None:
        """What waits joins what is at work, unless another model waits for the worker."""
        while self._waiting and self._places and not self._workers.are_wanted_besides(self):
            place = min(self._places, key=lambda place: place.rows)
            if place.rows + self._waiting[0].rows > self._max_batch_rows:
                break
            request = self._waiting.popleft()
            if self._is_live(request):
                self._hand(request, place)
        self.show_queue()

    def _hand(self, request: Request, place: _Place) -> None:
        if place.hand(request):
            COMPUTING_WINDOWS.labels(self._name).inc(request.rows)
        else:  # what comes next finds another, or a free worker
            self._places.remove(place)
            self._waiting.appendleft(request)

    async def _open_place(self) -> None:
        """Writes what waits, and what comes meanwhile."""
        place = _Place()
        while self._waiting and not place.requests:
            request = self._waiting.popleft()
            if self._is_live(request):
                self._hand(request, place)
        if not place.requests:
            return
        self._places.append(place)
        self._feed()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._workers.executor, self._write, place, loop)
        except Exception as error:  # noqa: BLE001 - whatever it was, nobody is to wait for ever
            for request in list(place.requests):
                self._ended(place, _Share(request, time.monotonic()), error)
        finally:
            if place in self._places:
                self._places.remove(place)

    def _write(self, place: _Place, loop: asyncio.AbstractEventLoop) -> None:
        """What a worker does, on its thread, until nothing is left."""

        def tell(share: _Share, result: Outputs | Exception | None) -> None:
            loop.call_soon_threadsafe(self._ended, place, share, result)

        writer, live = self._writer(), dict[int, _Share]()
        while (arrived := place.arrived(is_idle=not live)) is not None:
            for request in arrived:
                live[id(request)] = _Share(request, time.monotonic())
            try:
                for request in arrived:
                    try:
                        writer.join(id(request), request.inputs)
                    except RemixError as error:
                        tell(live.pop(id(request)), error)
                for key in [key for key, share in live.items() if share.request.future.done()]:
                    writer.leave(key)
                    tell(live.pop(key), None)
                done = writer.step()
            except Exception as error:  # noqa: BLE001 - a model's errors belong to the requests
                for share in live.values():  # to one of them: each is written again, alone
                    tell(share, error if len(live) == 1 else self._alone(share.request))
                writer, live = self._writer(), {}
                continue
            rows = sum(share.request.rows for share in live.values())
            for share in live.values():
                share.steps += 1
                share.rows += rows
            for key, outputs in done.items():
                tell(live.pop(key), outputs)

    def _alone(self, request: Request) -> Outputs | Exception:
        try:
            return self._compute(request.inputs)
        except Exception as error:  # noqa: BLE001 - as above
            return error

    def _ended(self, place: _Place, share: _Share, result: Outputs | Exception | None) -> None:
        """On the event loop: a request has left its place; None if it was unfinished."""
        request = share.request
        place.requests.discard(request)
        COMPUTING_WINDOWS.labels(self._name).dec(request.rows)
        if request.future.done():
            self._count(request, "wasted" if share.steps else "cancelled")
        elif isinstance(result, Exception):
            self._fail(request, result)
        elif result is not None:
            queue_s, compute_s = share.start_s - request.arrival_s, time.monotonic() - share.start_s
            rows = max(round(share.rows / max(share.steps, 1)), request.rows)
            QUEUE_SECONDS.labels(self._name).observe(queue_s)
            COMPUTE_SECONDS.labels(self._name).observe(compute_s)
            BATCH_WINDOWS.labels(self._name).observe(rows)
            self._count(request, "computed")
            request.future.set_result((result, Timing(queue_s, compute_s, rows)))
        self._feed()
