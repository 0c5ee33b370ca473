"""What a caller may choose, with its limits; everything has a default."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remix.errors import InvalidOption
from remix.notes import ROLES, Role

AnyOptions = TypeVar("AnyOptions", bound="Options")


class Options(BaseModel):
    """Base of all options: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_enum_values=True)


class SeparateOptions(Options):
    """Of the first stage."""

    separator: Annotated[
        str, Field(description="Model that separates; empty for the best one installed.")
    ] = ""


class GenerateOptions(Options):
    """Of the stage that writes new music."""

    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="The same seed gives the same music.")
    ] = 0
    mode: Annotated[
        Literal["accompany", "continue"],
        Field(description="Play under the song's own chords, or go on from its notes."),
    ] = "accompany"
    tracks: Annotated[
        tuple[Role, ...], Field(min_length=1, description="Which instruments play.")
    ] = ROLES
    temperature: Annotated[
        float, Field(gt=0.0, le=2.0, description="Below 1 is safer, above is bolder.")
    ] = 0.9
    top_p: Annotated[
        float, Field(gt=0.0, le=1.0, description="Share of likely notes to choose from.")
    ] = 0.95


class ConvertOptions(Options):
    """Of the stage that sings with another voice."""

    voice: Annotated[
        str, Field(description="A name from /v1/voices; empty for the first voice.")
    ] = ""
    octaves: Annotated[
        int | None,
        Field(ge=-3, le=3, description="Transpose the vocal; unset: fit the voice's range."),
    ] = None
    noise_seed: Annotated[
        int, Field(ge=0, lt=2**63, description="Seed of the voice model's noise.")
    ] = 0


class MixOptions(Options):
    """Of the mix."""

    vocal_gain_db: Annotated[
        float, Field(ge=-24.0, le=24.0, description="Vocal up or down, beside the balance found.")
    ] = 0.0
    loudness_lufs: Annotated[
        float, Field(ge=-16.0, le=-9.0, description="Integrated loudness, ITU-R BS.1770.")
    ] = -14.0


class RemixOptions(SeparateOptions, GenerateOptions, ConvertOptions, MixOptions):
    """Of the whole flow: those of every stage together."""


def parse_options(kind: type[AnyOptions], text: str | None) -> AnyOptions:
    """JSON text -> options; nothing means all defaults.

    Raises:
        InvalidOption: not JSON, an unknown name, or a value out of its range.
    """
    try:
        table: Any = json.loads(text) if text else {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidOption(
            f'options is not JSON ({error}): send an object like {{"seed": 1}}.'
        ) from error
    if not isinstance(table, dict):
        raise InvalidOption(f"options is {type(table).__name__}: send a JSON object.")
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise InvalidOption(f"There is no option {name!r}: use {known}.") from error
        raise InvalidOption(f"Option {name} is {first['input']!r}: {first['msg']}.") from error
