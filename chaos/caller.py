"""A caller who hands jobs over and wants every one of them, whatever becomes of the servers.

Each job is followed by a thread of its own: submitted by the caller's own id until it is admitted,
watched to its end, and then all of its files are fetched. Connections that break are made anew, and
events read again from the first: what the caller must never see is a job that is lost, changed, or
that ended twice.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx

ENDED = {"done", "failed", "cancelled"}

UNLIKE = {"report.json"}
"""Files that hold times, and so differ from run to run."""

TIMEOUT = httpx.Timeout(60.0, connect=5.0)

PAUSE_S = 0.1

PATIENCE_S = 300.0
"""For a job, faults and all: a job that has not ended by then is lost."""

Sums = Mapping[str, str]


@dataclass(frozen=True)
class Piece:
    """What is asked for.

    Args:
        song: FLAC.
        options: of the remix.
        name: tells it from others; the same piece has the same bytes wherever it is made.
    """

    song: bytes
    options: Mapping[str, Any]
    name: str


@dataclass
class Told:
    """What a caller saw of one job.

    Args:
        job_id: the caller's own.
        piece: what was asked for.
        admitted_s: when it was, on `time.monotonic`'s clock.
        ended_s: when the caller knew of its end.
        job: as the service told it at the end.
        sums: of its files, as they were fetched.
        ends: events of a last state: there must be one.
        broken: connections and answers that failed on the way.
        problem: why the caller gave up.
    """

    job_id: str
    piece: Piece
    admitted_s: float | None = None
    ended_s: float | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def attempt(self) -> int:
        """How many times it was begun."""
        return int(self.job.get("attempt", 0))

    def violations(self, expected: Sums | None) -> list[str]:
        """What must not be: lost, twice, changed.

        Args:
            expected: checksums of the piece's files from an undisturbed run; none: not compared.
        """
        if self.problem:
            return [f"{self.job_id}: {self.problem}"]
        found = []
        if self.job["state"] != "done":
            found.append(f"{self.job_id} is {self.job['state']}: {self.job.get('error')}")
        elif expected is not None and self.sums != expected:
            differing = {n for n in {*self.sums, *expected} if self.sums.get(n) != expected.get(n)}
            found.append(f"{self.job_id} has other bytes than undisturbed in {sorted(differing)}")
        if len(self.ends) != 1:
            found.append(f"{self.job_id} ended {len(self.ends)} times: {self.ends}")
        return found


class Caller:
    """Submits jobs and follows them.

    Args:
        urls: of the composers; a caller goes on to the next one when one fails him.
        webhook_url: that is to be told; none if empty.
    """

    def __init__(self, urls: Sequence[str], webhook_url: str = "") -> None:
        self._query = {"webhook_url": webhook_url} if webhook_url else {}
        self._urls = cycle(urls)
        self._url = next(self._urls)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.told: list[Told] = []

    def submit(self, prefix: str, pieces: Sequence[Piece]) -> list[Told]:
        """Hand over a job for each piece; returns at once."""
        told = [Told(f"{prefix}-{piece.name}", piece) for piece in pieces]
        self.told += told
        for one in told:
            # Daemons: a scenario that breaks does not wait for its callers.
            self._threads.append(threading.Thread(target=self._follow, args=[one], daemon=True))
            self._threads[-1].start()
        return told

    def wait(self) -> list[Told]:
        """All jobs, each at its end or given up."""
        for thread in self._threads:
            thread.join()
        return self.told

    def _follow(self, told: Told) -> None:
        try:
            self._carry_through(told)
        except Exception as error:
            told.problem = f"the caller failed: {error!r}"
            raise

    def _carry_through(self, told: Told) -> None:
        until_s = time.monotonic() + PATIENCE_S
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            steps = (self._admit, self._watch, self._fetch)
            for step in steps:
                while not step(client, told):
                    if time.monotonic() > until_s:
                        seen = told.job.get("state", "never admitted")
                        told.problem = f"not ended after {PATIENCE_S:g} s, {seen}: {told.broken}"
                        return
                    time.sleep(PAUSE_S)

    def _admit(self, client: httpx.Client, told: Told) -> bool:
        form = {"options": json.dumps(told.piece.options)}
        song = {"song": told.piece.song}
        answer = self._ask(client, told, "PUT", "", files=song, data=form, params=self._query)
        if answer is None:
            return False
        told.admitted_s = time.monotonic()
        told.job = answer.json()
        return True

    def _watch(self, client: httpx.Client, told: Told) -> bool:
        """Follow the events; True once the last one is there."""
        last, url = "0", self._url
        try:
            with client.stream("GET", f"{url}/v1/jobs/{told.job_id}/events") as answer:
                if answer.status_code != 200:
                    self._fails(told, url, f"events {answer.status_code}")
                    return False
                for line in answer.iter_lines():
                    if line.startswith("data: ") and "state" in (data := json.loads(line[6:])):
                        last = data["state"]
                        if last in ENDED:
                            told.ends.append(last)
        except httpx.TransportError as error:
            self._fails(told, url, f"events {type(error).__name__}")
        told.ended_s = time.monotonic()
        return last in ENDED

    def _fetch(self, client: httpx.Client, told: Told) -> bool:
        answer = self._ask(client, told, "GET", "")
        if answer is None:
            return False
        told.job = answer.json()
        for artifact in told.job["artifacts"]:
            name = artifact["name"]
            if name in UNLIKE or name in told.sums:
                continue
            file = self._ask(client, told, "GET", f"/artifacts/{name}")
            if file is None:
                return False
            told.sums[name] = hashlib.sha256(file.content).hexdigest()
        return True

    def _ask(
        self, client: httpx.Client, told: Told, method: str, path: str, **body: Any
    ) -> httpx.Response | None:
        """An answer, or none that is of use."""
        url = self._url
        try:
            answer = client.request(method, f"{url}/v1/jobs/{told.job_id}{path}", **body)
        except httpx.TransportError as error:
            self._fails(told, url, f"{method} {type(error).__name__}")
            return None
        if not answer.is_success:
            self._fails(told, url, f"{method} {answer.status_code}")
            return None
        return answer

    def _fails(self, told: Told, url: str, why: str) -> None:
        """Note it, and go elsewhere, if there is somewhere else and nobody has gone before."""
        told.broken.append(why)
        with self._lock:
            if url == self._url:
                self._url = next(self._urls)
