"""`philharmonics export` -> `python -m export` of the environment that has torch.

The exporters need torch and the original libraries; the environment that serves has neither. They
run as a program of their own, in `.venv-dev` of the checkout, or in this environment if that one
has torch.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from client.local_server import StartFailed

CHECKOUT = Path(__file__).resolve().parent.parent


def export_python(checkout: Path = CHECKOUT) -> str:
    """The interpreter that can export.

    Raises:
        StartFailed: there is none.
    """
    if importlib.util.find_spec("torch") is not None:
        return sys.executable
    candidate = checkout / ".venv-dev" / "bin" / "python"
    if candidate.is_file():
        return str(candidate)
    raise StartFailed(
        "Exporting needs torch and the original libraries: torch is not installed in "
        f"{sys.prefix}, and there is no {candidate}. Run `make export-environment` in the "
        "checkout (torch without CUDA: 200 MB), then try again. Serving needs none of it."
    )


def run_export(arguments: list[str], module: str = "export") -> int:
    """Run the exporter, or another module of that environment; its exit code.

    Raises:
        StartFailed: no interpreter here can.
    """
    command = [export_python(), "-m", module, *arguments]
    return subprocess.run(command, check=False).returncode


def run_revocation(arguments: list[str]) -> int:
    """Revoke a voice, in this environment: the jobs' database is known here; its exit code."""
    command = [sys.executable, "-m", "jobs.voices", "remove", *arguments]
    return subprocess.run(command, check=False).returncode


def run_tuner(arguments: list[str]) -> int:
    """Measure batch limits, in this environment: what serves is what is measured; its exit code."""
    command = [sys.executable, "-m", "export.tune", *arguments]
    return subprocess.run(command, check=False).returncode
