"""The hub path against a real HTTP server on loopback that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.fetch_hub import HubFile, fetch_from_hub
from remix.errors import InvalidModel
from tests.hub_server import Hub, serve_hub

CONTENT = np.random.default_rng(7).bytes(1_000_000)
PATH = "owner/name/resolve/v1/weights.th"
FILE = HubFile("owner/name", "v1", "weights.th", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.files[PATH] = CONTENT
        yield hub


def test_fetch_follows_the_redirect_and_reports_every_byte(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_from_hub(FILE, hub.url, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert list(tmp_path.iterdir()) == [path]


def test_fetch_again_asks_for_nothing(hub: Hub, tmp_path: Path) -> None:
    first = fetch_from_hub(FILE, hub.url, tmp_path)
    assert fetch_from_hub(FILE, hub.url, tmp_path) == first
    assert hub.requests == [None]


def test_fetch_continues_where_the_transfer_broke_off(hub: Hub, tmp_path: Path) -> None:
    hub.break_off_after = [300_000, 200_000]
    path = fetch_from_hub(FILE, hub.url, tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.requests == [None, "bytes=300000-", "bytes=500000-"]


def test_fetch_continues_what_an_earlier_process_left(hub: Hub, tmp_path: Path) -> None:
    hub.break_off_after = [400_000, 0, 0, 0]
    with pytest.raises(OSError, match="broke off"):
        fetch_from_hub(FILE, hub.url, tmp_path, attempts=2)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    hub.requests.clear()
    hub.break_off_after = []
    assert fetch_from_hub(FILE, hub.url, tmp_path).read_bytes() == CONTENT
    assert hub.requests == ["bytes=400000-"]


def test_fetch_starts_anew_where_the_hub_ignores_range(hub: Hub, tmp_path: Path) -> None:
    hub.break_off_after = [300_000]
    hub.honours_range = False
    assert fetch_from_hub(FILE, hub.url, tmp_path).read_bytes() == CONTENT


def test_fetch_starts_anew_where_the_partial_file_was_of_something_else(
    hub: Hub, tmp_path: Path
) -> None:
    hub.break_off_after = [400_000, 0, 0]
    with pytest.raises(OSError):
        fetch_from_hub(FILE, hub.url, tmp_path, attempts=1)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(bytes(1234))
    hub.break_off_after = []
    assert fetch_from_hub(FILE, hub.url, tmp_path).read_bytes() == CONTENT


def test_fetch_finishes_a_partial_file_that_was_whole(hub: Hub, tmp_path: Path) -> None:
    path = fetch_from_hub(FILE, hub.url, tmp_path)
    path.rename(path.with_name(path.name + ".partial"))
    assert fetch_from_hub(FILE, hub.url, tmp_path).read_bytes() == CONTENT


def test_fetch_refuses_and_removes_a_file_of_another_checksum(hub: Hub, tmp_path: Path) -> None:
    hub.files[PATH] = CONTENT[:-1] + bytes(1)
    with pytest.raises(InvalidModel, match=FILE.sha256):
        fetch_from_hub(FILE, hub.url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_takes_the_first_digits_of_a_checksum_but_not_fewer_than_eight(
    hub: Hub, tmp_path: Path
) -> None:
    short = HubFile("owner/name", "v1", "weights.th", FILE.sha256[:8])
    assert fetch_from_hub(short, hub.url, tmp_path).read_bytes() == CONTENT
    with pytest.raises(InvalidModel, match="at least 8"):
        fetch_from_hub(HubFile("owner/name", "v1", "weights.th", "ab"), hub.url, tmp_path)


def test_fetch_without_a_checksum_takes_the_hubs_word(hub: Hub, tmp_path: Path) -> None:
    unpinned = HubFile("owner/name", "v1", "weights.th", "")
    assert fetch_from_hub(unpinned, hub.url, tmp_path).read_bytes() == CONTENT
    assert fetch_from_hub(unpinned, hub.url, tmp_path).read_bytes() == CONTENT
    assert hub.requests == [None]  # and a second time only the checksum is asked for
    hub.states_sha256 = False
    with pytest.raises(InvalidModel, match="states no sha256"):
        fetch_from_hub(unpinned, hub.url, tmp_path)


def test_fetch_of_an_unknown_file_is_the_hubs_own_answer(hub: Hub, tmp_path: Path) -> None:
    for sha256 in (FILE.sha256, ""):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch_from_hub(HubFile("owner/name", "v2", "x", sha256), hub.url, tmp_path)


def test_fetch_from_a_hub_out_of_reach_fails_at_once(tmp_path: Path) -> None:
    with serve_hub() as gone:
        url = gone.url
    with pytest.raises(OSError, match="refused"):
        fetch_from_hub(FILE, url, tmp_path)
