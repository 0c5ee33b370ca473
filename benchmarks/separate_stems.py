"""Separation: ours against the `demucs` command, the same weights and the same overlap.

    python -m benchmarks.separate_stems [--seconds 60] [--rounds 3]

Each side is a command of its own: it starts, loads the full-size HTDemucs with the same random
weights, reads the same WAV, and writes four WAVs in float. They take turns. Ours runs the model
that the runner serves, one window at a time with all cores, as the runner does. Wall time and
processor time are of the whole command. Writes benchmarks/results/separate_stems.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from remix.audio import Audio
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.separate_stems import Separator, join_chunks, separate_stems
from remix.settings import read_settings
from remix.stages import Tensors

ROOT = MANIFEST_PATH.parent
RESULT = ROOT / "benchmarks/results/separate_stems.json"
MODEL = "htdemucs-random"
SAMPLE_RATE_HZ = 44_100


@dataclass(frozen=True)
class Cost:
    """Of one run of a command."""

    wall_s: float
    processor_s: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the song")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.ours:
        asyncio.run(separate_file(*options.ours))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.seconds, options.rounds)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


async def separate_file(song: Path, out: Path) -> None:
    """Our command: a WAV file -> a WAV for each stem, in the folder `out`."""
    from runners.runner import Runner
    from runners.separate_stems import served_model

    entry = read_manifest()[MODEL]
    served = served_model(entry, read_settings())
    workers = asyncio.Semaphore(Runner.workers)  # as the runner computes

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        async with workers:
            return await asyncio.to_thread(served, inputs)

    samples, rate_hz = soundfile.read(song, dtype="float32")
    mixture = Audio(np.ascontiguousarray(samples.T), rate_hz)
    stems = await join_chunks(separate_stems(mixture, Separator.of(entry), infer))
    out.mkdir(parents=True, exist_ok=True)
    for name, stem in stems.items():
        soundfile.write(out / f"{name}.wav", stem.T, rate_hz, "FLOAT")


def measure(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Both sides in turn, on a song made in `folder`."""
    from export.demo_song import write_demo_song
    from export.separate_stems import write_random_htdemucs

    settings = read_settings()
    entry = read_manifest()[MODEL]
    if not entry.is_installed(settings.models_dir):
        raise SystemExit(f"{MODEL} is not installed: run `python -m export.install` with torch.")
    write_demo_song(folder / "demo.mp3", ROOT / ".cache" / "sources")
    samples, rate_hz = soundfile.read(folder / "demo.mp3", dtype="float32")
    assert rate_hz == SAMPLE_RATE_HZ
    # Quiet, because demucs clips what it writes, and random networks amplify.
    song = 0.25 * np.resize(samples, (round(seconds * rate_hz), 2))
    soundfile.write(folder / "song.wav", song, rate_hz, "FLOAT")
    write_random_htdemucs(folder / "repo" / f"{MODEL.replace('-', '_')}.th")  # as demucs reads it

    ours = [sys.executable, "-m", "benchmarks.separate_stems", "--ours"]
    commands = {
        "demucs": [
            *(sys.executable, "-m", "demucs", "-n", MODEL.replace("-", "_")),
            *("--repo", str(folder / "repo"), "-d", "cpu", "--shifts", "0", "--overlap", "0.25"),
            *("--float32", "--clip-mode", "none", "-o", str(folder / "demucs")),
            str(folder / "song.wav"),
        ],
        "ours": [*ours, str(folder / "song.wav"), str(folder / "ours")],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    load_before = os.getloadavg()
    for _ in range(rounds):
        for name, command in commands.items():
            costs[name].append(run(command))
    return {
        "what": "separate_stems: the demucs command against ours, HTDemucs with random weights",
        "seconds_of_audio": seconds,
        "rounds": rounds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": [round(load, 1) for load in load_before],
        },
        "runs": {name: [asdict(cost) for cost in side] for name, side in costs.items()},
        "median_wall_s": {n: statistics.median(c.wall_s for c in s) for n, s in costs.items()},
        "times_as_fast_wall": ratio(costs, "wall_s"),
        "times_as_fast_processor": ratio(costs, "processor_s"),
        "largest_difference": largest_difference(folder),
    }


def run(command: list[str]) -> Cost:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall_s = time.monotonic() - start_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(round(wall_s, 2), round(processor_s, 2))


def ratio(costs: dict[str, list[Cost]], field: str) -> float:
    """Median of demucs by median of ours."""
    medians = {
        name: statistics.median(getattr(cost, field) for cost in side)
        for name, side in costs.items()
    }
    return round(float(medians["demucs"] / medians["ours"]), 2)


def largest_difference(folder: Path) -> float:
    """Between the two results, of full scale: that both did the same work."""
    differences = []
    for path in (folder / "ours").glob("*.wav"):
        ours, _ = soundfile.read(path, dtype="float32")
        theirs_path = next((folder / "demucs").rglob(path.name))
        theirs, _ = soundfile.read(theirs_path, dtype="float32")
        differences.append(float(np.abs(ours - theirs).max()))
    return max(differences)


if __name__ == "__main__":
    sys.exit(main())
