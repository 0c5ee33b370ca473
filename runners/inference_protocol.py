"""Models -> an Open Inference Protocol (KServe v2) server over gRPC, and its wire format.

Source: https://github.com/kserve/open-inference-protocol; messages of `tritonclient`, so that
any Triton or KServe client can call a runner, and a Triton server can replace one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NoReturn

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

from remix import errors
from remix.manifest import TensorSpec
from remix.stages import Tensors
from runners.adaptive_batcher import AdaptiveBatcher, Timing, Workers

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "BOOL": np.dtype("?"),
}

CONTENTS = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "BOOL": "bool_contents",
}
"""Where the protocol keeps tensors that a client sends as numbers instead of bytes."""

STATUS: Mapping[type[errors.RemixError], grpc.StatusCode] = {
    errors.InvalidAudio: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidNotes: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidOption: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitExceeded: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
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


class ServedModel(ABC):
    """A model on windows: named arrays in, named arrays out, the batch axis first."""

    name: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    max_batch: int

    @abstractmethod
    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Compute a batch: {input: [B, ...]} -> {output: [B, ...]}."""

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


class InferenceServer(protocol.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers the protocol's calls for a few models, each behind its own batcher."""

    def __init__(self, name: str, max_queue_rows: int, workers: Workers) -> None:
        """Start without models, hence not ready.

        Args:
            name: of the runner.
            max_queue_rows: windows that may wait for each model.
            workers: shared by the models.
        """
        self.is_ready = False
        self._name = name
        self._max_queue_rows = max_queue_rows
        self._workers = workers
        self._models: dict[str, tuple[ServedModel, AdaptiveBatcher]] = {}

    def add(self, model: ServedModel) -> None:
        """Serve one more model, already warm."""
        batcher = AdaptiveBatcher(
            model.name,
            model,
            self._workers,
            max_batch_rows=model.max_batch,
            max_queue_rows=self._max_queue_rows,
        )
        self._models[model.name] = (model, batcher)
        self.is_ready = True

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
        model, _ = await self._find(request.name, context)
        return messages.ModelMetadataResponse(
            name=model.name,
            versions=["1"],
            platform="onnxruntime_onnx",
            inputs=[_metadata(spec) for spec in model.inputs],
            outputs=[_metadata(spec) for spec in model.outputs],
        )

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Compute, in a batch with whoever else is waiting."""
        model, batcher = await self._find(request.model_name, context)
        remaining_s = context.time_remaining()
        deadline_s = float("inf") if remaining_s is None else time.monotonic() + remaining_s
        try:
            inputs = decode_tensors(request.inputs, request.raw_input_contents)
            _check_inputs(model, inputs)
            outputs, timing = await batcher.submit(inputs, deadline_s)
        except errors.RemixError as error:
            await _abort(context, error)
        return encode_response(model.name, request.id, outputs, timing)

    async def _find(self, name: str, context: Any) -> tuple[ServedModel, AdaptiveBatcher]:
        if name not in self._models:
            known = ", ".join(self._models) or "none yet"
            await _abort(
                context, errors.NotFound(f"{self._name} has no model {name!r}; it has {known}.")
            )
        return self._models[name]


async def _abort(context: Any, error: errors.RemixError) -> NoReturn:
    await context.abort(STATUS[type(error)], str(error))
    raise AssertionError("abort raises")


def _metadata(spec: TensorSpec) -> Any:
    return messages.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


def _check_inputs(model: ServedModel, inputs: Tensors) -> None:
    expected = {spec.name: spec for spec in model.inputs}
    if set(inputs) != set(expected):
        raise errors.InvalidOption(
            f"{model.name} takes the inputs {sorted(expected)}, not {sorted(inputs)}."
        )
    rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        raise errors.InvalidOption(
            f"The inputs of {model.name} have {sorted(rows)} rows; all must have the same, "
            "at least 1."
        )
    for name, array in inputs.items():
        spec = expected[name]
        if array.dtype != NUMPY_DTYPES[spec.datatype]:
            raise errors.InvalidOption(
                f"Input {name} of {model.name} is {array.dtype}; it must be {spec.datatype}."
            )
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise errors.InvalidOption(
                f"Input {name} of {model.name} has the shape {array.shape}; it must be "
                f"{spec.shape}, where -1 is free."
            )


def encode_request(model: str, inputs: Tensors) -> Any:
    """Named arrays -> a ModelInferRequest with raw contents."""
    request = messages.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=_datatype(array), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def encode_response(model: str, request_id: str, outputs: Tensors, timing: Timing) -> Any:
    """Named arrays and where the time went -> a ModelInferResponse."""
    response = messages.ModelInferResponse(model_name=model, model_version="1", id=request_id)
    for name, array in outputs.items():
        response.outputs.add(name=name, datatype=_datatype(array), shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    response.parameters["queue_s"].double_param = timing.queue_s
    response.parameters["compute_s"].double_param = timing.compute_s
    response.parameters["batch_rows"].int64_param = timing.batch_rows
    return response


def decode_tensors(tensors: Sequence[Any], raw_contents: Sequence[bytes]) -> dict[str, Any]:
    """The tensors of a request or a response -> named arrays.

    Raises:
        InvalidOption: an unknown datatype, or contents whose size is not that of the shape.
    """
    if raw_contents and len(raw_contents) != len(tensors):
        raise errors.InvalidOption(
            f"{len(tensors)} tensors came with {len(raw_contents)} raw contents."
        )
    arrays: dict[str, Any] = {}
    for index, tensor in enumerate(tensors):
        dtype = NUMPY_DTYPES.get(tensor.datatype)
        if dtype is None:
            raise errors.InvalidOption(
                f"Tensor {tensor.name} has the datatype {tensor.datatype!r}; "
                f"use one of {', '.join(NUMPY_DTYPES)}."
            )
        if raw_contents:
            buffer = raw_contents[index]
            size = len(buffer) // dtype.itemsize
            array = np.frombuffer(buffer, dtype, count=size)
            exact = len(buffer) == size * dtype.itemsize
        else:
            if tensor.datatype not in CONTENTS:
                raise errors.InvalidOption(
                    f"Tensor {tensor.name} is {tensor.datatype} without raw contents: send it raw."
                )
            array = np.array(getattr(tensor.contents, CONTENTS[tensor.datatype]), dtype)
            exact = True
        shape = tuple(tensor.shape)
        if not exact or any(n < 0 for n in shape) or array.size != prod(shape):
            raise errors.InvalidOption(
                f"Tensor {tensor.name} has {array.size} values; its shape {shape} needs "
                f"{prod(shape)}."
            )
        arrays[tensor.name] = array.reshape(shape)
    return arrays


def _datatype(array: NDArray[Any]) -> str:
    for datatype, dtype in NUMPY_DTYPES.items():
        if array.dtype == dtype:
            return datatype
    raise errors.InvalidOption(f"{array.dtype} has no datatype in the protocol; use float32.")
