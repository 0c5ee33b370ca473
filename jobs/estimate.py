"""seconds of song, and what is at work -> seconds of compute, seconds until it is done.

    cost of a song      a + b x its seconds, for each stage and for the whole; fitted on measured
                        remixes by `python -m benchmarks.quote --fit`, kept in `cost_model.json`
    correction          this server may be another machine, or busy with something else: the median
                        of what its last jobs took beside what was foretold
    time to finish      a simulation of what runs and waits: n jobs at once are `gain` times as
                        fast together as one alone, and share that evenly

Only the simulation knows of load; everything else is in seconds of a job that is alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from remix.stages import STAGES, Stage

MODEL_FILE = Path(__file__).with_name("cost_model.json")

REMEMBERED = 15
"""Finished jobs that the correction is the median of: a third of them may be odd."""

LEAST_LEFT = 0.05
"""A job that takes longer than was foretold is taken to have this share of it left."""


@dataclass(frozen=True)
class Line:
    """Seconds that a song of so many seconds takes: `start_s + per_song_s * duration_s`."""

    start_s: float
    per_song_s: float

    def at(self, duration_s: float) -> float:
        """For a song of this length.

        >>> Line(2.0, 0.1).at(60.0)
        8.0
        """
        return self.start_s + self.per_song_s * duration_s


@dataclass(frozen=True)
class CostModel:
    """What a song costs on the machine that it was measured on.

    Args:
        machine: which one, in words.
        stages: seconds of compute in the stage's runner.
        alone: seconds of a whole remix that has the machine to itself; stages overlap, so it is
            less than their sum.
        gain: how many times as fast several jobs at once are, all together, as one alone.
    """

    machine: str
    stages: Mapping[Stage, Line]
    alone: Line
    gain: float


@dataclass(frozen=True)
class Cost:
    """What a song costs.

    Args:
        stages_s: seconds of compute by stage.
        alone_s: seconds from its start to its end, were it alone.
    """

    stages_s: Mapping[Stage, float]
    alone_s: float

    @property
    def compute_s(self) -> float:
        """Seconds of compute, all stages together."""
        return sum(self.stages_s.values())


def read_cost_model(file: Path = MODEL_FILE) -> CostModel:
    """The model that is committed."""
    table = json.loads(file.read_text())
    return CostModel(
        machine=table["machine"],
        stages={stage: Line(**table["stages"][stage]) for stage in STAGES},
        alone=Line(**table["alone"]),
        gain=table["gain"],
    )


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (song's seconds, seconds that it took) whose relative errors are least.

    Relative, because a quote of 10 s that is 5 s wrong is worse than one of 100 s. A start below 0
    would give short songs nothing to do: then the line goes through 0.

    >>> fit_line([(10.0, 3.0), (20.0, 5.0), (40.0, 9.0)])
    Line(start_s=1.0, per_song_s=0.2)
    """
    weights = [1.0 / took_s**2 for _, took_s in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    along = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    both = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = both / along if along else 0.0
    start_s = mean_y - slope * mean_x
    if start_s < 0.0 or slope <= 0.0:
        start_s, slope = 0.0, mean_y / mean_x
    return Line(round(start_s, 6), round(slope, 6))


@dataclass(frozen=True)
class Span:
    """When a job begins and ends, in seconds from now; one that runs began now."""

    start_s: float
    end_s: float


def foretell(
    running_s: Sequence[float], waiting_s: Sequence[float], slots: int, gain: float
) -> list[Span]:
    """When each of these jobs will begin and be done, if no other comes.

    Each job is the seconds that it still takes alone. n jobs at once progress at `gain / n` each
    (one alone at 1); when one ends, the next that waits starts.

    >>> foretell([10.0], [10.0, 5.0], slots=2, gain=1.25)
    [Span(start_s=0.0, end_s=16.0), Span(start_s=0.0, end_s=16.0), Span(start_s=16.0, end_s=21.0)]

    Args:
        running_s: those that run.
        waiting_s: those that wait, in the order in which they will start.
        slots: how many may run at once.
        gain: see `CostModel`.

    Returns:
        Those of `running_s`, then those of `waiting_s`.
    """
    left_s = [*running_s, *waiting_s]
    start_s, end_s = [0.0] * len(left_s), [0.0] * len(left_s)
    active = list(range(len(running_s)))
    queue = deque(range(len(running_s), len(left_s)))
    now_s = 0.0
    while active or queue:
        while queue and len(active) < slots:
            start_s[queue[0]] = now_s
            active.append(queue.popleft())
        least_s = min(left_s[job] for job in active)
        now_s += least_s / _speed(len(active), gain)
        for job in active:
            left_s[job] -= least_s
            end_s[job] = now_s
        active = [job for job in active if left_s[job] > 0.0]
    return [Span(*span) for span in zip(start_s, end_s, strict=True)]


def _speed(count: int, gain: float) -> float:
    """Of each of so many jobs at once, beside one that is alone."""
    return 1.0 if count <= 1 else gain / count


@dataclass(eq=False)
class Run:
    """A job that runs in this process: what was foretold and what is done, in seconds alone.

    `teaches`: whether it did all of the work: not if it went on from a checkpoint, or took
    something from a cache, which may be known at its end only.
    """

    foretold_s: float
    done_s: float = 0.0
    teaches: bool = True


class Estimator:
    """The model, corrected by this process's own jobs.

    Args:
        model: what a song costs.
        clock: seconds, from anywhere.
    """

    def __init__(self, model: CostModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._clock = clock
        self._at_s = clock()
        self._runs: list[Run] = []
        self._ratios: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def correction(self) -> float:
        """How many times as long as in the model jobs take here."""
        return statistics.median(self._ratios) if self._ratios else 1.0

    def cost(self, duration_s: float) -> Cost:
        """What a song of this length costs here."""
        factor = self.correction
        return Cost(
            {stage: factor * line.at(duration_s) for stage, line in self._model.stages.items()},
            factor * self._model.alone.at(duration_s),
        )

    def outlook(
        self, running: Sequence[tuple[float, float]], waiting_s: Sequence[float], slots: int
    ) -> list[Span]:
        """When the jobs of this moment will begin and be done, if no other comes.

        Args:
            running: of each that runs, the seconds that it takes alone, and has run.
            waiting_s: of each that waits, the seconds that it takes alone, in their order.
            slots: how many may run at once; more may run already, in other composers.

        Returns:
            Those that run, then those that wait.
        """
        speed = _speed(len(running), self._model.gain)
        left_s = [max(alone_s - speed * ran_s, LEAST_LEFT * alone_s) for alone_s, ran_s in running]
        return foretell(left_s, waiting_s, max(slots, len(running)), self._model.gain)

    @contextmanager
    def running(self, duration_s: float) -> Iterator[Run]:
        """Note that a job runs within the block, and learn from it if it gets to its end.

        Args:
            duration_s: of its song.
        """
        self._pass_time()
        run = Run(self._model.alone.at(duration_s))
        self._runs.append(run)
        try:
            yield run
            self._pass_time()
            if run.teaches:
                self._ratios.append(run.done_s / run.foretold_s)
        finally:
            self._pass_time()
            self._runs.remove(run)

    def _pass_time(self) -> None:
        """Give each job that runs its share of the time since the last call."""
        now_s = self._clock()
        for run in self._runs:
            run.done_s += (now_s - self._at_s) * _speed(len(self._runs), self._model.gain)
        self._at_s = now_s
