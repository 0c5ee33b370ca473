"""Arrays between two processes of one machine: written into memory that both have, and read there.

Over a socket a window is copied some five times, and the composer's event loop stands still for
two of them; `benchmarks/hop.py` measures both ways. What is read is a copy: nothing of a call, no
memory and no descriptor, outlives it. The memory has no name in any folder
(`memfd_create`): its owner names its descriptor, and when nobody holds or maps it, it is gone,
whoever was killed. The caller lends it, for the inputs and for the outputs, and for one call alone.
A descriptor's number comes again, a memory's inode does not: a runner that stood still meanwhile
finds that the memory of its call is gone, and never writes into another's.

Both processes must be the same user's, and see each other in `/proc`: a runner that was started
beside its composer does.

Source: memfd_create(2), proc_pid_fd(5).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidOption, excerpt

INPUTS, OUTPUTS = "shared_memory_inputs", "shared_memory_outputs"
"""Parameters of a request: the names of its regions."""

OFFSET, BYTES = "shared_memory_offset", "shared_memory_byte_size"
"""Parameters of a tensor, as in Triton's extension for shared memory."""

ALIGNMENT_BYTES = 64
"""Of each array: a cache line, and what vector instructions want."""

IS_HERE = sys.platform == "linux"

_NAME = re.compile(r"(/proc/[1-9][0-9]*/fd/[0-9]+):([0-9]+:[0-9]+)")


class Region:
    """Memory that another process can open by its name.

    Args:
        descriptor: of it; closed with the region.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0

    @property
    def identity(self) -> str:
        """Device and inode, which nothing else on this machine has."""
        found = os.fstat(self._descriptor)
        return f"{found.st_dev}:{found.st_ino}"

    @property
    def name(self) -> str:
        """What the other process opens, and what it must find there."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}:{self.identity}"

    def write(self, array: NDArray[Any]) -> tuple[int, int]:
        """Put an array behind those that this side has put; its offset and size in bytes."""
        contents = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        offset, written = self._end if contents.nbytes else 0, 0
        while written < contents.nbytes:
            written += os.pwrite(self._descriptor, contents[written:], offset + written)
        self._end += -(-contents.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return offset, contents.nbytes

    def read(self, offset: int, size: int) -> memoryview:
        """A copy of some bytes, fewer where there are not so many."""
        contents, read = np.empty(size, np.uint8).data, 0
        while count := os.preadv(self._descriptor, [contents[read:]], offset + read):
            read += count
        return contents[:read]

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class Lent:
    """What a caller lends a runner for one call."""

    inputs: Region
    outputs: Region


@contextmanager
def lent() -> Iterator[Lent]:
    """Two empty regions."""
    with _closed(_made()) as inputs, _closed(_made()) as outputs:
        yield Lent(inputs, outputs)


@contextmanager
def opened(name: str) -> Iterator[Region]:
    """Another process's region.

    Raises:
        InvalidOption: the name is none, or nothing is there any more.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise _nothing(name)
    try:
        region = Region(os.open(found[1], os.O_RDWR | os.O_CLOEXEC))
    except (FileNotFoundError, PermissionError) as error:
        raise _nothing(name) from error
    with _closed(region):
        if region.identity != found[2]:
            raise _nothing(name)
        yield region


def _nothing(name: str) -> InvalidOption:
    return InvalidOption(
        f"{excerpt(name)!r} is no memory of a process on this machine.",
        value=excerpt(name),
        limit="/proc/PID/fd/NUMBER:DEVICE:INODE of a memfd",
        remedy="Send the tensors in the message.",
    )


def _made() -> Region:
    return Region(os.memfd_create("philharmonics", os.MFD_CLOEXEC))


@contextmanager
def _closed(region: Region) -> Iterator[Region]:
    try:
        yield region
    finally:
        region.close()
