"""What a process takes of its machine: memory, processor time, the GPU's memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
from prometheus_client import Counter, Gauge

MEMORY_BYTES = Gauge(
    "philharmonics_process_memory_bytes",
    "Resident memory of the composer, and of each stage's runner",
    ["process"],
    multiprocess_mode="livesum",
)
CPU_SECONDS = Counter(
    "philharmonics_process_cpu_seconds", "Processor time that it has used", ["process"]
)
GPU_BYTES = Gauge(
    "philharmonics_gpu_memory_bytes",
    "Memory of a GPU, used and total, as its driver has it; only where the models run on one",
    ["gpu", "kind"],
    multiprocess_mode="livemax",
)

EVERY_S = 1.0
"""Prometheus asks every few seconds; a reading takes 30 us of processor time."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessWatch:
    """Tells every second what this process takes, from `start` to `stop`.

    Args:
        process: its name, of a few.
        uses_gpu: whether GPUs are told of.
        also: is called each time; what else has to be looked at to be known.
    """

    def __init__(
        self, process: str, *, uses_gpu: bool = False, also: Callable[[], None] | None = None
    ) -> None:
        self._memory = MEMORY_BYTES.labels(process)
        self._cpu = CPU_SECONDS.labels(process)
        self._gpus = _gpus() if uses_gpu else []
        self._also = also
        self._told_s = 0.0
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell, in the running loop."""
        self._telling = asyncio.create_task(self._tell_on())

    async def stop(self) -> None:
        """Tell no more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    def tell(self) -> None:
        """Look once, and tell."""
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        self._memory.set(resident_pages * PAGE_BYTES)
        used_s = time.process_time()
        self._cpu.inc(used_s - self._told_s)
        self._told_s = used_s
        for index, gpu in enumerate(self._gpus):
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            GPU_BYTES.labels(str(index), "used").set(memory.used)
            GPU_BYTES.labels(str(index), "total").set(memory.total)
        if self._also is not None:
            self._also()

    async def _tell_on(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(EVERY_S)


def _gpus() -> list[object]:
    """Handles of the machine's GPUs; none where there is no driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
