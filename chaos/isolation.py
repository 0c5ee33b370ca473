"""A network and mounts of our own, which nobody else sees and which are gone with us.

In them a disk can be full and a cable cut without being root, and no port is anybody else's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSIDE = "--inside"
"""The command's last argument, once it is."""

TOOLS = ("unshare", "nsenter", "setpriv", "ip")

NEAR, FAR = "10.99.0.1", "10.99.0.2"
"""Of the two ends of a cable; nothing else has an address here."""


def go_inside(arguments: list[str]) -> None:
    """Start the command again, inside; does not return.

    Raises:
        SystemExit: a tool is missing.
    """
    missing = [
        tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None
    ]
    if missing:
        raise SystemExit(
            f"Not found: {missing}. Debian's packages util-linux and iproute2 have them."
        )
    # Who is root stays root, for PostgreSQL's own user; others keep their name, with rights inside.
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    command = [sys.executable, "-m", "chaos", *arguments, INSIDE]
    os.execvp("unshare", ["unshare", *user, "--net", "--mount", *command])


def prepare() -> None:
    """Once inside: the loopback interface is down at first."""
    _ip("link", "set", "lo", "up")


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A file system of its own at a folder, in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={size_bytes}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "no file system can be mounted")
    try:
        yield
    finally:
        libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH: whoever uses it still, keeps it


class Cable:
    """A network with one machine in it, at `FAR`, and a cable to it.

    Whoever is to live there is started by `enter`.
    """

    def __init__(self) -> None:
        # Whoever holds a network is a process: it ends when we do, by its closed input.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.enter = ["nsenter", "--net", "--target", str(self._holder.pid)]

    def __enter__(self) -> Cable:
        """Lay the cable."""
        ours = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == ours:
            pass  # it is not there yet
        _ip("link", "add", "near", "type", "veth", "peer", "name", "far",
            "netns", str(self._holder.pid))  # fmt: skip
        _ip("address", "add", f"{NEAR}/30", "dev", "near")
        _ip("link", "set", "near", "up")
        self._far("address", "add", f"{FAR}/30", "dev", "far")
        self._far("link", "set", "lo", "up")
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self._holder.kill()
        self._holder.communicate()

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        self._far("link", "set", "far", "down")

    def heal(self) -> None:
        """It does again."""
        self._far("link", "set", "far", "up")

    def _far(self, *arguments: str) -> None:
        subprocess.run([*self.enter, "ip", *arguments], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
