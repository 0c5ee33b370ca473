"""Imports run one way, and torch stays where it belongs: what CONTRIBUTING promises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = (
    "remix",
    "runners",
    "remix_v1",
    "jobs",
    "http_api",
    "grpc_api",
    "telemetry",
    "client",
    "export",
    "training",
    "benchmarks",
    "load_tests",
    "chaos",
    "deploy",
    "tests",
)
ROOT_MODULES = ("service", "grpc_service")
OURS = {*FOLDERS, *ROOT_MODULES}

MAY_IMPORT: dict[str, set[str]] = {
    "remix": set(),
    "telemetry": {"remix"},
    "runners": {"remix", "telemetry"},
    "jobs": {"remix", "telemetry"},
    "remix_v1": set(),
    "http_api": {"remix", "jobs", "telemetry"},
    "grpc_api": {"remix", "jobs", "remix_v1", "telemetry"},
    "grpc_service": {"remix", "jobs", "grpc_api", "remix_v1", "telemetry"},
    "service": {"remix", "runners", "jobs", "http_api", "grpc_service", "telemetry"},
    "client": set(),
    "load_tests": {"remix_v1"},
    "export": {"remix", "runners"},
    "training": {"remix", "export"},
    "chaos": {"load_tests", "remix_v1"},
    "deploy": set(),
    "benchmarks": OURS - {"tests", "chaos", "deploy"},
    "tests": OURS,
}
"""Which of ours each of ours may import, beside itself."""

WITH_TORCH = {"export", "training", "tests", "benchmarks"}
TORCH = {"torch", "torchaudio", "demucs", "so_vits_svc_fork", "torchfcpe", "lightning"}

WITHOUT_TORCH_IN_EXPORT = {
    "__init__",
    "demo_song",
    "fetch_hub",
    "fetch_package",
    "fill_weights",
    "install",
    "origins",
    "progress",
    "read_arrays",
    "read_pickle",
    "serve",
    "tune",
}
"""What `make models` runs, in an environment without torch; and what calls the runners' models."""

RUNTIME = {"onnxruntime", "openvino"}
RUNTIME_IMPORTERS = {"runners/onnx_session.py", "runners/openvino_session.py"}
TORCH_IF_TOLD_TO = "runners/torchscript_session.py"
"""Imports torch when the manifest names the back end, which serving images never do."""
RUNTIME_MAY_BE_USED_BY = {"export", "training", "tests", "benchmarks"}

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def modules() -> list[Path]:
    """Every module of ours, relative to the root."""
    in_folders = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    at_root = [path for name in ROOT_MODULES if (path := ROOT / f"{name}.py").exists()]
    return [path.relative_to(ROOT) for path in sorted(in_folders + at_root)]


def imports_in(source: str, package: str) -> Iterator[str]:
    """The full names that a module imports, at its top or in its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            yield f"{base}.{node.module or ''}".strip(".")
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def imported_by(module: Path) -> set[str]:
    """The top-level names that a module imports."""
    source = (ROOT / module).read_text()
    return {name.split(".")[0] for name in imports_in(source, module.parts[0])}


def owner(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def broken(module: Path, imported: set[str]) -> list[str]:
    """Which rules a module breaks that imports these."""
    name, problems = owner(module), []
    if upwards := (imported & OURS) - {name} - MAY_IMPORT[name]:
        problems.append(f"{module} imports {upwards}; {name} may import {MAY_IMPORT[name]}")
    in_serving_part = name == "export" and module.stem in WITHOUT_TORCH_IN_EXPORT
    may_use_torch = name in WITH_TORCH or str(module) == TORCH_IF_TOLD_TO
    if imported & TORCH and (not may_use_torch or in_serving_part):
        problems.append(f"{module} imports {imported & TORCH}; serving has no torch")
    may_use_runtime = name in RUNTIME_MAY_BE_USED_BY or str(module) in RUNTIME_IMPORTERS
    if imported & RUNTIME and (not may_use_runtime or in_serving_part):
        problems.append(f"{module} imports {imported & RUNTIME}; only {RUNTIME_IMPORTERS} may")
    if imported & PICKLES and name != "tests":
        problems.append(f"{module} imports {imported & PICKLES}; nothing of ours unpickles")
    return problems


def test_modules_are_found() -> None:
    found = {str(module) for module in modules()}
    assert {"remix/stages.py", "runners/onnx_session.py", "export/install.py"} <= found


@pytest.mark.parametrize("module", modules(), ids=str)
def test_module_keeps_the_import_rules(module: Path) -> None:
    assert broken(module, imported_by(module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("remix/pipeline.py", "from runners.runner import Runner"),
        ("remix/pipeline.py", "def late():\n    import runners"),
        ("remix/pipeline.py", "import importlib\nimportlib.import_module('client.api')"),
        ("remix/pipeline.py", "import onnxruntime as ort"),
        ("runners/runner.py", "import torch.nn"),
        ("runners/runner.py", "from service import Remix"),
        ("client/api.py", "from remix.audio import Audio"),
        ("load_tests/songs.py", "import client"),
        ("chaos/store.py", "from jobs.rows import JOBS"),
        ("service.py", "import client.api"),
        ("grpc_service.py", "import service"),
        ("grpc_api/calls.py", "from http_api.answers import write_zip"),
        ("http_api/app.py", "from grpc_api.calls import remix"),
        ("http_api/app.py", "import service"),
        ("export/install.py", "import torch"),
        ("runners/openvino_session.py", "from export.compare import compare"),
        ("remix/manifest.py", "import pickle"),
    ],
)
def test_rules_see_a_module_that_breaks_them(module: str, source: str) -> None:
    """Else the test above would prove nothing."""
    path = Path(module)
    imported = {name.split(".")[0] for name in imports_in(source, path.parts[0])}
    assert broken(path, imported) != []


def names_in(requirements: str) -> set[str]:
    text = (ROOT / "requirements" / requirements).read_text()
    return {
        match[0].lower().replace("_", "-")
        for line in text.splitlines()
        if (match := re.match(r"[A-Za-z0-9._-]+", line))
    }


@pytest.mark.parametrize("requirements", ["serving.in", "serving.txt"])
def test_serving_requirements_have_no_torch(requirements: str) -> None:
    names = names_in(requirements)
    assert "bentoml" in names
    assert not {name for name in names if re.match(r"torch|tensorflow|nvidia-c|demucs", name)}


def test_serving_requirements_are_all_pinned_and_hold_what_is_asked_for() -> None:
    lines = (ROOT / "requirements/serving.txt").read_text().splitlines()
    assert [line for line in lines if not re.match(r"(#|[A-Za-z0-9._-]+==\S+$)", line)] == []
    asked = (ROOT / "requirements/serving.in").read_text().splitlines()
    pins = {re.sub(r"\[.*?\]", "", line).lower() for line in asked if "==" in line}
    locked = {line.lower().replace("_", "-") for line in lines}
    assert {pin.replace("_", "-") for pin in pins} - locked == set()
