"""A server of our own, from this checkout, for the length of a measurement."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent

START_S = 240.0
"""A cold start reads some hundred megabytes of models; a warm one takes about ten seconds."""

STOP_S = 45.0
"""Runners end what they have begun, for at most 30 s."""


@dataclass(frozen=True)
class OwnServer:
    """A server that runs.

    Args:
        url: where it listens.
        grpc: where it listens for gRPC, `host:port`.
        pid: the root of its processes.
        runtime_dir: where its runners' sockets are.
        start_s: from its start until it was ready.
    """

    url: str
    grpc: str
    pid: int
    runtime_dir: Path
    start_s: float

    def runner(self, stage: str) -> str:
        """The address of a stage's runner."""
        return f"unix:{next(self.runtime_dir.rglob(f'{stage}.sock'))}"


@contextmanager
def own_server() -> Iterator[OwnServer]:
    """Start it with a home of its own, so that no cache is warm; stop it, and all of it, after.

    Raises:
        SystemExit: it did not become ready; with the end of its log.
    """
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        port, grpc_port = one.getsockname()[1], two.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        folder = Path(home)
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
                + ["--host", "127.0.0.1", "--port", str(port)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "BENTOML_HOME": str(folder / "bentoml"),
                    "BENTOML_DO_NOT_TRACK": "True",
                    "PHILHARMONICS_DATA_DIR": str(folder / "data"),
                    "PHILHARMONICS_GRPC_PORT": str(grpc_port),
                    "PHILHARMONICS_RUNTIME_DIR": str(folder / "run"),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            start_s = _await_ready(server, url, folder / "log")
            yield OwnServer(url, f"127.0.0.1:{grpc_port}", server.pid, folder / "run", start_s)
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOP_S)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _await_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> float:
    begin_s = time.monotonic()
    while (waited_s := time.monotonic() - begin_s) < START_S and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False).status_code == 200:
                return waited_s
        time.sleep(0.2)
    end = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
    raise SystemExit(f"The server is not ready; the end of its log:\n{end}")
