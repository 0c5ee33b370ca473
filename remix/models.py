"""options, manifest -> the models that make one remix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from remix.consent import consent_of
from remix.convert_voice import Voice, voice_names
from remix.errors import NotFound, excerpt
from remix.manifest import Manifest, ModelEntry, default_model, installed
from remix.options import RemixOptions
from remix.separate_stems import Separator
from remix.synthesize_audio import Synthesizer
from remix.transcribe_notes import Transcriber


@dataclass(frozen=True)
class Models:
    """What runs in each stage."""

    separator: Separator
    transcriber: Transcriber
    generator: str
    voice: Voice
    synthesizer: Synthesizer

    def names(self) -> list[str]:
        """Manifest entries, in the order of the flow."""
        voice = self.voice
        return [
            self.separator.name,
            self.transcriber.name,
            self.generator,
            voice.content_model,
            voice.pitch_model,
            voice.model,
            self.synthesizer.name,
        ]


def choose_models(manifest: Manifest, models_dir: Path, options: RemixOptions) -> Models:
    """The models that the options name, and the best installed one where they name none.

    Raises:
        NotFound: a named model or voice is not installed, or a stage has no model at all.
        NoConsent: whose voice it is allows it no longer.
    """
    return Models(
        separator=Separator.of(_separator(manifest, models_dir, options.separator)),
        transcriber=Transcriber.of(default_model(manifest, "transcribe_notes", models_dir)),
        generator=default_model(manifest, "generate_notes", models_dir).name,
        voice=_voice(manifest, models_dir, options.voice),
        synthesizer=Synthesizer.of(default_model(manifest, "synthesize_audio", models_dir)),
    )


def installed_voices(manifest: Manifest, models_dir: Path) -> list[tuple[str, ModelEntry]]:
    """Every voice that can sing, and the model that it is of; the default first."""
    return [
        (name, entry)
        for entry in installed(manifest, "convert_voice", models_dir)
        for name in voice_names(entry)
    ]


def _separator(manifest: Manifest, models_dir: Path, name: str) -> ModelEntry:
    if not name:
        return default_model(manifest, "separate_stems", models_dir)
    found = {entry.name: entry for entry in installed(manifest, "separate_stems", models_dir)}
    if name not in found:
        raise _not_found("separator", name, found)
    return found[name]


def _voice(manifest: Manifest, models_dir: Path, name: str) -> Voice:
    found = dict(installed_voices(manifest, models_dir))
    if not found:
        raise NotFound(
            f"0 voices are installed in {models_dir}; at least 1 is needed.",
            value=0,
            limit=1,
            remedy="Run `make models`.",
        )
    chosen = name or next(iter(found))
    if chosen not in found:
        raise _not_found("voice", chosen, found)
    entry = found[chosen]
    if "consent" in entry.facts:  # of an enrolled voice; those of models.toml have a licence
        consent_of(entry.facts["consent"]).require_valid()
    return Voice.of(entry, chosen)


def _not_found(what: str, name: str, known: Iterable[str]) -> NotFound:
    names = list(known)
    return NotFound(
        f"There is no {what} {excerpt(name)!r}; there are {', '.join(names) or 'none yet'}.",
        value=excerpt(name),
        limit=names,
        remedy="Use one of these names." if names else "Run `make models`.",
    )
