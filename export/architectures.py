"""Every architecture that can be exported, by name."""

from __future__ import annotations

from importlib import import_module

from export.exporter import Architecture
from remix.errors import NotFound

MODULES = ("separate_stems", "transcribe_notes", "generate_notes", "convert_voice")
"""Modules of this folder with an `ARCHITECTURES`; a soundfont is played, not exported."""


def architectures() -> dict[str, Architecture]:
    """All of them; imports torch and the original libraries."""
    return {found.name: found for module in MODULES for found in _of(module)}


def architecture_of(name: str) -> Architecture:
    """The architecture of a name; imports no more modules than it takes to find it.

    Raises:
        NotFound: there is none.
    """
    for module in MODULES:
        for found in _of(module):
            if found.name == name:
                return found
    known = list(architectures())
    raise NotFound(
        f"There is no architecture {name!r}; there are {', '.join(known)}.",
        value=name,
        limit=known,
        remedy="Give --architecture one of these names.",
    )


def _of(module: str) -> tuple[Architecture, ...]:
    found: tuple[Architecture, ...] = import_module(f"export.{module}").ARCHITECTURES
    return found
