"""Jobs: submitted once, carried out once, whatever crashes meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anyio.to_thread

from jobs.bells import Bells
from jobs.database import Database
from jobs.estimate import Estimator
from jobs.files import Files
from jobs.forecast import Forecaster
from jobs.identity import new_uid, request_id, result_id
from jobs.job import ArtifactInfo, Job, JobEvent, JobPage, State
from jobs.rows import Load, Request, Row
from jobs.schedule import Started
from jobs.store import Store
from jobs.webhook import Webhooks
from jobs.work import song_path
from jobs.worker import MakeRoom, Worker
from remix import errors
from remix.composer import Composer
from remix.errors import InvalidOption, NotFound, RemixError, RunnerUnavailable, excerpt
from remix.manifest import sha256_of
from remix.mix_tracks import SAMPLE_RATE_HZ
from remix.models import choose_models
from remix.options import RemixOptions
from remix.settings import Settings
from telemetry.traces import traceparent

REMIX_FILE = "remix.wav"

JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

POLL_S = 1.0
"""What another composer did is seen after so long; what this one did, at once."""

HEARTBEAT_S = 10.0
"""After so much silence a watcher is told that there is nothing new."""

PIECE_BYTES = 1 << 18


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


async def nothing_to_delete() -> None:
    """Without a cache there is none that could give way."""


class Jobs:
    """All that can be done with jobs, for every transport.

    Every call that names a job raises `NotFound` where there is none of that id and owner; whose
    it is else, is nobody's business. Every call may raise `StorageUnavailable`.

    Args:
        settings: where rows and files go, how many run and wait, how long they are kept.
        composer: does the work.
        estimator: how long that takes.
        database: with the rows; is closed by whoever opened it.
        make_room: is asked for when the disk is full.
    """

    def __init__(
        self,
        settings: Settings,
        composer: Composer,
        estimator: Estimator,
        database: Database,
        make_room: MakeRoom = nothing_to_delete,
    ) -> None:
        self._max_waiting = settings.max_waiting_jobs
        self._composer = composer
        self._estimator = estimator
        self._forecaster = Forecaster(estimator, settings.max_remixes)
        self._webhooks = Webhooks(settings.webhook_hosts, settings.webhook_secret)
        self._files = Files(settings.artifacts_url)
        self._bells = Bells()
        self._store = Store(database, settings.retention_s)
        self._worker = Worker(
            settings, composer, estimator, database, self._files, self._bells, make_room
        )

    async def start(self) -> None:
        """Take up what a dead composer left, and begin to work."""
        await self._worker.start()

    async def drain(self, limit_s: float) -> None:
        """Begin nothing more, and wait until what runs has ended, for so long at most."""
        await self._worker.drain(limit_s)

    async def stop(self) -> None:
        """Leave what has not ended to others, who go on from its last checkpoint."""
        await self._worker.stop()
        self._files.close()

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
        if self._worker.is_stopping:
            raise RunnerUnavailable(
                "The service is stopping; it must be ready.",
                value="not ready",
                limit="ready",
                remedy="Try again when GET /readyz answers 200.",
            )
        uid = new_uid()
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
            trace=traceparent(),
        )
        del audio
        await self._files.run(self._files.put, song_path(uid), song)
        try:
            row, is_new = await self._store.submit(uid, request, self._max_waiting)
        except BaseException:
            await self._files.run(self._files.delete, [uid])
            raise
        if not is_new:
            await self._files.run(self._files.delete, [uid])
        self._worker.wake()
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
            is_here = self._worker.cancel(row.uid)
            if not is_here and row.job.attempt == 0:
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
