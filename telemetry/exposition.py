"""Every process's metrics -> Prometheus' text.

A server's processes (the composer, the runners beside it) write what they count into files of one
folder, which `bentoml serve` makes and names; whoever is asked for `/metrics` adds them up. The
endpoint of BentoML comes with series for every path that was ever asked for, so it is off, and
this is served instead.
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

MEDIA_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Bounds of the buckets of a window's times; three to a decade: a quantile is right within 2x."""

LONG_SECONDS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 1000.0)
"""Of a request's or a job's."""

FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemax", "gauge_mostrecent")
"""Of prometheus_client, a file for each kind of metric that we have."""

FILE_BYTES = 512 << 10
"""A hundred routes' histograms take a little over half of it (`tests/test_processes.py`)."""


def keep_room() -> None:
    """Have room on the disk for whatever this process will count.

    The files of its metrics are mapped into memory, and have holes: a page that the disk has no
    room for when it is first written to ends the process (SIGBUS).

    Raises:
        OSError: there is none now.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return
    for kind in FILES:
        with Path(folder, f"{kind}_{os.getpid()}.db").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)


keep_room()  # now: a file that is there is taken as it is, and metrics count as modules are loaded


def metrics() -> bytes:
    """The text, of all processes of this server."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
