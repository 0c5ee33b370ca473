"""A runner in a process of its own whose model doubles: `python -m tests.toy_runner ADDRESS`."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidAudio
from remix.manifest import Manifest, ModelEntry, TensorSpec
from remix.settings import Settings
from remix.stages import Stage, Tensors
from runners.adaptive_batcher import Workers
from runners.inference_protocol import SERVER_OPTIONS, InferenceServer, ServedModel

MODEL = "doubler"

REFUSED = -1.0
BREAKS = -2.0
TAKES_LONG = -3.0
"""A second; whatever is in a window's first place."""

STAGE: Stage = "transcribe_notes"

MANIFEST: Manifest = {
    MODEL: ModelEntry(MODEL, STAGE, 1, "random", "Apache-2.0", "here", "exact", 0, {"cpu": 4}, ())
}


class Doubler(ServedModel):
    """y = 2 x on windows of three samples; and which process computed it."""

    name = MODEL
    inputs = (TensorSpec("x", "FP32", (-1, 3)),)
    outputs = (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("pid", "INT64", (-1,)))
    max_batch = 4

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See the constants above for what does not double."""
        x = inputs["x"]
        if (x[:, 0] == REFUSED).any():
            raise InvalidAudio("It is -1; 0 is the least.", value=-1, limit=[0, 9], remedy="Add 1.")
        if (x[:, 0] == BREAKS).any():
            raise ZeroDivisionError("the secret of the toy")
        if (x[:, 0] == TAKES_LONG).any():
            time.sleep(1.0)
        return {"y": x * 2, "pid": np.full(len(x), os.getpid())}


def window(value: float) -> dict[str, NDArray[Any]]:
    """Inputs, one row."""
    return {"x": np.full((1, 3), value, np.float32)}


def free_address() -> str:
    """`host:port` that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def settings_for(address: str, folder: Path, **fields: Any) -> Settings:
    """Of a composer whose only runner listens at `address`."""
    return Settings(
        models_dir=folder, runtime_dir=folder, remote_runners={STAGE: address}, **fields
    )


@contextmanager
def toy_runner(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process; it listens when it has written a line."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "tests.toy_runner", address]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield process
        finally:
            process.kill()


async def serve(address: str) -> None:
    """Listen until killed."""
    service = InferenceServer("toy", 8, Workers(1))
    service.add(Doubler())
    server = grpc.aio.server(options=SERVER_OPTIONS)
    service.add_to(server)
    server.add_insecure_port(address)
    await server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
