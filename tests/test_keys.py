"""API keys: what is kept, who is let in, how often; over a real database."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.database import Database, open_database
from jobs.door import ANYBODY, Door, check_address
from jobs.keys import SCOPES, ApiKey, KeyStore, Scope, hash_of, id_in
from remix.errors import (
    Forbidden,
    InvalidOption,
    NotFound,
    QueueFull,
    StorageUnavailable,
    Unauthenticated,
)
from remix.settings import Settings
from tests.conftest import ROOT


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(open_database(f"sqlite:///{tmp_path / 'jobs.db'}"))
    yield found
    found.close()


class Clock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def with_open_door(
    database: Database, work: Callable[[Door, KeyStore, Clock], Awaitable[None]]
) -> None:
    async def run() -> None:
        clock, store = Clock(), KeyStore(database)
        door = Door(asks_for_keys=True, clock=clock)
        await door.open(store.list)
        try:
            await work(door, store, clock)
        finally:
            await door.close()

    asyncio.run(run())


def test_token_is_nowhere_in_the_database(database: Database, tmp_path: Path) -> None:
    token, key = asyncio.run(KeyStore(database).add("ann", ["remix"]))
    with database.engine.connect() as connection:
        rows = connection.execute(sa.text("select * from api_keys")).all()
    assert len(rows) == 1
    secret = token.rsplit("_", 1)[1]
    assert secret not in str(rows)
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("jobs.db*"))
    assert hash_of(token) in str(rows)
    assert id_in(token) == key.id


def test_tokens_have_256_random_bits_and_say_what_they_are(database: Database) -> None:
    async def make() -> list[str]:
        store = KeyStore(database)
        return [(await store.add("ann", ["remix"]))[0] for _ in range(50)]

    tokens = asyncio.run(make())
    assert all(token.startswith("phk_") for token in tokens)
    secrets = [bytes.fromhex(token.rsplit("_", 1)[1]) for token in tokens]
    assert {len(secret) for secret in secrets} == {32}
    assert len(set(secrets)) == 50
    # Each bit is set in about half of them: the chance that one of 256 is in none or in all of 50
    # is 256 * 2 / 2**50.
    bits = [int.from_bytes(secret) for secret in secrets]
    assert all(0 < sum(b >> i & 1 for b in bits) < 50 for i in range(256))


@pytest.mark.parametrize(
    ("name", "scopes", "rate", "jobs"),
    [
        ("", ["remix"], 1, 1),
        ("x" * 65, ["remix"], 1, 1),
        ("ann", [], 1, 1),
        ("ann", ["root"], 1, 1),
        ("ann", ["remix"], 0, 1),
        ("ann", ["remix"], 1, 10**7),
    ],
)
def test_key_of_a_wrong_kind_is_refused(
    database: Database, name: str, scopes: list[Scope], rate: int, jobs: int
) -> None:
    with pytest.raises(InvalidOption):
        asyncio.run(KeyStore(database).add(name, scopes, rate, jobs))
    assert asyncio.run(KeyStore(database).list()) == []


def test_key_that_is_not_there_cannot_be_revoked(database: Database) -> None:
    with pytest.raises(NotFound):
        asyncio.run(KeyStore(database).revoke("0" * 12))


def test_caller_is_who_the_key_says(database: Database) -> None:
    async def work(door: Door, store: KeyStore, clock: Clock) -> None:
        token, key = await store.add("ann", ["remix", "metrics"], jobs_at_once=3)
        # It was made after the door was opened: it is let in nonetheless, at once.
        caller = await door.admit(token, "remix")
        assert (caller.owner, caller.jobs_at_once) == (key.id, 3)
        assert caller.scopes == {"remix", "metrics"}
        assert await door.admit(token, None) == caller

    with_open_door(database, work)


def test_whoever_has_no_valid_key_is_not_let_in(database: Database) -> None:
    async def work(door: Door, store: KeyStore, clock: Clock) -> None:
        token, _ = await store.add("ann", SCOPES)
        other, _ = await store.add("eve", SCOPES)
        await door.admit(token, "admin")
        mixed = token.rsplit("_", 1)[0] + "_" + other.rsplit("_", 1)[1]
        last = "0" if token[-1] != "0" else "1"
        for wrong in [
            None, "", token[:-1], token + "0", token[:-1] + last, mixed, token.upper(),
            f" {token}", "phk_", "phk_é_" + "0" * 64, "\x00", "x" * 10_000,
        ]:  # fmt: skip
            with pytest.raises(Unauthenticated):
                await door.admit(wrong, None)

    with_open_door(database, work)


@pytest.mark.parametrize("held", SCOPES)
def test_no_scope_holds_another(database: Database, held: Scope) -> None:
    async def work(door: Door, store: KeyStore, clock: Clock) -> None:
        token, _ = await store.add("ann", [held])
        for needed in SCOPES:
            if needed == held:
                await door.admit(token, needed)
            else:
                with pytest.raises(Forbidden, match=needed):
                    await door.admit(token, needed)

    with_open_door(database, work)


def test_revoked_key_is_not_let_in_any_more(database: Database) -> None:
    async def work(door: Door, store: KeyStore, clock: Clock) -> None:
        token, key = await store.add("ann", ["remix"])
        stays, _ = await store.add("eve", ["remix"])
        await door.admit(token, "remix")
        assert (await store.revoke(key.id)).revoked_s is not None
        # A key that nobody knows has the keys read anew; else they are within a second.
        with pytest.raises(Unauthenticated):
            await door.admit("phk_" + "0" * 12 + "_" + "0" * 64, "remix")
        with pytest.raises(Unauthenticated):
            await door.admit(token, "remix")
        await door.admit(stays, "remix")
        assert [k.revoked_s is None for k in await store.list()] == [False, True]

    with_open_door(database, work)


def test_keys_that_cannot_be_read_stay_as_they_were() -> None:
    async def run() -> None:
        key = ApiKey("0" * 12, "ann", hash_of(token), ("remix",), 60, 4, 0.0)
        answers: list[list[ApiKey] | None] = [[key], None]

        async def read() -> list[ApiKey]:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                raise StorageUnavailable("The database is away.")
            return answer

        door = Door(asks_for_keys=True)
        await door.open(read)
        with pytest.raises(Unauthenticated):
            await door.admit("phk_" + "1" * 12 + "_" + "0" * 64, None)  # reads, in vain
        assert len(answers) == 1
        assert (await door.admit(token, "remix")).owner == key.id
        await door.close()

    token = "phk_" + "0" * 12 + "_" + "0" * 64
    asyncio.run(run())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60), st.integers(1, 30))
def test_no_minute_has_more_than_twice_the_rate_and_waiting_helps(
    pauses_s: list[float], rate: int
) -> None:
    """A bucket that is full and then refilled: at most one fill and one minute's refill."""

    async def run() -> None:
        clock = Clock()
        key = ApiKey("0" * 12, "ann", hash_of(token), ("remix",), rate, 4, 0.0)

        async def read() -> list[ApiKey]:
            return [key]

        door = Door(asks_for_keys=True, clock=clock)
        await door.open(read)
        let_in_s: list[float] = []
        for pause_s in pauses_s:
            clock.now_s += pause_s
            try:
                await door.admit(token, "remix")
            except QueueFull as error:
                assert error.retry_after_s is not None
                assert 0.0 < error.retry_after_s <= 60.0 / rate
                clock.now_s += error.retry_after_s + 1e-6
                await door.admit(token, "remix")
            let_in_s.append(clock.now_s)
        await door.close()
        for start_s in let_in_s:
            assert sum(start_s <= at_s < start_s + 60.0 for at_s in let_in_s) <= 2 * rate + 1

    token = "phk_" + "0" * 12 + "_" + "0" * 64
    asyncio.run(run())


def test_everybody_is_let_in_while_keys_are_off() -> None:
    async def run() -> None:
        door = Door(asks_for_keys=False)
        assert await door.admit(None, "admin") == ANYBODY
        assert await door.admit("phk_nonsense", "remix") == ANYBODY
        assert ANYBODY.owner == ""

    asyncio.run(run())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_address(host, Settings(Path(), Path()))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "studio.example"])
def test_any_other_address_needs_a_decision(host: str) -> None:
    with pytest.raises(SystemExit, match="PHILHARMONICS_KEYS"):
        check_address(host, Settings(Path(), Path()))
    check_address(host, Settings(Path(), Path(), keys="on"))
    check_address(host, Settings(Path(), Path(), keys="off"))


def test_keys_are_made_listed_and_revoked_without_a_server(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.keys", *arguments],
            cwd=ROOT,
            env={**os.environ, "PHILHARMONICS_DATA_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    made = run("add", "ann", "--scope", "admin", "--scope", "remix", "--rate", "7")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    key_id = id_in(token)
    assert key_id is not None
    listed = run("list").stdout
    assert f"{key_id}\tann\tremix admin\t7\t4\tvalid\n" in listed
    assert token not in listed
    assert run("revoke", key_id).returncode == 0
    assert "\trevoked\n" in run("list").stdout
    refused = run("revoke", "nobody")
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "nobody" in refused.stderr


def test_reader_waits_for_no_writer(database: Database) -> None:
    """What lets callers in, and refuses them, must answer while a job's rows are written."""
    asyncio.run(KeyStore(database).add("ann", ["remix"]))
    with database.engine.begin() as writer:  # holds SQLite's one lock until the block ends
        writer.execute(sa.text("update api_keys set name = 'eve'"))
        (key,) = asyncio.run(asyncio.wait_for(KeyStore(database).list(), 5.0))
        assert key.name == "ann"
    (key,) = asyncio.run(KeyStore(database).list())
    assert key.name == "eve"
