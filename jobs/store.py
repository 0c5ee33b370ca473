"""What callers ask of the rows of jobs: each question, and each change, is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from jobs.job import ENDED, JobEvent, State
from jobs.rows import EVENTS, JOBS, PLAYED, Load, Request, Row, Rows, no_job, played_path, row_of
from jobs.schedule import Started
from remix.errors import Conflict, QueueFull


class Store(Rows):
    """Submitting, reading, cancelling."""

    async def submit(self, uid: str, request: Request, max_waiting: int) -> tuple[Row, bool]:
        """The job of a request, and whether it is new.

        Raises:
            Conflict: the owner's id stands for another request.
            QueueFull: `max_waiting` jobs wait already.
        """

        def work(db: sa.Connection) -> tuple[Row, bool]:
            if (known := self.find_in(db, request.owner, request.id)) is not None:
                return self._same(known, request), known.uid == uid
            waiting = db.execute(
                sa.select(sa.func.count()).where(JOBS.c.state == "queued")
            ).scalar_one()
            if waiting >= max_waiting:
                raise QueueFull(
                    f"{waiting} jobs are waiting, and this service lets at most {max_waiting} "
                    "wait.",
                    value=waiting,
                    limit=max_waiting,
                    remedy="Try again when Retry-After has passed.",
                )
            db.execute(
                sa.insert(JOBS).values(
                    uid=uid,
                    **{k: v for k, v in asdict(request).items() if k != "options"},
                    options=request.options.model_dump_json(),
                    state="queued",
                    created_s=self.database.now_s(db),
                )
            )
            self.note_in(db, uid, [{"state": "queued"}])
            return self.row_in(db, uid), True

        try:
            return await self.database.call(work)
        except IntegrityError:  # the same id, submitted at the same moment
            return await self.database.call(work)

    def _same(self, known: Row, request: Request) -> Row:
        if known.request != request.request:
            raise Conflict(
                f"Job {request.id} is there already, for another song or with other options.",
                value=request.id,
                limit="1 request for each id",
                remedy="Give each request an id of its own.",
            )
        return known

    async def get(self, owner: str, job_id: str) -> Row:
        """A job.

        Raises:
            NotFound: the owner has none of that id.
        """

        def work(db: sa.Connection) -> Row:
            found = self.find_in(db, owner, job_id)
            if found is None:
                raise no_job(job_id)
            return found

        return await self.database.call(work)

    async def page(
        self, owner: str, state: State | None, before: str | None, limit: int
    ) -> tuple[Row, ...]:
        """The owner's jobs, the newest first, from the one after `before` on."""

        def work(db: sa.Connection) -> tuple[Row, ...]:
            query = sa.select(JOBS).where(JOBS.c.owner == owner).order_by(JOBS.c.uid.desc())
            if state is not None:
                query = query.where(JOBS.c.state == state)
            if before is not None:
                query = query.where(JOBS.c.uid < before)
            return tuple(row_of(found) for found in db.execute(query.limit(limit)))

        return await self.database.call(work)

    async def cancel(self, owner: str, job_id: str) -> Row:
        """End a job that has not ended; its holder learns of it, and others find nothing to do.

        Raises:
            NotFound: the owner has none of that id.
        """

        def work(db: sa.Connection) -> Row:
            found = self.find_in(db, owner, job_id)
            if found is None:
                raise no_job(job_id)
            if self.end_in(db, found.uid, "cancelled", JOBS.c.state.not_in(ENDED)):
                return self.row_in(db, found.uid)
            return found

        return await self.database.call(work)

    async def events(self, uid: str, after: int) -> list[JobEvent]:
        """The events of a job after that of a number."""

        def work(db: sa.Connection) -> Sequence[Any]:
            query = sa.select(EVENTS).where(EVENTS.c.uid == uid, EVENTS.c.number > after)
            return db.execute(query.order_by(EVENTS.c.number)).all()

        return [
            JobEvent(row.number, row.at_s, row.state, row.stage, row.fraction)
            for row in await self.database.call(work)
        ]

    async def played(self, uid: str, start: int) -> tuple[Row, list[tuple[int, str]]]:
        """A job, and the parts of its sound that go on from byte `start`: where one begins, path.

        Raises:
            NotFound: it is there no more.
        """

        def work(db: sa.Connection) -> tuple[Row, list[tuple[int, str]]]:
            row = self.row_in(db, uid)
            query = sa.select(PLAYED.c.start, PLAYED.c.stop).where(
                PLAYED.c.uid == uid,
                PLAYED.c.attempt == row.job.attempt,
                PLAYED.c.stop > start,
            )
            parts = db.execute(query.order_by(PLAYED.c.start)).all()
            return row, [(a, played_path(uid, row.job.attempt, a, b)) for a, b in parts]

        return await self.database.call(work)

    async def outlook(self) -> tuple[Load, list[Started]]:
        """What there is to do, and what was begun: who of them is next follows from both."""
        return await self.database.read(lambda db: (self.load_in(db), self.started_in(db)))
