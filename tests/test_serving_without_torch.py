"""What serves imports no torch, although the environment of these tests has it."""

from __future__ import annotations

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
import importlib, sys
import grpc_service, service
from remix.settings import read_settings
from remix.stages import STAGES
for stage in STAGES:
    name = "".join(word.capitalize() for word in stage.split("_"))
    runner = getattr(importlib.import_module(f"runners.{stage}"), name).inner
    models = list(runner().load(read_settings()))
    print(stage, len(models))
print("torch in sys.modules:", "torch" in sys.modules)
"""


def test_composer_and_runners_with_their_models_import_no_torch() -> None:
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    *loaded, answer = said.strip().splitlines()
    assert {line.split()[0] for line in loaded} == set(STAGES)
    assert all(int(line.split()[1]) > 0 for line in loaded)
    assert answer == "torch in sys.modules: False"


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
