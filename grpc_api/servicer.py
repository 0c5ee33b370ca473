"""The calls of `remix.v1.RemixService`.

Every method writes its answers itself (`context.write`): a generator that is abandoned ends some
time later, and would hold its slot until then.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
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
    quote_message,
    state_of,
    voice_messages,
)
from grpc_api.guard import caller
from grpc_api.uploads import read_file, read_head
from jobs.desk import Desk
from jobs.job import ArtifactInfo
from remix.errors import InvalidOption, excerpt
from remix.options import RemixOptions
from remix.result_files import media_type_of
from remix.stages import STAGES, Progress, Stage
from remix_v1 import remix_pb2 as messages
from remix_v1 import remix_pb2_grpc as protocol

Result = TypeVar("Result")

CHUNK_BYTES = 1 << 18
"""Of a file in a message, far below the 4 MB that every client takes."""

PAGE_SIZE, MAX_PAGE_SIZE = 50, 200


class RemixServicer(protocol.RemixServiceServicer):  # type: ignore[misc]
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
        async with AsyncExitStack() as stack:
            async with self._desk.uploading():
                head = await read_head(requests)
                # Refuse before the song comes what would be refused after it.
                jobs = await stack.enter_async_context(
                    self._desk.submitting(caller(), head.job_id or None)
                )
                song = await stack.enter_async_context(read_file(requests, self._max_upload_bytes))
            job = await jobs.submit(
                song,
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
            _page_size(request.page_size),
        )
        return messages.ListJobsResponse(
            jobs=[job_message(job) for job in page.jobs],
            next_page_token=page.next_page_token or "",
        )

    @watching
    async def WatchJob(self, request: messages.WatchJobRequest, context: Any) -> None:
        """Events until the last one."""
        events = self._desk.jobs.events(request.job_id, caller().owner, request.after_event)
        async with _closing(events):
            async for event in events:
                if event is not None:
                    await context.write(event_message(event))

    @watching
    async def StreamAudio(self, request: messages.StreamAudioRequest, context: Any) -> None:
        """The remix's file, as it comes to be."""
        start = _offset(request.offset)
        audio = self._desk.jobs.audio(request.job_id, caller().owner, start)
        async with _closing(audio):
            async for part in audio:
                for chunk in _cut(part):
                    await context.write(messages.AudioChunk(chunk=chunk))

    @answering
    async def GetArtifact(self, request: messages.GetArtifactRequest, context: Any) -> None:
        """A file of a job that is done."""
        start = _offset(request.offset)
        artifact = await self._desk.jobs.artifact(request.job_id, caller().owner, request.name)
        if start > artifact.info.size_bytes:
            raise _wrong_offset(start, [0, artifact.info.size_bytes])
        await context.write(messages.FilePart(file=file_message(artifact.info)))
        content = artifact.read(start)
        async with _closing(content):
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
        await self._work(calls.remix, requests, context, *STAGES)

    @answering
    async def Separate(self, requests: Any, context: Any) -> None:
        """Song -> stems."""
        await self._work(calls.separate, requests, context, "separate_stems")

    @answering
    async def Transcribe(self, requests: Any, context: Any) -> None:
        """Song -> notes."""
        await self._work(calls.transcribe, requests, context, "transcribe_notes")

    @answering
    async def Generate(self, requests: Any, context: Any) -> None:
        """Notes -> new music."""
        await self._work(calls.generate, requests, context, "generate_notes")

    @answering
    async def Convert(self, requests: Any, context: Any) -> None:
        """Vocal -> the same by another voice."""
        await self._work(calls.convert, requests, context, "convert_voice")

    @answering
    async def Synthesize(self, requests: Any, context: Any) -> None:
        """Notes -> their sound."""
        await self._work(calls.synthesize, requests, context, "synthesize_audio")

    @answering
    async def Quote(self, request: messages.QuoteRequest, context: Any) -> messages.QuoteResponse:
        """What a song would cost."""
        return quote_message(await self._desk.quote(caller(), _positive(request.duration_s)))

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

    async def _work(self, work: calls.Work, requests: Any, context: Any, *stages: Stage) -> None:
        """A file in, progress out, files out; the call's end, however it comes, ends the work."""
        self._desk.check(stages)
        with tempfile.TemporaryFile() as results:
            async with AsyncExitStack() as stack:
                async with self._desk.uploading():
                    head = await read_head(requests)
                    path = await stack.enter_async_context(
                        read_file(requests, self._max_upload_bytes)
                    )
                # Not while it uploads: slow callers would keep the others out.
                async with self._desk.working(stages, caller()):
                    composer = self._desk.composer
                    files = await _told(
                        lambda progress: work(composer, path, head, progress), context
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


def _closing(items: AsyncIterator[Any]) -> aclosing[AsyncGenerator[Any, None]]:
    """Has a generator end when the call does, and not some time later."""
    assert isinstance(items, AsyncGenerator)
    return aclosing(items)


def _cut(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def _offset(offset: int) -> int:
    if offset < 0:
        raise _wrong_offset(offset, 0)
    return offset


def _wrong_offset(offset: int, limit: int | list[int]) -> InvalidOption:
    return InvalidOption(
        f"offset is {offset}; its limit is {limit}.",
        value=offset,
        limit=limit,
        remedy="Send how many bytes you have already.",
    )


def _page_size(size: int) -> int:
    """As https://google.aip.dev/158 has it: none is ours to choose, too large a one is cut."""
    if size < 0:
        raise InvalidOption(
            f"page_size is {size}; it must be 0 or more.",
            value=size,
            limit=0,
            remedy="Leave it out, or send how many jobs you want.",
        )
    return min(size or PAGE_SIZE, MAX_PAGE_SIZE)


def _positive(duration_s: float) -> float:
    if not 0.0 < duration_s < float("inf"):
        raise InvalidOption(
            f"duration_s is {duration_s:g}; it must be above 0.",
            value=excerpt(duration_s),
            limit=0,
            remedy="Send the song's length.",
        )
    return duration_s
