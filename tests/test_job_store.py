"""Rows of jobs: the fence, leases, whose turn it is; on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.claims import Claim, Claims, LostClaim
from jobs.database import Database, open_database
from jobs.job import ArtifactInfo, JobFailure
from jobs.rows import Request, StoredArtifact
from jobs.store import Store
from remix.errors import Conflict, NotFound, QueueFull, StorageUnavailable
from remix.options import RemixOptions
from tests.postgres import postgres

FILES = (StoredArtifact(ArtifactInfo("remix.wav", "audio/wav", 4, "ab"), "u/1/remix.wav"),)


class Whole(Claims, Store):
    """All that a composer does with rows, for its callers and for itself."""


MakeStore = Callable[..., Whole]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as running:
        yield running.url


@pytest.fixture(params=["sqlite", "postgresql"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Stores of several composers on one database."""
    url = f"sqlite:///{tmp_path}/jobs.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("server")
    database = Database(open_database(url))

    def make(
        holder: str, lease_s: float = 60.0, retention_s: float = 3600.0, version: str = "v1"
    ) -> Whole:
        return Whole(database, holder, lease_s, retention_s, version)

    yield make
    uids = asyncio.run(_all(make("cleaner")))
    asyncio.run(make("cleaner").forget(uids))
    database.close()


async def _all(store: Whole) -> list[str]:
    return [row.uid for owner in ("ann", "eve") for row in await store.page(owner, None, None, 99)]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def uid(number: int) -> str:
    return f"{number:032x}"


def request(job_id: str, owner: str = "ann", **others: Any) -> Request:
    asked = Request(owner, job_id, "r", "same", RemixOptions(), "", 60.0, 10.0)
    return replace(asked, **others)


async def submit(store: Whole, number: int, **others: Any) -> None:
    await store.submit(uid(number), request(f"job-{number}", **others), 99)


async def begun(store: Whole) -> Claim:
    claim = await store.begin_next()
    assert claim is not None
    return claim


def test_same_request_again_is_the_same_job_and_another_conflicts(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        first, was_new = await store.submit(uid(1), request("x"), 99)
        again, is_new = await store.submit(uid(2), request("x"), 99)
        assert (was_new, is_new) == (True, False)
        assert first == again
        with pytest.raises(Conflict):
            await store.submit(uid(3), request("x", request="another song"), 99)
        # The same id is another owner's business altogether.
        other, is_new = await store.submit(uid(4), request("x", owner="eve", request="other"), 99)
        assert is_new
        assert (await store.get("eve", "x")).uid == other.uid
        with pytest.raises(NotFound):
            await store.get("eve", "y")

    run(work())


def test_same_id_at_the_same_moment_is_one_job(make_store: MakeStore) -> None:
    async def work() -> None:
        stores = [make_store(f"composer-{n}") for n in range(8)]
        found = await asyncio.gather(
            *(store.submit(uid(n), request("x"), 99) for n, store in enumerate(stores))
        )
        assert sum(is_new for _, is_new in found) == 1
        assert len({row.uid for row, _ in found}) == 1

    run(work())


def test_more_than_may_wait_are_refused(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        for number in range(3):
            await store.submit(uid(number), request(f"{number}"), 3)
        with pytest.raises(QueueFull):
            await store.submit(uid(9), request("9"), 3)
        assert not (await store.submit(uid(8), request("1"), 3))[1]  # known: not refused
        await begun(store)
        assert (await store.submit(uid(9), request("9"), 3))[1]

    run(work())


def test_each_waiting_job_is_begun_by_one_composer(make_store: MakeStore) -> None:
    async def work() -> None:
        stores = [make_store(f"composer-{n}") for n in range(4)]
        for number in range(12):
            await submit(stores[0], number)
        claims = await asyncio.gather(*(s.begin_next() for s in stores for _ in range(6)))
        # Two that choose the same job at once: one gets it, the other none for now.
        while claim := await stores[0].begin_next():
            claims.append(claim)
        taken = [claim.uid for claim in claims if claim is not None]
        assert sorted(taken) == [uid(n) for n in range(12)]

    run(work())


def test_owners_take_turns(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        for number in range(4):
            await submit(store, number, owner="ann")
        await submit(store, 8, owner="eve")
        load, started = await store.outlook()
        assert load.queue(started)[:2] == [uid(0), uid(8)]
        assert (await begun(store)).uid == uid(0)
        assert (await begun(store)).uid == uid(8)  # not behind all of ann's
        load, started = await store.outlook()
        assert load.queue(started) == [uid(1), uid(2), uid(3)]
        assert sorted(job.owner for job in load.running) == ["ann", "eve"]

    run(work())


def test_zombie_cannot_write(make_store: MakeStore) -> None:
    async def work() -> None:
        dead, heir = make_store("dead", lease_s=0.0), make_store("heir")
        await submit(dead, 1)
        old = await begun(dead)
        await dead.progress(old, {"separate_stems": 0.5})
        await asyncio.sleep(0.01)
        assert await heir.abandoned() == [uid(1)]
        new = await heir.take_over(uid(1))
        assert new is not None
        assert new.attempt == old.attempt + 1
        # It comes back, knows of nothing, and goes on.
        for late in (
            dead.progress(old, {"separate_stems": 1.0}),
            dead.play(old, 0, 44),
            dead.settle(old, FILES, 1.0, 3.0),
            dead.close(old, 3.0),
            dead.release(old),
            dead.row(old),
        ):
            with pytest.raises(LostClaim):
                await late
        assert await dead.renew([old]) == set()
        row = await heir.row(new)
        assert (row.job.state, row.job.progress) == ("running", {"separate_stems": 0.5})
        await heir.settle(new, FILES, 1.0, 3.0)
        with pytest.raises(LostClaim):
            await dead.settle(old, JobFailure("RemixError", "late"), 1.0, 3.0)
        assert (await heir.get("ann", "job-1")).job.state == "done"

    run(work())


def test_renewed_lease_is_not_taken_over(make_store: MakeStore) -> None:
    async def work() -> None:
        alive, other = make_store("alive"), make_store("other")
        await submit(alive, 1)
        claim = await begun(alive)
        assert await other.abandoned() == []
        assert await other.take_over(uid(1)) is None
        assert await alive.renew([claim]) == {claim}
        await alive.release(claim)
        assert await other.abandoned() == [uid(1)]
        assert await alive.renew([claim]) == {claim}  # nobody took it: still its own
        assert await other.abandoned() == []

    run(work())


def test_job_ends_on_the_version_that_began_it(make_store: MakeStore) -> None:
    async def work() -> None:
        old, peer, new = make_store("old"), make_store("peer"), make_store("new", version="v2")
        await submit(old, 1)
        await old.release(await begun(old))
        assert await new.abandoned() == []
        assert await new.take_over(uid(1)) is None
        assert await peer.abandoned() == [uid(1)]
        assert await peer.take_over(uid(1)) is not None

    run(work())


def test_job_that_nobody_began_is_any_versions(make_store: MakeStore) -> None:
    async def work() -> None:
        old, new = make_store("old"), make_store("new", version="v2")
        await submit(old, 1)
        claim = await begun(new)
        await new.release(claim)
        assert await old.abandoned() == []

    run(work())


def test_job_of_a_version_that_is_gone_goes_on_with_another(make_store: MakeStore) -> None:
    async def work() -> None:
        old, new = make_store("old"), make_store("new", version="v2")
        await submit(old, 1)
        await submit(old, 2)
        await begun(old)
        second = await begun(old)
        await old.void_leases()  # as if both had ended long ago
        assert await old.renew([second]) == {second}  # it lives, and has no room for the first
        assert await new.abandoned() == []
        await old.release(second)
        assert await new.abandoned() == [uid(1)]  # the second was held just now
        assert await new.take_over(uid(1)) is not None
        assert await old.abandoned() == [uid(2)]

    run(work())


def test_cancelled_job_is_told_to_its_holder_and_settles_as_cancelled(
    make_store: MakeStore,
) -> None:
    async def work() -> None:
        store = make_store("a")
        await submit(store, 1)
        claim = await begun(store)
        assert (await store.cancel("ann", "job-1")).job.state == "cancelled"
        assert await store.renew([claim]) == set()
        with pytest.raises(LostClaim):
            await store.progress(claim, {"separate_stems": 1.0})
        await store.settle(claim, FILES, 1.0, 3.0)  # it was done at that very moment
        row = await store.get("ann", "job-1")
        assert (row.job.state, row.stored) == ("cancelled", ())
        await store.close(claim, 3.0)
        assert await store.abandoned() == []
        with pytest.raises(NotFound):
            await store.cancel("eve", "job-1")

    run(work())


def test_events_have_growing_numbers_and_end_once(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        await submit(store, 1)
        claim = await begun(store)
        await store.progress(claim, {"separate_stems": 0.5, "transcribe_notes": 0.1})
        await store.progress(claim, {"separate_stems": 0.4})  # behind: a resumed attempt
        await store.settle(claim, FILES, 1.0, 3.0)
        await store.settle(claim, FILES, 1.0, 3.0)  # once more, after a crash
        events = await store.events(uid(1), 0)
        assert [event.id for event in events] == [1, 2, 3, 4, 5]
        assert [event.state for event in events] == ["queued", "running", None, None, "done"]
        assert await store.events(uid(1), 3) == events[3:]
        assert [event.is_last for event in events] == [False] * 4 + [True]

    run(work())


def test_expired_jobs_are_forgotten_with_all_that_is_noted(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a", retention_s=0.0)
        for number in (1, 2):
            await submit(store, number)
        claim = await begun(store)
        await store.play(claim, 0, 44)
        await store.settle(claim, FILES, 1.0, 3.0)
        await asyncio.sleep(0.01)
        assert await store.expired() == []  # its workflow is not over
        await store.close(claim, 3.0)
        assert await store.expired() == [claim.uid]
        await store.forget([claim.uid])
        assert await store.events(claim.uid, 0) == []
        with pytest.raises(NotFound):
            await store.played(claim.uid, 0)
        assert await store.unknown([uid(1), uid(2)]) == {claim.uid}

    run(work())


def test_pages_hold_every_job_once(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        for number in range(7):
            await submit(store, number)
        seen, before = list[str](), None
        while rows := await store.page("ann", None, before, 3):
            seen += [row.uid for row in rows]
            before = rows[-1].uid
        assert seen == [uid(n) for n in reversed(range(7))]
        await begun(store)
        assert len(await store.page("ann", "queued", None, 9)) == 6

    run(work())


def test_job_that_was_done_answers_for_its_twin_only(make_store: MakeStore) -> None:
    async def work() -> None:
        store = make_store("a")
        await submit(store, 1)
        claim = await begun(store)
        await store.settle(claim, FILES, 1.0, 3.0)
        await submit(store, 2, owner="eve")
        await submit(store, 3, result="another")
        twin = await store.twin(await store.get("eve", "job-2"))
        assert twin is not None
        assert twin.stored == FILES
        assert await store.twin(await store.get("ann", "job-3")) is None

    run(work())


def test_database_that_is_away_is_said_to_be_and_comes_back() -> None:
    async def work() -> None:
        with postgres() as server:
            database = Database(open_database(server.url))
            store = Whole(database, "a", 60.0, 60.0)
            await submit(store, 1)
            server.stop()
            with pytest.raises(StorageUnavailable):
                await store.get("ann", "job-1")
            server.start()
            assert (await store.get("ann", "job-1")).uid == uid(1)
            database.close()

    run(work())
