"""One attempt at a job: its song -> its files, told of while it is under way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Histogram

from jobs.claims import Claim, Claims
from jobs.files import Files
from jobs.identity import time_of
from jobs.job import ArtifactInfo
from jobs.rows import Row, StoredArtifact, played_path
from remix.audio import Audio, Samples
from remix.audio_codec import encode
from remix.composer import Composer
from remix.errors import StorageUnavailable
from remix.mix_tracks import SAMPLE_RATE_HZ
from remix.result_files import media_type_of, remix_files
from remix.stages import Stage
from telemetry.exposition import LONG_SECONDS

NOTE_S = 0.25
"""Progress and sound are noted at most so often: each time is a transaction."""

FIRST_AUDIO_SECONDS = Histogram(
    "philharmonics_first_audio_seconds",
    "Time from a job's submission to the first of its sound",
    buckets=LONG_SECONDS,
)

REPORT = "report.json"

HEADER_BYTES = 44
"""Of a plain WAV file: RIFF, fmt, data."""

CHANNELS, SAMPLE_BYTES = 2, 2

_log = logging.getLogger(__name__)


class Attempt:
    """Progress and sound of one attempt, on their way into the store.

    Args:
        claims: where they are noted.
        files: where the sound goes.
        claim: in whose name.
        length_samples: of the song.
        ring: is called when there is news.
    """

    def __init__(
        self,
        claims: Claims,
        files: Files,
        claim: Claim,
        length_samples: int,
        ring: Callable[[str], None],
    ) -> None:
        self._claims = claims
        self._files = files
        self._claim = claim
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._fractions: dict[Stage, float] = {}
        self._sound = [wav_header(length_samples)]
        self._played_bytes = 0
        self._has_ended = asyncio.Event()

    def progress(self, stage: Stage, fraction: float) -> None:
        """See `remix.stages.Progress`; from any thread."""
        self._loop.call_soon_threadsafe(self._fractions.__setitem__, stage, round(fraction, 4))

    def listen(self, stretch: Samples) -> None:
        """Take the next stretch of the mix, final: [2, t]."""
        self._sound.append(encode(Audio(stretch, SAMPLE_RATE_HZ), "wav16")[HEADER_BYTES:])

    def end(self) -> None:
        """Nothing more will come."""
        self._has_ended.set()

    async def tell(self) -> None:
        """Note what comes, until all of it is noted.

        Raises:
            LostClaim: the attempt counts no more.
            StorageUnavailable: the last of it could not be noted.
        """
        while not self._has_ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._has_ended.wait(), NOTE_S)
            try:
                await self._tell()
            except StorageUnavailable as error:
                _log.warning("Job %s is not noted for now: %s", self._claim.uid, error)
        await self._tell()

    async def _tell(self) -> None:
        """Note what there is; what could not be noted is kept for the next time."""
        fractions, self._fractions = self._fractions, {}
        if fractions:
            try:
                await self._claims.progress(self._claim, fractions)
            except StorageUnavailable:
                self._fractions = {**fractions, **self._fractions}
                raise
            self._ring(self._claim.uid)
        if self._played_bytes or len(self._sound) > 1:  # not the header alone
            await self._play()

    async def _play(self) -> None:
        sound = b"".join(self._sound)
        if not sound:
            return
        self._sound = [sound]
        start, stop = self._played_bytes, self._played_bytes + len(sound)
        path = played_path(self._claim.uid, self._claim.attempt, start, stop)
        await self._files.run(self._files.write, path, sound)
        await self._claims.play(self._claim, start, stop)
        if start == 0 and self._claim.attempt == 1:
            FIRST_AUDIO_SECONDS.observe(time.time() - time_of(self._claim.uid))
        self._sound[0] = b""
        self._played_bytes = stop
        self._ring(self._claim.uid)


def wav_header(length_samples: int) -> bytes:
    """The header of the mix's file, 16-bit stereo, before there is a mix.

    Source: RIFF/WAVE, Microsoft and IBM 1991, as libsndfile writes it.
    """
    frame_bytes = CHANNELS * SAMPLE_BYTES
    data_bytes = length_samples * frame_bytes
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF", HEADER_BYTES - 8 + data_bytes, b"WAVE",
        b"fmt ", 16, 1, CHANNELS, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * frame_bytes, frame_bytes,
        8 * SAMPLE_BYTES,
        b"data", data_bytes,
    )  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What an attempt came to.

    Args:
        stored: the files.
        is_cold: whether all of it was computed: nothing was in a cache.
    """

    stored: tuple[StoredArtifact, ...]
    is_cold: bool


class Workshop:
    """Makes the files of jobs.

    Args:
        claims: the rows.
        files: songs, and what is made of them.
        composer: does the work.
    """

    def __init__(self, claims: Claims, files: Files, composer: Composer) -> None:
        self._claims = claims
        self._files = files
        self._composer = composer

    async def make(self, claim: Claim, row: Row, ring: Callable[[str], None]) -> Made:
        """The files of a job: those of a job that asked for the same, or new ones.

        Raises:
            RemixError: what the flow or the store failed with.
            LostClaim: the attempt counts no more.
        """
        folder = f"{claim.uid}/{claim.attempt}"
        if (twin := await self._claims.twin(row)) is not None:
            try:
                copies = await self._files.run(self._copy, twin.stored, folder, row.job.trace_id)
                return Made(copies, is_cold=False)
            except StorageUnavailable as error:
                _log.warning("The files of the job before are not there: %s", error)
        length_samples = round(row.duration_s * SAMPLE_RATE_HZ)
        attempt = Attempt(self._claims, self._files, claim, length_samples, ring)
        with tempfile.NamedTemporaryFile(prefix="philharmonics-") as song:
            await self._files.run(self._files.fetch, song_path(claim.uid), Path(song.name))
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(attempt.tell())
                    made = await self._composer.remix(
                        Path(song.name), row.job.options, attempt.progress, attempt.listen
                    )
                    attempt.end()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from errors
        files = remix_files(made, self._composer.manifest, self._composer.models_dir)
        stored = []
        while file := await self._files.run(next, files, None):
            stored.append(await self._files.run(self._write, *file, folder))
        return Made(tuple(stored), not any(time.cached for time in made.times.values()))

    def _write(self, name: str, content: bytes, folder: str) -> StoredArtifact:
        path = f"{folder}/{name}"
        self._files.write(path, content)
        sha256 = hashlib.sha256(content).hexdigest()
        return StoredArtifact(ArtifactInfo(name, media_type_of(name), len(content), sha256), path)

    def _copy(
        self, stored: Iterable[StoredArtifact], folder: str, trace_id: str
    ) -> tuple[StoredArtifact, ...]:
        copies = []
        for artifact in stored:
            name, path = artifact.info.name, f"{folder}/{artifact.info.name}"
            if name == REPORT:
                report = json.loads(self._files.read(artifact.path) or b"{}")
                report["times"]["whole_result_cached"] = True
                report["trace_id"] = trace_id
                content = json.dumps(report, indent=2).encode()
                copies.append(self._write(name, content, folder))
            else:
                self._files.copy(artifact.path, path)
                copies.append(StoredArtifact(artifact.info, path))
        return tuple(copies)


def song_path(uid: str) -> str:
    """Where a job's song lies."""
    return f"{uid}/song"
