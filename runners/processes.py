"""Processes that belong together end together, and the runners after the composers.

`bentoml serve` starts a first process, which starts the workers: the composer, its runners. It
starts a worker again that dies. It cannot do two things, which are done here: take its workers
with it when it is killed, and stop them in order.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import BinaryIO

from remix.settings import PREFIX

FIRST = PREFIX + "FIRST_PROCESS"

PR_SET_PDEATHSIG = 1
"""Source: prctl(2), Linux."""

COMPOSERS = "composers"
"""In the folder of sockets: the file that composers at work have locked."""

POLL_S = 0.1


def be_first() -> None:
    """Name this process, which is about to start workers, to them."""
    os.environ[FIRST] = str(os.getpid())


def end_with_first() -> None:
    """Be killed when the first process ends without ending this one: it was killed itself.

    SIGKILL, because a worker that hangs, or is stopped, has to go too: the next server needs its
    port and its memory.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(FIRST, str(os.getppid())) != str(os.getppid()):  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def enter(runtime_dir: Path) -> BinaryIO:
    """A composer's lock, which holds the runners beside it until it is closed.

    The kernel opens it too when the process dies.
    """
    runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (runtime_dir / COMPOSERS).open("wb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


async def composers_gone(runtime_dir: Path, limit_s: float) -> None:
    """Wait until no composer is at work beside this runner; not for longer than `limit_s`."""
    path = runtime_dir / COMPOSERS
    until_s = time.monotonic() + limit_s
    while path.exists() and time.monotonic() < until_s:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await asyncio.sleep(POLL_S)
