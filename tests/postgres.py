"""A PostgreSQL server of the tests' own, where PostgreSQL is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chaos import postgres as server
from chaos.postgres import Postgres

__all__ = ["Postgres", "postgres"]


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server on a socket in a folder of its own; skips where none is installed."""
    if not server.BINARIES:
        # The project's own set-up needs none, SQLite is its default; the same tests run on that.
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    with server.postgres() as running:
        yield running
