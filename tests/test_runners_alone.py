"""Each runner by itself on ports of its own, called by a foreign client; and a composer that finds
them by their addresses."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from remix.errors import InvalidModel
from remix.generate_notes import generate_notes, one_plan, plan_song
from remix.manifest import ModelFile, TensorSpec, default_model, installed, read_manifest
from remix.notes import BeatGrid
from remix.options import GenerateOptions
from remix.settings import read_settings
from remix.stages import STAGES, Stage, Tensors
from runners.onnx_session import OnnxSession
from runners.tensor_messages import NUMPY_DTYPES
from tests.conftest import ROOT, ServerProcess, serving
from tests.test_remix_service import short_song, song
from tests.toy_runner import free_address

pytestmark = pytest.mark.slow

__all__ = ["short_song", "song"]  # fixtures


def service_of(stage: Stage) -> str:
    return f"runners.{stage}:{''.join(word.title() for word in stage.split('_'))}"


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Stage, str]]:
    """The five runners, each started alone: `bentoml serve runners.<stage>:<Service>`."""
    found = {stage: free_address() for stage in STAGES}
    with ExitStack() as stack:
        for stage, address in found.items():
            command = [sys.executable, "-m", "bentoml", "serve", service_of(stage)]
            folder = tmp_path_factory.mktemp(stage)
            stack.enter_context(serving(command, folder, 240.0, {"PHILHARMONICS_LISTEN": address}))
        yield found


@pytest.fixture(scope="module")
def composer(
    addresses: dict[Stage, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    environment = {
        f"PHILHARMONICS_RUNNER_{stage.upper()}": address for stage, address in addresses.items()
    }
    command = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
    with serving(command, tmp_path_factory.mktemp("composer"), 240.0, environment) as running:
        yield running


@pytest.mark.parametrize("stage", STAGES)
def test_tritonclient_reads_and_calls_every_model_of_a_runner(
    stage: Stage, addresses: dict[Stage, str]
) -> None:
    with triton.InferenceServerClient(addresses[stage]) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        models = installed(read_manifest(), stage, read_settings().models_dir)
        assert models
        for name in [model.name for model in models if model.weights != "random"]:
            metadata = client.get_model_metadata(name)
            values = first_window() if stage == "generate_notes" else zeros(metadata.inputs)
            inputs = []
            for tensor in metadata.inputs:
                array = values[tensor.name]
                inputs.append(triton.InferInput(tensor.name, array.shape, tensor.datatype))
                inputs[-1].set_data_from_numpy(array)
            result = client.infer(name, inputs, client_timeout=120.0)
            for tensor in metadata.outputs:
                array = result.as_numpy(tensor.name)
                assert array.shape[0] == 1
                assert array.ndim == len(tensor.shape)


def zeros(tensors: Iterable[Any]) -> Mapping[str, NDArray[Any]]:
    return {
        tensor.name: np.zeros([max(1, n) for n in tensor.shape], NUMPY_DTYPES[tensor.datatype])
        for tensor in tensors
    }


def first_window() -> Mapping[str, NDArray[Any]]:
    """What a song of eight beats sends first: tokens have a grammar, and zeros are none."""
    grid = BeatGrid(np.arange(17) / 2, 0, 4, 120.0, 0, "major")
    options = GenerateOptions()
    sent: list[Tensors] = []

    async def keep(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        sent.append(inputs)
        return {"tokens": np.full((1, 1), -1)}

    async def draw() -> None:
        plan = plan_song({}, grid, 4.0, options)
        async for _ in generate_notes(one_plan(plan), grid, 4.0, "any", keep, options):
            pass

    asyncio.run(draw())
    return sent[0]


def test_a_composer_finds_runners_by_their_addresses(
    composer: ServerProcess, short_song: bytes
) -> None:
    with httpx.Client(base_url=composer.url, timeout=300.0) as http:
        answer = http.post("/v1/remix", files={"song": ("song.wav", short_song)})
        assert answer.status_code == 200, answer.text[:500]
        assert answer.content.startswith(b"RIFF")
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in composer.pids()]
    assert len(commands) <= 3, "it started runners of its own"  # bentoml, its worker, a tracker


def test_a_runner_that_stops_ends_what_it_has_and_takes_nothing_new(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    address = free_address()
    command = [sys.executable, "-m", "bentoml", "serve", service_of("separate_stems")]
    folder = tmp_path_factory.mktemp("stops")
    model = default_model(read_manifest(), "separate_stems", read_settings().models_dir).name
    window = np.zeros((1, 2, read_manifest()[model].facts["window_samples"]), np.float32)
    mixture = triton.InferInput("mixture", window.shape, "FP32")
    mixture.set_data_from_numpy(window)

    with (
        serving(command, folder, 240.0, {"PHILHARMONICS_LISTEN": address}) as runner,
        triton.InferenceServerClient(address) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        calls = [threads.submit(client.infer, model, [mixture]) for _ in range(6)]
        await_rows(runner, model, 6)
        os.kill(runner.pid, signal.SIGTERM)
        for call in calls:
            assert call.result().as_numpy("stems").shape[0] == 1
        with (
            triton.InferenceServerClient(address) as late,
            pytest.raises(InferenceServerException, match="UNAVAILABLE"),
        ):
            late.infer(model, [mixture])
        ended = os.waitid(os.P_PID, runner.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


def await_rows(runner: ServerProcess, model: str, rows: int) -> None:
    """Return when so many windows have arrived at a runner."""
    names = ["queue_windows", "computing_windows", "windows_total"]
    until_s = time.monotonic() + 60.0
    while True:
        metrics = httpx.get(f"{runner.url}/metrics").text
        lines = [line for line in metrics.splitlines() if f'model="{model}"' in line]
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if any(line.startswith(f"philharmonics_{name}{{") for name in names)
        ]
        if sum(values) >= rows:
            return
        assert time.monotonic() < until_s, lines


def test_a_runner_refuses_to_start_on_a_file_with_another_checksum(tmp_path: Path) -> None:
    entry = read_manifest()["basic-pitch"]
    path = tmp_path / entry.files[0].path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not the model")
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", service_of("transcribe_notes")],
        cwd=ROOT,
        env={"PHILHARMONICS_MODELS": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "The runner transcribe_notes does not start." in done.stderr
    assert f"the manifest says {entry.files[0].sha256}" in done.stderr


def test_a_graph_with_another_signature_is_refused() -> None:
    entry = read_manifest()["basic-pitch"]
    file = entry.files[0]
    wrong = ModelFile(file.path, file.sha256, (TensorSpec("x", "FP32", (-1, 3)),), file.outputs)
    with pytest.raises(InvalidModel, match=r"has the inputs .* the manifest says"):
        OnnxSession(entry, wrong, read_settings())
