"""method, path -> the scope that a key needs: who may call which route.

Default deny: what has no row here, and every method that no row names, needs the scope `admin`.
So a route that somebody adds, here or in BentoML, is closed until it has a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from http_api.stage_routes import FORM_ROUTES
from jobs.keys import Scope

Need = Scope | Literal["any key", "nothing"]
"""What a request must have."""

READS = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Row:
    """Of a route and, where its path ends in a slash, of all below it.

    Args:
        reads: what GET and HEAD need.
        writes: what every other method needs.
    """

    reads: Need
    writes: Need


_SONGS = Row("remix", "remix")
_OPEN = Row("nothing", "admin")

ROWS: Mapping[str, Row] = {
    # Open, because an orchestrator asks without a key; they say nothing but yes or no.
    "/livez": _OPEN,
    "/readyz": _OPEN,
    "/healthz": _OPEN,
    # Open, because they tell how to use a key, and say nothing that the source code does not.
    "/": _OPEN,
    "/docs": _OPEN,
    "/openapi.json": _OPEN,
    "/static_content/": _OPEN,
    **{route.path: _SONGS for route in FORM_ROUTES},
    "/v1/jobs": _SONGS,
    "/v1/jobs/": _SONGS,
    "/v1/quote": _SONGS,
    "/v1/progress": _SONGS,
    "/v1/models": Row("any key", "admin"),
    "/v1/voices": Row("any key", "voices"),
    "/v1/voices/": Row("any key", "voices"),
    "/v1/keys": Row("admin", "admin"),
    "/v1/keys/": Row("admin", "admin"),
    "/metrics": Row("metrics", "admin"),
}


def need_of(method: str, path: str) -> Need:
    """What a request must have.

    >>> need_of("GET", "/livez"), need_of("POST", "/v1/jobs"), need_of("DELETE", "/v1/jobs/7")
    ('nothing', 'remix', 'remix')
    >>> need_of("POST", "/livez"), need_of("GET", "/v1/voices/../keys"), need_of("GET", "//docs")
    ('admin', 'any key', 'admin')
    """
    row = ROWS.get(path) or next(
        (
            row
            for prefix, row in ROWS.items()
            if prefix != "/" and prefix.endswith("/") and path.startswith(prefix)
        ),
        None,
    )
    if row is None:
        return "admin"
    return row.reads if method in READS else row.writes
