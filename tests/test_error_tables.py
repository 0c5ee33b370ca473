"""Every leaf of the error tree stands in every transport's table."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from grpc_api.statuses import KINDS, status_of
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
    assert leaf in KINDS
    assert isinstance(STATUS[leaf], grpc.StatusCode)


def test_problem_types_are_distinct() -> None:
    names = [kind.name for kind in PROBLEMS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("leaf", LEAVES)
def test_callers_mistakes_are_4xx_and_ours_are_5xx(leaf: type[errors.RemixError]) -> None:
    # Busy and cancelled are the caller's to mend: try again later, stay.
    callers = (
        errors.InvalidInput
        | errors.Unauthenticated
        | errors.Forbidden
        | errors.QueueFull
        | errors.Cancelled
    )
    is_callers = issubclass(leaf, callers)
    assert PROBLEMS[leaf].status // 100 == (4 if is_callers else 5)


def test_problem_of_an_unknown_error_does_not_tell_its_text() -> None:
    answer = problem(RuntimeError("the password is hunter2"))
    assert answer.status_code == 500
    assert "hunter2" not in bytes(answer.body).decode()


def test_problem_carries_what_the_error_says() -> None:
    error = errors.LimitExceeded(
        "The audio is 601 s long; at most 600 s are taken.",
        value=601,
        limit=600,
        remedy="Cut it first.",
    )
    body = json.loads(bytes(problem(error).body))
    assert body["detail"] == "The audio is 601 s long; at most 600 s are taken. Cut it first."
    assert body["status"] == 413
    assert (body["value"], body["limit"], body["remedy"]) == (601, 600, "Cut it first.")


def test_retry_after_is_the_errors_own_in_whole_seconds_or_the_tables() -> None:
    def header(error: Exception) -> str | None:
        return problem(error).headers.get("retry-after")

    assert header(errors.QueueFull("Full.", retry_after_s=7.2)) == "8"
    assert header(errors.QueueFull("Full.")) == str(PROBLEMS[errors.QueueFull].retry_after_s)
    assert header(errors.NotFound("Nobody.")) is None


def test_problem_of_a_foreign_error_does_not_tell_its_value() -> None:
    error = StopIteration("the password is hunter2")
    assert b"hunter2" not in bytes(problem(error).body)


@pytest.mark.parametrize("leaf", LEAVES)
def test_error_made_of_its_parts_is_the_same(leaf: type[errors.RemixError]) -> None:
    error = leaf(
        "It has 9; at most 8 are taken.",
        value=9,
        limit=[1, 8],
        remedy="Take one away.",
        retry_after_s=4.5,
    )
    again = leaf(**json.loads(json.dumps(error.parts())))
    assert str(again) == str(error) == "It has 9; at most 8 are taken. Take one away."
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 10**400, 0.5, float("nan"), float("-inf"), "", "a\n", "\ud800", "x" * 10**6,
     b"\x00" * 10**6, list(range(10**5)), {"a": [[[[[[[[{}]]]]]]]]}],
)  # fmt: skip
def test_excerpt_of_anything_goes_into_a_problem(value: object) -> None:
    found = errors.excerpt(value)
    body = bytes(problem(errors.InvalidOption("Wrong.", value=found)).body)
    assert json.loads(body)["value"] == found
    assert len(body) < 500


def test_transports_have_the_same_word_for_each_error() -> None:
    for error, kind in PROBLEMS.items():
        assert KINDS[error].reason == kind.name.upper().replace("-", "_")


@pytest.mark.parametrize("leaf", LEAVES)
def test_callers_may_come_again_over_grpc_where_they_may_over_http(
    leaf: type[errors.RemixError],
) -> None:
    assert KINDS[leaf].retry_after_s == PROBLEMS[leaf].retry_after_s
    details = {packed.TypeName() for packed in status_of(leaf("Wrong.")).details}
    assert ("google.rpc.RetryInfo" in details) == (PROBLEMS[leaf].retry_after_s is not None)


def test_status_of_an_unknown_error_does_not_tell_its_text() -> None:
    assert "hunter2" not in str(status_of(RuntimeError("the password is hunter2")))


def test_status_of_anything_fits_into_the_metadata_that_clients_take() -> None:
    names = [f"voice-{number}" for number in range(10_000)]
    error = errors.NotFound("There is no such voice; " * 500, value="x" * 10**5, limit=names)
    # 8 KB in all (grpc.max_metadata_size), and the details travel as base64.
    assert len(status_of(error).SerializeToString()) < 5_000


def test_full_disk_is_storage_that_is_away_and_no_other_fault_is(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageUnavailable), errors.full_disk():
        Path("/dev/full").write_bytes(b"a byte")
    with pytest.raises(FileNotFoundError), errors.full_disk():
        (tmp_path / "nothing").read_bytes()
