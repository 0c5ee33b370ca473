"""A foreign client (tritonclient) against the protocol server, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from remix import errors
from remix.manifest import TensorSpec
from remix.stages import Tensors
from runners.adaptive_batcher import Workers
from runners.inference_protocol import STATUS, InferenceServer, ServedModel


class Doubler(ServedModel):
    """y = 2 x on windows of three samples."""

    name = "doubler"
    inputs = (TensorSpec("x", "FP32", (-1, 3)),)
    outputs = (TensorSpec("y", "FP32", (-1, 3)),)
    max_batch = 4

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return {"y": inputs["x"] * 2}


@asynccontextmanager
async def doubler_client() -> AsyncIterator[triton.InferenceServerClient]:
    service = InferenceServer("test", 10, Workers(1))
    service.add(Doubler())
    server = grpc.aio.server()
    service.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        yield client
    finally:
        await client.close()
        await server.stop(0)


def tensor(values: NDArray[Any], datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput("x", list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def test_tritonclient_reads_metadata_and_infers() -> None:
    async def scenario() -> None:
        async with doubler_client() as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("doubler")
            assert not await client.is_model_ready("tripler")
            metadata = await client.get_model_metadata("doubler")
            assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
                ("x", "FP32", [-1, 3])
            ]
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            result = await client.infer("doubler", [tensor(x)])
            np.testing.assert_array_equal(result.as_numpy("y"), x * 2)
            parameters = result.get_response().parameters
            assert parameters["batch_rows"].int64_param == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("model", "values", "datatype", "message"),
    [
        ("tripler", np.zeros((1, 3), np.float32), "FP32", "no model 'tripler'"),
        ("doubler", np.zeros((1, 4), np.float32), "FP32", r"must be \(-1, 3\)"),
        ("doubler", np.zeros((1, 3), np.int64), "INT64", "must be FP32"),
        ("doubler", np.zeros((0, 3), np.float32), "FP32", "at least 1"),
    ],
)
def test_a_wrong_request_is_refused_with_value_and_limit(
    model: str, values: NDArray[Any], datatype: str, message: str
) -> None:
    async def scenario() -> None:
        async with doubler_client() as client:
            with pytest.raises(InferenceServerException, match=message):
                await client.infer(model, [tensor(values, datatype)])

    asyncio.run(scenario())


def test_every_error_of_the_tree_has_a_status() -> None:
    def leaves(kind: type[errors.RemixError]) -> set[type[errors.RemixError]]:
        below = kind.__subclasses__()
        return {kind} if not below else set().union(*map(leaves, below))

    assert set(STATUS) == leaves(errors.RemixError)
