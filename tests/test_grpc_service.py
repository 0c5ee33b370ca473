"""Every call over gRPC, over the real service: five real runners, real models, a real song.

The answers are compared with those of HTTP, whose music is tested in `test_remix_service.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import numpy as np
import pytest
import soundfile

from export.demo_song import write_demo_song
from remix_v1 import remix_pb2 as m
from tests.conftest import ROOT, ServerProcess
from tests.grpc_caller import calling, collect, refusal_of, upload

pytestmark = pytest.mark.slow

Code = grpc.StatusCode

DEADLINE_S = 300.0

OPTIONS: dict[str, Any] = {"seed": 7, "noise_seed": 7}


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with calling(server.grpc_address) as stub:
        yield stub


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture(scope="module")
def demo() -> tuple[Any, int]:
    path = ROOT / ".cache/demo_song.mp3"
    write_demo_song(path, ROOT / ".cache/sources")
    samples, rate_hz = soundfile.read(path)
    return samples, rate_hz


@pytest.fixture(scope="module")
def song(demo: tuple[Any, int]) -> bytes:
    """5 s of it."""
    samples, rate_hz = demo
    return wav(samples[: 5 * rate_hz], rate_hz)


def long_song(demo: tuple[Any, int], gain: float) -> bytes:
    """120 s; each gain is a song that the server has not seen, and has nothing of in its cache."""
    samples, rate_hz = demo
    return wav(np.resize(samples, (120 * rate_hz, 2)) * gain, rate_hz)


def wav(samples: Any, rate_hz: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="WAV")
    return file.getvalue()


def remix(song: bytes, **head: Any) -> Iterator[Any]:
    return upload(m.RemixRequest, m.RemixHead(options=m.RemixOptions(**OPTIONS), **head), song)


def submission(song: bytes, job_id: str = "", **options: Any) -> Iterator[Any]:
    head = m.SubmitRemixHead(options=m.RemixOptions(**options), job_id=job_id)
    return upload(m.SubmitRemixRequest, head, song)


@pytest.fixture(scope="module")
def finished(stub: Any, song: bytes) -> Any:
    """A job that is done."""
    job = stub.SubmitRemix(submission(song, "finished", **OPTIONS), timeout=DEADLINE_S)
    for _ in stub.WatchJob(m.WatchJobRequest(job_id=job.id), timeout=DEADLINE_S):
        pass
    return stub.GetJob(m.GetJobRequest(job_id=job.id), timeout=DEADLINE_S)


def heard(stub: Any, job_id: str, offset: int = 0) -> bytes:
    request = m.StreamAudioRequest(job_id=job_id, offset=offset)
    return b"".join(part.chunk for part in stub.StreamAudio(request, timeout=DEADLINE_S))


def artifact(stub: Any, job_id: str, name: str, offset: int = 0) -> tuple[Any, bytes]:
    request = m.GetArtifactRequest(job_id=job_id, name=name, offset=offset)
    first, *rest = stub.GetArtifact(request, timeout=DEADLINE_S)
    return first.file, b"".join(part.chunk for part in rest)


def test_remix_is_that_of_http(stub: Any, http: httpx.Client, song: bytes) -> None:
    answer = collect(stub.Remix(remix(song, everything=True), timeout=DEADLINE_S))
    over_http = http.post(
        "/v1/remix",
        files={"song": ("s", song)},
        data={"options": json.dumps(OPTIONS)},
        headers={"Accept": "application/zip"},
    )
    with zipfile.ZipFile(io.BytesIO(over_http.content)) as archive:
        expected = {name: archive.read(name) for name in archive.namelist()}
    assert set(answer.files) == set(expected)
    assert {stage for stage, _ in answer.progress} == {
        "separate_stems", "transcribe_notes", "generate_notes", "convert_voice", "synthesize_audio",
    }  # fmt: skip
    for name in expected.keys() - {"report.json", "report.png"}:
        assert answer.files[name] == expected[name], name
    # The reports tell different times, and the same music.
    reports = [json.loads(files["report.json"]) for files in (answer.files, expected)]
    assert reports[0]["music"] == reports[1]["music"]


def test_each_stage_answers_what_http_answers(stub: Any, http: httpx.Client, song: bytes) -> None:
    stems = collect(stub.Separate(upload(m.SeparateRequest, m.SeparateHead(), song))).files
    with zipfile.ZipFile(
        io.BytesIO(http.post("/v1/separate", files={"song": ("s", song)}).content)
    ) as archive:
        assert stems == {name: archive.read(name) for name in archive.namelist()}
    vocals = stems.pop("stems/vocals.wav")
    (accompaniment,) = stems.values()

    def over_http(route: str, part: str, data: bytes, **options: Any) -> bytes:
        answer = http.post(
            f"/v1/{route}", files={part: ("f", data)}, data={"options": json.dumps(options)}
        )
        assert answer.status_code == 200, answer.text
        return answer.content

    call = stub.Transcribe(upload(m.TranscribeRequest, m.TranscribeHead(), accompaniment))
    notes = collect(call).files["notes.mid"]
    assert notes == over_http("transcribe", "song", accompaniment)
    head = m.GenerateHead(options=m.GenerateOptions(tracks=["bass", "drums"], seed=2))
    generated = collect(stub.Generate(upload(m.GenerateRequest, head, notes))).files
    assert generated == {
        "generated.mid": over_http("generate", "notes", notes, tracks=["bass", "drums"], seed=2)
    }
    convert_head = m.ConvertHead(options=m.ConvertOptions(voice="carlo", octaves=0))
    sung = collect(stub.Convert(upload(m.ConvertRequest, convert_head, vocals))).files
    assert sung == {"voice.wav": over_http("convert", "vocals", vocals, voice="carlo", octaves=0)}
    played = collect(stub.Synthesize(upload(m.SynthesizeRequest, m.SynthesizeHead(), notes))).files
    assert played == {"band.wav": over_http("synthesize", "notes", notes)}


def test_job_makes_what_the_call_makes(stub: Any, finished: Any, song: bytes) -> None:
    assert finished.state == m.JOB_STATE_DONE
    assert finished.options.seed == 7
    expected = collect(stub.Remix(remix(song), timeout=DEADLINE_S)).files["remix.wav"]
    assert heard(stub, "finished") == expected
    for info in finished.artifacts:
        told, content = artifact(stub, "finished", info.name)
        assert told == info
        assert len(content) == info.size_bytes
        assert hashlib.sha256(content).hexdigest() == info.sha256
    assert artifact(stub, "finished", "remix.wav")[1] == expected


def test_job_is_that_of_http(finished: Any, http: httpx.Client) -> None:
    over_http = http.get("/v1/jobs/finished").json()
    assert over_http["state"] == "done"
    assert [file["sha256"] for file in over_http["artifacts"]] == [
        file.sha256 for file in finished.artifacts
    ]
    audio = http.get("/v1/jobs/finished/audio").content
    assert hashlib.sha256(audio).hexdigest() == finished.artifacts[0].sha256


def test_stream_and_file_go_on_from_an_offset(stub: Any, finished: Any) -> None:
    whole = heard(stub, "finished")
    for offset in (1, 100_000, len(whole) - 1, len(whole)):
        assert heard(stub, "finished", offset) == whole[offset:]
        assert artifact(stub, "finished", "remix.wav", offset)[1] == whole[offset:]


def test_watching_goes_on_after_an_event(stub: Any, finished: Any) -> None:
    request = m.WatchJobRequest(job_id="finished")
    events = list(stub.WatchJob(request, timeout=DEADLINE_S))
    assert [event.id for event in events] == sorted({event.id for event in events})
    assert events[-1].state == m.JOB_STATE_DONE
    seen = events[len(events) // 2].id
    request = m.WatchJobRequest(job_id="finished", after_event=seen)
    rest = list(stub.WatchJob(request, timeout=DEADLINE_S))
    assert rest == [event for event in events if event.id > seen]


def test_same_submission_is_the_same_job_and_another_one_a_conflict(
    stub: Any, finished: Any, song: bytes
) -> None:
    again = stub.SubmitRemix(submission(song, "finished", **OPTIONS), timeout=DEADLINE_S)
    assert (again.id, again.created) == (finished.id, finished.created)
    with pytest.raises(grpc.RpcError) as caught:
        stub.SubmitRemix(submission(song, "finished", seed=8), timeout=DEADLINE_S)
    found = refusal_of(caught.value)
    assert (found.code, found.reason) == (Code.ALREADY_EXISTS, "CONFLICT")


def test_jobs_are_listed_by_pages(stub: Any, song: bytes, finished: Any) -> None:
    for number in range(3):
        stub.SubmitRemix(submission(song, f"page-{number}", seed=number), timeout=DEADLINE_S)
    ids, token = [], ""
    while True:
        request = m.ListJobsRequest(page_size=2, page_token=token)
        page = stub.ListJobs(request, timeout=DEADLINE_S)
        assert len(page.jobs) <= 2
        ids += [job.id for job in page.jobs]
        if not (token := page.next_page_token):
            break
    assert [name for name in ids if name.startswith("page-")] == ["page-2", "page-1", "page-0"]
    assert "finished" in ids
    for number in range(3):
        stub.CancelJob(m.CancelJobRequest(job_id=f"page-{number}"), timeout=DEADLINE_S)
    request = m.ListJobsRequest(state=m.JOB_STATE_DONE)
    states = {job.state for job in stub.ListJobs(request, timeout=DEADLINE_S).jobs}
    assert states == {m.JOB_STATE_DONE}


@pytest.mark.parametrize(
    ("method", "request_", "reason"),
    [
        ("GetJob", m.GetJobRequest(job_id="none"), "NOT_FOUND"),
        ("WatchJob", m.WatchJobRequest(job_id="none"), "NOT_FOUND"),
        ("StreamAudio", m.StreamAudioRequest(job_id="none"), "NOT_FOUND"),
        ("StreamAudio", m.StreamAudioRequest(job_id="finished", offset=-1), "INVALID_OPTION"),
        ("GetArtifact", m.GetArtifactRequest(job_id="none", name="remix.wav"), "NOT_FOUND"),
        ("GetArtifact", m.GetArtifactRequest(job_id="finished", name="../x"), "NOT_FOUND"),
        ("GetArtifact", m.GetArtifactRequest(job_id="finished", name="notes.mid", offset=10**9),
         "INVALID_OPTION"),
        ("CancelJob", m.CancelJobRequest(job_id="none"), "NOT_FOUND"),
        ("ListJobs", m.ListJobsRequest(page_token="none"), "INVALID_OPTION"),
        ("ListJobs", m.ListJobsRequest(page_size=-1), "INVALID_OPTION"),
        ("ListJobs", m.ListJobsRequest(state=cast(Any, 99)), "INVALID_OPTION"),
        ("Quote", m.QuoteRequest(), "INVALID_OPTION"),
        ("Quote", m.QuoteRequest(duration_s=601), "LIMIT_EXCEEDED"),
    ],
)  # fmt: skip
def test_wrong_request_is_refused(
    stub: Any, finished: Any, method: str, request_: Any, reason: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(stub, method)(request_, timeout=DEADLINE_S)
        list(answer)
    found = refusal_of(caught.value)
    assert (found.reason, found.value is not None, bool(found.remedy)) == (reason, True, True)


def test_quote_is_that_of_http(stub: Any, http: httpx.Client) -> None:
    quote = stub.Quote(m.QuoteRequest(duration_s=60.0), timeout=DEADLINE_S)
    over_http = http.post("/v1/quote", json={"duration_s": 60.0}).json()
    assert quote.compute_s == pytest.approx(over_http["compute_s"], abs=0.001)  # rounded there
    assert set(quote.stages_s) == set(over_http["stages"])


def computed(http: httpx.Client) -> dict[str, float]:
    """Batches that each model has computed so far."""
    found = re.findall(
        r'^philharmonics_compute_seconds_count\{model="([^"]+)"\} (\S+)',
        http.get("/metrics").text,
        re.MULTILINE,
    )
    return {model: float(count) for model, count in found}


def settled(http: httpx.Client) -> dict[str, float]:
    """The same, when for 2 s no more has been; that is longer than any window takes."""
    until_s = time.monotonic() + 60.0
    last, since_s = computed(http), time.monotonic()
    while time.monotonic() < until_s:
        now = computed(http)
        if now != last:
            last, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > 2.0:
            return now
        time.sleep(0.2)
    raise AssertionError("The runners go on computing.")


def test_cancelled_call_and_deadline_end_the_compute(
    stub: Any, http: httpx.Client, demo: tuple[Any, int]
) -> None:
    """Of the ten windows that separation would have had, a few at most are computed."""
    before = settled(http)
    call = stub.Remix(remix(long_song(demo, 0.9)), timeout=DEADLINE_S)
    assert next(call).progress.fraction < 0.5
    call.cancel()
    after = settled(http)
    assert after["spleeter-2stems"] - before["spleeter-2stems"] < 6
    with pytest.raises(grpc.RpcError) as caught:
        collect(stub.Remix(remix(long_song(demo, 0.8)), timeout=1.0))
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    before, after = after, settled(http)
    assert after["spleeter-2stems"] - before["spleeter-2stems"] < 6


def test_cancelled_job_ends_its_compute_and_its_stream(
    stub: Any, http: httpx.Client, demo: tuple[Any, int]
) -> None:
    before = settled(http)
    stub.SubmitRemix(submission(long_song(demo, 0.7), "doomed"), timeout=DEADLINE_S)
    sound = stub.StreamAudio(m.StreamAudioRequest(job_id="doomed"), timeout=DEADLINE_S)
    for event in stub.WatchJob(m.WatchJobRequest(job_id="doomed"), timeout=DEADLINE_S):
        if event.WhichOneof("event") == "progress":
            break
    job = stub.CancelJob(m.CancelJobRequest(job_id="doomed"), timeout=DEADLINE_S)
    assert job.state == m.JOB_STATE_CANCELLED
    with pytest.raises(grpc.RpcError) as caught:
        list(sound)
    assert refusal_of(caught.value).reason == "CANCELLED"
    after = settled(http)
    assert after["spleeter-2stems"] - before["spleeter-2stems"] < 6


def test_example_of_the_readme_runs(
    stub: Any, server: ServerProcess, demo: Any, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^## gRPC\n.*?^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    for theirs, ours in (
        ("127.0.0.1:3001", server.grpc_address),
        (".cache/demo_song.mp3", str(ROOT / ".cache/demo_song.mp3")),
        ("out/heard.wav", str(tmp_path / "heard.wav")),
    ):
        assert theirs in example
        example = example.replace(theirs, ours)
    subprocess.run([sys.executable, "-c", example], cwd=ROOT, check=True, timeout=DEADLINE_S)
    request = m.ListJobsRequest(page_size=1)
    (job,) = stub.ListJobs(request, timeout=DEADLINE_S).jobs
    assert job.options.voice == "carlo"
    heard_bytes = (tmp_path / "heard.wav").read_bytes()
    assert hashlib.sha256(heard_bytes).hexdigest() == job.artifacts[0].sha256


UNREACHABLE = ("EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "ENOTFOUND", "ETIMEDOUT")
"""How npm names a network without a registry."""


def node_client(folder: Path) -> Path:
    """The client of `tests/node_client`, its types made of the .proto, compiled; or skip."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            # Node is of use to callers, not to the project: its set-up does not install it.
            pytest.skip(f"There is no {tool} on this machine.")
    shutil.copytree(ROOT / "tests/node_client", folder / "tests/node_client")
    shutil.copytree(ROOT / "proto", folder / "proto")
    client = folder / "tests/node_client"
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    try:
        installed = subprocess.run(install, cwd=client, capture_output=True, timeout=180)
    except subprocess.TimeoutExpired:
        # Out of reach is the registry, not our client at fault; pip's packages are needed anyway.
        pytest.skip("npm cannot fetch the client's packages: no answer in 180 s.")
    said = installed.stderr.decode()
    if any(code in said for code in UNREACHABLE):  # as above; whatever else npm says is our fault
        pytest.skip(f"npm cannot fetch the client's packages: {said[-300:]}")
    assert installed.returncode == 0, said
    for script in ("generate", "build"):
        subprocess.run(["npm", "run", "--silent", script], cwd=client, check=True, timeout=180)
    return client


def test_node_client_submits_watches_and_hears_a_remix(
    stub: Any, server: ServerProcess, song: bytes, tmp_path: Path
) -> None:
    client = node_client(tmp_path)
    (tmp_path / "song.wav").write_bytes(song)
    told = subprocess.run(
        ["node", "built/remix.js", server.grpc_address, tmp_path / "proto",
         tmp_path / "song.wav", tmp_path / "remix.wav"],
        cwd=client,
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )  # fmt: skip
    assert told.stdout.splitlines()[-1] == "JOB_STATE_DONE"
    expected = collect(stub.Remix(remix(song), timeout=DEADLINE_S)).files["remix.wav"]
    assert (tmp_path / "remix.wav").read_bytes() == expected
