"""docker/compose.yaml as its users run it: up, remixed with, attacked, stopped.

`make compose-test` runs this.
It needs an engine with Compose, the images (`make images`), and root, to kill a process by its
number. Where a registry is out of reach, PostgreSQL and Prometheus are made of Debian's packages
(docker/stand_ins). The tests share one stack, and go from the gentle to the rough.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from export.demo_song import write_demo_song
from remix.stages import STAGES
from remix_v1 import remix_pb2 as messages
from tests.conftest import free_ports, serving
from tests.grpc_caller import calling, collect, upload

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docker/compose.yaml"
STAND_INS = {"postgres:15-bookworm": "postgres", "prom/prometheus:v2.53.5": "prometheus"}
OPTIONS = {"seed": 7}

HEALTHY_S = 60.0
"""In which the whole stack is healthy, images and models being there, on a machine that has nothing
else to do; on a busy one, as many times as long as it has more to do than cores."""

JOBS_S = 300.0
"""In which a few jobs end, whatever happens to them."""

GRACE_S = 60.0 + 45.0
"""`stop_grace_period` of the composer and then of the runners."""

RIPPLE = 2.0 / 32768
"""Two steps of 16 bits: what other threads' order of summing may change, and no more."""


READ_METRICS = (
    "import urllib.request as u; print(u.urlopen('http://127.0.0.1:3000/metrics').read().decode())"
)


def docker(*arguments: str, check: bool = True) -> str:
    """What the engine's command says."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"docker {arguments}: {done.stderr[-2000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Stack:
    """A project of compose.

    Args:
        project: its name.
        profile: what of the file it runs.
        environment: for the file's variables.
        url: where it listens.
        grpc_address: where for gRPC.
    """

    project: str
    profile: str
    environment: dict[str, str]
    url: str
    grpc_address: str

    def compose(self, *arguments: str) -> str:
        """`docker compose` with these."""
        command = ["docker", "compose", "-p", self.project, "-f", str(COMPOSE)]
        done = subprocess.run(
            [*command, "--profile", self.profile, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.environment},
        )
        assert done.returncode == 0, f"compose {arguments}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    def up(self, *arguments: str) -> None:
        """Start what does not run; wait until all is healthy."""
        self.compose("up", "--no-build", "--wait", *arguments)

    def containers(self, service: str = "") -> list[str]:
        """Ids of those that run."""
        return self.compose("ps", "-q", *filter(None, [service])).split()

    def facts(self, service: str = "") -> list[dict[str, Any]]:
        """What the engine knows of them."""
        facts: list[dict[str, Any]] = json.loads(docker("inspect", *self.containers(service)))
        return facts

    def python(self, container: str, code: str) -> str:
        """What a script prints in a container."""
        return docker("exec", container, "python", "-c", code)

    def metrics(self, container: str) -> str:
        """A server's metrics, read from within."""
        return self.python(container, READ_METRICS)


def new_stack(project: str, profile: str) -> Stack:
    http_port, grpc_port = free_ports(2)
    environment = {
        "PHILHARMONICS_HTTP_PORT": str(http_port),
        "PHILHARMONICS_GRPC_PORT": str(grpc_port),
        "COMPOSE_PROFILES": profile,
    }
    url, address = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
    return Stack(project, profile, environment, url, address)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Images and models are there, nothing runs yet."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("No engine answers: `docker info` says why.")
    for image, target in STAND_INS.items():
        if (
            not docker("images", "-q", image)
            and subprocess.run(
                ["docker", "pull", "-q", image], capture_output=True, check=False
            ).returncode
        ):
            stand_ins = str(COMPOSE.parent / "stand_ins")
            docker("build", "-q", "-t", image, "--target", target, stand_ins)
    stack = new_stack("philharmonics-test", "cpu")
    stack.compose("up", "--no-build", "models")
    try:
        yield stack
    finally:
        stack.compose("down", "--timeout", "5")
        for volume in ("data", "database", "metrics"):  # the models stay for the next time
            docker("volume", "rm", f"{stack.project}_{volume}", check=False)


@pytest.fixture(scope="module")
def song() -> bytes:
    path = ROOT / ".cache/demo_song.mp3"
    write_demo_song(path, ROOT / ".cache/sources")
    return path.read_bytes()


@pytest.fixture(scope="module")
def outside(song: bytes, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """The remix that a server makes that runs in no container."""
    command = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
    with serving(command, tmp_path_factory.mktemp("outside"), ready_s=240.0) as server:
        return sound(post_remix(server.url, song))


def post_remix(url: str, song: bytes) -> bytes:
    form = {"options": json.dumps(OPTIONS)}
    answer = httpx.post(
        f"{url}/v1/remix", files={"song": ("song", song)}, data=form, timeout=JOBS_S
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def sound(data: bytes) -> NDArray[np.float32]:
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return np.asarray(samples, np.float32)


def songs(song: bytes, count: int, first: int) -> Iterator[bytes]:
    """The song from another beginning each: no window of it is in the cache."""
    samples, rate_hz = soundfile.read(io.BytesIO(song), dtype="float32", always_2d=True)
    for index in range(first, first + count):
        file = io.BytesIO()
        turned = np.roll(samples, 977 * (index + 1), axis=0)
        soundfile.write(file, np.concatenate([turned, turned, turned]), rate_hz, format="WAV")
        yield file.getvalue()


def submit(stack: Stack, song: bytes) -> str:
    answer = httpx.post(f"{stack.url}/v1/jobs", files={"song": ("song.wav", song)}, timeout=60.0)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def state_of(stack: Stack, job: str) -> str:
    try:
        answer = httpx.get(f"{stack.url}/v1/jobs/{job}", timeout=30.0)
    except httpx.TransportError as error:  # the composer is away
        return repr(error)
    return str(answer.json().get("state", answer.text))


def await_that(what: str, is_so: Callable[[], bool], limit_s: float = JOBS_S) -> None:
    until_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < until_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.2)


def await_done(stack: Stack, jobs: Sequence[str]) -> None:
    ended = {"done", "failed", "cancelled"}
    await_that("jobs end", lambda: all(state_of(stack, job) in ended for job in jobs))
    assert [state_of(stack, job) for job in jobs] == ["done"] * len(jobs)


def first_pid(stack: Stack, service: str) -> int:
    return int(stack.facts(service)[0]["State"]["Pid"])


def megabytes(usage: str) -> int:
    """`docker stats` -> MiB: 1.037GiB / 2GiB."""
    number, unit = re.match(r"([0-9.]+)([KMG])iB", usage).groups()  # type: ignore[union-attr]
    return int(float(number) * {"K": 1 / 1024, "M": 1, "G": 1024}[unit])


def worker_pids(container: str) -> set[str]:
    """Of the processes in a container, less its init and the server, by the machine's numbers."""
    rows = docker("top", container, "-eo", "pid,ppid,args").splitlines()[1:]
    first = str(json.loads(docker("inspect", container))[0]["State"]["Pid"])
    return {row.split()[0] for row in rows if first not in row.split()[:2]}


def test_whole_stack_is_healthy_within_a_minute(stack: Stack) -> None:
    limit_s = HEALTHY_S * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    begin_s = time.monotonic()
    stack.up()
    took_s = time.monotonic() - begin_s
    print(f"healthy after {took_s:.1f} s, limit {limit_s:.0f} s")
    assert len(stack.containers()) == len(STAGES) + 3
    assert took_s < limit_s


def test_remix_through_the_published_ports_is_the_one_made_outside(
    stack: Stack, song: bytes, outside: NDArray[np.float32]
) -> None:
    over_http = sound(post_remix(stack.url, song))
    options = messages.RemixOptions(seed=OPTIONS["seed"])
    head = messages.RemixHead(options=options)
    with calling(stack.grpc_address) as stub:
        answer = collect(stub.Remix(upload(messages.RemixRequest, head, song), timeout=JOBS_S))
    over_grpc = sound(answer.files["remix.wav"])
    assert over_http.shape == outside.shape
    np.testing.assert_array_equal(over_grpc, over_http)
    print(f"largest difference to the one outside: {np.abs(over_http - outside).max():g}")
    assert np.abs(over_http - outside).max() <= RIPPLE


def test_no_container_is_root_or_can_write_its_root(stack: Stack) -> None:
    for facts in stack.facts():
        name, host = facts["Name"], facts["HostConfig"]
        assert facts["Config"]["User"] not in ("", "root", "0", "0:0"), name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert host["Memory"] > 0, name
        assert host["PidsLimit"] > 0, name
        status = Path(f"/proc/{facts['State']['Pid']}/status").read_text()
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert "0" not in lines["Uid"].split(), name
        assert int(lines["CapEff"], 16) == int(lines["CapBnd"], 16) == 0, name
        assert lines["NoNewPrivs"] == "1", name
    for service in ("composer", *STAGES):
        container = stack.containers(service)[0]
        write = "try: open('{}/x', 'w'); print('written')\nexcept OSError as e: print(e.errno)"
        assert stack.python(container, write.format("/app")) == "30", service  # EROFS
        assert stack.python(container, write.format("/models")) == "30", service


def test_nothing_but_the_composers_ports_is_reachable(stack: Stack) -> None:
    published = {
        facts["Config"]["Labels"]["com.docker.compose.service"]: facts["NetworkSettings"]["Ports"]
        for facts in stack.facts()
        if any((facts["NetworkSettings"]["Ports"] or {}).values())
    }
    assert list(published) == ["composer"]
    assert {b["HostIp"] for bindings in published["composer"].values() for b in bindings} == {
        "127.0.0.1"
    }
    addresses = [
        network["IPAddress"]
        for facts in stack.facts()
        for network in facts["NetworkSettings"]["Networks"].values()
    ]
    probe = (
        "import socket,sys\n"
        "for host in sys.argv[1].split():\n"
        "    for port in (3000, 3001, 4001, 5432, 9090):\n"
        "        try: socket.create_connection((host, port), 0.3); print(host, port)\n"
        "        except OSError: pass"
    )
    stranger = ("run", "--rm", "philharmonics/runner", "python", "-c", probe)
    assert docker(*stranger, " ".join(addresses)) == ""
    for stage in STAGES:  # and they reach nobody outside
        call = (
            "import socket\ntry: socket.create_connection(('192.0.2.1', 443), 2)\n"
            "except OSError: print('no way')"
        )
        assert stack.python(stack.containers(stage)[0], call) == "no way", stage


def test_prometheus_has_every_target_and_every_rule(stack: Stack) -> None:
    def ask(path: str) -> Any:
        read = f"import urllib.request as u; print(u.urlopen('http://prometheus:9090{path}').read().decode())"
        return json.loads(stack.python(stack.containers("composer")[0], read))["data"]

    def up() -> dict[str, str]:
        found = ask("/api/v1/targets?state=active")["activeTargets"]
        return {target["scrapeUrl"]: target["health"] for target in found}

    await_that(
        "every target is up",
        lambda: len(up()) == len(STAGES) + 2 and set(up().values()) == {"up"},
        60.0,
    )
    rules = {
        rule["name"]: rule["health"]
        for group in ask("/api/v1/rules")["groups"]
        for rule in group["rules"]
    }
    alerts = (COMPOSE.parent / "prometheus/alerts.yml").read_text()
    assert len(rules) == alerts.count("- alert:")
    await_that(
        "rules are evaluated",
        lambda: all(
            rule["health"] == "ok"
            for group in ask("/api/v1/rules")["groups"]
            for rule in group["rules"]
        ),
        60.0,
    )


def test_memory_limit_restarts_one_runner_and_its_job_ends_well(stack: Stack, song: bytes) -> None:
    runner = stack.containers("separate_stems")[0]
    others = {
        facts["Id"]: facts["State"]["Pid"] for facts in stack.facts() if facts["Id"] != runner
    }
    limit = json.loads(docker("inspect", runner))[0]["HostConfig"]["Memory"]
    workers = worker_pids(runner)
    used_mb = megabytes(docker("stats", "--no-stream", "--format", "{{.MemUsage}}", runner))
    tight = f"{used_mb + 20}m"  # a window takes more than this
    docker("update", "--memory", tight, "--memory-swap", tight, runner)
    try:
        job = submit(stack, next(songs(song, 1, 50)))
        await_that("its worker is killed", lambda: not workers & worker_pids(runner), 120.0)
    finally:
        docker("update", "--memory", str(limit), "--memory-swap", str(limit), runner)
    await_done(stack, [job])
    assert others == {f["Id"]: f["State"]["Pid"] for f in stack.facts() if f["Id"] != runner}


def test_killed_runner_loses_no_job(stack: Stack, song: bytes) -> None:
    jobs = [submit(stack, each) for each in songs(song, 4, 0)]
    await_that("one is at work", lambda: "running" in {state_of(stack, job) for job in jobs}, 60.0)
    pid = first_pid(stack, "separate_stems")
    os.kill(pid, signal.SIGKILL)
    await_done(stack, jobs)
    assert first_pid(stack, "separate_stems") != pid  # somebody else has done the rest


def test_stop_within_the_grace_finishes_or_parks_what_is_in_flight(
    stack: Stack, song: bytes
) -> None:
    jobs = [submit(stack, each) for each in songs(song, 4, 10)]
    await_that("one is at work", lambda: "running" in {state_of(stack, job) for job in jobs}, 60.0)
    ids = {
        facts["Id"]: facts["Config"]["Labels"]["com.docker.compose.service"]
        for facts in stack.facts()
    }
    begin_s = time.monotonic()
    stack.compose("stop")
    print(f"stopped after {time.monotonic() - begin_s:.1f} s")
    assert time.monotonic() - begin_s < GRACE_S
    states = {ids[facts["Id"]]: facts["State"] for facts in json.loads(docker("inspect", *ids))}
    assert {name: state["ExitCode"] for name, state in states.items()} == dict.fromkeys(states, 0)
    for stage in STAGES:
        assert states["composer"]["FinishedAt"] < states[stage]["FinishedAt"], stage
    stack.up()
    await_done(stack, jobs)


def test_both_replicas_of_a_runner_work(stack: Stack, song: bytes) -> None:
    stack.up()  # while it runs, one more
    stack.up("--scale", "separate_stems=2")
    replicas = stack.containers("separate_stems")
    assert len(replicas) == 2

    def counts() -> list[bool]:
        line = 'philharmonics_requests_total{model="spleeter-2stems",outcome="done"}'
        return [line in stack.metrics(replica) for replica in replicas]

    numbers = iter(range(100, 1000))
    # A composer hears of a new replica when a connection is closed for its age.
    await_that(
        "both have computed",
        lambda: post_remix(stack.url, next(songs(song, 1, next(numbers)))) != b"" and all(counts()),
    )


def test_other_models_need_no_other_image(stack: Stack, tmp_path: Path) -> None:
    text = (ROOT / "models.toml").read_text()
    manifest = tmp_path / "models.toml"
    manifest.write_text(text.replace("band-transformer-2m", "band-next"))
    manifest.chmod(0o644)
    volume = ("-v", f"{stack.project}_models:/models")
    mounts = (*volume, "-v", f"{manifest}:/app/models.toml:ro")
    remove = (*volume, "philharmonics/exporter", "rm", "-rf", "/models/next", "/models/back")
    docker("run", "--rm", *remove)
    docker("run", "--rm", *mounts, "-e", "FOLDER=next", "philharmonics/exporter")
    # The way back fetches nothing: what the one before has is taken.
    back = (*volume, "--network", "none", "-e", "FOLDER=back", "philharmonics/exporter")
    docker("run", "--rm", *back)
    runner = docker(
        *("run", "-d", *mounts, "-e", "PHILHARMONICS_MODELS=/models/next", "philharmonics/runner"),
        *("bentoml", "serve", "runners.generate_notes:GenerateNotes", "--port", "3000"),
    )
    try:
        ask = ("exec", runner, "python", "-c", READ_METRICS)
        await_that("it serves them", lambda: 'model="band-next"' in docker(*ask, check=False), 60.0)
    finally:
        docker("rm", "-f", runner)
        docker("run", "--rm", *remove)


def test_small_is_the_same_in_one_container(stack: Stack, song: bytes) -> None:
    over_http = sound(post_remix(stack.url, song))
    stack.compose("down", "--timeout", "60")
    small = new_stack(stack.project, "small")
    try:
        small.up()
        assert len(small.containers()) == 1
        np.testing.assert_array_equal(sound(post_remix(small.url, song)), over_http)
    finally:
        small.compose("down", "--timeout", "60")
