"""What a job is to whoever asked for it: frozen values, the same for every transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from remix.options import RemixOptions
from remix.stages import Stage

State = Literal["queued", "running", "done", "failed", "cancelled"]

STATES: tuple[State, ...] = get_args(State)

ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled"})
"""States that a job does not leave any more."""


@dataclass(frozen=True)
class ArtifactInfo:
    """A file that a job has made.

    Args:
        name: `remix.wav`, `stems/vocals.wav`, …
        media_type: of its content.
        size_bytes: of its content.
        sha256: of its content, hexadecimal; serves as its entity tag.
    """

    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: an error of `remix.errors`, as far as a caller may know.

    Args:
        type: the error's class name, a key of `remix.errors.BY_NAME`; `RemixError` itself for a
            failure that was none of them.
        detail: the error's text.
        value: what was found.
        limit: what would have been taken.
        remedy: what to do.
    """

    type: str
    detail: str
    value: object = None
    limit: object = None
    remedy: str | None = None


@dataclass(frozen=True)
class Job:
    """A remix that was asked for.

    Times are seconds since 1970.

    Args:
        id: the caller's, or one that was made up.
        owner: whose it is; empty while API keys are off.
        state: where it is.
        options: as they were understood.
        created_s: when it was submitted.
        started_s: when its first attempt began.
        ended_s: when it came to its last state.
        expires_s: when it and its files are deleted; unset until it has ended.
        progress: fraction done by stage, 0 to 1.
        position: how many jobs are before it while it is queued (0: it is the next).
        estimate_s: seconds until it is done, as far as can be told; unset if it cannot.
        attempt: how many times it was begun, a crash between; 0 while it waits for the first.
        error: why it failed.
        artifacts: its files, once it is done.
        trace_id: names it in logs and traces: its caller's, if the request had one.
    """

    id: str
    owner: str
    state: State
    options: RemixOptions
    created_s: float
    started_s: float | None = None
    ended_s: float | None = None
    expires_s: float | None = None
    progress: Mapping[Stage, float] = field(default_factory=dict)
    position: int | None = None
    estimate_s: float | None = None
    attempt: int = 0
    error: JobFailure | None = None
    artifacts: tuple[ArtifactInfo, ...] = ()
    trace_id: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job.

    Args:
        id: grows with every event of the job, from 1; what a watcher resumes after.
        at_s: seconds since 1970.
        state: the job's state from now on, in an event of that kind.
        stage: which stage has got on, in an event of the other kind.
        fraction: how far that stage is, 0 to 1.
    """

    id: int
    at_s: float
    state: State | None = None
    stage: Stage | None = None
    fraction: float | None = None

    @property
    def is_last(self) -> bool:
        """Whether no other event follows."""
        return self.state in ENDED


@dataclass(frozen=True)
class JobPage:
    """A part of a listing, the newest job first.

    Args:
        jobs: of this page.
        next_page_token: asks for the next page; unset on the last one.
    """

    jobs: tuple[Job, ...]
    next_page_token: str | None = None
