"""Jobs over a composer that computes nothing: cancelling, resuming, reuse, retention, webhooks."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from jobs.database import Database, open_database
from jobs.estimate import Estimator, read_cost_model
from jobs.job import Job
from jobs.jobs import Jobs
from jobs.work import HEADER_BYTES, wav_header
from remix.audio import Audio
from remix.audio_codec import encode
from remix.errors import Conflict, InvalidAudio, InvalidOption, NotFound, QueueFull
from remix.manifest import read_manifest
from remix.options import RemixOptions
from remix.settings import Settings, read_settings
from tests.conftest import CRASH_SEED, SLOW_SEED
from tests.fakes import FakeComposer, no_infer

QUICK, LONG = RemixOptions(), RemixOptions(seed=SLOW_SEED)

DEADLINE_S = 60.0

SECRET = "a secret"


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("song") / "song.wav"
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (30_000, 2))
    soundfile.write(path, noise, 44_100)
    return path


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Jobs]:
    """Jobs at work, until the block ends; what has not ended then is left to the next ones."""
    chosen: Settings = replace(read_settings(), data_dir=folder, **settings)
    database = Database(open_database(chosen.database_url))
    composer = FakeComposer(chosen, read_manifest(), no_infer)
    jobs = Jobs(chosen, composer, Estimator(read_cost_model()), database)
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.stop()
        database.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work

    asyncio.run(within())


async def ended(jobs: Jobs, job: Job) -> Job:
    async for _ in jobs.events(job.id, job.owner):
        pass
    return await jobs.get(job.id, job.owner)


async def began(jobs: Jobs, job: Job) -> None:
    """Return when the job has got on a little."""
    async for event in jobs.events(job.id, job.owner):
        if event is not None and event.stage is not None:
            return


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.05)


def files_in(folder: Path) -> list[Path]:
    return [path for path in (folder / "artifacts").rglob("*") if path.is_file()]


async def content(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in stream])


def test_job_ends_with_its_files_and_the_same_request_has_them_at_once(
    song: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path) as jobs:
            job = await jobs.submit(song, QUICK, "ann", "mine")
            hearing = asyncio.create_task(content(jobs.audio("mine", "ann")))
            job = await ended(jobs, job)
            assert (job.state, job.attempt, job.error) == ("done", 1, None)
            assert job.expires_s is not None and job.ended_s is not None
            assert job.expires_s > job.ended_s
            for info in job.artifacts:
                artifact = await jobs.artifact("mine", "ann", info.name)
                whole = await content(artifact.read())
                assert len(whole) == info.size_bytes
                assert hashlib.sha256(whole).hexdigest() == info.sha256
                assert await content(artifact.read(3, 9)) == whole[3:9]
            remix = await jobs.artifact("mine", "ann", "remix.wav")
            assert await hearing == await content(remix.read())
            # What is left of the work are the files.
            assert len(files_in(tmp_path)) == len(job.artifacts)

            assert (await jobs.submit(song, QUICK, "ann", "mine")) == job
            with pytest.raises(Conflict):
                await jobs.submit(song, RemixOptions(seed=1), "ann", "mine")
            twin = await ended(jobs, await jobs.submit(song, QUICK, "eve"))
            assert {a.name: a.sha256 for a in twin.artifacts if a.name != "report.json"} == {
                a.name: a.sha256 for a in job.artifacts if a.name != "report.json"
            }
            report = await jobs.artifact(twin.id, "eve", "report.json")
            facts = json.loads(await content(report.read()))
            assert facts["times"]["whole_result_cached"] is True
            assert not (await jobs.get(twin.id, "eve")).progress  # nothing was done for it

    run(work())


def test_sound_is_heard_while_it_is_made_and_on_through_a_restart(
    song: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path) as jobs:
            job = await jobs.submit(song, RemixOptions(seed=40), job_id="j")
            sound = jobs.audio("j")
            heard = await anext(sound) + await anext(sound)
            assert (await jobs.get("j")).state == "running"
            await sound.aclose()
        async with running(tmp_path) as jobs:
            heard += await content(jobs.audio("j", start=len(heard)))
            remix = await jobs.artifact("j", "", "remix.wav")
            assert heard == await content(remix.read())
            assert (await ended(jobs, job)).attempt == 2

    run(work())


def test_job_is_its_owners_alone(song: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as jobs:
            job = await jobs.submit(song, LONG, "ann")
            for call in (
                jobs.get(job.id, "eve"),
                jobs.cancel(job.id, "eve"),
                jobs.artifact(job.id, "eve", "remix.wav"),
                anext(jobs.events(job.id, "eve")),
                anext(jobs.audio(job.id, "eve")),
            ):
                with pytest.raises(NotFound):
                    await call
            assert (await jobs.list("eve")).jobs == ()
            assert [j.id for j in (await jobs.list("ann")).jobs] == [job.id]
            await jobs.cancel(job.id, "ann")

    run(work())


def test_cancelled_job_stops_at_once_and_leaves_no_files(song: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, max_remixes=1) as jobs:
            first, second = [await jobs.submit(song, LONG) for _ in range(2)]
            await began(jobs, first)
            assert (await jobs.get(second.id)).position == 0
            for job in (second, first):
                assert (await jobs.cancel(job.id)).state == "cancelled"
                assert (await ended(jobs, job)).state == "cancelled"

            async def nothing_left() -> bool:
                return not files_in(tmp_path)

            await until(nothing_left)
            # The slot is free again.
            assert (await ended(jobs, await jobs.submit(song, QUICK))).state == "done"
            assert (await jobs.cancel(first.id)).state == "cancelled"

    run(work())


def test_job_goes_on_where_the_next_service_starts(song: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, max_remixes=1) as jobs:
            one = await jobs.submit(song, RemixOptions(seed=30), job_id="one")
            two = await jobs.submit(song, QUICK, job_id="two")
            await began(jobs, one)
        async with running(tmp_path, max_remixes=1) as jobs:
            assert (await jobs.get("one")).attempt <= 2
            first, second = await ended(jobs, one), await ended(jobs, two)
            assert (first.state, first.attempt) == ("done", 2)
            assert (second.state, second.attempt) == ("done", 1)
            events = [e async for e in jobs.events("one")]
            assert [e.id for e in events if e] == list(range(1, len(events) + 1))
            after = [e async for e in jobs.events("one", after_event=2)]
            assert after == events[2:]
            assert [e async for e in jobs.events("one", after_event=len(events))] == []

    run(work())


def test_what_cannot_be_done_is_refused_or_fails_with_its_reason(
    song: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        noise = tmp_path / "noise"
        noise.write_bytes(b"no song")
        async with running(tmp_path, max_remixes=1, max_waiting_jobs=1) as jobs:
            with pytest.raises(InvalidAudio):
                await jobs.submit(noise, QUICK)
            with pytest.raises(InvalidOption):
                await jobs.submit(song, QUICK, job_id="a/b")
            with pytest.raises(InvalidOption):
                await jobs.submit(song, QUICK, webhook_url="http://127.0.0.1/")
            with pytest.raises(NotFound):
                await jobs.submit(song, RemixOptions(voice="nobody"))
            with pytest.raises(InvalidOption):
                await jobs.list(page_token="x")
            crashed = await ended(jobs, await jobs.submit(song, RemixOptions(seed=CRASH_SEED)))
            assert crashed.state == "failed"
            assert crashed.error is not None
            assert "secret" not in str(crashed.error)
            running_one = await jobs.submit(song, LONG)
            await began(jobs, running_one)
            waiting = await jobs.submit(song, LONG)
            with pytest.raises(QueueFull):
                await jobs.submit(song, LONG)

            async def songs_of_refused_jobs_are_gone() -> bool:
                songs = [file for file in files_in(tmp_path) if file.name == "song"]
                assert len(songs) >= 2  # of those two that are admitted
                return len(songs) == 2

            await until(songs_of_refused_jobs_are_gone)
            for job in (waiting, running_one):
                await jobs.cancel(job.id)

    run(work())


def test_ended_jobs_are_deleted_after_their_time(song: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, retention_s=0.5) as jobs:
            done, cancelled = await jobs.submit(song, QUICK), await jobs.submit(song, LONG)
            await jobs.cancel(cancelled.id)
            await ended(jobs, done)

            async def nothing_left() -> bool:
                return not (await jobs.list()).jobs and not files_in(tmp_path)

            await until(nothing_left)
            with pytest.raises(NotFound):
                await jobs.get(done.id)

    run(work())


def test_webhook_is_told_with_a_signature_again_and_again_until_it_listens(
    song: Path, tmp_path: Path
) -> None:
    messages: list[tuple[dict[str, str], bytes]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        told = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(told["content-length"]))
        messages.append((told, body))
        status = "200 OK" if len(messages) > 1 else "500 Broken"
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        await writer.drain()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        allowed = {"webhook_hosts": (f"127.0.0.1:{port}",), "webhook_secret": SECRET}
        async with running(tmp_path, **allowed) as jobs:
            for url in (f"http://localhost:{port}/", "http://127.0.0.1/", "file:///etc/passwd"):
                with pytest.raises(InvalidOption):
                    await jobs.submit(song, QUICK, webhook_url=url)
            url = f"http://127.0.0.1:{port}/done"
            job = await jobs.submit(song, QUICK, webhook_url=url)

            async def was_told() -> bool:
                return len(messages) == 2

            await until(was_told)
            job = await jobs.get(job.id)
            for headers, body in messages:
                assert json.loads(body) == {"job": job.id, "state": "done", "at_s": job.ended_s}
                seconds, mac = (
                    part.split("=")[1] for part in headers["x-philharmonics-signature"].split(",")
                )
                signed = f"{seconds}.".encode() + body
                assert mac == hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
                assert abs(int(seconds) - time.time()) < DEADLINE_S
        server.close()

    run(work())


def test_header_and_stretches_are_the_file() -> None:
    samples = np.random.default_rng(2).uniform(-1.2, 1.2, (2, 10_001)).astype(np.float32)
    stretches = [
        encode(Audio(samples[:, a : a + 999], 44_100), "wav16")[HEADER_BYTES:]
        for a in range(0, 10_001, 999)
    ]
    assert wav_header(10_001) + b"".join(stretches) == encode(Audio(samples, 44_100), "wav16")
