"""Who works on which job: every change of a job that is worked on is one transaction.

**The fence.** Beginning a job raises its `attempt` and names its holder. Whatever an attempt writes
later is written only where both are still its own: a composer that was given up for dead and comes
back finds that nothing of it counts. **The lease.** A holder renews its leases all the time; a job
whose lease has run out is anybody's of the version that began it. **The version.** While composers
of several versions of code or models work side by side, a job ends on the one that it was begun on;
another one takes it over only when that one is gone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from jobs.database import PATIENCE_S, Database
from jobs.job import ENDED, JobFailure, State
from jobs.rows import EVENTS, JOBS, PLAYED, Row, Rows, StoredArtifact, row_of
from jobs.schedule import Turn, next_job
from remix.stages import Stage

CLOCK_S = 0.001
"""More than the clock's step: a lease that ends so long ago has ended."""

ORPHANED_S = 30.0
"""After so long, with no lease of its version left, another version takes a job over: composers of
its own would have taken it within a second, or hold leases because they have no room."""


class LostClaim(Exception):
    """Somebody else holds the job by now, or it has ended."""


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


class Claims(Rows):
    """The jobs in the hands of one composer.

    Args:
        database: with the tables.
        holder: name of this composer: of this process, never given twice.
        lease_s: how long a job is its holder's without a renewal.
        retention_s: how long an ended job is kept.
        version: of this composer's code and models (`jobs.identity.version_id`).
    """

    def __init__(
        self,
        database: Database,
        holder: str,
        lease_s: float,
        retention_s: float,
        version: str = "",
    ) -> None:
        super().__init__(database, retention_s)
        self._holder = holder
        self._lease_s = lease_s
        self._version = version

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
                self._is_left(self.database.now_s(db)),
            )
            return list(db.execute(query.order_by(JOBS.c.uid)).scalars())

        return await self.database.call(work)

    async def census(self) -> tuple[dict[State, int], float]:
        """How many jobs are in each state, and how long the oldest queued one has waited."""

        def work(db: sa.Connection) -> tuple[dict[State, int], float]:
            columns = JOBS.c.state, sa.func.count(), sa.func.min(JOBS.c.created_s)
            rows = db.execute(sa.select(*columns).group_by(JOBS.c.state)).all()
            now_s = self.database.now_s(db)
            oldest_s = next((since_s for state, _, since_s in rows if state == "queued"), now_s)
            return {state: count for state, count, _ in rows}, max(0.0, now_s - oldest_s)

        return await self.database.read(work)

    async def take_over(self, uid: str) -> Claim | None:
        """Go on with an abandoned job; None if somebody else was faster."""

        def work(db: sa.Connection) -> Claim | None:
            return self._claim(db, uid, self._is_left(self.database.now_s(db)), {})

        return await self.database.call(work)

    def _is_left(self, now_s: float) -> Any:
        """Whether nobody holds a job that this composer may go on with."""
        other = JOBS.alias()
        is_orphan = sa.and_(
            JOBS.c.lease_until_s < now_s - ORPHANED_S,
            ~sa.exists().where(other.c.version == JOBS.c.version, other.c.lease_until_s >= now_s),
        )
        is_ours = sa.or_(JOBS.c.version.is_(None), JOBS.c.version == self._version)
        return sa.and_(JOBS.c.lease_until_s < now_s, sa.or_(is_ours, is_orphan))

    async def begin_next(self) -> Claim | None:
        """Begin the waiting job whose turn it is; None if none waits."""

        def work(db: sa.Connection) -> Claim | None:
            turn: Turn | None = next_job(self.load_in(db).waiting, self.started_in(db))
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
                version=self._version,
                lease_until_s=self.database.now_s(db) + self._lease_s,
                state=sa.case((is_open, "running"), else_=JOBS.c.state),
                **values,
            )
            .returning(JOBS.c.attempt, JOBS.c.state)
        ).one_or_none()
        if claimed is None:
            return None
        if claimed.state == "running":
            self.note_in(db, uid, [{"state": "running"}])
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

        def work(db: sa.Connection) -> None:
            self._check(db, claim)
            values = {"lease_until_s": self.database.now_s(db) - CLOCK_S}
            db.execute(sa.update(JOBS).where(JOBS.c.uid == claim.uid).values(values))

        await self.database.call(work)

    async def row(self, claim: Claim, patience_s: float = PATIENCE_S) -> Row:
        """The job of a claim.

        Raises:
            LostClaim: it is another's by now.
        """

        def work(db: sa.Connection) -> Row:
            self._check(db, claim)
            return self.row_in(db, claim.uid)

        return await self.database.call(work, patience_s)

    async def progress(self, claim: Claim, fractions: Mapping[Stage, float]) -> None:
        """Note how far a job is; what is behind what was noted before is not.

        Raises:
            LostClaim: the job is another's by now, or has ended.
        """

        def work(db: sa.Connection) -> None:
            self._check(db, claim, "running")
            known = self.row_in(db, claim.uid).job.progress
            new = {s: f for s, f in fractions.items() if f > known.get(s, -1.0)}
            if new:
                text = json.dumps({**known, **new})
                db.execute(sa.update(JOBS).where(JOBS.c.uid == claim.uid).values(progress=text))
                self.note_in(db, claim.uid, [{"stage": s, "fraction": f} for s, f in new.items()])

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
            self.end_in(db, claim.uid, state, JOBS.c.state == "running", values)

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
            return None if found is None else row_of(found)

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
