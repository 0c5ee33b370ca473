"""Rows of jobs, their events and what they have played: every state change is one transaction.

**The fence.** Beginning a job raises its `attempt` and names its holder. Whatever an attempt writes
later is written only where both are still its own: a composer that was given up for dead and comes
back finds that nothing of it counts. **The lease.** A holder renews its leases all the time; a job
whose lease has run out is anybody's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from jobs.database import PATIENCE_S, Database, metadata
from jobs.job import ENDED, ArtifactInfo, Job, JobEvent, JobFailure, State
from jobs.schedule import Started, Turn, Waiting, next_job
from remix.errors import Conflict, NotFound, QueueFull
from remix.options import RemixOptions
from remix.stages import Stage

TEXT = sa.String

JOBS = sa.Table(
    "jobs",
    metadata,
    sa.Column("uid", TEXT(32), primary_key=True),  # grows with time; names folder and workflow
    sa.Column("owner", TEXT(128), nullable=False),
    sa.Column("id", TEXT(64), nullable=False),
    sa.Column("request", TEXT(64), nullable=False),  # hash of song and options
    sa.Column("result", TEXT(64), nullable=False, index=True),  # hash of all that decides the files
    sa.Column("options", sa.Text, nullable=False),
    sa.Column("webhook_url", sa.Text, nullable=False),
    sa.Column("duration_s", sa.Double, nullable=False),
    sa.Column("estimate_s", sa.Double, nullable=False),
    sa.Column("cost_s", sa.Double),
    sa.Column("tag_s", sa.Double),
    sa.Column("state", TEXT(16), nullable=False, index=True),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("started_s", sa.Double),
    sa.Column("ended_s", sa.Double),
    sa.Column("expires_s", sa.Double),
    sa.Column("progress", sa.Text, nullable=False, default="{}"),
    sa.Column("last_event", sa.Integer, nullable=False, default=0),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("holder", TEXT(64), nullable=False, default=""),
    sa.Column("lease_until_s", sa.Double, nullable=False, default=0.0),
    sa.Column("is_closed", sa.Boolean, nullable=False, default=False, index=True),
    sa.Column("error", sa.Text),
    sa.Column("artifacts", sa.Text),
    sa.UniqueConstraint("owner", "id"),
)

EVENTS = sa.Table(
    "job_events",
    metadata,
    sa.Column("uid", TEXT(32), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at_s", sa.Double, nullable=False),
    sa.Column("state", TEXT(16)),
    sa.Column("stage", TEXT(32)),
    sa.Column("fraction", sa.Double),
)

PLAYED = sa.Table(
    "job_audio",
    metadata,
    sa.Column("uid", TEXT(32), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("stop", sa.BigInteger, nullable=False),
)


class LostClaim(Exception):
    """Somebody else holds the job by now, or it has ended."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        owner: who asks.
        id: of the job.
        request: hash of the song and the options: the same again is the same request.
        result: hash of everything that decides the resulting files.
        options: of the remix.
        webhook_url: empty for none.
        duration_s: of the song.
        estimate_s: seconds that it takes alone.
    """

    owner: str
    id: str
    request: str
    result: str
    options: RemixOptions
    webhook_url: str
    duration_s: float
    estimate_s: float


@dataclass(frozen=True)
class Claim:
    """A job in the hands of a composer.

    Args:
        uid: of the job.
        attempt: which one this is, from 1.
        holder: the composer.
    """

    uid: str
    attempt: int
    holder: str


@dataclass(frozen=True)
class StoredArtifact:
    """A file of a job, and where it lies in the store."""

    info: ArtifactInfo
    path: str


@dataclass(frozen=True)
class Row:
    """A job as it lies in the database: the callers' view of it, and the rest.

    Args:
        uid: its name in the database.
        job: the callers' view.
        request: hash of what was asked for.
        result: hash of what decides the files.
        webhook_url: empty for none.
        duration_s: of the song.
        stored: where its files lie.
    """

    uid: str
    job: Job
    request: str
    result: str
    webhook_url: str
    duration_s: float
    stored: tuple[StoredArtifact, ...]


@dataclass(frozen=True)
class Running:
    """A job that runs.

    Args:
        uid: its name in the database.
        owner: whose it is.
        estimate_s: seconds that it takes alone.
        ran_s: how long it has run.
    """

    uid: str
    owner: str
    estimate_s: float
    ran_s: float


@dataclass(frozen=True)
class Load:
    """What there is to do, in all composers."""

    running: tuple[Running, ...]
    waiting: tuple[Waiting, ...]

    def queue(self, started: Sequence[Started]) -> list[str]:
        """Uids of the waiting jobs in the order in which they will be begun, as of now."""
        waiting, order, begun = list(self.waiting), list[str](), list(started)
        while turn := next_job(waiting, begun):
            order.append(turn.job_id)
            (job,) = (job for job in waiting if job.job_id == turn.job_id)
            waiting.remove(job)
            begun.append(Started(job.owner, job.estimate_s, turn.tag_s))
        return order


class Store:
    """The database as the jobs see it.

    Args:
        database: with the tables.
        holder: name of this composer: of this process, never given twice.
        lease_s: how long a job is its holder's without a renewal.
        retention_s: how long an ended job is kept.
    """

    def __init__(self, database: Database, holder: str, lease_s: float, retention_s: float) -> None:
        self.database = database
        self._holder = holder
        self._lease_s = lease_s
        self._retention_s = retention_s

    # --- callers ------------------------------------------------------------------------------

    async def submit(self, uid: str, request: Request, max_waiting: int) -> tuple[Row, bool]:
        """The job of a request, and whether it is new.

        Raises:
            Conflict: the owner's id stands for another request.
            QueueFull: `max_waiting` jobs wait already.
        """

        def work(db: sa.Connection) -> tuple[Row, bool]:
            if (known := self._find(db, request.owner, request.id)) is not None:
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
            self._note(db, uid, [{"state": "queued"}])
            return self._row(db, uid), True

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
            found = self._find(db, owner, job_id)
            if found is None:
                raise _no_job(job_id)
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
            return tuple(_row_of(found) for found in db.execute(query.limit(limit)))

        return await self.database.call(work)

    async def cancel(self, owner: str, job_id: str) -> Row:
        """End a job that has not ended; its holder learns of it, and others find nothing to do.

        Raises:
            NotFound: the owner has none of that id.
        """

        def work(db: sa.Connection) -> Row:
            found = self._find(db, owner, job_id)
            if found is None:
                raise _no_job(job_id)
            if self._end(db, found.uid, "cancelled", JOBS.c.state.not_in(ENDED)):
                return self._row(db, found.uid)
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
            row = self._row(db, uid)
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
        return await self.database.read(lambda db: (self._load(db), self._started(db)))

    # --- the holder ---------------------------------------------------------------------------

    async def void_leases(self) -> None:
        """Let everything that is held be taken over: when nobody else can be alive."""
        values = {"lease_until_s": 0.0}
        is_open = JOBS.c.is_closed.is_(False)
        await self.database.call(
            lambda db: db.execute(sa.update(JOBS).where(is_open).values(values))
        )

    async def abandoned(self) -> list[str]:
        """Uids of the jobs that are begun, or have ended with something left, and nobody holds."""

        def work(db: sa.Connection) -> list[str]:
            query = sa.select(JOBS.c.uid).where(
                JOBS.c.is_closed.is_(False),
                sa.or_(JOBS.c.attempt > 0, JOBS.c.state.in_(ENDED)),
                JOBS.c.lease_until_s < self.database.now_s(db),
            )
            return list(db.execute(query.order_by(JOBS.c.uid)).scalars())

        return await self.database.call(work)

    async def take_over(self, uid: str) -> Claim | None:
        """Go on with an abandoned job; None if somebody else was faster."""

        def work(db: sa.Connection) -> Claim | None:
            now_s = self.database.now_s(db)
            return self._claim(db, uid, JOBS.c.lease_until_s < now_s, {})

        return await self.database.call(work)

    async def begin_next(self) -> Claim | None:
        """Begin the waiting job whose turn it is; None if none waits."""

        def work(db: sa.Connection) -> Claim | None:
            turn: Turn | None = next_job(self._load(db).waiting, self._started(db))
            if turn is None:
                return None
            values = {"tag_s": turn.tag_s, "started_s": self.database.now_s(db)}
            return self._claim(db, turn.job_id, JOBS.c.state == "queued", values)

        return await self.database.call(work)

    def _claim(
        self, db: sa.Connection, uid: str, condition: Any, values: Mapping[str, Any]
    ) -> Claim | None:
        """Raise the fence, if the condition holds at that moment."""
        is_open = JOBS.c.state.not_in(ENDED)
        claimed = db.execute(
            sa.update(JOBS)
            .where(JOBS.c.uid == uid, JOBS.c.is_closed.is_(False), condition)
            .values(
                attempt=JOBS.c.attempt + 1,
                holder=self._holder,
                lease_until_s=self.database.now_s(db) + self._lease_s,
                state=sa.case((is_open, "running"), else_=JOBS.c.state),
                **values,
            )
            .returning(JOBS.c.attempt, JOBS.c.state)
        ).one_or_none()
        if claimed is None:
            return None
        if claimed.state == "running":
            self._note(db, uid, [{"state": "running"}])
        return Claim(uid, claimed.attempt, self._holder)

    async def renew(self, claims: Collection[Claim]) -> set[Claim]:
        """Renew the leases of these; returned are those that are still to be worked on."""

        def work(db: sa.Connection) -> set[Claim]:
            until_s = self.database.now_s(db) + self._lease_s
            mine = (JOBS.c.holder == self._holder, JOBS.c.uid.in_([claim.uid for claim in claims]))
            rows = db.execute(
                sa.update(JOBS)
                .where(*mine)
                .values(lease_until_s=until_s)
                .returning(JOBS.c.uid, JOBS.c.attempt, JOBS.c.holder, JOBS.c.state)
            ).all()
            held = {Claim(r.uid, r.attempt, r.holder) for r in rows if r.state != "cancelled"}
            return held & set(claims)

        return await self.database.call(work)

    async def release(self, claim: Claim) -> None:
        """Let go of a job that others shall go on with at once."""
        await self._guarded(claim, {"lease_until_s": 0.0})

    async def row(self, claim: Claim, patience_s: float = PATIENCE_S) -> Row:
        """The job of a claim.

        Raises:
            LostClaim: it is another's by now.
        """

        def work(db: sa.Connection) -> Row:
            self._check(db, claim)
            return self._row(db, claim.uid)

        return await self.database.call(work, patience_s)

    async def progress(self, claim: Claim, fractions: Mapping[Stage, float]) -> None:
        """Note how far a job is; what is behind what was noted before is not.

        Raises:
            LostClaim: the job is another's by now, or has ended.
        """

        def work(db: sa.Connection) -> None:
            self._check(db, claim, "running")
            known = self._row(db, claim.uid).job.progress
            new = {s: f for s, f in fractions.items() if f > known.get(s, -1.0)}
            if new:
                text = json.dumps({**known, **new})
                db.execute(sa.update(JOBS).where(JOBS.c.uid == claim.uid).values(progress=text))
                self._note(db, claim.uid, [{"stage": s, "fraction": f} for s, f in new.items()])

        await self.database.call(work)

    async def play(self, claim: Claim, start: int, stop: int) -> None:
        """Note that the bytes of the sound from `start` to `stop` are there.

        Raises:
            LostClaim: the job is another's by now, or has ended.
        """

        def work(db: sa.Connection) -> None:
            self._check(db, claim, "running")
            # Said again, perhaps with more, where the answer to the first time was lost.
            same = (
                PLAYED.c.uid == claim.uid,
                PLAYED.c.attempt == claim.attempt,
                PLAYED.c.start == start,
            )
            db.execute(sa.delete(PLAYED).where(*same))
            values = {"uid": claim.uid, "attempt": claim.attempt, "start": start, "stop": stop}
            db.execute(sa.insert(PLAYED).values(values))

        await self.database.call(work)

    async def settle(
        self,
        claim: Claim,
        outcome: Sequence[StoredArtifact] | JobFailure,
        cost_s: float,
        patience_s: float,
    ) -> None:
        """Let a job end: with its files, or with an error. Once it has ended, nothing happens.

        Raises:
            LostClaim: the job is another's by now.
        """

        def work(db: sa.Connection) -> None:
            self._check(db, claim)
            values: dict[str, Any] = {"cost_s": cost_s}
            if isinstance(outcome, JobFailure):
                state: State = "failed"
                values["error"] = json.dumps(asdict(outcome))
            else:
                state = "done"
                values["artifacts"] = json.dumps([asdict(artifact) for artifact in outcome])
            self._end(db, claim.uid, state, JOBS.c.state == "running", values)

        await self.database.call(work, patience_s)

    async def close(self, claim: Claim, patience_s: float) -> None:
        """Nothing is left to do for a job but to keep it for a while.

        Raises:
            LostClaim: the job is another's by now.
        """
        await self._guarded(claim, {"is_closed": True, "holder": ""}, patience_s)

    async def twin(self, row: Row) -> Row | None:
        """A job that is done and whose files are what this one's would be."""

        def work(db: sa.Connection) -> Row | None:
            found = db.execute(
                sa.select(JOBS)
                .where(
                    JOBS.c.result == row.result,
                    JOBS.c.state == "done",
                    JOBS.c.expires_s > self.database.now_s(db) + self._lease_s,
                )
                .order_by(JOBS.c.uid.desc())
                .limit(1)
            ).one_or_none()
            return None if found is None else _row_of(found)

        return await self.database.call(work)

    async def expired(self) -> list[str]:
        """Uids of the closed jobs that have been kept for long enough."""

        def work(db: sa.Connection) -> list[str]:
            query = sa.select(JOBS.c.uid).where(
                JOBS.c.is_closed, JOBS.c.expires_s < self.database.now_s(db)
            )
            return list(db.execute(query).scalars())

        return await self.database.call(work)

    async def forget(self, uids: Sequence[str]) -> None:
        """Delete jobs and all that is noted of them."""

        def work(db: sa.Connection) -> None:
            for table in (PLAYED, EVENTS, JOBS):
                db.execute(sa.delete(table).where(table.c.uid.in_(uids)))

        await self.database.call(work)

    async def unknown(self, uids: Collection[str]) -> set[str]:
        """Which of these uids no job has."""

        def work(db: sa.Connection) -> set[str]:
            known = db.execute(sa.select(JOBS.c.uid).where(JOBS.c.uid.in_(uids))).scalars()
            return set(uids) - set(known)

        return await self.database.call(work)

    # --- in a transaction ---------------------------------------------------------------------

    def _find(self, db: sa.Connection, owner: str, job_id: str) -> Row | None:
        query = sa.select(JOBS).where(JOBS.c.owner == owner, JOBS.c.id == job_id)
        found = db.execute(query).one_or_none()
        return None if found is None else _row_of(found)

    def _row(self, db: sa.Connection, uid: str) -> Row:
        found = db.execute(sa.select(JOBS).where(JOBS.c.uid == uid)).one_or_none()
        if found is None:
            raise _no_job(uid)
        return _row_of(found)

    def _check(self, db: sa.Connection, claim: Claim, state: State | None = None) -> None:
        """Hold the row until the transaction ends, if the claim is good.

        Raises:
            LostClaim: it is not, or the job is in another state.
        """
        found = db.execute(
            sa.select(JOBS.c.attempt, JOBS.c.holder, JOBS.c.state)
            .where(JOBS.c.uid == claim.uid)
            .with_for_update()
        ).one_or_none()
        if found is None or (found.attempt, found.holder) != (claim.attempt, claim.holder):
            raise LostClaim(f"{claim} is another's by now: {found}")
        if state is not None and found.state != state:
            raise LostClaim(f"{claim} is {found.state} by now")

    async def _guarded(
        self, claim: Claim, values: Mapping[str, Any], patience_s: float = PATIENCE_S
    ) -> None:
        def work(db: sa.Connection) -> None:
            self._check(db, claim)
            db.execute(sa.update(JOBS).where(JOBS.c.uid == claim.uid).values(**values))

        await self.database.call(work, patience_s)

    def _end(
        self,
        db: sa.Connection,
        uid: str,
        state: State,
        condition: Any,
        values: Mapping[str, Any] | None = None,
    ) -> bool:
        now_s = self.database.now_s(db)
        ended = db.execute(
            sa.update(JOBS)
            .where(JOBS.c.uid == uid, condition)
            .values(
                state=state,
                ended_s=now_s,
                expires_s=now_s + self._retention_s,
                # Who was never begun is nobody's to close.
                is_closed=sa.and_(JOBS.c.attempt == 0, JOBS.c.webhook_url == ""),
                **(values or {}),
            )
        )
        if ended.rowcount:
            self._note(db, uid, [{"state": state}])
        return bool(ended.rowcount)

    def _note(self, db: sa.Connection, uid: str, events: Sequence[Mapping[str, Any]]) -> None:
        last = db.execute(
            sa.update(JOBS)
            .where(JOBS.c.uid == uid)
            .values(last_event=JOBS.c.last_event + len(events))
            .returning(JOBS.c.last_event)
        ).scalar_one()
        now_s = self.database.now_s(db)
        first = last - len(events) + 1
        empty = {"state": None, "stage": None, "fraction": None}
        rows = [
            {**empty, **event, "uid": uid, "number": first + index, "at_s": now_s}
            for index, event in enumerate(events)
        ]
        db.execute(sa.insert(EVENTS), rows)

    def _load(self, db: sa.Connection) -> Load:
        now_s = self.database.now_s(db)
        columns = (
            JOBS.c.uid, JOBS.c.owner, JOBS.c.state,
            JOBS.c.estimate_s, JOBS.c.created_s, JOBS.c.started_s,
        )  # fmt: skip
        rows = db.execute(sa.select(*columns).where(JOBS.c.state.in_(["queued", "running"]))).all()
        return Load(
            running=tuple(
                Running(r.uid, r.owner, r.estimate_s, max(0.0, now_s - r.started_s))
                for r in rows
                if r.state == "running"
            ),
            waiting=tuple(
                Waiting(r.uid, r.owner, r.estimate_s, max(0.0, now_s - r.created_s))
                for r in rows
                if r.state == "queued"
            ),
        )

    def _started(self, db: sa.Connection) -> list[Started]:
        """The last begun job of each owner: the ones before it have no effect (jobs.schedule)."""
        latest = (
            sa.select(JOBS.c.owner, sa.func.max(JOBS.c.tag_s).label("tag_s"))
            .where(JOBS.c.tag_s.is_not(None))
            .group_by(JOBS.c.owner)
            .subquery()
        )
        query = sa.select(JOBS.c.owner, JOBS.c.cost_s, JOBS.c.estimate_s, JOBS.c.tag_s).join(
            latest, sa.and_(JOBS.c.owner == latest.c.owner, JOBS.c.tag_s == latest.c.tag_s)
        )
        return [
            Started(r.owner, r.estimate_s if r.cost_s is None else r.cost_s, r.tag_s)
            for r in db.execute(query)
        ]


def played_path(uid: str, attempt: int, start: int, stop: int) -> str:
    """Where a part of a job's sound lies."""
    return f"{uid}/{attempt}/played/{start:012}-{stop:012}"


def _row_of(found: Any) -> Row:
    stored = tuple(
        StoredArtifact(ArtifactInfo(**entry["info"]), entry["path"])
        for entry in json.loads(found.artifacts or "[]")
    )
    job = Job(
        id=found.id,
        owner=found.owner,
        state=found.state,
        options=RemixOptions.model_validate_json(found.options),
        created_s=found.created_s,
        started_s=found.started_s,
        ended_s=found.ended_s,
        expires_s=found.expires_s,
        progress=cast(Mapping[Stage, float], json.loads(found.progress)),
        attempt=found.attempt,
        error=JobFailure(**json.loads(found.error)) if found.error else None,
        artifacts=tuple(artifact.info for artifact in stored),
    )
    return Row(
        found.uid, job, found.request, found.result, found.webhook_url, found.duration_s, stored
    )


def _no_job(job_id: str) -> NotFound:
    return NotFound(
        f"There is no job {job_id!r} (any more).",
        value=job_id,
        limit="a job of GET /v1/jobs",
        remedy="Submit it.",
    )
