"""One trace id from the caller to the last window: in answers, errors, logs, jobs, the report."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import pytest
import sqlalchemy as sa
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from jobs.database import open_database
from jobs.rows import JOBS
from remix.stages import STAGES
from remix_v1 import remix_pb2 as messages
from tests.conftest import ROOT, SLOW_SEED, ServerProcess, serving
from tests.grpc_caller import calling, collect, refusal_of, upload
from tests.test_http_api import wav

Found = TypeVar("Found")

SPAN_ID = "00f067aa0ba902b7"


@pytest.fixture
def trace_id() -> str:
    return secrets.token_hex(16)


@pytest.fixture(scope="module")
def http(fake_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server.url, timeout=60.0) as client:
        yield client


def traceparent(trace_id: str) -> dict[str, str]:
    """The W3C's header; what it says of sampling is not heeded."""
    return {"traceparent": f"00-{trace_id}-{SPAN_ID}-00"}


def until(look: Callable[[], Found | None]) -> Found:
    """What is there within a while."""
    until_s = time.monotonic() + 60.0
    while (found := look()) is None:
        assert time.monotonic() < until_s
        time.sleep(0.05)
    return found


def lines_of(server: ServerProcess, trace_id: str) -> list[dict[str, Any]]:
    """What the log has of a trace."""
    log = (server.temp_dir.parent / "log").read_text().splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]
    return [line for line in lines if line.get("trace_id") == trace_id]


def test_trace_of_the_caller_is_the_answers_the_errors_and_the_logs(
    http: httpx.Client, fake_server: ServerProcess, trace_id: str
) -> None:
    answer = http.get("/v1/jobs/nobody", headers=traceparent(trace_id))
    assert answer.status_code == 404
    assert answer.headers["x-trace-id"] == answer.json()["trace_id"] == trace_id
    [line] = until(lambda: lines_of(fake_server, trace_id) or None)
    assert (line["message"], line["route"]) == ("request", "/v1/jobs/{job_id}")
    assert line["status"] == 404
    assert line["process"] == "composer"


def test_request_without_a_trace_begins_one(http: httpx.Client) -> None:
    ids = [http.get("/v1/voices").headers["x-trace-id"] for _ in range(3)]
    damaged = http.get("/v1/voices", headers={"traceparent": "00-xyz-1-1"}).headers["x-trace-id"]
    assert len({*ids, damaged}) == 4
    assert all(len(id) == 32 and int(id, 16) for id in [*ids, damaged])
    assert "x-trace-id" not in http.get("/livez").headers


def test_trace_crosses_grpc_and_stands_in_its_errors(
    fake_server: ServerProcess, trace_id: str
) -> None:
    metadata = tuple(traceparent(trace_id).items())
    with calling(fake_server.grpc_address) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.GetJob(messages.GetJobRequest(job_id="no"), timeout=60.0, metadata=metadata)
        collect(
            stub.Remix(
                upload(messages.RemixRequest, messages.RemixHead(), wav()),
                timeout=60.0,
                metadata=metadata,
            )
        )
    info = refusal_of(refused.value).details["ErrorInfo"]
    assert info.metadata["trace_id"] == trace_id
    lines = until(lambda: found if len(found := lines_of(fake_server, trace_id)) == 2 else None)
    assert [(line["method"], line["code"]) for line in lines] == [
        ("GetJob", "NOT_FOUND"),
        ("Remix", "OK"),
    ]


def test_job_keeps_its_callers_trace_to_its_end_and_its_report(
    http: httpx.Client, fake_server: ServerProcess, trace_id: str
) -> None:
    song = {"song": ("song.wav", wav())}
    sent = http.post("/v1/jobs", files=song, headers=traceparent(trace_id)).json()
    path = f"/v1/jobs/{sent['id']}"
    assert sent["trace_id"] == trace_id
    job = until(lambda: found if (found := http.get(path).json())["state"] == "done" else None)
    assert job["trace_id"] == trace_id
    with calling(fake_server.grpc_address) as stub:
        job_message = stub.GetJob(messages.GetJobRequest(job_id=sent["id"]), timeout=60.0)
    assert job_message.trace_id == trace_id
    told = until(lambda: found if len(found := lines_of(fake_server, trace_id)) == 3 else None)
    assert [line["message"] for line in told] == ["request", "job begins", "job ends"]
    # The very same again is answered with the files of the first; its report is its own.
    other = secrets.token_hex(16)
    again = http.post("/v1/jobs", files=song, headers=traceparent(other)).json()
    path = f"/v1/jobs/{again['id']}"
    until(lambda: found if (found := http.get(path).json())["state"] == "done" else None)
    report = http.get(f"{path}/artifacts/report.json").json()
    assert (report["trace_id"], report["times"]["whole_result_cached"]) == (other, True)


def test_database_of_an_earlier_version_gets_what_it_lacks(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    engine = open_database(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN trace")
    engine.dispose()
    for _ in range(2):
        engine = open_database(url)
        with engine.begin() as connection:
            assert connection.execute(sa.select(JOBS.c.trace)).all() == []
        engine.dispose()


@pytest.mark.slow
def test_trace_of_a_remix_holds_every_stage_of_both_branches(
    server: ServerProcess, trace_id: str
) -> None:
    with httpx.Client(base_url=server.url, timeout=600.0) as http:
        answer = http.post(
            "/v1/remix",
            files={"song": ("song.wav", wav(8.0))},
            headers={"Accept": "application/zip", **traceparent(trace_id)},
        )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-trace-id"] == trace_id

    def spans() -> list[dict[str, Any]]:
        lines = (server.temp_dir.parent / "spans").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [span for span in found if span["context"]["trace_id"] == f"0x{trace_id}"]

    def whole() -> list[dict[str, Any]] | None:
        found = spans()
        windows = sum(span["name"] == "window" for span in found)
        computed = sum(span["name"] == "compute" for span in found)
        has_root = any(span["name"] == "POST /v1/remix" for span in found)
        return found if has_root and windows and windows == computed else None

    found = until(whole)
    by_id = {span["context"]["span_id"]: span for span in found}
    # Every span hangs below the request, and the request below the caller's span.
    roots = [span for span in found if span["parent_id"] not in by_id]
    assert [root["parent_id"] for root in roots] == [f"0x{SPAN_ID}"]
    stages = {span["name"]: span for span in found if span["name"] in STAGES}
    assert set(stages) == set(STAGES)
    assert any(span["name"] == "mix_tracks" for span in found)
    for stage, span in stages.items():
        windows = [s for s in found if s["parent_id"] == span["context"]["span_id"]]
        assert windows, stage
        for window in windows:
            assert span["start_time"] <= window["start_time"]
            assert window["end_time"] <= span["end_time"]
            [infer] = [s for s in found if s["parent_id"] == window["context"]["span_id"]]
            process = infer["resource"]["attributes"]["service.name"]
            assert (infer["name"], process) == ("infer", f"philharmonics.{stage}")
            parts = [s["name"] for s in found if s["parent_id"] == infer["context"]["span_id"]]
            assert sorted(parts) == ["compute", "queue"]


@pytest.mark.slow
def test_job_that_another_server_carries_on_keeps_its_trace(tmp_path: Path, trace_id: str) -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "tests.fakes:FakeRemix"]
    environment = {"PHILHARMONICS_DATA_DIR": str(tmp_path / "data")}

    def begins(server: ServerProcess) -> list[int] | None:
        told = [line for line in lines_of(server, trace_id) if line["message"] == "job begins"]
        return [line["attempt"] for line in told] or None

    (tmp_path / "a").mkdir()
    with serving(command, tmp_path / "a", 60.0, environment) as first:
        httpx.put(
            f"{first.url}/v1/jobs/long",
            files={"song": ("song.wav", wav())},
            data={"options": f'{{"seed": {SLOW_SEED}}}'},
            headers=traceparent(trace_id),
            timeout=60.0,
        )
        assert until(lambda: begins(first)) == [1]
        for pid in first.pids():
            os.kill(pid, signal.SIGKILL)
    (tmp_path / "b").mkdir()
    with serving(command, tmp_path / "b", 60.0, environment) as second:
        assert until(lambda: begins(second)) == [2]


class Collector(TraceServiceServicer):
    """An OpenTelemetry collector that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC names methods
        for resource in request.resource_spans:
            self.services |= {
                pair.value.string_value
                for pair in resource.resource.attributes
                if pair.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return ExportTraceServiceResponse()


PROGRAM = """
import sys
from pathlib import Path
from remix.settings import Settings
from telemetry import traces
settings = Settings(Path(), Path(), traces=sys.argv[1], trace_share=float(sys.argv[2]))
end = traces.start_tracing("composer", settings)
for number in range(64):
    with traces.serving("request", f"00-{number + 1:016x}{number << 58:016x}-00f067aa0ba902b7-01"):
        with traces.song("remix"), traces.window("convert_voice", "voice", 1):
            print(traces.trace_id())
end()
"""


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 64, 64), (0.25, 16, 16), (0.0, 0, 0)])
def test_spans_reach_a_collector_for_the_share_that_is_asked_for(
    share: float, least: int, most: int
) -> None:
    """The ids of the 64 requests are spread evenly; whether one is traced follows from its id."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"http://127.0.0.1:{port}", str(share)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    server.stop(0).wait()
    assert len(set(done.stdout.split())) == 64  # each has its id, traced or not
    traced = {span.trace_id for span in collector.spans}
    assert least <= len(traced) <= most
    assert len(collector.spans) == 4 * len(traced)  # request, remix, convert_voice, window
    assert collector.services == ({"philharmonics.composer"} if traced else set())
