"""The jobs' database, looked at from outside, and brought to a halt at one commit.

A transaction is stopped by a trigger: within the composer's own transaction, after its change and
before its commit, the database itself does not return. So all that was committed before is there,
and what is being committed is not: killed then, the composer dies exactly between two commits. No
line of the service knows of it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psycopg

HALTED_S = 240.0
"""In which a job gets to a commit, on a busy machine."""

LOOK_S = 0.02

HELD_S = 0.5
"""A transaction of ours takes some milliseconds; who has the write lock for so long is halted."""

LOCK = 4_711  # any number that nobody else takes


@dataclass(frozen=True)
class Commit:
    """A commit of one job.

    Args:
        name: what is being committed.
        table: that it changes.
        change: INSERT, UPDATE or DELETE.
        condition: of the row (NEW, or OLD of a DELETE), in SQL.
    """

    name: str
    table: str
    change: str
    condition: str

    def of_job(self, job_id: str) -> str:
        """The condition, for one job alone; tables of `dbos` name it by its uid."""
        row = "OLD" if self.change == "DELETE" else "NEW"
        if self.table == "jobs":
            return f"{row}.id = '{job_id}' AND ({self.condition})"
        key = "uid" if self.table.startswith("job_") else "workflow_uuid"
        uid = f"SELECT uid FROM jobs WHERE id = '{job_id}'"  # noqa: S608 - an id of our own
        return f"{row}.{key} = ({uid}) AND ({self.condition})"


class Store(Protocol):
    """A database of jobs."""

    def rows(self, query: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        """What is committed."""
        ...

    def halt(self, commit: Commit, job_id: str) -> Any:
        """A context: within it, who comes to this commit of this job stands still there."""
        ...


class Halt(Protocol):
    """A commit at which whoever comes to it stands still."""

    def reached(self) -> None:
        """Wait until somebody does."""
        ...


class SqliteStore:
    """SQLite, in the composers' data folder.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _open(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self._path, isolation_level=None, timeout=10.0))

    def rows(self, query: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        """See `Store`."""
        with self._open() as db:
            return list(db.execute(query, values))

    @contextmanager
    def halt(self, commit: Commit, job_id: str) -> Iterator[Halt]:
        """See `Store`: the trigger counts for ever, with the write lock held."""
        with self._open() as db:
            db.executescript(
                f"""
                CREATE VIEW for_ever AS WITH RECURSIVE
                    n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n;
                CREATE TRIGGER halt AFTER {commit.change} ON {commit.table}
                    WHEN {commit.of_job(job_id)}
                    BEGIN SELECT count(*) FROM for_ever; END;
                """  # noqa: S608 - names and conditions of our own
            )
        try:
            yield self
        finally:
            with self._open() as db:
                db.executescript("DROP TRIGGER halt; DROP VIEW for_ever;")

    def reached(self) -> None:
        """See `Halt`: nobody else can write, for longer than any transaction takes."""
        until_s, free_s = time.monotonic() + HALTED_S, time.monotonic()
        with closing(sqlite3.connect(self._path, isolation_level=None, timeout=0.0)) as db:
            while time.monotonic() - free_s < HELD_S:
                if time.monotonic() > until_s:
                    raise TimeoutError("nobody came to the commit")
                with suppress(sqlite3.OperationalError):
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("ROLLBACK")
                    free_s = time.monotonic()
                time.sleep(LOOK_S)


class PostgresStore:
    """PostgreSQL.

    Args:
        url: of the database.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def _open(self) -> psycopg.Connection[tuple[Any, ...]]:
        # dbos keeps its tables in a schema of its own.
        return psycopg.connect(self._url, autocommit=True, options="-c search_path=public,dbos")

    def rows(self, query: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        """See `Store`."""
        with self._open() as db:
            return db.execute(query.replace("?", "%s").encode(), values).fetchall()

    @contextmanager
    def halt(self, commit: Commit, job_id: str) -> Iterator[Halt]:
        """See `Store`: the trigger waits for a lock that is held here."""
        returned = "OLD" if commit.change == "DELETE" else "NEW"
        # A condition of a trigger may not ask other tables; its function may.
        script = f"""
            CREATE FUNCTION halt() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF {commit.of_job(job_id)} THEN PERFORM pg_advisory_lock({LOCK}); END IF;
                RETURN {returned};
            END $$;
            CREATE TRIGGER halt AFTER {commit.change} ON {commit.table}
                FOR EACH ROW EXECUTE FUNCTION halt();
            """
        with self._open() as db:
            db.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
            db.execute(script.encode())
            try:
                yield self
            finally:
                # Whoever waits goes on, and finds that nobody is there to commit.
                db.execute(f"SELECT pg_advisory_unlock({LOCK})".encode())
                db.execute(f"DROP TRIGGER halt ON {commit.table}; DROP FUNCTION halt".encode())

    def reached(self) -> None:
        """See `Halt`: somebody waits for the lock."""
        until_s = time.monotonic() + HALTED_S
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while not self.rows(waiting):
            if time.monotonic() > until_s:
                raise TimeoutError("nobody came to the commit")
            time.sleep(LOOK_S)
