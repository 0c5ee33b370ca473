"""The table of docs/metrics.md is the code's; and no label grows with what callers send."""

from __future__ import annotations

import asyncio
import importlib
import re
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from http_api.scopes import ROWS
from remix.stages import Tensors
from runners.adaptive_batcher import WINDOW_OUTCOMES, AdaptiveBatcher, Workers
from runners.inference_protocol import silent_ends
from telemetry.process import ProcessWatch
from tests.conftest import ROOT, ServerProcess
from tests.test_http_api import wav

TABLE = ROOT / "docs/metrics.md"
PACKAGES = ("remix", "runners", "jobs", "http_api", "grpc_api", "telemetry")
UNITS = {
    "seconds", "bytes", "ratio", "windows", "requests", "retries", "refusals", "runners", "jobs",
    "tokens", "info",
}  # fmt: skip
"""The last word of a name: what it counts or measures; `_info` is Prometheus' own convention."""

LABELS = {
    "model", "outcome", "stage", "part", "reason", "song_seconds", "call", "state", "method",
    "route", "status", "code", "transport", "process", "gpu", "kind", "sha256",
}  # fmt: skip
"""Each has a bounded set of values, whatever callers send."""


def ours() -> dict[str, MetricWrapperBase]:
    """Every metric that a module of ours defines, by the name that it is asked for by."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            if path.stem not in ("openvino_session", "torchscript_session"):
                importlib.import_module(f"{package}.{path.stem}")
    found = {
        metric
        for metric in REGISTRY._names_to_collectors.values()
        if isinstance(metric, MetricWrapperBase) and metric._name.startswith("philharmonics_")
    }
    return {
        metric._name + ("_total" if metric._type == "counter" else ""): metric for metric in found
    }


def documented() -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Kind, labels and meaning of each row of the table."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*?)\| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    return {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in rows
    }


def test_table_in_the_documentation_is_the_code() -> None:
    defined = {
        name: (metric._type, tuple(metric._labelnames), metric._documentation)
        for name, metric in ours().items()
    }
    assert documented() == defined


def test_every_metric_has_its_unit_in_its_name_and_known_labels_only() -> None:
    for name, metric in ours().items():
        assert name.removesuffix("_total").rsplit("_", 1)[1] in UNITS, name
        assert set(metric._labelnames) <= LABELS, name
        assert metric._documentation, name


def test_silence_behind_the_end_is_padding_and_silence_within_is_not() -> None:
    windows = np.ones((3, 100), np.float32)
    assert silent_ends(windows) == 0.0
    windows[0, 10:20] = 0.0
    assert silent_ends(windows) == 0.0
    windows[0, 75:] = windows[2] = 0.0
    assert silent_ends(windows) == 1.25


def test_batcher_counts_windows_by_what_became_of_them_and_their_padding() -> None:
    def value(name: str, **labels: str) -> float:
        found = REGISTRY.get_sample_value(f"philharmonics_{name}", {"model": "counted", **labels})
        return found or 0.0

    async def scenario() -> None:
        started, gate = threading.Event(), threading.Event()

        def compute(inputs: Tensors) -> dict[str, NDArray[Any]]:
            started.set()
            assert gate.wait(60)
            return {"y": inputs["x"]}

        batcher = AdaptiveBatcher(
            "counted",
            compute,
            Workers(1),
            max_batch_rows=2,
            max_queue_rows=8,
            padding=lambda inputs, outputs: silent_ends(outputs["y"]),
        )
        window = {"x": np.array([[1, 1, 0, 0]], np.float32)}
        first = asyncio.create_task(batcher.submit(window))
        assert await asyncio.to_thread(started.wait, 60)
        # While one is computed: two that go together, and one whose caller leaves before.
        others = [asyncio.create_task(batcher.submit(window)) for _ in range(3)]
        while value("queue_windows") < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        batcher.show_queue()
        assert 0.05 <= value("queue_age_seconds") < 60
        others[0].cancel()
        first.cancel()
        await asyncio.wait([first, others[0]])
        gate.set()
        await asyncio.gather(*others[1:])
        assert value("queue_windows") == value("queue_age_seconds") == 0

    before = {outcome: value("windows_total", outcome=outcome) for outcome in WINDOW_OUTCOMES}
    asyncio.run(scenario())
    counts = {
        outcome: value("windows_total", outcome=outcome) - was for outcome, was in before.items()
    }
    assert counts == {"computed": 2, "wasted": 1, "cancelled": 1, "overdue": 0, "failed": 0}
    assert value("batch_windows_sum") == 3
    assert value("batch_windows_count") == 2
    assert value("padding_windows_total") == 1.5


def series(url: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every series of ours that a server has."""
    text = httpx.get(f"{url}/metrics", timeout=60.0).text
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def http(fake_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server.url, timeout=60.0) as client:
        yield client


def ask_for_everything(http: httpx.Client, name: str) -> None:
    """Requests of every kind, with a name of their own wherever a caller can put one."""
    http.get(f"/{name}")
    http.get(f"/v1/voices/{name}")
    http.request(name[:8].upper(), "/v1/voices")
    http.get("/v1/voices", headers={"X-Request-Id": name, "User-Agent": name})
    http.get(f"/v1/jobs/{name}")
    http.get(f"/v1/jobs/{name}/artifacts/{name}.wav")
    http.delete(f"/v1/jobs/{name}")
    song = {"song": (f"{name}.wav", wav(0.5))}
    http.put(f"/v1/jobs/{name}", files=song)
    http.get(f"/v1/jobs/{name}")
    http.delete(f"/v1/jobs/{name}")
    http.get("/metrics")
    http.post("/v1/remix", files=song, data={"options": f'{{"voice": "{name}"}}'})
    http.post("/v1/separate", files=song, params={"q": name})
    http.post("/v1/transcribe", content=name, headers={"Content-Type": f"text/{name}"})


def test_series_do_not_grow_with_what_callers_send(
    http: httpx.Client, fake_server: ServerProcess
) -> None:
    ask_for_everything(http, uuid.uuid4().hex)
    before = series(fake_server.url)
    names = [uuid.uuid4().hex for _ in range(8)]
    for name in names:
        ask_for_everything(http, name)
    after = series(fake_server.url)
    assert after - before == set()
    assert not any(name in value for name in names for one in after for _, value in one[1])
    assert not any(one[0].startswith("bentoml") for one in after)


def test_routes_are_told_by_their_template(http: httpx.Client, fake_server: ServerProcess) -> None:
    ask_for_everything(http, "a-job")
    routes = {dict(labels).get("route") for _, labels in series(fake_server.url)} - {None}
    assert {"/v1/jobs/{job_id}", "/v1/remix", "/v1/voices", "other"} <= routes
    described = set(http.get("/openapi.json").json()["paths"])
    open_ones = {path.rstrip("/") or "/" for path in ROWS}  # these are not described
    found = {route.replace(":path}", "}") for route in routes if route is not None}
    assert found <= described | open_ones | {"other"}


def test_help_is_told_by_the_server_too(fake_server: ServerProcess) -> None:
    text = httpx.get(f"{fake_server.url}/metrics", timeout=60.0).text
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.MULTILINE))
    assert helps["philharmonics_jobs"] == documented()["philharmonics_jobs"][2]
    assert {name for name in helps if name.startswith("philharmonics")} <= set(documented())


def test_refusals_are_counted_by_their_reason(
    http: httpx.Client, fake_server: ServerProcess
) -> None:
    def refused() -> float:
        text = http.get("/metrics").text
        line = r'^philharmonics_refusals_total\{reason="not-found",transport="http"\} (\S+)$'
        found = re.search(line, text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = refused()
    assert http.get("/v1/jobs/nobody-has-this").status_code == 404
    assert refused() == before + 1


def test_process_tells_of_itself_with_and_without_a_gpu() -> None:
    watch = ProcessWatch("watched", uses_gpu=True)
    watch.tell()
    resident = REGISTRY.get_sample_value(
        "philharmonics_process_memory_bytes", {"process": "watched"}
    )
    assert resident is not None
    assert 10e6 < resident < 10e9
    name = "philharmonics_process_cpu_seconds_total"
    first = REGISTRY.get_sample_value(name, {"process": "watched"}) or 0.0
    sum(range(10**6))
    watch.tell()
    second = REGISTRY.get_sample_value(name, {"process": "watched"}) or 0.0
    assert 0 < first < second <= time.process_time()
