"""The HTTP face, over a real port: what is answered, what is refused, what is left behind.

The server's decoder, forms, limits and problems are real; behind them stands a fake composer
(`tests.fakes`), so that these tests are about HTTP. The real flow is tested over the same port
in `test_remix_service.py`.
"""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from tests.conftest import CRASH_SEED, SLOW_SEED, ServerProcess
from tests.test_audio_codec import hours_of_silence

PROBLEM = "application/problem+json"
FORM_ROUTES = {
    "/v1/remix": "song",
    "/v1/separate": "song",
    "/v1/transcribe": "song",
    "/v1/generate": "notes",
    "/v1/convert": "vocals",
    "/v1/synthesize": "notes",
}
NOTES = {"tracks": {"piano": [{"onset_s": 0.5, "duration_s": 1.0, "pitch": 60, "velocity": 80}]}}
BODY_LIMIT = 200_000_000


@pytest.fixture(scope="module")
def http(fake_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server.url, timeout=60.0) as client:
        # Warm-up: what is opened once (metrics, the first decoder's pipes) is open from here on.
        client.post("/v1/remix", files={"song": ("song.wav", wav())}).raise_for_status()
        yield client


def wav(duration_s: float = 0.5, channels: int = 2, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.5, 0.5, (round(44_100 * duration_s), channels))
    return sound_file(samples, "WAV", **options)


def sound_file(samples: Any, container: str, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 44_100, format=container, **options)
    return file.getvalue()


def three_hours_of_opus(folder: Path) -> bytes:
    return hours_of_silence(folder / "song.opus", hours=3, stated_s=3 * 3600).read_bytes()


def wav_that_lies() -> bytes:
    data = bytearray(wav())
    at = data.index(b"data") + 4
    data[at : at + 4] = (10 * len(data)).to_bytes(4, "little")
    return bytes(data)


def truncated_mp3() -> bytes:
    whole = sound_file(np.random.default_rng(0).uniform(-0.5, 0.5, (44_100, 2)), "MP3")
    return whole[: len(whole) * 2 // 3]


def nine_channels() -> bytes:
    return sound_file(np.zeros((4_410, 9)), "WAV")


def not_a_number() -> bytes:
    return sound_file(np.full((4_410, 2), np.nan, np.float32), "WAV", subtype="FLOAT")


def far_beyond_full_scale() -> bytes:
    return sound_file(np.full((4_410, 2), 1e30, np.float32), "WAV", subtype="FLOAT")


WRONG_FILES: dict[str, tuple[Any, int, str, str]] = {
    "empty file": (lambda _: b"", 422, "invalid-audio", "empty (0 bytes)"),
    "text named mp3": (
        lambda _: b"la la la\n" * 50,
        422,
        "invalid-audio",
        "no audio",
    ),
    "truncated mp3": (lambda _: truncated_mp3(), 422, "invalid-audio", "truncated"),
    "lying wav": (lambda _: wav_that_lies(), 422, "invalid-audio", "promises"),
    "no samples": (lambda _: wav(0.0), 422, "invalid-audio", "0 samples"),
    "all NaN": (lambda _: not_a_number(), 422, "invalid-audio", "not numbers"),
    "1e30": (lambda _: far_beyond_full_scale(), 422, "invalid-audio", "full scale is 1"),
    "nine channels": (lambda _: nine_channels(), 413, "limit-exceeded", "9 channels"),
    "three hours": (three_hours_of_opus, 413, "limit-exceeded", "10800 s"),
}

WRONG_OPTIONS: dict[str, tuple[str, int, str, str]] = {
    "unknown voice": ('{"voice": "nobody"}', 404, "not-found", "nobody"),
    "unknown option": ('{"tempo": 1}', 422, "invalid-option", "tempo"),
    "option out of range": ('{"temperature": 9}', 422, "invalid-option", "temperature is 9"),
    "option of another type": ('{"seed": "one"}', 422, "invalid-option", "seed is 'one'"),
    "option that is null": ('{"seed": null}', 422, "invalid-option", "seed is 'null'"),
    "option that is no number": ('{"temperature": NaN}', 422, "invalid-option", "'nan'"),
    "voice of half a character": (r'{"voice": "\ud800"}', 404, "not-found", "ud800"),
    "name of half a character": (r'{"\ud800": 1}', 422, "invalid-option", "ud800"),
    "option of 5000 digits": ('{"seed": ' + "1" * 5_000 + "}", 422, "invalid-option", "not JSON"),
    "malformed JSON": ('{"seed": ', 422, "invalid-option", "not JSON"),
    "no object": ("[1]", 422, "invalid-option", "list"),
    "endless nesting": ("[" * 60_000, 422, "invalid-option", "not JSON"),
}


def problem_of(answer: httpx.Response, status: int, name: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:philharmonics:problem:{name}"
    assert body["status"] == status
    assert body["title"]
    for member in ("detail", "value", "limit", "remedy"):
        # Of a bug inside, the caller learns only that it was one.
        assert status == 500 or body.get(member) not in (None, "", [], {}), (member, body)
    return body


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_refused_and_leaves_no_trace(
    fake_server: ServerProcess, http: httpx.Client, tmp_path: Path, case: str
) -> None:
    make, status, name, words = WRONG_FILES[case]
    content = make(tmp_path)
    before = fake_server.traces()
    answer = http.post("/v1/remix", files={"song": ("song.mp3", content)})
    assert words in problem_of(answer, status, name)["detail"]
    assert fake_server.traces_become(before) == before


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_refused_and_leave_no_trace(
    fake_server: ServerProcess, http: httpx.Client, case: str
) -> None:
    options, status, name, words = WRONG_OPTIONS[case]
    before = fake_server.traces()
    answer = http.post("/v1/remix", files={"song": ("song.wav", wav())}, data={"options": options})
    assert words in problem_of(answer, status, name)["detail"]
    assert fake_server.traces_become(before) == before


def megabytes(count: int, sent: list[int]) -> Iterator[bytes]:
    yield b'--b\r\nContent-Disposition: form-data; name="song"; filename="song.wav"\r\n\r\n'
    for _ in range(count):
        sent.append(1)
        yield bytes(1_000_000)
    yield b"\r\n--b--\r\n"


@pytest.mark.parametrize("is_length_declared", [True, False])
def test_upload_of_300_megabytes_is_refused_before_it_is_all_there(
    fake_server: ServerProcess, http: httpx.Client, is_length_declared: bool
) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    if is_length_declared:
        headers["Content-Length"] = str(sum(len(part) for part in megabytes(300, [])))
    before = fake_server.traces()
    most_bytes = 0
    done = threading.Event()

    def watch_disk() -> None:
        nonlocal most_bytes
        while not done.wait(0.02):
            most_bytes = max(most_bytes, temporary_bytes(fake_server))

    watcher = threading.Thread(target=watch_disk)
    watcher.start()
    try:
        answer = http.post("/v1/remix", content=megabytes(300, []), headers=headers)
    finally:
        done.set()
        watcher.join()
    problem_of(answer, 413, "limit-exceeded")
    # Declared: not a byte is kept. Counted: what came before the limit, and no more.
    assert most_bytes <= (0 if is_length_declared else BODY_LIMIT)
    assert fake_server.traces_become(before) == before


def temporary_bytes(server: ServerProcess) -> int:
    """Bytes in files of the server's temporary folder, those without a name too."""
    total = 0
    for pid in server.pids():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                if str(link.readlink()).startswith(str(server.temp_dir)):
                    total += link.stat().st_size
    return total


@pytest.mark.parametrize("path", FORM_ROUTES)
def test_form_without_its_file_is_refused(http: httpx.Client, path: str) -> None:
    part = FORM_ROUTES[path]
    answer = http.post(path, files={"options": (None, "{}")})
    assert problem_of(answer, 400, "malformed-request")["value"] == 0
    answer = http.post(path, files={"options": (None, "{}"), "music": ("song.wav", wav())})
    assert problem_of(answer, 400, "malformed-request")["value"] == "music"
    answer = http.post(path, files=[(part, ("1.wav", wav())), (part, ("2.wav", wav()))])
    assert problem_of(answer, 400, "malformed-request")["value"] == 2


@pytest.mark.parametrize("path", FORM_ROUTES)
def test_file_given_as_an_address_is_not_fetched(http: httpx.Client, path: str) -> None:
    address = f"{http.base_url}/v1/voices"
    answer = http.post(path, files={FORM_ROUTES[path]: (None, address)})
    problem = problem_of(answer, 400, "malformed-request")
    assert "not fetched" in problem["detail"]
    assert problem["value"] == address


@pytest.mark.parametrize("path", FORM_ROUTES)
@pytest.mark.parametrize(
    "media_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""]
)
def test_body_that_is_no_form_is_refused(http: httpx.Client, path: str, media_type: str) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    answer = http.post(path, content=b"song=1", headers=headers)
    assert problem_of(answer, 415, "unsupported-media-type")["limit"] == "multipart/form-data"


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=b"])
def test_damaged_form_is_refused(http: httpx.Client, content_type: str) -> None:
    answer = http.post("/v1/remix", content=b"??", headers={"Content-Type": content_type})
    problem_of(answer, 400, "malformed-request")


def test_unknown_route_and_method_are_problems(http: httpx.Client) -> None:
    assert problem_of(http.get("/v2/remix"), 404, "no-such-route")["value"] == "/v2/remix"
    for path in [*FORM_ROUTES]:
        problem = problem_of(http.delete(path), 405, "method-not-allowed")
        assert (problem["value"], problem["limit"]) == ("DELETE", "POST")
    for path in ["/v1/voices", "/livez", "/readyz", "/metrics"]:
        assert problem_of(http.post(path), 405, "method-not-allowed")["value"] == "POST"


@pytest.mark.parametrize(
    ("accept", "media_type", "magic"),
    [
        (None, "audio/wav", b"RIFF"),
        ("*/*", "audio/wav", b"RIFF"),
        ("audio/*;q=0.5, audio/flac", "audio/flac", b"fLaC"),
        ("audio/mp3", "audio/mpeg", b"\xff\xfb"),
        ("image/png, audio/x-flac;q=0.1", "audio/flac", b"fLaC"),
        ("application/zip", "application/zip", b"PK"),
    ],
)
def test_remix_is_answered_as_the_caller_accepts(
    http: httpx.Client, accept: str | None, media_type: str, magic: bytes
) -> None:
    headers = {"Accept": accept} if accept else {}
    request = http.build_request("POST", "/v1/remix", files={"song": ("s", wav())}, headers=headers)
    if accept is None:
        del request.headers["Accept"]
    answer = http.send(request)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.content.startswith(magic)


@pytest.mark.parametrize("accept", ["image/png", "audio/wav;q=0, audio/flac;q=0", "text/*"])
def test_answer_that_nobody_can_give_is_refused(http: httpx.Client, accept: str) -> None:
    answer = http.post("/v1/separate", files={"song": ("s", wav())}, headers={"Accept": accept})
    assert problem_of(answer, 406, "not-acceptable")["limit"] == ["application/zip"]


def test_zip_holds_everything(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/remix", files={"song": ("s", wav())}, headers={"Accept": "application/zip"}
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        report = json.loads(archive.read("report.json"))
    assert {"remix.wav", "notes.mid", "generated.mid", "voice.wav", "report.png"} <= names
    assert any(name.startswith("stems/") for name in names)
    assert report


def test_each_stage_answers_alone(http: httpx.Client) -> None:
    notes = ("notes.json", json.dumps(NOTES))
    heard = http.post(
        "/v1/transcribe", files={"song": ("s", wav())}, headers={"Accept": "application/json"}
    )
    assert heard.json()["tracks"]
    written = http.post("/v1/generate", files={"notes": notes})
    assert written.headers["content-type"] == "audio/midi"
    assert written.content.startswith(b"MThd")
    again = http.post(
        "/v1/generate",
        files={"notes": ("n.mid", written.content)},
        headers={"Accept": "application/json"},
    )
    assert again.json()["tracks"]
    for sound in [
        http.post("/v1/convert", files={"vocals": ("s", wav())}),
        http.post("/v1/synthesize", files={"notes": notes}),
    ]:
        assert sound.headers["content-type"] == "audio/wav", sound.text
        assert soundfile.info(io.BytesIO(sound.content)).frames > 0
    stems = http.post("/v1/separate", files={"song": ("s", wav())})
    assert zipfile.ZipFile(io.BytesIO(stems.content)).namelist()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"tracks": {"piano": [{"pitch": 300}]}}', b"MThd", b"MThd" * 20]
)
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/synthesize"])
def test_damaged_notes_are_refused(
    fake_server: ServerProcess, http: httpx.Client, path: str, content: bytes
) -> None:
    before = fake_server.traces()
    answer = http.post(path, files={"notes": ("notes", content)})
    problem_of(answer, 422, "invalid-notes")
    assert fake_server.traces_become(before) == before


def events_of(http: httpx.Client, request_id: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    with http.stream("GET", "/v1/progress", params={"request_id": request_id}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    for event, data in zip(lines[::2], lines[1::2], strict=True):
        events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_progress_of_a_request_rises_to_its_end(http: httpx.Client) -> None:
    request_id = uuid.uuid4().hex
    events: list[tuple[str, dict[str, Any]]] = []
    # The watcher comes first: it may wait for the request.
    watcher = threading.Thread(target=lambda: events.extend(events_of(http, request_id)))
    watcher.start()
    http.post(
        "/v1/remix", files={"song": ("s", wav())}, headers={"X-Request-Id": request_id}
    ).raise_for_status()
    watcher.join(10.0)
    assert events[-1] == ("end", {"outcome": "done"})
    fractions = [data["fraction"] for name, data in events if name == "progress"]
    assert len(fractions) > 3
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    # Who comes late learns the end.
    assert events_of(http, request_id)[-1] == ("end", {"outcome": "done"})


def test_progress_of_a_failed_request_says_so(http: httpx.Client) -> None:
    request_id = uuid.uuid4().hex
    http.post("/v1/remix", files={"song": ("s", b"")}, headers={"X-Request-Id": request_id})
    assert events_of(http, request_id) == [("end", {"outcome": "failed"})]


def test_progress_of_nobody_is_refused(http: httpx.Client) -> None:
    missing = problem_of(http.get("/v1/progress"), 422, "malformed-request")
    assert "0 parameters named request_id" in missing["detail"]


@pytest.mark.slow
def test_progress_of_a_request_that_never_comes_is_refused(http: httpx.Client) -> None:
    answer = http.get("/v1/progress?request_id=nobody", timeout=30)
    assert problem_of(answer, 404, "no-such-request")["value"] == "nobody"
    problem_of(http.get("/v1/progress?request_id=a b"), 400, "malformed-request")


def test_request_id_that_is_wrong_or_taken_is_refused(http: httpx.Client) -> None:
    for request_id in ["a b", "a" * 65, "../../etc"]:
        answer = http.post(
            "/v1/remix", files={"song": ("s", wav())}, headers={"X-Request-Id": request_id}
        )
        problem_of(answer, 400, "malformed-request")
    request_id = uuid.uuid4().hex
    headers = {"X-Request-Id": request_id}
    answers: list[httpx.Response] = []

    def post() -> None:
        answers.append(http.post("/v1/remix", files={"song": ("s", wav())}, headers=headers))

    threads = [threading.Thread(target=post) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409]


def test_caller_who_leaves_frees_the_slot_and_leaves_no_trace(
    fake_server: ServerProcess, http: httpx.Client
) -> None:
    before = fake_server.traces()
    options = {"options": json.dumps({"seed": SLOW_SEED})}
    for _ in range(4):  # twice as many as there are slots
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{fake_server.url}/v1/remix",
                files={"song": ("s", wav())},
                data=options,
                timeout=httpx.Timeout(10.0, read=1.0),
            )
    assert fake_server.traces_become(before) == before
    http.post("/v1/remix", files={"song": ("s", wav())}).raise_for_status()


def test_more_remixes_than_the_limit_are_refused_with_retry_after(http: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def post() -> None:
        answers.append(http.post("/v1/remix", files={"song": ("s", wav())}))

    threads = [threading.Thread(target=post) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 3
    for answer in refused:
        problem_of(answer, 429, "queue-full")
        assert int(answer.headers["Retry-After"]) > 0


def test_caller_who_stops_sending_leaves_no_trace(fake_server: ServerProcess) -> None:
    before = fake_server.traces()

    def broken() -> Iterator[bytes]:
        yield from megabytes(3, [])
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        httpx.post(
            f"{fake_server.url}/v1/remix",
            content=broken(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
    time.sleep(0.2)
    assert fake_server.traces_become(before) == before


def test_bug_is_a_problem_that_tells_nothing(
    fake_server: ServerProcess, http: httpx.Client
) -> None:
    before = fake_server.traces()
    answer = http.post(
        "/v1/remix", files={"song": ("s", wav())}, data={"options": f'{{"seed": {CRASH_SEED}}}'}
    )
    assert "secret" not in problem_of(answer, 500, "internal")["detail"]
    assert fake_server.traces_become(before) == before


def test_openapi_describes_every_route(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    paths = described["paths"]
    jobs = ["", "/{job_id}", "/{job_id}/events", "/{job_id}/audio"]
    others = ["voices", "models", "progress", "quote", "keys", "keys/{key_id}"]
    assert set(paths) == {
        *FORM_ROUTES,
        *(f"/v1/jobs{path}" for path in jobs),
        "/v1/jobs/{job_id}/artifacts/{name}",
        *(f"/v1/{path}" for path in others),
    }
    for path, part in FORM_ROUTES.items():
        operation = paths[path]["post"]
        (form,) = operation["requestBody"]["content"].values()
        assert form["schema"]["required"] == [part]
        assert "options" in form["schema"]["properties"]
        for status in ["400", "404", "406", "413", "415", "422", "429", "503", "504"]:
            (content,) = operation["responses"][status]["content"].items()
            assert content[0] == PROBLEM
            assert content[1]["examples"]
    assert "Problem" in described["components"]["schemas"]


def test_openapi_examples_of_problems_are_whole_answers(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    operations = [*(paths[path]["post"] for path in FORM_ROUTES), paths["/v1/progress"]["get"]]
    for operation in operations:
        for status, answer in operation["responses"].items():
            for name, example in answer["content"].get(PROBLEM, {}).get("examples", {}).items():
                body = example["value"]
                assert (body["status"], body["type"].split(":")[-1]) == (int(status), name)
                assert {"detail", "value", "limit", "remedy"} <= set(body), name
    assert http.get("/docs").status_code == 200
    assert http.get("/static_content/swagger-ui-bundle.js").status_code == 200


def test_lists_say_whose_the_models_and_voices_are(http: httpx.Client) -> None:
    for model in http.get("/v1/models").json()["models"]:
        assert model["weights"] in {"published", "trained-here", "random"}
        assert model["licence"]
        if model["installed"]:
            assert all(len(file["sha256"]) == 64 for file in model["files"])
    assert "voices" in http.get("/v1/voices").json()
