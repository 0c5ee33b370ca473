"""requirements -> what the GPU image would install, and how large it is; nothing is downloaded.

    python docker/resolve_cuda.py

`uv lock` (requirements/chart.txt) resolves the set that docker/Dockerfile installs for
DEVICE=cuda, for Linux on x86_64 and the image's Python, and its lock file has each wheel's size.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
SHOWN = 8
PROJECT = """
[project]
name = "runner-cuda"
version = "0"
requires-python = "=={python}.*"
dependencies = [{dependencies}]
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]
"""


def requirements() -> list[str]:
    """What the Dockerfile installs: serving.txt less what it leaves out, and serving-cuda.txt."""
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    left_out = re.search(r'^ARG LEFT_OUT="(.*)"$', dockerfile, re.MULTILINE)
    assert left_out is not None
    lines = [
        line
        for line in (ROOT / "requirements/serving.txt").read_text().splitlines()
        if not re.match(rf"(onnxruntime|{left_out[1]})==", line)
    ]
    lines += (ROOT / "requirements/serving-cuda.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def sizes() -> dict[str, int]:
    """Bytes of the wheel of each package of the resolved set.

    Raises:
        SystemExit: the set does not resolve.
    """
    with tempfile.TemporaryDirectory() as folder:
        dependencies = ", ".join(f'"{line}"' for line in requirements())
        text = PROJECT.format(python=PYTHON, dependencies=dependencies)
        Path(folder, "pyproject.toml").write_text(text)
        command = [sys.executable, "-m", "uv", "lock", "--quiet", "--project", folder]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("The GPU image's requirements do not resolve; uv says why above.")
        lock = tomllib.loads(Path(folder, "uv.lock").read_text())
    tag = PYTHON.replace(".", "")
    fits = re.compile(rf"(cp{tag}-cp{tag}|abi3|py3-none|py2\.py3-none)-(any|manylinux.*x86_64)")
    found = {}
    for package in lock["package"]:
        files = [wheel for wheel in package.get("wheels", ()) if fits.search(wheel["url"])]
        if files or "sdist" in package:
            chosen = files or [package["sdist"]]
            found[f"{package['name']} {package['version']}"] = max(f["size"] for f in chosen)
    return found


def main() -> None:
    """Print the largest, and the sum."""
    found = sizes()
    for name, size in sorted(found.items(), key=lambda item: -item[1])[:SHOWN]:
        print(f"{size / 1e6:8.0f} MB  {name}")
    print(f"{sum(found.values()) / 1e6:8.0f} MB  {len(found)} packages, as they are fetched")


if __name__ == "__main__":
    main()
