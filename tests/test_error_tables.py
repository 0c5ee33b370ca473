"""Every leaf of the error tree stands in every transport's table."""

from __future__ import annotations

import json

import grpc
import pytest

from http_api.problems import PROBLEMS, problem
from remix import errors
from runners.inference_protocol import STATUS


def leaves(error: type[errors.RemixError]) -> list[type[errors.RemixError]]:
    below = error.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [error]


LEAVES = leaves(errors.RemixError)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_has_a_row_in_each_table(leaf: type[errors.RemixError]) -> None:
    assert leaf in PROBLEMS
    assert isinstance(STATUS[leaf], grpc.StatusCode)


def test_problem_types_are_distinct() -> None:
    names = [kind.name for kind in PROBLEMS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("leaf", LEAVES)
def test_callers_mistakes_are_4xx_and_ours_are_5xx(leaf: type[errors.RemixError]) -> None:
    # Busy and cancelled are the caller's to mend: try again later, stay.
    is_callers = issubclass(leaf, errors.InvalidInput | errors.QueueFull | errors.Cancelled)
    assert PROBLEMS[leaf].status // 100 == (4 if is_callers else 5)


def test_problem_of_an_unknown_error_does_not_tell_its_text() -> None:
    answer = problem(RuntimeError("the password is hunter2"))
    assert answer.status_code == 500
    assert "hunter2" not in bytes(answer.body).decode()


def test_problem_carries_what_the_error_says() -> None:
    error = errors.LimitExceeded("The audio is longer than 600 s: cut it first.")
    body = json.loads(bytes(problem(error).body))
    assert body["detail"] == str(error)
    assert body["status"] == 413
