"""Who is next, on random loads: nobody waits forever, keys get equal shares, short songs pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, islice

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.schedule import STRETCH, Started, Turn, Waiting, next_job

LENGTHS_S = st.floats(1.0, 600.0)
OWNERS = st.sampled_from(["ann", "eve", "joe"])
WAITING = st.builds(
    lambda owner, estimate_s, waited_s: (owner, estimate_s, waited_s),
    OWNERS,
    LENGTHS_S,
    st.floats(0.0, 3_600.0),
)
STARTED = st.lists(st.builds(Started, OWNERS, LENGTHS_S, st.floats(0.0, 5_000.0)), max_size=8)


@dataclass
class Arrival:
    """A job that comes at a time."""

    job_id: str
    owner: str
    length_s: float
    at_s: float


def dispatch(
    arrivals: Iterable[Arrival], slots: int, until: Callable[[Arrival], bool]
) -> list[tuple[float, Arrival]]:
    """What a dispatcher with so many slots starts, and when, up to the first job of `until`.

    Every job takes as long as was estimated.
    """
    coming = iter(arrivals)
    following = next(coming, None)
    waiting: dict[str, Arrival] = {}
    started: list[Started] = []
    free_s = [0.0] * slots
    order: list[tuple[float, Arrival]] = []
    now_s = 0.0
    while following is not None or waiting:
        free_s.sort()
        now_s = max(now_s, free_s[0])
        if not waiting and following is not None:
            now_s = max(now_s, following.at_s)
        while following is not None and following.at_s <= now_s:
            waiting[following.job_id] = following
            following = next(coming, None)
        turn = next_job(
            [Waiting(j.job_id, j.owner, j.length_s, now_s - j.at_s) for j in waiting.values()],
            started,
        )
        assert turn is not None
        job = waiting.pop(turn.job_id)
        started = [s for s in started if s.tag_s + s.cost_s >= turn.tag_s]
        started.append(Started(job.owner, job.length_s, turn.tag_s))
        free_s[0] = now_s + job.length_s
        order.append((now_s, job))
        if until(job):
            break
    return order


def jobs_of(rows: list[tuple[str, float, float]]) -> list[Waiting]:
    return [Waiting(f"job {i}", *row) for i, row in enumerate(rows)]


@settings(deadline=None)
@given(st.lists(WAITING, max_size=12), STARTED, st.randoms(use_true_random=False))
def test_turn_does_not_depend_on_the_order_in_which_jobs_are_told(
    rows: list[tuple[str, float, float]], started: list[Started], random: object
) -> None:
    waiting = jobs_of(rows)
    turn = next_job(waiting, started)
    shuffled, again = list(waiting), list(started)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    random.shuffle(again)  # type: ignore[attr-defined]
    assert next_job(shuffled, again) == turn
    assert (turn is None) == (not waiting)


@settings(deadline=None)
@given(st.lists(WAITING, min_size=1, max_size=12), STARTED)
def test_started_jobs_that_the_docstring_calls_without_effect_are(
    rows: list[tuple[str, float, float]], started: list[Started]
) -> None:
    clock_s = max((job.tag_s for job in started), default=0.0)
    kept = [job for job in started if job.tag_s == clock_s or job.tag_s + job.cost_s >= clock_s]
    assert next_job(jobs_of(rows), kept) == next_job(jobs_of(rows), started)


@settings(deadline=None)
@given(
    st.lists(st.tuples(LENGTHS_S, LENGTHS_S), min_size=2, max_size=30),
    st.integers(1, 4),
)
def test_two_saturating_keys_get_equal_compute_within_one_job_of_each(
    lengths: list[tuple[float, float]], slots: int
) -> None:
    arrivals = [
        Arrival(f"{owner} {i}", owner, length_s, 0.0)
        for i, pair in enumerate(lengths)
        for owner, length_s in zip(("ann", "eve"), pair, strict=True)
    ]
    order = dispatch(arrivals, slots, until=lambda _: False)
    left = Counter({"ann": len(lengths), "eve": len(lengths)})
    longest_s = {
        owner: max(a.length_s for a in arrivals if a.owner == owner) for owner in ("ann", "eve")
    }
    given_s = {"ann": 0.0, "eve": 0.0}
    for _, job in order:
        given_s[job.owner] += job.length_s
        left[job.owner] -= 1
        if not all(left.values()):
            break  # one of them has no more to wait with
        # Theorem 1 of the source, with equal weights.
        assert abs(given_s["ann"] - given_s["eve"]) <= sum(longest_s.values()) * (1 + 1e-9)


def test_share_does_not_depend_on_how_many_jobs_a_key_has_waiting() -> None:
    many = [Arrival(f"many {i}", "ann", 60.0, 0.0) for i in range(100)]
    few = [Arrival(f"few {i}", "eve", 60.0, 0.0) for i in range(5)]
    order = dispatch([*many, *few], slots=1, until=lambda job: job.job_id == "few 4")
    assert Counter(job.owner for _, job in order)["ann"] <= 6


def test_key_that_was_idle_has_saved_nothing_up() -> None:
    busy = [Arrival(f"busy {i}", "ann", 60.0, 0.0) for i in range(40)]
    late = [Arrival(f"late {i}", "eve", 60.0, 1_200.0) for i in range(20)]
    order = dispatch([*busy, *late], slots=1, until=lambda job: job.job_id == "late 9")
    since = [job.owner for at_s, job in order if at_s >= 1_200.0]
    # From when both wait, they take turns; else the late one would be first twenty times.
    assert abs(since.count("ann") - since.count("eve")) <= 1


@settings(deadline=None)
@given(st.floats(60.0, 600.0), st.floats(5.0, 30.0), st.integers(1, 3), st.integers(0, 5))
def test_long_song_is_not_starved_by_endless_short_ones_of_its_own_key(
    long_s: float, short_s: float, slots: int, before: int
) -> None:
    """Short ones come exactly as fast as they can be done: without ageing the long one waits on."""

    def endless() -> Iterable[Arrival]:
        for i in range(before):
            yield Arrival(f"first {i}", "ann", short_s, 0.0)
        yield Arrival("long", "ann", long_s, 0.0)
        for i in count():
            yield Arrival(f"short {i}", "ann", short_s, i * short_s / slots)

    order = dispatch(islice(endless(), 20_000), slots, until=lambda job: job.job_id == "long")
    assert order[-1][1].job_id == "long"
    # What may be first: what was there, and what comes before the long one is due (STRETCH times
    # its length, less that of a short one); then a slot must come free.
    due_s = STRETCH * long_s + (before + 1) * short_s
    assert order[-1][0] <= due_s * (1 + 1e-9)


@settings(deadline=None)
@given(st.floats(60.0, 600.0), st.floats(1.0, 10.0), st.integers(1, 50))
def test_short_song_is_not_stuck_behind_long_ones_of_its_own_key(
    long_s: float, short_s: float, queue: int
) -> None:
    longs = [Arrival(f"long {i:03}", "ann", long_s, 0.0) for i in range(queue)]
    short = Arrival("short", "ann", short_s, 1.0)
    order = dispatch([*longs, short], slots=1, until=lambda job: job.job_id == "short")
    # At most the long one that runs, however many wait.
    assert [job.job_id for _, job in order].index("short") <= 1


@settings(deadline=None)
@given(st.floats(60.0, 600.0), st.floats(1.0, 10.0), st.integers(1, 20), st.integers(1, 20))
def test_short_song_is_not_stuck_behind_other_keys_long_ones(
    long_s: float, short_s: float, keys: int, each: int
) -> None:
    longs = [Arrival(f"{k} {i}", f"key {k}", long_s, 0.0) for k in range(keys) for i in range(each)]
    short = Arrival("short", "eve", short_s, 1.0)
    order = dispatch([*longs, short], slots=1, until=lambda job: job.job_id == "short")
    assert [job.job_id for _, job in order].index("short") <= 1


@settings(deadline=None)
@given(st.lists(WAITING, min_size=2, max_size=12), STARTED, st.floats(0.0, 10_000.0))
def test_time_alone_changes_nothing(
    rows: list[tuple[str, float, float]], started: list[Started], later_s: float
) -> None:
    # Whole seconds: so no two jobs are due within a rounding error of each other.
    now = [Waiting(f"job {i}", o, round(e), round(w)) for i, (o, e, w) in enumerate(rows)]
    later = [Waiting(j.job_id, j.owner, j.estimate_s, j.waited_s + round(later_s)) for j in now]
    assert next_job(now, started) == next_job(later, started)


def test_jobs_that_are_equal_in_all_but_name_go_by_name() -> None:
    equal = [Waiting(name, "ann", 10.0, 5.0) for name in ("b", "a", "c")]
    assert next_job(equal, []) == Turn("a", 0.0)
