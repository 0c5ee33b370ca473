"""The load generator against a stand-in server: it sends on time, and hides nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from load_tests.figures import percentile
from load_tests.generator import (
    NOT_SENT,
    OK,
    TIMEOUT,
    Answer,
    Event,
    Run,
    Target,
    Work,
    closed_loop,
    open_loop,
)
from load_tests.grpc_target import GrpcTarget
from load_tests.http_targets import JobsTarget, RemixTarget, open_client
from load_tests.own_server import OwnServer
from load_tests.processes import faults, processes_of, watching
from load_tests.report import write
from load_tests.runner_target import RunnerTarget, inference, input_shapes, open_channel
from load_tests.runs import Load, Objective, server, summary
from load_tests.schedule import constant
from load_tests.songs import Recording
from load_tests.traffic import Songs
from load_tests.whole import Plan, whole
from tests.conftest import ROOT
from tests.load_stand_in import SLOW

SERVICE_S = 0.1

SONG = Work(30.0, b"song" * 50_000, "application/octet-stream")
WINDOW = inference("any", {"samples": np.zeros((1, 1600), np.float32)}, 0.1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    folder = tmp_path_factory.mktemp("stand_in")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in (one, two)]
    command = [sys.executable, "-m", "tests.load_stand_in", *ports]
    command += [str(folder / "separate_stems.sock"), str(SERVICE_S), "--service-name", "remix"]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        url, until_s = f"http://127.0.0.1:{ports[0]}", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until_s:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/readyz", trust_env=False)
                break
            time.sleep(0.05)
        yield OwnServer(url, f"127.0.0.1:{ports[1]}", process.pid, folder, 0.0)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(30)


def patience_s(audio_s: float) -> float:
    return 60.0


async def remix_run(url: str, rate_hz: float, for_s: float, events: tuple[Event, ...] = ()) -> Run:
    async with open_client(url) as client:
        target = RemixTarget(client, retries=False)
        plan = [(float(at_s), SONG) for at_s in constant(rate_hz, for_s)]
        return await open_loop(target, plan, in_flight=1000, patience_s=patience_s, events=events)


@pytest.mark.slow
def test_server_stopped_for_six_seconds_shows_in_p99_and_maximum(stand_in: OwnServer) -> None:
    """What a closed loop hides: it would have one slow request, of ten a second for 9 s."""
    run = asyncio.run(
        remix_run(stand_in.url, 10.0, 9.0, tuple(faults(stand_in.pid, "stop", 1.5, 6.0)))
    )
    latencies = [record.latency_s for record in run.records]
    assert [record.answer.status for record in run.records] == [OK] * 90
    # The first request that meets the stop waits for all of it, less up to a tenth of a second.
    assert max(latencies) > 5.8
    assert percentile(latencies, 99) > 5.6
    # Requests are due all the while: two thirds of all, with waits that fall from 6 s to 0.
    assert np.mean(np.array(latencies) > 0.5) > 0.55
    assert percentile(latencies, 50) > 1.5
    # It went on sending meanwhile: the stop is the server's, not the generator's.
    assert max(record.sent_s - record.intended_s for record in run.records if record.sent_s) < 1.0


class Sleeper:
    """Answers after a time, in this process."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self.cancelled = 0

    async def send(self, work: Work) -> Answer:
        try:
            await asyncio.sleep(self._service_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Answer(OK)


class Blocker:
    """Holds up the event loop, as a generator with too much to do would."""

    async def send(self, work: Work) -> Answer:
        time.sleep(0.02)
        return Answer(OK)


def run_plan(target: Target, times_s: list[float], in_flight: int, wait_s: float) -> Run:
    plan = [(at_s, SONG) for at_s in times_s]
    return asyncio.run(open_loop(target, plan, in_flight=in_flight, patience_s=lambda _: wait_s))


def test_request_beyond_the_cap_is_counted_and_no_other_is_late_for_it() -> None:
    run = run_plan(Sleeper(0.5), [0.0, 0.01, 0.02, 0.03], in_flight=3, wait_s=30.0)
    assert [record.answer.status for record in run.records] == [OK, OK, OK, NOT_SENT]
    assert run.records[3].sent_s is None
    assert len(run.lag.send_s) == 3


def test_request_without_answer_is_given_up_and_cancelled() -> None:
    sleeper = Sleeper(60.0)
    run = run_plan(sleeper, [0.0, 0.05], in_flight=9, wait_s=0.2)
    assert [record.answer.status for record in run.records] == [TIMEOUT, TIMEOUT]
    assert all(record.latency_s >= 0.2 for record in run.records)
    assert sleeper.cancelled == 2


def test_generator_that_is_late_says_that_its_run_is_invalid() -> None:
    run = run_plan(Blocker(), [0.0] * 5 + [0.01] * 5, in_flight=99, wait_s=30.0)
    assert not run.lag.is_valid
    assert max(run.lag.send_s) > 0.1  # the last of ten waits for nine blocks of 20 ms


def test_run_that_is_lost_stops_and_cancels_what_is_under_way() -> None:
    sleeper = Sleeper(60.0)

    async def run() -> tuple[int, bool]:
        result = await server(
            "run",
            sleeper,
            "remix",
            Load(50.0, 5.0, "constant", in_flight=5),
            iter(lambda: SONG, None),
            Objective(0.1, 0.0),
            stops_when_lost=True,
        )
        return len(result.records), bool(result.settings["stopped_early"])

    count, stopped = asyncio.run(run())
    assert stopped
    assert count < 250
    assert sleeper.cancelled > 0


def test_closed_loop_keeps_as_many_under_way_as_it_should() -> None:
    run = asyncio.run(
        closed_loop(Sleeper(0.05), [SONG] * 8, in_flight=4, for_s=60.0, patience_s=patience_s)
    )
    assert len(run.records) == 8
    begun = [record.intended_s for record in run.records]
    assert max(begun[:4]) < 0.05 <= min(begun[4:])


def test_remix_target_reads_the_answer_and_measures_its_first_byte(
    stand_in: OwnServer,
) -> None:
    run = asyncio.run(remix_run(stand_in.url, 50.0, 0.2))
    assert [record.answer.status for record in run.records] == [OK] * 10
    for record in run.records:
        assert record.answer.first_s is not None
        assert SERVICE_S <= record.answer.first_s <= record.latency_s


def test_remix_target_says_the_code_of_a_refusal_and_comes_back_if_it_may(
    stand_in: OwnServer,
) -> None:
    async def run(retries: bool) -> Run:
        async with open_client(f"{stand_in.url}/full") as client:
            target = RemixTarget(client, retries=retries)
            return await open_loop(target, [(0.0, SONG)], in_flight=9, patience_s=lambda _: 0.5)

    assert [record.answer for record in asyncio.run(run(retries=False)).records] == [Answer("429")]
    (record,) = asyncio.run(run(retries=True)).records
    assert record.answer.status == TIMEOUT
    assert record.latency_s >= 0.5


def test_jobs_target_follows_a_job_to_its_remix(stand_in: OwnServer) -> None:
    async def run() -> Run:
        async with open_client(stand_in.url) as client:
            target = JobsTarget(client, retries=False)
            return await open_loop(target, [(0.0, SONG)] * 3, in_flight=9, patience_s=patience_s)

    run_ = asyncio.run(run())
    assert [record.answer.status for record in run_.records] == [OK] * 3
    assert max(record.latency_s for record in run_.records) >= 3 * SERVICE_S  # one at a time
    assert run_.records[0].answer.parts == {"separate_stems compute_s": SERVICE_S}
    assert all(record.answer.first_s for record in run_.records)


def test_jobs_target_cancels_a_job_that_nobody_waits_for(stand_in: OwnServer) -> None:
    async def run() -> list[object]:
        async with open_client(stand_in.url) as client:
            target = JobsTarget(client, retries=False)
            plan = [(0.0, Work(30.0, SLOW))]
            await open_loop(target, plan, in_flight=9, patience_s=lambda _: 2.0)
            states: list[object] = (await client.get("/states")).json()
            return states

    assert asyncio.run(run())[-1] == "cancelled"


def test_grpc_target_follows_a_job_to_its_remix(stand_in: OwnServer) -> None:
    async def run() -> Run:
        async with open_channel(stand_in.grpc) as channel:
            target = GrpcTarget(channel, {"seed": 1}, key="")
            return await open_loop(target, [(0.0, SONG)] * 3, in_flight=9, patience_s=patience_s)

    run_ = asyncio.run(run())
    assert [record.answer.status for record in run_.records] == [OK] * 3
    assert max(record.latency_s for record in run_.records) >= 3 * SERVICE_S  # one at a time
    assert run_.records[0].answer.parts == {"separate_stems compute_s": SERVICE_S}
    assert all(record.answer.first_s for record in run_.records)


def test_grpc_target_cancels_a_job_that_nobody_waits_for(stand_in: OwnServer) -> None:
    async def run() -> list[object]:
        async with open_channel(stand_in.grpc) as channel, open_client(stand_in.url) as client:
            target = GrpcTarget(channel, {}, key="")
            plan = [(0.0, Work(30.0, SLOW))]
            await open_loop(target, plan, in_flight=9, patience_s=lambda _: 2.0)
            states: list[object] = (await client.get("/states")).json()
            return states

    assert asyncio.run(run())[-1] == "cancelled"


def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        run = asyncio.run(remix_run(url, 10.0, 0.1))
    assert [record.answer.status for record in run.records] == ["unreachable"]


def test_runner_target_reads_what_the_runner_says(stand_in: OwnServer) -> None:
    async def run() -> tuple[dict[str, tuple[int, ...]], Run]:
        async with open_channel(stand_in.grpc) as channel:
            shapes = await input_shapes(channel, "any")
            plan = [(float(at_s), WINDOW) for at_s in constant(50.0, 0.2)]
            target = RunnerTarget(channel)
            return shapes, await open_loop(target, plan, in_flight=99, patience_s=patience_s)

    shapes, found = asyncio.run(run())
    assert shapes == {"samples": (1, 1600)}
    assert {record.answer.status for record in found.records} == {OK}
    assert found.records[0].answer.parts == {
        "queue_s": 0.0,
        "compute_s": SERVICE_S,
        "batch_rows": 1.0,
    }


def test_summary_leaves_the_warm_up_out_and_can_be_written(stand_in: OwnServer) -> None:
    async def run() -> dict[str, object]:
        async with open_client(stand_in.url) as client:
            load = Load(20.0, 1.0, "constant")
            works = iter(lambda: SONG, None)
            target = RemixTarget(client, retries=False)
            objective = Objective(5.0, 0.5)
            return summary(await server("run", target, "remix", load, works, objective))

    found = asyncio.run(run())
    assert found["requests"] == 20
    assert found["statuses"] == {OK: 20}
    assert found["audio_s_per_s"] == pytest.approx(600.0)


def test_watch_names_the_processes_and_counts_what_they_hold(stand_in: OwnServer) -> None:
    with watching(stand_in.pid, stand_in.url, series=False) as watch:
        pass
    (held,) = (sample.holdings["remix"] for sample in watch.samples)
    assert held.processes == 1
    assert held.memory_bytes > 5e6  # Python with gRPC
    assert held.files > 3
    names = [process.name for process in processes_of(stand_in.pid)]
    assert names == ["remix", "SeparateStems"]


def test_kill_is_done_at_its_time() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    asyncio.run(
        open_loop(
            Sleeper(0.3),
            [(0.0, SONG)],
            in_flight=1,
            patience_s=patience_s,
            events=faults(child.pid, "kill", 0.1),
        )
    )
    assert child.wait(30) == -signal.SIGKILL


@pytest.mark.slow
def test_whole_measurement_finds_a_knee_and_writes_its_report(
    stand_in: OwnServer, tmp_path: Path
) -> None:
    """Against the stand-in: one job at a time, 0.1 s each, so that 10 a second are the most."""
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (8_000, 1)).astype(np.float32)
    plan = Plan(
        minutes=0.35,
        songs=Songs([Recording(noise, 8_000)], length_s=30.0),
        objective=Objective(1.0, 0.0),
        kind="jobs",
        in_flight=2,
        seed=1,
    )
    begin_s = time.monotonic()
    report = asyncio.run(whole(stand_in, plan, begin_s))
    data, page = write(tmp_path, report)
    names = {run["name"] for run in report["runs"]}
    assert {"any offline", "songs warm single_stream", "songs offline"} <= names
    assert 0 < report["knee"]["sustained_hz"] < 20.0
    # Three of the model, four of songs, five around the knee and the faults, and the probes.
    assert len(names) + len(report["skipped"]) == 13 + report["knee"]["probes"]
    assert json.loads(data.read_text())["checks"]
    assert "The knee" in page.read_text()
