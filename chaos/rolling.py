"""Everything is restarted, one after the other, while callers are served; nobody is to notice.

Callers are as simple as may be: each request is made once, and once again, elsewhere, if the answer
was that the server stops (503; over gRPC UNAVAILABLE, after a GOAWAY). Whatever else fails counts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import grpc
import httpx
from google.protobuf.json_format import ParseDict

from chaos.caller import ENDED, TIMEOUT, Piece
from chaos.servers import STAGES, Server, address_of, runner
from chaos.world import JOBS, Outcome, World
from remix_v1 import remix_pb2 as messages
from remix_v1.remix_pb2_grpc import RemixServiceStub

CHUNK_BYTES = 1 << 18

CALL_S = 120.0

UNLIKE = "report.json"

Answer = TypeVar("Answer")


@dataclass
class Log:
    """What callers saw.

    Args:
        sums: by job, of its files.
        pieces: by job, what was asked for.
        again: requests that were made once more.
        failures: whatever else was not an answer.
    """

    sums: dict[str, dict[str, str]] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Stopping(Exception):
    """The server says that it stops."""


class HttpCaller:
    """Over HTTP: stays with an address until it is told there that it stops.

    Args:
        urls: of the composers.
        log: of what is seen.
    """

    def __init__(self, urls: Sequence[str], log: Log) -> None:
        self._urls = list(urls)
        self._log = log
        self._lock = threading.Lock()

    def carry_through(self, job_id: str, piece: Piece) -> None:
        """A job, from its submission to the checksums of its files."""
        self._twice(lambda url: self._submit(url, job_id, piece))
        state, after = "", "0"
        while state not in ENDED:
            state, after = self._twice(lambda url, a=after: self._watch(url, job_id, a))  # type: ignore[misc]
        self._log.sums[job_id] = self.sums(job_id)

    def sums(self, job_id: str) -> dict[str, str]:
        """Checksums of a job's files."""
        job = self._twice(lambda url: _checked(_get(f"{url}/v1/jobs/{job_id}"))).json()
        if job["state"] != "done":
            raise ValueError(f"{job_id} is {job['state']}: {job['error']}")
        return {file["name"]: file["sha256"] for file in job["artifacts"] if file["name"] != UNLIKE}

    def _twice(self, ask: Callable[[str], Answer]) -> Answer:
        url = self._urls[0]
        try:
            return ask(url)
        except Stopping as why:
            self._log.again.append(f"HTTP {why}")
            with self._lock:
                if url == self._urls[0]:
                    self._urls.append(self._urls.pop(0))
            return ask(self._urls[0])

    def _submit(self, url: str, job_id: str, piece: Piece) -> httpx.Response:
        form = {"options": json.dumps(piece.options)}
        answer = httpx.put(
            f"{url}/v1/jobs/{job_id}",
            files={"song": piece.song},
            data=form,
            timeout=TIMEOUT,
            trust_env=False,
        )
        return _checked(answer)

    def _watch(self, url: str, job_id: str, after: str) -> tuple[str, str]:
        """The state of the last event that came, and its id; a stopping server ends the stream."""
        state = ""
        with httpx.stream(
            "GET",
            f"{url}/v1/jobs/{job_id}/events",
            headers={"Last-Event-ID": after},
            timeout=TIMEOUT,
            trust_env=False,
        ) as answer:
            if answer.status_code == 204:  # nothing came after the last event
                return _get(f"{url}/v1/jobs/{job_id}").json()["state"], after
            _checked(answer)
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    after = line[4:]
                elif line.startswith("data: ") and "state" in (data := json.loads(line[6:])):
                    state = data["state"]
        return state, after


class GrpcCaller:
    """Over gRPC, on one channel: the library goes to the other address by itself.

    Args:
        addresses: of the composers.
        log: of what is seen.
        reader: fetches checksums.
    """

    def __init__(self, addresses: Sequence[str], log: Log, reader: HttpCaller) -> None:
        self._channel = grpc.insecure_channel("ipv4:" + ",".join(addresses))
        self._service = RemixServiceStub(self._channel)
        self._log = log
        self._reader = reader

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def carry_through(self, job_id: str, piece: Piece) -> None:
        """A job, from its submission to the checksums of its files."""
        self._twice(lambda: self._service.SubmitRemix(_submission(job_id, piece), timeout=CALL_S))
        after = 0
        while True:
            events = self._service.WatchJob(
                messages.WatchJobRequest(job_id=job_id, after_event=after), timeout=CALL_S
            )
            state = messages.JOB_STATE_UNSPECIFIED
            try:
                for event in events:
                    after, state = event.id, event.state or state
                break
            except grpc.RpcError as error:  # it goes on after the last event, at the next server
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                self._log.again.append(f"gRPC {error.details()}")
        self._log.sums[job_id] = self._reader.sums(job_id)

    def _twice(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self._log.again.append(f"gRPC {error.details()}")
            return call()


def rolling(world: World) -> Iterator[Outcome]:
    """Both composers, then each runner, are restarted in order under load."""
    data_dir = world.new_folder("data")
    settings = {"PHILHARMONICS_MAX_REMIXES": "4", "PHILHARMONICS_CACHE_BYTES": "0"}
    new = {stage: runner(stage, world.new_folder("new")) for stage in STAGES}
    addresses = {
        stage: f"ipv4:{old},{address_of(new[stage])}" for stage, old in world.addresses.items()
    }
    composers = [world.composer(data_dir, settings, runners=addresses) for _ in range(2)]
    outcome, log = Outcome("rolling restart", "SIGTERM and start of everything"), Log()
    with world.running(*composers):
        begin_s = time.monotonic()
        with _load(world, composers, log):
            for composer in composers:
                composer.stop()
                composer.start()
                composer.await_ready()
            for stage in STAGES:
                world.replace_runner(stage, new[stage])
            outcome.back_s = time.monotonic() - begin_s
        outcome.whole_s = time.monotonic() - begin_s
    outcome.jobs = len(log.pieces)
    outcome.facts = {"asked_again": len(log.again), "why": sorted(set(log.again))}
    outcome.violations += log.failures
    expected = world.undisturbed([log.pieces[job_id] for job_id in log.sums])
    for job_id, sums in log.sums.items():
        if sums != expected[log.pieces[job_id].name]:
            outcome.violations.append(f"{job_id} is not what it is undisturbed")
    yield outcome


@contextmanager
def _load(world: World, composers: Sequence[Server], log: Log) -> Iterator[None]:
    """Eight jobs at once, half over each transport, while the block runs; then to their ends."""
    numbers, over = count(), threading.Event()

    def submit_on(caller: HttpCaller | GrpcCaller) -> None:
        while not over.is_set():
            number = next(numbers)
            piece = world.pieces(2_000 + number // JOBS)[number % JOBS]
            log.pieces[f"r-{piece.name}"] = piece
            try:
                caller.carry_through(f"r-{piece.name}", piece)
            except (httpx.HTTPError, grpc.RpcError, Stopping, ValueError) as error:
                log.failures.append(f"r-{piece.name}: {type(error).__name__}: {error}")
                return  # one is enough

    http = HttpCaller([one.url for one in composers], log)
    over_grpc = GrpcCaller([one.grpc for one in composers], log, http)
    with closing(over_grpc), ThreadPoolExecutor(JOBS) as threads:
        for number in range(JOBS):
            threads.submit(submit_on, over_grpc if number % 2 else http)
        try:
            yield
        finally:
            over.set()


def _submission(job_id: str, piece: Piece) -> Iterator[messages.SubmitRemixRequest]:
    options = ParseDict(dict(piece.options), messages.RemixOptions())
    head = messages.SubmitRemixHead(options=options, job_id=job_id)
    yield messages.SubmitRemixRequest(head=head)
    for start in range(0, len(piece.song), CHUNK_BYTES):
        yield messages.SubmitRemixRequest(chunk=piece.song[start : start + CHUNK_BYTES])


def _get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=TIMEOUT, trust_env=False)


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code == 503:
        raise Stopping(f"503 of {answer.request.method}")
    answer.raise_for_status()
    return answer
