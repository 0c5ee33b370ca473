"""what runs, what waits -> who is when at work, and what another song would get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.estimate import Cost, Estimator, Span
from jobs.rows import Load, Running
from jobs.schedule import Started, Waiting

ANOTHER = "another"
"""Stands for the job that is not there yet; ids of jobs are longer."""


@dataclass(frozen=True)
class Forecast:
    """When each job begins and ends, if no other comes.

    Args:
        running: those that run.
        waiting: those that wait, the next one first.
    """

    running: tuple[tuple[Running, Span], ...]
    waiting: tuple[tuple[Waiting, Span], ...]

    def of_owner(self, owner: str) -> list[Span]:
        """The spans of one owner's jobs."""
        return [
            *(span for job, span in self.running if job.owner == owner),
            *(span for job, span in self.waiting if job.owner == owner),
        ]


@dataclass(frozen=True)
class Quote:
    """What a song would cost, were it submitted now.

    Args:
        cost: of its work.
        jobs_before: jobs that would begin before it, of those that wait.
        span: when it would begin and be done.
    """

    cost: Cost
    jobs_before: int
    span: Span


class Forecaster:
    """Foretells, for jobs that so many slots and this server's estimates are for.

    Args:
        estimator: of this server.
        slots: jobs at once.
    """

    def __init__(self, estimator: Estimator, slots: int) -> None:
        self._estimator = estimator
        self._slots = slots

    def forecast(self, load: Load, started: Sequence[Started]) -> Forecast:
        """When each job begins and ends.

        Args:
            load: what runs and waits, in all composers.
            started: see `jobs.schedule.next_job`.
        """
        by_id = {job.job_id: job for job in load.waiting}
        waiting = [by_id[job_id] for job_id in load.queue(started)]
        spans = self._estimator.outlook(
            [(job.estimate_s, job.ran_s) for job in load.running],
            [job.estimate_s for job in waiting],
            self._slots,
        )
        count = len(load.running)
        return Forecast(
            tuple(zip(load.running, spans[:count], strict=True)),
            tuple(zip(waiting, spans[count:], strict=True)),
        )

    def quote(self, owner: str, duration_s: float, load: Load, started: Sequence[Started]) -> Quote:
        """What a song would get, behind what is there already.

        Args:
            owner: who asks.
            duration_s: of the song.
            load: see `forecast`.
            started: see `forecast`.
        """
        cost = self._estimator.cost(duration_s)
        another = Waiting(ANOTHER, owner, cost.alone_s, 0.0)
        expected = self.forecast(replace(load, waiting=(*load.waiting, another)), started)
        places = enumerate(expected.waiting)
        place, span = next((n, span) for n, (job, span) in places if job is another)
        return Quote(cost, place, span)
