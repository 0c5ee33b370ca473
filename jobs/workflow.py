"""The steps of a job, made durable by `dbos`: each is done once, whoever dies between them.

    make ── settle ── notify ── close

A job's workflow has the job's uid for its id, so there is one of it ever. It runs where the job was
claimed (`jobs.claims`): begun there, or, after its last composer's death, resumed there, which is
when dbos gives it a new owner and refuses what the old one would still record: a second fence,
behind ours. A step whose result is recorded is not run again.

What dbos is not asked for, and why. Its queue cannot tell whose turn it is (fair shares that age,
`jobs.schedule`): each composer has a queue of its own that only resumed jobs pass through. Its own
recovery goes by the names of executors, which two live composers must never share: ours goes by
leases. Its store would be pickle: here it is JSON.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from dbos import (
    DBOS,
    DBOSClient,
    DBOSConfig,
    DBOSPortableJSONSerializer,
    SetWorkflowID,
    StepOptions,
    error,
)

APPLICATION_VERSION = "1"
"""dbos resumes only workflows of its own version: raise this when the steps change."""

POLL_S = 0.5
"""How long a resumed job waits in the queue at most."""

NOTIFY_ATTEMPTS, NOTIFY_INTERVAL_S, NOTIFY_BACKOFF = 6, 2.0, 3.0
"""Of telling a webhook: over 2, 6, 18, 54, 162 s."""

THREADS = 16
"""Of the pool that dbos makes the loop's own: as many as Python's default on a dozen cores."""

Outcome = dict[str, Any]
"""What `make` comes to, as JSON has it."""

_log = logging.getLogger(__name__)


class Steps(Protocol):
    """What is done for a job; each step may be begun again after a crash, and does no harm then."""

    async def make(self, uid: str) -> Outcome:
        """Do the work."""
        ...

    async def settle(self, uid: str, outcome: Outcome) -> bool:
        """Let the job end so; whether somebody wants to be told."""
        ...

    async def notify(self, uid: str) -> None:
        """Tell whoever wants to know; fails if they did not take it."""
        ...

    async def close(self, uid: str) -> None:
        """Leave nothing to do."""
        ...

    def left(self, uid: str) -> None:
        """The workflow is over here, however it ended."""
        ...


class Workflows:
    """The workflows that run in this process; dbos knows only one of these in a process.

    Args:
        database_url: where dbos keeps its tables, beside ours.
        holder: name of this composer.
        steps: what is done.
    """

    def __init__(self, database_url: str, holder: str, steps: Steps) -> None:
        self._config: DBOSConfig = {
            "name": "philharmonics",
            "system_database_url": database_url,
            "executor_id": holder,
            "application_version": APPLICATION_VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "max_executor_threads": THREADS,
            "log_level": "ERROR",
        }
        self._queue = f"composer-{holder}"
        self._steps = steps
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Prepare the tables, and take what is begun here."""
        DBOS(config=self._config)
        DBOS.listen_queues([self._queue])
        self._carry_out = DBOS.workflow(name="carry_out", max_recovery_attempts=None)(
            self._workflow()
        )
        # It makes the tables, which may wait for a lock; the loop is told by the later calls.
        DBOS.launch()
        await DBOS.register_queue_async(self._queue, polling_interval_sec=POLL_S)

    def _workflow(self) -> Any:
        steps = self._steps
        patiently: StepOptions = {
            "name": "notify",
            "retries_allowed": True,
            "max_attempts": NOTIFY_ATTEMPTS,
            "interval_seconds": NOTIFY_INTERVAL_S,
            "backoff_rate": NOTIFY_BACKOFF,
        }

        async def carry_out(uid: str) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                outcome = await DBOS.run_step_async({"name": "make"}, steps.make, uid)
                if await DBOS.run_step_async({"name": "settle"}, steps.settle, uid, outcome):
                    try:
                        await DBOS.run_step_async(patiently, steps.notify, uid)
                    except error.DBOSMaxStepRetriesExceeded as failure:
                        _log.warning("Nobody took the news of job %s: %s", uid, failure)
                await DBOS.run_step_async({"name": "close"}, steps.close, uid)
            finally:
                self._tasks.discard(task)
                steps.left(uid)

        return carry_out

    async def begin(self, uid: str, is_first_attempt: bool) -> None:
        """Have the workflow of a job run here."""
        known = None if is_first_attempt else await DBOS.get_workflow_status_async(uid)
        if known is not None and known.status in ("PENDING", "ENQUEUED"):
            await DBOS.resume_workflow_async(uid, queue_name=self._queue)
            return
        # Unknown: its composer died before it began. Over, but not closed: it broke.
        if known is not None:
            await DBOS.delete_workflow_async(uid)
        with SetWorkflowID(uid):
            await DBOS.start_workflow_async(self._carry_out, uid)

    async def forget(self, uids: Sequence[str]) -> None:
        """Delete what is recorded of these."""
        await DBOS.delete_workflows_async(list(uids))

    async def stop(self) -> None:
        """End what runs, and record nothing of its end, so that it can be resumed elsewhere."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await DBOS.delete_queue_async(self._queue)
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True)


def forget_workflows(database_url: str, uids: Sequence[str]) -> None:
    """Delete what is recorded of these, where no composer runs in this process."""
    client = DBOSClient(system_database_url=database_url, serializer=DBOSPortableJSONSerializer())
    try:
        client.delete_workflows(list(uids))
    finally:
        client.destroy()
