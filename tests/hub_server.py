"""A model hub on loopback that speaks the hub's protocol: resolve, redirect, Range, ETag.

A real HTTP server in a thread. It can be told to misbehave in the ways that real ones do: break
off in the middle, ignore `Range`, be slow.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What the hub holds, how it behaves, and what it was asked.

    Args:
        url: its base address.
        files: content by `owner/name/resolve/revision/file`.
        break_off_after: for each coming transfer, the bytes after which it ends; then whole ones.
        honours_range: whether it answers `Range` with 206.
        states_sha256: whether it states the checksum of what it redirects to.
        bytes_per_s: how fast it sends; 0 is as fast as it can.
        requests: the `Range` header of every transfer that was asked for, in order.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    break_off_after: list[int] = field(default_factory=list)
    honours_range: bool = True
    states_sha256: bool = True
    bytes_per_s: float = 0.0
    requests: list[str | None] = field(default_factory=list)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            if path.startswith("storage/"):
                self._send(hub.files[path.removeprefix("storage/")])
            elif path in hub.files:
                # The hub answers with a redirect to its storage, as the real one does.
                self.send_response(302)
                self.send_header("Location", f"{hub.url}/storage/{path}")
                if hub.states_sha256:
                    digest = hashlib.sha256(hub.files[path]).hexdigest()
                    self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send_error(404 if path else 200)

        def _send(self, content: bytes) -> None:
            asked = self.headers.get("Range")
            hub.requests.append(asked)
            start = 0
            if asked and hub.honours_range:
                match = re.fullmatch(r"bytes=(\d+)-", asked)
                assert match, asked
                start = int(match[1])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            stop = hub.break_off_after.pop(0) if hub.break_off_after else len(content)
            self._stream(content[start : start + stop])
            if start + stop < len(content):
                self.close_connection = True

        def _stream(self, content: bytes) -> None:
            step = int(hub.bytes_per_s / 20) or len(content) or 1
            for start in range(0, len(content), step):
                try:
                    self.wfile.write(content[start : start + step])
                except OSError:  # the client went away
                    self.close_connection = True
                    return
                if hub.bytes_per_s:
                    time.sleep(0.05)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
