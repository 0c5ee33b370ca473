"""No port of ours takes pickle: a harmless one is sent to every port, and must not run."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.conftest import ServerProcess, serving

PICKLE = "application/vnd.bentoml+pickle"
LISTENING = "0A"
"""State of a listening socket in /proc/net/tcp."""

PATHS = ["/", "/livez", "/metrics", "/infer", "/schema.json", "/v1/remix", "/v1/voices", "/nothing"]


class CreatesFile:
    """What it carries: unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._path), "w")


def ports(server: ServerProcess) -> set[int]:
    """TCP ports on which any process of the server listens."""
    inodes = set()
    for pid in server.pids():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                found.add(int(fields[1].rsplit(":", 1)[1], 16))
    return found


def check(server: ServerProcess, folder: Path) -> set[int]:
    """Send the pickle to every path of every port; the ports that speak HTTP."""
    canary = folder / "it ran"
    payload = pickle.dumps(CreatesFile(canary))
    headers = {"Content-Type": f"{PICKLE}; x=1", "Payload-Container": "NdarrayContainer"}
    speak_http = set()
    for port in ports(server):
        address = f"http://127.0.0.1:{port}"
        try:
            httpx.get(address, timeout=2.0)
        except httpx.TransportError:
            # gRPC, or the control socket of BentoML's supervisor (ZeroMQ, JSON): send it anyway.
            with suppress(httpx.TransportError):
                httpx.post(address, content=payload, headers=headers, timeout=0.5)
            continue
        speak_http.add(port)
        for path in PATHS:
            answer = httpx.post(address + path, content=payload, headers=headers)
            assert answer.status_code == 415, f"{port}{path}: {answer.text}"
            assert answer.headers["content-type"] == "application/problem+json"
    assert not canary.exists()
    return speak_http


def test_payload_would_run_where_it_is_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "it ran"
    pickle.loads(pickle.dumps(CreatesFile(canary))).close()
    assert canary.exists()


def test_http_face_refuses_pickle_on_every_route(
    fake_server: ServerProcess, tmp_path: Path
) -> None:
    assert check(fake_server, tmp_path) == {httpx.URL(fake_server.url).port}


@pytest.mark.slow
def test_composer_and_runners_refuse_pickle_on_every_port(
    server: ServerProcess, tmp_path: Path
) -> None:
    assert httpx.URL(server.url).port in check(server, tmp_path)


@pytest.mark.slow
def test_runner_that_is_started_alone_refuses_pickle(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "runners.transcribe_notes:TranscribeNotes"]
    with serving(command, tmp_path_factory.mktemp("runner"), ready_s=120.0) as runner:
        assert httpx.URL(runner.url).port in check(runner, tmp_path)
