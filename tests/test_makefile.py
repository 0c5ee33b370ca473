"""`make`: what a second run does not do, and what is said where packages cannot be installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make` looks at, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("requirements", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def make(folder: Path, *arguments: str) -> str:
    """What make says, as if it were not called from the `make test` that runs this."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def dry_run(checkout: Path, *targets: str) -> str:
    """The commands that make would run."""
    return make(checkout, "--dry-run", *targets)


def stamp(checkout: Path, environment: str, age_s: float = 0.0) -> None:
    """Say that an environment was completed, so many seconds after the requirements changed."""
    path = checkout / environment / "installed"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    changed = max(p.stat().st_mtime for p in checkout.glob("requirements/*"))
    changed = max(changed, (checkout / "pyproject.toml").stat().st_mtime)
    os.utime(path, (changed + age_s, changed + age_s))


@pytest.mark.parametrize(("target", "environment"), [("remix", ".venv"), ("test", ".venv-dev")])
def test_environment_is_built_once_and_again_when_requirements_change(
    target: str, environment: str, checkout: Path
) -> None:
    assert f"{environment}/bin/pip install" in dry_run(checkout, target)
    stamp(checkout, environment, age_s=1.0)
    assert "pip install" not in dry_run(checkout, target)
    stamp(checkout, environment, age_s=-1.0)
    assert f"{environment}/bin/pip install" in dry_run(checkout, target)


def test_remix_has_nothing_to_do_with_torch(checkout: Path) -> None:
    commands = dry_run(checkout, "remix")
    assert "requirements/serving.txt" in commands
    assert ".venv-dev" not in commands
    assert "requirements/export" not in commands


def test_help_names_every_target_that_a_user_may_want() -> None:
    named = {line.split()[0] for line in make(ROOT).splitlines()}
    targets = re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named == set(targets) - {"system-packages"}


def test_system_packages_are_left_alone_where_all_are_there() -> None:
    done = subprocess.run(
        [ROOT / "scripts/install-system-packages"], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


def test_system_packages_are_listed_where_they_cannot_be_installed(tmp_path: Path) -> None:
    for name in ("bash", "cat", "grep", "id"):  # a system without apt-get
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        [ROOT / "scripts/install-system-packages"],
        env={"PATH": str(tmp_path), "PYTHON": "a-python-that-is-not-there"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Missing from this system: python3 python3-venv" in done.stderr
