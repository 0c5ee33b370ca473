"""songs -> remixes, over gRPC: `proto/remix/v1/remix.proto`, and what is generated from it."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
from google.protobuf.json_format import ParseDict

from load_tests.generator import OK, Answer, Work
from load_tests.http_targets import (
    CANCEL_S,
    CHUNK_BYTES,
    RECONNECT_S,
    parts_of_report,
)
from load_tests.songs import Song
from remix_v1 import remix_pb2 as messages
from remix_v1.remix_pb2_grpc import RemixServiceStub


def song_file(song: Song) -> Work:
    """The song itself: what is sent is cut from it."""
    return Work(song.duration_s, song.flac)


class GrpcTarget:
    """A job: its sound as it is made, then its events to their end, then its report.

    Args:
        channel: to the server, from `runner_target.open_channel`.
        options: of every remix, by the names of `RemixOptions`.
        key: an API key, where the server wants one.
    """

    def __init__(self, channel: grpc.aio.Channel, options: dict[str, int], key: str) -> None:
        self._service = RemixServiceStub(channel)
        self._options = ParseDict(options, messages.RemixOptions())
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    async def send(self, work: Work) -> Answer:
        """See `Target`; a job that nobody waits for any more is cancelled."""
        job_id = f"load-{secrets.token_hex(16)}"
        sent_s = asyncio.get_running_loop().time()
        try:
            await self._service.SubmitRemix(self._submission(job_id, work), metadata=self._metadata)
            return await self._follow(job_id, sent_s)
        except grpc.aio.AioRpcError as error:
            return Answer(error.code().name)
        except asyncio.CancelledError:
            with suppress(grpc.aio.AioRpcError):
                await self._service.CancelJob(
                    messages.CancelJobRequest(job_id=job_id),
                    metadata=self._metadata,
                    timeout=CANCEL_S,
                )
            raise

    async def _submission(
        self, job_id: str, work: Work
    ) -> AsyncIterator[messages.SubmitRemixRequest]:
        head = messages.SubmitRemixHead(options=self._options, job_id=job_id)
        yield messages.SubmitRemixRequest(head=head)
        for start in range(0, len(work.body), CHUNK_BYTES):
            yield messages.SubmitRemixRequest(chunk=work.body[start : start + CHUNK_BYTES])

    async def _follow(self, job_id: str, sent_s: float) -> Answer:
        """Until the job has ended: durable as it is, a lost connection is made anew."""
        first_s, state = None, messages.JOB_STATE_UNSPECIFIED
        while True:
            try:
                request = messages.StreamAudioRequest(job_id=job_id)
                async for _ in self._service.StreamAudio(request, metadata=self._metadata):
                    if first_s is None:
                        first_s = asyncio.get_running_loop().time() - sent_s
                watch = messages.WatchJobRequest(job_id=job_id)
                async for event in self._service.WatchJob(watch, metadata=self._metadata):
                    state = event.state or state
                if state != messages.JOB_STATE_DONE:
                    return Answer(messages.JobState.Name(state))
                return Answer(OK, first_s=first_s, parts=await self._report(job_id))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(RECONNECT_S)

    async def _report(self, job_id: str) -> dict[str, float]:
        request = messages.GetArtifactRequest(job_id=job_id, name="report.json")
        parts = self._service.GetArtifact(request, metadata=self._metadata)
        return parts_of_report(json.loads(b"".join([part.chunk async for part in parts])))
