"""song -> remix, by a Deep Philharmonics server over HTTP.

PhilharmonicsError
├── Refused        the server did not take the input or an option (4xx); mend it
├── Busy           the server has as much work as it takes (429); try again later
├── Failed         the server failed (5xx)
└── Unreachable    no server answered
"""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal
from urllib.parse import quote as quote_path

import httpx

DEFAULT_URL = "http://127.0.0.1:3000"

PROBLEM_TYPES = "urn:philharmonics:problem:"

AudioType = Literal["audio/wav", "audio/flac", "audio/mpeg"]
NotesType = Literal["audio/midi", "application/json"]
Song = Path | str | BinaryIO
OnProgress = Callable[[str, float], None]

TIMEOUT = httpx.Timeout(10.0, read=None, write=120.0)
"""Reading has no limit of the client's: a remix takes minutes, and the server has its own."""


class PhilharmonicsError(Exception):
    """Base of everything that the client raises."""


class Unreachable(PhilharmonicsError):
    """No server answered."""


@dataclass(eq=False)
class Problem(PhilharmonicsError):
    """An answer that is an error: the members of its `application/problem+json`."""

    status: int
    type: str
    title: str
    detail: str
    value: Any = None
    limit: Any = None
    remedy: str | None = None
    retry_after_s: float | None = None
    trace_id: str = ""

    def __str__(self) -> str:
        """Title and detail."""
        return f"{self.title}: {self.detail}" if self.detail else self.title


class Refused(Problem):
    """The server did not take what it was sent."""


class Busy(Problem):
    """The server has as much work as it takes."""


class Failed(Problem):
    """The server failed."""

    def __str__(self) -> str:
        """Title and detail, and what names the request in the server's log."""
        trace = f" (trace {self.trace_id})" if self.trace_id else ""
        return f"{super().__str__()}{trace}"


@dataclass(frozen=True)
class RemixFiles:
    """Where the parts of a remix were written."""

    folder: Path

    @property
    def remix(self) -> Path:
        """The remix, WAV."""
        return self.folder / "remix.wav"

    @property
    def report(self) -> dict[str, Any]:
        """What was done: models, options, times, evaluation."""
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report


class Client:
    """A server, by its address.

    >>> with Client("http://127.0.0.1:3000") as client:  # doctest: +SKIP
    ...     client.remix("song.mp3", "out/song", {"voice": "allison"}, on_progress=print)

    Args:
        base_url: address of the server.
        key: an API key, where the server asks for one.
    """

    def __init__(self, base_url: str = DEFAULT_URL, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=TIMEOUT, trust_env=False
        )
        self.base_url = base_url

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def is_ready(self) -> bool:
        """Whether a server is there and every stage of it is ready."""
        try:
            return self._http.get("/readyz", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def is_ours(self) -> bool:
        """Whether a server is there, and it is one of ours: others like this port too."""
        try:
            body = self._http.get("/v1/voices", timeout=5.0).json()
            return "voices" in body or str(body["type"]).startswith(PROBLEM_TYPES)
        except (httpx.TransportError, ValueError, TypeError, KeyError):
            return False

    def remix(
        self,
        song: Song,
        folder: Path | str,
        options: Mapping[str, Any] | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> RemixFiles:
        """Remix a song and write all there is of it into a folder.

        Args:
            song: an audio file, by path or open.
            folder: is made if need be; gets remix.wav, stems/*.wav, notes.mid, generated.mid,
                voice.wav, report.json and report.png.
            options: see the server's /docs.
            on_progress: is told stage and fraction done, from another thread.

        Raises:
            Refused, Busy, Failed, Unreachable.
        """
        target = Path(folder)
        with tempfile.TemporaryFile() as archive:
            with self._post(
                "/v1/remix", "song", song, options, "application/zip", on_progress
            ) as answer:
                for chunk in answer.iter_bytes(1 << 16):
                    archive.write(chunk)
            target.mkdir(parents=True, exist_ok=True)
            for stale in target.glob("stems/*.wav"):
                stale.unlink()
            with zipfile.ZipFile(archive) as parts:
                parts.extractall(target)
        return RemixFiles(target)

    def remix_audio(
        self,
        song: Song,
        options: Mapping[str, Any] | None = None,
        *,
        media_type: AudioType = "audio/wav",
        on_progress: OnProgress | None = None,
    ) -> bytes:
        """Remix a song and return the remix alone, as an audio file."""
        return self._bytes("/v1/remix", "song", song, options, media_type, on_progress)

    def separate(self, song: Song, options: Mapping[str, Any] | None = None) -> bytes:
        """Song -> its stems, as a ZIP of WAV files."""
        return self._bytes("/v1/separate", "song", song, options, "application/zip")

    def transcribe(
        self,
        song: Song,
        options: Mapping[str, Any] | None = None,
        *,
        media_type: NotesType = "audio/midi",
    ) -> bytes:
        """Song -> the notes heard in it, as a MIDI file or JSON."""
        return self._bytes("/v1/transcribe", "song", song, options, media_type)

    def generate(
        self,
        notes: Song,
        options: Mapping[str, Any] | None = None,
        *,
        media_type: NotesType = "audio/midi",
    ) -> bytes:
        """Notes (MIDI file or JSON) -> new music from them, as a MIDI file or JSON."""
        return self._bytes("/v1/generate", "notes", notes, options, media_type)

    def convert(
        self,
        vocals: Song,
        options: Mapping[str, Any] | None = None,
        *,
        media_type: AudioType = "audio/wav",
    ) -> bytes:
        """A vocal -> the same vocal by another voice."""
        return self._bytes("/v1/convert", "vocals", vocals, options, media_type)

    def synthesize(
        self,
        notes: Song,
        options: Mapping[str, Any] | None = None,
        *,
        media_type: AudioType = "audio/wav",
    ) -> bytes:
        """Notes (MIDI file or JSON) -> their sound."""
        return self._bytes("/v1/synthesize", "notes", notes, options, media_type)

    def submit(
        self, song: Song, options: Mapping[str, Any] | None = None, *, job_id: str | None = None
    ) -> dict[str, Any]:
        """Hand a song over as a job, which is kept and carried out whoever waits for it.

        Args:
            song: an audio file, by path or open.
            options: see the server's /docs.
            job_id: of your own choice; sent again, it names the same job.

        Returns:
            The job, as `GET /v1/jobs/ID` tells it.

        Raises:
            Refused: with status 409 where `job_id` stands for another song or other options.
            Busy, Failed, Unreachable.
        """
        path = "/v1/jobs" if job_id is None else _job(job_id)
        method = "POST" if job_id is None else "PUT"
        with self._send(method, path, "song", song, options, "application/json") as answer:
            return _facts(answer)

    def job(self, job_id: str) -> dict[str, Any]:
        """State, progress by stage, place in the queue, files."""
        with self._open("GET", _job(job_id)) as answer:
            return _facts(answer)

    def jobs(self, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Your jobs, the newest first; all, or those of one state."""
        asked: dict[str, str] = {"state": state} if state else {}
        while True:
            with self._open("GET", "/v1/jobs", params=asked) as answer:
                page = _facts(answer)
            yield from page["jobs"]
            if not page["next_page_token"]:
                return
            asked["page_token"] = page["next_page_token"]

    def watch(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """A job's events from its first, until it has ended: `progress`, and `state`."""
        with self._open("GET", f"{_job(job_id)}/events") as answer:
            yield from _server_sent(answer.iter_lines())

    def hear(self, job_id: str) -> Iterator[bytes]:
        """A job's remix, WAV, each part as soon as it is final."""
        with self._open("GET", f"{_job(job_id)}/audio") as answer:
            yield from answer.iter_bytes()

    def fetch(self, job_id: str, name: str, path: Path | str) -> None:
        """Write a file of a job, such as `remix.wav` or `stems/vocals.wav`."""
        address = f"{_job(job_id)}/artifacts/{quote_path(name)}"
        with self._open("GET", address) as answer, Path(path).open("wb") as file:
            for chunk in answer.iter_bytes(1 << 16):
                file.write(chunk)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job; its compute ends within a window."""
        with self._open("DELETE", _job(job_id)) as answer:
            return _facts(answer)

    def voices(self) -> list[dict[str, Any]]:
        """The voices that can sing."""
        return self._list("/v1/voices", "voices")

    def models(self) -> list[dict[str, Any]]:
        """The models of the server's manifest."""
        return self._list("/v1/models", "models")

    def quote(self, duration_s: float) -> dict[str, Any]:
        """What a song of this length would cost, and when it would be done, were it sent now."""
        with self._open("POST", "/v1/quote", json={"duration_s": duration_s}) as answer:
            return _facts(answer)

    def keys(self) -> list[dict[str, Any]]:
        """The API keys, without the keys themselves; for a key of the scope `admin`."""
        return self._list("/v1/keys", "keys")

    def add_key(self, name: str, scopes: Sequence[str], **quotas: int) -> dict[str, Any]:
        """A new API key; the key itself is the member `key`, and nowhere else."""
        body = {"name": name, "scopes": list(scopes), **quotas}
        with self._open("POST", "/v1/keys", json=body) as answer:
            return _facts(answer)

    def revoke_key(self, key_id: str) -> None:
        """Make an API key invalid, for good."""
        with self._open("DELETE", f"/v1/keys/{quote_path(key_id, safe='')}"):
            pass

    def progress(self, request_id: str) -> Iterator[tuple[str, float]]:
        """Stage and fraction done of a running request, until it ends."""
        with self._open("GET", "/v1/progress", params={"request_id": request_id}) as answer:
            for event, data in _server_sent(answer.iter_lines()):
                if event == "end":
                    return
                if event == "progress":
                    yield str(data["stage"]), float(data["fraction"])

    def _list(self, path: str, member: str) -> list[dict[str, Any]]:
        with self._open("GET", path) as answer:
            rows: list[dict[str, Any]] = _facts(answer)[member]
        return rows

    def _bytes(
        self,
        path: str,
        part: str,
        file: Song,
        options: Mapping[str, Any] | None,
        accept: str,
        on_progress: OnProgress | None = None,
    ) -> bytes:
        with self._post(path, part, file, options, accept, on_progress) as answer:
            return answer.read()

    @contextmanager
    def _post(
        self,
        path: str,
        part: str,
        file: Song,
        options: Mapping[str, Any] | None,
        accept: str,
        on_progress: OnProgress | None = None,
    ) -> Iterator[httpx.Response]:
        request_id = uuid.uuid4().hex
        with (
            self._watch(request_id, on_progress),
            self._send("POST", path, part, file, options, accept, request_id) as answer,
        ):
            yield answer

    @contextmanager
    def _send(
        self,
        method: str,
        path: str,
        part: str,
        file: Song,
        options: Mapping[str, Any] | None,
        accept: str,
        request_id: str = "",
    ) -> Iterator[httpx.Response]:
        """Upload a file. The request's id is that of its trace too (W3C Trace Context)."""
        request_id = request_id or uuid.uuid4().hex
        traceparent = f"00-{request_id}-{secrets.token_hex(8)}-01"
        headers = {"Accept": accept, "X-Request-Id": request_id, "traceparent": traceparent}
        data = {"options": json.dumps(dict(options))} if options else {}
        with (
            _opened(file) as (name, stream),
            self._open(
                method, path, headers=headers, data=data, files={part: (name, stream)}
            ) as answer,
        ):
            yield answer

    @contextmanager
    def _watch(self, request_id: str, on_progress: OnProgress | None) -> Iterator[None]:
        if on_progress is None:
            yield
            return

        def follow() -> None:
            try:
                for stage, fraction in self.progress(request_id):
                    on_progress(stage, fraction)
            except (PhilharmonicsError, httpx.HTTPError, RuntimeError):
                # Progress is a courtesy: what went wrong is said by the request itself. (A
                # RuntimeError is what httpx raises when the client was closed meanwhile.)
                return

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        yield
        watcher.join(timeout=1.0)  # the end of the stream lies right behind the answer

    @contextmanager
    def _open(self, method: str, path: str, **content: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **content) as answer:
                if answer.status_code >= 400:
                    raise _problem(answer)
                yield answer
        except httpx.TransportError as error:
            raise Unreachable(
                f"{self.base_url} did not answer ({type(error).__name__}: {error}). Is the "
                "server running? `philharmonics serve` starts one."
            ) from error


@contextmanager
def _opened(file: Song) -> Iterator[tuple[str, BinaryIO]]:
    if isinstance(file, Path | str):
        path = Path(file)
        with path.open("rb") as stream:
            yield path.name, stream
    else:
        yield Path(getattr(file, "name", "upload")).name, file


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote_path(job_id, safe='')}"


def _facts(answer: httpx.Response) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(answer.read())
    return facts


def _problem(answer: httpx.Response) -> Problem:
    answer.read()
    try:
        body: dict[str, Any] = answer.json()
    except ValueError:
        body = {"detail": answer.text[:500]}
    status = answer.status_code
    kind = Busy if status == 429 else Refused if status < 500 else Failed
    retry_after = answer.headers.get("Retry-After", "")
    return kind(
        status=status,
        type=str(body.get("type", "about:blank")),
        title=str(body.get("title", f"HTTP {status}")),
        detail=str(body.get("detail", "")),
        value=body.get("value"),
        limit=body.get("limit"),
        remedy=body.get("remedy"),
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
        trace_id=str(body.get("trace_id", "")),
    )


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Source: the HTML standard, section "Server-sent events"; the fields that we send."""
    event, data = "message", ""
    for line in lines:
        if line.startswith("event:"):
            event = line[6:].strip()
        elif line.startswith("data:"):
            data += line[5:].strip()
        elif not line and data:
            yield event, json.loads(data)
            event, data = "message", ""
