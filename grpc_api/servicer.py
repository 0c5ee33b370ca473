"""The calls of `remix.v1.RemixService`.

Every method writes its answers itself (`context.write`): a generator that is abandoned ends some
time later, and would hold its slot until then.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import IO, Any, TypeVar

from grpc_api import calls
from grpc_api.answering import Inside, answering, watching
from grpc_api.convert import (
    event_message,
    file_message,
    job_message,
    model_messages,
    options_of,
    progress_message,
    state_of,
    voice_messages,
)
from grpc_api.guard import caller
from grpc_api.uploads import read_upload
from jobs.desk import Desk
from jobs.job import ArtifactInfo
from remix.errors import InvalidOption
from remix.options import RemixOptions
from remix.result_files import media_type_of
from remix.stages import Progress, Stage
from remix_v1 import remix_pb2 as messages
from remix_v1 import remix_pb2_grpc as protocol

Result = TypeVar("Result")

CHUNK_BYTES = 1 << 18
"""Of a file in a message, far below the 4 MB that every client takes."""

DEFAULT_PAGE_SIZE = 50


class RemixServicer(protocol.RemixServiceServicer):
    """Answers by the same plain methods as HTTP.

    Args:
        desk: the composer, the jobs, the slots.
        max_upload_bytes: of one file.
        inside: the calls that are being answered.
    """

    def __init__(self, desk: Desk, max_upload_bytes: int, inside: Inside) -> None:
        self.inside = inside
        self._desk = desk
        self._max_upload_bytes = max_upload_bytes

    @answering
    async def SubmitRemix(self, requests: Any, context: Any) -> messages.Job:
        """Song -> job."""
        async with read_upload(requests, self._desk, self._max_upload_bytes) as upload:
            head = upload.head
            job = await self._desk.jobs.submit(
                upload.path,
                options_of(RemixOptions, head.options),
                caller().owner,
                head.job_id or None,
                head.webhook_url or None,
            )
        return job_message(job)

    @answering
    async def GetJob(self, request: messages.GetJobRequest, context: Any) -> messages.Job:
        """A job as it is now."""
        return job_message(await self._desk.jobs.get(request.job_id, caller().owner))

    @answering
    async def ListJobs(
        self, request: messages.ListJobsRequest, context: Any
    ) -> messages.ListJobsResponse:
        """The caller's jobs, by pages."""
        page = await self._desk.jobs.list(
            caller().owner,
            state_of(request.state),
            request.page_token or None,
            request.page_size or DEFAULT_PAGE_SIZE,
        )
        return messages.ListJobsResponse(
            jobs=[job_message(job) for job in page.jobs],
            next_page_token=page.next_page_token or "",
        )

    @watching
    async def WatchJob(self, request: messages.WatchJobRequest, context: Any) -> None:
        """Events until the last one."""
        events = self._desk.jobs.events(request.job_id, caller().owner, request.after_event)
        async with aclosing(events):
            async for event in events:
                if event is not None:
                    await context.write(event_message(event))

    @watching
    async def StreamAudio(self, request: messages.StreamAudioRequest, context: Any) -> None:
        """The remix's file, as it comes to be."""
        start = _offset(request.offset)
        audio = self._desk.jobs.audio(request.job_id, caller().owner, start)
        async with aclosing(audio):
            async for part in audio:
                for chunk in _cut(part):
                    await context.write(messages.AudioChunk(chunk=chunk))

    @answering
    async def GetArtifact(self, request: messages.GetArtifactRequest, context: Any) -> None:
        """A file of a job that is done."""
        start = _offset(request.offset)
        artifact = await self._desk.jobs.artifact(request.job_id, caller().owner, request.name)
        await context.write(messages.FilePart(file=file_message(artifact.info)))
        content = artifact.read(start)
        async with aclosing(content):
            async for part in content:
                for chunk in _cut(part):
                    await context.write(messages.FilePart(chunk=chunk))

    @answering
    async def CancelJob(self, request: messages.CancelJobRequest, context: Any) -> messages.Job:
        """End a job."""
        return job_message(await self._desk.jobs.cancel(request.job_id, caller().owner))

    @answering
    async def Remix(self, requests: Any, context: Any) -> None:
        """Song -> remix."""
        await self._work(calls.remix, requests, context, is_whole_flow=True)

    @answering
    async def Separate(self, requests: Any, context: Any) -> None:
        """Song -> stems."""
        await self._work(calls.separate, requests, context)

    @answering
    async def Transcribe(self, requests: Any, context: Any) -> None:
        """Song -> notes."""
        await self._work(calls.transcribe, requests, context)

    @answering
    async def Generate(self, requests: Any, context: Any) -> None:
        """Notes -> new music."""
        await self._work(calls.generate, requests, context)

    @answering
    async def Convert(self, requests: Any, context: Any) -> None:
        """Vocal -> the same by another voice."""
        await self._work(calls.convert, requests, context)

    @answering
    async def Synthesize(self, requests: Any, context: Any) -> None:
        """Notes -> their sound."""
        await self._work(calls.synthesize, requests, context)

    @answering
    async def ListVoices(
        self, request: messages.ListVoicesRequest, context: Any
    ) -> messages.ListVoicesResponse:
        """Who can sing."""
        return messages.ListVoicesResponse(voices=voice_messages(self._desk.composer))

    @answering
    async def ListModels(
        self, request: messages.ListModelsRequest, context: Any
    ) -> messages.ListModelsResponse:
        """Which models there are."""
        return messages.ListModelsResponse(models=model_messages(self._desk.composer))

    async def _work(
        self, work: calls.Work, requests: Any, context: Any, is_whole_flow: bool = False
    ) -> None:
        """A file in, progress out, files out; the call's end, however it comes, ends the work."""
        with self._desk.slots[is_whole_flow].hold():
            pass  # refuse before the upload what would be refused after it
        with tempfile.TemporaryFile() as results:
            async with (
                read_upload(requests, self._desk, self._max_upload_bytes) as upload,
                # Not while it uploads: slow callers would keep the others out.
                self._desk.working(is_whole_flow),
            ):
                composer = self._desk.composer
                files = await _told(
                    lambda progress: work(composer, upload.path, upload.head, progress), context
                )
                infos = await asyncio.to_thread(_write, files, results)
            # From here on the caller holds disk, and neither memory nor a slot.
            for info in infos:
                await context.write(messages.WorkEvent(file=file_message(info)))
                async for chunk in _read(results, info.size_bytes):
                    await context.write(messages.WorkEvent(chunk=chunk))


async def _told(work: Callable[[Progress], Coroutine[Any, Any, Result]], context: Any) -> Result:
    """Do some work and tell its progress; however that ends, the work has ended after it."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[messages.Progress | None] = asyncio.Queue()

    def note(stage: Stage, fraction: float) -> None:
        loop.call_soon_threadsafe(events.put_nowait, progress_message(stage, fraction))

    task = asyncio.create_task(work(note))
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            await context.write(messages.WorkEvent(progress=event))
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _write(files: calls.Files, results: IO[bytes]) -> list[ArtifactInfo]:
    """Put files one after another; one at a time is in memory."""
    infos = []
    for name, content in files:
        results.write(content)
        infos.append(
            ArtifactInfo(
                name=name,
                media_type=media_type_of(name),
                size_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    results.seek(0)
    return infos


async def _read(results: IO[bytes], size_bytes: int) -> AsyncIterator[bytes]:
    """The next bytes, in chunks."""
    left = size_bytes
    while left:
        chunk = await asyncio.to_thread(results.read, min(CHUNK_BYTES, left))
        left -= len(chunk)
        yield chunk


def _cut(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def _offset(offset: int) -> int:
    if offset < 0:
        raise InvalidOption(
            f"offset is {offset}; it must be 0 or more.",
            value=offset,
            limit=0,
            remedy="Send how many bytes you have already.",
        )
    return offset
