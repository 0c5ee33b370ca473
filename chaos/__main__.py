"""`make chaos`: breaks a service under load, piece by piece; ends with 1 if anything was lost.

python -m chaos                        everything; a quarter of an hour or more
python -m chaos --only runners disk    some of it
python -m chaos --list                 what there is
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos import cancelling, commit_points, deaths, isolation, rolling, surroundings
from chaos.report import LEGEND, head, line, write
from chaos.world import Outcome, World
from load_tests.environment import ROOT, environment
from load_tests.songs import recordings

Scenario = Callable[[World], Iterator[Outcome]]

SCENARIOS: dict[str, Scenario] = {
    "runners": deaths.runners,
    "composer": deaths.composer,
    "service": deaths.service,
    "hung": deaths.hung,
    "zombie": deaths.zombie,
    "heir": deaths.heir,
    "postgresql": deaths.database,
    "disk": surroundings.disk,
    "network": surroundings.network,
    "rolling": rolling.rolling,
    "cancels": cancelling.cancels,
    "commits": commit_points.sqlite,
    "commits-postgresql": commit_points.postgresql,
}

ALONE = {"commits-postgresql"}
"""Only where it is named: it takes minutes, and its steps are those of `commits`."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--list", action="store_true", help="what there is, and nothing else")
    parser.add_argument("--songs", type=Path, default=ROOT / ".cache/demo_song.mp3")
    parser.add_argument("--seed", type=int, default=1, help="of the songs and the moments")
    parser.add_argument("--out", type=Path, default=ROOT / "out/chaos", help="folder of the report")
    parser.add_argument(isolation.INSIDE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:20}{(scenario.__doc__ or '').splitlines()[0]}")
        return 0
    if not arguments.inside:
        isolation.go_inside(sys.argv[1:])
    isolation.prepare()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and clear up
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    begin_s, facts, outcomes = time.monotonic(), environment(), list[Outcome]()
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder,
        World(Path(folder), recordings(arguments.songs), arguments.seed) as world,
    ):
        print(head(), flush=True)
        for name in arguments.only or [n for n in SCENARIOS if n not in ALONE]:
            try:
                for outcome in SCENARIOS[name](world):
                    outcomes.append(outcome)
                    print(line(outcome), flush=True)
            except Exception as error:  # noqa: BLE001 - what was found before it is told all the same
                outcomes.append(Outcome(name, "", violations=[f"it broke off: {error!r}"]))
                print(line(outcomes[-1]), flush=True)
        for log in sorted(Path(folder).glob("*/log")):
            (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
            shutil.copy(log, arguments.out / "logs" / log.parent.name)
    took_s = time.monotonic() - begin_s
    print(f"{LEGEND}\n{took_s:.0f} s", *write(arguments.out, facts, outcomes, took_s), sep="\n")
    return int(not outcomes or any(outcome.violations for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
