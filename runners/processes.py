"""Processes that belong together end together, and the runners after the composers.

`bentoml serve` starts a first process, which starts the workers: the composer, its runners. It
starts a worker again that dies. It cannot do four things, which are done here: take its workers
with it when it is killed, stop them in order, start one again that hangs, and heed a signal to stop
that comes while it starts one.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from circus.client import make_json
from circus.sighandler import SysHandler
from prometheus_client.multiprocess import mark_process_dead

from remix.settings import PREFIX

FIRST = PREFIX + "FIRST_PROCESS"

PR_SET_PDEATHSIG = 1
"""Source: prctl(2), Linux."""

FIRST_FILE = "first"
"""In the folder of sockets: the file that the first process has locked."""

COMPOSERS = "composers"
"""And that composers at work have locked."""

_held: list[BinaryIO] = []
"""Locks are open files: these are open until the process ends."""

POLL_S = 0.1


def be_first() -> None:
    """Name this process, which is about to start workers, to them; and have it stop when told to.

    circus, which starts the workers for BentoML, answers a signal with an order to itself, and
    refuses that order while it carries out another one: while it starts or replaces workers. Here
    the order is given until it is taken. Source: `sighandler.py` and `util.synchronized` of kantoku
    0.18.3, which is circus under another name.
    """
    os.environ[FIRST] = str(os.getpid())
    SysHandler.quit = _quit_when_free


def _quit_when_free(handler: Any) -> None:
    """In the place of circus' `SysHandler.quit`."""
    controller = handler.controller

    def order() -> None:
        if not controller.arbiter._stopping:
            controller.dispatch((None, make_json("quit")))
            controller.loop.call_later(POLL_S, order)

    controller.loop.add_callback_from_signal(order)


def end_with_first() -> None:
    """Be killed when the first process ends without ending this one: it was killed itself.

    SIGKILL, because a worker that hangs, or is stopped, has to go too: the next server needs its
    port and its memory.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(FIRST, str(os.getppid())) != str(os.getppid()):  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def keep_and_sweep(folder: Path, prefix: str) -> None:
    """Hold `folder` for as long as this process lives, and remove those that nobody holds.

    Args:
        folder: new, with a name that begins with `prefix`.
        prefix: of the names of its kind, beside it.
    """
    new = folder / "new"
    held = new.open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    new.rename(folder / FIRST_FILE)  # locked before anybody finds it
    _held.append(held)
    for other in folder.parent.glob(f"{prefix}*/{FIRST_FILE}"):
        with suppress(OSError), other.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other.parent, ignore_errors=True)


def forget_the_dead() -> None:
    """Take what processes that were killed did last out of the metrics of what is done now.

    All processes of a server write into one folder, and a file of a gauge stays when its process
    does not.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return
    for path in Path(folder).glob("gauge_live*.db"):
        pid = path.stem.rsplit("_", 1)[1]
        if not Path("/proc", pid).exists():
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def enter(runtime_dir: Path) -> BinaryIO:
    """A composer's lock, which holds the runners beside it until it is closed.

    The kernel opens it too when the process dies.
    """
    runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (runtime_dir / COMPOSERS).open("wb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def be_known(runtime_dir: Path, stage: str) -> BinaryIO:
    """A runner's lock on the file with its number, held until it is closed: it serves this stage.

    The kernel opens it too when the process dies.
    """
    file = (runtime_dir / f"{stage}.pid").open("a+b")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


def end_hung(runtime_dir: Path, stage: str) -> bool:
    """Kill the runner that serves a stage, so that another one is started; whether there was one.

    SIGKILL, which ends a process that is stopped too. A number in a file that nobody holds is of a
    process that has gone, and may be anybody's by now.
    """
    with suppress(FileNotFoundError), (runtime_dir / f"{stage}.pid").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.kill(int(file.read()), signal.SIGKILL)
            return True
    return False


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
