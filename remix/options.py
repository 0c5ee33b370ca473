"""What a caller may choose, with its limits; everything has a default."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remix.errors import InvalidOption, excerpt
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
    density: Annotated[
        int, Field(ge=-2, le=2, description="Sparser or busier than the song, in levels of five.")
    ] = 0
    prompt_bars: Annotated[
        int, Field(ge=1, le=7, description="Bars of the song that `continue` begins from.")
    ] = 4


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
        float, Field(ge=-15.5, le=-9.5, description="Integrated loudness, ITU-R BS.1770.")
    ] = -14.0


class RemixOptions(SeparateOptions, GenerateOptions, ConvertOptions, MixOptions):
    """Of the whole flow: those of every stage together."""


_EXAMPLE = 'Send an object like {"seed": 1}.'


def parse_options(kind: type[AnyOptions], text: str | None) -> AnyOptions:
    """JSON text -> options; nothing means all defaults.

    Raises:
        InvalidOption: not JSON, an unknown name, or a value out of its range.
    """
    try:
        table: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        # Not only JSONDecodeError: an integer of thousands of digits is a plain ValueError.
        raise InvalidOption(
            f"options is {excerpt(text)!r}, which is not JSON ({error}); it must be an object.",
            value=excerpt(text),
            limit="a JSON object",
            remedy=_EXAMPLE,
        ) from error
    if not isinstance(table, dict):
        raise InvalidOption(
            f"options is {excerpt(table)!r}, a {type(table).__name__}; it must be an object.",
            value=excerpt(table),
            limit="a JSON object",
            remedy=_EXAMPLE,
        )
    known = list(kind.model_fields)
    # Before Pydantic, which cannot say which name it is if the name is no proper text.
    for name in table:
        if name not in known:
            raise InvalidOption(
                f"There is no option {excerpt(name)!r}; there are {', '.join(known)}.",
                value=excerpt(name),
                limit=known,
                remedy="Use one of these names.",
            )
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, value = str(first["loc"][0]), excerpt(first["input"])
        raise InvalidOption(
            f"Option {name} is {value!r}: {first['msg']}.",
            value=value,
            limit=_range_of(kind, name),
            remedy="Send a value in this range, or leave the option out.",
        ) from error


def _range_of(kind: type[Options], name: str) -> dict[str, Any]:
    """What an option may be, in the words of JSON Schema.

    >>> _range_of(GenerateOptions, "top_p")
    {'exclusiveMinimum': 0.0, 'maximum': 1.0, 'type': 'number'}
    """
    schema = kind.model_json_schema()["properties"][name]
    return {key: schema[key] for key in schema if key not in {"title", "description", "default"}}
