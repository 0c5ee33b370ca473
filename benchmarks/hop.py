"""The hop: what it costs to have a window computed in another process, against plain protobuf.

    python -m benchmarks.hop [--rounds 40]

A window of HTDemucs goes to a runner whose model takes no time (2.8 MB there, 11 MB back), as the
composer calls the runners beside it, and in turn as generated code calls a generated server over
a unix socket. Besides, how long a call holds up the event loop: the longest time in which nothing
else had a turn. Writes benchmarks/results/hop.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as protocol

from remix.manifest import MANIFEST_PATH, ModelEntry, TensorSpec
from remix.settings import Settings
from remix.stages import Stage, Tensors
from runners.adaptive_batcher import Workers
from runners.inference_protocol import CHANNEL_OPTIONS, SERVER_OPTIONS, InferenceServer, ServedModel
from runners.remote_stages import Runners

ROOT = MANIFEST_PATH.parent
RESULT = ROOT / "benchmarks/results/hop.json"

STAGE: Stage = "separate_stems"
WINDOW = (1, 2, 343_980)
STEMS = (1, 4, 2, 343_980)

TICK_S = 0.001

Call = Callable[[], Awaitable[NDArray[Any]]]


class Still(ServedModel):
    """Four stems of silence, at once."""

    name = "still"
    inputs = (TensorSpec("mixture", "FP32", (-1, *WINDOW[1:])),)
    outputs = (TensorSpec("stems", "FP32", (-1, *STEMS[1:])),)
    max_batch = 1
    stems = np.zeros(STEMS, np.float32)

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Nothing is computed."""
        return {"stems": self.stems}


class Generated(protocol.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The same over plain protobuf messages."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC names it
        """Read the tensor, write the tensor."""
        np.frombuffer(request.raw_input_contents[0], np.float32).reshape(WINDOW)
        response = messages.ModelInferResponse(model_name="still")
        response.outputs.add(name="stems", datatype="FP32", shape=STEMS)
        response.raw_output_contents.append(Still.stems.tobytes())
        return response


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="calls of each side")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(serve(options.serve))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(Path(folder), options.rounds))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


async def serve(folder: Path) -> None:
    """Both servers in one process, until killed."""
    service = InferenceServer(STAGE, 8, Workers(1), is_near=True)
    service.add(Still())
    ours, generated = (
        grpc.aio.server(options=SERVER_OPTIONS),
        grpc.aio.server(options=SERVER_OPTIONS),
    )
    service.add_to(ours)
    protocol.add_GRPCInferenceServiceServicer_to_server(Generated(), generated)
    ours.add_insecure_port(f"unix:{folder / STAGE}.sock")
    generated.add_insecure_port(f"unix:{folder}/generated.sock")
    await ours.start()
    await generated.start()
    print("ready", flush=True)
    await ours.wait_for_termination()


async def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Both sides in turn."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.hop", "--serve", str(folder)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout
    await server.stdout.readline()
    entry = ModelEntry("still", STAGE, 1, "random", "", "", "", 0, {"cpu": 1}, ())
    runners = Runners(Settings(models_dir=folder, runtime_dir=folder), {"still": entry})
    window = np.random.default_rng(0).standard_normal(WINDOW).astype(np.float32)
    async with grpc.aio.insecure_channel(
        f"unix:{folder}/generated.sock", options=CHANNEL_OPTIONS
    ) as channel:
        stub = protocol.GRPCInferenceServiceStub(channel)

        async def ours() -> NDArray[Any]:
            outputs = await runners.for_song()("still", {"mixture": window})
            return outputs["stems"]

        async def generated() -> NDArray[Any]:
            request = messages.ModelInferRequest(model_name="still")
            request.inputs.add(name="mixture", datatype="FP32", shape=WINDOW)
            request.raw_input_contents.append(window.tobytes())
            response = await stub.ModelInfer(request)
            return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(STEMS)

        sides: dict[str, Call] = {"ours": ours, "generated": generated}
        load_before = os.getloadavg()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for call in sides.values():  # connections, and memory from the system
            await call()
        for _ in range(rounds):
            for name, call in sides.items():
                found[name].append(await timed(call))
    await runners.close()
    server.kill()
    await server.wait()
    return {
        "what": "the hop: 2.8 MB there and 11 MB back, no computation",
        "rounds": rounds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": [round(load, 1) for load in load_before],
        },
        "median_ms": {name: _median_ms(side, 0) for name, side in found.items()},
        # What it costs where nobody else wants the cores.
        "least_ms": {
            name: round(1_000 * min(wall_s for wall_s, _ in side), 1)
            for name, side in found.items()
        },
        "median_hold_up_ms": {name: _median_ms(side, 1) for name, side in found.items()},
    }


async def timed(call: Call) -> tuple[float, float]:
    """How long a call took, and the longest time in which it gave nobody else a turn, in s."""
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            longest_s = max(longest_s, time.perf_counter() - before_s - TICK_S)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    start_s = time.perf_counter()
    stems = await call()
    wall_s = time.perf_counter() - start_s
    watcher.cancel()
    assert stems.shape == STEMS
    return wall_s, longest_s


def _median_ms(side: list[tuple[float, float]], index: int) -> float:
    return round(1_000 * statistics.median(times[index] for times in side), 1)


if __name__ == "__main__":
    sys.exit(main())
