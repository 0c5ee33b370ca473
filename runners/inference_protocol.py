"""Models -> an Open Inference Protocol (KServe v2) server over gRPC.

Source: https://github.com/kserve/open-inference-protocol; messages of `tritonclient`, so that
any Triton or KServe client can call a runner, and a Triton server can replace one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from remix import errors
from remix.manifest import TensorSpec
from remix.stages import Tensors
from runners.adaptive_batcher import AdaptiveBatcher, Timing, Workers
from runners.error_details import KEY, encode_error, text_of
from runners.step_batcher import StepBatcher, Writer
from runners.tensor_messages import NUMPY_DTYPES, decode_request, encode_response
from telemetry.traces import caller_in, past_part, serving

STATUS: Mapping[type[errors.RemixError], grpc.StatusCode] = {
    errors.InvalidAudio: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidNotes: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidOption: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitExceeded: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.NoConsent: grpc.StatusCode.PERMISSION_DENIED,
    errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidModel: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelFailed: grpc.StatusCode.INTERNAL,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.RunnerUnavailable: grpc.StatusCode.UNAVAILABLE,  # the one that a client makes of it
}

MAX_MESSAGE_BYTES = 256 * 2**20

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    # Clients may ask every few seconds whether the connection lives; by default they are put off.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients look up a name again when a connection ends: so new replicas get their share.
    ("grpc.max_connection_age_ms", 30_000),
]


class ServedModel(ABC):
    """A model on windows: named arrays in, named arrays out, the batch axis first."""

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch: int

    @abstractmethod
    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Compute a batch: {input: [B, ...]} -> {output: [B, ...]}."""

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """How many windows' worth of a batch was padding, where that costs anything."""
        return 0.0

    def batcher(self, workers: Workers, max_queue_rows: int) -> AdaptiveBatcher:
        """What merges its requests."""
        return AdaptiveBatcher(
            self.name,
            self,
            workers,
            max_batch_rows=self.max_batch,
            max_queue_rows=max_queue_rows,
            padding=self.padding,
        )

    def warm_up(self) -> None:
        """Compute once, so that the first caller does not wait for what is done once."""
        self(
            {
                spec.name: np.zeros(
                    [max(1, size) for size in spec.shape], NUMPY_DTYPES[spec.datatype]
                )
                for spec in self.inputs
            }
        )


class SteppedModel(ServedModel):
    """A model that writes token by token, with others who come and go between its steps."""

    @abstractmethod
    def writer(self) -> Writer:
        """An empty one."""

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `ServedModel.__call__`."""
        writer = self.writer()
        writer.join(0, inputs)
        while not (done := writer.step()):
            pass
        return done[0]

    def batcher(self, workers: Workers, max_queue_rows: int) -> AdaptiveBatcher:
        """See `ServedModel.batcher`."""
        return StepBatcher(
            self.name,
            self,
            workers,
            writer=self.writer,
            max_batch_rows=self.max_batch,
            max_queue_rows=max_queue_rows,
        )


def silent_ends(samples: NDArray[Any]) -> float:
    """How many windows' worth of some windows is silence at their end: a song that is over.

    Args:
        samples: [B, T].

    >>> silent_ends(np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]))
    1.5
    """
    n_samples = samples.shape[1]
    sound = [np.flatnonzero(row) for row in samples[samples[:, -1] == 0]]
    return float(sum(1 - (at[-1] + 1) / n_samples if len(at) else 1.0 for at in sound))


SERVICE = "inference.GRPCInferenceService"

PLAIN_METHODS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata")


class InferenceServer:
    """Answers the protocol's calls for a few models, each behind its own batcher."""

    def __init__(
        self, name: str, max_queue_rows: int, workers: Workers, *, is_near: bool = False
    ) -> None:
        """Start without models, hence not ready.

        Args:
            name: of the runner.
            max_queue_rows: windows that may wait for each model.
            workers: shared by the models.
            is_near: its callers are this machine's, and may lend it memory instead of sending.
        """
        self.is_ready = False
        self._is_near = is_near
        self._name = name
        self._max_queue_rows = max_queue_rows
        self._workers = workers
        self._models: dict[str, tuple[ServedModel, AdaptiveBatcher]] = {}

    def add(self, model: ServedModel) -> None:
        """Serve one more model, already warm."""
        batcher = model.batcher(self._workers, self._max_queue_rows)
        self._models[model.name] = (model, batcher)
        self.is_ready = True

    def show_queues(self) -> None:
        """Tell the metrics how long the models' queues are, and since when."""
        for _, batcher in self._models.values():
            batcher.show_queue()

    def add_to(self, server: Any) -> None:
        """Answer a gRPC server's calls, before it starts.

        What the generated code would do, except that `ModelInfer` is handed bytes, and gives them.
        """
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                getattr(self, name),
                request_deserializer=getattr(messages, f"{name}Request").FromString,
                response_serializer=getattr(messages, f"{name}Response").SerializeToString,
            )
            for name in PLAIN_METHODS
        }
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.ModelInfer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """The process answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """The models are loaded and warm."""
        return messages.ServerReadyResponse(ready=self.is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Name of the runner and what it can do."""
        return messages.ServerMetadataResponse(name=self._name, version="1", extensions=[])

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether this model can be called."""
        return messages.ModelReadyResponse(ready=request.name in self._models)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """The model's tensors; the first axis is the batch."""
        try:
            model, _ = self._find(request.name)
        except errors.RemixError as error:
            await _abort(context, error)
        return messages.ModelMetadataResponse(
            name=model.name,
            versions=["1"],
            platform="onnxruntime_onnx",
            inputs=[_metadata(spec) for spec in model.inputs],
            outputs=[_metadata(spec) for spec in model.outputs],
        )

    async def ModelInfer(self, data: bytes, context: Any) -> bytes:
        """Compute, in a batch with whoever else is waiting."""
        with serving("infer", caller_in(context.invocation_metadata())) as span:
            try:
                with ExitStack() as held:
                    request, inputs, memory = decode_request(data, held if self._is_near else None)
                    model, outputs, timing = await self._infer(request, inputs, context)
                    span.set_attributes({"model": model.name, "batch_windows": timing.batch_rows})
                    response = messages.ModelInferResponse(
                        model_name=model.name, model_version="1", id=request.id
                    )
                    response.parameters["queue_s"].double_param = timing.queue_s
                    response.parameters["compute_s"].double_param = timing.compute_s
                    response.parameters["batch_rows"].int64_param = timing.batch_rows
                    return encode_response(response, outputs, memory)
            except errors.RemixError as error:
                await _abort(context, error)

    async def _infer(
        self, request: Any, inputs: Tensors, context: Any
    ) -> tuple[ServedModel, dict[str, NDArray[Any]], Timing]:
        remaining_s = context.time_remaining()
        deadline_s = float("inf") if remaining_s is None else time.monotonic() + remaining_s
        model, batcher = self._find(request.model_name)
        _check_inputs(model, inputs)
        begin_ns = time.time_ns()
        outputs, timing = await batcher.submit(inputs, deadline_s)
        past_part("compute", past_part("queue", begin_ns, timing.queue_s), timing.compute_s)
        return model, outputs, timing

    def _find(self, name: str) -> tuple[ServedModel, AdaptiveBatcher]:
        if name not in self._models:
            known = list(self._models)
            raise errors.NotFound(
                f"{self._name} has no model {errors.excerpt(name)!r}; it has "
                f"{', '.join(known) or 'none yet'}.",
                value=errors.excerpt(name),
                limit=known,
                remedy="Use one of these names." if known else "Wait until it is ready.",
            )
        return self._models[name]


async def _abort(context: Any, error: errors.RemixError) -> NoReturn:
    status = STATUS[type(error)]
    details = encode_error(error, status.value[0])
    await context.abort(status, text_of(error), ((KEY, details),))
    raise AssertionError("abort raises")


def _metadata(spec: TensorSpec) -> Any:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _check_inputs(model: ServedModel, inputs: Tensors) -> None:
    expected = {spec.name: spec for spec in model.inputs}
    if set(inputs) != set(expected):
        names = [errors.excerpt(name) for name in sorted(inputs)[:8]]
        raise errors.InvalidOption(
            f"{model.name} was sent the inputs {names}; it takes {sorted(expected)}.",
            value=names,
            limit=sorted(expected),
            remedy="Send these.",
        )
    rows = sorted({array.shape[0] if array.ndim else 0 for array in inputs.values()})
    if len(rows) != 1 or 0 in rows:
        raise errors.InvalidOption(
            f"The inputs of {model.name} have {rows} rows; all must have the same, at least 1.",
            value=rows,
            limit=1,
            remedy="Send as many rows of each.",
        )
    for name, array in inputs.items():
        spec = expected[name]
        if array.dtype != NUMPY_DTYPES[spec.datatype]:
            raise errors.InvalidOption(
                f"Input {name} of {model.name} is {array.dtype}; it must be {spec.datatype}.",
                value=str(array.dtype),
                limit=spec.datatype,
                remedy="Convert it first.",
            )
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise errors.InvalidOption(
                f"Input {name} of {model.name} has the shape {errors.excerpt(array.shape)}; it "
                f"must be {spec.shape}, where -1 is free.",
                value=list(array.shape[:8]),
                limit=list(spec.shape),
                remedy="Cut windows of this shape.",
            )
