"""Files by their path, in a folder or an object store: whatever address `fsspec` knows."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from remix.errors import StorageUnavailable

Result = TypeVar("Result")

THREADS = 4
"""Files read or written at once."""


@dataclass(frozen=True)
class Found:
    """A file of a listing.

    Args:
        path: below the root.
        size_bytes: of it.
        used_s: when it was last written or, in a folder, marked as used; seconds since 1970.
    """

    path: str
    size_bytes: int
    used_s: float


class Files:
    """Named bytes below one address. Whoever reads sees all of a file or nothing.

    Every call raises `StorageUnavailable` where the store is away, full, or refuses.

    Args:
        url: a folder, or an address such as `s3://bucket/folder`.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._root = url_to_fs(url)
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="files")

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call something that blocks, on the threads of this store; it has ended when this has."""
        call = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait([call])  # else it might write what its caller now deletes
            raise

    def close(self) -> None:
        """Wait for what is being written."""
        self._threads.shutdown()

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Write a file as a whole."""
        with _storage(path):
            if not self._is_local:  # an object appears when it is complete
                self._fs.pipe_file(self._at(path), bytes(content))
                return
            # The parent again each time: whoever deletes the last file of a folder deletes it too.
            self._fs.makedirs(self._fs._parent(self._at(path)), exist_ok=True)
            part = Path(f"{self._at(path)}.{secrets.token_hex(4)}.part")
            try:
                part.write_bytes(content)
                part.replace(self._at(path))
            finally:
                part.unlink(missing_ok=True)

    def put(self, path: str, source: Path) -> None:
        """Copy a file of this machine to `path`."""
        with _storage(path):
            self._fs.makedirs(self._fs._parent(self._at(path)), exist_ok=True)
            self._fs.put_file(str(source), self._at(path))

    def fetch(self, path: str, target: Path) -> None:
        """Copy the file at `path` to this machine."""
        with _storage(path):
            self._fs.get_file(self._at(path), str(target))

    def copy(self, path: str, target: str) -> None:
        """Copy a file to another path, within the store."""
        with _storage(path):
            self._fs.makedirs(self._fs._parent(self._at(target)), exist_ok=True)
            self._fs.cp_file(self._at(path), self._at(target))

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes from `start` up to, and without, `stop`; None if there is no such file."""
        with _storage(path):
            try:
                return bytes(self._fs.cat_file(self._at(path), start=start, end=stop))
            except FileNotFoundError:
                return None

    def mark_used(self, path: str) -> None:
        """Make a file the last to be evicted; an object store has no such mark.

        One that was evicted a moment ago stays so: touched, it would come back without a byte.
        """
        if self._is_local:
            with _storage(path), suppress(FileNotFoundError):
                os.utime(self._at(path))

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files and folders with all that is in them; what is not there is no error."""
        for path in paths:
            with _storage(path):
                try:
                    self._fs.rm(self._at(path), recursive=True)
                except FileNotFoundError:
                    continue

    def find(self, folder: str = "") -> list[Found]:
        """Every file below a folder."""
        with _storage(folder):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._at(folder), detail=True)
            except FileNotFoundError:
                return []
            return [
                Found(path.removeprefix(self._root).lstrip("/"), entry["size"], _time_of(entry))
                for path, entry in found.items()
            ]

    def folders(self) -> list[str]:
        """Names of the folders directly below the root."""
        with _storage(""):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            return [
                entry["name"].rstrip("/").rsplit("/", 1)[-1]
                for entry in found
                if entry["type"] == "directory"
            ]

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _time_of(entry: dict[str, Any]) -> float:
    """When an entry was last written: stores have names of their own for it."""
    time = entry.get("mtime") or entry.get("LastModified") or entry.get("created") or 0.0
    return float(time.timestamp() if hasattr(time, "timestamp") else time)


@contextmanager
def _storage(path: str) -> Iterator[None]:
    """Turns what a store fails with into one error of ours."""
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(
            f"The file store fails at {path!r}: {error.strerror or error}.",
            value=str(error.strerror or type(error).__name__),
            limit="a store that answers, with room",
            remedy="Make room, or mend it; jobs go on by themselves then.",
        ) from error
