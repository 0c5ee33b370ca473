"""What a song costs and when it will be done: properties of the line, the simulation, the quote."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.estimate import CostModel, Estimator, Line, fit_line, foretell, read_cost_model
from jobs.forecast import Forecaster
from jobs.rows import Load, Running
from jobs.schedule import Started, Waiting
from remix.stages import STAGES

SECONDS = st.floats(0.1, 1_000.0)
GAINS = st.floats(1.0, 2.0)
SLOTS = st.integers(1, 4)
UNHURRIED = settings(deadline=None)  # a loaded machine is no failure

MODEL = CostModel("none", dict.fromkeys(STAGES, Line(1.0, 0.1)), Line(2.0, 0.2), gain=1.25)


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@UNHURRIED
@given(st.floats(0.0, 10.0), st.floats(0.01, 2.0), st.lists(SECONDS, min_size=2, unique=True))
def test_line_through_points_of_a_line_is_that_line(
    start_s: float, per_song_s: float, durations_s: list[float]
) -> None:
    if max(durations_s) < 1.01 * min(durations_s):
        return  # one point cannot tell a start from a slope
    line = fit_line([(d, start_s + per_song_s * d) for d in durations_s])
    for duration_s in durations_s:
        # It is rounded to microseconds.
        expected_s = start_s + per_song_s * duration_s
        assert line.at(duration_s) == pytest.approx(expected_s, rel=1e-3, abs=1e-3)


@UNHURRIED
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=20), SECONDS)
def test_line_through_anything_costs_more_than_nothing_and_rises(
    points: list[tuple[float, float]], duration_s: float
) -> None:
    line = fit_line(points)
    assert 0.0 <= line.at(duration_s) <= line.at(2 * duration_s) < math.inf
    assert line.at(max(duration for duration, _ in points)) > 0.0


@UNHURRIED
@given(st.lists(SECONDS, max_size=4), st.lists(SECONDS, max_size=8), SLOTS, GAINS)
def test_forecast_keeps_the_order_and_leaves_no_slot_empty(
    running_s: list[float], waiting_s: list[float], slots: int, gain: float
) -> None:
    slots = max(slots, len(running_s))
    spans = foretell(running_s, waiting_s, slots, gain)
    starts_s = [span.start_s for span in spans[len(running_s) :]]
    assert starts_s == sorted(starts_s)
    for span, alone_s in zip(spans, [*running_s, *waiting_s], strict=True):
        # Nobody is faster than alone, nor slower than with every slot taken all the time.
        took_s = span.end_s - span.start_s
        assert alone_s * (1 - 1e-9) <= took_s <= alone_s * max(1.0, slots / gain) * (1 + 1e-9)
    for at_s in starts_s:
        inside = sum(span.start_s <= at_s < span.end_s for span in spans)
        assert inside <= slots
        if at_s > 0.0:  # who waited began when another ended
            assert any(span.end_s == at_s for span in spans)


@UNHURRIED
@given(st.lists(SECONDS, min_size=1, max_size=8), GAINS)
def test_one_slot_takes_exactly_the_sum(waiting_s: list[float], gain: float) -> None:
    spans = foretell([], waiting_s, 1, gain)
    assert spans[-1].end_s == pytest.approx(sum(waiting_s))


@UNHURRIED
@given(st.lists(SECONDS, min_size=1, max_size=4), st.lists(SECONDS, max_size=6), GAINS, SECONDS)
def test_more_before_me_is_never_sooner(
    running_s: list[float], waiting_s: list[float], gain: float, mine_s: float
) -> None:
    slots = len(running_s)
    mine = foretell(running_s, [*waiting_s, mine_s], slots, gain)[-1]
    more = foretell(running_s, [*waiting_s, 10.0, mine_s], slots, gain)[-1]
    assert more.start_s >= mine.start_s * (1 - 1e-9)


def test_estimate_follows_what_jobs_took_but_not_a_single_odd_one() -> None:
    clock = Clock()
    estimator = Estimator(MODEL, clock)
    assert estimator.cost(10.0).alone_s == pytest.approx(4.0)
    for _ in range(3):
        with estimator.running(10.0):
            clock.now_s += 8.0  # twice as long as in the model
    assert estimator.cost(10.0).alone_s == pytest.approx(8.0)
    assert estimator.cost(10.0).compute_s == pytest.approx(5 * 2.0 * 2.0)
    with estimator.running(10.0):
        clock.now_s += 400.0  # the machine slept
    assert estimator.cost(10.0).alone_s == pytest.approx(8.0)


def test_estimate_does_not_take_load_for_a_slow_machine() -> None:
    """Two at once take 1.6 times as long each: that is the gain of 1.25, and no news."""
    clock = Clock()
    estimator = Estimator(MODEL, clock)
    with estimator.running(10.0) as first, estimator.running(10.0) as second:
        clock.now_s += 6.4
    assert first.done_s == second.done_s == pytest.approx(4.0)
    assert estimator.correction == pytest.approx(1.0)


def test_estimate_learns_nothing_from_failed_and_resumed_jobs() -> None:
    clock = Clock()
    estimator = Estimator(MODEL, clock)
    with estimator.running(10.0) as resumed:
        clock.now_s += 1.0
        resumed.teaches = False
    with pytest.raises(ZeroDivisionError), estimator.running(10.0):
        clock.now_s += 1.0
        raise ZeroDivisionError
    assert estimator.correction == 1.0
    # They have ended: who comes now is alone.
    with estimator.running(10.0) as run:
        clock.now_s += 4.0
    assert run.done_s == pytest.approx(4.0)


def test_quote_for_an_idle_server_is_the_cost_alone() -> None:
    quote = Forecaster(Estimator(MODEL), slots=2).quote("ann", 10.0, Load((), ()), ())
    assert (quote.jobs_before, quote.span.start_s) == (0, 0.0)
    assert quote.span.end_s == pytest.approx(quote.cost.alone_s) == pytest.approx(4.0)


def test_quote_counts_only_who_would_be_before() -> None:
    load = Load(
        running=(Running("r", "eve", 50.0, 10.0),),
        waiting=(Waiting("long", "ann", 600.0, 0.0), Waiting("hers", "eve", 5.0, 0.0)),
    )
    started = [Started("eve", 50.0, 0.0)]
    # A short song of ann: before her long one, and eve has had her turn.
    quote = Forecaster(Estimator(MODEL), slots=1).quote("ann", 10.0, load, started)
    assert quote.jobs_before == 0
    assert quote.span.start_s == pytest.approx(40.0)
    assert quote.span.end_s == pytest.approx(44.0)


@UNHURRIED
@given(
    st.lists(st.tuples(st.sampled_from("ae"), SECONDS), max_size=3),
    st.lists(st.tuples(st.sampled_from("ae"), SECONDS, SECONDS), max_size=10),
    SECONDS,
)
def test_quote_is_within_what_is_there(
    running: list[tuple[str, float]], waiting: list[tuple[str, float, float]], duration_s: float
) -> None:
    load = Load(
        tuple(Running("r", owner, estimate_s, 0.0) for owner, estimate_s in running),
        tuple(Waiting(f"job {i}", *row) for i, row in enumerate(waiting)),
    )
    quote = Forecaster(Estimator(MODEL), slots=2).quote("a", duration_s, load, ())
    everything_s = sum(estimate_s for _, estimate_s in running) + sum(row[1] for row in waiting)
    assert 0 <= quote.jobs_before <= len(waiting)
    assert quote.cost.alone_s <= quote.span.end_s * (1 + 1e-9)
    assert quote.span.end_s <= (everything_s + quote.cost.alone_s) * 1.6 * (1 + 1e-9)


def test_committed_model_is_of_a_named_machine_and_sane() -> None:
    model = read_cost_model()
    assert model.machine
    assert 1.0 <= model.gain <= 2.0
    cost = Estimator(model).cost(60.0)
    assert set(cost.stages_s) == set(STAGES)
    # Stages overlap: the whole takes longer than any of them, and less than all in sequence.
    assert max(cost.stages_s.values()) / 2 < cost.alone_s < 2 * cost.compute_s
