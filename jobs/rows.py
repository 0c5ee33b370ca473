"""Rows of jobs, their events and what they have played; and what a transaction does with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from jobs.database import Database, metadata
from jobs.job import ArtifactInfo, Job, JobFailure, State
from jobs.schedule import Started, Waiting, next_job
from remix.errors import NotFound
from remix.options import RemixOptions
from remix.stages import Stage
from telemetry.traces import trace_id_in

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
    sa.Column("version", TEXT(12)),  # of the code and models that began it
    sa.Column("trace", TEXT(64)),  # the W3C header `traceparent` of its submission
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
        trace: the header of its trace; empty for none.
    """

    owner: str
    id: str
    request: str
    result: str
    options: RemixOptions
    webhook_url: str
    duration_s: float
    estimate_s: float
    trace: str = ""


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
        trace: the header of its trace; empty for none.
    """

    uid: str
    job: Job
    request: str
    result: str
    webhook_url: str
    duration_s: float
    stored: tuple[StoredArtifact, ...]
    trace: str


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


class Rows:
    """What callers and composers both do with rows, within a transaction.

    Args:
        database: with the tables.
        retention_s: how long an ended job is kept.
    """

    def __init__(self, database: Database, retention_s: float) -> None:
        self.database = database
        self._retention_s = retention_s

    def find_in(self, db: sa.Connection, owner: str, job_id: str) -> Row | None:
        """An owner's job."""
        query = sa.select(JOBS).where(JOBS.c.owner == owner, JOBS.c.id == job_id)
        found = db.execute(query).one_or_none()
        return None if found is None else row_of(found)

    def row_in(self, db: sa.Connection, uid: str) -> Row:
        """A job.

        Raises:
            NotFound: it is there no more.
        """
        found = db.execute(sa.select(JOBS).where(JOBS.c.uid == uid)).one_or_none()
        if found is None:
            raise no_job(uid)
        return row_of(found)

    def end_in(
        self,
        db: sa.Connection,
        uid: str,
        state: State,
        condition: Any,
        values: Mapping[str, Any] | None = None,
    ) -> bool:
        """Let a job that meets a condition come to its last state; whether it did."""
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
            self.note_in(db, uid, [{"state": state}])
        return bool(ended.rowcount)

    def note_in(self, db: sa.Connection, uid: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Add events to a job's."""
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

    def load_in(self, db: sa.Connection) -> Load:
        """What runs and what waits."""
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

    def started_in(self, db: sa.Connection) -> list[Started]:
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


def row_of(found: Any) -> Row:
    """A row as the database gives it -> as we have it."""
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
        trace_id=trace_id_in(found.trace),
    )
    return Row(
        uid=found.uid,
        job=job,
        request=found.request,
        result=found.result,
        webhook_url=found.webhook_url,
        duration_s=found.duration_s,
        stored=stored,
        trace=found.trace or "",
    )


def no_job(job_id: str) -> NotFound:
    """What is said of an id that no job has."""
    return NotFound(
        f"There is no job {job_id!r} (any more).",
        value=job_id,
        limit="a job of GET /v1/jobs",
        remedy="Submit it.",
    )
