"""The work on jobs in one composer: begun in turn, held by leases, carried on after crashes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import anyio.to_thread
from prometheus_client import Gauge, Histogram

from jobs.bells import Bells
from jobs.claims import Claim, Claims, LostClaim
from jobs.database import Database
from jobs.estimate import Estimator
from jobs.files import Files
from jobs.identity import time_of, version_id
from jobs.job import ENDED, STATES, ArtifactInfo, JobFailure
from jobs.rows import Row, StoredArtifact
from jobs.webhook import Webhooks
from jobs.work import Workshop
from jobs.workflow import Outcome, Workflows
from remix.composer import Composer
from remix.errors import (
    QueueFull,
    RemixError,
    RunnerUnavailable,
    StorageUnavailable,
    full_disk,
    is_for_want_of_room,
)
from remix.settings import Settings
from telemetry.exposition import LONG_SECONDS
from telemetry.logs import fact
from telemetry.traces import carried_on

POLL_S = 1.0
"""What another composer leaves is seen after so long; what comes in here, at once."""

LEASES_RENEWED = 4
"""Times within a lease: three renewals may fail before others take over."""

RETRY_S = (1.0, 2.0, 5.0, 10.0)
"""Between tries of work that failed because a runner, the database or a disk was away."""

PATIENCE_S = 3_600.0
"""How long a job waits for what is away, in all, before it fails."""

MAX_ATTEMPTS = 20
"""A job whose composer died so often has killed it."""

COUNT_S = 5.0
"""Between two counts of the jobs, for the metrics."""

SWEEP_S = 30.0
"""Between two looks for what has been kept for long enough."""

ORPHAN_S = 3_600.0
"""A folder of files that is so old and belongs to no job was left by a crash."""

JOBS = Gauge(
    "philharmonics_jobs",
    "Jobs by state, in all composers of the database; those that have ended as long as they are "
    "kept",
    ["state"],
    multiprocess_mode="livemax",
)
JOB_AGE_SECONDS = Gauge(
    "philharmonics_job_age_seconds",
    "How long the oldest queued job has waited, 0 where none waits",
    multiprocess_mode="livemax",
)
JOB_SECONDS = Histogram(
    "philharmonics_job_seconds",
    "Time from a job's submission to its end, by how it ended; of jobs that were begun",
    ["state"],
    buckets=LONG_SECONDS,
)

_log = logging.getLogger(__name__)

MakeRoom = Callable[[], Awaitable[None]]
"""Deletes what can be had again."""


@dataclass(eq=False)
class _Held:
    """A job that this composer works on."""

    claim: Claim
    has_settled: bool = False
    is_cancelled: bool = False
    making: asyncio.Task[Outcome] | None = None

    def stop(self) -> None:
        """End its compute."""
        if self.making is not None:
            self.making.cancel()


class Worker:
    """Begins what is to be done, does it, and cleans up after it.

    Args:
        settings: how many run at once, how long leases last and ended jobs are kept.
        composer: does the work.
        estimator: learns how long that takes.
        database: with the rows.
        files: songs, and what is made of them.
        bells: are rung when there is news.
        make_room: is asked for when the disk is full.
    """

    def __init__(
        self,
        settings: Settings,
        composer: Composer,
        estimator: Estimator,
        database: Database,
        files: Files,
        bells: Bells,
        make_room: MakeRoom,
    ) -> None:
        self._settings = settings
        self._estimator = estimator
        self._database = database
        self._files = files
        self._bells = bells
        self._make_room = make_room
        # Never given twice: a composer that is started again is another one.
        holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._claims = Claims(
            database,
            holder,
            settings.lease_s,
            settings.retention_s,
            version_id(composer.manifest, composer.models_dir),
        )
        self._workshop = Workshop(self._claims, files, composer)
        self._workflows = Workflows(settings.database_url, holder, self)
        self._webhooks = Webhooks(settings.webhook_hosts, settings.webhook_secret)
        self._held: dict[str, _Held] = {}
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self.is_stopping = False
        for state in sorted(ENDED):
            JOB_SECONDS.labels(state)

    async def start(self) -> None:
        """Take up what a dead composer left, and begin to work."""
        if await anyio.to_thread.run_sync(self._database.is_alone):
            await self._claims.void_leases()
        await self._workflows.start()
        self._loops = [asyncio.create_task(self._dispatch_on())]
        self._loops += [
            asyncio.create_task(self._forever(work, every_s))
            for work, every_s in (
                (self._renew, self._settings.lease_s / LEASES_RENEWED),
                (self._count, COUNT_S),
                (self._sweep, min(SWEEP_S, max(1.0, self._settings.retention_s / 4))),
            )
        ]

    async def drain(self, limit_s: float) -> None:
        """Begin nothing more, and wait until what runs has ended, for so long at most."""
        self.is_stopping = True
        until_s = time.monotonic() + limit_s
        while self._held and (left_s := until_s - time.monotonic()) > 0:
            self._left.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), left_s)

    async def stop(self) -> None:
        """Leave what has not ended to others, who go on from its last checkpoint."""
        self.is_stopping = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        left = [held.claim for held in self._held.values()]
        await self._workflows.stop()
        for claim in left:
            with suppress(LostClaim, StorageUnavailable):
                await self._claims.release(claim)

    def wake(self) -> None:
        """There may be something to begin."""
        self._wake.set()

    def cancel(self, uid: str) -> bool:
        """End the compute of a job that was cancelled, if it is done here; whether it was."""
        held = self._held.get(uid)
        if held is None or held.has_settled:
            return False
        held.is_cancelled = True
        held.stop()
        return True

    async def _forever(self, work: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while True:
            await _logged(work())
            await asyncio.sleep(every_s)

    async def _dispatch_on(self) -> None:
        while True:
            self._wake.clear()
            await _logged(self._dispatch())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_S)

    async def _dispatch(self) -> None:
        """Begin what can be begun: first what was interrupted, then whose turn it is."""
        while self._has_room():
            claim = await self._next()
            if claim is None:
                return
            self._held[claim.uid] = _Held(claim)
            self._bells.ring(claim.uid)
            try:
                await self._workflows.begin(claim.uid, claim.attempt == 1)
            except BaseException:
                self._held.pop(claim.uid, None)  # its lease runs out, and somebody tries again
                raise

    def _has_room(self) -> bool:
        working = sum(not held.has_settled for held in self._held.values())
        return not self.is_stopping and working < self._settings.max_remixes

    async def _next(self) -> Claim | None:
        # After an outage of the database nobody could renew a lease: give everybody the time.
        if time.monotonic() - self._database.failed_s > self._settings.lease_s:
            for uid in await self._claims.abandoned():
                if uid not in self._held and (claim := await self._claims.take_over(uid)):
                    _log.warning("Job %s goes on here, in attempt %d.", uid, claim.attempt)
                    return claim
        return await self._claims.begin_next()

    async def _renew(self) -> None:
        """Keep what is held; let go of what is not any more."""
        held = list(self._held.values())
        if not held:
            return
        good = await self._claims.renew([one.claim for one in held])
        for one in held:
            if one.claim in good or one.has_settled:
                continue
            with suppress(LostClaim):
                one.is_cancelled = (await self._claims.row(one.claim)).job.state == "cancelled"
            one.stop()

    async def _count(self) -> None:
        """Tell the metrics how many jobs there are."""
        counts, age_s = await self._claims.census()
        for state in STATES:
            JOBS.labels(state).set(counts.get(state, 0))
        JOB_AGE_SECONDS.set(age_s)

    async def _sweep(self) -> None:
        """Delete what has been kept for long enough, and what a crash left."""
        if uids := await self._claims.expired():
            await self._files.run(self._files.delete, uids)
            await self._workflows.forget(uids)
            await self._claims.forget(uids)
        folders = await self._files.run(self._files.folders)
        old = [uid for uid in folders if time.time() - time_of(uid) > ORPHAN_S]
        if orphans := await self._claims.unknown(old):
            await self._files.run(self._files.delete, sorted(orphans))

    # --- jobs.workflow.Steps ------------------------------------------------------------------

    async def make(self, uid: str) -> Outcome:
        """Do the work; what it came to, for `settle`.

        A cancelled job comes to nothing. Who has lost the claim, or stops, raises CancelledError:
        the step is not done then, and is begun again elsewhere.
        """
        held = self._held[uid]
        held.making = asyncio.create_task(self._make(held.claim))
        try:
            return await held.making
        except LostClaim as error:
            raise asyncio.CancelledError from error
        except asyncio.CancelledError:
            if held.is_cancelled:
                return {}
            raise
        finally:
            held.making = None

    async def _make(self, claim: Claim) -> Outcome:
        start_s = time.monotonic()
        waits_s = iter(RETRY_S)
        wait_s = next(waits_s)
        while True:
            try:
                with full_disk():
                    return await self._try(claim)
            except (RunnerUnavailable, StorageUnavailable, QueueFull) as error:
                if time.monotonic() - start_s > PATIENCE_S:
                    return _failed(error)
                _log.warning("Job %s waits: %s", claim.uid, error)
                if is_for_want_of_room(error):
                    await self._make_room()
                await asyncio.sleep(wait_s)
                wait_s = next(waits_s, wait_s)
            except RemixError as error:
                return _failed(error)
            except LostClaim:
                raise
            except Exception:  # noqa: BLE001 - whatever it is, it is the job's
                _log.exception("Job %s failed", claim.uid)
                return _failed(
                    RemixError("Something failed that should not have; the server's log has it.")
                )

    async def _try(self, claim: Claim) -> Outcome:
        row = await self._claims.row(claim)
        if row.job.has_ended:
            return {}
        if claim.attempt > MAX_ATTEMPTS:
            return _failed(
                RemixError(
                    f"{MAX_ATTEMPTS} attempts ended with their server's death; no more are made.",
                    value=claim.attempt - 1,
                    limit=MAX_ATTEMPTS,
                    remedy="Send another song; the server's log may say why.",
                )
            )
        with (
            carried_on("job", row.trace, attempt=claim.attempt),
            self._estimator.running(row.duration_s) as run,
        ):
            fact("job begins", job=claim.uid, attempt=claim.attempt, duration_s=row.duration_s)
            made = await self._workshop.make(claim, row, self._bells.ring)
            run.teaches = made.is_cold and claim.attempt == 1
        stored = [asdict(artifact) for artifact in made.stored]
        return {"artifacts": stored, "cost_s": run.done_s}

    async def settle(self, uid: str, outcome: Outcome) -> bool:
        """Let the job end, and delete what it needs no more; whether there is a webhook."""
        held = self._held[uid]
        with _lost_is_cancelled():
            if outcome:
                await self._claims.settle(
                    held.claim, _settled(outcome), outcome["cost_s"], PATIENCE_S
                )
            row = await self._claims.row(held.claim, PATIENCE_S)
        held.has_settled = True
        if row.job.ended_s is not None:
            seconds = row.job.ended_s - row.job.created_s
            JOB_SECONDS.labels(row.job.state).observe(seconds)
            with carried_on("job ends", row.trace):
                fact("job ends", job=uid, state=row.job.state, seconds=round(seconds, 3))
        self._wake.set()
        self._bells.ring(uid)
        return bool(row.webhook_url)

    async def notify(self, uid: str) -> None:
        """Tell the webhook."""
        with _lost_is_cancelled():
            row = await self._claims.row(self._held[uid].claim)
        await self._webhooks.tell(row.webhook_url, row.job)

    async def close(self, uid: str) -> None:
        """Leave nothing to do but to keep the files for a while."""
        claim = self._held[uid].claim
        with _lost_is_cancelled():
            row = await self._claims.row(claim, PATIENCE_S)
            await self._tidy(row)
            await self._claims.close(claim, PATIENCE_S)

    async def _tidy(self, row: Row) -> None:
        """Delete the song, the sound that was played, and files of attempts that came to naught."""
        kept = {stored.path for stored in row.stored}
        try:
            found = await self._files.run(self._files.find, row.uid)
            doomed = [file.path for file in found if file.path not in kept] if kept else [row.uid]
            await self._files.run(self._files.delete, doomed)
        except StorageUnavailable as error:
            _log.warning("Files of job %s stay until it expires: %s", row.uid, error)

    def left(self, uid: str) -> None:
        """The workflow is over here, however it ended."""
        self._held.pop(uid, None)
        self._left.set()
        self._wake.set()
        self._bells.ring(uid)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """What goes wrong in the background is for the log; the next time it may go right."""
    try:
        await work
    except StorageUnavailable as error:
        _log.warning("Jobs stand still: %s", error)
    except Exception:  # noqa: BLE001 - one that ended would leave every job lying
        _log.exception("Jobs go on after an error of ours")


@contextmanager
def _lost_is_cancelled() -> Iterator[None]:
    """A step of one who has lost the claim is not done: it is cancelled, and others do it."""
    try:
        yield
    except LostClaim as error:
        raise asyncio.CancelledError from error


def _failed(error: RemixError) -> Outcome:
    """What an attempt came to that failed."""
    failure = JobFailure(type(error).__name__, str(error), error.value, error.limit, error.remedy)
    return {"failure": asdict(failure), "cost_s": 0.0}


def _settled(outcome: Outcome) -> tuple[StoredArtifact, ...] | JobFailure:
    """The same again, from its JSON."""
    if "failure" in outcome:
        return JobFailure(**outcome["failure"])
    return tuple(
        StoredArtifact(ArtifactInfo(**artifact["info"]), artifact["path"])
        for artifact in outcome["artifacts"]
    )
