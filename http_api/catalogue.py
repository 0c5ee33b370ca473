"""The manifest -> what /v1/models and /v1/voices say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from remix.composer import Composer
from remix.manifest import expected_sha256
from remix.stages import Stage

Weights = Literal["published", "trained-here", "random"]


class FileFacts(BaseModel):
    """A file of a model."""

    path: str
    sha256: str | None = Field(description="None: only a hub knows it, until it is installed.")


class ModelFacts(BaseModel):
    """A model of the manifest."""

    name: str
    stage: Stage
    weights: Weights = Field(
        description="`published`: its authors' own; `trained-here`: this project's; `random`: for "
        "measurements of speed and parity only, what it makes is noise."
    )
    licence: str
    source: str
    quality: str = Field(description="What was measured, and how.")
    sample_rate_hz: int = Field(description="Of its audio; 0 where it has none.")
    installed: bool
    default: bool = Field(description="Whether it is used when nobody asks for another.")
    files: list[FileFacts]


class ModelList(BaseModel):
    """Every model."""

    models: list[ModelFacts]


class VoiceFacts(BaseModel):
    """A voice that can sing."""

    name: str = Field(description="What the option `voice` calls it.")
    model: str = Field(description="Which model sings with it.")
    weights: Weights
    licence: str
    source: str
    default: bool


class VoiceList(BaseModel):
    """Every voice whose model is installed."""

    voices: list[VoiceFacts]


def model_list(composer: Composer) -> ModelList:
    """What the manifest says."""
    defaults = composer.default_models()
    return ModelList(
        models=[
            ModelFacts(
                name=entry.name,
                stage=entry.stage,
                weights=entry.weights,
                licence=entry.licence,
                source=entry.source,
                quality=entry.quality,
                sample_rate_hz=entry.sample_rate_hz,
                installed=entry.is_installed(composer.models_dir),
                default=entry.name in defaults,
                files=[
                    FileFacts(
                        path=file.path,
                        sha256=expected_sha256(composer.models_dir, file) or None,
                    )
                    for file in entry.files
                ],
            )
            for entry in composer.manifest.values()
        ]
    )


def voice_list(composer: Composer) -> VoiceList:
    """Voices, the default first."""
    return VoiceList(
        voices=[
            VoiceFacts(
                name=name,
                model=entry.name,
                weights=entry.weights,
                licence=entry.licence,
                source=entry.source,
                default=index == 0,
            )
            for index, (name, entry) in enumerate(composer.voices())
        ]
    )
