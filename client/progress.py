"""Progress of the stages: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from client.api import OnProgress

PLAIN_STEP = 0.25
"""Of a stage's work between two plain lines: a log wants to know that it goes on, no more."""


@contextmanager
def show_progress(stream: TextIO) -> Iterator[OnProgress]:
    """A function to be told stage and fraction; what it is told is shown on `stream`."""
    if stream.isatty():
        yield from _bars(stream)
    else:
        yield _lines(stream)


def _bars(stream: TextIO) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=stream)) as progress:

        def note(stage: str, fraction: float) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage.replace("_", " "), total=1.0)
            progress.update(bars[stage], completed=fraction)

        yield note


def _lines(stream: TextIO) -> OnProgress:
    said: dict[str, float] = {}
    lock = threading.Lock()

    def note(stage: str, fraction: float) -> None:
        with lock:
            due = fraction >= 1.0 or fraction >= said.get(stage, -1.0) + PLAIN_STEP
            if not due or said.get(stage) == fraction:
                return
            said[stage] = fraction
            print(f"{stage.replace('_', ' ')}: {fraction:.0%}", file=stream, flush=True)

    return note
