"""window -> its outputs, computed once: the checkpoints of a job and the memory of all songs.

An entry's name is the hash of all that decides its content: the code that runs the model, the
model's files by their checksums, and every input's name, type, shape and bytes. So whatever option
matters is in the name because it is in the inputs, and nothing else is. A job that was interrupted
is simply begun again: the windows that it had are hits, and hits are byte for byte what was
computed. Another voice on the same song has other inputs only in the voice's own model: everything
else is a hit.

What lies in the store: entries `ab/abcd…`, each a header, the arrays' bytes and a checksum, written
under another name and renamed. What an enrolled voice sang is in a folder of its model,
`voices/MODEL/ab/abcd…`: so all of it is found when the voice is revoked. A damaged entry is a
miss. No entry is ever unpickled.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge

from jobs.files import Files
from jobs.identity import code_id
from remix.composer import TimedInfer
from remix.errors import StorageUnavailable, is_for_want_of_room
from remix.manifest import Manifest, expected_sha256, stage_of
from remix.report import StageTime
from remix.stages import STAGES, Stage, Tensors
from telemetry.traces import cached

WINDOWS = Counter(
    "philharmonics_cache_windows",
    "Windows that were asked for: hit, miss, damaged (computed anew), unwritten (no room)",
    ["stage", "outcome"],
)
BYTES = Gauge(
    "philharmonics_cache_bytes", "Size of the stage cache", multiprocess_mode="mostrecent"
)

MAGIC = b"PHW1"
"""A change of what an entry means changes this, and with it every name."""

CHECKSUM_BYTES = hashlib.sha256().digest_size

KINDS = "fiub"
"""Of NumPy's types: floats, integers, truth values. Nothing that could be an object."""

MAX_UNWRITTEN = 8
"""Entries that wait for the disk at once; the next window waits with them."""

EVICT_TO = 0.9
"""Of the limit: so that not every write evicts."""

SCANS_PER_SIZE = 16
"""Other composers write too: the store is measured again after so many parts of the limit."""

_log = logging.getLogger(__name__)


class DamagedEntry(ValueError):
    """What lies in the store is not what was written."""


class StageCache:
    """Keeps every window's outputs in a store of limited size.

    Args:
        files: the store.
        max_bytes: of it; what was used least recently is evicted (in an object store: what was
            written first).
        manifest: whose models compute.
        models_dir: where their checksums were recorded.
    """

    def __init__(self, files: Files, max_bytes: int, manifest: Manifest, models_dir: Path) -> None:
        self._files = files
        self._max_bytes = max_bytes
        self._manifest = manifest
        self._models_dir = models_dir
        self._model_ids: dict[str, bytes] = {}
        self._under_way: dict[str, asyncio.Future[dict[str, NDArray[Any]]]] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_UNWRITTEN)
        self._eviction = asyncio.Lock()
        self._scanned_bytes = 0
        self._unscanned_bytes = float("inf")  # so that the first write scans
        for stage in STAGES:
            for outcome in ("hit", "miss", "damaged", "unwritten"):
                WINDOWS.labels(stage, outcome)

    def for_song(self, infer: TimedInfer) -> TimedInfer:
        """`infer`, asked only for what is not in the store; itself where nothing is to be kept."""
        return CachedInfer(self, infer) if self._max_bytes else infer

    def stage_of(self, model: str) -> Stage:
        """Which stage a model works in."""
        return stage_of(self._manifest, model)

    async def close(self) -> None:
        """Wait until everything is written, and what was written last has its room too."""
        await asyncio.gather(*self._writes)
        if 0 < self._unscanned_bytes < float("inf"):
            with suppress(StorageUnavailable):
                await self._evict()
        self._files.close()

    async def give_way(self) -> None:
        """Evict half of what is kept: a disk is full, whatever this store's limit is."""
        with suppress(StorageUnavailable):
            await self._evict(of_what_is_kept=True)

    async def outputs(
        self, model: str, inputs: Tensors, infer: TimedInfer
    ) -> tuple[dict[str, NDArray[Any]], bool]:
        """A model's outputs, and whether they were there; who asks for the same meanwhile waits."""
        stage = self.stage_of(model)
        key = await self._files.run(self._key, model, inputs)
        while (under_way := self._under_way.get(key)) is not None:
            await asyncio.wait([under_way])
            if not under_way.cancelled():
                WINDOWS.labels(stage, "hit").inc()
                return under_way.result(), True
        future = self._under_way[key] = asyncio.get_running_loop().create_future()
        try:
            found = await self._read(self._path(model, key), stage)
            outputs = found if found is not None else await infer(model, inputs)
            future.set_result(outputs)
            if found is None:
                await self._room.acquire()
        except BaseException:
            future.cancel()  # no effect on one that is done; else the next one who waits computes
            del self._under_way[key]
            raise
        WINDOWS.labels(stage, "miss" if found is None else "hit").inc()
        if found is not None:
            del self._under_way[key]
            return outputs, True
        write = asyncio.create_task(self._write(key, self._path(model, key), stage, outputs))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return outputs, False

    def _key(self, model: str, inputs: Tensors) -> str:
        if model not in self._model_ids:
            sums = [expected_sha256(self._models_dir, f) for f in self._manifest[model].files]
            self._model_ids[model] = json.dumps([code_id(), model, *sums]).encode()
        digest = hashlib.sha256(MAGIC + self._model_ids[model])
        for name in sorted(inputs):
            array = np.ascontiguousarray(inputs[name])
            digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
            digest.update(array.data)
        return digest.hexdigest()

    def _path(self, model: str, key: str) -> str:
        is_own = "consent" in self._manifest[model].facts
        return f"{folder_of(model) if is_own else ''}{key[:2]}/{key}"

    async def _read(self, path: str, stage: Stage) -> dict[str, NDArray[Any]] | None:
        try:
            content = await self._files.run(self._files.read, path)
            if content is None:
                return None
            found = await self._files.run(decode_entry, content)
            await self._files.run(self._files.mark_used, path)
        except DamagedEntry as error:
            _log.warning("The cache's entry %s is damaged (%s); it is computed anew.", path, error)
            WINDOWS.labels(stage, "damaged").inc()
            return None
        except StorageUnavailable as error:
            _log.warning("The cache is not readable: %s", error)
            return None
        return found

    async def _write(self, key: str, path: str, stage: Stage, outputs: Tensors) -> None:
        try:
            content = await self._files.run(encode_entry, outputs)
            await self._files.run(self._files.write, path, content)
            self._unscanned_bytes += len(content)
            BYTES.set(self._scanned_bytes + self._unscanned_bytes)
            if self._unscanned_bytes > self._max_bytes / SCANS_PER_SIZE:
                await self._evict()
        except StorageUnavailable as error:
            # The song goes on without: what is not kept is computed again where it is needed.
            _log.warning("The cache keeps nothing of %s: %s", stage, error)
            WINDOWS.labels(stage, "unwritten").inc()
            if is_for_want_of_room(error):
                await self.give_way()
        finally:
            del self._under_way[key]  # until now it was answered from memory
            self._room.release()

    async def _evict(self, *, of_what_is_kept: bool = False) -> None:
        if self._eviction.locked():
            return
        async with self._eviction:
            self._unscanned_bytes = 0
            found = await self._files.run(self._files.find)
            size_bytes = sum(file.size_bytes for file in found)
            doomed = []
            limit_bytes, target_bytes = self._max_bytes, EVICT_TO * self._max_bytes
            if of_what_is_kept:
                limit_bytes, target_bytes = 0, size_bytes / 2
            if size_bytes > limit_bytes:
                for file in sorted(found, key=lambda file: file.used_s):
                    doomed.append(file.path)
                    size_bytes -= file.size_bytes
                    if size_bytes <= target_bytes:
                        break
                await self._files.run(self._files.delete, doomed)
            self._scanned_bytes = size_bytes
            BYTES.set(size_bytes)


class CachedInfer:
    """`remix.composer.TimedInfer` over a store: a window that is there is not computed.

    Args:
        cache: the store.
        infer: computes.
    """

    def __init__(self, cache: StageCache, infer: TimedInfer) -> None:
        self._cache = cache
        self._infer = infer

    @property
    def times(self) -> Mapping[Stage, StageTime]:
        """By stage; `cached` counts the windows that were there."""
        return self._infer.times

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `remix.stages.Infer`."""
        outputs, was_there = await self._cache.outputs(model, inputs, self._infer)
        if was_there:
            stage = self._cache.stage_of(model)
            windows = len(next(iter(inputs.values())))
            self._infer.times[stage].cached += windows
            cached(stage, windows)
        return outputs


def encode_entry(outputs: Tensors) -> bytes:
    """Named arrays -> an entry: magic, header's length, header (JSON), bytes, checksum."""
    arrays = {name: np.ascontiguousarray(array) for name, array in outputs.items()}
    header = json.dumps([[n, a.dtype.str, a.shape] for n, a in arrays.items()]).encode()
    parts = [MAGIC, struct.pack("<I", len(header)), header, *(a.tobytes() for a in arrays.values())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([*parts, digest.digest()])


def decode_entry(content: bytes) -> dict[str, NDArray[Any]]:
    """An entry -> named arrays, read-only.

    Raises:
        DamagedEntry: it is not what was written.

    >>> decode_entry(encode_entry({"f0": np.float32([[1.5, 2]])}))
    {'f0': array([[1.5, 2. ]], dtype=float32)}
    """
    view = memoryview(content)
    body = view[:-CHECKSUM_BYTES]
    if hashlib.sha256(body).digest() != view[-CHECKSUM_BYTES:]:
        raise DamagedEntry(f"{len(content)} bytes with another checksum than theirs")
    try:
        (length,) = struct.unpack_from("<I", body, len(MAGIC))
        start = len(MAGIC) + 4 + length
        arrays = {}
        for name, kind, shape in json.loads(bytes(body[len(MAGIC) + 4 : start])):
            dtype = np.dtype(kind)
            if dtype.kind not in KINDS:
                raise DamagedEntry(f"arrays of {dtype}")
            size = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(body, dtype, size, start).reshape(shape)
            start += arrays[name].nbytes
    except (ValueError, TypeError, struct.error) as error:
        raise DamagedEntry(str(error)) from error
    return arrays


def folder_of(model: str) -> str:
    """Where the entries of an enrolled voice's model are."""
    return f"voices/{model}/"
