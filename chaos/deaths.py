"""`kill -9` under load: each runner, the composer, the whole service, PostgreSQL."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from chaos.caller import Caller
from chaos.postgres import BINARIES, postgres
from chaos.servers import STAGES, Server, worker_of
from chaos.world import Outcome, World, await_that, busy

COMPOSER = "remix"
"""BentoML's name of its worker."""

HUNG = "generate_notes"

UNDER_WAY = 2
"""Jobs that have ended when the composer dies: others are in every stage then."""


def runners(world: World) -> Iterator[Outcome]:
    """Each runner's process, in the middle of a window."""
    world.undisturbed(world.eight)
    for stage in STAGES:
        composer, runner = world.composer(), world.runners[stage]
        with world.running(composer):
            caller, begin_s = Caller([composer.url]), time.monotonic()
            told = caller.submit("k", world.eight)
            await_that(f"{stage} computes", lambda told=told, r=runner: busy(told, r))  # type: ignore[misc]
            yield _struck(world, f"runner {stage}", runner, worker_of(stage), caller, begin_s)


def composer(world: World) -> Iterator[Outcome]:
    """The composer's process, which BentoML's first process starts again."""
    world.undisturbed(world.eight)
    server = world.composer()
    with world.running(server):
        caller, begin_s = Caller([server.url]), time.monotonic()
        _await_ended(caller, world)
        yield _struck(world, "composer", server, COMPOSER, caller, begin_s)


def service(world: World) -> Iterator[Outcome]:
    """The first process of a service with all its runners: everything at once."""
    world.undisturbed(world.eight)
    server = world.composer(runners={})
    with world.running(server):
        caller, begin_s = Caller([server.url]), time.monotonic()
        _await_ended(caller, world)
        outcome = Outcome("service", "kill -9 of the first process; started again")
        struck_s = time.monotonic()
        server.kill()
        server.start()
        server.await_ready()
        outcome.back_s = time.monotonic() - struck_s
        yield world.judge(outcome, caller, begin_s, struck_s)


def hung(world: World) -> Iterator[Outcome]:
    """A runner stands still for good: nothing dies, and nothing is said."""
    world.undisturbed(world.eight)
    server = world.composer(runners={})
    with world.running(server):
        caller, begin_s = Caller([server.url]), time.monotonic()
        _await_ended(caller, world)
        worker = worker_of(HUNG)
        outcome = Outcome(f"hung {HUNG}", "SIGSTOP of its process, for good")
        struck_s, pid = time.monotonic(), server.worker(worker)
        os.kill(pid, signal.SIGSTOP)
        await_that("another one is started", lambda: server.was_replaced(worker, pid))
        server.await_ready()
        outcome.back_s = time.monotonic() - struck_s
        yield world.judge(outcome, caller, begin_s, struck_s)


def heir(world: World) -> Iterator[Outcome]:
    """Two composers on PostgreSQL: one dies for good, and the other inherits its jobs."""
    if not BINARIES:
        return
    world.undisturbed(world.eight)
    with postgres() as database:
        data_dir = world.new_folder("data")
        settings = {"PHILHARMONICS_DATABASE": database.url, "PHILHARMONICS_MAX_REMIXES": "4"}
        doomed, left = (world.composer(data_dir, settings) for _ in range(2))
        with world.running(doomed, left):
            caller, begin_s = Caller([doomed.url, left.url]), time.monotonic()
            _await_ended(caller, world)
            outcome = Outcome("heir", "kill -9 of one of two composers, for good; PostgreSQL")
            struck_s = time.monotonic()
            doomed.kill()
            world.judge(outcome, caller, begin_s, struck_s)
            if not outcome.again:
                outcome.violations.append("the dead one had no job that the other took over")
            yield outcome


def database(world: World) -> Iterator[Outcome]:
    """PostgreSQL dies under two composers, and is started again."""
    if not BINARIES:
        return
    world.undisturbed(world.eight)
    with postgres() as server:
        data_dir = world.new_folder("data")
        settings = {"PHILHARMONICS_DATABASE": server.url, "PHILHARMONICS_MAX_REMIXES": "4"}
        composers = [world.composer(data_dir, settings) for _ in range(2)]
        with world.running(*composers):
            caller, begin_s = Caller([one.url for one in composers]), time.monotonic()
            _await_ended(caller, world)
            outcome = Outcome("postgresql", "kill -9 of its first process; started again")
            struck_s, first = time.monotonic(), server.pid()
            os.kill(first, signal.SIGKILL)
            await_that("PostgreSQL is gone", lambda: not _is_there(first))
            server.start()
            outcome.back_s = time.monotonic() - struck_s
            yield world.judge(outcome, caller, begin_s, struck_s)


def zombie(world: World) -> Iterator[Outcome]:
    """A composer stands still for longer than its lease; its jobs are done when it comes back."""
    world.undisturbed(world.eight)
    data_dir = world.new_folder("data")
    settings = {"PHILHARMONICS_MAX_REMIXES": "4"}
    still, heir = (world.composer(data_dir, settings) for _ in range(2))
    with world.running(still, heir):
        caller, begin_s = Caller([heir.url]), time.monotonic()
        _await_ended(caller, world)
        outcome = Outcome("zombie", "SIGSTOP of one of two composers until the other has its jobs")
        struck_s, stopped = time.monotonic(), still.worker(COMPOSER)
        os.kill(stopped, signal.SIGSTOP)
        try:
            await_that(
                "the other has done everything",
                lambda: all(one.ended_s is not None for one in caller.told),
            )
        finally:
            os.kill(stopped, signal.SIGCONT)
        still.await_ready()
        outcome.back_s = time.monotonic() - struck_s
        world.judge(outcome, caller, begin_s, struck_s)
        if not outcome.again:
            outcome.violations.append("the one that stood still had no job")
        # What the zombie wrote meanwhile has changed nothing.
        again = Caller([still.url])
        again.submit("k", world.eight)
        for one in again.wait():
            outcome.violations += one.violations(world.undisturbed([one.piece])[one.piece.name])
        yield outcome


def _await_ended(caller: Caller, world: World) -> None:
    """Submit the eight, and wait until the first of them have ended."""
    told = caller.submit("k", world.eight)
    await_that(
        "the first jobs have ended",
        lambda: sum(one.ended_s is not None for one in told) >= UNDER_WAY,
    )


def _struck(
    world: World, name: str, server: Server, worker: str, caller: Caller, begin_s: float
) -> Outcome:
    """Kill a worker, which its first process starts again."""
    outcome = Outcome(name, f"kill -9 of {worker}")
    struck_s, pid = time.monotonic(), server.worker(worker)
    os.kill(pid, signal.SIGKILL)
    await_that(f"{worker} is started again", lambda: server.was_replaced(worker, pid))
    server.await_ready()
    outcome.back_s = time.monotonic() - struck_s
    return world.judge(outcome, caller, begin_s, struck_s)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
