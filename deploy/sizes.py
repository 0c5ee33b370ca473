"""measured cost of a song -> how many of what for so many songs an hour: deploy/SIZES.md.

    python -m deploy.sizes [--check]

From benchmarks/results/song_cost.json (processor time and bytes of a second of song by process),
jobs/cost_model.json (how long a song takes), benchmarks/results/separate_stems.json (HTDemucs) and
the chart's values (cores of a replica, the share of them that may be busy). What it guesses, it
says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "deploy/SIZES.md"

SONG_S = 210.0
"""A song of three and a half minutes."""

SONGS_PER_HOUR = (10, 100, 1_000, 10_000, 100_000, 1_000_000)

NODE_CORES, NODE_RESERVED_CORES = 16, 1
"""A machine, and what Kubernetes and its agents have of it: a guess."""

NOTES_PER_S = 8
"""Transactions of a running job: progress and sound, each at most every quarter of a second
(jobs/work.py, NOTE_S)."""

POLLS_PER_S = 2.4
"""Transactions of a composer: two each second for what there is to do (jobs/workflow.py, POLL_S),
leases four times in ten seconds (jobs/worker.py, LEASES_RENEWED)."""

FILE_BYTES_PER_SONG_S = (2 + 4 + 4 + 2) * 2 * 44_100
"""Stereo: remix and voice in 16 bits, two stems in 32. The cache of windows comes besides."""

CONNECTIONS_PER_COMPOSER = 500
"""One to each replica of each runner, kept alive by a ping every 5 s. Where it hurts was not
measured: a guess, and what a cell is cut by."""


@dataclass(frozen=True)
class Cost:
    """What a second of song costs, and how much of it a replica does.

    Args:
        cpu_s: seconds of processor time, by process.
        wire_bytes: between the composer and the runners.
        start_s: of a song that has two cores to itself, beside `per_song_s` for each second of it.
        per_song_s: see there.
        replica_cores: of a replica, by process.
        busy_share: of them that may be busy on average.
        max_remixes: songs at once in a composer.
    """

    cpu_s: dict[str, float]
    wire_bytes: float
    start_s: float
    per_song_s: float
    replica_cores: dict[str, int]
    busy_share: float
    max_remixes: int


@dataclass(frozen=True)
class Size:
    """What so many songs an hour need.

    Args:
        songs_per_hour: as asked.
        busy_cores: by process, on average.
        replicas: by process.
        in_flight: songs at once.
        machines: with `NODE_CORES` each.
        connections: of each composer.
        cells: into how many releases it is cut, each with a database of its own.
        wire_bits_per_s: between composers and runners.
        transactions_per_s: at most.
        files_bytes_per_day: that jobs leave, until they expire.
    """

    songs_per_hour: int
    busy_cores: dict[str, float]
    replicas: dict[str, int]
    in_flight: float
    machines: int
    connections: int
    cells: int
    wire_bits_per_s: float
    transactions_per_s: float
    files_bytes_per_day: float


def read_cost(
    song_cost: dict[str, Any], cost_model: dict[str, Any], values: dict[str, Any]
) -> Cost:
    """From the three files."""
    cores = {stage: int(runner["cpu"]) for stage, runner in values["runners"].items()}
    return Cost(
        cpu_s=song_cost["cpu_s_per_song_s"],
        wire_bytes=sum(song_cost["wire_bytes_per_song_s"].values()),
        start_s=cost_model["alone"]["start_s"],
        per_song_s=cost_model["alone"]["per_song_s"],
        replica_cores={**cores, "composer": int(values["composer"]["cpu"])},
        busy_share=values["autoscaling"]["busyShare"],
        max_remixes=values["composer"]["maxRemixes"],
    )


def read_values() -> dict[str, Any]:
    """The chart's, with the profile `cpu` over them."""
    chart = ROOT / "deploy/helm"
    values: dict[str, Any] = yaml.safe_load((chart / "values.yaml").read_text())
    over = yaml.safe_load((chart / "values-cpu.yaml").read_text())
    values["composer"] |= over["composer"]
    for stage, runner in over["runners"].items():
        values["runners"][stage] |= runner
    return values


def size_for(songs_per_hour: int, cost: Cost, song_s: float = SONG_S) -> Size:
    """How many of what."""
    per_s = songs_per_hour / 3600
    busy = {process: per_s * song_s * each for process, each in cost.cpu_s.items()}
    replicas = {
        process: max(1, math.ceil(cores / (cost.replica_cores[process] * cost.busy_share)))
        for process, cores in busy.items()
    }
    in_flight = per_s * (cost.start_s + cost.per_song_s * song_s)
    # A composer has room for so many songs, whatever they leave of its cores.
    room = math.ceil(in_flight / (cost.max_remixes * cost.busy_share))
    replicas["composer"] = max(replicas["composer"], room)
    cores = sum(cost.replica_cores[process] * count for process, count in replicas.items())
    runners = sum(replicas.values()) - replicas["composer"]
    cells = math.ceil(runners / CONNECTIONS_PER_COMPOSER)
    return Size(
        songs_per_hour=songs_per_hour,
        busy_cores=busy,
        replicas=replicas,
        in_flight=in_flight,
        machines=math.ceil(cores / (NODE_CORES - NODE_RESERVED_CORES)),
        connections=math.ceil(runners / cells),
        cells=cells,
        wire_bits_per_s=8 * per_s * song_s * cost.wire_bytes,
        transactions_per_s=in_flight * NOTES_PER_S + replicas["composer"] * POLLS_PER_S,
        files_bytes_per_day=24 * songs_per_hour * song_s * FILE_BYTES_PER_SONG_S,
    )


def table(sizes: list[Size]) -> list[str]:
    """Rows of Markdown, a column for each size."""

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    processes = sorted(sizes[0].replicas, key=lambda name: (name != "composer", name))
    return [
        row("songs an hour", [f"{size.songs_per_hour:,}" for size in sizes]),
        row("---", ["---:"] * len(sizes)),
        *(
            row(f"`{process}`, replicas", [f"{size.replicas[process]:,}" for size in sizes])
            for process in processes
        ),
        row("cores busy, on average", [f"{sum(s.busy_cores.values()):,.1f}" for s in sizes]),
        row(f"machines of {NODE_CORES} cores", [f"{size.machines:,}" for size in sizes]),
        row("songs at once", [f"{size.in_flight:,.1f}" for size in sizes]),
        row("composers ↔ runners, Gbit/s", [f"{s.wire_bits_per_s / 1e9:,.2f}" for s in sizes]),
        row("database, transactions/s, at most", [f"{s.transactions_per_s:,.0f}" for s in sizes]),
        row("files a day, GB", [f"{s.files_bytes_per_day / 1e9:,.0f}" for s in sizes]),
        row("cells (below)", [f"{size.cells:,}" for size in sizes]),
    ]


TEXT = """\
# Sizes

Made by `python -m deploy.sizes`, do not edit. It counts from two measurements:

- `benchmarks/results/song_cost.json`: `{command}`,
  on {machine}, load {load}, with
  {models};
- `jobs/cost_model.json`: {cost_machine}.

On other hardware, or with other models, measure again by the first command, and run this again.

## What a second of song costs

| process | processor time, s | share | memory after some songs, MB |
| --- | ---: | ---: | ---: |
{costs}
| all | {total_s:.4f} | | |

Between composer and runners go {wire_mb:.1f} MB for a second of song, without tensors whose length
varies (of the voice, of notes). The process that decodes the upload is not counted: it ends after a
fraction of a second.

## For songs of {song_s:.0f} s

A replica has the cores of `values-cpu.yaml` ({cores}), of which {busy:.0%} may be busy on average;
a composer works on {max_remixes} songs at once. One takes {alone_s:.0f} s with two cores to itself.

{table}

With HTDemucs instead of Spleeter a second of song costs `separate_stems` {htdemucs_s:.2f} s of
processor time (`ours` in `benchmarks/results/separate_stems.json`), as much as {htdemucs_times:.1f}
times all of the above.

**GPUs**: nothing was measured on one, so nothing is computed here.

## What gives first

1. **Processor time in `{first}`**, {first_share:.0%} of all. Replicas grow by themselves;
   what ends it is the number of machines.
2. **64 waiting jobs** (`PHILHARMONICS_MAX_WAITING_JOBS`), {waiting_s:.0f} s of arrivals at
   1,000 songs an hour. Set it in `composer.environment` to what may wait.
3. **The one database.** A running job writes up to {notes} times a second, and who begins a job
   reads every waiting one. Beyond what your PostgreSQL does (`pgbench` tells): cells.
4. **The data volume.** One shared file system holds files and cache of all composers; beyond what
   it takes, an object store (`objectStore`), whose `fsspec` package an image of yours must have.
5. **Connections.** A composer keeps one to every replica of every runner, with a ping each 5 s. The
   table cuts cells at {connections}, which is a guess: where it hurts was not measured.
6. **The network**: the row of the wire.

A *cell* is a release with a database of its own. Cells do not know of each other: what stands
before them keeps a caller on one cell, where his jobs are known. Thousands of machines are many
cells, each with at most so many replicas of runners.
"""


def document(
    song_cost: dict[str, Any], cost_model: dict[str, Any], separation: dict[str, Any], cost: Cost
) -> str:
    """deploy/SIZES.md."""
    total_s = sum(cost.cpu_s.values())
    shares = sorted(cost.cpu_s.items(), key=lambda item: -item[1])
    runs = [run["processor_s"] for run in separation["runs"]["ours"]]
    htdemucs_s = statistics.median(runs) / separation["seconds_of_audio"]
    return TEXT.format(
        command=song_cost["command"],
        machine=song_cost["machine"],
        load=song_cost["load_average"],
        cost_machine=cost_model["machine"],
        models=", ".join(song_cost["models"]),
        costs="\n".join(
            f"| `{name}` | {each:.4f} | {each / total_s:.0%} | "
            f"{song_cost['memory_mb'].get(name, '')} |"
            for name, each in shares
        ),
        total_s=total_s,
        wire_mb=cost.wire_bytes / 1e6,
        song_s=SONG_S,
        cores=cost.replica_cores["composer"],
        busy=cost.busy_share,
        max_remixes=cost.max_remixes,
        alone_s=cost.start_s + cost.per_song_s * SONG_S,
        table="\n".join(table([size_for(count, cost) for count in SONGS_PER_HOUR])),
        htdemucs_s=htdemucs_s,
        htdemucs_times=htdemucs_s / total_s,
        first=shares[0][0],
        first_share=shares[0][1] / total_s,
        waiting_s=64 * 3.6,
        notes=NOTES_PER_S,
        connections=CONNECTIONS_PER_COMPOSER,
    )


def main() -> None:
    """Write the document, or say that it is not what the figures say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if it would change")
    arguments = parser.parse_args()
    results = ROOT / "benchmarks/results"
    song_cost = json.loads((results / "song_cost.json").read_text())
    separation = json.loads((results / "separate_stems.json").read_text())
    cost_model = json.loads((ROOT / "jobs/cost_model.json").read_text())
    cost = read_cost(song_cost, cost_model, read_values())
    text = document(song_cost, cost_model, separation, cost)
    if not arguments.check:
        DOCUMENT.write_text(text)
    elif DOCUMENT.read_text() != text:
        sys.exit("deploy/SIZES.md is not what the figures say: python -m deploy.sizes")


if __name__ == "__main__":
    main()
