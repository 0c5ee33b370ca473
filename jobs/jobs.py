"""Jobs: submitted once, carried out once, whatever crashes meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anyio.to_thread

from jobs.database import Database
from jobs.estimate import Estimator
from jobs.files import Files
from jobs.forecast import Forecaster
from jobs.identity import request_id, result_id
from jobs.job import ArtifactInfo, Job, JobEvent, JobFailure, JobPage, State
from jobs.schedule import Started
from jobs.store import Claim, Load, LostClaim, Request, Row, Store, StoredArtifact
from jobs.webhook import Webhooks
from jobs.work import Workshop, song_path
from jobs.workflow import Outcome, Workflows
from remix import errors
from remix.composer import Composer
from remix.errors import (
    InvalidOption,
    NotFound,
    QueueFull,
    RemixError,
    RunnerUnavailable,
    StorageUnavailable,
    excerpt,
)
from remix.manifest import sha256_of
from remix.mix_tracks import SAMPLE_RATE_HZ
from remix.models import choose_models
from remix.options import RemixOptions
from remix.settings import Settings

REMIX_FILE = "remix.wav"

JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

POLL_S = 1.0
"""What another composer did is seen after so long; what this one did, at once."""

HEARTBEAT_S = 10.0
"""After so much silence a watcher is told that there is nothing new."""

LEASES_RENEWED = 4
"""Times within a lease: three renewals may fail before others take over."""

RETRY_S = (1.0, 2.0, 5.0, 10.0)
"""Between tries of work that failed because a runner, the database or a disk was away."""

PATIENCE_S = 3_600.0
"""How long a job waits for what is away, in all, before it fails."""

MAX_ATTEMPTS = 20
"""A job whose composer died so often has killed it."""

SWEEP_S = 30.0
"""Between two looks for what has been kept for long enough."""

ORPHAN_S = 3_600.0
"""A folder of files that is so old and belongs to no job was left by a crash."""

PIECE_BYTES = 1 << 18

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A finished file of a job, to be read in parts."""

    info: ArtifactInfo
    _files: Files
    _path: str

    async def read(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Its bytes from `start` up to, and without, `stop`, in pieces.

        Raises:
            NotFound: it was deleted meanwhile.
            StorageUnavailable: the store does not answer.
        """
        stop = self.info.size_bytes if stop is None else min(stop, self.info.size_bytes)
        for begin in range(start, stop, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, stop)
            piece = await self._files.run(self._files.read, self._path, begin, end)
            if piece is None or len(piece) != end - begin:
                raise _gone(self.info.name)
            yield piece


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


class _Bells:
    """Wake whoever waits for news of a job."""

    def __init__(self) -> None:
        self._bells: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def listen(self, uid: str) -> Callable[[float], Coroutine[Any, Any, None]]:
        """From now on; await the result to hear it, for so many seconds at most."""
        bell = self._bells[uid]

        async def hear(timeout_s: float) -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), timeout_s)

        return hear

    def ring(self, uid: str) -> None:
        """There is news."""
        if (bell := self._bells.pop(uid, None)) is not None:
            bell.set()


class Jobs:
    """All that can be done with jobs, for every transport.

    Every call that names a job raises `NotFound` where there is none of that id and owner; whose
    it is else, is nobody's business. Every call may raise `StorageUnavailable`.

    Args:
        settings: where rows and files go, how many run and wait, how long they are kept.
        composer: does the work.
        estimator: how long that takes.
        database: with the rows; is closed by whoever opened it.
    """

    def __init__(
        self,
        settings: Settings,
        composer: Composer,
        estimator: Estimator,
        database: Database,
    ) -> None:
        self._settings = settings
        self._database = database
        self._composer = composer
        self._estimator = estimator
        self._forecaster = Forecaster(estimator, settings.max_remixes)
        self._files = Files(settings.artifacts_url)
        self._webhooks = Webhooks(settings.webhook_hosts, settings.webhook_secret)
        self._bells = _Bells()
        self._held: dict[str, _Held] = {}
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._is_stopping = False

    async def start(self) -> None:
        """Take up what a dead composer left, and begin to work."""
        settings = self._settings
        holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._store = Store(self._database, holder, settings.lease_s, settings.retention_s)
        self._workshop = Workshop(self._store, self._files, self._composer)
        self._workflows = Workflows(settings.database_url, holder, self)
        if await anyio.to_thread.run_sync(self._database.is_alone):
            await self._store.void_leases()
        await self._workflows.start()
        self._loops = [asyncio.create_task(self._dispatch_on())]
        self._loops += [
            asyncio.create_task(self._forever(work, every_s))
            for work, every_s in (
                (self._renew, settings.lease_s / LEASES_RENEWED),
                (self._sweep, min(SWEEP_S, max(1.0, settings.retention_s / 4))),
            )
        ]

    async def drain(self, limit_s: float) -> None:
        """Begin nothing more, and wait until what runs has ended, for so long at most."""
        self._is_stopping = True
        until_s = time.monotonic() + limit_s
        while self._held and (left_s := until_s - time.monotonic()) > 0:
            self._left.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), left_s)

    async def stop(self) -> None:
        """Leave what has not ended to others, who go on from its last checkpoint."""
        self._is_stopping = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        left = [held.claim for held in self._held.values()]
        await self._workflows.stop()
        for claim in left:
            with suppress(LostClaim, StorageUnavailable):
                await self._store.release(claim)
        self._files.close()

    # --- for callers --------------------------------------------------------------------------

    async def submit(
        self,
        song: Path,
        options: RemixOptions,
        owner: str = "",
        job_id: str | None = None,
        webhook_url: str | None = None,
    ) -> Job:
        """Note a job durably; it is carried out when its turn comes.

        Args:
            song: is copied before this returns.
            options: of the remix.
            owner: whose job it is.
            job_id: the caller's own id (1 to 64 letters, digits, dots, underscores, hyphens); the
                same request with it again answers with the same job.
            webhook_url: is told when the job has ended.

        Raises:
            Conflict: the owner has a job of this id for another song, or with other options.
            InvalidAudio, LimitExceeded: the song cannot be remixed.
            InvalidOption: the id or the webhook's address is not one that is taken.
            NotFound: a voice or model that the options name.
            QueueFull: as many jobs wait as may.
            RunnerUnavailable: the service is stopping.
        """
        if self._is_stopping:
            raise RunnerUnavailable(
                "The service is stopping; it must be ready.",
                value="not ready",
                limit="ready",
                remedy="Try again when GET /readyz answers 200.",
            )
        uid = _new_uid()
        if job_id is None:
            job_id = uid
        check_job_id(job_id)
        if webhook_url:
            self._webhooks.check(webhook_url)
        composer = self._composer
        models = choose_models(composer.manifest, composer.models_dir, options)
        song_sha256 = await anyio.to_thread.run_sync(sha256_of, song)
        # A bad song is refused now, not in an hour; and its length is what its turn goes by.
        audio = await composer.decode(song, SAMPLE_RATE_HZ)
        request = Request(
            owner=owner,
            id=job_id,
            request=request_id(song_sha256, options, webhook_url or ""),
            result=result_id(song_sha256, options, models, composer.manifest, composer.models_dir),
            options=options,
            webhook_url=webhook_url or "",
            duration_s=audio.samples.shape[1] / SAMPLE_RATE_HZ,
            estimate_s=self._estimator.cost(audio.duration_s).alone_s,
        )
        del audio
        await self._files.run(self._files.put, song_path(uid), song)
        try:
            row, is_new = await self._store.submit(uid, request, self._settings.max_waiting_jobs)
        except BaseException:
            await self._files.run(self._files.delete, [uid])
            raise
        if not is_new:
            await self._files.run(self._files.delete, [uid])
        self._wake.set()
        return await self._told(row)

    async def get(self, job_id: str, owner: str = "") -> Job:
        """A job as it is now."""
        return await self._told(await self._store.get(owner, job_id))

    async def list(
        self,
        owner: str = "",
        state: State | None = None,
        page_token: str | None = None,
        page_size: int = 50,
    ) -> JobPage:
        """The owner's jobs, the newest first.

        Raises:
            InvalidOption: the token is none that a page gave.
        """
        if page_token is not None and not re.fullmatch("[0-9a-f]{32}", page_token):
            raise InvalidOption(
                f"page_token is {excerpt(page_token)!r}; it must be one that a page gave.",
                value=excerpt(page_token),
                limit="a next_page_token",
                remedy="Leave it out to begin.",
            )
        rows = await self._store.page(owner, state, page_token, page_size + 1)
        outlooks = {} if all(row.job.has_ended for row in rows) else await self._outlooks()
        return JobPage(
            tuple(self._seen(row, outlooks) for row in rows[:page_size]),
            rows[page_size - 1].uid if len(rows) > page_size else None,
        )

    async def cancel(self, job_id: str, owner: str = "") -> Job:
        """End a job; one that has ended stays as it is.

        Its compute ends within one window, wherever it runs, and what it had made is deleted.
        """
        row = await self._store.cancel(owner, job_id)
        if row.job.state == "cancelled":
            if (held := self._held.get(row.uid)) is not None and not held.has_settled:
                held.is_cancelled = True
                held.stop()
            elif row.job.attempt == 0:
                await self._files.run(self._files.delete, [row.uid])
        self._bells.ring(row.uid)
        return await self._told(row)

    async def events(
        self, job_id: str, owner: str = "", after_event: int = 0
    ) -> AsyncGenerator[JobEvent | None, None]:
        """What has happened and happens to a job, from the event after `after_event` to the last.

        None comes between where nothing happened for some seconds, so that a transport can say
        that the connection lives.
        """
        uid = (await self._store.get(owner, job_id)).uid
        silent_s = time.monotonic()
        while True:
            hear = self._bells.listen(uid)
            events = await self._store.events(uid, after_event)
            for event in events:
                yield event
                after_event = event.id
                silent_s = time.monotonic()
            if (events and events[-1].is_last) or (
                not events and (await self._store.get(owner, job_id)).job.has_ended
            ):
                return
            if time.monotonic() - silent_s > HEARTBEAT_S:
                yield None
                silent_s = time.monotonic()
            await hear(POLL_S)

    async def artifact(self, job_id: str, owner: str, name: str) -> Artifact:
        """A file of a job that is done.

        Raises:
            NotFound: no such job, or it has no such file (yet).
        """
        row = await self._store.get(owner, job_id)
        return self._artifact(row, name)

    async def audio(
        self, job_id: str, owner: str = "", start: int = 0
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of `remix.wav` from `start` on, each part as soon as it is final.

        All parts together are the file, header and all, also where the job was interrupted and
        resumed meanwhile. Ends with the file.

        Raises:
            Cancelled: the job was cancelled meanwhile.
            RemixError: the job's own error, where it fails.
        """
        uid = (await self._store.get(owner, job_id)).uid
        while True:
            hear = self._bells.listen(uid)
            before = start
            row, parts = await self._store.played(uid, start)
            if row.job.state == "done":
                async for piece in self._artifact(row, REMIX_FILE).read(start):
                    yield piece
                return
            if row.job.has_ended:
                raise _ending(row.job)
            for begin, path in parts:
                content = await self._files.run(self._files.read, path)
                if content is None or begin > start:  # of an attempt that counts no more
                    break
                piece = content[start - begin :]
                start += len(piece)
                yield piece
            if start == before:
                await hear(POLL_S)

    async def outlook(self) -> tuple[Load, Sequence[Started]]:
        """What there is to do in all composers, and what was begun."""
        return await self._store.outlook()

    def _artifact(self, row: Row, name: str) -> Artifact:
        for stored in row.stored:
            if stored.info.name == name:
                return Artifact(stored.info, self._files, stored.path)
        known = [stored.info.name for stored in row.stored]
        raise NotFound(
            f"Job {row.job.id} is {row.job.state} and has no file {excerpt(name)!r}; it has "
            f"{', '.join(known) or 'none yet'}.",
            value=excerpt(name),
            limit=known,
            remedy="Use one of these names, once the job is done.",
        )

    async def _told(self, row: Row) -> Job:
        return self._seen(row, {} if row.job.has_ended else await self._outlooks())

    async def _outlooks(self) -> dict[str, tuple[int | None, float]]:
        """Of every job that has not ended: its place, if it waits, and seconds to its end."""
        expected = self._forecaster.forecast(*await self._store.outlook())
        return {job.uid: (None, span.end_s) for job, span in expected.running} | {
            job.job_id: (place, span.end_s) for place, (job, span) in enumerate(expected.waiting)
        }

    def _seen(self, row: Row, outlooks: dict[str, tuple[int | None, float]]) -> Job:
        if row.uid not in outlooks:
            return row.job
        place, end_s = outlooks[row.uid]
        return replace(row.job, position=place, estimate_s=round(end_s, 1))

    # --- the work -----------------------------------------------------------------------------

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
        return not self._is_stopping and working < self._settings.max_remixes

    async def _next(self) -> Claim | None:
        # After an outage of the database nobody could renew a lease: give everybody the time.
        if time.monotonic() - self._database.failed_s > self._settings.lease_s:
            for uid in await self._store.abandoned():
                if uid not in self._held and (claim := await self._store.take_over(uid)):
                    _log.warning("Job %s goes on here, in attempt %d.", uid, claim.attempt)
                    return claim
        return await self._store.begin_next()

    async def _renew(self) -> None:
        """Keep what is held; let go of what is not any more."""
        held = list(self._held.values())
        if not held:
            return
        good = await self._store.renew([one.claim for one in held])
        for one in held:
            if one.claim in good or one.has_settled:
                continue
            with suppress(LostClaim):
                one.is_cancelled = (await self._store.row(one.claim)).job.state == "cancelled"
            one.stop()

    async def _sweep(self) -> None:
        """Delete what has been kept for long enough, and what a crash left."""
        if uids := await self._store.expired():
            await self._files.run(self._files.delete, uids)
            await self._workflows.forget(uids)
            await self._store.forget(uids)
        folders = await self._files.run(self._files.folders)
        old = [uid for uid in folders if time.time() - _time_of(uid) > ORPHAN_S]
        if orphans := await self._store.unknown(old):
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
                return await self._try(claim)
            except (RunnerUnavailable, StorageUnavailable, QueueFull) as error:
                if time.monotonic() - start_s > PATIENCE_S:
                    return _failed(error)
                _log.warning("Job %s waits: %s", claim.uid, error)
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
        row = await self._store.row(claim)
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
        with self._estimator.running(row.duration_s) as run:
            made = await self._workshop.make(claim, row, self._bells.ring)
            run.teaches = made.is_cold and claim.attempt == 1
        stored = [asdict(artifact) for artifact in made.stored]
        return {"artifacts": stored, "cost_s": run.done_s}

    async def settle(self, uid: str, outcome: Outcome) -> bool:
        """Let the job end, and delete what it needs no more; whether there is a webhook."""
        held = self._held[uid]
        with _lost_is_cancelled():
            if outcome:
                await self._store.settle(
                    held.claim, _settled(outcome), outcome["cost_s"], PATIENCE_S
                )
            row = await self._store.row(held.claim, PATIENCE_S)
        held.has_settled = True
        self._wake.set()
        self._bells.ring(uid)
        return bool(row.webhook_url)

    async def notify(self, uid: str) -> None:
        """Tell the webhook."""
        with _lost_is_cancelled():
            row = await self._store.row(self._held[uid].claim)
        await self._webhooks.tell(row.webhook_url, row.job)

    async def close(self, uid: str) -> None:
        """Leave nothing to do but to keep the files for a while."""
        claim = self._held[uid].claim
        with _lost_is_cancelled():
            row = await self._store.row(claim, PATIENCE_S)
            await self._tidy(row)
            await self._store.close(claim, PATIENCE_S)

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


def _ending(job: Job) -> RemixError:
    """Why there is no sound to come of a job that has ended without any."""
    if job.error is not None:
        kind: type[RemixError] = getattr(errors, job.error.type)
        return kind(job.error.detail, value=job.error.value, limit=job.error.limit)
    return errors.Cancelled(f"Job {job.id} was cancelled.")


def check_job_id(job_id: str) -> None:
    """Refuse an id that is too long or has characters that have no business in one.

    Raises:
        InvalidOption: it is.
    """
    if not JOB_ID.fullmatch(job_id):
        raise InvalidOption(
            f"The job's id is {excerpt(job_id)!r}; it must be 1 to 64 letters, digits, dots, "
            "underscores and hyphens.",
            value=excerpt(job_id),
            limit=JOB_ID.pattern,
            remedy="Send a UUID, for example.",
        )


def _gone(name: str) -> NotFound:
    return NotFound(
        f"The file {name} is there no more.",
        value=name,
        limit="a file that is kept",
        remedy="Submit the job again.",
    )


def _new_uid() -> str:
    """A name that no job has had, greater than those before it."""
    return f"{int(1000 * time.time()):012x}{secrets.token_hex(10)}"


def _time_of(uid: str) -> float:
    """When a name was made; the end of time for what is none.

    >>> abs(_time_of(_new_uid()) - time.time()) < 1
    True
    """
    return int(uid[:12], 16) / 1000 if re.fullmatch("[0-9a-f]{32}", uid) else float("inf")
