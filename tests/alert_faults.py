"""Alerts fire on faults of real processes: `make alert-faults`, with a Prometheus of its own.

Time runs 60 times as fast for the rules: every duration in them, and every number of seconds, is
divided by 60. What is broken is real: servers are killed, files damaged, calls left.

Not provoked here: MemoryGrows (its rule looks back over hours), GpuMemoryFull, and ModelsDiffer (a
runner does not start on a file that is not the manifest's); promtool tests their rules.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from tritonclient.utils import InferenceServerException

from remix.stages import STAGES
from remix_v1 import remix_pb2 as messages
from tests.conftest import CRASH_SEED, ROOT, SLOW_SEED, ServerProcess, free_ports, serving
from tests.grpc_caller import calling, collect, upload
from tests.test_http_api import wav
from tests.toy_runner import free_address, toy_runner

MODEL = "musescore-general"

TRACKS = ("piano", "bass", "guitar", "strings")

FASTER = 60

IN_SECONDS = {"LongQueue", "QueueStandsStill", "LateSound", "JobsWait"}
"""Alerts whose limit is a number of seconds."""

FIRES_S = 90.0


def faster(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule for a time that runs faster."""

    def shorten(found: re.Match[str]) -> str:
        seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
        return f"{round(1000 * seconds / FASTER)}ms"

    expression = re.sub(r"\b(\d+)([smh])\b", shorten, rule["expr"])
    if rule["alert"] in IN_SECONDS:
        expression = re.sub(
            r"> (\d+)", lambda found: f"> {int(found[1]) / FASTER}", expression, count=1
        )
    made = {**rule, "expr": expression}
    if "for" in rule:
        made["for"] = re.sub(r"(\d+)([smh])", shorten, rule["for"])
    return made


@dataclass(frozen=True)
class Servers:
    """A composer with one real runner, a composer that computes nothing, and their Prometheus."""

    composer: ServerProcess
    runner: ServerProcess
    runner_address: str
    fake: ServerProcess
    prometheus: str

    def firing(self) -> set[str]:
        """Alerts that fire now."""
        found = httpx.get(f"{self.prometheus}/api/v1/alerts", timeout=10.0).json()
        return {
            alert["labels"]["alertname"]
            for alert in found["data"]["alerts"]
            if alert["state"] == "firing"
        }

    def await_firing(self, *alerts: str) -> None:
        """Return when all of these have fired."""
        left, until_s = set(alerts), time.monotonic() + FIRES_S
        while left := left - self.firing():
            assert time.monotonic() < until_s, f"{left} did not fire"
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, urls: dict[str, str]) -> Iterator[str]:
    """A Prometheus that looks at these twice a second."""
    program = shutil.which("prometheus") or ROOT / ".cache/debian/prometheus/usr/bin/prometheus"
    assert Path(program).exists(), "there is no Prometheus: `make alert-faults` fetches it"
    rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
    for group in rules["groups"]:
        group["interval"] = "500ms"
        group["rules"] = [faster(rule) for rule in group["rules"]]
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules))
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [url.removeprefix("http://")]}],
            }
            for job, url in urls.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    command = [
        program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + 60.0
        try:
            while not is_ready(url):
                assert time.monotonic() < until_s and process.poll() is None
                time.sleep(0.1)
            yield url
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    """Whether a Prometheus answers."""
    try:
        return httpx.get(f"{url}/-/ready", timeout=10.0).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    bento = [sys.executable, "-m", "bentoml", "serve"]
    folder = tmp_path_factory.mktemp
    with ExitStack() as stack:
        runner_address, toy_address = free_address(), free_address()
        stack.enter_context(toy_runner(toy_address))
        runner = stack.enter_context(
            serving(
                [*bento, "runners.synthesize_audio:SynthesizeAudio"],
                folder("runner"),
                240.0,
                {"PHILHARMONICS_LISTEN": runner_address},
            )
        )
        addresses = dict.fromkeys(STAGES, toy_address) | {"synthesize_audio": runner_address}
        composer = stack.enter_context(
            serving(
                [*bento, "service:Remix"],
                folder("composer"),
                240.0,
                {
                    f"PHILHARMONICS_RUNNER_{stage.upper()}": address
                    for stage, address in addresses.items()
                },
            )
        )
        fake = stack.enter_context(serving([*bento, "tests.fakes:FakeRemix"], folder("f"), 60.0))
        urls = {"composer": composer.url, "runners": runner.url, "fake": fake.url}
        url = stack.enter_context(prometheus(folder("prometheus"), urls))
        yield Servers(composer, runner, runner_address, fake, url)


# --- faults of callers' requests ------------------------------------------------------------------


@contextmanager
def repeated(action: Any) -> Iterator[None]:
    """Do something again and again, until the block ends."""
    has_ended = threading.Event()

    def repeat() -> None:
        while not has_ended.is_set():
            action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def test_nothing_fires_while_all_is_well(servers: Servers) -> None:
    until_s = time.monotonic() + 5.0
    while time.monotonic() < until_s:
        assert servers.firing() == set()
        time.sleep(0.5)


def test_requests_that_crash_and_remixes_that_are_slow(servers: Servers) -> None:
    song = {"song": ("song.wav", wav())}

    def ask() -> None:
        """One that crashes, and one of a song of 0.5 s that takes a second."""
        for seed, status in ((CRASH_SEED, 500), (1, 200)):
            answer = httpx.post(
                f"{servers.fake.url}/v1/remix",
                files=song,
                data={"options": f'{{"seed": {seed}}}'},
                timeout=60.0,
            )
            assert answer.status_code == status
        with calling(servers.fake.grpc_address) as stub, suppress(grpc.RpcError):
            options = messages.RemixOptions(seed=CRASH_SEED)
            head = messages.RemixHead(options=options)
            collect(stub.Remix(upload(messages.RemixRequest, head, wav()), timeout=60.0))

    with repeated(ask):
        servers.await_firing("ServerErrors", "CallsFail", "SlowRemixes")


def test_jobs_that_fail_wait_and_are_refused(servers: Servers) -> None:
    url = f"{servers.fake.url}/v1/jobs"
    songs = [wav(0.5 + 0.01 * index) for index in range(10)]

    def submit(seed: int, song: bytes = songs[0]) -> httpx.Response:
        options = {"options": f'{{"seed": {seed}}}'}
        return httpx.post(url, files={"song": song}, data=options, timeout=60.0)

    for _ in range(3):
        submit(CRASH_SEED)
    servers.await_firing("JobsFail")
    for song in songs:  # two at once, a second each: the later ones wait for longer than one
        submit(1, song)
    servers.await_firing("LateSound")
    running = [submit(SLOW_SEED + index).json()["id"] for index in range(3)]
    with repeated(lambda: submit(1)):
        servers.await_firing("JobsWait", "ManyRefused")
    for job in running:
        httpx.delete(f"{url}/{job}", timeout=60.0)


# --- faults of a runner ---------------------------------------------------------------------------


def window(servers: Servers, reach_s: float, program: int = 0, timeout_s: float = 60.0) -> None:
    """Have a note played that began `reach_s` before its window; what lies between is computed."""
    notes, programs = (
        triton.InferInput("notes", [1, 1, 4], "FP32"),
        triton.InferInput("program", [1, 1], "INT64"),
    )
    notes.set_data_from_numpy(np.array([[[-reach_s, reach_s + 1.0, 60, 90]]], np.float32))
    programs.set_data_from_numpy(np.array([[program]], np.int64))
    with (
        triton.InferenceServerClient(servers.runner_address) as client,
        suppress(InferenceServerException),
    ):
        client.infer(MODEL, [notes, programs], client_timeout=timeout_s)


def test_windows_that_fail(servers: Servers) -> None:
    for _ in range(8):
        window(servers, 0.0, program=999)
    servers.await_firing("ModelFails")


def test_windows_that_take_long(servers: Servers) -> None:
    with ThreadPoolExecutor(12) as callers:
        for _ in range(12):
            callers.submit(window, servers, 590.0)
        servers.await_firing("QueueStandsStill", "LongQueue")


def test_callers_who_leave(servers: Servers) -> None:
    with repeated(lambda: window(servers, 590.0, timeout_s=0.5)):
        servers.await_firing("ComputeWasted")


# --- faults of the cache, and of processes --------------------------------------------------------


def synthesize(servers: Servers, pitch: int, notes: int = 4) -> httpx.Response:
    """Have something played by the composer and its runner."""
    track = [
        {"onset_s": 0.5 * index, "duration_s": 0.5, "pitch": pitch, "velocity": 80}
        for index in range(notes)
    ]
    return httpx.post(
        f"{servers.composer.url}/v1/synthesize",
        files={"notes": ("notes.json", json.dumps({"tracks": dict.fromkeys(TRACKS, track)}))},
        timeout=120.0,
    )


def test_cache_that_is_damaged_and_one_that_cannot_write(servers: Servers) -> None:
    assert synthesize(servers, 60).status_code == 200
    cache = servers.composer.temp_dir.parent / "data/cache"
    until_s = time.monotonic() + 60.0
    while not (entries := [path for path in cache.rglob("*") if path.is_file()]):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    for entry in entries:
        entry.write_bytes(b"not what was written")
    assert synthesize(servers, 60).status_code == 200
    servers.await_firing("CacheDamaged")
    shutil.rmtree(cache)
    cache.write_bytes(b"in the way")
    assert synthesize(servers, 61).status_code == 200
    servers.await_firing("CacheCannotWrite")
    cache.unlink()


def test_runner_that_is_killed_at_work(servers: Servers) -> None:
    with ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(synthesize, servers, 30 + index, 400) for index in range(8)]
        until_s = time.monotonic() + 60.0
        while (
            'philharmonics_computing_windows{model="musescore-general"} 2.0'
            not in httpx.get(f"{servers.runner.url}/metrics", timeout=10.0).text
        ):
            assert time.monotonic() < until_s
        for pid in servers.runner.pids():
            os.kill(pid, signal.SIGKILL)
        servers.await_firing("RunnersLost", "StageAway", "ServerDown")
        for pid in servers.composer.pids():  # its calls would wait for the runner
            os.kill(pid, signal.SIGKILL)
        for call in calls:
            with suppress(httpx.TransportError):
                call.result()
