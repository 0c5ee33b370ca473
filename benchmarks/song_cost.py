"""What a song costs each process: processor time, memory, bytes on the wire.

    python -m benchmarks.song_cost [--rounds 5] [--seconds 60] [--server URL]

A server computes the same song several times, nothing of it cached; its `/metrics` tell before and
after. Processor time hardly depends on what else the machine does (a time of day does), so that
`python -m deploy.sizes` can count machines by it. Writes benchmarks/results/song_cost.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.remix import OPTIONS, ROOT, server_at, song_of
from client.api import Client
from remix.manifest import ModelFile, read_manifest
from remix.settings import read_settings

RESULT = ROOT / "benchmarks/results/song_cost.json"

SETTLE_S = 2.5
"""Processes tell of their processor time once a second."""

ITEM_BYTES = {"FP32": 4, "INT64": 8, "INT32": 4, "FP16": 2, "BOOL": 1}

SAMPLE = re.compile(r"^(philharmonics_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def read_metrics(client: Client) -> dict[tuple[str, str], float]:
    """Every sample of ours, by name and labels."""
    time.sleep(SETTLE_S)
    text = httpx.get(f"{client.base_url}/metrics", timeout=30.0).raise_for_status().text
    return {(name, labels): float(value) for name, labels, value in SAMPLE.findall(text)}


def window_bytes(file: ModelFile) -> int:
    """What a window is on the wire, there and back, without the tensors whose length varies."""
    return sum(
        ITEM_BYTES[spec.datatype] * math.prod(spec.shape[1:])
        for spec in (*file.inputs, *file.outputs)
        if min(spec.shape[1:], default=1) > 0
    )


def run(song: Path, seconds: float, rounds: int, client: Client) -> dict[str, Any]:
    """Measure."""
    client.remix_audio(song, OPTIONS)
    before = read_metrics(client)
    for number in range(rounds):
        start_s = time.perf_counter()
        client.remix_audio(song, OPTIONS)
        print(f"round {number + 1}: {time.perf_counter() - start_s:.1f} s")
    after = read_metrics(client)

    def spent(name: str, label: str) -> dict[str, float]:
        """By a label's value: what was added, per second of song."""
        added: dict[str, float] = {}
        for (found, labels), value in after.items():
            key = re.search(rf'{label}="([^"]*)"', labels)
            if found == name and key is not None and "outcome" not in labels:
                more = (value - before.get((found, labels), 0.0)) / (rounds * seconds)
                added[key[1]] = added.get(key[1], 0.0) + more
        return {key: round(value, 6) for key, value in sorted(added.items()) if value > 0}

    manifest = read_manifest()
    windows = spent("philharmonics_batch_windows_sum", "model")
    wire: dict[str, float] = {}
    for model, count in windows.items():
        entry = manifest[model]
        wire[entry.stage] = wire.get(entry.stage, 0.0) + count * window_bytes(entry.files[0])
    memory = {
        labels.split('"')[1]: round(value / 1e6)
        for (name, labels), value in sorted(after.items())
        if name == "philharmonics_process_memory_bytes"
    }
    return {
        "benchmark": "song_cost",
        "command": f"python -m benchmarks.song_cost --rounds {rounds} --seconds {seconds:.0f}",
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {read_settings().device}",
        "load_average": round(os.getloadavg()[0], 1),
        "models": sorted(windows),
        "cpu_s_per_song_s": spent("philharmonics_process_cpu_seconds_total", "process"),
        "windows_per_song_s": windows,
        "wire_bytes_per_song_s": {stage: round(value) for stage, value in sorted(wire.items())},
        "memory_mb": memory,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--server", default="")
    arguments = parser.parse_args()
    song = song_of(arguments.seconds, ROOT / ".cache")
    with server_at(arguments.server) as client:
        result = run(song, arguments.seconds, arguments.rounds, client)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
