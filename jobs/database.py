"""The jobs' database: SQLite in a file, or PostgreSQL by its address."""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from remix.errors import StorageUnavailable

metadata = sa.MetaData()
"""Every table of ours; `dbos` has its own beside them."""

Result = TypeVar("Result")

BUSY_MS = 10_000
"""How long a writer of SQLite waits for another one's transaction."""

THREADS = 4
"""Transactions at once. On SQLite they write one after the other anyway."""

READERS = 2
"""Threads that only read: what refuses a request does not queue behind those that write."""

READS = "reads"
"""Option of a connection whose transactions only read."""

PATIENCE_S = 3.0
"""How long a request waits for a database that does not answer."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 1.0
"""Between two tries; short, because what waits for it is the recovery after an outage."""


TABLES_LOCK = 0x50484A  # any number that is always the same


def open_database(url: str) -> sa.Engine:
    """The database at an address, with its tables made.

    Args:
        url: as SQLAlchemy has it, `sqlite:////folder/jobs.db` or
            `postgresql+psycopg://user@host/name`.
    """
    address = sa.make_url(url)
    if address.get_backend_name() != "sqlite":
        if address.drivername == "postgresql":
            address = address.set(drivername="postgresql+psycopg")
        engine = sa.create_engine(
            address, pool_size=THREADS, pool_pre_ping=True, connect_args={"connect_timeout": 5}
        )
    else:
        if address.database:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = sa.create_engine(address)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_at_once)
    with engine.begin() as connection:
        if address.get_backend_name() == "postgresql":  # two composers may start at once
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(TABLES_LOCK)))
        metadata.create_all(connection)
        _add_new_columns(connection)
    return engine


def _add_new_columns(connection: sa.Connection) -> None:
    """Give tables of an earlier version the columns that it did not know; all may be empty."""
    inspector = sa.inspect(connection)
    for table in metadata.tables.values():
        known = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = column.type.compile(connection.dialect)
                connection.exec_driver_sql(
                    f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"
                )


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # else Python's driver begins transactions when it likes
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
    connection.execute("PRAGMA synchronous=FULL")  # what was answered survives a loss of power


def _begin_at_once(connection: sa.Connection) -> None:
    # A transaction that reads and then writes would fail, not wait, if another wrote between.
    # One that only reads sees what was there when it began, and waits for nobody.
    is_reader = connection.get_execution_options().get(READS)
    connection.exec_driver_sql("BEGIN" if is_reader else "BEGIN IMMEDIATE")


class Database:
    """Transactions off the event loop, tried again while the database is away.

    Args:
        engine: of `open_database`.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="database-reader")
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._lock: IO[str] | None = None
        self.failed_s = float("-inf")
        """When the database last did not answer, on `time.monotonic`'s clock."""

    async def call(
        self, work: Callable[[sa.Connection], Result], patience_s: float = PATIENCE_S
    ) -> Result:
        """What `work` returns, done in a transaction of its own.

        Args:
            work: may run again after a commit whose answer was lost: it must do no harm twice.
            patience_s: how long it is tried.

        Raises:
            StorageUnavailable: the database did not answer, or was full, for so long.
        """
        return await self._try(self._threads, self.engine, work, patience_s)

    async def read(self, work: Callable[[sa.Connection], Result]) -> Result:
        """What `work` returns, which only reads; it waits for no writer.

        Raises:
            StorageUnavailable: see `call`.
        """
        reader = self.engine.execution_options(**{READS: True})
        return await self._try(self._readers, reader, work, PATIENCE_S)

    async def _try(
        self,
        threads: ThreadPoolExecutor,
        engine: sa.Engine,
        work: Callable[[sa.Connection], Result],
        patience_s: float,
    ) -> Result:
        def transact() -> Result:
            with engine.begin() as connection:
                return work(connection)

        loop = asyncio.get_running_loop()
        until_s = time.monotonic() + patience_s
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return await loop.run_in_executor(threads, transact)
            except (DBAPIError, sa.exc.TimeoutError) as error:
                if not _is_away(error):
                    raise
                self.failed_s = time.monotonic()
                if self.failed_s + wait_s > until_s:
                    raise _unavailable(error, patience_s) from error
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def is_alone(self) -> bool:
        """Whether no other process has this database open; a server's clients cannot tell.

        To be asked once, at the start: from then on others can see that this process is there.
        """
        if not self._is_sqlite or not self.engine.url.database:
            return False
        self._lock = Path(f"{self.engine.url.database}.lock").open("w")  # noqa: SIM115 - till close
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def now_s(self, connection: sa.Connection) -> float:
        """Seconds since 1970 by the one clock that everybody on this database shares."""
        if self._is_sqlite:  # one file, one machine, one clock
            return time.time()
        now = sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))
        return float(connection.execute(now).scalar_one())

    def close(self) -> None:
        """Close every connection."""
        self._threads.shutdown()
        self._readers.shutdown()
        self.engine.dispose()
        if self._lock is not None:
            self._lock.close()


def _is_away(error: Exception) -> bool:
    """Whether it is the database's fault: gone, locked, full; not a wrong statement."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | sa.exc.TimeoutError)


def _unavailable(error: Exception, patience_s: float) -> StorageUnavailable:
    reason = str(getattr(error, "orig", None) or error).strip().splitlines()
    return StorageUnavailable(
        f"The database does not answer for {patience_s:g} s ({reason[0] if reason else error!r}); "
        "it must.",
        value="no answer",
        limit="an answer",
        remedy="Try again when Retry-After has passed.",
    )
