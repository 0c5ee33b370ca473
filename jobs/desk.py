"""What every transport shares: who does the work, and how much of it is let in at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from jobs.admission import Slots, check_room, check_runners, check_share
from jobs.door import Caller, Door
from jobs.estimate import Estimator, read_cost_model
from jobs.forecast import Forecast, Forecaster, Quote
from jobs.jobs import Jobs
from jobs.keys import KeyStore
from remix.composer import Composer
from remix.errors import DeadlineExceeded, LimitExceeded, NotFound, RunnerUnavailable
from remix.settings import Settings
from remix.stages import STAGES, Stage

UPLOAD_S = 600.0
"""How long a caller may take to send a request: 200 MB at 3 Mbit/s."""

WORK_S = 3_000.0
"""How long the work of one request may take: five times the longest song."""

UPLOADS_PER_REMIX = 8
"""Uploads at once for each remix at once: a slow one takes no slot of the work, but disk."""

STAGE_CALLS_PER_REMIX = 4
"""Calls of single stages that are let in for each remix that is: each holds less."""


class Desk:
    """One for the process: who does the work, who may come to it, and how much of it is let in.

    Args:
        settings: what the limits are.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._composer: Composer | None = None
        self._jobs: Jobs | None = None
        self._away: Callable[[], Sequence[Stage]] = tuple
        self.door = Door(settings.keys == "on")
        self.keys: KeyStore | None = None
        self.estimator = Estimator(read_cost_model())
        self._forecaster = Forecaster(self.estimator, settings.max_remixes)
        self._songs = Counter[str]()
        self._arriving = Counter[str]()
        self._uploads = Slots(settings.max_remixes * UPLOADS_PER_REMIX, "uploads")
        self._slots = {
            True: Slots(settings.max_remixes, "remixes"),
            False: Slots(settings.max_remixes * STAGE_CALLS_PER_REMIX, "calls of single stages"),
        }
        """By whether it is the whole flow."""

    def open(
        self,
        composer: Composer | None,
        jobs: Jobs | None = None,
        away: Callable[[], Sequence[Stage]] = tuple,
    ) -> None:
        """Take requests for these from now on; for none, refuse them.

        Args:
            composer: does the work.
            jobs: keeps what nobody waits for.
            away: the stages whose runner does not answer, as far as is known; tells at once.
        """
        self._composer = composer
        self._jobs = jobs
        self._away = away

    @property
    def composer(self) -> Composer:
        """Who does the work.

        Raises:
            RunnerUnavailable: the service is starting or stopping.
        """
        if self._composer is None:
            raise _not_ready()
        return self._composer

    @property
    def jobs(self) -> Jobs:
        """What is done without a caller who waits for it.

        Raises:
            RunnerUnavailable: the service is starting or stopping.
        """
        if self._jobs is None:
            raise _not_ready()
        return self._jobs

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse, before a request is read, what would be refused after that.

        Args:
            stages: that it needs.

        Raises:
            QueueFull: too much is under way.
            RunnerUnavailable: one that is needed does not answer.
        """
        check_runners(stages, self._away())
        self._slots[stages == STAGES].check()

    @asynccontextmanager
    async def uploading(self) -> AsyncIterator[None]:
        """While a request arrives.

        Raises:
            DeadlineExceeded: it takes too long.
            QueueFull: too many upload at once.
        """
        with self._uploads.hold():
            async with _within(UPLOAD_S, "The request was not here", "Send a smaller file."):
                yield

    @asynccontextmanager
    async def working(self, stages: Sequence[Stage], caller: Caller) -> AsyncIterator[None]:
        """While the work of a request is done.

        Args:
            stages: that it needs; all of them are the whole flow.
            caller: whose request it is.

        Raises:
            DeadlineExceeded: it takes too long.
            QueueFull: too much is under way at once, of all or of this caller.
        """
        remedy = "Send a shorter song, or ask for the stages one by one."
        with self._slots[stages == STAGES].hold():
            async with _within(WORK_S, "The work was not done", remedy):
                if stages != STAGES:
                    yield
                    return
                check_share(caller, self._songs[caller.owner], Forecast((), ()))
                with _counted(self._songs, caller):
                    yield

    @asynccontextmanager
    async def submitting(self, caller: Caller, job_id: str | None = None) -> AsyncIterator[Jobs]:
        """While a job's song arrives and is taken; to be entered before it is read.

        Args:
            caller: whose job it is.
            job_id: the caller's own, if it is known yet; what is there already is not refused.

        Raises:
            QueueFull: too many jobs, of all or of this caller, have not ended.
            RunnerUnavailable: one of the runners does not answer.
        """
        jobs = self.jobs
        if job_id is None or not await _knows(jobs, job_id, caller):
            check_runners(STAGES, self._away())
            expected = self._forecaster.forecast(*await jobs.outlook())
            check_room(caller, self._arriving, expected, self._settings.max_waiting_jobs)
            in_requests = self._songs[caller.owner] + self._arriving[caller.owner]
            check_share(caller, in_requests, expected)
        with _counted(self._arriving, caller):
            yield jobs

    async def quote(self, caller: Caller, duration_s: float) -> Quote:
        """What a song of this length would get now.

        Raises:
            LimitExceeded: no song may be so long.
        """
        limit_s = self._settings.max_duration_s
        if duration_s > limit_s:
            raise LimitExceeded(
                f"The song is {duration_s:g} s long; at most {limit_s:g} s are taken.",
                value=duration_s,
                limit=limit_s,
                remedy="Cut it first.",
            )
        load, started = await self.jobs.outlook()
        return self._forecaster.quote(caller.owner, duration_s, load, started)


@contextmanager
def _counted(songs: Counter[str], caller: Caller) -> Iterator[None]:
    songs[caller.owner] += 1
    try:
        yield
    finally:
        songs[caller.owner] -= 1
        if not songs[caller.owner]:
            del songs[caller.owner]


async def _knows(jobs: Jobs, job_id: str, caller: Caller) -> bool:
    try:
        await jobs.get(job_id, caller.owner)
    except NotFound:
        return False
    return True


def _not_ready() -> RunnerUnavailable:
    return RunnerUnavailable(
        "The service is starting or stopping; it must be ready.",
        value="not ready",
        limit="ready",
        remedy="Try again when GET /readyz answers 200.",
    )


@asynccontextmanager
async def _within(limit_s: float, failure: str, remedy: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"{failure} after {limit_s:g} s, which is the service's limit.",
            value=f"more than {limit_s:g} s",
            limit=limit_s,
            remedy=remedy,
        ) from error
