"""A real server is told to stop: who is inside, who comes, who watches."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.conftest import ROOT
from tests.toy_runner import free_address

ENDS_S = 30.0
"""For what takes a second on a machine that is not busy."""


@contextmanager
def server(limit_s: float) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    address = free_address()
    command = [sys.executable, "-m", "tests.draining_app", address.split(":")[1], str(limit_s)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            until_s = time.monotonic() + ENDS_S
            while time.monotonic() < until_s:
                with suppress(httpx.TransportError):
                    httpx.get(f"http://{address}/readyz")
                    break
            yield f"http://{address}", process
        finally:
            process.kill()


def is_inside(url: str, call: Future[httpx.Response]) -> None:
    """Return when the call has had time to arrive: one that began later was answered."""
    assert httpx.get(f"{url}/wait?seconds=0.2").status_code == 200
    assert not call.done()


def test_request_inside_ends_while_others_are_refused_and_then_the_port_is_closed() -> None:
    with server(limit_s=60.0) as (url, process), ThreadPoolExecutor(1) as threads:
        inside = threads.submit(httpx.get, f"{url}/wait?seconds=2", timeout=ENDS_S)
        is_inside(url, inside)
        process.send_signal(signal.SIGTERM)
        seen: list[httpx.Response] = []
        with pytest.raises(httpx.TransportError):
            while True:
                seen.append(httpx.get(f"{url}/wait?seconds=0"))
        assert inside.result().text == "done"
        refused = [answer for answer in seen if answer.status_code != 200]
        assert refused
        for answer in refused:
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "2"
            assert answer.headers["connection"] == "close"
        assert process.wait(ENDS_S) == -signal.SIGTERM


def test_request_that_outlasts_the_limit_is_told_so() -> None:
    with server(limit_s=0.5) as (url, process), ThreadPoolExecutor(1) as threads:
        inside = threads.submit(httpx.get, f"{url}/wait?seconds=1000", timeout=ENDS_S)
        is_inside(url, inside)
        process.send_signal(signal.SIGTERM)
        assert inside.result().status_code == 503
        assert inside.result().json()["value"] == "stopping"
        assert process.wait(ENDS_S) == -signal.SIGTERM


def test_watcher_does_not_hold_up_the_end_and_sees_a_whole_stream() -> None:
    with server(limit_s=1_000.0) as (url, process):
        with httpx.stream("GET", f"{url}/events", timeout=ENDS_S) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: progress"
            process.send_signal(signal.SIGTERM)
            assert list(lines) == [""]  # ended as a stream ends, not cut off
        assert process.wait(ENDS_S) == -signal.SIGTERM


def test_watcher_is_sent_off_while_he_can_be_told_that_the_server_stops() -> None:
    """One who watches to the last moment, and asks again, would meet a closed door."""
    with server(limit_s=60.0) as (url, process), ThreadPoolExecutor(1) as threads:
        inside = threads.submit(httpx.get, f"{url}/wait?seconds=3", timeout=ENDS_S)
        is_inside(url, inside)
        with httpx.stream("GET", f"{url}/events", timeout=ENDS_S) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: progress"
            process.send_signal(signal.SIGTERM)
            assert list(lines) == [""]
        assert not inside.done()
        assert httpx.get(f"{url}/events", timeout=ENDS_S).status_code == 503
        assert inside.result().text == "done"
    with server(limit_s=60.0) as (url, process):  # and where nothing else is inside
        with httpx.stream("GET", f"{url}/events", timeout=ENDS_S) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: progress"
            process.send_signal(signal.SIGTERM)
            assert list(lines) == [""]
        assert httpx.get(f"{url}/events", timeout=ENDS_S).status_code == 503


def test_health_answers_while_requests_end_and_a_second_signal_ends_at_once() -> None:
    with server(limit_s=1_000.0) as (url, process), ThreadPoolExecutor(1) as threads:
        inside = threads.submit(httpx.get, f"{url}/wait?seconds=1000", timeout=ENDS_S)
        is_inside(url, inside)
        process.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + ENDS_S
        while httpx.get(f"{url}/readyz").status_code != 503:
            assert time.monotonic() < until_s
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            while True:
                httpx.get(f"{url}/readyz")
        process.kill()
        with suppress(httpx.TransportError):
            inside.result()
