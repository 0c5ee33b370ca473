"""names of Debian packages -> folders with their files: unpacked into .cache/, not installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from remix.errors import NotFound

UNPACK = Path(__file__).resolve().parent.parent / "scripts/unpack-debian"


def unpack(*packages: str) -> list[Path]:
    """A folder for each.

    Raises:
        NotFound: one is not to be had here.
    """
    done = subprocess.run([UNPACK, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotFound(
            f"{UNPACK.name} did not get {', '.join(packages)}: {done.stderr.strip()}",
            value=list(packages),
            limit="packages that apt-get gives",
            remedy="On a system without apt, put what is in them where --help says.",
        )
    return [Path(line) for line in done.stdout.splitlines()]
