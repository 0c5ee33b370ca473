"""The hop between composer and runners: errors that cross it whole, and calls that outlive theirs.

Runners are real processes on real ports that are killed and stopped; where a runner must misbehave
to order, it is a real gRPC server of a few lines.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY
from tritonclient.grpc import service_pb2 as messages

from remix import errors
from remix.settings import Settings
from remix.stages import STAGES
from runners.adaptive_batcher import Workers
from runners.error_details import KEY, decode_error, encode_error
from runners.inference_protocol import SERVICE, STATUS, InferenceServer
from runners.remote_stages import Runners
from runners.retry import MAX_LOST, RetryBudget
from runners.tensor_messages import encode_response
from tests.toy_runner import (
    BREAKS,
    MANIFEST,
    MODEL,
    REFUSED,
    STAGE,
    TAKES_LONG,
    Doubler,
    free_address,
    settings_for,
    toy_runner,
    window,
)

SOON_S = 30.0
"""For what takes a second or two on a machine that is not busy."""


@asynccontextmanager
async def runners_of(settings: Settings) -> AsyncIterator[Runners]:
    runners = Runners(settings, MANIFEST)
    try:
        yield runners
    finally:
        await runners.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.02)


async def doubled(runners: Runners, value: float) -> int:
    """Checks the doubling; tells which process did it."""
    outputs = await runners.for_song()(MODEL, window(value))
    np.testing.assert_array_equal(outputs["y"], np.full((1, 3), 2 * value, np.float32))
    return int(outputs["pid"][0])


Answer = Callable[[Any], Awaitable[bytes | None]]
"""Ends a call by itself, answers it, or lets it be answered."""


@asynccontextmanager
async def scripted(script: list[Answer]) -> AsyncIterator[tuple[str, list[float]]]:
    """A runner that follows a script, then doubles: its address, and when it was called."""
    calls: list[float] = []

    async def infer(_: bytes, context: Any) -> bytes:
        calls.append(time.monotonic())
        if script and (answer := await script.pop(0)(context)) is not None:
            return answer
        return encode_response(
            messages.ModelInferResponse(model_name=MODEL),
            {"y": np.full((1, 3), 2, np.float32), "pid": np.array([os.getpid()])},
        )

    async def ready(_: bytes, context: Any) -> bytes:
        return bytes(messages.ServerReadyResponse(ready=True).SerializeToString())

    methods = {"ModelInfer": infer, "ServerReady": ready}
    handlers = {name: grpc.unary_unary_rpc_method_handler(do) for name, do in methods.items()}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", calls
    finally:
        await server.stop(0)


async def answers(context: Any) -> None:
    pass


async def goes_away(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")


async def is_full(context: Any) -> None:
    full = errors.QueueFull("9 wait; 8 may.", value=9, limit=8, remedy="Wait.")
    status = STATUS[errors.QueueFull]
    await context.abort(status, str(full), ((KEY, encode_error(full, status.value[0])),))


async def hangs(context: Any) -> None:
    await asyncio.sleep(1e6)


async def babbles(context: Any) -> bytes:
    return b"no message"


def leaves(kind: type[errors.RemixError]) -> list[type[errors.RemixError]]:
    below = kind.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


@pytest.mark.parametrize("leaf", leaves(errors.RemixError))
def test_error_in_metadata_is_the_same_again(leaf: type[errors.RemixError]) -> None:
    error = leaf("It has 9.", value=9, limit=[1, 8], remedy="Take one away.", retry_after_s=2.5)
    again = decode_error(encode_error(error, 13))
    assert type(again) is leaf
    assert again is not None
    assert again.parts() == error.parts()


@pytest.mark.parametrize("data", [None, b"", b"\xff\xff", b"\x1a\x02\x0a\x00"])
def test_metadata_of_others_is_no_error_of_ours(data: bytes | None) -> None:
    assert decode_error(data) is None


def test_error_of_any_size_fits_into_metadata() -> None:
    long = "x" * 1_000_000
    error = errors.InvalidOption(long, value=[long], limit=long, remedy=long)
    assert len(encode_error(error, 3)) < 8_192


def test_refusal_of_a_runner_crosses_the_hop_whole(tmp_path: Path) -> None:
    async def scenario(address: str) -> None:
        async with runners_of(settings_for(address, tmp_path)) as runners:
            with pytest.raises(errors.InvalidAudio) as refused:
                await doubled(runners, REFUSED)
            assert refused.value.parts() == {
                "message": "It is -1; 0 is the least.",
                "value": -1,
                "limit": [0, 9],
                "remedy": "Add 1.",
                "retry_after_s": None,
            }
            with pytest.raises(errors.InvalidOption, match="must be FP32") as refused_option:
                await runners.for_song()(MODEL, {"x": np.zeros((1, 3), np.int64)})
            assert refused_option.value.limit == "FP32"

    with toy_runner(address := free_address()):
        asyncio.run(scenario(address))


def test_model_that_breaks_is_asked_once_and_breaks_nobody_else(tmp_path: Path) -> None:
    async def scenario(address: str) -> None:
        async with runners_of(settings_for(address, tmp_path)) as runners:
            # The first holds the only worker, so that the others wait, and share a batch.
            busy = asyncio.create_task(doubled(runners, TAKES_LONG))
            values = [1.0, BREAKS, 2.0]
            calls = [asyncio.create_task(doubled(runners, value)) for value in values]
            good, broken, also_good = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(good, int)
            assert isinstance(also_good, int)
            assert isinstance(broken, errors.ModelFailed)
            assert broken.value == "ZeroDivisionError"
            assert "secret" not in str(broken)
            await busy

    with toy_runner(address := free_address()):
        asyncio.run(scenario(address))


def test_call_outlives_the_runner_that_is_killed_and_started_again(tmp_path: Path) -> None:
    async def scenario(address: str) -> None:
        async with runners_of(settings_for(address, tmp_path)) as runners:
            with toy_runner(address) as first:
                await until(lambda: STAGE not in runners.unavailable())
                calls = [asyncio.create_task(doubled(runners, TAKES_LONG)) for _ in range(3)]
                await asyncio.sleep(0.2)  # the first of them is being computed
                first.kill()
            await until(lambda: STAGE in runners.unavailable())
            assert not any(call.done() for call in calls)
            with toy_runner(address) as second:
                assert await asyncio.gather(*calls) == [second.pid] * 3
                await until(lambda: STAGE not in runners.unavailable())

    asyncio.run(scenario(free_address()))


def test_runner_that_is_lost_twice_has_the_whole_patience_twice(tmp_path: Path) -> None:
    """A long window outlives its first trouble."""

    async def goes_away_late(context: Any) -> None:
        await asyncio.sleep(2.0)
        await goes_away(context)

    async def scenario() -> None:
        async with (
            scripted([goes_away, goes_away_late]) as (address, _),
            runners_of(settings_for(address, tmp_path, runner_patience_s=2.0)) as runners,
        ):
            await doubled(runners, 1)

    asyncio.run(scenario())


def test_runner_that_stays_away_fails_the_call_when_patience_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = settings_for(free_address(), tmp_path, runner_patience_s=0.5)
        async with runners_of(settings) as runners:
            start_s = time.monotonic()
            with pytest.raises(errors.RunnerUnavailable, match=STAGE):
                await doubled(runners, 1)
            assert time.monotonic() - start_s >= 0.5
            assert runners.unavailable() == list(STAGES)

    asyncio.run(scenario())


def test_replicas_share_calls_and_one_that_dies_fails_none(tmp_path: Path) -> None:
    async def scenario(addresses: list[str], one: int, other: int, kill: Any) -> None:
        async with runners_of(settings_for("ipv4:" + ",".join(addresses), tmp_path)) as runners:
            found: set[int] = set()
            async with asyncio.timeout(SOON_S):  # until both are connected
                while found != {one, other}:
                    found.add(await doubled(runners, 1))
            calls = [asyncio.create_task(doubled(runners, TAKES_LONG)) for _ in range(4)]
            await asyncio.sleep(0.2)
            kill()
            assert set(await asyncio.gather(*calls)) <= {one, other}
            assert {await doubled(runners, 1) for _ in range(10)} == {other}
            assert STAGE not in runners.unavailable()

    addresses = [free_address(), free_address()]
    with toy_runner(addresses[0]) as one, toy_runner(addresses[1]) as other:
        asyncio.run(scenario(addresses, one.pid, other.pid, one.kill))


@pytest.mark.slow
def test_call_leaves_a_replica_that_has_stopped(tmp_path: Path) -> None:
    """A stopped process, like a cut network, says nothing at all: keepalive finds out."""

    async def scenario(addresses: list[str], one: int, other: int) -> None:
        async with runners_of(settings_for("ipv4:" + ",".join(addresses), tmp_path)) as runners:
            found: set[int] = set()
            while found != {one, other}:
                found.add(await doubled(runners, 1))
            os.kill(one, signal.SIGSTOP)
            try:
                async with asyncio.timeout(2 * SOON_S):
                    assert {await doubled(runners, 1) for _ in range(6)} == {other}
            finally:
                os.kill(one, signal.SIGCONT)

    addresses = [free_address(), free_address()]
    with toy_runner(addresses[0]) as one, toy_runner(addresses[1]) as other:
        asyncio.run(scenario(addresses, one.pid, other.pid))


def test_full_queue_is_waited_for_with_growing_pauses(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            scripted([is_full, is_full, is_full]) as (address, calls),
            runners_of(settings_for(address, tmp_path)) as runners,
        ):
            await doubled(runners, 1)
            pauses = np.diff(calls)
            assert len(pauses) == 3
            assert (pauses >= [0.05, 0.1, 0.2]).all()  # a quarter of the longest, at least

    asyncio.run(scenario())


def test_answer_that_cannot_be_read_is_the_runners_fault(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            scripted([babbles]) as (address, _),
            runners_of(settings_for(address, tmp_path)) as runners,
        ):
            with pytest.raises(errors.ModelFailed, match="cannot be read"):
                await doubled(runners, 1)

    asyncio.run(scenario())


def test_window_that_loses_every_connection_is_given_up(tmp_path: Path) -> None:
    """It may be what kills its runner."""

    async def scenario() -> None:
        async with (
            scripted([goes_away] * 100) as (address, calls),
            runners_of(settings_for(address, tmp_path)) as runners,
        ):
            with pytest.raises(errors.RunnerUnavailable, match="going away"):
                await doubled(runners, 1)
            assert len(calls) == MAX_LOST

    asyncio.run(scenario())


@pytest.mark.parametrize("hung", [1, 2])
def test_window_without_an_answer_is_asked_for_once_again(tmp_path: Path, hung: int) -> None:
    async def scenario() -> None:
        settings_of = {"window_s": 0.5, "max_queue_rows": 1}
        async with (
            scripted([answers] + [hangs] * hung) as (address, calls),
            runners_of(settings_for(address, tmp_path, **settings_of)) as runners,
        ):
            await doubled(runners, 1)  # how little a window takes is known from here on
            if hung == 1:
                await doubled(runners, 1)
            else:
                with pytest.raises(errors.RunnerUnavailable, match="twice"):
                    await doubled(runners, 1)
            assert len(calls) == 1 + 2

    asyncio.run(scenario())


def test_budget_lets_a_fifth_be_repeated_and_delays_the_rest() -> None:
    async def scenario() -> None:
        budget = RetryBudget(share=0.2, least_per_s=1e-3, most=50.0)
        for _ in range(50):
            await budget.spend()
        for _ in range(100):
            budget.earn()
        async with asyncio.timeout(1):
            for _ in range(20):
                await budget.spend()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await budget.spend()

    asyncio.run(scenario())


def test_empty_budget_fills_by_itself() -> None:
    async def scenario() -> None:
        budget = RetryBudget(share=0.2, least_per_s=50.0, most=1.0)
        start_s = time.monotonic()
        for _ in range(6):
            await budget.spend()
        assert time.monotonic() - start_s >= 5 / 50.0 * 0.99

    asyncio.run(scenario())


def test_cancelled_windows_cost_nothing_but_the_one_that_is_computed(tmp_path: Path) -> None:
    def rows(outcome: str) -> float:
        labels = {"model": MODEL, "outcome": outcome}
        return REGISTRY.get_sample_value("philharmonics_windows_total", labels) or 0.0

    def now(name: str) -> float:
        return REGISTRY.get_sample_value(f"philharmonics_{name}_windows", {"model": MODEL}) or 0.0

    async def scenario() -> None:
        service = InferenceServer("toy", 8, Workers(1))
        service.add(Doubler())
        server = grpc.aio.server()
        service.add_to(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with runners_of(settings_for(address, tmp_path)) as runners:
            before = {outcome: rows(outcome) for outcome in ("computed", "cancelled", "wasted")}
            calls = [asyncio.create_task(doubled(runners, TAKES_LONG)) for _ in range(6)]
            await until(lambda: now("computing") == 1 and now("queue") == 5)
            for call in calls:
                call.cancel()
            await until(lambda: now("queue") == 0)
            await until(lambda: now("computing") == 0)
            assert await doubled(runners, 1)  # after it, nothing of the others is left to come
            spent = {outcome: rows(outcome) - was for outcome, was in before.items()}
            assert spent == {"computed": 1, "cancelled": 5, "wasted": 1}
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*calls)
        await server.stop(0)

    asyncio.run(scenario())
