"""An ended job -> a signed message to whoever asked to be told, if the operator lets them be."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from jobs.job import Job
from remix.errors import InvalidOption, excerpt

TIMEOUT_S = 10.0

MAX_URL_CHARACTERS = 2_000


class Webhooks:
    """Tells hosts of ended jobs.

    The message is JSON: `job`, `state`, `at_s`. Its header `X-Philharmonics-Signature` is
    `t=SECONDS,v1=HEX`, the HMAC-SHA256 of `SECONDS.BODY` with the operator's secret; whoever checks
    it should refuse times that are long past.

    Args:
        hosts: that may be told, `host` or `host:port`; no other is ever connected to, and no
            redirection followed.
        secret: signs; without one nobody is told.
    """

    def __init__(self, hosts: Sequence[str], secret: str) -> None:
        self._hosts = frozenset(hosts) if secret else frozenset()
        self._secret = secret.encode()

    def check(self, url: str) -> None:
        """Refuse an address that will not be told.

        Raises:
            InvalidOption: it is none, or its host is not allowed.
        """
        try:
            parts = urlsplit(url)
            names = {parts.hostname, f"{parts.hostname}:{parts.port}"}
        except ValueError:
            names = set()
        if not (
            len(url) <= MAX_URL_CHARACTERS
            and url.isprintable()
            and names & self._hosts
            and parts.scheme in ("http", "https")
            and parts.username is None
        ):
            raise InvalidOption(
                f"The webhook {excerpt(url)!r} is not at an allowed host; there are "
                f"{len(self._hosts)} that are.",
                value=excerpt(url),
                limit="http(s)://HOST/… of a host that the operator allows",
                remedy="Ask the operator to allow it, or watch the job's events.",
            )

    async def tell(self, url: str, job: Job) -> None:
        """Tell of a job.

        Raises:
            httpx.HTTPError: nobody took it.
        """
        body = json.dumps({"job": job.id, "state": job.state, "at_s": job.ended_s}).encode()
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            answer = await client.post(
                url,
                content=body,
                headers={
                    "Content-Type": "application/json",
                    "X-Philharmonics-Signature": sign(body, self._secret, int(time.time())),
                },
            )
        answer.raise_for_status()


def sign(body: bytes, secret: bytes, at_s: int) -> str:
    """The signature of a message.

    >>> sign(b"{}", b"secret", 1)[:11]
    't=1,v1=1122'
    """
    digest = hmac.new(secret, f"{at_s}.".encode() + body, hashlib.sha256)
    return f"t={at_s},v1={digest.hexdigest()}"
