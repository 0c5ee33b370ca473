"""What every scenario has: songs, runners, composers with an empty past, and what is expected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.caller import Caller, Piece, Sums, Told
from chaos.servers import POLL_S, STAGES, Server, address_of, composer, runner
from load_tests.songs import Recording, cuts

JOBS = 8
"""Under way at once."""

AT_ONCE = 16
"""Jobs that are submitted together where nothing happens: fewer than the service refuses."""

LENGTHS_S = (5.0, 10.0)
"""Of their songs: the shortest and the longest."""

FOUND_S = 5.0
"""A composer that has a replica's address in its list tries it every 2 s: until then the old one
has to stay, or there is none for a moment."""

FAULT_S = 240.0
"""In which something is expected that a fault brings about."""


@dataclass
class Outcome:
    """What became of a scenario.

    Args:
        name: of it.
        fault: what was done.
        jobs: that were admitted.
        again: of these, how many were begun more than once.
        back_s: from the fault until what was struck served again.
        ended_s: from the fault until the last job had ended.
        whole_s: from the first submission until the last job had ended.
        calm_s: the same of the same jobs where nothing happens.
        violations: what must not be.
        facts: whatever else was seen.
    """

    name: str
    fault: str
    jobs: int = 0
    again: int = 0
    back_s: float | None = None
    ended_s: float | None = None
    whole_s: float | None = None
    calm_s: float | None = None
    violations: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class World:
    """Runs while the block around it does.

    Args:
        folder: for everything; its path is short, because sockets lie in it.
        songs: recordings that songs are cut from.
        seed: of the cuts.
    """

    def __init__(self, folder: Path, songs: Sequence[Recording], seed: int) -> None:
        self._folder = folder
        self._number = 0
        self._stack = ExitStack()
        self.seed = seed
        self._songs = self._cut(songs, seed)
        self._sums: dict[str, Sums] = {}
        self._calm: Server | None = None
        self.calm_s = 0.0
        self.eight = self.pieces(1)
        self.runners: dict[str, Server] = {}

    def __enter__(self) -> World:
        """Start the runners."""
        self.runners = {stage: runner(stage, self.new_folder(stage)) for stage in STAGES}
        for one in self.runners.values():
            self._started(self._stack, one)
        for one in self.runners.values():
            one.await_ready()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing."""
        self._stack.close()

    @property
    def addresses(self) -> dict[str, str]:
        """Of the runners, by stage."""
        return {stage: address_of(one) for stage, one in self.runners.items()}

    def _cut(self, songs: Sequence[Recording], seed: int) -> list[bytes]:
        shortest_s, longest_s = LENGTHS_S
        step_s = (longest_s - shortest_s) / (JOBS - 1)
        lengths_s = [shortest_s + number * step_s for number in range(JOBS)]
        return [song.flac for song in cuts(songs, lengths_s, seed)]

    def replace_runner(self, stage: str, new: Server) -> None:
        """Start another one in its place, and then stop it in order."""
        self._started(self._stack, new)
        new.await_ready()
        time.sleep(FOUND_S)
        self.runners[stage].stop()
        self.runners[stage] = new
        if self._calm is not None:  # it knows of the old one only
            self._calm.end()
            self._calm = None

    def pieces(self, seed: int) -> list[Piece]:
        """Each song, with a seed."""
        return [
            Piece(song, {"seed": seed, "noise_seed": 1}, f"{number}-{seed}")
            for number, song in enumerate(self._songs)
        ]

    def new_folder(self, name: str) -> Path:
        """One that nobody has used."""
        self._number += 1
        folder = self._folder / f"{self._number:02}{name}"
        folder.mkdir()
        return folder

    def _started(self, stack: ExitStack, server: Server) -> Server:
        stack.callback(server.end)
        server.start()
        return server

    @contextmanager
    def running(self, *servers: Server) -> Iterator[None]:
        """Servers, from ready until the block ends."""
        with ExitStack() as stack:
            for server in servers:
                self._started(stack, server)
            for server in servers:
                server.await_ready()
            yield

    def composer(
        self, data_dir: Path | None = None, settings: Mapping[str, str] | None = None, **other: Any
    ) -> Server:
        """A composer over the runners, with a data folder of its own if none is given."""
        folder = self.new_folder("c")
        addresses = other.pop("runners", self.addresses)
        return composer(folder, data_dir or folder / "data", addresses, settings, **other)

    def undisturbed(self, pieces: Sequence[Piece]) -> dict[str, Sums]:
        """Checksums of the files that pieces become where nothing happens, by their names.

        They are made once, by a composer that is left in peace all the time.
        """
        if self._calm is None:
            self._calm = self._started(self._stack, self.composer())
            self._calm.await_ready()
        new = [piece for piece in pieces if piece.name not in self._sums]
        for start in range(0, len(new), AT_ONCE):
            caller, begin_s = Caller([self._calm.url]), time.monotonic()
            caller.submit("calm", new[start : start + AT_ONCE])
            for told in caller.wait():
                if problems := told.violations(None):
                    raise SystemExit(f"Where nothing happens, a job fails: {problems}")
                self._sums[told.piece.name] = dict(told.sums)
            if new == self.eight:
                self.calm_s = time.monotonic() - begin_s
        return self._sums

    def judge(self, outcome: Outcome, caller: Caller, begin_s: float, struck_s: float) -> Outcome:
        """Wait for every job, and note what must not be."""
        told = caller.wait()
        expected = self.undisturbed([one.piece for one in told])
        outcome.jobs = sum(one.admitted_s is not None for one in told)
        outcome.again = sum(one.attempt > 1 for one in told)
        last_s = max(one.ended_s or time.monotonic() for one in told)
        outcome.ended_s, outcome.whole_s = last_s - struck_s, last_s - begin_s
        if [one.piece for one in told] == self.eight:
            outcome.calm_s = self.calm_s
        for one in told:
            outcome.violations += one.violations(expected[one.piece.name])
        if last_s < struck_s:
            outcome.violations.append("every job had ended before the fault")
        outcome.facts["broken"] = sum(len(one.broken) for one in told)
        return outcome


def await_that(what: str, is_so: Callable[[], bool], limit_s: float = FAULT_S) -> float:
    """Wait until something is so; how long it took.

    Raises:
        TimeoutError: it did not come to be so.
    """
    begin_s = time.monotonic()
    while not is_so():
        if time.monotonic() - begin_s > limit_s:
            raise TimeoutError(f"not within {limit_s:g} s: {what}")
        time.sleep(POLL_S)
    return time.monotonic() - begin_s


def busy(told: Sequence[Told], runner: Server) -> bool:
    """Whether a runner is computing at this moment, or there is nothing any more to compute."""
    computing = runner.counted("philharmonics_computing_windows") > 0
    return computing or all(one.ended_s is not None for one in told)
