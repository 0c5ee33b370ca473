"""notes by track <-> JSON: {"tracks": {"piano": [{"onset_s": 0.5, "duration_s": 1.0, ...}]}}."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remix.errors import InvalidNotes, LimitExceeded, excerpt
from remix.notes import Note, Role, Tracks

MAX_NOTES = 200_000
"""About 300 a second over ten minutes: thicker than any music, and quickly read."""


class NoteFacts(BaseModel):
    """One note; see `remix.notes.Note`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    onset_s: Annotated[float, Field(ge=0.0)]
    duration_s: Annotated[float, Field(gt=0.0)]
    pitch: Annotated[int, Field(ge=0, le=127)]
    velocity: Annotated[int, Field(ge=1, le=127)] = 80


class TrackFacts(BaseModel):
    """Notes by track."""

    model_config = ConfigDict(extra="forbid")

    tracks: dict[Role, list[NoteFacts]]


def write_json(notes: Tracks) -> bytes:
    """The JSON text of notes.

    >>> write_json({"bass": [Note(0.0, 0.5, 40, 90)]})
    b'{"tracks": {"bass": [{"onset_s": 0.0, "duration_s": 0.5, "pitch": 40, "velocity": 90}]}}'
    """
    tracks = {
        name: [
            {
                "onset_s": round(note.onset_s, 6),
                "duration_s": round(note.duration_s, 6),
                "pitch": note.pitch,
                "velocity": note.velocity,
            }
            for note in track
        ]
        for name, track in notes.items()
    }
    return json.dumps({"tracks": tracks}).encode()


def read_json(text: bytes) -> Tracks:
    """Notes out of JSON text.

    Raises:
        InvalidNotes: not JSON, or not of this form.
        LimitExceeded: more notes than any music has.
    """
    try:
        facts = TrackFacts.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        value = excerpt(first["input"])
        raise InvalidNotes(
            f"The notes are neither a MIDI file nor JSON of the known form: "
            f"{excerpt(place) or 'the file'} is {value!r}: {first['msg']}.",
            value=value,
            limit=first["msg"],
            remedy='Send {"tracks": {"piano": [{"onset_s": 0, "duration_s": 1, "pitch": 60}]}}, '
            "or a MIDI file.",
        ) from error
    count = sum(len(track) for track in facts.tracks.values())
    if count > MAX_NOTES:
        raise LimitExceeded(
            f"There are {count} notes; at most {MAX_NOTES} are taken.",
            value=count,
            limit=MAX_NOTES,
            remedy="Send fewer, or a part of the song.",
        )
    return {
        name: [Note(n.onset_s, n.duration_s, n.pitch, n.velocity) for n in track]
        for name, track in facts.tracks.items()
    }
