"""What the load tests compute of what they measured: schedules, percentiles, knee, comparison."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from load_tests.compare import change, compare
from load_tests.figures import (
    bootstrap,
    interval,
    is_queue_flat,
    mean_of_rows,
    percentile,
    percentile_of_rows,
    windows_agree,
)
from load_tests.generator import Answer, Lag, Record
from load_tests.growth import grew, growth
from load_tests.http_targets import song_form
from load_tests.knee import Knee, find_knee
from load_tests.processes import Holding, Sample, difference
from load_tests.report import write
from load_tests.runs import Objective, Result, summary
from load_tests.schedule import constant, poisson
from load_tests.songs import Recording, cuts, recordings
from load_tests.windows import ALL_TRACKS, CHORD, DENSITY_3, METER_4, STYLE_ANY, TEMPO_3, windows
from remix.note_tokens import BarConditions, Header, encode_header, tempo_class

rates = st.floats(0.01, 200.0)
durations = st.floats(0.1, 100.0)


@given(rates, durations, st.integers(0, 2**32))
def test_poisson_schedule_is_ascending_within_its_time_and_its_seed_s(
    rate_hz: float, duration_s: float, seed: int
) -> None:
    times = poisson(rate_hz, duration_s, seed)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < duration_s)).all()
    assert (times == poisson(rate_hz, duration_s, seed)).all()


def test_poisson_schedule_has_exponential_gaps() -> None:
    gaps = np.diff(poisson(10.0, 10_000.0, seed=3))
    # 100,000 gaps: mean and deviation of an exponential are both 1 / rate, each to 1 / sqrt(N).
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    assert gaps.std() == pytest.approx(0.1, rel=0.02)
    assert (gaps > 0.1).mean() == pytest.approx(np.exp(-1), abs=0.01)


@given(rates, durations)
def test_constant_schedule_has_equal_gaps_and_fills_its_time(
    rate_hz: float, duration_s: float
) -> None:
    times = constant(rate_hz, duration_s)
    assert times[0] == 0
    assert times[-1] < duration_s
    assert times[-1] + 1 / rate_hz >= duration_s * (1 - 1e-9)
    assert np.allclose(np.diff(times), 1 / rate_hz)


@given(
    st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200),
    st.floats(0.1, 100.0),
)
def test_percentile_is_the_smallest_value_that_enough_do_not_exceed(
    values: list[float], percent: float
) -> None:
    found = percentile(values, percent)
    needed = len(values) * percent / 100 * (1 - 1e-9)
    assert found in values
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < len(values) * percent / 100 * (1 + 1e-9)


def test_bootstrap_interval_holds_the_true_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for number in range(60):
        series = rng.exponential(1.0, 200)
        low, high = interval(bootstrap(series, percentile_of_rows(50), number), 0.95)
        held += low <= np.log(2) <= high
    assert held >= 52  # of 60; 57 are to be expected, fewer than 52 in one of 100 such tests


def test_bootstrap_of_blocks_sees_that_neighbours_are_alike() -> None:
    """Of a series with memory the mean is less certain than independent draws would say."""
    rng = np.random.default_rng(6)
    series = np.zeros(1000)
    for place, step in enumerate(rng.standard_normal(999)):
        series[place + 1] = 0.8 * series[place] + step
    independent = series.std() / np.sqrt(len(series))
    assert bootstrap(series, mean_of_rows, 1).std() > 1.7 * independent  # the truth: 3 times


def test_windows_agree_if_they_are_alike_and_not_if_one_is_slower() -> None:
    rng = np.random.default_rng(7)
    first = list(rng.gamma(4.0, 0.25, 100))
    assert windows_agree(first, list(rng.gamma(4.0, 0.25, 100)))
    assert not windows_agree(first, list(rng.gamma(4.0, 0.5, 100)))
    assert not windows_agree(first, [])


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_queue_is_flat_below_capacity_and_grows_above(seed: int) -> None:
    """A server that takes one request after the other, 0.1 s each, for 100 s."""
    for rate_hz, is_flat in ((7.0, True), (13.0, False)):
        due = poisson(rate_hz, 100.0, seed)
        assert is_queue_flat(list(due), list(served(due, 0.1)), 100.0) == is_flat


def served(due: Sequence[float] | np.ndarray[Any, Any], service_s: float) -> list[float]:
    ends: list[float] = []
    for at_s in due:
        ends.append(max(at_s, ends[-1] if ends else 0.0) + service_s)
    return ends


@pytest.mark.parametrize("start_hz", [0.01, 0.9, 1.0, 50.0])
def test_knee_of_a_server_with_a_sharp_one_is_bracketed(start_hz: float) -> None:
    async def probe(rate_hz: float) -> bool:
        return rate_hz <= 1.0

    knee = asyncio.run(find_knee(probe, start_hz, tolerance=0.05, max_probes=40))
    assert knee.sustained_hz <= 1.0 < knee.failed_hz <= knee.sustained_hz * 1.05


def test_knee_of_a_simulated_queue_is_where_theory_says() -> None:
    """M/M/1: sojourn times are exponential with mean 1 / (mu - lambda), so p99 is at 4.6 means."""
    served_hz, limit_s = 100.0, 0.2
    expected_hz = served_hz - np.log(100) / limit_s
    objective = Objective(limit_s, 0.0)

    async def probe(rate_hz: float) -> bool:
        due = poisson(rate_hz, 600.0, seed=11)
        work = np.random.default_rng(12).exponential(1 / served_hz, len(due))
        ends, end_s = [], 0.0
        for at_s, work_s in zip(due, work, strict=True):
            end_s = max(at_s, end_s) + work_s
            ends.append(end_s)
        return result_of(list(due), ends, objective, 600.0).failures() == []

    knee = asyncio.run(find_knee(probe, 10.0, tolerance=0.02, max_probes=30))
    assert knee.sustained_hz == pytest.approx(expected_hz, rel=0.05)


def test_knee_that_no_rate_reaches_is_zero() -> None:
    async def probe(rate_hz: float) -> bool:
        return False

    assert asyncio.run(find_knee(probe, 8.0, max_probes=3)) == Knee(0.0, 8.0 / 1.5**2, 3)


def result_of(
    due: Sequence[float],
    ends: Sequence[float],
    objective: Objective,
    end_s: float,
    status: str = "ok",
) -> Result:
    records = [
        Record(at_s, at_s, done_s, 0.0, Answer(status))
        for at_s, done_s in zip(due, ends, strict=True)
    ]
    lag = Lag([0.001], [0.001])
    return Result("run", "server", "remix", {"rate_hz": 1.0}, objective, records, 0.0, end_s, lag)


def test_result_fails_by_lateness_by_errors_and_by_a_growing_queue() -> None:
    due = constant(10.0, 20.0).tolist()
    quick = [at_s + 0.1 for at_s in due]
    assert result_of(due, quick, Objective(0.2, 0.0), 20.0).failures() == []
    late = [done_s + (number % 50 == 0) for number, done_s in enumerate(quick)]  # 2 % of them
    assert result_of(due, late, Objective(0.2, 0.0), 20.0).failures() == ["p99 above the objective"]
    errors = result_of(due, quick, Objective(0.2, 0.0), 20.0, status="429").failures()
    assert errors == ["100.0% errors", "p99 above the objective"]
    growing = result_of(due, served(due, 0.15), Objective(60.0, 0.0), 20.0)
    assert growing.failures() == ["the queue grows"]
    assert not growing.is_steady


def test_comparison_of_one_distribution_with_itself_is_noise() -> None:
    rng = np.random.default_rng(8)
    verdicts = [
        change(
            "run", "p50", rng.gamma(9, 0.1, 400), rng.gamma(9, 0.1, 400), percentile_of_rows(50)
        ).verdict
        for _ in range(40)
    ]
    # 99 % intervals beyond 2 %: less than one false alarm in a hundred; two of 40 are one of 100.
    assert verdicts.count("noise") >= 38


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "worse"), (1 / 1.1, "better")])
def test_comparison_sees_a_shift_of_ten_percent(factor: float, verdict: str) -> None:
    rng = np.random.default_rng(9)
    before, after = rng.gamma(16, 0.1, 2000), rng.gamma(16, 0.1, 2000) * factor
    found = change("run", "p50", before, after, percentile_of_rows(50))
    assert found.verdict == verdict
    assert found.low <= factor <= found.high


def a_report(latencies_s: Sequence[float], **changes: Any) -> dict[str, Any]:
    due = constant(1.0, len(latencies_s)).tolist()
    ends = [at_s + latency_s for at_s, latency_s in zip(due, latencies_s, strict=True)]
    run = {**summary(result_of(due, ends, Objective(5.0, 0.5), len(due))), **changes}
    knee = {"sustained_hz": 1.0, "failed_hz": 1.2, "reference_hz": 1.0, "offline_hz": 1.5}
    return {
        "environment": {
            "at": "now",
            "commit": "0" * 40,
            "changed_files": 0,
            "machine": {"cpu": "one", "cores": 2, "memory_bytes": 1, "busy_before": 0.0},
            "versions": {"python": "3"},
        },
        "plan": {"song_s": 30.0, "objective": {"a_s": 5.0, "b": 0.5}},
        "took_s": 1.0,
        "runs": [run],
        "skipped": ["faults"],
        "knee": {**knee, "probes": 5},
        "processes": growth([sample(at_s, 100) for at_s in range(10)]),
    }


def test_reports_are_compared_run_by_run_and_at_the_same_rate_only() -> None:
    rng = np.random.default_rng(10)
    latencies = list(rng.gamma(16, 0.1, 400))
    before, slow = a_report(latencies), a_report([latency_s * 1.3 for latency_s in latencies])
    assert {one.verdict for one in compare(before, before)} == {"noise"}
    assert [one.verdict for one in compare(before, slow)] == ["worse"] * 3 + ["noise"]
    assert [one.verdict for one in compare(slow, before)] == ["better"] * 3 + ["noise"]
    other_rate = a_report(latencies, settings={"rate_hz": 2.0})
    assert [one.run for one in compare(before, other_rate)] == ["knee"]
    late = a_report(latencies, generator={"is_valid": False})
    assert [one.run for one in compare(before, late)] == ["knee"]


def test_knees_are_apart_only_where_their_brackets_are() -> None:
    before, after = a_report([1.0] * 10), a_report([1.0] * 10)
    after["knee"] = {**after["knee"], "sustained_hz": 1.3, "failed_hz": 1.5}
    assert [one.verdict for one in compare(before, after)][-1] == "better"
    assert [one.verdict for one in compare(after, before)][-1] == "worse"


def test_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    data, page = write(tmp_path, a_report([1.0, 2.0, 3.0]))
    html = page.read_text()
    assert "<svg" in html
    assert "src=" not in html
    assert "href=" not in html.replace("xlink:href=", "").replace('href="#', "")
    report = json.loads(data.read_text())
    assert report["runs"][0]["latency_s"]["p99"] == 3.0
    assert {check["what"] for check in report["checks"] if not check["holds"]} == {"runs left out"}


def sample(at_s: float, memory_bytes: int, series: int | None = None) -> Sample:
    return Sample(at_s, {"remix": Holding(1, memory_bytes, 10, 20, at_s)}, series)


def test_growth_is_what_came_after_the_warm_up() -> None:
    loads = [sample(at_s, 50 if at_s < 5 else 100, 7) for at_s in range(100)]
    assert growth(loads)["of"]["remix"]["grew"]["memory_bytes"] == 0.0
    assert growth(loads)["metric_series"]["grew"] == 0.0
    leaks = [sample(at_s, 1000 + at_s) for at_s in range(100)]
    assert growth(leaks)["of"]["remix"]["grew"]["memory_bytes"] == pytest.approx(0.085, abs=0.02)
    assert grew([1, 2]) is None


def test_difference_of_metrics_is_what_was_counted_meanwhile() -> None:
    names = ["a_total", 'b_sum{stage="x"}', "gauge", 'b_bucket{le="1"}']
    before = {f"philharmonics_{name}": 2.0 for name in names}
    after = {**before, "philharmonics_a_total": 3.0, "philharmonics_gauge": 9.0, "other_total": 1.0}
    after['philharmonics_b_bucket{le="1"}'] = 5.0
    assert difference(before, after) == {"philharmonics_a_total": 1.0}


def test_songs_are_cut_from_recordings_and_none_is_like_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    soundfile.write(tmp_path / "one.wav", rng.uniform(-0.5, 0.5, (44_100, 2)), 44_100)
    (tmp_path / "notes.txt").write_text("no audio")
    sources = recordings(tmp_path)
    songs = list(cuts(sources, [2.5, 2.5, 11.0], seed=4))
    assert len({song.flac for song in songs}) == 3
    assert [song.flac for song in cuts(sources, [2.5, 2.5, 11.0], seed=4)] == [
        song.flac for song in songs
    ]
    samples, rate_hz = soundfile.read(io.BytesIO(songs[0].flac))
    assert samples.shape == (2.5 * rate_hz, 2)
    with pytest.raises(SystemExit, match="no audio"):
        recordings(tmp_path / "notes.txt")


def test_form_of_a_song_is_one_that_servers_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.zeros((100, 1)), 8_000)
    (song,) = cuts(recordings(tmp_path / "one.wav"), [1.0], seed=1)
    work = song_form(song, {"seed": 1})
    assert work.audio_s == 1.0
    boundary = work.content_type.removeprefix("multipart/form-data; boundary=").encode()
    parts = work.body.split(b"--" + boundary)
    assert parts[0] == b""
    assert parts[-1] == b"--\r\n"
    assert parts[1].endswith(b'\r\n\r\n{"seed": 1}\r\n')
    assert parts[2].endswith(b"\r\n\r\n" + song.flac + b"\r\n")


def test_windows_have_the_shapes_that_were_asked_for() -> None:
    source = Recording(np.random.default_rng(2).uniform(-1, 1, (5000, 2)).astype(np.float32), 8_000)
    for shape, audio_s in (((1, 2, 4000), 0.25), ((1, 1600), 0.1), ((1, 800, 1), 0.05)):
        inputs, found_s = next(windows({"x": shape}, 16_000, source, seed=1))
        assert inputs["x"].shape == shape
        assert inputs["x"].dtype == np.float32
        assert found_s == audio_s
        assert inputs["x"].std() > 0.1
    with pytest.raises(ValueError, match="No window is known"):
        next(windows({"x": (1, 2), "y": (1, 3)}, 16_000, source, seed=1))


def test_tokens_of_a_generated_window_are_the_vocabulary_s() -> None:
    """They are copied: the load tests import nothing of ours."""
    assert encode_header(Header(4, tempo_class(110.0))) == [METER_4, TEMPO_3, STYLE_ANY]
    assert BarConditions((0, 35), 3, 31).tokens == (CHORD, CHORD + 35, DENSITY_3, ALL_TRACKS)
