"""How many of what: sums that must come out, whatever was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.sizes import DOCUMENT, Cost, document, read_cost, read_values, size_for

ROOT = Path(__file__).resolve().parent.parent

COST = Cost(
    cpu_s={"composer": 0.05, "separate_stems": 0.03, "convert_voice": 0.1},
    wire_bytes=1e6,
    start_s=2.0,
    per_song_s=0.2,
    replica_cores={"composer": 2, "separate_stems": 2, "convert_voice": 4},
    busy_share=0.7,
    max_remixes=2,
)


@given(st.integers(1, 200_000), st.floats(10.0, 600.0))
def test_replicas_hold_the_load_and_one_less_would_not(count: int, song_s: float) -> None:
    size = size_for(count, COST, song_s)
    for process, cores in size.busy_cores.items():
        room = COST.replica_cores[process] * COST.busy_share
        assert size.replicas[process] * room >= cores * (1 - 1e-9)
        if process != "composer" and size.replicas[process] > 1:
            assert (size.replicas[process] - 1) * room < cores * (1 + 1e-9)
    # Nobody waits for a composer that is full.
    assert size.replicas["composer"] * COST.max_remixes * COST.busy_share >= size.in_flight - 1e-9


def test_sum_of_one_hour_comes_out_by_hand() -> None:
    size = size_for(3600, COST, 100.0)  # a song each second
    assert size.busy_cores == pytest.approx(
        {"composer": 5.0, "separate_stems": 3.0, "convert_voice": 10.0}
    )
    assert size.in_flight == pytest.approx(22.0)
    assert size.replicas == {"composer": 16, "separate_stems": 3, "convert_voice": 4}
    assert size.wire_bits_per_s == pytest.approx(8e8)


@given(st.integers(1, 50_000))
def test_twice_the_songs_need_no_less_and_at_most_twice_as_much(count: int) -> None:
    one, two = size_for(count, COST), size_for(2 * count, COST)
    assert one.machines <= two.machines <= 2 * one.machines
    assert two.connections <= 500


def test_faster_models_need_fewer_machines() -> None:
    slow = size_for(10_000, COST)
    fast = size_for(10_000, replace(COST, cpu_s={n: s / 2 for n, s in COST.cpu_s.items()}))
    assert fast.machines < slow.machines


def test_document_is_what_the_figures_say() -> None:
    results = ROOT / "benchmarks/results"
    song_cost = json.loads((results / "song_cost.json").read_text())
    separation = json.loads((results / "separate_stems.json").read_text())
    cost_model = json.loads((ROOT / "jobs/cost_model.json").read_text())
    cost = read_cost(song_cost, cost_model, read_values())
    assert DOCUMENT.read_text() == document(song_cost, cost_model, separation, cost)
