"""The whole service as processes: killed, started again, told to stop while it is at work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from remix.stages import STAGES
from runners.processes import end_hung
from telemetry.exposition import FILE_BYTES, FILES
from tests.conftest import ROOT, ServerProcess, serving
from tests.test_remix_service import short_song, song

__all__ = ["short_song", "song"]  # fixtures

SERVE = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]

SOON_S = 60.0
"""For what takes seconds on a machine that is not busy."""


@pytest.fixture(scope="module")
def runtime_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one server after the other has its sockets."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def service(runtime_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("processes")
    environment = {"PHILHARMONICS_RUNTIME_DIR": str(runtime_dir), "PHILHARMONICS_CACHE_BYTES": "0"}
    with serving(SERVE, folder, 240.0, environment) as running:
        yield running


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def await_port(port: int | None, within_s: float) -> None:
    """Until it is free: a process' sockets go with its last thread, after it looks dead."""
    until_s = time.monotonic() + within_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                assert time.monotonic() < until_s, f"port {port} is still taken"
            else:
                return
        time.sleep(0.05)


def await_end(pids: list[int], within_s: float) -> None:
    until_s = time.monotonic() + within_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < until_s, f"{left} are still there"
        time.sleep(0.05)


def runner_of(server: ServerProcess, name: str) -> int:
    """The process that serves a stage."""
    for pid in server.pids():
        with suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return pid
    raise AssertionError(f"There is no runner {name}.")


def remix(url: str, data: bytes) -> httpx.Response:
    return httpx.post(f"{url}/v1/remix", files={"song": ("song.wav", data)}, timeout=300.0)


def test_hung_runner_is_killed_and_nobody_who_has_its_number_later(tmp_path: Path) -> None:
    runner = (
        "import pathlib, sys, time; from runners.processes import be_known; "
        "known = be_known(pathlib.Path(sys.argv[1]), 'toy'); print('known', flush=True); "
        "time.sleep(1e6)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", runner, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"known\n"
        process.send_signal(signal.SIGSTOP)
        assert end_hung(tmp_path, "toy")
        assert process.wait(SOON_S) == -signal.SIGKILL
    (tmp_path / "toy.pid").write_text(str(os.getpid()))  # not held: of one that has gone
    assert not end_hung(tmp_path, "toy")
    assert not end_hung(tmp_path, "another")


@pytest.mark.parametrize("module", ["service", *(f"runners.{stage}" for stage in STAGES)])
def test_metrics_have_room_before_the_disk_is_full(module: str, tmp_path: Path) -> None:
    process = f"import {module}; from http_api.observed import HTTP_SECONDS as seconds\n"
    process += "for n in range(100): seconds.labels('GET', f'/v1/route/{n}', '200').observe(1)"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", process], cwd=ROOT, env=environment, check=True)
    files = [path.stat() for path in tmp_path.glob("*.db")]
    assert len(files) == len(FILES)
    for file in files:
        assert file.st_size == FILE_BYTES  # none was there before, none has grown
        assert file.st_blocks * 512 >= file.st_size


@pytest.mark.slow
def test_nothing_outlives_the_first_process_that_is_killed(
    runtime_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = {"PHILHARMONICS_RUNTIME_DIR": str(runtime_dir)}
    folder = tmp_path_factory.mktemp("first")  # the path of a socket must be short
    with serving(SERVE, folder, 240.0, environment) as server:
        pids = server.pids()
        assert len(pids) >= 7  # it, the composer, five runners
        os.kill(server.pid, signal.SIGKILL)
        await_end(pids, 10.0)
        await_port(urlsplit(server.url).port, 10.0)  # its successor can have it
    assert list(runtime_dir.iterdir()) != []  # what it left; see the next test


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 6])
def test_signal_that_comes_while_workers_are_started_is_heeded(
    workers: int, runtime_dir: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "BENTOML_HOME": str(tmp_path),
        "PHILHARMONICS_GRPC_PORT": "0",
        "PHILHARMONICS_RUNTIME_DIR": str(runtime_dir),
        "PHILHARMONICS_DATA_DIR": str(tmp_path),
    }
    with subprocess.Popen([*SERVE, "--port", str(port), "--host", "127.0.0.1"], cwd=ROOT,
                          env=environment, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        try:
            server = ServerProcess("", process.pid, tmp_path, "")
            until_s = time.monotonic() + 2 * SOON_S
            while len(server.pids()) < 1 + workers:  # it and so many
                assert process.poll() is None
                assert time.monotonic() < until_s
            process.terminate()
            assert process.wait(SOON_S) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_remix_outlives_a_runner_that_is_killed_and_is_the_same(
    service: ServerProcess, runtime_dir: Path, short_song: bytes
) -> None:
    assert len(list(runtime_dir.iterdir())) == 1, "what a killed server left is swept"
    undisturbed = remix(service.url, short_song)
    assert undisturbed.status_code == 200, undisturbed.text
    killed = runner_of(service, "SeparateStems")
    os.kill(killed, signal.SIGKILL)
    disturbed = remix(service.url, short_song)
    assert disturbed.status_code == 200, disturbed.text
    assert disturbed.content == undisturbed.content
    assert runner_of(service, "SeparateStems") != killed


@pytest.mark.slow
def test_stopping_ends_what_is_inside_and_refuses_what_comes(
    service: ServerProcess, runtime_dir: Path, short_song: bytes
) -> None:
    pids = service.pids()
    with ThreadPoolExecutor(2) as threads:
        inside = [threads.submit(remix, service.url, short_song) for _ in range(2)]
        until_s = time.monotonic() + SOON_S
        while len(service.pids()) < len(pids) + 2:  # both songs are being decoded
            assert time.monotonic() < until_s
        os.kill(service.pid, signal.SIGTERM)
        late: list[httpx.Response] = []
        with suppress(httpx.TransportError):  # how it ends: the port is closed
            while time.monotonic() < until_s:
                late.append(remix(service.url, b""))
        assert [call.result().status_code for call in inside] == [200, 200]
    late = list(dropwhile(lambda answer: answer.status_code != 503, late))  # it takes its time
    assert late
    for answer in late:
        assert answer.status_code == 503
        assert answer.headers["connection"] == "close"
        assert answer.json()["value"] == "stopping"
    ended = os.waitid(os.P_PID, service.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
    await_end(pids, 1.0)
    assert list(runtime_dir.iterdir()) == []


def test_serve_where_somebody_listens_is_a_line_and_an_exit_code() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "client.command", "serve", "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr


@pytest.mark.slow
def test_server_ends_with_the_command_that_started_it() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*(sys.executable, "-m", "client.command", "serve"), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--grpc-port", "0"], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    server = ServerProcess(f"http://127.0.0.1:{port}", process.pid, ROOT, "")
    try:
        until_s = time.monotonic() + 2 * SOON_S
        while len(pids := server.pids()) < 8:  # it, BentoML's first process, six workers
            assert process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    await_end(pids, SOON_S)
