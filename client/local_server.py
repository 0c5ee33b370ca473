"""A server on this machine: in the foreground, or for the length of one call."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from client.api import Client, PhilharmonicsError

ROOT = Path(__file__).resolve().parent.parent
"""Where `service.py` and the packages lie: the folder that this package is in."""

START_S = 180.0
"""A cold start reads some hundred megabytes of models; a warm one takes about ten seconds."""

STOP_S = 45.0
"""Runners end what they have begun, for at most 30 s."""

LOG_LINES = 15

PR_SET_PDEATHSIG = 1
"""Source: prctl(2), Linux."""


class StartFailed(PhilharmonicsError):
    """A server could not be started."""


def command(host: str, port: int) -> list[str]:
    """The command line that serves everything on this machine."""
    serve = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
    return [*serve, "--host", host, "--port", str(port)]


def serve_forever(host: str, port: int, grpc_port: int) -> int:
    """Serve until interrupted; the exit status of the server.

    Interrupts reach the server too, being in the same process group: it stops by itself.

    Raises:
        StartFailed: the address is taken, or none of this machine's.
    """
    _check_free(host, port)
    with (
        _environment(grpc_port) as environment,
        subprocess.Popen(
            command(host, port), cwd=ROOT, env=environment, preexec_fn=_end_with(os.getpid())
        ) as server,
    ):
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        while True:
            try:
                status = server.wait()
                return 0 if status in (0, -signal.SIGTERM, -signal.SIGINT) else status
            except KeyboardInterrupt:
                continue


@contextmanager
def local_server(notify: Callable[[str], None]) -> Iterator[str]:
    """Start a server on a free port, yield its address when it is ready, stop it after.

    Args:
        notify: is told, in a line, what takes time.

    Raises:
        StartFailed: it ended, or was not ready in time; with the end of its log.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    notify("No server is running: starting one for this call (`philharmonics serve` keeps one).")
    with tempfile.TemporaryFile("w+") as log, _environment(grpc_port=0) as environment:
        server = subprocess.Popen(
            command("127.0.0.1", port),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with(os.getpid()),
        )
        # A call that is told to end must end its server too.
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            _await_ready(server, url, log)
            yield url
        finally:
            signal.signal(signal.SIGTERM, previous)
            _stop(server)


@contextmanager
def _environment(grpc_port: int) -> Iterator[dict[str, str]]:
    """With a port for gRPC, 0 for none, a log for people, and a BentoML home of its own.

    BentoML empties the metrics folder in its home at every start, another server's too.
    """
    with tempfile.TemporaryDirectory(prefix="philharmonics-", ignore_cleanup_errors=True) as home:
        yield {
            "PHILHARMONICS_LOG": "text",
            **os.environ,
            "BENTOML_HOME": home,
            "BENTOML_DO_NOT_TRACK": "True",
            "PHILHARMONICS_GRPC_PORT": str(grpc_port),
        }


def _await_ready(server: subprocess.Popen[bytes], url: str, log: TextIO) -> None:
    until_s = time.monotonic() + START_S
    with Client(url) as client:
        while not client.is_ready():
            if server.poll() is not None:
                raise StartFailed(
                    f"The server ended with status {server.returncode}:\n{_tail(log)}"
                )
            if time.monotonic() > until_s:
                raise StartFailed(f"The server was not ready after {START_S:.0f} s:\n{_tail(log)}")
            time.sleep(0.2)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ask it to end; make it end if it does not. Its whole session, so that no runner is left."""
    if server.poll() is None:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end_with(parent: int) -> Callable[[], None]:
    """Run in a new process, has it killed when its parent ends without ending it.

    Killed, because BentoML loses a signal that comes while it starts its workers.
    """
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)

    return ask


def _check_free(host: str, port: int) -> None:
    """Say in a line what BentoML would say in fifty."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(
                f"Nothing can be served at {host}:{port}: {error.strerror}. Stop what listens "
                "there, or choose another --port."
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: TextIO) -> str:
    log.seek(0)
    return "".join(log.readlines()[-LOG_LINES:]).rstrip()
