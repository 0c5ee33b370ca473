"""schedule -> requests, each at its time whatever became of the others; and what became of each.

The load is open: a slow server gets the next request at its time all the same, and latency counts
from the intended time, not from when the request went out. So a server that stands still for 6 s
shows in every request that was due meanwhile, instead of in the one that happened to be under way
(coordinated omission). Nothing is left out in silence: a request that could not be sent, because
`in_flight` others were unanswered, is a record too.

The generator measures itself: how late each request was sent, and how late its event loop wakes.
A run is valid if both stay below 5 ms at the 99th percentile (`MAX_LAG_S`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from load_tests.figures import percentile

MAX_LAG_S = 0.005
"""A run is valid if the generator was less late than this in 99 of 100 cases."""

HEARTBEAT_S = 0.01
"""How often the event loop's lag is looked at."""

LEAD_S = 0.2
"""From the call to the schedule's zero: what the first requests need is ready by then."""

SWITCH_S = 0.0005
"""After which a thread gives way to the event loop."""

OK, TIMEOUT, NOT_SENT = "ok", "timeout", "not_sent"


@dataclass(frozen=True)
class Work:
    """What one request asks for, ready to send.

    Args:
        audio_s: seconds of audio that it is about.
        body: of the request, as the target sends it.
        content_type: of the body, where the target needs one.
    """

    audio_s: float
    body: bytes
    content_type: str = ""


@dataclass(frozen=True)
class Answer:
    """What a target says of one request.

    Args:
        status: `ok`, or the code of what it got instead: "429", "UNAVAILABLE", "unreachable".
        refusals: codes that it got before, and tried again.
        first_s: from the sending to the first of the answer's data.
        parts: what the server says of it: `queue_s`, `compute_s`, `batch_rows`, cache hits.
    """

    status: str
    refusals: tuple[str, ...] = ()
    first_s: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


class Target(Protocol):
    """Where requests go."""

    async def send(self, work: Work) -> Answer:
        """Send one request and read its answer to the end; cancelled, leave nothing behind."""
        ...


@dataclass(frozen=True)
class Record:
    """One request. Times are seconds after the run's start.

    Args:
        intended_s: when it was due.
        sent_s: when it was sent; none if it could not be.
        done_s: when its answer, or the end of patience, was there.
        audio_s: seconds of audio that it was about.
        answer: what came of it.
    """

    intended_s: float
    sent_s: float | None
    done_s: float
    audio_s: float
    answer: Answer

    @property
    def latency_s(self) -> float:
        """From the intended time to the end."""
        return self.done_s - self.intended_s

    @property
    def is_ok(self) -> bool:
        """Whether it was answered as asked."""
        return self.answer.status == OK


@dataclass(frozen=True)
class Lag:
    """How late the generator itself was, in seconds.

    Args:
        send_s: of each request, from its time to its sending.
        loop_s: of the event loop, at each look.
    """

    send_s: Sequence[float]
    loop_s: Sequence[float]

    @property
    def is_valid(self) -> bool:
        """Whether the figures of the run say something about the server."""
        return all(percentile(late, 99) < MAX_LAG_S for late in (self.send_s, self.loop_s) if late)


@dataclass(frozen=True)
class Run:
    """A run, over.

    Args:
        records: every request, in the order of their times; not those that a stop cut off.
        lag: of the generator.
        stopped_s: when it was stopped before its end, if it was.
    """

    records: Sequence[Record]
    lag: Lag
    stopped_s: float | None = None


@dataclass(frozen=True)
class Event:
    """Something that is done to the server at a time of the run: a fault."""

    at_s: float
    act: Callable[[], None]


async def open_loop(
    target: Target,
    plan: Sequence[tuple[float, Work]],
    *,
    in_flight: int,
    patience_s: Callable[[float], float],
    events: Sequence[Event] = (),
    stops: Callable[[Record], bool] = lambda _: False,
) -> Run:
    """Send every request of a plan at its time.

    Args:
        target: where to.
        plan: times in seconds, ascending, and what is sent.
        in_flight: requests that may be unanswered at once; what is due beyond is `not_sent`.
        patience_s: audio seconds -> how long after the intended time a request is given up.
        events: faults, at times of the same clock.
        stops: whether, after this record, there is nothing more to learn: the run ends there, and
            what is under way is cancelled.
    """
    loop = asyncio.get_running_loop()
    _forget_garbage()
    start_s = loop.time() + LEAD_S
    records: list[Record] = []
    send_lag: list[float] = []
    under_way: set[asyncio.Task[None]] = set()
    stopped_s: float | None = None

    def keep(record: Record) -> None:
        nonlocal stopped_s
        records.append(record)
        if stopped_s is None and stops(record):
            stopped_s = loop.time() - start_s
            pacing.cancel()

    async def one(at_s: float, work: Work) -> None:
        sent_s = loop.time() - start_s
        send_lag.append(sent_s - at_s)
        answer = await _within(target.send(work), start_s + at_s + patience_s(work.audio_s))
        keep(Record(at_s, sent_s, loop.time() - start_s, work.audio_s, answer))

    async def pace() -> None:
        for at_s, work in plan:
            if (wait_s := start_s + at_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            if len(under_way) >= in_flight:
                now_s = loop.time() - start_s
                keep(Record(at_s, None, now_s, work.audio_s, Answer(NOT_SENT)))
                continue
            task = asyncio.create_task(one(at_s, work))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    with _heartbeat() as loop_lag, _at_times(events, start_s):
        pacing = asyncio.create_task(pace())
        await asyncio.wait([pacing])
        if stopped_s is None:
            pacing.result()
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    records.sort(key=lambda record: record.intended_s)
    return Run(records, Lag(send_lag, loop_lag), stopped_s)


async def closed_loop(
    target: Target,
    works: Sequence[Work],
    *,
    in_flight: int,
    for_s: float,
    patience_s: Callable[[float], float],
) -> Run:
    """Keep `in_flight` requests under way, each following an answer, for capacity only.

    Args:
        target: where to.
        works: sent in their order.
        in_flight: how many are under way.
        for_s: nothing is begun after that.
        patience_s: audio seconds -> how long a request is waited for.
    """
    loop = asyncio.get_running_loop()
    _forget_garbage()
    start_s = loop.time()
    queue = iter(works)
    records: list[Record] = []

    async def worker() -> None:
        for work in queue:
            sent_s = loop.time() - start_s
            if sent_s > for_s:
                return
            answer = await _within(target.send(work), loop.time() + patience_s(work.audio_s))
            records.append(Record(sent_s, sent_s, loop.time() - start_s, work.audio_s, answer))

    with _heartbeat() as loop_lag:
        await asyncio.gather(*(worker() for _ in range(in_flight)))
    records.sort(key=lambda record: record.intended_s)
    return Run(records, Lag([], loop_lag))


async def _within(sending: Coroutine[object, object, Answer], until_s: float) -> Answer:
    try:
        async with asyncio.timeout_at(until_s):
            return await sending
    except TimeoutError:
        return Answer(TIMEOUT)


def go_first() -> None:
    """Have this thread, and what it starts from now on, woken at once however busy the server is.

    Where that is allowed (root): else the clock that the server is measured by may be late because
    of the server, and the lag says so. And have the event loop wait less for other threads.
    """
    sys.setswitchinterval(SWITCH_S)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _forget_garbage() -> None:
    """Collect what there is before a run, and let its collections pass over what is left."""
    gc.collect()
    gc.freeze()


@contextmanager
def _heartbeat() -> Iterator[list[float]]:
    """The event loop's lag while the block runs."""
    lag: list[float] = []

    async def beat() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            lag.append(loop.time() - due_s)

    task = asyncio.create_task(beat())
    try:
        yield lag
    finally:
        task.cancel()


@contextmanager
def _at_times(events: Sequence[Event], start_s: float) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    handles = [loop.call_at(start_s + event.at_s, event.act) for event in events]
    try:
        yield
    finally:
        for handle in handles:
            handle.cancel()
