"""Multipart form -> the file in it, and its options."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from http_api.problems import Refusal

FORM = "multipart/form-data"

MAX_OPTIONS_BYTES = 65_536
"""Every option spelled out takes about 1 KB."""


@dataclass(frozen=True)
class Upload:
    """What a caller sent.

    Args:
        path: the song, vocal or notes, for as long as the request is served. What the caller
            called the file is not asked for: formats are told by their content.
        options: the text of the part `options`; empty if it was not sent.
    """

    path: Path
    options: str


@asynccontextmanager
async def read_upload(request: Request, part: str) -> AsyncIterator[Upload]:
    """Read a form with the file `part` and, if the caller wants, `options`.

    Raises:
        Refusal: 415 not a form; 400 a damaged form, a part missing, too many or not a file.
        LimitExceeded: see `http_api.guard`.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != FORM:
        raise Refusal(
            415,
            f"The request is {media_type or 'of no type'}; this route takes {FORM} with the file "
            f"{part} and the JSON object options.",
            value=media_type or "no type",
            limit=FORM,
            remedy=f"Send {FORM}, as `curl -F {part}=@FILE` does.",
        )
    async with request.form(max_files=2, max_fields=2, max_part_size=MAX_OPTIONS_BYTES) as form:
        file = _file(form, part)
        options = await _options(form)
        with tempfile.NamedTemporaryFile(prefix="philharmonics-") as named:
            await anyio.to_thread.run_sync(shutil.copyfileobj, file.file, named)
            named.flush()
            yield Upload(Path(named.name), options)


def _file(form: FormData, part: str) -> UploadFile:
    unknown = sorted(set(form) - {part, "options"})
    if unknown:
        raise Refusal(
            400,
            f"The form has a part {unknown[0]!r}; this route takes {part} and options.",
            value=unknown[0],
            limit=[part, "options"],
            remedy=f"Name the file's part {part}.",
        )
    values = form.getlist(part)
    if len(values) != 1:
        raise Refusal(
            400,
            f"The form has {len(values)} parts named {part}; it must have one, with the file.",
            value=len(values),
            limit=1,
            remedy=f"Send one part named {part}, as `curl -F {part}=@FILE` does.",
        )
    (value,) = values
    if isinstance(value, str):
        raise Refusal(
            400,
            f"The part {part} is text; it must be a file (a part with a filename). Addresses are "
            "not fetched.",
            value=value[:200],
            limit="a part with a filename",
            remedy=f"Send the file itself, as `curl -F {part}=@FILE` does.",
        )
    return value


async def _options(form: FormData) -> str:
    values = form.getlist("options")
    if not values:
        return ""
    if len(values) > 1:
        raise Refusal(
            400,
            f"The form has {len(values)} parts named options; it may have one.",
            value=len(values),
            limit=1,
            remedy="Put every option into one JSON object.",
        )
    (value,) = values
    if isinstance(value, str):
        return value
    return (await value.read(MAX_OPTIONS_BYTES)).decode("utf-8", "replace")
