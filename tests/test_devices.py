"""A device that is not there: refused in words, before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from remix.errors import InvalidModel
from remix.manifest import installed, read_manifest
from remix.settings import read_settings
from runners.open_graph import check_device
from tests.conftest import free_ports

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


# The set-up installs the onnxruntime without CUDA. With the other one, put in its place by hand on
# a machine with a GPU, the runner rightly starts: there is no error to look at.
@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime is the one for GPUs")
def test_runner_told_to_use_a_gpu_that_is_not_there_ends_with_the_remedy(tmp_path: Path) -> None:
    (http_port, port) = free_ports(2)
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "runners.transcribe_notes:TranscribeNotes",
         "--host", "127.0.0.1", "--port", str(http_port)],
        env={
            **os.environ,
            "PHILHARMONICS_DEVICE": "cuda",
            "PHILHARMONICS_LISTEN": f"127.0.0.1:{port}",
            "PHILHARMONICS_RUNTIME_DIR": str(tmp_path),
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, None)
    assert "The runner transcribe_notes does not start. The device cuda needs" in done.stderr
    assert "PHILHARMONICS_DEVICE=cpu" in done.stderr


def test_device_of_graphs_alone_is_asked_for() -> None:
    settings = read_settings()
    on_gpu = replace(settings, device="cuda")
    fonts = installed(read_manifest(), "synthesize_audio", settings.models_dir)
    graphs = installed(read_manifest(), "transcribe_notes", settings.models_dir)
    check_device(graphs, settings)
    check_device(fonts, on_gpu)  # FluidSynth has no use for one
    if not HAS_CUDA:
        with pytest.raises(InvalidModel, match="this onnxruntime has only"):
            check_device(graphs, on_gpu)
