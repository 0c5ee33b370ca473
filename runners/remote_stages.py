"""The composer's side of the hop: `remix.stages.Infer` over the runners' gRPC addresses."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import grpc
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge, Histogram
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

from remix import errors
from remix.manifest import Manifest, stage_of
from remix.settings import Settings
from remix.stages import STAGES, Stage, Tensors
from runners.error_details import KEY, decode_error
from runners.inference_protocol import CHANNEL_OPTIONS, SERVICE, STATUS
from runners.processes import end_hung, enter, forget_the_dead
from runners.retry import RetryBudget, StageHealth, Tries, Trouble
from runners.shared_memory import IS_HERE, Region, lent
from runners.tensor_messages import decode_response, encode_request
from telemetry import traces
from telemetry.exposition import SECONDS

STAGE_SECONDS = Histogram(
    "philharmonics_stage_seconds",
    "Time of a call to a runner, by its parts: queue, compute, transfer (the rest: copies, wire, "
    "scheduling)",
    ["stage", "part"],
    buckets=SECONDS,
)
RETRIES = Counter("philharmonics_retries", "Calls that were made again", ["stage", "reason"])
AWAY = Gauge(
    "philharmonics_away_runners",
    "1: the runner does not answer",
    ["stage"],
    multiprocess_mode="livemax",
)

ERROR_OF_STATUS: dict[grpc.StatusCode, type[errors.RemixError]] = {
    **{status: error for error, status in STATUS.items()},
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidOption,
}
"""For servers that tell no more than a status. What is not here is a fault of theirs."""

LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""Said of a connection that broke, and by a server that stops."""

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0

HUNG_S = 30.0
"""A runner beside this composer that listens, and says nothing for so long, is started again."""

FIRST_ROW_S = 4.0
"""What a window may take, as long as none has told: one of HTDemucs on one core."""

CLIENT_OPTIONS = [
    *CHANNEL_OPTIONS,
    # Calls take turns on the addresses that the name stands for; those that do not answer are
    # left out.
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # gRPC by itself would ask less and less often for a runner that is gone, at last every 120 s.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A network that is cut, or a process that is stopped, says nothing: it is noticed by this.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # of other pings, behind which the one above waits
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass
class StageTimes:
    """Where the calls of one stage spent their time, summed; and how many windows they had.

    `wall_s` is from the first call's start to the last one's end. `cached` windows were there from
    before, and cost no call.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    windows: int = 0
    cached: int = 0
    start_s: float = float("inf")
    end_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """How long the stage was at work."""
        return max(0.0, self.end_s - self.start_s)


class Runners:
    """Channels to the five runners, and what is known of each, until closed."""

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        """Open the channels, and begin to watch the runners."""
        self._manifest = manifest
        self._settings = settings
        self._channels = {
            stage: grpc.aio.insecure_channel(settings.runner_address(stage), options=CLIENT_OPTIONS)
            for stage in STAGES
        }
        self._infer = {
            stage: channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for stage, channel in self._channels.items()
        }
        self._health = {stage: StageHealth(self._probe(stage)) for stage in STAGES}
        self._watches = [asyncio.create_task(health.watch()) for health in self._health.values()]
        self._budget = RetryBudget()
        self._at_work = enter(settings.runtime_dir)
        forget_the_dead()
        for stage in STAGES:
            AWAY.labels(stage).set(True)  # as long as none has answered
        self._row_s: dict[str, float] = {}
        for stage in STAGES:
            for trouble in get_args(Trouble):
                RETRIES.labels(stage, trouble)

    async def close(self) -> None:
        """Close the channels."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._at_work.close()

    def unavailable(self) -> list[Stage]:
        """The stages whose runner does not answer now, as the last probes found; at once."""
        return [stage for stage in STAGES if self._health[stage].is_away]

    def for_song(self) -> RemoteInfer:
        """An `Infer` that keeps the times of one song."""
        return RemoteInfer(self)

    async def call(self, model: str, inputs: Tensors, times: dict[Stage, StageTimes]) -> Any:
        """One inference, made again where that helps (`runners.retry`); its times go to `times`."""
        stage = stage_of(self._manifest, model)
        rows = len(next(iter(inputs.values())))
        tries = Tries(self._budget, self._health[stage], self._settings.runner_patience_s)
        begin_s = time.monotonic()
        with traces.window(stage, model, rows) as span:
            metadata = ((traces.HEADER, traces.traceparent()),)
            while True:
                start_s = time.monotonic()
                timeout_s = self._window_s(model, rows)
                try:
                    response, outputs = await self._ask(stage, model, inputs, timeout_s, metadata)
                    break
                except grpc.aio.AioRpcError as failure:
                    trouble, error = self._judge(stage, model, failure, timeout_s)
                    if trouble is None:
                        raise error from failure
                    RETRIES.labels(stage, trouble).inc()
                    span.add_event("made again", {"reason": trouble})
                    await tries.again(trouble, error)
        queue_s = response.parameters["queue_s"].double_param
        compute_s = response.parameters["compute_s"].double_param
        # Who shared the batch shares its cost. Other servers of the protocol tell no times.
        row_s = compute_s / (response.parameters["batch_rows"].int64_param or rows)
        self._row_s[model] = max(row_s, 0.9 * self._row_s.get(model, 0.0))
        end_s = time.monotonic()
        spent = times[stage]
        spent.queue_s += queue_s
        spent.compute_s += row_s * rows
        transfer_s = max(0.0, end_s - start_s - queue_s - compute_s)
        spent.transfer_s += transfer_s
        spent.start_s = min(spent.start_s, begin_s)
        spent.end_s = max(spent.end_s, end_s)
        spent.windows += rows
        for part, part_s in (("queue", queue_s), ("compute", compute_s), ("transfer", transfer_s)):
            STAGE_SECONDS.labels(stage, part).observe(part_s)
        return outputs

    async def _ask(
        self, stage: Stage, model: str, inputs: Tensors, timeout_s: float, metadata: Any
    ) -> tuple[Any, dict[str, NDArray[Any]]]:
        """Once; a runner beside this composer is lent memory, and nothing large is sent."""
        ask = partial(self._infer[stage], timeout=timeout_s, metadata=metadata)
        if not IS_HERE or stage in self._settings.remote_runners:
            return _read(stage, await ask(encode_request(model, inputs)))
        with lent() as memory:
            data = await ask(encode_request(model, inputs, memory))
            return _read(stage, data, memory.outputs)

    def _window_s(self, model: str, rows: int) -> float:
        """How long an answer may take: twice what a full queue before it costs, and some more."""
        row_s = self._row_s.get(model, FIRST_ROW_S)
        return self._settings.window_s + 2 * row_s * (self._settings.max_queue_rows + rows)

    def _judge(
        self, stage: Stage, model: str, failure: grpc.aio.AioRpcError, timeout_s: float
    ) -> tuple[Trouble | None, errors.RemixError]:
        """Why a call ended, and the error that it is if it is not made again."""
        code = failure.code()
        said = decode_error(dict(failure.trailing_metadata()).get(KEY))
        if isinstance(said, errors.QueueFull):
            return "full", said
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return "slow", errors.RunnerUnavailable(
                f"The runner {stage} did not answer within {timeout_s:.0f} s, twice.",
                value=f"more than {timeout_s:.0f} s",
                limit=round(timeout_s),
                remedy="Its log may say why; start it again.",
            )
        if said is not None:
            return None, said
        if code in LOST:
            return "lost", errors.RunnerUnavailable(
                f"The runner {stage} at {self._settings.runner_address(stage)} is away: "
                f"{failure.details()}.",
                value="not ready",
                limit="ready",
                remedy="Start it, or wait until its /readyz answers 200.",
            )
        kind = ERROR_OF_STATUS.get(code, errors.ModelFailed)
        return None, kind(
            f"The runner {stage} says of {model}: {failure.details()}.",
            value=code.name,
            limit="what its runner takes",
            remedy="The runner's log may say more.",
        )

    def _probe(self, stage: Stage) -> Any:
        stub = protocol.GRPCInferenceServiceStub(self._channels[stage])
        settings, answered_s = self._settings, time.monotonic()

        async def probe() -> bool:
            nonlocal answered_s
            try:
                answer = await stub.ServerReady(
                    messages.ServerReadyRequest(), timeout=PROBE_TIMEOUT_S
                )
                is_ready, answered_s = bool(answer.ready), time.monotonic()
            except grpc.aio.AioRpcError:
                is_ready = False
            if time.monotonic() - answered_s > HUNG_S and stage not in settings.remote_runners:
                answered_s = time.monotonic()  # its successor has as long
                if end_hung(settings.runtime_dir, stage):
                    _log.warning("The runner %s hung, and is started again.", stage)
            AWAY.labels(stage).set(not is_ready)
            return is_ready

        return probe


class RemoteInfer:
    """`Infer` for one song: calls the runners and remembers the times."""

    def __init__(self, runners: Runners) -> None:
        """Bind to the open channels."""
        self._runners = runners
        self.times: dict[Stage, StageTimes] = defaultdict(StageTimes)

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `remix.stages.Infer`."""
        outputs: dict[str, NDArray[Any]] = await self._runners.call(model, inputs, self.times)
        return outputs


def _read(
    stage: Stage, data: bytes, memory: Region | None = None
) -> tuple[Any, dict[str, NDArray[Any]]]:
    """A runner's answer; one that cannot be read is the runner's fault, not the caller's."""
    try:
        return decode_response(data, memory)
    except errors.InvalidOption as error:
        raise errors.ModelFailed(
            f"The answer of the runner {stage} cannot be read: {error.message}",
            value=error.value,
            limit=error.limit,
            remedy="Run the same version of everything.",
        ) from error
