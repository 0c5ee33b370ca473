"""The server's processes: what they hold, and what can be done to them.

Read from /proc, so Linux and this machine only: a server elsewhere is measured by its /metrics.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from load_tests.generator import Event

SAMPLE_EVERY_S = 2.0

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

OURS = "philharmonics_"
"""How the service's own metrics begin; BentoML's have a series for every path."""

NAME_FLAG = "--service-name"
"""What BentoML gives each worker's command line: which service it is."""


@dataclass(frozen=True)
class Process:
    """A process of the server.

    Args:
        pid: of it.
        name: of the service that it works for; what a service starts is `name/child`.
    """

    pid: int
    name: str


@dataclass(frozen=True)
class Holding:
    """What the processes of one name hold.

    Args:
        processes: how many they are.
        memory_bytes: anonymous memory, resident: the models and what is computed with them.
        threads: of them all.
        files: open files and sockets of them all.
        cpu_s: used since they began.
    """

    processes: int
    memory_bytes: int
    threads: int
    files: int
    cpu_s: float


@dataclass(frozen=True)
class Sample:
    """The server at a time, seconds after the watch began."""

    at_s: float
    holdings: dict[str, Holding]
    series: int | None = None


def processes_of(pid: int) -> list[Process]:
    """A process and all that descend from it, named."""
    found = [Process(pid, _name(pid, "parent"))]
    for process in found:
        for child in _children(process.pid):
            base = "other" if process.name == "parent" else f"{process.name}/child"
            found.append(Process(child, _name(child, base)))
    return found


def holdings_of(processes: Sequence[Process]) -> dict[str, Holding]:
    """By name; what has ended meanwhile is left out."""
    found: dict[str, Holding] = {}
    for process in processes:
        with suppress(OSError, KeyError):
            one, before = _holding(process.pid), found.get(process.name, Holding(0, 0, 0, 0, 0.0))
            found[process.name] = Holding(
                before.processes + 1,
                before.memory_bytes + one.memory_bytes,
                before.threads + one.threads,
                before.files + one.files,
                before.cpu_s + one.cpu_s,
            )
    return found


def _holding(pid: int) -> Holding:
    folder = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    after_name = (folder / "stat").read_text().rsplit(")", 1)[1].split()
    return Holding(
        1,
        int(status["RssAnon"].split()[0]) * 1024,
        int(status["Threads"]),
        sum(1 for _ in (folder / "fd").iterdir()),
        (int(after_name[11]) + int(after_name[12])) / TICKS_PER_S,
    )


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return found


def _name(pid: int, otherwise: str) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if NAME_FLAG.encode() in words:
            return words[words.index(NAME_FLAG.encode()) + 1].decode()
    return otherwise


@dataclass
class Watch:
    """Samples of a server, taken on a thread of their own."""

    samples: list[Sample] = field(default_factory=list)


@contextmanager
def watching(pid: int, url: str, *, series: bool) -> Iterator[Watch]:
    """Sample the server while the block runs.

    Args:
        pid: the root of its processes.
        url: of its /metrics.
        series: whether to count the metrics' series each time, which is work for the server.
    """
    watch, over, begin_s = Watch(), threading.Event(), time.monotonic()

    def sample() -> None:
        while True:
            count = len(metrics_of(url)) if series else None
            holdings = holdings_of(processes_of(pid))
            watch.samples.append(Sample(time.monotonic() - begin_s, holdings, count))
            if over.wait(SAMPLE_EVERY_S):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def metrics_of(url: str) -> dict[str, float]:
    """Every series of /metrics and its value; nothing if the server does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=10.0, trust_env=False).text
    except httpx.TransportError:
        return {}
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What the service has counted between: counters, sums and counts, not the buckets."""
    return {
        name: round(value - before.get(name, 0.0), 6)
        for name, value in after.items()
        if name.startswith(OURS)
        and name.split("{")[0].endswith(("_total", "_sum", "_count"))
        and value != before.get(name, 0.0)
    }


def faults(pid: int, kind: str, at_s: float, for_s: float = 0.0) -> list[Event]:
    """`kill`: SIGKILL at a time. `stop`: SIGSTOP at a time, SIGCONT after `for_s`.

    Args:
        pid: whom.
        kind: which.
        at_s: after the run's start.
        for_s: how long it stands still.
    """
    if kind == "kill":
        return [Event(at_s, lambda: os.kill(pid, signal.SIGKILL))]
    return [
        Event(at_s, lambda: os.kill(pid, signal.SIGSTOP)),
        Event(at_s + for_s, lambda: os.kill(pid, signal.SIGCONT)),
    ]
