"""What makes two requests the same, and two results; names of jobs."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from functools import cache
from pathlib import Path

from remix.manifest import Manifest, expected_sha256
from remix.models import Models
from remix.options import RemixOptions

ROOT = Path(__file__).resolve().parent.parent

CODE = ("remix/*.py", "runners/*.py")
"""What decides how a song becomes a remix, beside models and options."""


@cache
def code_id() -> str:
    """Hash of the code: another version of it may make something else of the same input."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def version_id(manifest: Manifest, models_dir: Path) -> str:
    """Hash of the code and of every installed model: who has the same one makes the same.

    Enrolled voices come and go while a composer works, and every composer follows.
    """
    sums = [
        [entry.name, *(expected_sha256(models_dir, file) for file in entry.files)]
        for entry in manifest.values()
        if entry.is_installed(models_dir) and "consent" not in entry.facts
    ]
    return _hash([sorted(sums), code_id()])[:12]


def request_id(song_sha256: str, options: RemixOptions, webhook_url: str) -> str:
    """Hash of what a caller asked for."""
    return _hash([song_sha256, options.model_dump(mode="json"), webhook_url])


def result_id(
    song_sha256: str, options: RemixOptions, models: Models, manifest: Manifest, models_dir: Path
) -> str:
    """Hash of everything that decides a remix's files (but for the times in its report)."""
    sums = [
        [name, [expected_sha256(models_dir, file) for file in manifest[name].files]]
        for name in models.names()
    ]
    return _hash([song_sha256, options.model_dump(mode="json"), models.voice.name, sums, code_id()])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def new_uid() -> str:
    """A name that no job has had, greater than those before it."""
    return f"{int(1000 * time.time()):012x}{secrets.token_hex(10)}"


def time_of(uid: str) -> float:
    """When a name was made; the end of time for what is none.

    >>> abs(time_of(new_uid()) - time.time()) < 1
    True
    """
    return int(uid[:12], 16) / 1000 if re.fullmatch("[0-9a-f]{32}", uid) else float("inf")
