"""repository, revision, file -> the file of a model hub, resumed where a transfer broke off.

The hub's protocol: `GET {base}/{repository}/resolve/{revision}/{file}`, which answers with the
file or with a redirect to it, honours `Range`, and states the sha256 of a large file as
`X-Linked-ETag`. Source: the Hugging Face Hub's download endpoint, as `huggingface_hub` 0.34 calls
it (`file_download.hf_hub_url`, `get_hf_file_metadata`).
"""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from remix.errors import InvalidModel
from remix.manifest import sha256_of

_CHUNK_BYTES = 1 << 18
_MIN_SHA256_DIGITS = 8
"""Some authors publish the first eight digits only, in the file's name (demucs does)."""


@dataclass(frozen=True)
class HubFile:
    """A file of a hub, and its checksum.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit.
        file: its path in the repository.
        sha256: all 64 digits, or at least the first 8; empty to take the hub's word for it.
    """

    repository: str
    revision: str
    file: str
    sha256: str

    def url(self, base_url: str) -> str:
        """Where it is.

        Example:
            >>> HubFile("o/n", "main", "a b.th", "0" * 8).url("http://hub/")
            'http://hub/o/n/resolve/main/a%20b.th'
        """
        path = f"{self.repository}/resolve/{self.revision}/{self.file}"
        return f"{base_url.rstrip('/')}/{urllib.parse.quote(path)}"


def fetch_from_hub(
    hub_file: HubFile,
    base_url: str,
    folder: Path,
    watch: Callable[[int, int], None] | None = None,
    *,
    timeout_s: float = 10.0,
    attempts: int = 5,
) -> Path:
    """The file, with the right checksum; fetched unless it is in the folder already.

    What an interrupted transfer left stays as `NAME.partial` and is continued by the next one.

    Args:
        hub_file: what to fetch.
        base_url: of the hub.
        folder: where fetched files are kept.
        watch: is told the bytes that are there and the bytes in all (0 if unknown).
        timeout_s: of every wait for the hub.
        attempts: transfers that may break off one after the other without a byte gained.

    Raises:
        OSError: the hub is out of reach, or refuses (`urllib.error.HTTPError`).
        InvalidModel: the file has another checksum.
    """
    if not hub_file.sha256:
        hub_file = replace(hub_file, sha256=stated_sha256(hub_file.url(base_url), timeout_s))
    if len(hub_file.sha256) < _MIN_SHA256_DIGITS:
        raise InvalidModel(
            f"{hub_file.file} has a checksum of {len(hub_file.sha256)} digits in the manifest; "
            f"at least {_MIN_SHA256_DIGITS} are needed."
        )
    path = folder / f"{hub_file.sha256[:16]}-{Path(hub_file.file).name}"
    if path.is_file() and sha256_of(path).startswith(hub_file.sha256):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    resumed = partial.is_file()
    _fetch(hub_file.url(base_url), partial, watch, timeout_s, attempts)
    if resumed and not sha256_of(partial).startswith(hub_file.sha256):
        partial.unlink()  # the first half was of something else
        _fetch(hub_file.url(base_url), partial, watch, timeout_s, attempts)
    if not (found := sha256_of(partial)).startswith(hub_file.sha256):
        partial.unlink()
        raise InvalidModel(
            f"{hub_file.repository}/{hub_file.file} at {hub_file.revision} has sha256 {found}, "
            f"it should have {hub_file.sha256}. It was removed."
        )
    return partial.replace(path)


def stated_sha256(url: str, timeout_s: float) -> str:
    """The checksum that the hub states of a large file, before it redirects to its storage.

    Raises:
        OSError: the hub is out of reach, or has no such file.
        InvalidModel: it states none.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        response = urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code not in (301, 302, 303, 307, 308):
            raise
        response = error
    with response:
        tag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
    if match := re.fullmatch(r'(?:W/)?"([0-9a-f]{64})"', tag):
        return match[1]
    raise InvalidModel(f"{url}: the hub states no sha256 (its tag is {tag!r}); pin it yourself.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an answer, whose headers can be read."""

    def redirect_request(self, *_: object) -> None:
        """Go nowhere."""


def _fetch(
    url: str,
    partial: Path,
    watch: Callable[[int, int], None] | None,
    timeout_s: float,
    attempts: int,
) -> None:
    """Append to `partial` until the hub says that it is whole."""
    failures = 0
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        try:
            if _transfer(url, partial, watch or (lambda n_bytes, total: None), timeout_s):
                return
            problem: Exception = ConnectionError(f"{url} broke off")
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            problem = error
        after = partial.stat().st_size if partial.is_file() else 0
        failures = 0 if after > before else failures + 1
        if failures and (after == 0 or failures >= attempts):
            # Nothing has ever come: out of reach, and no reason to insist.
            raise problem if isinstance(problem, OSError) else ConnectionError(str(problem))


def _transfer(url: str, partial: Path, watch: Callable[[int, int], None], timeout_s: float) -> bool:
    """One request for what is missing; whether the file is whole then."""
    done = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is missing, or the file has become shorter
            return True
        raise
    with response, partial.open("ab") as out:
        if response.status != 206:
            done = 0
            out.truncate(0)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        while chunk := response.read(_CHUNK_BYTES):
            out.write(chunk)
            done += len(chunk)
            watch(done, total)
    return done == total or not total
