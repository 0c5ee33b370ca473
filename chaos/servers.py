"""The service as an operator would run it apart: five runners, and composers that call them.

Each is a `bentoml serve` of its own, so each can be killed, stopped and started again by itself,
at an address that stays. BentoML's first process starts a worker again that dies; what kills the
first process too is followed by `start`, as systemd or an engine of containers would.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from load_tests.processes import metrics_of, processes_of

ROOT = Path(__file__).resolve().parent.parent

STAGES = (
    "separate_stems",
    "transcribe_notes",
    "generate_notes",
    "convert_voice",
    "synthesize_audio",
)

READY_S = 240.0
"""A start on a machine that is busy with as many others."""

STOP_S = 60.0
"""After SIGTERM: requests may take 30 s, and what has begun is ended after that."""

POLL_S = 0.05

LEASE_S = 2.0
"""Of composers: short, so that recoveries take the time of the work and not of waiting."""

COMPOSER = "service:Remix"

LOOPBACK = "127.0.0.1"

ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""A command that runs another one, which is killed when we end without ending it."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def service_of(stage: str) -> str:
    """What `bentoml serve` is told for a stage.

    >>> service_of("separate_stems")
    'runners.separate_stems:SeparateStems'
    """
    return f"runners.{stage}:{worker_of(stage)}"


def worker_of(stage: str) -> str:
    """The name of its service."""
    return "".join(word.title() for word in stage.split("_"))


@dataclass(eq=False)
class Server:
    """One `bentoml serve`.

    Args:
        service: what is served.
        folder: its own: log, temporary files.
        environment: its settings.
        host: where it listens.
        wrapper: a command that runs it, such as `unshare`.
    """

    service: str
    folder: Path
    environment: Mapping[str, str]
    host: str = LOOPBACK
    wrapper: Sequence[str] = ()
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens for HTTP: health and metrics, and a composer's API."""
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Of its first process."""
        assert self.process is not None
        return self.process.pid

    @property
    def grpc(self) -> str:
        """Where a composer listens for gRPC."""
        return f"{self.host}:{self.environment['PHILHARMONICS_GRPC_PORT']}"

    @property
    def data_dir(self) -> Path:
        """Where a composer keeps what is to be kept."""
        return Path(self.environment["PHILHARMONICS_DATA_DIR"])

    def start(self) -> None:
        """Start it, without waiting."""
        temp_dir = self.folder / "tmp"
        temp_dir.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *ENDS_WITH_US,
                    *self.wrapper,
                    sys.executable,
                    "-m",
                    "bentoml",
                    "serve",
                    self.service,
                ]
                + ["--host", self.host, "--port", str(self.port)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "BENTOML_HOME": str(self.folder / "bentoml"),
                    "BENTOML_DO_NOT_TRACK": "True",
                    "PYTHONFAULTHANDLER": "1",  # whoever dies of a fault says where
                    "TMPDIR": str(temp_dir),
                    "PHILHARMONICS_RUNTIME_DIR": str(self.folder / "run"),
                    **self.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """What its `/readyz` says."""
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=5.0, trust_env=False).is_success
        return False

    def await_ready(self) -> None:
        """Wait until it answers.

        Raises:
            SystemExit: it ended, or took too long; with the end of its log.
        """
        until_s = time.monotonic() + READY_S
        while not self.is_ready():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > until_s:
                log = (self.folder / "log").read_text(errors="replace")
                raise SystemExit(f"{self.service} is not ready; its log's end:\n{log[-3000:]}")
            time.sleep(POLL_S)

    def worker(self, name: str) -> int:
        """The process that does the work of a service (`remix`, `SeparateStems`).

        Raises:
            LookupError: there is none now.
        """
        for process in processes_of(self.pid):
            if process.name == name:
                return process.pid
        raise LookupError(f"{self.service} has no process {name}")

    def was_replaced(self, name: str, pid: int) -> bool:
        """Whether another process does that work by now."""
        try:
            return self.worker(name) != pid
        except LookupError:
            return False

    def kill(self) -> None:
        """`kill -9` of its first process; its workers go with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> float:
        """SIGTERM, and wait; how long it took.

        Raises:
            TimeoutError: it is still there.
        """
        assert self.process is not None
        begin_s = time.monotonic()
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self.service} did not stop in {STOP_S:g} s") from error
        return time.monotonic() - begin_s

    def end(self) -> None:
        """Leave nothing of it behind, whatever state it is in."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def counted(self, name: str) -> float:
        """The sum of a metric's series, whatever their labels."""
        return sum(
            value for series, value in metrics_of(self.url).items() if series.split("{")[0] == name
        )


def runner(stage: str, folder: Path, host: str = LOOPBACK, wrapper: Sequence[str] = ()) -> Server:
    """A runner at an address of its own, not started yet."""
    listen = f"{host}:{free_ports(1)[0]}"
    return Server(service_of(stage), folder, {"PHILHARMONICS_LISTEN": listen}, host, wrapper)


def address_of(runner: Server) -> str:
    """Where it takes windows."""
    return runner.environment["PHILHARMONICS_LISTEN"]


def composer(
    folder: Path,
    data_dir: Path,
    runners: Mapping[str, str],
    settings: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
) -> Server:
    """A composer, not started yet.

    Args:
        folder: its own.
        data_dir: of database, artefacts and cache; two composers may share one.
        runners: addresses by stage; a stage without one is served beside the composer.
        settings: more of them.
        wrapper: see `Server`.
    """
    environment = {
        "PHILHARMONICS_DATA_DIR": str(data_dir),
        "PHILHARMONICS_GRPC_PORT": str(free_ports(1)[0]),
        "PHILHARMONICS_LEASE_S": str(LEASE_S),
        "PHILHARMONICS_MAX_REMIXES": "8",
        **{f"PHILHARMONICS_RUNNER_{stage.upper()}": a for stage, a in runners.items()},
        **(settings or {}),
    }
    return Server(COMPOSER, folder, environment, wrapper=wrapper)
