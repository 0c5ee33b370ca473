"""Logs: one line a fact, as JSON, with the id of the trace that it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from remix.settings import Settings
from telemetry.traces import trace_id

FACTS = logging.getLogger("philharmonics")


def start_logging(process: str, settings: Settings) -> None:
    """Write this process's log so from now on; what libraries log too.

    Args:
        process: who says so: the composer, or a stage's runner.
        settings: whether it is to be JSON, or text for a terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if settings.log == "json" else TextLines())
    for name in ("", "bentoml", "circus"):  # BentoML gives its loggers handlers of their own
        logging.getLogger(name).handlers = [handler]
    FACTS.setLevel(logging.INFO)


def fact(name: str, **fields: Any) -> None:
    """Note that something has happened.

    Args:
        name: what, in a word or two that are always the same.
        fields: the particulars, as JSON has them.
    """
    FACTS.info(name, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record -> a line of JSON.

    Args:
        process: stands in each.
    """

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if found := trace_id():
            line["trace_id"] = found
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """A record -> a line to be read in a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        fields = getattr(record, "fields", {})
        told = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{super().format(record)} {told}".rstrip()
