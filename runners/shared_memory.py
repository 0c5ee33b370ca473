"""Arrays between two processes of one machine: written once into memory that both can read.

Over a socket a window is copied some five times, and the composer's event loop stands still for
two of them; `benchmarks/hop.py` measures both ways. The memory has no name in any folder
(`memfd_create`): its owner names its descriptor, and when nobody holds or maps it, it is gone,
whoever was killed. The caller lends it, for the inputs and for the outputs, and for one call alone.
A descriptor's number comes again, an inode's does not: a runner that stood still meanwhile finds
that the memory of its call is gone, and never writes into another's.

The tensors' parameters are those of Triton's extension for shared memory, the regions need no
registration. Source: memfd_create(2), proc_pid_fd(5).
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidOption, excerpt

REGION = "shared_memory_region"
OFFSET = "shared_memory_offset"
BYTES = "shared_memory_byte_size"
OUTPUTS = "shared_memory_outputs"
"""Parameter of a request: the region for what is answered."""

ALIGNMENT_BYTES = 64
"""Of each array: a cache line, and what vector instructions want."""

IS_HERE = sys.platform == "linux"

_NAME = re.compile(r"(/proc/[1-9][0-9]*/fd/[0-9]+):([0-9]+)")


class Region:
    """Memory that another process can open by its name.

    Args:
        descriptor: of it; closed with the region. What is mapped stays.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0

    @property
    def inode(self) -> int:
        """What no other memory of this machine has."""
        return os.fstat(self._descriptor).st_ino

    @property
    def name(self) -> str:
        """What the other process opens, and the inode that it finds there."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}:{self.inode}"

    def write(self, array: NDArray[Any]) -> tuple[int, int]:
        """Put an array behind the others; its offset and size in bytes."""
        contents = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        offset, written = self._end if contents.nbytes else 0, 0
        while written < contents.nbytes:
            written += os.pwrite(self._descriptor, contents[written:], offset + written)
        self._end += -(-contents.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return offset, contents.nbytes

    @cached_property
    def contents(self) -> memoryview:
        """All that has been written, mapped for as long as somebody holds a view of it."""
        size = os.fstat(self._descriptor).st_size
        if not size:
            return memoryview(b"")
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return memoryview(mmap.mmap(self._descriptor, size, flags, mmap.PROT_READ))

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
    try:
        path, inode = found.groups() if (found := _NAME.fullmatch(name)) else ("", "")
        region = Region(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _nothing(name) from error
    with _closed(region):
        if region.inode != int(inode):
            raise _nothing(name)
        yield region


def _nothing(name: str) -> InvalidOption:
    return InvalidOption(
        f"{excerpt(name)!r} is no memory of a process on this machine.",
        value=excerpt(name),
        limit="/proc/PID/fd/NUMBER:INODE of a memfd",
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
