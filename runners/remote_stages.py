"""The composer's side of the hop: `remix.stages.Infer` over the runners' gRPC addresses."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

from remix import errors
from remix.manifest import Manifest
from remix.settings import Settings
from remix.stages import STAGES, Stage, Tensors
from runners.inference_protocol import (
    CHANNEL_OPTIONS,
    STATUS,
    decode_tensors,
    encode_request,
)

ERROR_OF_STATUS: dict[grpc.StatusCode, type[errors.RemixError]] = {
    **{status: error for error, status in STATUS.items()},
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidOption,
}


@dataclass
class StageTimes:
    """Where the calls of one stage spent their time, summed; and how many windows they had.

    `wall_s` is from the first call's start to the last one's end.
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    transfer_s: float = 0.0
    windows: int = 0
    start_s: float = float("inf")
    end_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """How long the stage was at work."""
        return max(0.0, self.end_s - self.start_s)


class Runners:
    """Channels to the five runners, open until closed."""

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        """Prepare the channels; they connect when they are used."""
        self._manifest = manifest
        self._addresses = {stage: settings.runner_address(stage) for stage in STAGES}
        self._channels = {
            stage: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            for stage, address in self._addresses.items()
        }
        self._stubs = {
            stage: protocol.GRPCInferenceServiceStub(channel)
            for stage, channel in self._channels.items()
        }

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()

    async def is_ready(self, stage: Stage) -> bool:
        """Whether the stage's runner has its models loaded and warm."""
        try:
            answer = await self._stubs[stage].ServerReady(
                messages.ServerReadyRequest(), timeout=2.0
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    def for_song(self) -> RemoteInfer:
        """An `Infer` that keeps the times of one song."""
        return RemoteInfer(self)

    async def call(self, model: str, inputs: Tensors, times: dict[Stage, StageTimes]) -> Any:
        """One inference, its times added to `times`."""
        stage = self._manifest[model].stage
        start_s = time.monotonic()
        try:
            response = await self._stubs[stage].ModelInfer(encode_request(model, inputs))
        except grpc.aio.AioRpcError as error:
            kind = ERROR_OF_STATUS.get(error.code(), errors.RunnerUnavailable)
            if kind is errors.RunnerUnavailable:
                raise errors.RunnerUnavailable(
                    f"The runner {stage} at {self._addresses[stage]} failed: {error.details()}.",
                    value="not ready",
                    limit="ready",
                    remedy="Start it, or wait until its /readyz answers 200.",
                ) from error
            raise kind(
                error.details(),
                value=model,
                limit="what its runner takes",
                remedy="Try again later; if it stays so, the runner's log says more.",
            ) from error
        outputs = decode_tensors(response.outputs, response.raw_output_contents)
        spent = times[stage]
        queue_s = response.parameters["queue_s"].double_param
        compute_s = response.parameters["compute_s"].double_param
        rows = len(next(iter(inputs.values())))
        spent.queue_s += queue_s
        # Who shared the batch shares its cost. Other servers of the protocol tell no times.
        spent.compute_s += (
            compute_s * rows / (response.parameters["batch_rows"].int64_param or rows)
        )
        end_s = time.monotonic()
        spent.transfer_s += max(0.0, end_s - start_s - queue_s - compute_s)
        spent.start_s = min(spent.start_s, start_s)
        spent.end_s = max(spent.end_s, end_s)
        spent.windows += rows
        return outputs


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
