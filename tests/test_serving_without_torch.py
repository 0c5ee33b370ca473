"""What serves imports no torch, although the environment of these tests has it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from remix.manifest import MANIFEST_PATH
from remix.stages import STAGES
from tests.conftest import ServerProcess

ROOT = MANIFEST_PATH.parent

SERVE = """
import importlib, json, sys
import grpc_service, service
from remix.settings import read_settings
from remix.stages import STAGES
models = {}
for stage in STAGES:
    name = "".join(word.capitalize() for word in stage.split("_"))
    runner = getattr(importlib.import_module(f"runners.{stage}"), name).inner
    models[stage] = len(list(runner().load(read_settings())))
print(json.dumps({"models": models, "torch": "torch" in sys.modules}))
"""


def test_composer_and_runners_with_their_models_import_no_torch() -> None:
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    answer = json.loads(said.splitlines()[-1])  # pyfluidsynth prints before it where CI is set
    assert set(answer["models"]) == set(STAGES)
    assert all(count > 0 for count in answer["models"].values())
    assert answer["torch"] is False


@pytest.mark.slow
def test_no_process_of_a_server_has_torch_in_its_memory(server: ServerProcess) -> None:
    libraries = [Path(f"/proc/{pid}/maps").read_text() for pid in server.pids()]
    assert any("onnxruntime" in maps for maps in libraries)
    assert not any("libtorch" in maps for maps in libraries)


@pytest.mark.parametrize(
    "requirements", sorted(path.name for path in (ROOT / "requirements").glob("serving*.txt"))
)
def test_requirements_of_the_images_name_no_torch(requirements: str) -> None:
    text = (ROOT / "requirements" / requirements).read_text()
    assert re.search(r"^onnxruntime", text, re.MULTILINE)
    assert not re.search(r"^(torch|demucs|tensorflow|lightning)", text, re.MULTILINE)
