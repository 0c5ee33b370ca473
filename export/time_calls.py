"""ways to compute the same thing -> their times, in turn, each in a process of its own.

The processes live side by side and compute one after the other, round by round, so that whatever
else the machine does falls on all of them alike. A side that serves imports no torch: its peak
memory is that of serving.

    python -m export.time_calls --worker SIDE.json     one side, driven over its pipes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.serve import ServedCall
from remix.errors import RemixError
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.settings import Device, Settings
from remix.stages import Tensors
from runners.runner import LARGE_ARRAYS_MALLOC, QUIET_MALLOC


@dataclass(frozen=True)
class Side:
    """One way to compute.

    Args:
        name: of the side.
        inputs: a file of arrays by name (`numpy.savez`).
        manifest: that has the entry; empty for the original.
        entry: name in the manifest; of the original: its architecture.
        models: the models folder; of the original: its checkpoint.
        threads: of one model call.
        rows: of a batch, of what serves; 0 to compute all in one call.
        device: that computes.
    """

    name: str
    inputs: str
    manifest: str
    entry: str
    models: str
    threads: int
    rows: int = 0
    device: Device = "cpu"


@dataclass(frozen=True)
class Timing:
    """What a side took.

    Args:
        median_s: of a call.
        runs_s: of every call, in order.
        processor_s: median of the processor time of a call, all threads together.
        peak_mb: largest resident memory of its process, from start to end.
        problem: why it has no figures; empty if it has.
    """

    median_s: float = 0.0
    runs_s: tuple[float, ...] = ()
    processor_s: float = 0.0
    peak_mb: int = 0
    problem: str = ""


def time_in_turn(sides: list[Side], folder: Path, rounds: int) -> dict[str, Timing]:
    """Every side `rounds` times, in turn, after one call each that does not count.

    A side that fails has a `problem` and keeps nobody else from being timed.
    """
    workers = {side.name: _Worker(side, folder) for side in sides}
    try:
        for _ in range(rounds + 1):
            for worker in workers.values():
                worker.run_once()
        return {name: worker.finish() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()


def _environment(side: Side) -> dict[str, str]:
    """Of the process of a side: what is served has what its runner has."""
    if not side.manifest:
        return {**os.environ}
    stage = read_manifest(Path(side.manifest))[side.entry].stage
    variables = LARGE_ARRAYS_MALLOC if stage == "separate_stems" else QUIET_MALLOC
    return {**os.environ, **{each["name"]: each["value"] for each in variables}}


class _Worker:
    """The process of a side."""

    def __init__(self, side: Side, folder: Path) -> None:
        description = folder / f"side-{side.name.replace(' ', '-').replace('/', '-')}.json"
        description.write_text(json.dumps(asdict(side)))
        self.log = description.with_suffix(".log")
        self.errors = self.log.open("w")
        self.problem = ""
        self.runs: list[dict[str, float]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "export.time_calls", "--worker", str(description)],
            cwd=MANIFEST_PATH.parent,
            env=_environment(side),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def run_once(self) -> None:
        if answer := self._ask("run"):
            self.runs.append(answer)

    def finish(self) -> Timing:
        answer = self._ask("end")
        if self.problem or len(self.runs) < 2:
            return Timing(problem=self.problem or "no call was timed")
        counted = self.runs[1:]
        return Timing(
            median_s=round(statistics.median(run["wall_s"] for run in counted), 4),
            runs_s=tuple(round(run["wall_s"], 4) for run in counted),
            processor_s=round(statistics.median(run["processor_s"] for run in counted), 4),
            peak_mb=round(answer["peak_mb"]),
        )

    def stop(self) -> None:
        with self.process:  # closes its pipes and waits for it
            self.process.kill()
        self.errors.close()

    def _ask(self, what: str) -> dict[str, float]:
        if self.problem:
            return {}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "null") or {}
        except OSError:
            answer = {}
        if not answer:
            lines = self.log.read_text().strip().splitlines()
            self.problem = lines[-1] if lines else "its process ended"
        elif "problem" in answer:
            self.problem = str(answer["problem"])
            return {}
        return answer


def work(side: Side) -> None:
    """The worker: a line in, a line out."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    inputs = dict(np.load(side.inputs))
    call: Callable[[Tensors], Mapping[str, Any]] | None = None
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"peak_mb": peak_mb()}), file=answers, flush=True)
            return
        try:
            call = call or _call_of(side)
            wall, processor = time.perf_counter(), time.process_time()
            call(inputs)
            answer: dict[str, Any] = {
                "wall_s": time.perf_counter() - wall,
                "processor_s": time.process_time() - processor,
            }
        except RemixError as error:
            answer = {"problem": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _call_of(side: Side) -> Callable[[Tensors], Mapping[str, Any]]:
    if side.manifest:
        entry = read_manifest(Path(side.manifest))[side.entry]
        models = Path(side.models)
        settings = Settings(models, models, threads=side.threads, device=side.device)
        served = ServedCall(entry, settings)
        return partial(served.in_batches, rows=side.rows) if side.rows else served
    import torch  # the originals', and nobody's who serves

    from export.architectures import architecture_of

    torch.set_num_threads(side.threads)
    original = architecture_of(side.entry).load(Path(side.models))
    original.device = side.device
    return original.reference


def peak_mb() -> float:
    """Largest resident memory of this process. `ru_maxrss` starts at its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    raise OSError("this system does not say a process's peak memory")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=Path, required=True)
    work(Side(**json.loads(parser.parse_args().worker.read_text())))
