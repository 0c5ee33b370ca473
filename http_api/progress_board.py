"""Running requests -> how far each of their stages is, for whoever watches."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from http_api.problems import NO_SUCH_REQUEST, Refusal
from remix.stages import STAGES, Stage

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

MAX_ENDED = 256
"""Ended requests that are remembered, so that a watcher who comes late learns the end."""

HEARTBEAT_S = 10.0
"""A comment is sent after so much silence: proxies close silent connections after 30 s or more."""

APPEAR_S = 10.0
"""How long a watcher waits for a request that has not arrived yet."""


@dataclass(eq=False)
class Entry:
    """One request: the fraction done of each stage; calling it notes progress.

    It may be called from any thread.
    """

    fractions: dict[Stage, float] = field(default_factory=dict)
    outcome: str | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __call__(self, stage: Stage, fraction: float) -> None:
        """See `remix.stages.Progress`."""
        self._loop.call_soon_threadsafe(self._note, stage, fraction)

    def _note(self, stage: Stage, fraction: float) -> None:
        self.fractions[stage] = max(fraction, self.fractions.get(stage, 0.0))
        self._wake()

    def end(self, outcome: str) -> None:
        """Note that the request has ended, and how."""
        self.outcome = outcome
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events from now to the end; what is so far comes first."""
        sent: dict[Stage, float] = {}
        while True:
            changed = self._changed
            for stage in STAGES:
                fraction = self.fractions.get(stage)
                if fraction is not None and fraction != sent.get(stage):
                    sent[stage] = fraction
                    yield _event("progress", {"stage": stage, "fraction": round(fraction, 4)})
            if self.outcome is not None:
                yield _event("end", {"outcome": self.outcome})
                return
            try:
                await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
            except TimeoutError:
                yield b": still at work\n\n"


class ProgressBoard:
    """The entries of the requests whose callers gave them an id.

    In memory and bounded: running entries by the number of requests that are let in, ended
    ones by `MAX_ENDED`. Jobs that outlive a process are not its matter.
    """

    def __init__(self) -> None:
        """An empty board."""
        self._running: dict[tuple[str, str], Entry] = {}
        self._ended: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        self._arrival = asyncio.Event()

    @contextmanager
    def entry(self, owner: str, request_id: str | None) -> Iterator[Entry]:
        """The entry of an owner's request while it runs; nobody can watch one that has no id.

        Raises:
            Refusal: the id is malformed, or in use.
        """
        entry = Entry()
        if request_id is None:
            yield entry
            return
        check_request_id(request_id)
        name = owner, request_id
        if name in self._running:
            raise Refusal(
                409,
                f"X-Request-Id {request_id} is that of a request that is still running. "
                "Give each request its own.",
                value=request_id,
                limit="1 request at once with an id",
                remedy="Give each request its own X-Request-Id.",
            )
        self._ended.pop(name, None)
        self._running[name] = entry
        self._arrival.set()
        self._arrival = asyncio.Event()
        outcome = "failed"
        try:
            yield entry
            outcome = "done"
        finally:
            entry.end(outcome)
            del self._running[name]
            self._ended[name] = entry
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    async def watch(self, owner: str, request_id: str) -> Entry:
        """The entry of an owner's request that runs, has ended not long ago, or arrives very soon.

        Raises:
            Refusal: the id is malformed, or no such request came.
        """
        check_request_id(request_id)
        try:
            async with asyncio.timeout(APPEAR_S):
                while (found := self._find((owner, request_id))) is None:
                    await self._arrival.wait()
            return found
        except TimeoutError:
            pass
        raise Refusal(
            404,
            f"No request with X-Request-Id {request_id} is running, and none came within "
            f"{APPEAR_S:.0f} s. Send the id as the header X-Request-Id of the request.",
            value=request_id,
            limit=f"a request that runs, or comes within {APPEAR_S:.0f} s",
            remedy="Send the id as the header X-Request-Id of the request.",
            kind=NO_SUCH_REQUEST,
        )

    def _find(self, name: tuple[str, str]) -> Entry | None:
        return self._running.get(name) or self._ended.get(name)


def check_request_id(request_id: str) -> None:
    """Refuse an id that is too long or has characters that have no business in one.

    Raises:
        Refusal: 400.
    """
    if not REQUEST_ID.fullmatch(request_id):
        raise Refusal(
            400,
            f"X-Request-Id is {request_id[:80]!r}; it must be 1 to 64 letters, digits, dots, "
            "underscores and hyphens.",
            value=request_id[:80],
            limit=REQUEST_ID.pattern,
            remedy="Send a UUID, for example.",
        )


def _event(name: str, data: dict[str, object]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
