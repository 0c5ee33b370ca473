"""token, scope -> caller: who is let in, for every transport."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jobs.keys import SCOPES, ApiKey, Scope, id_in
from remix.errors import Forbidden, QueueFull, StorageUnavailable, Unauthenticated
from remix.settings import PREFIX, Settings

REFRESH_S = 1.0
"""How often the keys are read anew: so long a revoked key is still taken."""

NEW_KEY_S = 1.0
"""How long a key that is not known waits for the keys to be read anew: it may have been made just
now, at another server of the same database."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        owner: whose jobs and voices these are: the key's id; empty while keys are off.
        scopes: what the caller may do.
        jobs_at_once: jobs that have not ended, and songs in requests; None for no quota.
    """

    owner: str
    scopes: frozenset[Scope]
    jobs_at_once: int | None


ANYBODY = Caller("", frozenset(SCOPES), None)
"""Who asks while keys are off."""


def check_address(host: str, settings: Settings) -> None:
    """Refuse to start where strangers could come in without anybody having meant it.

    Ends the process with a line that says what to do.
    """
    if settings.keys or _is_loopback(host):
        return
    raise SystemExit(
        f"This service does not start on {host} as it is: it would do the work of anybody who "
        f"reaches that address. Make a key (`python -m jobs.keys add NAME --scope remix`) and set "
        f"{PREFIX}KEYS=on; or set {PREFIX}KEYS=off to let anybody in; or listen on 127.0.0.1."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Door:
    """Lets callers in by their keys, from memory: no request waits for the database.

    Rates are counted in this process: with two composers a key has twice its rate.

    Args:
        asks_for_keys: whether it does, or lets anybody in.
        clock: seconds, from anywhere.
    """

    def __init__(self, asks_for_keys: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.asks_for_keys = asks_for_keys
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._wanted = asyncio.Event()
        self._read = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def open(self, read_keys: Callable[[], Awaitable[Sequence[ApiKey]]]) -> None:
        """Read the keys, and go on reading them until closed.

        Args:
            read_keys: every key there is (`KeyStore.list`).

        Raises:
            StorageUnavailable: they cannot be read.
        """
        await self._read_once(read_keys)
        self._reader = asyncio.create_task(self._keep_reading(read_keys))

    async def close(self) -> None:
        """Read no more."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def admit(self, token: str | None, scope: Scope | None) -> Caller:
        """Who it is that asks with this token.

        Args:
            token: as it came; None where none came.
            scope: what the call needs; None where any key will do.

        Raises:
            Unauthenticated: no token, or none of a valid key.
            Forbidden: a key without this scope.
            QueueFull: more requests than the key's rate.
        """
        if not self.asks_for_keys:
            return ANYBODY
        key = await self._key_of(token)
        bucket = self._buckets.setdefault(key.id, _Bucket(key.rate_per_minute, self._clock()))
        wait_s = bucket.take(key.rate_per_minute, self._clock())
        if wait_s > 0.0:
            raise QueueFull(
                f"The API key has used up its {key.rate_per_minute} requests a minute.",
                value=f"more than {key.rate_per_minute} a minute",
                limit=key.rate_per_minute,
                remedy="Try again when Retry-After has passed, or use a key of a higher rate.",
                retry_after_s=wait_s,
            )
        if scope is not None and scope not in key.scopes:
            raise Forbidden(
                f"The API key has the scopes {', '.join(key.scopes)}; this needs {scope}.",
                value=list(key.scopes),
                limit=scope,
                remedy="Use a key with this scope.",
            )
        return Caller(key.id, frozenset(key.scopes), key.jobs_at_once)

    async def _key_of(self, token: str | None) -> ApiKey:
        key_id = id_in(token) if token is not None else None
        if key_id is not None and key_id not in self._keys:
            self._wanted.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._read.wait(), NEW_KEY_S)
        key = self._keys.get(key_id or "")
        if token is None or key is None or not key.is_that_of(token):
            found = "no API key" if token is None else "an API key that is not valid"
            raise Unauthenticated(
                f"The request has {found}; it must have one that is valid.",
                value=found,
                limit="a valid API key",
                remedy="Send the header Authorization: Bearer KEY.",
            )
        return key

    async def _keep_reading(self, read_keys: Callable[[], Awaitable[Sequence[ApiKey]]]) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), REFRESH_S)
            self._wanted.clear()
            # Who comes from here on waits for the next reading: this one may not see their key.
            read, self._read = self._read, asyncio.Event()
            try:
                await self._read_once(read_keys)
            except StorageUnavailable as error:
                _log.warning("The API keys stay those that were read last: %s", error)
            read.set()

    async def _read_once(self, read_keys: Callable[[], Awaitable[Sequence[ApiKey]]]) -> None:
        keys = await read_keys()
        self._keys = {key.id: key for key in keys if key.revoked_s is None}
        self._buckets = {id: bucket for id, bucket in self._buckets.items() if id in self._keys}


class _Bucket:
    """Holds one minute's requests at most, and is filled again evenly."""

    def __init__(self, full: float, now_s: float) -> None:
        self._left = full
        self._at_s = now_s

    def take(self, rate_per_minute: int, now_s: float) -> float:
        """Take one request out; or none, and how many seconds until there is one."""
        filled = (now_s - self._at_s) * rate_per_minute / 60.0
        self._left = min(float(rate_per_minute), self._left + filled)
        self._at_s = now_s
        if self._left < 1.0:
            return (1.0 - self._left) * 60.0 / rate_per_minute
        self._left -= 1.0
        return 0.0
