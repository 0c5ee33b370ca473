"""What `make chaos` rests on: a commit at which somebody stands still, and a verdict that sees."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from chaos.caller import Piece, Told
from chaos.store import Commit, PostgresStore, SqliteStore, Store
from tests.postgres import postgres

TABLES = "CREATE TABLE jobs (id TEXT, uid TEXT, state TEXT)"
ROWS = "INSERT INTO jobs VALUES ('a', '1', 'running'), ('b', '2', 'running')"
SETTLED = Commit("settled", "jobs", "UPDATE", "NEW.state = 'done' AND OLD.state = 'running'")

SQLITE_COMPOSER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("UPDATE jobs SET state = 'done' WHERE id = 'b'")
db.commit()
db.execute("UPDATE jobs SET state = 'done' WHERE id = 'a'")
db.commit()
"""
POSTGRES_COMPOSER = SQLITE_COMPOSER.replace("sqlite3", "psycopg")


def dies_at(store: Store, composer: str, address: str) -> list[tuple[str, str]]:
    """What is committed when a composer that settles b, then a, dies at the second."""
    with store.halt(SETTLED, "a") as halt:
        process = subprocess.Popen([sys.executable, "-c", composer, address])
        halt.reached()
        assert process.poll() is None
        process.kill()
        process.wait()
    return sorted(
        (str(name), str(state)) for name, state in store.rows("SELECT id, state FROM jobs")
    )


def test_who_is_halted_before_a_commit_and_killed_has_committed_what_was_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "jobs.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(TABLES)
        db.execute(ROWS)
    store = SqliteStore(path)
    assert dies_at(store, SQLITE_COMPOSER, str(path)) == [("a", "running"), ("b", "done")]
    store.rows("UPDATE jobs SET state = 'done'")  # nothing of the halt is left
    assert store.rows("SELECT state FROM jobs WHERE id = ?", "a") == [("done",)]


def test_the_same_on_postgresql() -> None:
    with postgres() as server:
        with psycopg.connect(server.url) as db:
            db.execute(TABLES)
            db.execute(ROWS)
        store = PostgresStore(server.url)
        found = dies_at(store, POSTGRES_COMPOSER, server.url)
        assert found == [("a", "running"), ("b", "done")]


PIECE = Piece(b"", {}, "piece")
SUMS = {"remix.wav": "1"}


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (Told("j", PIECE, problem="not ended"), "not ended"),
        (Told("j", PIECE, job={"state": "failed"}, ends=["failed"]), "is failed"),
        (
            Told("j", PIECE, job={"state": "done"}, sums=dict(SUMS), ends=["done", "done"]),
            "2 times",
        ),
        (Told("j", PIECE, job={"state": "done"}, sums={"remix.wav": "2"}, ends=["done"]), "bytes"),
        (Told("j", PIECE, job={"state": "done"}, sums={}, ends=["done"]), "bytes"),
    ],
)
def test_job_that_is_lost_failed_twice_or_changed_is_a_violation(told: Told, word: str) -> None:
    (violation,) = told.violations(SUMS)
    assert word in violation


def test_job_that_ended_once_with_the_same_bytes_is_none() -> None:
    told = Told("j", PIECE, job={"state": "done"}, sums=dict(SUMS), ends=["done"])
    assert told.violations(SUMS) == []
