"""songs -> remixes, over HTTP, as a caller would ask for them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx

from load_tests.generator import OK, Answer, Work
from load_tests.songs import Song

CHUNK_BYTES = 1 << 16
"""A body goes out in pieces, so that a large one does not hold up the event loop."""

CONNECT_S = 10.0

RETRIED = {429, 503}

ENDED = {"done", "failed", "cancelled"}

RECONNECT_S = 0.5

CANCEL_S = 10.0
"""How long a cancelled job's answer is waited for: what nobody wants must not load the next run."""


def song_form(song: Song, options: Mapping[str, Any]) -> Work:
    """The form of a song and its options, encoded before the run."""
    boundary = secrets.token_hex(16)
    body = b"".join([
        f"--{boundary}\r\n".encode(),
        b'Content-Disposition: form-data; name="options"\r\n',
        b"Content-Type: application/json\r\n\r\n",
        json.dumps(options).encode(),
        f"\r\n--{boundary}\r\n".encode(),
        b'Content-Disposition: form-data; name="song"; filename="song.flac"\r\n',
        b"Content-Type: audio/flac\r\n\r\n",
        song.flac,
        f"\r\n--{boundary}--\r\n".encode(),
    ])  # fmt: skip
    return Work(song.duration_s, body, f"multipart/form-data; boundary={boundary}")


def open_client(url: str, key: str = "") -> httpx.AsyncClient:
    """A client without limits of its own: time and number are the generator's to bound.

    Every request has a connection of its own, as independent callers do. A kept one may be closed
    by the server in the moment that it is used again, after 6 s of SIGSTOP for certain.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


def request_of(client: httpx.AsyncClient, method: str, path: str, work: Work) -> httpx.Request:
    """A request with the work's body."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(work.body), CHUNK_BYTES):
            yield work.body[start : start + CHUNK_BYTES]

    headers = {"content-type": work.content_type, "content-length": str(len(work.body))}
    return client.build_request(method, path, content=pieces(), headers=headers)


def parts_of_report(report: Mapping[str, Any]) -> dict[str, float]:
    """What a remix's report says of each stage's runner, flat: `separate_stems compute_s`."""
    stages: Mapping[str, Mapping[str, float]] = report["times"]["stages"]
    return {
        f"{stage} {name}": float(value)
        for stage, times in stages.items()
        for name, value in times.items()
    }


def retry_after_s(response: httpx.Response) -> float | None:
    """When to come back, if the answer is a refusal that says so."""
    told = response.headers.get("retry-after") if response.status_code in RETRIED else None
    return None if told is None else float(told)


class RemixTarget:
    """`POST /v1/remix`: the answer is the remix, WAV.

    Args:
        client: from `open_client`.
        retries: whether to come back when a refusal says when, as long as there is patience.
    """

    def __init__(self, client: httpx.AsyncClient, *, retries: bool) -> None:
        self._client = client
        self._retries = retries

    async def send(self, work: Work) -> Answer:
        """See `Target`."""
        refusals: list[str] = []
        while True:
            try:
                status, wait_s, first_s = await self._once(work)
            except httpx.TransportError:
                return Answer("unreachable", tuple(refusals))
            if wait_s is None or not self._retries:
                return Answer(OK if status == 200 else str(status), tuple(refusals), first_s)
            refusals.append(str(status))
            await asyncio.sleep(wait_s)

    async def _once(self, work: Work) -> tuple[int, float | None, float | None]:
        """Status, when to come back, when the first data came."""
        request = request_of(self._client, "POST", "/v1/remix", work)
        clock = asyncio.get_running_loop().time
        first_s, sent_s = None, clock()
        response = await self._client.send(request, stream=True)
        try:
            async for _ in response.aiter_raw():
                if first_s is None:
                    first_s = clock() - sent_s
        finally:
            await response.aclose()
        return response.status_code, retry_after_s(response), first_s


class JobsTarget:
    """A job: its sound as it is made, then its events to their end, then its report.

    It is submitted as `PUT /v1/jobs/{id}`, so that it can be cancelled whenever patience ends,
    the submission's answer being here or not.

    Args:
        client: from `open_client`.
        retries: as of `RemixTarget`.
    """

    def __init__(self, client: httpx.AsyncClient, *, retries: bool) -> None:
        self._client = client
        self._retries = retries

    async def send(self, work: Work) -> Answer:
        """See `Target`; a job that nobody waits for any more is cancelled."""
        path = f"/v1/jobs/load-{secrets.token_hex(16)}"
        refusals: list[str] = []
        sent_s = asyncio.get_running_loop().time()
        try:
            while True:
                request = request_of(self._client, "PUT", path, work)
                try:
                    response = await self._client.send(request)
                except httpx.TransportError:
                    return Answer("unreachable", tuple(refusals))
                if response.is_success:
                    return await self._follow(path, tuple(refusals), sent_s)
                status, wait_s = response.status_code, retry_after_s(response)
                if wait_s is None or not self._retries:
                    return Answer(str(status), tuple(refusals))
                refusals.append(str(status))
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            with suppress(httpx.TransportError):
                await self._client.delete(path, timeout=CANCEL_S)
            raise

    async def _follow(self, path: str, refusals: tuple[str, ...], sent_s: float) -> Answer:
        """Until the job has ended: durable as it is, a lost connection is made anew."""
        first_s = None
        while True:
            try:
                async with self._client.stream("GET", f"{path}/audio") as audio:
                    async for _ in audio.aiter_raw():
                        if first_s is None and audio.is_success:
                            first_s = asyncio.get_running_loop().time() - sent_s
                async with self._client.stream("GET", f"{path}/events") as events:
                    async for _ in events.aiter_raw():
                        pass
                job = (await self._client.get(path)).json()
                if job["state"] == "done":
                    report = (await self._client.get(f"{path}/artifacts/report.json")).json()
                    return Answer(OK, refusals, first_s, parts_of_report(report))
                if job["state"] in ENDED:
                    return Answer(f"job {job['state']}", refusals)
            except httpx.TransportError:
                await asyncio.sleep(RECONNECT_S)
