"""One line for each model: rewritten in a terminal, plain steps elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_WIDTH = 24
_PLAIN_STEP = 0.25


class Progress:
    """Shows how far each model is.

    Args:
        out: where to write; a terminal's lines are rewritten.
        done: what a model is at the end.
    """

    def __init__(self, out: TextIO, done: str = "installed") -> None:
        self._out, self._done = out, done
        self._terminal = out.isatty()

    @contextmanager
    def of(self, name: str) -> Iterator[Callable[[str, float], None]]:
        """Show one model from 0 to 100 %; gives `watch(what, fraction)`, -1 for "unknown"."""
        shown = 0.0

        def watch(what: str, fraction: float) -> None:
            nonlocal shown
            if self._terminal:
                self._rewrite(name, max(fraction, shown), what)
                shown = max(fraction, shown)
            elif fraction >= shown + _PLAIN_STEP:
                shown = fraction
                self._line(f"{name}: {fraction:4.0%}  {what}")

        self._rewrite(name, 0.0, "") if self._terminal else self._line(f"{name}:   0%")
        try:
            yield watch
        except BaseException:
            self._line(f"{name}: not {self._done}")
            raise
        if self._terminal:
            self._rewrite(name, 1.0, self._done)
            self._line("")
        else:
            self._line(f"{name}: 100%  {self._done}")

    def _rewrite(self, name: str, fraction: float, what: str) -> None:
        bar = "#" * round(fraction * _WIDTH)
        self._out.write(f"\r\033[K{name:28s} [{bar:{_WIDTH}s}] {fraction:4.0%}  {what}")
        self._out.flush()

    def _line(self, text: str) -> None:
        lead = "\r\033[K" if self._terminal and text else ""
        self._out.write(f"{lead}{text}\n")
        self._out.flush()
