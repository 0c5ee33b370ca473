"""consent file -> whose voice it is, what they allow, and until when.

A consent file is TOML, beside a recording in which its speaker says so:

    who = "June Wallack"
    statement = "june-allows-it.wav"    # in the same folder
    purpose = "singing in remixes made by the Example studio"
    given = 2026-11-24
    until = 2027-11-24                  # the last day
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from remix.errors import NoConsent, excerpt

FIELDS: Mapping[str, type] = {
    "who": str, "statement": str, "purpose": str, "given": date, "until": date,
}  # fmt: skip


@dataclass(frozen=True)
class Consent:
    """What somebody allows to be done with their voice.

    Args:
        who: it is.
        statement: name of the file in which they say so.
        purpose: that they allow.
        given: when.
        until: the last day on which it holds.
    """

    who: str
    statement: str
    purpose: str
    given: date
    until: date

    def require_valid(self, today: date | None = None) -> None:
        """Refuse what is over, or has not begun.

        Raises:
            NoConsent: today is not between `given` and `until`.
        """
        today = today or datetime.now(UTC).date()
        if today > self.until:
            raise NoConsent(
                f"The consent of {self.who} ended on {self.until}; today is {today}.",
                value=str(today),
                limit=str(self.until),
                remedy="Ask them for another, and enrol the voice again.",
            )
        if today < self.given:
            raise NoConsent(
                f"The consent of {self.who} begins on {self.given}; today is {today}.",
                value=str(today),
                limit=str(self.given),
                remedy="Wait until then, or correct its date.",
            )


def read_consent(path: Path | None) -> Consent:
    """The consent in a file, whose statement lies beside it.

    Raises:
        NoConsent: there is no file, it lacks something, or the statement is not there.
    """
    if path is None or not path.is_file():
        raise NoConsent(
            f"There is no consent file{f' {path}' if path else ''}; a voice is enrolled with the "
            "consent of whose it is.",
            value=str(path or ""),
            limit="a consent file",
            remedy="Write one as the README's section on your own voice shows: --consent FILE.",
        )
    try:
        consent = consent_of(tomllib.loads(path.read_text()))
    except ValueError as error:
        raise NoConsent(
            f"{path} is not TOML: {error}.", value=str(error), limit="TOML", remedy="Correct it."
        ) from error
    if (
        Path(consent.statement).name != consent.statement
        or not statement_of(path, consent).is_file()
    ):
        raise NoConsent(
            f"{path} names the statement {excerpt(consent.statement)!r}, and beside it there is no "
            "such file.",
            value=excerpt(consent.statement),
            limit="an audio file in the same folder",
            remedy=f"Record {consent.who} saying what they allow, and put it there.",
        )
    return consent


def statement_of(path: Path, consent: Consent) -> Path:
    """The recorded statement of a consent file."""
    return path.parent / consent.statement


def consent_of(table: Mapping[str, Any]) -> Consent:
    """A consent as TOML has it; what else is in it is left out.

    Raises:
        NoConsent: a field is missing, empty or of another type.
    """
    for name, kind in FIELDS.items():
        # A TOML date-time is a date to Python.
        if not isinstance(table.get(name), kind) or isinstance(table[name], datetime):
            raise NoConsent(
                f"The consent's {name} is {excerpt(table.get(name))!r}; it must be a "
                f"{kind.__name__}.",
                value=excerpt(table.get(name)),
                limit=kind.__name__,
                remedy=f"State {', '.join(FIELDS)}.",
            )
        if not table[name]:
            raise NoConsent(
                f"The consent's {name} is empty.", value="", limit=name, remedy="State it."
            )
    return Consent(**{name: table[name] for name in FIELDS})
