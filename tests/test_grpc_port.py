"""The gRPC port of a service that starts, serves and stops, in this process; and who may."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from grpc_api.guard import NEEDS, SERVICE, Guard
from grpc_service import GrpcService, check_port
from jobs.database import Database, open_database
from jobs.desk import Desk
from jobs.door import Door
from jobs.jobs import Jobs
from jobs.keys import SCOPES, KeyStore
from remix.manifest import read_manifest
from remix.settings import Settings, read_settings
from remix_v1 import remix_pb2 as messages
from remix_v1 import remix_pb2_grpc as protocol
from tests.conftest import ROOT, SLOW_SEED, free_ports
from tests.fakes import FakeComposer, no_infer
from tests.grpc_caller import refusal_of, upload
from tests.test_http_api import wav

Code = grpc.StatusCode
Status = health_pb2.HealthCheckResponse

HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
"""What needs no key; `grpc_api.guard` says why."""

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

LIMIT_S = 60.0


@dataclass
class Readiness:
    """Whether the service behind the port can answer."""

    is_ready: bool = True


@dataclass(frozen=True)
class Port:
    """A running one.

    Args:
        settings: of all of it.
        database: of the keys and jobs.
        desk: behind it.
        service: under test.
        channel: to it.
        stub: of it.
        keys: where callers' keys are.
        readiness: what the service is told to be.
    """

    settings: Settings
    database: Database
    desk: Desk
    service: GrpcService
    channel: Any
    stub: Any
    keys: KeyStore
    readiness: Readiness


@asynccontextmanager
async def port(folder: Path, **variables: str) -> AsyncIterator[Port]:
    settings = settings_of(folder, **variables)
    desk, database = Desk(settings), Database(open_database(settings.database_url))
    desk.keys = KeyStore(database)
    if desk.door.asks_for_keys:
        await desk.door.open(desk.keys.list)
    desk.open(FakeComposer(settings, read_manifest(), no_infer))
    readiness = Readiness()
    service = GrpcService(desk, settings, lambda: readiness.is_ready)
    await service.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel:
            stub = protocol.RemixServiceStub(channel)
            yield Port(settings, database, desk, service, channel, stub, desk.keys, readiness)
    finally:
        await service.stop()
        await desk.door.close()
        database.close()


@asynccontextmanager
async def jobs_of(running: Port) -> AsyncIterator[None]:
    """Real jobs behind the port, over the fake composer."""
    jobs = Jobs(running.settings, running.desk.composer, running.desk.estimator, running.database)
    await jobs.start()
    running.desk.open(running.desk.composer, jobs)
    try:
        yield
    finally:
        await jobs.stop()


def settings_of(folder: Path, **variables: str) -> Settings:
    (grpc_port,) = free_ports(1)
    return read_settings(
        {
            "PHILHARMONICS_DATA_DIR": str(folder),
            "PHILHARMONICS_GRPC_PORT": str(grpc_port),
            "PHILHARMONICS_DRAIN_S": "30",
            **{f"PHILHARMONICS_{name}": value for name, value in variables.items()},
        }
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


def remix(seed: int) -> Any:
    head = messages.RemixHead(options=messages.RemixOptions(seed=seed))
    return upload(messages.RemixRequest, head, wav())


async def call_blank(port: Port, method: str, key: str | None) -> Any:
    """How a call with an empty message ends, whatever its method."""
    call = port.channel.stream_stream(method)(
        iter([b""]), timeout=LIMIT_S, metadata=[("authorization", f"Bearer {key}")] if key else None
    )
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if error.code() in {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED}:
            assert refusal_of(error).remedy
    return await call.code()


def methods() -> list[str]:
    """Every one that the server answers, by itself or through a library."""
    return [f"/{SERVICE.full_name}/{name}" for name in SERVICE.methods_by_name] + [REFLECTION]


def test_no_call_is_unguarded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path, KEYS="on") as running:
            keys = {
                scope: (await running.keys.add(scope, (scope,), rate_per_minute=10**6))[0]
                for scope in SCOPES
            }
            for method in methods():
                for wrong in (None, "phk_none", keys["remix"][:-1] + "x"):
                    assert await call_blank(running, method, wrong) is Code.UNAUTHENTICATED, method
                need = NEEDS[method]
                for scope in SCOPES:
                    is_refused = need in SCOPES and scope != need
                    code = await call_blank(running, method, keys[scope])
                    assert (code is Code.PERMISSION_DENIED) == is_refused, (method, scope)
                    assert code is not Code.UNAUTHENTICATED

    run(scenario())


def test_only_health_is_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path, KEYS="on") as running:
            health = health_pb2_grpc.HealthStub(running.channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status is not None

    assert {method for method, need in NEEDS.items() if need == "nothing"} == set(HEALTH)
    assert set(NEEDS) == {*methods(), *HEALTH}
    run(scenario())


def test_method_without_a_row_needs_the_widest_scope(tmp_path: Path) -> None:
    """A service that somebody adds is closed until it has one."""

    async def answer(request: Any, context: Any) -> bytes:
        return b""

    handler = grpc.unary_unary_rpc_method_handler(answer)

    async def scenario() -> None:
        database = Database(open_database(settings_of(tmp_path).database_url))
        store, door = KeyStore(database), Door(asks_for_keys=True)
        await door.open(store.list)
        server = grpc.aio.server(interceptors=[Guard(door)])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("new.Service", {"Call": handler}),)
        )
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            for scope in SCOPES:
                key, _ = await store.add(scope, (scope,))
                call = channel.unary_unary("/new.Service/Call")(
                    b"", metadata=[("authorization", f"bearer {key}")]
                )
                expected = Code.OK if scope == "admin" else Code.PERMISSION_DENIED
                assert await call.code() is expected
        await server.stop(None)
        await door.close()
        database.close()

    run(scenario())


def test_health_follows_readiness(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path) as running:
            running.readiness.is_ready = False
            health = health_pb2_grpc.HealthStub(running.channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
            # The first watcher's leaving must not deafen the second.
            first, second = health.Watch(request), health.Watch(request)
            for watch in (first, second):
                while (await watch.read()).status != Status.NOT_SERVING:
                    pass
            first.cancel()
            running.readiness.is_ready = True
            assert (await second.read()).status == Status.SERVING
            assert (await health.Check(request)).status == Status.SERVING
            running.readiness.is_ready = False
            assert (await second.read()).status == Status.NOT_SERVING
            unknown = health.Watch(health_pb2.HealthCheckRequest(service="remix.v2"))
            assert (await unknown.read()).status == Status.SERVICE_UNKNOWN

    run(scenario())


def test_stopping_service_ends_what_it_has_begun_and_takes_nothing_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path) as running:
            health = health_pb2_grpc.HealthStub(running.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            while (await watch.read()).status != Status.SERVING:
                pass
            begun = running.stub.Remix(remix(seed=10))
            await begun.read()
            drained = asyncio.create_task(running.service.drain())
            assert (await watch.read()).status == Status.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running.stub.ListVoices(messages.ListVoicesRequest())
            assert caught.value.code() is Code.UNAVAILABLE
            last: Any = None
            while (event := await begun.read()) is not grpc.aio.EOF:
                last = event
            assert last.WhichOneof("event") == "chunk"
            assert await begun.code() is Code.OK
            await drained

    run(scenario())


def test_stopping_service_sends_watchers_on(tmp_path: Path) -> None:
    """They would hold up its end for as long as a job takes, and can go on elsewhere."""

    async def scenario() -> None:
        async with port(tmp_path) as running, jobs_of(running):
            options = messages.RemixOptions(seed=SLOW_SEED)
            head = messages.SubmitRemixHead(options=options, job_id="long")
            await running.stub.SubmitRemix(upload(messages.SubmitRemixRequest, head, wav()))
            watch = running.stub.WatchJob(messages.WatchJobRequest(job_id="long"))
            await watch.read()
            drained = asyncio.create_task(running.service.drain())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await watch.read() is not grpc.aio.EOF:
                    pass
            await drained
            found = refusal_of(caught.value)
            assert (found.code, found.reason) == (Code.UNAVAILABLE, "RUNNER_UNAVAILABLE")
            assert found.details["RetryInfo"].retry_delay.seconds > 0

    run(scenario())


def test_caller_who_lingers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path) as running:
            reflection = reflection_pb2_grpc.ServerReflectionStub(running.channel)
            lingering = reflection.ServerReflectionInfo()
            await lingering.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            await lingering.read()
            health = health_pb2_grpc.HealthStub(running.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            while (await watch.read()).status != Status.SERVING:
                pass
            begin_s = time.monotonic()
            await running.service.drain()
            assert time.monotonic() - begin_s < 15.0  # and not all of the 30 s that it may take
            assert (await watch.read()).status == Status.NOT_SERVING

    run(scenario())


def test_stop_ends_work_that_would_take_hours(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with port(tmp_path) as running:
            begun = running.stub.Remix(remix(seed=SLOW_SEED))
            await begun.read()
            await running.service.stop()
            assert await begun.code() in {Code.UNAVAILABLE, Code.CANCELLED}

    run(scenario())


def test_service_does_not_start_on_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit, match="PHILHARMONICS_GRPC_PORT"):
            check_port("127.0.0.1", other.getsockname()[1])


def test_grpc_does_not_open_to_strangers_by_itself(tmp_path: Path) -> None:
    """HTTP on the loopback address is no leave to let anybody in beside it."""
    started = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "service:Remix", "--host", "127.0.0.1"],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "BENTOML_HOME": str(tmp_path),
            "HOME": str(tmp_path),
            "PHILHARMONICS_GRPC_HOST": "0.0.0.0",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 1
    assert "does not start on 0.0.0.0" in started.stderr
