"""`/v1/jobs` over a real port; behind it, a composer that computes nothing."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from client.api import Client, Refused
from http_api.problems import Refusal
from http_api.ranges import choose_part
from tests.conftest import SLOW_SEED, ServerProcess
from tests.test_http_api import PROBLEM, wav

LONG = json.dumps({"seed": SLOW_SEED})


@pytest.fixture(scope="module")
def http(fake_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server.url, timeout=60.0) as client:
        yield client


@pytest.fixture(scope="module")
def done(http: httpx.Client) -> Any:
    """A job that is done."""
    job_id = submit(http)["id"]
    watch(http, job_id)
    return http.get(f"/v1/jobs/{job_id}").json()


def submit(http: httpx.Client, options: str = "{}", **query: str) -> Any:
    answer = http.post("/v1/jobs", files={"song": wav()}, data={"options": options}, params=query)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def watch(http: httpx.Client, job_id: str, after: int | None = None) -> list[tuple[int, str, Any]]:
    """(id, kind, data) of every event to the last."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    found: list[tuple[int, str, Any]] = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code in (200, 204)
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line and not line.startswith(":"):
                name, value = line.split(": ", 1)
                fields[name] = value
            elif fields:
                found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
                fields = {}
    return found


def test_submitted_job_has_an_address_where_it_is_watched_to_its_end(http: httpx.Client) -> None:
    answer = http.post("/v1/jobs", files={"song": wav()}, data={"options": '{"seed": 12}'})
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    assert answer.json()["options"]["seed"] == 12
    events = watch(http, answer.json()["id"])
    assert [number for number, _, _ in events] == list(range(1, len(events) + 1))
    states = [data["state"] for _, kind, data in events if kind == "state"]
    assert states == ["queued", "running", "done"]
    assert events[-1][2] == {"state": "done"}
    assert {data["stage"] for _, kind, data in events if kind == "progress"} == {"separate_stems"}
    job = http.get(answer.headers["location"]).json()
    assert job["state"] == "done"
    assert job["progress"] == {"separate_stems": 1.0}
    assert job["created_s"] <= job["started_s"] <= job["ended_s"] < job["expires_s"]
    names = [artifact["name"] for artifact in job["artifacts"]]
    assert names[0] == "remix.wav"
    assert "report.json" in names


def test_watcher_goes_on_after_the_last_event_it_saw(http: httpx.Client, done: Any) -> None:
    events = watch(http, done["id"])
    for after in (1, len(events) - 1):
        assert watch(http, done["id"], after) == events[after:]
    answer = http.get(f"/v1/jobs/{done['id']}/events", headers={"Last-Event-ID": str(len(events))})
    assert (answer.status_code, answer.content) == (204, b"")


def test_put_again_is_the_same_job_and_another_request_conflicts(http: httpx.Client) -> None:
    path, form = f"/v1/jobs/{uuid.uuid4()}", {"options": '{"seed": 3}'}
    first = http.put(path, files={"song": wav()}, data=form)
    again = http.put(path, files={"song": wav()}, data=form)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["created_s"] == again.json()["created_s"]
    for files, options in (({"song": wav(0.6)}, '{"seed": 3}'), ({"song": wav()}, '{"seed": 4}')):
        other = http.put(path, files=files, data={"options": options})
        assert other.status_code == 409
        assert other.headers["content-type"] == PROBLEM
        assert other.json()["type"] == "urn:philharmonics:problem:conflict"
    watch(http, first.json()["id"])
    late = http.put(path, files={"song": wav()}, data=form)
    assert (late.status_code, late.json()["state"]) == (200, "done")


def test_cancelled_job_ends_for_all_who_watch_and_hear_it(http: httpx.Client) -> None:
    job = submit(http, LONG)
    events: list[Any] = []
    watcher = threading.Thread(target=lambda: events.extend(watch(http, job["id"])))
    watcher.start()
    sound: list[httpx.Response] = []
    path = f"/v1/jobs/{job['id']}"
    hearer = threading.Thread(target=lambda: sound.append(http.get(f"{path}/audio")))
    hearer.start()
    assert http.delete(path).json()["state"] == "cancelled"
    watcher.join(30.0)
    hearer.join(30.0)
    assert events[-1][2] == {"state": "cancelled"}
    assert sound[0].status_code == 499
    assert http.delete(path).json()["state"] == "cancelled"
    assert http.get(f"{path}/artifacts/remix.wav").status_code == 404


def test_sound_of_a_job_is_its_file(http: httpx.Client, done: Any) -> None:
    artifact = done["artifacts"][0]
    whole = http.get(artifact["href"])
    assert whole.headers["content-type"] == "audio/wav"
    assert len(whole.content) == artifact["size_bytes"]
    assert http.get(f"/v1/jobs/{done['id']}/audio").content == whole.content


def test_file_is_sent_in_the_parts_that_are_asked_for(http: httpx.Client, done: Any) -> None:
    href = done["artifacts"][0]["href"]
    whole = http.get(href)
    size, etag = len(whole.content), whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"
    for asked, start, stop in (
        ("bytes=0-43", 0, 44),
        ("bytes=100-", 100, size),
        ("bytes=-10", size - 10, size),
        (f"bytes=10-{10 * size}", 10, size),
    ):
        part = http.get(href, headers={"Range": asked})
        assert part.status_code == 206
        assert part.content == whole.content[start:stop]
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert part.headers["etag"] == etag
    for headers in (
        {"Range": "bytes=0-43", "If-Range": '"another version"'},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "bytes=9-3"},
        {"Range": "lines=1-2"},
    ):
        assert http.get(href, headers=headers).content == whole.content
    behind = http.get(href, headers={"Range": f"bytes={size}-"})
    assert behind.status_code == 416
    assert behind.headers["content-range"] == f"bytes */{size}"
    assert behind.headers["content-type"] == PROBLEM
    known = http.get(href, headers={"If-None-Match": f'"x", {etag}'})
    assert (known.status_code, known.content) == (304, b"")
    head = http.head(href)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(size)


@given(
    st.one_of(
        st.from_regex(r"bytes=\d{0,19}-\d{0,19}", fullmatch=True), st.text(max_size=30)
    ).filter(lambda text: text.isascii()),
    st.integers(1, 10**6),
)
def test_any_range_is_within_the_file_or_refused(asked: str, size: int) -> None:
    try:
        part = choose_part(Headers({"range": asked}), size, '"a"')
    except Refusal as refusal:
        assert refusal.status_code == 416
        return
    assert 0 <= part.start < part.stop <= size
    assert part.status == 206 or (part.start, part.stop) == (0, size)


def test_pages_of_jobs_hold_each_once(http: httpx.Client) -> None:
    ids = [submit(http, LONG)["id"] for _ in range(3)]
    seen: list[str] = []
    query: dict[str, str] = {"page_size": "2"}
    while True:
        page = http.get("/v1/jobs", params=query).json()
        assert len(page["jobs"]) <= 2
        seen += [job["id"] for job in page["jobs"]]
        if page["next_page_token"] is None:
            break
        query["page_token"] = page["next_page_token"]
    assert seen[:3] == ids[::-1]
    assert len(set(seen)) == len(seen)
    waiting = http.get("/v1/jobs", params={"state": "queued"}).json()["jobs"]
    assert [job["position"] for job in waiting] == list(range(len(waiting)))[::-1]
    assert all(job["estimate_s"] > 0 for job in waiting)
    for job_id in ids:
        http.delete(f"/v1/jobs/{job_id}")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/jobs/nobody", 404),
        ("DELETE", "/v1/jobs/nobody", 404),
        ("GET", "/v1/jobs/nobody/events", 404),
        ("GET", "/v1/jobs/nobody/audio", 404),
        ("GET", "/v1/jobs/nobody/artifacts/remix.wav", 404),
        ("GET", "/v1/jobs?page_size=0", 422),
        ("GET", "/v1/jobs?state=lost", 422),
        ("GET", "/v1/jobs?page_token=1", 422),
        ("PUT", "/v1/jobs/a%20b", 422),
        ("POST", "/v1/jobs?webhook_url=http://10.0.0.1/", 422),
        ("PATCH", "/v1/jobs", 405),
    ],
)
def test_what_is_wrong_is_a_problem(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    files = {"song": wav()} if method in ("PUT", "POST") else None
    answer = http.request(method, path, files=files)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    assert answer.json()["remedy"]


def test_song_that_is_none_is_refused_before_it_is_a_job(http: httpx.Client) -> None:
    path = f"/v1/jobs/{uuid.uuid4()}"
    answer = http.put(path, files={"song": b"no song"})
    assert answer.status_code == 422
    assert answer.json()["type"] == "urn:philharmonics:problem:invalid-audio"
    assert http.get(path).status_code == 404


def test_client_hands_over_watches_hears_fetches_and_cancels(
    fake_server: ServerProcess, tmp_path: Path
) -> None:
    with Client(fake_server.url) as client:
        mine = f"client-{uuid.uuid4()}"
        job = client.submit(io.BytesIO(wav()), {"seed": 21}, job_id=mine)
        assert client.submit(io.BytesIO(wav()), {"seed": 21}, job_id=mine)["id"] == mine
        with pytest.raises(Refused) as refused:
            client.submit(io.BytesIO(wav()), {"seed": 22}, job_id=mine)
        assert refused.value.status == 409
        assert list(client.watch(mine))[-1] == ("state", {"state": "done"})
        sound = b"".join(client.hear(mine))
        client.fetch(mine, "remix.wav", tmp_path / "remix.wav")
        assert (tmp_path / "remix.wav").read_bytes() == sound
        assert client.job(mine)["state"] == "done"
        assert mine in {each["id"] for each in client.jobs("done")}
        assert mine not in {each["id"] for each in client.jobs("cancelled")}
        slow = client.submit(io.BytesIO(wav()), {"seed": SLOW_SEED})["id"]
        assert client.cancel(slow)["state"] == "cancelled"
        with pytest.raises(Refused, match="There is no job"):
            client.job("none-such")
    assert job["id"] == mine
