"""What is refused before it is read, what a key may have at once, whose a job is."""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from jobs.admission import Slots, check_room, check_runners, check_share
from jobs.door import ANYBODY, Caller
from jobs.estimate import Span
from jobs.forecast import Forecast
from jobs.keys import SCOPES
from jobs.rows import Running
from jobs.schedule import Waiting
from remix.errors import QueueFull, RunnerUnavailable
from remix.stages import STAGES
from tests.conftest import SLOW_SEED, ServerProcess, serving
from tests.test_guard import bearer, keys_of
from tests.test_http_api import events_of, problem_of, wav

LONG = {"options": f'{{"seed": {SLOW_SEED}}}'}
"""A job that takes hours: it ends by being cancelled."""

FULL = Forecast(
    running=((Running("r", "ann", 60.0, 20.0), Span(0.0, 40.0)),),
    waiting=(
        (Waiting("1", "eve", 30.0, 5.0), Span(40.0, 70.0)),
        (Waiting("2", "ann", 50.0, 5.0), Span(70.0, 120.0)),
    ),
)


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def refusal_of(work: Any, *arguments: Any) -> QueueFull:
    with pytest.raises(QueueFull) as refused:
        work(*arguments)
    assert (refused.value.value, refused.value.limit, refused.value.remedy) != (None, None, None)
    return refused.value


def test_slots_refuse_the_next_one_and_tell_when_one_will_be_free() -> None:
    clock = Clock()
    slots = Slots(2, "remixes", clock)
    assert refusal_of(Slots(0, "remixes").check).retry_after_s is None  # nothing is known yet
    for stay_s in (10.0, 20.0, 30.0):
        with slots.hold():
            clock.now_s += stay_s
    with slots.hold():
        clock.now_s += 15.0
        with slots.hold():
            # 20 s is the median of the stays, and the elder of the two has been there for 15 s.
            assert refusal_of(slots.check).retry_after_s == pytest.approx(5.0)
            clock.now_s += 100.0
            assert refusal_of(slots.check).retry_after_s == 1.0
        slots.check()


def test_full_queue_is_refused_until_the_first_of_it_begins() -> None:
    check_room(ANYBODY, {}, FULL, max_waiting=3)
    assert refusal_of(check_room, ANYBODY, {}, FULL, 2).retry_after_s == pytest.approx(40.0)
    # Who is being taken has a place, though no row yet.
    assert refusal_of(check_room, ANYBODY, {"eve": 1}, FULL, 3).value == 3
    assert refusal_of(check_room, ANYBODY, {"": 1}, Forecast((), ()), 1).retry_after_s == 1.0


@pytest.mark.parametrize("max_waiting", [1, 2, 3, 8, 64])
def test_one_key_alone_cannot_fill_the_queue(max_waiting: int) -> None:
    def fill(owner: str, queue: list[Any]) -> int:
        """Submit until refused; how many were taken."""
        before = len(queue)
        while True:
            try:
                caller = Caller(owner, frozenset(SCOPES), None)
                check_room(caller, {}, Forecast((), tuple(queue)), max_waiting)
            except QueueFull:
                return len(queue) - before
            queue.append((Waiting(str(len(queue)), owner, 1.0, 0.0), Span(5.0, 6.0)))

    queue: list[Any] = []
    assert fill("greedy", queue) == -(-max_waiting // 2)
    left = max_waiting - len(queue)
    assert fill("late", queue) == -(-left // 2)
    while len(queue) < max_waiting:
        assert fill(f"later {len(queue)}", queue) >= 1


def test_key_with_all_that_it_may_have_is_refused_until_its_first_is_done() -> None:
    ann = Caller("ann", frozenset(SCOPES), jobs_at_once=3)
    check_share(ann, 0, FULL)
    assert refusal_of(check_share, ann, 1, FULL).retry_after_s == pytest.approx(40.0)
    eve = Caller("eve", frozenset(SCOPES), jobs_at_once=1)
    assert refusal_of(check_share, eve, 0, FULL).retry_after_s == pytest.approx(70.0)
    check_share(ANYBODY, 1_000, FULL)


def test_only_the_runners_that_are_needed_must_answer() -> None:
    check_runners(["generate_notes"], ["separate_stems"])
    check_runners(STAGES, [])
    with pytest.raises(RunnerUnavailable, match="separate_stems"):
        check_runners(STAGES, ["separate_stems"])


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Keys on; one job at once, and one that waits."""
    command = [sys.executable, "-m", "bentoml", "serve", "tests.fakes:FakeRemix"]
    environment = {
        "PHILHARMONICS_KEYS": "on",
        "PHILHARMONICS_MAX_REMIXES": "1",
        "PHILHARMONICS_MAX_WAITING_JOBS": "1",
    }
    folder = tmp_path_factory.mktemp("narrow")
    with serving(command, folder, ready_s=60.0, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def keys(narrow: ServerProcess) -> dict[str, str]:
    return asyncio.run(keys_of(narrow, {"ann": ("remix",), "eve": ("remix",)}))


@pytest.fixture
def http(narrow: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=narrow.url, timeout=60.0) as client:
        yield client


@pytest.fixture
def jobs(http: httpx.Client, keys: dict[str, str]) -> Iterator[list[str]]:
    """Two jobs of ann's that fill the service: one runs, one waits."""
    ids = [uuid.uuid4().hex, uuid.uuid4().hex]
    for job_id in ids:
        submit(http, keys["ann"], job_id).raise_for_status()
        if job_id == ids[0]:
            await_state(http, keys["ann"], job_id, "running")
    yield ids
    for job_id in ids:
        http.delete(f"/v1/jobs/{job_id}", headers=bearer(keys["ann"])).raise_for_status()


def submit(http: httpx.Client, key: str, job_id: str) -> httpx.Response:
    return http.put(
        f"/v1/jobs/{job_id}", files={"song": ("s", wav())}, data=LONG, headers=bearer(key)
    )


def await_state(http: httpx.Client, key: str, job_id: str, state: str) -> None:
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=bearer(key)) as events:
        for line in events.iter_lines():
            if line == f'data: {{"state": "{state}"}}':
                return
    raise AssertionError(f"{job_id} was never {state}")


def answer_to_headers(server: ServerProcess, key: str, path: str) -> HTTPResponse:
    """What is said to a request of which only the headers have come; its body is read."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=30.0) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 100000000\r\n"
            f"Authorization: Bearer {key}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
        )
        answer = HTTPResponse(connection)
        answer.begin()
        answer.read()
    return answer


def test_job_for_a_full_service_is_refused_at_its_headers(
    narrow: ServerProcess, keys: dict[str, str], jobs: list[str]
) -> None:
    answer = answer_to_headers(narrow, keys["eve"], "/v1/jobs")
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) >= 1


def test_job_that_is_there_is_answered_by_a_full_service(
    http: httpx.Client, keys: dict[str, str], jobs: list[str]
) -> None:
    """Else a caller whose answer was lost would take the job for refused."""
    again = submit(http, keys["ann"], jobs[1])
    assert again.status_code == 202
    assert again.json()["position"] == 0
    problem_of(submit(http, keys["eve"], jobs[1]), 429, "queue-full")


def test_quote_of_a_full_service_counts_those_before(
    http: httpx.Client, keys: dict[str, str], jobs: list[str]
) -> None:
    def quote(key: str) -> dict[str, Any]:
        answer = http.post("/v1/quote", json={"duration_s": 60.0}, headers=bearer(key))
        facts: dict[str, Any] = answer.raise_for_status().json()
        return facts

    own, others = quote(keys["ann"]), quote(keys["eve"])
    # Ann's own short job is before her long one; eve has had nothing, so it is her turn.
    assert (own["jobs_before"], others["jobs_before"]) == (1, 0)
    assert 0.0 < others["start_in_s"] < own["start_in_s"] < own["done_in_s"]
    assert own["done_in_s"] >= own["start_in_s"] + own["alone_s"]
    assert own["compute_s"] == pytest.approx(sum(own["stages"].values()), abs=0.01)


def test_quote_of_what_is_no_song_is_refused(http: httpx.Client, keys: dict[str, str]) -> None:
    for wrong in [{}, {"duration_s": 0}, {"duration_s": -1}, {"duration_s": "long"}]:
        answer = http.post("/v1/quote", json=wrong, headers=bearer(keys["ann"]))
        assert answer.status_code == 422, wrong
    answer = http.post("/v1/quote", json={"duration_s": 601.0}, headers=bearer(keys["ann"]))
    assert problem_of(answer, 413, "limit-exceeded")["limit"] == 600


def test_key_has_only_so_many_jobs_at_once(http: httpx.Client, narrow: ServerProcess) -> None:
    few = asyncio.run(keys_of(narrow, {"few": ("remix",)}, jobs_at_once=1))["few"]
    submit(http, few, "mine").raise_for_status()
    refused = submit(http, few, "more")
    assert problem_of(refused, 429, "queue-full")["limit"] == 1
    assert int(refused.headers["retry-after"]) >= 1
    http.delete("/v1/jobs/mine", headers=bearer(few)).raise_for_status()
    submit(http, few, "more").raise_for_status()
    http.delete("/v1/jobs/more", headers=bearer(few)).raise_for_status()


def test_job_is_its_keys_alone(http: httpx.Client, keys: dict[str, str], jobs: list[str]) -> None:
    eve, path = bearer(keys["eve"]), f"/v1/jobs/{jobs[0]}"
    for method, url in [
        ("GET", path), ("GET", f"{path}/events"), ("GET", f"{path}/audio"),
        ("GET", f"{path}/artifacts/remix.wav"), ("DELETE", path),
    ]:  # fmt: skip
        problem_of(http.request(method, url, headers=eve), 404, "not-found")
    assert http.get("/v1/jobs", headers=eve).json()["jobs"] == []
    mine = http.get("/v1/jobs", headers=bearer(keys["ann"])).json()["jobs"]
    assert {job["id"] for job in mine if job["state"] in {"queued", "running"}} == set(jobs)


def test_request_is_watched_by_its_key_alone(http: httpx.Client, keys: dict[str, str]) -> None:
    """Two keys may use the same id at once, and each sees its own."""

    def separate(name: str, part: str) -> int:
        headers = {**bearer(keys[name]), "X-Request-Id": "the-same"}
        return http.post("/v1/separate", files={part: ("s", wav())}, headers=headers).status_code

    assert separate("ann", "song") == 200
    assert separate("eve", "no song") == 400
    http.headers.update(bearer(keys["eve"]))
    assert events_of(http, "the-same")[-1] == ("end", {"outcome": "failed"})
    http.headers.update(bearer(keys["ann"]))
    assert events_of(http, "the-same")[-1] == ("end", {"outcome": "done"})
