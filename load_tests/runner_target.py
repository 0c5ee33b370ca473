"""windows -> a runner's answers, over the Open Inference Protocol (KServe v2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from load_tests.generator import OK, Answer, Work

SERVICE = "/inference.GRPCInferenceService/"

MAX_MESSAGE_BYTES = 256 * 2**20

DATATYPES = {"FP32": np.dtype(np.float32), "INT64": np.dtype(np.int64)}

RAW_OUTPUT_TAG = 6 << 3 | 2

PARTS = ("queue_s", "compute_s")
"""What our runners say of each inference; a foreign server says nothing."""


def inference(model: str, inputs: Mapping[str, NDArray[Any]], audio_s: float) -> Work:
    """A request, serialised before the run.

    Args:
        model: its name.
        inputs: by name, [B, ...] each.
        audio_s: that one such window stands for.
    """
    request = messages.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        datatype = next(name for name, dtype in DATATYPES.items() if array.dtype == dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return Work(audio_s, request.SerializeToString())


def without_tensors(data: bytes) -> messages.ModelInferResponse:
    """A response but for its `raw_output_contents`, whose megabytes would hold up the event loop.

    Source: https://protobuf.dev/programming-guides/encoding: what is skipped is the records with
    the tag of field 6, length-delimited; they stand last in what our runners send.
    """
    end = 0
    while end < len(data) and data[end] != RAW_OUTPUT_TAG:
        _, begin = _varint(data, end)  # the tag
        length, begin = _varint(data, begin)
        end = begin + length
    return messages.ModelInferResponse.FromString(data[:end])


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of base 128, lowest digits first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        shift += 7
        if byte < 0x80:
            return value, place


class RunnerTarget:
    """`ModelInfer` of a runner, whichever model the request names.

    Args:
        channel: to it, from `open_channel`.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._infer = channel.unary_unary(
            f"{SERVICE}ModelInfer",
            response_deserializer=without_tensors,
        )

    async def send(self, work: Work) -> Answer:
        """See `Target`."""
        try:
            response = await self._infer(work.body)
        except grpc.aio.AioRpcError as error:
            return Answer(error.code().name)
        said = response.parameters
        parts = {name: said[name].double_param for name in PARTS if name in said}
        if "batch_rows" in said:
            parts["batch_rows"] = float(said["batch_rows"].int64_param)
        return Answer(OK, parts=parts)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a runner: `host:port`, or `unix:path`."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )


async def input_shapes(channel: grpc.aio.Channel, model: str) -> dict[str, tuple[int, ...]]:
    """The model's inputs and their shapes, the batch axis as 1."""
    metadata = await channel.unary_unary(
        f"{SERVICE}ModelMetadata",
        request_serializer=messages.ModelMetadataRequest.SerializeToString,
        response_deserializer=messages.ModelMetadataResponse.FromString,
    )(messages.ModelMetadataRequest(name=model), wait_for_ready=True, timeout=30.0)
    return {tensor.name: (1, *tensor.shape[1:]) for tensor in metadata.inputs}
