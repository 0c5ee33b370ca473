"""What can go wrong, as one tree.

    RemixError
    ├── InvalidInput             the caller can mend it
    │   ├── InvalidAudio         not decodable, damaged, empty, not finite
    │   ├── InvalidNotes         a MIDI file or JSON of notes that cannot be used
    │   ├── InvalidOption        an option that is unknown or out of range
    │   ├── LimitExceeded        too large, too long, too many channels, a rate out of range
    │   ├── NotFound             no such voice, model or job
    │   ├── NoConsent            whose voice it is has not allowed it, or not for so long
    │   └── Conflict             an id that stands for something else already
    ├── InvalidModel             a file whose checksum or signature is not the manifest's
    ├── ModelFailed              a model broke on a window that it should have computed
    ├── Unauthenticated          no API key, or none that is valid
    ├── Forbidden                the API key lacks the scope
    ├── QueueFull                the service, or the key's share of it, is full; try again later
    ├── DeadlineExceeded         the caller's time ran out before the work was done
    ├── Cancelled                the caller went away
    ├── RunnerUnavailable        a stage's runner cannot be reached, or is not ready
    └── StorageUnavailable       the database or the file store cannot be reached, or is full

Every message gives the value, the limit and the remedy, and what a caller meets over HTTP has
them as attributes too. Each transport maps every leaf to a status in its own table, and a test
holds the tables to this tree.
"""

from __future__ import annotations

import errno
import math
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RemixError(Exception):
    """Base of every error that the project raises on purpose.

    >>> str(LimitExceeded("It has 9 channels; at most 8 are taken.", remedy="Mix it down first."))
    'It has 9 channels; at most 8 are taken. Mix it down first.'

    Args:
        message: the value and the limit, in a sentence; the error's text is this and the remedy.
        value: what was found, as JSON has it, in the message's unit.
        limit: what would have been taken: a bound, [lowest, highest], or the known names.
        remedy: what to do, a sentence of its own.
        retry_after_s: when it may be otherwise, where that can be told.
    """

    def __init__(
        self,
        message: str,
        *,
        value: object = None,
        limit: object = None,
        remedy: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{message} {remedy}" if remedy else message)
        self.message = message
        self.value = value
        self.limit = limit
        self.remedy = remedy
        self.retry_after_s = retry_after_s

    def parts(self) -> dict[str, Any]:
        """What the error is made of again: `type(error)(**error.parts())`, in another process."""
        return {
            "message": self.message,
            "value": self.value,
            "limit": self.limit,
            "remedy": self.remedy,
            "retry_after_s": self.retry_after_s,
        }


class InvalidInput(RemixError):
    """The caller's input is wrong, and the caller can mend it."""


class InvalidAudio(InvalidInput):
    """The audio cannot be decoded, is damaged, empty, or not finite."""


class InvalidNotes(InvalidInput):
    """A MIDI file or JSON of notes is damaged, of another form, or without notes."""


class InvalidOption(InvalidInput):
    """An option is unknown, malformed or out of its range."""


class LimitExceeded(InvalidInput):
    """The input is larger than the service takes."""


class NotFound(InvalidInput):
    """The named voice, model or job does not exist."""


class NoConsent(InvalidInput):
    """Whose voice it is has not allowed this, allows it no longer, or is somebody else."""


class Conflict(InvalidInput):
    """The caller's id stands for another request already."""


class InvalidModel(RemixError):
    """A model file does not match its manifest entry."""


class ModelFailed(RemixError):
    """A model broke while it computed: a fault of the service; another try would break it again."""


class Unauthenticated(RemixError):
    """Who asks has no API key, or one that is not valid."""


class Forbidden(RemixError):
    """The caller's API key does not reach so far."""


class QueueFull(RemixError):
    """The service, or the caller's share of it, holds as much work as it takes."""


class DeadlineExceeded(RemixError):
    """The caller's deadline passed before the work was done."""


class Cancelled(RemixError):
    """The caller cancelled the work."""


class RunnerUnavailable(RemixError):
    """A stage's runner cannot be reached or is not ready."""


class StorageUnavailable(RemixError):
    """The database or the file store cannot be reached, or is full."""


NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def full_disk() -> Iterator[None]:
    """Turns a full disk, by whatever it was met, into `StorageUnavailable`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StorageUnavailable(
            f"The service has no room: {error.strerror}.",
            value=error.strerror,
            limit="a disk with room",
            remedy="Try again when Retry-After has passed; its operator must make room.",
        ) from error


def is_for_want_of_room(error: BaseException) -> bool:
    """Whether it was made of a full disk's error."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_ROOM


_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 80


def excerpt(value: object) -> str | int | float:
    """A caller's value as an error may repeat it: short, finite, and nothing that JSON lacks.

    >>> excerpt(9), excerpt("nobody"), excerpt(float("nan")), excerpt(None), excerpt([[[]]])
    (9, 'nobody', 'nan', 'null', '[[[]]]')
    """
    if value is None:
        return "null"
    # What is not printable may be half a surrogate pair, which no encoding takes.
    if isinstance(value, str) and len(value) <= _SHORTENED.maxstring and value.isprintable():
        return value
    if isinstance(value, int) and abs(value) < 2**64:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _SHORTENED.repr(value)
