"""Servers for the tests: real processes on real loopback ports, one of each kind a session."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent

SLOW_SEED = 86_400
"""A fake remix with this seed takes hours: it ends by being cancelled."""

CRASH_SEED = 500
"""A fake remix with this seed fails as a bug would."""

SETTLE_S = 10.0
"""How long a server may take to clear up after an answer: a killed decoder must be reaped."""


@dataclass(frozen=True)
class Traces:
    """What a request could leave behind."""

    files: tuple[str, ...]
    open_files: int
    processes: int

    def exceed(self, before: Traces) -> bool:
        """Whether there is anything that was not there before."""
        return (
            not set(self.files) <= set(before.files)
            or self.open_files > before.open_files
            or self.processes > before.processes
        )


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs.

    Args:
        url: where it listens.
        pid: the root of its processes.
        temp_dir: its temporary folder, its alone.
        grpc_address: where it listens for gRPC, if it does.
    """

    url: str
    pid: int
    temp_dir: Path
    grpc_address: str

    def traces(self) -> Traces:
        """What there is now."""
        return Traces(
            files=tuple(sorted(str(path) for path in self.temp_dir.rglob("*"))),
            open_files=sum(len(_open_files(pid)) for pid in self.pids()),
            processes=len(self.pids()),
        )

    def pids(self) -> list[int]:
        """Every process of the server."""
        return _tree(self.pid)

    def memory_bytes(self) -> int:
        """What all processes hold that is theirs alone."""
        total_kib = 0
        for pid in self.pids():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Private_"):
                        total_kib += int(line.split()[1])
        return total_kib * 1024

    def traces_become(self, before: Traces) -> Traces:
        """`before`, as soon as there is no more than there was then; else what there is at last.

        Less is no trace: what an earlier request held may have gone meanwhile.
        """
        until_s = time.monotonic() + SETTLE_S
        while (now := self.traces()).exceed(before):
            if time.monotonic() > until_s:
                return now
            time.sleep(0.05)
        return before


def _tree(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            for child in children.read_text().split():
                found += _tree(int(child))
    return found


def _open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            target = str(link.readlink())
            # A client keeps its sockets, the database's pool the connections that it once needed.
            if not target.startswith("socket:") and "/jobs.db" not in target:
                found.append(target)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def serving(
    command: list[str], folder: Path, ready_s: float, environment: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Run a command that serves on `--port`, until the block ends."""
    port, grpc_port = free_ports(2)
    temp_dir = folder / "tmp"
    temp_dir.mkdir()
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={
            **os.environ,
            "BENTOML_HOME": str(folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "TMPDIR": str(temp_dir),
            "PHILHARMONICS_RUNTIME_DIR": str(folder / "run"),
            "PHILHARMONICS_DATA_DIR": str(folder / "data"),
            "PHILHARMONICS_GRPC_PORT": str(grpc_port),
            **(environment or {}),
        },
    )
    try:
        _await_ready(f"http://127.0.0.1:{port}/readyz", process, ready_s, folder / "log")
        yield ServerProcess(
            f"http://127.0.0.1:{port}", process.pid, temp_dir, f"127.0.0.1:{grpc_port}"
        )
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _await_ready(url: str, process: subprocess.Popen[bytes], ready_s: float, log: Path) -> None:
    until_s = time.monotonic() + ready_s
    while time.monotonic() < until_s and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"The server is not ready; the end of its log:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real HTTP face and the real decoder over `tests.fakes.FakeComposer`."""
    folder = tmp_path_factory.mktemp("fake_server")
    command = [sys.executable, "-m", "bentoml", "serve", "tests.fakes:FakeRemix"]
    with serving(command, folder, ready_s=60.0) as server:
        yield server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """All of it: the composer and the five runners, with the models that are installed."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
    traces = {"PHILHARMONICS_TRACES": f"file:{folder / 'spans'}"}
    with serving(command, folder, 240.0, traces) as running:
        yield running
