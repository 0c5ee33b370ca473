"""What can go wrong, as one tree.

    RemixError
    ├── InvalidInput             the caller can mend it
    │   ├── InvalidAudio         not decodable, damaged, empty, not finite
    │   ├── InvalidOption        an option that is unknown or out of range
    │   ├── LimitExceeded        too large, too long, too many channels, a rate out of range
    │   └── NotFound             no such voice or model
    ├── InvalidModel             a file whose checksum or signature is not the manifest's
    ├── QueueFull                the service has as much work as it takes; try again later
    ├── DeadlineExceeded         the caller's time ran out before the work was done
    ├── Cancelled                the caller went away
    └── RunnerUnavailable        a stage's runner cannot be reached, or is not ready

Every message gives the value, the limit and the remedy. Each transport maps every leaf to a
status in its own table, and a test holds the tables to this tree.
"""

from __future__ import annotations


class RemixError(Exception):
    """Base of every error that the project raises on purpose."""


class InvalidInput(RemixError):
    """The caller's input is wrong, and the caller can mend it."""


class InvalidAudio(InvalidInput):
    """The audio cannot be decoded, is damaged, empty, or not finite."""


class InvalidOption(InvalidInput):
    """An option is unknown, malformed or out of its range."""


class LimitExceeded(InvalidInput):
    """The input is larger than the service takes."""


class NotFound(InvalidInput):
    """The named voice or model does not exist."""


class InvalidModel(RemixError):
    """A model file does not match its manifest entry."""


class QueueFull(RemixError):
    """The service holds as much work as it takes."""


class DeadlineExceeded(RemixError):
    """The caller's deadline passed before the work was done."""


class Cancelled(RemixError):
    """The caller cancelled the work."""


class RunnerUnavailable(RemixError):
    """A stage's runner cannot be reached or is not ready."""
