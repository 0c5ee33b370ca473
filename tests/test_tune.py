"""The search for batch limits: on models whose times are known, and on the manifest as it is."""

from __future__ import annotations

import time
import tomllib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.tune import BATCHES, batches_of, time_batches, worth_making, write_limit
from remix.errors import InvalidModel
from remix.manifest import MANIFEST_PATH
from remix.stages import Tensors

WINDOWS = [{"x": np.full((1, 3), value, np.float32)} for value in range(5)]


@pytest.mark.parametrize(
    ("once_s", "row_s", "limit"),
    [
        (0.03, 0.0003, 32),  # what is done once in a batch is what costs
        (0.0, 0.01, 1),  # each row costs as much, whatever is beside it
    ],
)
def test_limit_is_the_batch_that_a_model_gains_from(
    once_s: float, row_s: float, limit: int
) -> None:
    def compute(inputs: Tensors) -> None:
        time.sleep(once_s + row_s * len(inputs["x"]))

    window_s = time_batches(compute, WINDOWS, workers=2, rounds=3)
    assert worth_making(window_s) == limit


def test_batch_that_costs_more_twice_is_not_tried_again() -> None:
    seen: list[int] = []

    def compute(inputs: Tensors) -> None:
        rows = len(inputs["x"])
        seen.append(rows)
        time.sleep(0.03 * rows**2)

    assert worth_making(time_batches(compute, WINDOWS, workers=1, rounds=3)) == 1
    assert set(seen) == {1, 2}
    assert seen.count(2) == 2


def test_batches_hold_windows_that_can_share_one_in_their_order() -> None:
    odd: dict[str, NDArray[Any]] = {"x": np.zeros((1, 4), np.float32)}
    first, second = batches_of([WINDOWS[0], odd, *WINDOWS[1:]], rows=4, count=2)
    assert first["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert second["x"][:, 0].tolist() == [4, 0, 1, 2]
    assert BATCHES[0] == 1


def test_manifest_changes_in_the_limit_alone() -> None:
    manifest = MANIFEST_PATH.read_text()
    before = tomllib.loads(manifest)
    for name, entry in before.items():
        after = tomllib.loads(write_limit(manifest, name, "cpu", 64))
        assert after[name].pop("max_batch") == {**entry["max_batch"], "cpu": 64}
        assert after == {
            **before,
            name: {key: value for key, value in entry.items() if key != "max_batch"},
        }
        assert write_limit(manifest, name, "cpu", entry["max_batch"]["cpu"]) == manifest


def test_limit_of_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidModel, match="no max_batch"):
        write_limit(MANIFEST_PATH.read_text(), "nobody", "cpu", 2)
