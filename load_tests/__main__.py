"""Load tests of Deep Philharmonics.

python -m load_tests all                           what `make load` does, in 15 minutes
python -m load_tests run --rate 0.1 --seconds 60   one run, on a server of its own
python -m load_tests run --server http://127.0.0.1:3000 --scenario single_stream
python -m load_tests run --target basic-pitch --address 127.0.0.1:4001 --rate 20
python -m load_tests run --rate 0.1 --seconds 1800        a soak: see "grew" in its report
python -m load_tests run --rate 0.1 --seconds 60 --fault stop:remix:20:6
python -m load_tests.compare before/load.json after/load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from load_tests.environment import ROOT, environment
from load_tests.generator import Event, go_first
from load_tests.growth import growth
from load_tests.own_server import OwnServer, own_server
from load_tests.processes import (
    difference,
    faults,
    metrics_of,
    processes_of,
    watching,
)
from load_tests.report import write
from load_tests.runs import (
    IN_FLIGHT,
    Load,
    Objective,
    Result,
    offline,
    server,
    single_stream,
    summary,
)
from load_tests.songs import recordings
from load_tests.traffic import (
    END_TO_END,
    Door,
    Songs,
    Traffic,
    end_to_end,
    models_of,
    one_model,
)
from load_tests.whole import Plan, line, whole

DEMO_SONG = ROOT / ".cache/demo_song.mp3"


def main() -> int:
    """The command."""
    arguments = _parser().parse_args()
    begin_s = time.monotonic()
    if arguments.command == "all":
        with own_server() as own:
            go_first()
            report = asyncio.run(whole(own, _plan(arguments), begin_s))
    else:
        report = _one_run(arguments, begin_s)
    data, page = write(arguments.out, report)
    print(f"{page}\n{data}")
    return int(not all(run["generator"]["is_valid"] for run in report["runs"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    each = argparse.ArgumentParser(add_help=False)
    each.add_argument(
        "--songs", type=Path, default=DEMO_SONG, help="recording, or folder of recordings, to cut"
    )
    each.add_argument("--seed", type=int, default=1, help="of the schedules and the songs")
    each.add_argument(
        "--objective",
        type=float,
        nargs=2,
        default=(5.0, 0.5),
        metavar=("A", "B"),
        help="good is an answer within A + B times the seconds of audio (default 5 0.5)",
    )
    each.add_argument("--out", type=Path, default=ROOT / "out/load", help="folder of the report")
    _all(commands.add_parser("all", parents=[each], help="everything, on a server of its own"))
    _run(commands.add_parser("run", parents=[each], help="one run"))
    return parser


def _all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=15.0, help="for all of it (default 15)")
    parser.add_argument("--length", type=float, default=30.0, help="of the knee's songs, s")
    parser.add_argument(
        "--target", choices=END_TO_END, default="jobs", help="of the songs (default jobs)"
    )
    parser.add_argument(
        "--at-once", type=int, default=2, help="songs under way in the offline run (default 2)"
    )
    parser.add_argument(
        "--like", type=Path, help="load.json whose rates are used again, to be compared with it"
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", default="jobs", help="jobs (default), remix, grpc, or the name of a model"
    )
    parser.add_argument("--server", help="address of a server that runs; else one is started")
    parser.add_argument(
        "--address", help="host:port of the model's runner, or of the server's gRPC"
    )
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--pid", type=int, help="the running server's first process, to watch it")
    parser.add_argument(
        "--scenario", choices=("server", "single_stream", "offline"), default="server"
    )
    parser.add_argument("--rate", type=float, default=0.1, help="requests a second (server)")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--seconds", type=float, default=60.0, help="that are measured")
    parser.add_argument("--requests", type=int, default=8, help="of the offline scenario")
    parser.add_argument(
        "--in-flight",
        type=int,
        help="unanswered at once, at most (default 256; offline: 2 songs, 16 windows)",
    )
    parser.add_argument("--length", type=float, help="of every song, s; else 10 to 120 s")
    parser.add_argument("--warm", action="store_true", help="one song again and again")
    parser.add_argument(
        "--retry", action="store_true", help="a refused request comes again after Retry-After"
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:WHO:AT[:FOR]",
        help="stop:WHO:AT:FOR or kill:WHO:AT, s after the start; WHO: a pid, or a service of the "
        "watched server: remix, SeparateStems, ...",
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    songs = Songs(recordings(arguments.songs), arguments.length, arguments.seed)
    like = json.loads(arguments.like.read_text()) if arguments.like else None
    return Plan(
        arguments.minutes,
        songs,
        Objective(*arguments.objective),
        arguments.target,
        arguments.at_once,
        arguments.seed,
        like,
    )


def _one_run(arguments: argparse.Namespace, begin_s: float) -> dict[str, Any]:
    facts = environment()
    with ExitStack() as stack:
        own = None
        url, pid = arguments.server, arguments.pid
        if not url and not arguments.address:
            own = stack.enter_context(own_server())
            url, pid = own.url, own.pid
        watch = stack.enter_context(watching(pid, url, series=True)) if pid else None
        go_first()
        before = metrics_of(url) if url else {}
        result = asyncio.run(_ask(arguments, own, url, list(_events(arguments, pid))))
        counted = difference(before, metrics_of(url)) if url else {}
        run = {**summary(result), "metrics": counted}
    print(line(run))
    return {
        "environment": facts,
        "server": {"target": arguments.target},
        "plan": {
            "seed": arguments.seed,
            "song_s": arguments.length,
            "objective": run["objective"],
        },
        "took_s": round(time.monotonic() - begin_s, 1),
        "runs": [run],
        "skipped": [],
        "knee": None,
        "processes": growth(watch.samples) if watch else None,
    }


def _events(arguments: argparse.Namespace, pid: int | None) -> Iterator[Event]:
    known = {process.name: process.pid for process in processes_of(pid)} if pid else {}
    for text in arguments.fault:
        kind, who, at_s, *for_s = text.split(":")
        if who not in known and not who.isdecimal():
            raise SystemExit(f"--fault {text}: {who} is no pid and none of {', '.join(known)}.")
        yield from faults(
            known.get(who) or int(who), kind, float(at_s), float(for_s[0]) if for_s else 0.0
        )


async def _ask(
    arguments: argparse.Namespace, own: OwnServer | None, url: str, events: list[Event]
) -> Result:
    objective = Objective(*arguments.objective)
    name = f"{arguments.target} {arguments.scenario}"
    is_songs = arguments.target in END_TO_END
    async with _traffic(arguments, own, url) as traffic:
        if arguments.scenario == "single_stream":
            works = traffic.take(200 if is_songs else 10_000)
            return await single_stream(
                name, traffic.target, traffic.name, works, objective, arguments.seconds
            )
        if arguments.scenario == "offline":
            works = traffic.take(arguments.requests)
            return await offline(
                name,
                traffic.target,
                traffic.name,
                works,
                objective,
                arguments.in_flight or (2 if is_songs else 16),
            )
        load = Load(
            arguments.rate,
            arguments.seconds,
            arguments.arrivals,
            arguments.seed,
            arguments.in_flight or IN_FLIGHT,
        )
        return await server(
            name, traffic.target, traffic.name, load, traffic.works, objective, events=events
        )


@asynccontextmanager
async def _traffic(
    arguments: argparse.Namespace, own: OwnServer | None, url: str
) -> AsyncIterator[Traffic]:
    sources = recordings(arguments.songs)
    if arguments.target in END_TO_END:
        songs = Songs(sources, arguments.length, arguments.seed, arguments.warm)
        address = url
        if arguments.target == "grpc":
            address = own.grpc if own else arguments.address
        if not address:
            raise SystemExit("--address says where the server listens for gRPC.")
        door = Door(arguments.target, address, arguments.retry, arguments.key)
        async with end_to_end(door, songs) as traffic:
            yield traffic
        return
    rate_hz, address = 0, arguments.address
    if url:
        models = {model["name"]: model for model in models_of(url)}
        if arguments.target not in models:
            raise SystemExit(f"{arguments.target} is not served here; there are {list(models)}.")
        model = models[arguments.target]
        rate_hz = model["sample_rate_hz"]
        if own:
            address = own.runner(model["stage"])
    if not address:
        raise SystemExit("--address says where the model's runner listens.")
    async with one_model(address, arguments.target, rate_hz, sources[0], arguments.seed) as traffic:
        yield traffic


if __name__ == "__main__":
    sys.exit(main())
