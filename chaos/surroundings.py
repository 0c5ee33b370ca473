"""What is around the service fails under load: its disk is full, its network is cut."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from chaos.caller import Caller, Piece
from chaos.isolation import FAR, Cable, small_disk
from chaos.servers import Server, address_of, runner
from chaos.world import Outcome, World, await_that, busy

DISK_BYTES = 400 << 20
"""Room for the eight jobs, their windows, and the database."""

FULL_S = 8.0
"""For several tries of everything that is tried again."""

CUT_S = 20.0
"""A composer notices that nothing comes through any more within 15 s."""

STAGE = "separate_stems"

COMPOSER = "remix"

ANSWERS = {"503", "202", "200"}
"""While the disk is full; whatever a job that ends gives back is somebody's for a moment."""


def disk(world: World) -> Iterator[Outcome]:
    """The disk is full for a while: database, files, cache, temporary files."""
    world.undisturbed(world.eight)
    room = world.new_folder("disk")
    with ExitStack() as stack:
        stack.enter_context(small_disk(room, DISK_BYTES))
        (room / "tmp").mkdir()
        homes = {"BENTOML_HOME": str(room / "bentoml"), "TMPDIR": str(room / "tmp")}
        server = world.composer(room / "data", homes)
        stack.enter_context(world.running(server))
        caller, begin_s = Caller([server.url]), time.monotonic()
        told = caller.submit("k", world.eight)
        await_that("the first has ended", lambda: any(one.ended_s is not None for one in told))
        outcome = Outcome("full disk", f"no byte free for {FULL_S:g} s")
        worker = server.worker(COMPOSER)
        answers = _fill(room, server.url, world.pieces(2)[0])
        outcome.facts["answers_while_full"] = sorted(set(answers))
        if not set(answers) <= ANSWERS:
            outcome.violations.append(f"while full, submissions were answered with {answers}")
        if not Path(f"/proc/{worker}").exists():
            outcome.violations.append("the composer died of it")
        healed_s = time.monotonic()
        late = caller.submit("k", world.pieces(2)[:1])
        await_that("a job is admitted again", lambda: late[0].admitted_s is not None)
        outcome.back_s = time.monotonic() - healed_s
        yield world.judge(outcome, caller, begin_s, healed_s)


def _fill(room: Path, url: str, piece: Piece) -> list[str]:
    """Take every byte that is or becomes free, for a while; what a submission was answered."""
    answers, until_s = list[str](), time.monotonic() + FULL_S
    ballast = room / "ballast"
    form = {"options": json.dumps(piece.options)}
    with ballast.open("wb") as file, httpx.Client(timeout=FULL_S, trust_env=False) as client:
        while time.monotonic() < until_s or not answers:
            free = os.statvfs(room)
            with suppress(OSError):  # somebody was faster
                size = file.seek(0, os.SEEK_END)
                os.posix_fallocate(file.fileno(), size, free.f_bavail * free.f_frsize)
            try:
                answer = client.put(
                    f"{url}/v1/jobs/k-{piece.name}", files={"song": piece.song}, data=form
                )
                answers.append(str(answer.status_code))
            except httpx.TransportError as error:
                answers.append(type(error).__name__)
    ballast.unlink()
    return answers


def network(world: World) -> Iterator[Outcome]:
    """A runner is cut off in the middle of a window, for a while: alone, then with a replica."""
    world.undisturbed(world.eight)
    with Cable() as cable:
        far = runner(STAGE, world.new_folder("far"), FAR, cable.enter)
        with world.running(far):
            yield _cut(world, "cut off", cable, far, f"ipv4:{address_of(far)}")
            replicas = f"ipv4:{address_of(far)},{world.addresses[STAGE]}"
            yield _cut(world, "cut off, a replica", cable, far, replicas)


def _cut(world: World, name: str, cable: Cable, far: Server, address: str) -> Outcome:
    composer = world.composer(runners={**world.addresses, STAGE: address})
    with world.running(composer):
        caller, begin_s = Caller([composer.url]), time.monotonic()
        told = caller.submit("k", world.eight)
        await_that("it computes", lambda: busy(told, far))
        outcome = Outcome(name, f"the cable of {STAGE} is cut for {CUT_S:g} s")
        cut_s = time.monotonic()
        cable.cut()
        time.sleep(CUT_S)
        cable.heal()
        composer.await_ready()
        outcome.back_s = time.monotonic() - cut_s - CUT_S
        return world.judge(outcome, caller, begin_s, cut_s)
