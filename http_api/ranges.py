"""Range, If-Range, If-None-Match -> which bytes of a file to answer with (RFC 9110, section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers

from http_api.problems import Refusal

MAX_DIGITS = 18
"""Of a position: 10^18 bytes are more than any file."""

_RANGE = re.compile(rf"bytes=(\d{{0,{MAX_DIGITS}}})-(\d{{0,{MAX_DIGITS}}})")


@dataclass(frozen=True)
class Part:
    """Bytes from `start` up to, and without, `stop`; the whole file has status 200, a part 206."""

    status: int
    start: int
    stop: int


def choose_part(headers: Headers, size_bytes: int, etag: str) -> Part:
    """What a request for a file is answered with.

    A range in another unit, several ranges and a damaged one are no ranges, as the RFC has it: the
    whole file is the answer, and so it is where the caller's part is of another version.

    Raises:
        Refusal: 416, the range begins behind the end.

    >>> choose_part(Headers({"range": "bytes=-2"}), 10, '"a"')
    Part(status=206, start=8, stop=10)
    """
    whole = Part(200, 0, size_bytes)
    if headers.get("if-range", etag) != etag:
        return whole
    match = _RANGE.fullmatch(headers.get("range", "").strip().replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return whole
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return whole
    start = int(first) if first else max(0, size_bytes - int(last))
    stop = min(int(last) + 1, size_bytes) if first and last else size_bytes
    if start >= size_bytes:
        raise Refusal(
            416,
            f"The range begins at {start:,}; the file has {size_bytes:,} bytes.",
            value=start,
            limit=size_bytes - 1,
            remedy="Ask for bytes that are there.",
            headers={"Content-Range": f"bytes */{size_bytes}"},
        )
    return Part(206, start, stop)


def is_known(headers: Headers, etag: str) -> bool:
    """Whether the caller has this version already (If-None-Match)."""
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return etag in known or "*" in known
