"""The gRPC face, over a real port: what is answered, what is refused, what is left behind.

Behind it stands a fake composer (`tests.fakes`), as in `test_http_api.py`; the real flow is tested
over the same port in `test_grpc_service.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from grpc_api.answering import Inside, watching
from remix.options import ConvertOptions, GenerateOptions, RemixOptions, SeparateOptions
from remix_v1 import remix_pb2 as messages
from tests.conftest import CRASH_SEED, ROOT, SLOW_SEED, ServerProcess, Traces
from tests.grpc_caller import calling, collect, refusal_of, upload
from tests.test_http_api import NOTES, WRONG_FILES, wav

Code = grpc.StatusCode
SERVICE = "remix.v1.RemixService"
PROTO = ROOT / "proto/remix/v1/remix.proto"

CODES = {"invalid-audio": Code.INVALID_ARGUMENT, "limit-exceeded": Code.OUT_OF_RANGE}

SETTLE_S = 20.0
"""How long a cancelled call may take to be gone, on a busy machine."""


@pytest.fixture(scope="module")
def stub(fake_server: ServerProcess) -> Iterator[Any]:
    with calling(fake_server.grpc_address) as stub:
        # Warm-up: what is opened once (metrics, the first decoder's pipes) is open from here on.
        collect(stub.Remix(remix(), timeout=60.0))
        httpx.post(f"{fake_server.url}/v1/remix", files={"song": ("s", wav())}, timeout=60.0)
        yield stub


@pytest.fixture(scope="module")
def idle(stub: Any, fake_server: ServerProcess) -> Traces:
    """What there is while nobody calls."""
    return fake_server.traces()


@pytest.fixture(scope="module")
def channel(fake_server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(fake_server.grpc_address) as channel:
        yield channel


def remix(data: bytes | None = None, **head: Any) -> Iterator[Any]:
    options = messages.RemixOptions(**head.pop("options", {}))
    data = wav() if data is None else data
    return upload(messages.RemixRequest, messages.RemixHead(options=options, **head), data)


def refusal(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        collect(call)
    return refusal_of(caught.value)


@pytest.mark.parametrize(
    ("file_format", "media_type", "name"),
    [
        (messages.AUDIO_FORMAT_UNSPECIFIED, "audio/wav", "remix.wav"),
        (messages.AUDIO_FORMAT_FLAC, "audio/flac", "remix.flac"),
        (messages.AUDIO_FORMAT_MP3, "audio/mpeg", "remix.mp3"),
    ],
)
def test_remix_is_that_of_http(
    stub: Any, fake_server: ServerProcess, file_format: int, media_type: str, name: str
) -> None:
    answer = collect(stub.Remix(remix(format=file_format), timeout=60.0))
    over_http = httpx.post(
        f"{fake_server.url}/v1/remix",
        files={"song": ("s", wav())},
        headers={"Accept": media_type},
        timeout=60.0,
    )
    assert answer.files == {name: over_http.content}
    info = answer.infos[name]
    assert info.media_type == media_type
    assert info.size_bytes == len(over_http.content)
    assert info.sha256 == hashlib.sha256(over_http.content).hexdigest()


def test_everything_of_a_remix_comes_in_one_stream(stub: Any) -> None:
    answer = collect(stub.Remix(remix(everything=True), timeout=60.0))
    assert set(answer.files) == {
        "remix.wav", "stems/vocals.wav", "notes.mid", "generated.mid", "voice.wav",
        "report.json", "report.png",
    }  # fmt: skip
    for name, content in answer.files.items():
        assert answer.infos[name].sha256 == hashlib.sha256(content).hexdigest()


def test_progress_grows_to_the_whole(stub: Any) -> None:
    progress = collect(stub.Remix(remix(), timeout=60.0)).progress
    assert {stage for stage, _ in progress} == {"separate_stems"}
    fractions = [fraction for _, fraction in progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_stages_answer_what_http_answers(stub: Any, fake_server: ServerProcess) -> None:
    notes = str(NOTES).replace("'", '"').encode()
    midi, json = messages.NOTES_FORMAT_MIDI, messages.NOTES_FORMAT_JSON
    m = messages
    calls: list[tuple[Any, Any, Any, str, str, bytes, str]] = [
        (stub.Transcribe, m.TranscribeRequest, m.TranscribeHead(format=midi), "/v1/transcribe",
         "song", wav(), "audio/midi"),
        (stub.Transcribe, m.TranscribeRequest, m.TranscribeHead(format=json), "/v1/transcribe",
         "song", wav(), "application/json"),
        (stub.Generate, m.GenerateRequest, m.GenerateHead(format=json), "/v1/generate",
         "notes", notes, "application/json"),
        (stub.Convert, m.ConvertRequest, m.ConvertHead(), "/v1/convert",
         "vocals", wav(), "audio/wav"),
        (stub.Synthesize, m.SynthesizeRequest, m.SynthesizeHead(), "/v1/synthesize",
         "notes", notes, "audio/wav"),
    ]  # fmt: skip
    for call, request, head, route, part, data, media_type in calls:
        answer = collect(call(upload(request, head, data), timeout=60.0))
        over_http = httpx.post(
            fake_server.url + route,
            files={part: ("f", data)},
            headers={"Accept": media_type},
            timeout=60.0,
        )
        assert list(answer.files.values()) == [over_http.content], route


@pytest.mark.parametrize("name", sorted(WRONG_FILES))
def test_wrong_file_is_refused_with_what_to_do(stub: Any, tmp_path: Path, name: str) -> None:
    make, _, kind, detail = WRONG_FILES[name]
    found = refusal(stub.Remix(remix(make(tmp_path)), timeout=60.0))
    assert found.code is CODES[kind]
    assert found.reason == kind.upper().replace("-", "_")
    assert detail in found.message
    assert found.remedy in found.message
    (violation,) = found.details["BadRequest"].field_violations
    assert violation.description == found.message
    assert violation.field == ("chunk" if kind == "invalid-audio" else "")


@pytest.mark.parametrize(
    ("options", "value", "limit"),
    [
        ({"temperature": 9.0}, 9.0, {"exclusiveMinimum": 0.0, "maximum": 2.0, "type": "number"}),
        ({"temperature": float("nan")}, "nan", None),
        ({"mode": "louder"}, "louder", None),
        ({"octaves": 4}, 4, None),
        ({"seed": -1}, -1, None),
    ],
)
def test_option_out_of_range_is_refused_with_its_range(
    stub: Any, options: dict[str, Any], value: Any, limit: Any
) -> None:
    found = refusal(stub.Remix(remix(options=options), timeout=60.0))
    assert (found.code, found.reason) == (Code.INVALID_ARGUMENT, "INVALID_OPTION")
    assert found.value == value
    assert found.limit is not None
    assert limit in (None, found.limit)
    (violation,) = found.details["BadRequest"].field_violations
    assert violation.description == found.message


def test_unknown_voice_is_not_found_and_the_known_ones_are_named(stub: Any) -> None:
    found = refusal(stub.Remix(remix(options={"voice": "nobody"}), timeout=60.0))
    assert (found.code, found.reason, found.value) == (Code.NOT_FOUND, "NOT_FOUND", "nobody")
    assert "carlo" in found.limit


def test_unknown_format_is_refused(stub: Any) -> None:
    found = refusal(stub.Remix(remix(format=99), timeout=60.0))
    assert (found.code, found.reason, found.value) == (Code.INVALID_ARGUMENT, "INVALID_OPTION", 99)


def test_notes_that_are_none_are_refused(stub: Any) -> None:
    request = upload(messages.SynthesizeRequest, messages.SynthesizeHead(), b"la la")
    found = refusal(stub.Synthesize(request, timeout=60.0))
    assert (found.code, found.reason) == (Code.INVALID_ARGUMENT, "INVALID_NOTES")


@pytest.mark.parametrize(
    ("requests", "value"),
    [
        ([], "nothing"),
        ([messages.RemixRequest(chunk=b"song")], "chunk"),
        ([messages.RemixRequest(head=messages.RemixHead())] * 2, "head"),
        ([messages.RemixRequest()], "nothing"),
    ],
)
def test_messages_out_of_order_are_refused(stub: Any, requests: list[Any], value: str) -> None:
    found = refusal(stub.Remix(iter(requests), timeout=60.0))
    assert (found.code, found.value) == (Code.INVALID_ARGUMENT, value)


def test_upload_over_the_limit_is_refused_while_it_streams(
    stub: Any, fake_server: ServerProcess, idle: Traces
) -> None:
    """Nobody waits for its end: it has none."""
    sent_bytes = 0

    def endless() -> Iterator[Any]:
        nonlocal sent_bytes
        yield messages.RemixRequest(head=messages.RemixHead())
        while sent_bytes < 1_000_000_000:
            sent_bytes += 1 << 20
            yield messages.RemixRequest(chunk=bytes(1 << 20))

    found = refusal(stub.Remix(endless(), timeout=120.0))
    assert (found.code, found.reason) == (Code.OUT_OF_RANGE, "LIMIT_EXCEEDED")
    assert found.limit == 200_000_000 < found.value <= 200_000_000 + (1 << 20)
    # Beyond the limit goes what is buffered on the way.
    assert sent_bytes < 250_000_000
    assert fake_server.traces_become(idle) == idle


def test_message_over_4_mb_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        collect(stub.Remix(remix(bytes(1), options={"separator": "x" * (4 << 20)}), timeout=60.0))
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED


def test_bug_of_ours_is_internal_and_does_not_tell_its_text(stub: Any) -> None:
    found = refusal(stub.Remix(remix(options={"seed": CRASH_SEED}), timeout=60.0))
    assert (found.code, found.reason) == (Code.INTERNAL, "INTERNAL")
    assert "secret" not in str(found)


def begun(stub: Any) -> Any:
    """A remix that takes hours, and has begun."""
    call = stub.Remix(remix(options={"seed": SLOW_SEED}), timeout=120.0)
    assert next(call).WhichOneof("event") == "progress"
    return call


def both_slots_are_free(stub: Any) -> None:
    """At once or very soon."""
    until_s = time.monotonic() + SETTLE_S
    while True:
        with ExitStack() as stack:
            try:
                for _ in range(2):
                    stack.callback(begun(stub).cancel)
                return
            except grpc.RpcError as error:
                if refusal_of(error).reason != "QUEUE_FULL" or time.monotonic() > until_s:
                    raise


def test_caller_who_cancels_frees_the_slot_and_leaves_nothing(
    stub: Any, fake_server: ServerProcess, idle: Traces
) -> None:
    both_slots_are_free(stub)
    with ExitStack() as stack:
        for _ in range(2):
            stack.callback(begun(stub).cancel)
        found = refusal(stub.Remix(remix(), timeout=60.0))
        assert (found.code, found.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (found.value, found.limit) == (2, 2)
        assert found.details["QuotaFailure"].violations[0].description == found.message
        assert found.details["RetryInfo"].retry_delay.seconds > 0
        # The slots are those of HTTP.
        over_http = httpx.post(
            f"{fake_server.url}/v1/remix", files={"song": ("s", wav())}, timeout=60.0
        )
        assert over_http.status_code == 429
    both_slots_are_free(stub)
    assert fake_server.traces_become(idle) == idle


def test_deadline_ends_the_call_and_frees_the_slot(stub: Any) -> None:
    both_slots_are_free(stub)
    calls = [stub.Remix(remix(options={"seed": SLOW_SEED}), timeout=1.0) for _ in range(2)]
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            collect(call)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
    both_slots_are_free(stub)


def test_caller_who_goes_away_while_he_uploads_leaves_nothing(
    stub: Any, fake_server: ServerProcess, idle: Traces
) -> None:
    sent, gone = threading.Event(), threading.Event()

    def half() -> Iterator[Any]:
        yield messages.RemixRequest(head=messages.RemixHead())
        yield messages.RemixRequest(chunk=bytes(100_000))
        sent.set()
        gone.wait(60.0)

    call = stub.Remix(half(), timeout=60.0)
    assert sent.wait(60.0)
    call.cancel()
    gone.set()
    both_slots_are_free(stub)
    assert fake_server.traces_become(idle) == idle


def test_calls_are_counted_by_how_they_ended(stub: Any, fake_server: ServerProcess) -> None:
    def count(code: str) -> float:
        text = httpx.get(f"{fake_server.url}/metrics", timeout=60.0).text
        line = rf'^philharmonics_grpc_seconds_count{{code="{code}",method="Remix"}} (\S+)'
        found = re.search(line, text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    fine, refused = count("OK"), count("INVALID_ARGUMENT")
    collect(stub.Remix(remix(), timeout=60.0))
    refusal(stub.Remix(remix(b""), timeout=60.0))
    assert (count("OK"), count("INVALID_ARGUMENT")) == (fine + 1, refused + 1)


def test_lists_are_those_of_http(stub: Any, fake_server: ServerProcess) -> None:
    voices = stub.ListVoices(messages.ListVoicesRequest(), timeout=60.0).voices
    over_http = httpx.get(f"{fake_server.url}/v1/voices", timeout=60.0).json()["voices"]
    assert [
        {name: getattr(voice, name) for name in ("name", "model", "weights", "licence", "default")}
        for voice in voices
    ] == [{k: v for k, v in voice.items() if k != "source"} for voice in over_http]
    models = stub.ListModels(messages.ListModelsRequest(), timeout=60.0).models
    over_http = httpx.get(f"{fake_server.url}/v1/models", timeout=60.0).json()["models"]
    assert [(m.name, m.stage, m.installed, m.default) for m in models] == [
        (m["name"], m["stage"], m["installed"], m["default"]) for m in over_http
    ]
    assert [[f.sha256 for f in m.files] for m in models] == [
        [f["sha256"] or "" for f in m["files"]] for m in over_http
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RemixOptions, messages.RemixOptions),
        (SeparateOptions, messages.SeparateOptions),
        (GenerateOptions, messages.GenerateOptions),
        (ConvertOptions, messages.ConvertOptions),
    ],
)
def test_every_option_is_in_the_proto(options: Any, message: Any) -> None:
    assert {field.name for field in message.DESCRIPTOR.fields} == set(options.model_fields)
    for field in message.DESCRIPTOR.fields:
        assert field.is_repeated or field.has_presence, "what is unset must be told from 0"


def test_health_is_told_by_name(channel: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60.0)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="remix.v2"), timeout=60.0)
    assert caught.value.code() is Code.NOT_FOUND


def test_reflection_tells_the_services_and_their_messages(channel: Any) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = reflection.ServerReflectionInfo(
        iter(
            [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            ]
        ),
        timeout=60.0,
    )
    listed, described = asked
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    files = [
        FileDescriptorProto.FromString(file)
        for file in described.file_descriptor_response.file_descriptor_proto
    ]
    (service,) = [service for file in files for service in file.service]
    assert {method.name for method in service.method} == set(
        messages.DESCRIPTOR.services_by_name["RemixService"].methods_by_name
    )


def test_committed_code_is_what_the_compiler_makes(tmp_path: Path) -> None:
    """`make proto` was run."""
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Iremix_v1=proto/remix/v1",
         f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
         "remix_v1/remix.proto"],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    for made in (tmp_path / "remix_v1").iterdir():
        assert made.read_text() == (ROOT / "remix_v1" / made.name).read_text(), made.name


PYTHON_CLIENT = """
import sys
import grpc
from remix.v1 import remix_pb2, remix_pb2_grpc

address, song = sys.argv[1:]
with grpc.insecure_channel(address) as channel, open(song, "rb") as file:
    def requests():
        yield remix_pb2.RemixRequest(head=remix_pb2.RemixHead(options={"seed": 7}))
        while chunk := file.read(1 << 16):
            yield remix_pb2.RemixRequest(chunk=chunk)
    events = remix_pb2_grpc.RemixServiceStub(channel).Remix(requests(), timeout=60)
    sys.stdout.buffer.write(b"".join(event.chunk for event in events))
"""


def test_python_client_of_the_proto_alone_gets_the_remix(
    stub: Any, fake_server: ServerProcess, tmp_path: Path
) -> None:
    """Another project's client: the .proto file, and nothing else of ours."""
    (tmp_path / "song.wav").write_bytes(wav())
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
         f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", "remix/v1/remix.proto"],
        check=True,
    )  # fmt: skip
    # Where our own package of that name is installed, one without this file comes after it.
    (tmp_path / "remix/__init__.py").touch()
    client = subprocess.run(
        [sys.executable, "-c", PYTHON_CLIENT, fake_server.grpc_address, "song.wav"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    assert client.stdout == collect(stub.Remix(remix(), timeout=60.0)).files["remix.wav"]


def test_watcher_who_comes_while_the_server_stops_is_sent_off_too() -> None:
    class Told(Exception):
        """What ends a call, as gRPC does it."""

    class Servicer:
        inside = Inside()

        @watching
        async def watch(self, request: object, context: object) -> None:
            await asyncio.Event().wait()

    class Context:
        def invocation_metadata(self) -> tuple[()]:
            return ()

        async def abort(self, code: grpc.StatusCode, *_: object) -> None:
            assert code is grpc.StatusCode.UNAVAILABLE
            raise Told

    async def work() -> None:
        servicer = Servicer()
        await servicer.inside.leave()
        call = asyncio.ensure_future(servicer.watch(None, Context()))
        ended, _ = await asyncio.wait([call], timeout=20.0)
        assert ended == {call}
        with pytest.raises(Told):
            await call

    asyncio.run(work())
