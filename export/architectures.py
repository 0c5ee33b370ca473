"""Every architecture that can be exported, by name."""

from __future__ import annotations

from importlib import import_module

from export.exporter import Architecture
from remix.errors import NotFound

MODULES = ("separate_stems", "transcribe_notes", "generate_notes", "convert_voice")
"""Modules of this folder with an `ARCHITECTURES`; a soundfont is played, not exported."""


def architectures() -> dict[str, Architecture]:
    """All of them; imports torch and the original libraries."""
    return {
        architecture.name: architecture
        for module in MODULES
        for architecture in import_module(f"export.{module}").ARCHITECTURES
    }


def architecture_of(name: str) -> Architecture:
    """The architecture of a name.

    Raises:
        NotFound: there is none.
    """
    known = architectures()
    if name not in known:
        raise NotFound(
            f"There is no architecture {name!r}; there are {', '.join(known)}.",
            value=name,
            limit=list(known),
            remedy="Give --architecture one of these names.",
        )
    return known[name]
