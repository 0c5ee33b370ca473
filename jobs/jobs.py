"""Jobs: submitted once, carried out once, whatever crashes meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from jobs.job import ArtifactInfo, Job, JobEvent, JobPage, State
from remix.composer import Composer
from remix.options import RemixOptions
from remix.settings import Settings


class Artifact(Protocol):
    """A finished file of a job, to be read in parts."""

    info: ArtifactInfo

    def read(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Its bytes from `start` up to, and without, `stop`, in pieces."""
        ...


class Jobs:
    """All that can be done with jobs, for every transport.

    Every call that names a job raises `NotFound` where there is none of that id and owner; whose
    it is else, is nobody's business.

    Args:
        settings: where rows and files go, how many run and wait, how long they are kept.
        composer: does the work.
    """

    def __init__(self, settings: Settings, composer: Composer) -> None: ...

    async def start(self) -> None:
        """Open the database, take up what a dead composer left, and begin to work."""

    async def stop(self, drain_s: float) -> None:
        """Take nothing new, let what runs end within `drain_s`, and leave the rest to others.

        What had not ended goes on from its last checkpoint where a composer is started next.
        """

    async def submit(
        self,
        song: Path,
        options: RemixOptions,
        owner: str = "",
        job_id: str | None = None,
        webhook_url: str | None = None,
    ) -> Job:
        """Note a job durably; it is carried out when its turn comes.

        Args:
            song: is copied before this returns.
            options: of the remix.
            owner: whose job it is.
            job_id: the caller's own id (1 to 64 letters, digits, dots, underscores, hyphens); the
                same request with it again answers with the same job.
            webhook_url: is told when the job has ended.

        Raises:
            Conflict: the owner has a job of this id for another song, or with other options.
            InvalidOption: the id or the webhook's address is not one that is taken.
            NotFound: a voice or model that the options name.
            QueueFull: as many jobs wait as may.
            RunnerUnavailable: the service is stopping.
        """
        raise NotImplementedError

    async def get(self, job_id: str, owner: str = "") -> Job:
        """A job as it is now."""
        raise NotImplementedError

    async def list(
        self,
        owner: str = "",
        state: State | None = None,
        page_token: str | None = None,
        page_size: int = 50,
    ) -> JobPage:
        """The owner's jobs, the newest first.

        Raises:
            InvalidOption: the token is none that a page gave.
        """
        raise NotImplementedError

    async def cancel(self, job_id: str, owner: str = "") -> Job:
        """End a job; one that has ended stays as it is.

        Its compute ends within one window, wherever it runs, and what it had made is deleted.
        """
        raise NotImplementedError

    def events(
        self, job_id: str, owner: str = "", after_event: int = 0
    ) -> AsyncIterator[JobEvent | None]:
        """What has happened and happens to a job, from the event after `after_event` to the last.

        None comes between where nothing happened for some seconds, so that a transport can say
        that the connection lives.
        """
        raise NotImplementedError

    async def artifact(self, job_id: str, owner: str, name: str) -> Artifact:
        """A file of a job that is done.

        Raises:
            NotFound: no such job, or it has no such file (yet).
        """
        raise NotImplementedError

    def audio(self, job_id: str, owner: str = "", start: int = 0) -> AsyncIterator[bytes]:
        """The bytes of `remix.wav` from `start` on, each part as soon as it is final.

        All parts together are the file, header and all, also where the job was interrupted and
        resumed meanwhile. Ends with the file.

        Raises:
            Cancelled: the job was cancelled meanwhile.
            RemixError: the job's own error, where it fails.
        """
        raise NotImplementedError
