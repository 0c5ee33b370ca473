"""API keys: who may ask for what, and how much of it; kept in the jobs' database.

    python -m jobs.keys add NAME --scope remix [--scope admin] [--rate 120] [--jobs 4]
    python -m jobs.keys list
    python -m jobs.keys revoke ID

These work on the server's own machine, without a server: so the first key comes to be. A key is
shown once, when it is made; what is kept is its SHA-256.

Why that is enough: a slow, salted hash (bcrypt, Argon2) makes up for passwords that can be guessed.
A key is 256 random bits. At 10^12 guesses a second the half of them takes 10^57 years, with any
hash, and a table of hashes made beforehand would have to hold them all.
Source: NIST SP 800-63B (2017), section 5.1.2.2: a look-up secret of 112 bits or more is hashed, and
only one of fewer is salted and stretched.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import click
import sqlalchemy as sa

from jobs.database import Database, metadata, open_database
from remix.errors import InvalidOption, NotFound, RemixError, excerpt
from remix.settings import read_settings

Scope = Literal["remix", "voices", "metrics", "admin"]
"""What a key is for: songs, their stages and jobs; making and deleting voices; `/metrics`; keys and
whatever has no other scope. None holds another."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "phk_"
"""So that people, and programs that look for leaked secrets, know a key when they see one."""

ID_BYTES, SECRET_BYTES = 6, 32

RATE_PER_MINUTE, JOBS_AT_ONCE = 120, 4
"""Quotas of a key that is made without others."""

MAX_NAME, MAX_QUOTA = 64, 1_000_000

LISTED = ("id", "name", "scopes", "rate", "jobs", "state")

Result = TypeVar("Result")


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key.

    Args:
        id: names it, in the key itself too; the owner of its jobs and voices.
        name: what people call it.
        sha256: of the whole key, hexadecimal.
        scopes: what it is for.
        rate_per_minute: requests.
        jobs_at_once: jobs that have not ended, and whole songs in requests that wait for them.
        created_s: seconds since 1970.
        revoked_s: since when it is valid no more; unset while it is.
    """

    id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    rate_per_minute: int
    jobs_at_once: int
    created_s: float
    revoked_s: float | None = None

    def is_that_of(self, token: str) -> bool:
        """Whether this is the key; how long that takes tells nothing of where they differ."""
        return hmac.compare_digest(self.sha256, hash_of(token)) and self.revoked_s is None


_TABLE = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(2 * ID_BYTES), primary_key=True),
    sa.Column("name", sa.String(MAX_NAME), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(64), nullable=False),
    sa.Column("rate_per_minute", sa.Integer, nullable=False),
    sa.Column("jobs_at_once", sa.Integer, nullable=False),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("revoked_s", sa.Double),
)


def hash_of(token: str) -> str:
    """SHA-256, hexadecimal.

    >>> hash_of("phk_")[:8]
    'bb1a5faf'
    """
    return hashlib.sha256(token.encode()).hexdigest()


def id_in(token: str) -> str | None:
    """Which key a token says it is; nothing where it does not look like one.

    >>> id_in("phk_0123456789ab_" + 64 * "f"), id_in("phk_0123456789ab"), id_in("Basic x")
    ('0123456789ab', None, None)
    """
    prefix, _, rest = token.partition("_")
    key_id, _, secret = rest.partition("_")
    is_one = (
        prefix + "_" == PREFIX and len(key_id) == 2 * ID_BYTES and len(secret) == 2 * SECRET_BYTES
    )
    return key_id if is_one else None


class KeyStore:
    """The keys in a database.

    Every call raises `StorageUnavailable` where the database does not answer.

    Args:
        database: that of the jobs.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self,
        name: str,
        scopes: Iterable[Scope],
        rate_per_minute: int = RATE_PER_MINUTE,
        jobs_at_once: int = JOBS_AT_ONCE,
    ) -> tuple[str, ApiKey]:
        """A new key: the token, which is nowhere else, and what is kept of it.

        Raises:
            InvalidOption: a name, scope or quota that is none.
        """
        given = set(scopes)
        _check("name", name, f"1 to {MAX_NAME} characters", 0 < len(name) <= MAX_NAME)
        _check("scopes", sorted(given), list(SCOPES), bool(given) and given <= set(SCOPES))
        for quota, value in (("rate_per_minute", rate_per_minute), ("jobs_at_once", jobs_at_once)):
            _check(quota, value, [1, MAX_QUOTA], 1 <= value <= MAX_QUOTA)
        key_id = secrets.token_hex(ID_BYTES)
        token = f"{PREFIX}{key_id}_{secrets.token_hex(SECRET_BYTES)}"
        key = ApiKey(
            id=key_id,
            name=name,
            sha256=hash_of(token),
            scopes=tuple(scope for scope in SCOPES if scope in given),
            rate_per_minute=rate_per_minute,
            jobs_at_once=jobs_at_once,
            created_s=time.time(),
        )

        def insert_once(connection: sa.Connection) -> None:
            if _find(connection, key_id) is None:
                row = {**vars(key), "scopes": " ".join(key.scopes)}
                connection.execute(sa.insert(_TABLE).values(row))

        await self._database.call(insert_once)
        return token, key

    async def list(self) -> list[ApiKey]:
        """Every key, those that were revoked too, the oldest first."""
        every = sa.select(_TABLE).order_by(_TABLE.c.created_s, _TABLE.c.id)
        rows = await self._database.read(lambda connection: connection.execute(every).all())
        return [_key(row) for row in rows]

    async def revoke(self, key_id: str) -> ApiKey:
        """Make a key invalid, for good; one that is invalid stays as it is.

        Raises:
            NotFound: there is none of this id.
        """
        change = sa.update(_TABLE).where(_TABLE.c.id == key_id, _TABLE.c.revoked_s.is_(None))

        def revoke(connection: sa.Connection) -> ApiKey | None:
            connection.execute(change.values(revoked_s=time.time()))
            return _find(connection, key_id)

        key = await self._database.call(revoke)
        if key is None:
            raise NotFound(
                f"There is no API key {excerpt(key_id)!r}.",
                value=excerpt(key_id),
                limit="the id of a key",
                remedy="List the keys: each has its id.",
            )
        return key


def _find(connection: sa.Connection, key_id: str) -> ApiKey | None:
    row = connection.execute(sa.select(_TABLE).where(_TABLE.c.id == key_id)).first()
    return None if row is None else _key(row)


def _key(row: sa.Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    return ApiKey(**{**values, "scopes": tuple(values["scopes"].split())})


def _check(name: str, value: object, limit: object, is_right: bool) -> None:
    if not is_right:
        raise InvalidOption(
            f"{name} is {value!r}; it must be of {limit}.",
            value=value,
            limit=limit,
            remedy="Send one that is.",
        )


@click.group()
def main() -> None:
    """API keys, in the database that PHILHARMONICS_DATABASE names; no server is needed."""


@main.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES))
@click.option("--rate", default=RATE_PER_MINUTE, show_default=True, help="Requests a minute.")
@click.option("--jobs", default=JOBS_AT_ONCE, show_default=True, help="Jobs at once.")
def add(name: str, scopes: tuple[Scope, ...], rate: int, jobs: int) -> None:
    """Make a key called NAME and print it: it is shown this once."""
    token, _ = _run(lambda store: store.add(name, scopes, rate, jobs))
    click.echo(token)


@main.command("list")
def list_() -> None:
    """List the keys, the oldest first."""
    click.echo("\t".join(LISTED))
    for key in _run(lambda store: store.list()):
        state = "valid" if key.revoked_s is None else "revoked"
        quotas = (str(key.rate_per_minute), str(key.jobs_at_once))
        click.echo("\t".join([key.id, key.name, " ".join(key.scopes), *quotas, state]))


@main.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """Make the key ID invalid, for good."""
    click.echo(f"{_run(lambda store: store.revoke(key_id)).id} is revoked.")


def _run(work: Callable[[KeyStore], Coroutine[Any, Any, Result]]) -> Result:
    database = Database(open_database(read_settings().database_url))
    try:
        return asyncio.run(work(KeyStore(database)))
    except RemixError as error:
        raise click.ClickException(str(error)) from error
    finally:
        database.close()


if __name__ == "__main__":
    main()
