"""A PostgreSQL server of our own, that can be killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Of the versions that are installed; none if it is not."""

DURABLE_ENOUGH = "fsync=off"
"""It is killed, but the machine goes on: what the kernel has is not lost."""


@dataclass(frozen=True)
class Postgres:
    """A server, and how to end and start it.

    Args:
        url: of its one database.
        folder: of its files.
    """

    url: str
    folder: Path

    def pid(self) -> int:
        """Of its first process."""
        return int((self.folder / "data/postmaster.pid").read_text().splitlines()[0])

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-k {self.folder} -h '' -c {DURABLE_ENOUGH}"
        _run("pg_ctl", "-w", "-D", f"{self.folder}/data", "-o", options, "-l",
             f"{self.folder}/log", "start")  # fmt: skip

    def stop(self) -> None:
        """End it at once."""
        _run("pg_ctl", "-w", "-D", f"{self.folder}/data", "-m", "immediate", "stop")


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server on a socket in a folder of its own, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # its socket's path must be short
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        _run("initdb", "-A", "trust", "-U", "jobs", "-N", "-D", f"{folder}/data")
        server = Postgres(f"postgresql://jobs@/postgres?host={folder}", folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _run(program: str, *arguments: str) -> None:
    """It refuses to be root: as root, it is run as its own user."""
    is_root = os.geteuid() == 0
    subprocess.run(
        [BINARIES[-1] / program, *arguments],
        check=True,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user="postgres" if is_root else None,
        group="postgres" if is_root else None,
        extra_groups=[] if is_root else None,
    )
