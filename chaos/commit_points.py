"""A composer dies before each commit of a job, and so after the one before it.

What a job leaves in the database, in order; each is a transaction of its own:

    submitted   jobs: the row                              (nothing; the caller has no answer)
    begun       jobs: attempt and lease                    (a job that waits)
    workflow    dbos: the workflow                         (a job that runs, and nobody runs it)
    progress    jobs, job_events: how far                  (windows in the cache)
    sound       job_audio: that a part is there            (its file)
    renewed     jobs: the lease                            (an older lease)
    made        dbos: result of `make`                     (all files)
    settled     jobs, job_events: done                     (a result that nobody sees)
    ...and      dbos: result of `settle`                   (a job that is done)
    told        dbos: result of `notify`                   (a webhook that knows)
    closed      jobs: nothing left to do                   (files tidied)
    ...and      dbos: result of `close`, of the workflow
    taken over  jobs: the next attempt and its lease       (a dead composer's job)
    resumed     dbos: the workflow's new queue             (the same, begun by nobody)
    cancelled   jobs, job_events: cancelled                (a job that runs; no answer)
    ...and      dbos: result of `make`, which is nothing   (a cancelled job with files)
    forgotten   dbos: no workflow; then jobs: no rows      (rows without files)

Files are no transactions: each appears whole, before the row that knows of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from chaos.caller import Caller, Piece
from chaos.postgres import BINARIES, postgres
from chaos.servers import LOOPBACK, Server
from chaos.store import Commit, PostgresStore, SqliteStore, Store
from chaos.world import Outcome, World, await_that

CLOSED = " closed, [make settle notify close], SUCCESS"
"""What `_seen` has of a job that nothing is left to do for."""

SECRET = "chaos"


@dataclass(frozen=True)
class Death:
    """Where a composer dies.

    Args:
        at: the commits: it dies at the first, its successor at the second.
        leaves: what is committed then, as `_seen` tells it.
        takes_long: whether the job must run for some seconds until then: no window of its song has
            been computed before.
        ends: what `_seen` has in it at last: a closed job is nobody's any more, and its workflow
            stays as it is until both are forgotten.
    """

    at: tuple[Commit, ...]
    leaves: str
    takes_long: bool = False
    ends: str = CLOSED


def _step(name: str) -> Commit:
    return Commit(
        f"result of {name}", "operation_outputs", "INSERT", f"NEW.function_name = '{name}'"
    )


def _job(name: str, condition: str) -> Commit:
    return Commit(name, "jobs", "UPDATE", condition)


MADE = _step("make")
TAKEN_OVER = _job("taken over", "NEW.attempt = 2 AND OLD.attempt = 1")
RENEWED = "NEW.lease_until_s > OLD.lease_until_s AND OLD.lease_until_s > 0"

DEATHS = (
    Death((Commit("submitted", "jobs", "INSERT", "NEW.state = 'queued'"),), "no job"),
    Death((_job("begun", "NEW.attempt = 1 AND OLD.attempt = 0"),), "queued 0, [], no workflow"),
    Death((Commit("workflow", "workflow_status", "INSERT", "NEW.status <> ''"),),
          "running 1, [], no workflow"),
    Death((_job("progress", "NEW.progress <> OLD.progress"),), "running 1, [], PENDING"),
    Death((Commit("sound", "job_audio", "INSERT", "NEW.start >= 0"),), "running 1, [], PENDING"),
    Death((_job("renewed", f"NEW.attempt = OLD.attempt AND {RENEWED}"),), "running 1, [], PENDING",
          takes_long=True),
    Death((MADE,), "running 1, [], PENDING"),
    Death((_job("settled", "NEW.state = 'done' AND OLD.state = 'running'"),),
          "running 1, [make], PENDING"),
    Death((_step("settle"),), "done 1, [make], PENDING"),
    Death((_step("notify"),), "done 1, [make settle], PENDING"),
    Death((_job("closed", "NEW.is_closed AND NOT OLD.is_closed"),),
          "done 1, [make settle notify], PENDING"),
    Death((_step("close"),), "done 1 closed, [make settle notify], PENDING",
          ends=" closed, [make settle notify], PENDING"),
    Death((Commit("workflow over", "workflow_status", "UPDATE", "NEW.status = 'SUCCESS'"),),
          "done 1 closed, [make settle notify close], PENDING",
          ends=" closed, [make settle notify close], "),  # PostgreSQL ends what it has begun
    Death((MADE, TAKEN_OVER), "running 1, [], PENDING"),
    Death((MADE, Commit("resumed", "workflow_status", "UPDATE",
                        "NEW.status = 'ENQUEUED' AND OLD.status = 'PENDING'")),
          "running 2, [], PENDING"),
)  # fmt: skip
"""Of a job that is done in the end."""

CANCELLED = (
    Death((_job("cancelling", "NEW.state = 'cancelled'"),), "running 1, [], PENDING", True),
    Death((MADE,), "cancelled 1, [], PENDING", True),
    Death((_step("settle"),), "cancelled 1, [make], PENDING", True),
    Death(
        (_step("close"),),
        "cancelled 1 closed, [make settle notify], PENDING",
        True,
        ends=" closed, [make settle notify], PENDING",
    ),
)
"""Of one that is cancelled as soon as it runs."""

FORGOTTEN = (
    Death((Commit("workflow forgotten", "workflow_status", "DELETE", "OLD.status <> ''"),),
          "done 1 closed, [make settle close], SUCCESS"),
    Death((Commit("row forgotten", "jobs", "DELETE", "OLD.attempt > 0"),),
          "done 1 closed, [], no workflow"),
)  # fmt: skip
"""Of one whose retention is over."""

RETENTION_S = 3.0

TABLES = {
    "jobs": "uid",
    "job_events": "uid",
    "job_audio": "uid",
    "workflow_status": "workflow_uuid",
    "operation_outputs": "workflow_uuid",
}
"""Where a job has rows, and what they call it."""


def sqlite(world: World) -> Iterator[Outcome]:
    """The composer dies before each commit of a job, on SQLite."""
    data_dir = world.new_folder("data")
    yield from _all(world, "sqlite", data_dir, {}, SqliteStore(data_dir / "jobs.db"))


def postgresql(world: World) -> Iterator[Outcome]:
    """The same on PostgreSQL."""
    if not BINARIES:
        return
    with postgres() as server:
        settings = {"PHILHARMONICS_DATABASE": server.url}
        data_dir = world.new_folder("data")
        yield from _all(world, "postgresql", data_dir, settings, PostgresStore(server.url))


def _all(
    world: World, database: str, data_dir: Path, settings: dict[str, str], store: Store
) -> Iterator[Outcome]:
    with _webhook() as heard, ExitStack() as stack:
        hosts = {
            "PHILHARMONICS_WEBHOOK_HOSTS": heard.host,
            "PHILHARMONICS_WEBHOOK_SECRET": SECRET,
        }
        victim = world.composer(data_dir, {**settings, **hosts})
        stack.enter_context(world.running(victim))
        points = _Points(world, database, victim, store, heard)
        pieces = _pieces(world)
        world.undisturbed([piece for pair in pieces.values() for piece in pair])
        for death in DEATHS:
            yield points.die(death, *pieces[death])
        for death in CANCELLED:
            yield points.die_cancelled(death, *pieces[death])
        victim.kill()
        short = {"PHILHARMONICS_RETENTION_S": str(RETENTION_S)}
        points.victim = world.composer(data_dir, {**settings, **short})
        stack.enter_context(world.running(points.victim))
        for death in FORGOTTEN:
            yield points.die_forgotten(death, pieces[death][0])


def _pieces(world: World) -> dict[Death, tuple[Piece, Piece]]:
    """What is asked for at each death: the job that it meets, and another one."""
    found, long_songs = {}, 0
    for number, death in enumerate([*DEATHS, *CANCELLED, *FORGOTTEN], 1):
        long_songs += death.takes_long
        song = long_songs if death.takes_long else 0
        met, beside = (world.pieces(100 * number + k) for k in (0, 1))
        found[death] = (met[song], beside[0])
    return found


class _Points:
    """The deaths of one composer after another, in one database.

    Args:
        world: with the songs.
        database: its name.
        victim: runs.
        store: what it commits to.
        heard: what its webhooks told.
    """

    def __init__(
        self, world: World, database: str, victim: Server, store: Store, heard: _Heard
    ) -> None:
        self._world = world
        self._database = database
        self._store = store
        self._heard = heard
        self.victim = victim

    def die(self, death: Death, piece: Piece, beside: Piece) -> Outcome:
        """A job that is done in the end; another one beside it."""
        outcome = self._outcome(death)
        caller, begin_s = Caller([self.victim.url], self._heard.url), time.monotonic()
        job_id = self._die(death, outcome, piece, lambda: caller.submit("d", [piece]))
        caller.submit("d", [beside])
        struck_s = self._revive(outcome)
        self._world.judge(outcome, caller, begin_s, struck_s)
        self._check_end(outcome, job_id, "done", death.ends)
        return outcome

    def die_cancelled(self, death: Death, piece: Piece, beside: Piece) -> Outcome:
        """A job that is cancelled as soon as it runs; another one beside it."""
        outcome = self._outcome(death, "cancelled, ")
        url = self._heard.url
        caller, cancelling = Caller([self.victim.url], url), Caller([self.victim.url], url)
        begin_s = time.monotonic()

        def submit() -> None:
            cancelling.submit("d", [piece])
            running = "SELECT 1 FROM jobs WHERE id = ? AND progress <> '{}'"
            await_that("it runs", lambda: bool(self._store.rows(running, f"d-{piece.name}")))
            threading.Thread(target=self._cancel, args=[f"d-{piece.name}"], daemon=True).start()

        job_id = self._die(death, outcome, piece, submit)
        caller.submit("d", [beside])
        struck_s = self._revive(outcome)
        self._cancel(job_id)  # whoever had no answer asks again
        (told,) = cancelling.wait()
        self._world.judge(outcome, caller, begin_s, struck_s)
        state = told.job.get("state")
        if state == "done" and death.leaves.startswith("running"):  # it was faster this time
            outcome.violations += told.violations(self._world.undisturbed([piece])[piece.name])
        elif state != "cancelled" or told.ends != ["cancelled"]:
            outcome.violations.append(f"{job_id} is {state}, {told.ends}: {told.problem}")
        self._check_end(outcome, job_id, str(state), death.ends)
        ((uid,),) = self._store.rows("SELECT uid FROM jobs WHERE id = ?", job_id)
        files = list((self.victim.data_dir / "artifacts" / uid).rglob("*"))
        if state == "cancelled" and files:
            outcome.violations.append(f"{job_id} was cancelled and has files: {files}")
        return outcome

    def die_forgotten(self, death: Death, piece: Piece) -> Outcome:
        """A job whose time is over: nothing of it is left."""
        outcome = self._outcome(death)
        uids = list[str]()

        def submit() -> None:
            form = {"options": json.dumps(piece.options)}
            url = f"{self.victim.url}/v1/jobs/d-{piece.name}"
            httpx.put(
                url, files={"song": piece.song}, data=form, timeout=60.0, trust_env=False
            ).raise_for_status()
            uids.append(
                self._store.rows("SELECT uid FROM jobs WHERE id = ?", f"d-{piece.name}")[0][0]
            )

        self._die(death, outcome, piece, submit)
        struck_s = self._revive(outcome)
        outcome.jobs = 1
        with suppress(TimeoutError):
            await_that("nothing is left", lambda: not self._left(uids[0]), 60.0)
        outcome.ended_s = time.monotonic() - struck_s
        if left := self._left(uids[0]):
            outcome.violations.append(f"not deleted: {left}")
        return outcome

    def _outcome(self, death: Death, what: str = "") -> Outcome:
        name = " then ".join(commit.name for commit in death.at)
        return Outcome(f"{self._database}: {what}{name}", "kill -9 before this commit")

    def _die(
        self, death: Death, outcome: Outcome, piece: Piece, submit: Callable[[], object]
    ) -> str:
        """Submit a job, and die on its way; its id."""
        job_id = f"d-{piece.name}"
        for number, commit in enumerate(death.at):
            with self._store.halt(commit, job_id) as halt:
                if number == 0:
                    submit()
                else:
                    self.victim.start()
                halt.reached()
                seen = self._seen(job_id)
                self.victim.kill()
        outcome.facts["committed"] = seen
        if seen != death.leaves:
            outcome.violations.append(f"died at {seen!r}, not at {death.leaves!r}")
        return job_id

    def _revive(self, outcome: Outcome) -> float:
        struck_s = time.monotonic()
        self.victim.start()
        self.victim.await_ready()
        outcome.back_s = time.monotonic() - struck_s
        return struck_s

    def _cancel(self, job_id: str) -> None:
        with suppress(httpx.TransportError):
            httpx.delete(f"{self.victim.url}/v1/jobs/{job_id}", timeout=30.0, trust_env=False)

    def _seen(self, job_id: str) -> str:
        """What is committed of a job, in words."""
        query = "SELECT uid, state, attempt, is_closed FROM jobs WHERE id = ?"
        found = self._store.rows(query, job_id)
        if not found:
            return "no job"
        ((uid, state, attempt, is_closed),) = found
        steps = self._store.rows(
            "SELECT function_name FROM operation_outputs WHERE workflow_uuid = ? "
            "ORDER BY function_id",
            uid,
        )
        status = self._store.rows("SELECT status FROM workflow_status WHERE workflow_uuid = ?", uid)
        return (
            f"{state} {attempt}{' closed' if is_closed else ''}, "
            f"[{' '.join(name for (name,) in steps)}], {status[0][0] if status else 'no workflow'}"
        )

    def _check_end(self, outcome: Outcome, job_id: str, state: str, ends: str) -> None:
        """Nothing is left to do, a moment after the job has ended, and the webhook was told."""

        def is_closed() -> bool:
            seen = self._seen(job_id)
            return seen.startswith(f"{state} ") and ends in seen

        with suppress(TimeoutError):
            await_that("it is closed", is_closed, 30.0)
        if not is_closed():
            outcome.violations.append(f"left as {self._seen(job_id)!r}, not as {state}{ends}")
        if job_id not in self._heard.ids:
            outcome.violations.append("the webhook was not told")

    def _left(self, uid: str) -> dict[str, int]:
        """Rows of a job, by table."""
        found = {}
        for table, key in TABLES.items():
            query = f"SELECT count(*) FROM {table} WHERE {key} = ?"  # noqa: S608 - names of ours
            if count := self._store.rows(query, uid)[0][0]:
                found[table] = count
        return found


@dataclass(frozen=True)
class _Heard:
    """A webhook, and of which jobs it was told."""

    host: str
    url: str
    ids: set[str]


@contextmanager
def _webhook() -> Iterator[_Heard]:
    ids = set[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            ids.add(body["job"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"{LOOPBACK}:{server.server_port}"
        try:
            yield _Heard(host, f"http://{host}/", ids)
        finally:
            server.shutdown()
