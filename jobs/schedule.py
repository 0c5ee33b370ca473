"""waiting jobs -> which is next: fair shares per key, short songs first, and no one waits forever.

Two ideas, each with a bound that `tests/test_schedule.py` proves on random loads:

- **Between owners: start-time fair queueing.** Each started job has a tag on one virtual clock of
  compute seconds: the later of the clock (the newest tag there is) and the end of its owner's last
  job. Of the owners that have jobs waiting, the one whose next tag would be smallest is served.
  While two owners both wait, what each was given differs by at most one longest job of each; who
  was idle has saved nothing up, and owes nothing.
- **Within an owner: earliest due first.** A job is due `STRETCH` times its estimate after it came.
  So a short song passes a long one that came not long before, and once a job has waited
  `STRETCH` times its estimate, none that comes later passes it.

The state is one number per job that was started, its tag; nothing else is remembered, so that
several composers share it in their database.

Source: P. Goyal, H. M. Vin, H. Cheng, "Start-time fair queueing: a scheduling algorithm for
integrated services packet switching networks", IEEE/ACM Transactions on Networking 5(5), 1997: the
tags, and theorem 1, the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STRETCH = 4.0
"""How many times its own length a job may be passed by shorter ones of its owner that come later.
With 0 it is first come, first served; with infinity long songs may wait forever."""


@dataclass(frozen=True)
class Waiting:
    """A job that waits.

    Args:
        job_id: its name.
        owner: whose it is; one name for everybody where there are no keys.
        estimate_s: of its compute, above 0.
        waited_s: since it was admitted.
    """

    job_id: str
    owner: str
    estimate_s: float
    waited_s: float


@dataclass(frozen=True)
class Started:
    """A job that was started, whether it still runs or not.

    Args:
        owner: whose it is.
        cost_s: its compute as it was, or its estimate while it runs.
        tag_s: what `next_job` gave it.
    """

    owner: str
    cost_s: float
    tag_s: float


@dataclass(frozen=True)
class Turn:
    """Who is next.

    Args:
        job_id: start this one.
        tag_s: keep it with the job, for the calls of `next_job` to come.
    """

    job_id: str
    tag_s: float


def next_job(waiting: Sequence[Waiting], started: Iterable[Started]) -> Turn | None:
    """Which job to start now that there is room for one; none if none waits.

    The same arguments in any order give the same answer, and time alone does not change it.

    >>> long, short = Waiting("long", "ann", 60.0, 5.0), Waiting("short", "ann", 6.0, 0.0)
    >>> next_job([long, short], [])
    Turn(job_id='short', tag_s=0.0)
    >>> next_job([long, Waiting("hers", "eve", 600.0, 0.0)], [Started("ann", 60.0, 0.0)])
    Turn(job_id='hers', tag_s=0.0)

    Args:
        waiting: every job that waits.
        started: every job that runs, and at least the last ones of each owner that ended: a job
            without effect on the answer is one whose `tag_s + cost_s` is below another's `tag_s`,
            and the one with the largest `tag_s` always has one.
    """
    clock_s, ends_s = 0.0, dict[str, float]()
    for job in started:
        clock_s = max(clock_s, job.tag_s)
        ends_s[job.owner] = max(ends_s.get(job.owner, 0.0), job.tag_s + job.cost_s)

    def rank(job: Waiting) -> tuple[float, float, str]:
        tag_s = max(clock_s, ends_s.get(job.owner, 0.0))
        return tag_s, STRETCH * job.estimate_s - job.waited_s, job.job_id

    first = min(waiting, key=rank, default=None)
    return None if first is None else Turn(first.job_id, rank(first)[0])
