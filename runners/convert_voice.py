"""vocal windows -> content features, F0, and sung windows: three kinds of model, one runner.

Every graph works on samples and features as they come over the wire; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bentoml
from numpy.typing import NDArray

from remix.convert_voice import (
    AUDIO,
    CONFIDENCE,
    CONTENT,
    F0,
    HARMONICS,
    NOISE,
    PHASE,
    SAMPLES,
    SOURCE_NOISE,
    SPEAKER,
    VOICED,
)
from remix.errors import InvalidModel, InvalidOption
from remix.manifest import ModelEntry, TensorSpec, installed, read_manifest
from remix.settings import Settings
from remix.stages import Tensors
from remix.vocal_frames import (
    CONTENT_CHANNELS,
    CONTENT_SAMPLES,
    FRAME_SAMPLES,
    WINDOW_SAMPLES,
)
from runners.inference_protocol import ServedModel
from runners.onnx_session import OnnxSession
from runners.runner import SERVICE, Runner

Graph = Callable[[Tensors], dict[str, NDArray[Any]]]


class ContentEncoder(ServedModel):
    """What is sung: {"samples": [B, 160000]} -> {"content": [B, 500, 384]}."""

    inputs: Sequence[TensorSpec] = (TensorSpec(SAMPLES, "FP32", (-1, WINDOW_SAMPLES)),)
    outputs: Sequence[TensorSpec] = (
        TensorSpec(CONTENT, "FP32", (-1, WINDOW_SAMPLES // CONTENT_SAMPLES, CONTENT_CHANNELS)),
    )

    def __init__(self, entry: ModelEntry, graph: Graph, device: str) -> None:
        self.name = entry.name
        self.max_batch = entry.max_batch[device]
        self._graph = graph

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Compute a batch."""
        return self._graph(inputs)


class PitchEstimator(ContentEncoder):
    """The melody: {"samples": [B, 160000]} -> {"f0_hz": [B, 1000], "confidence": [B, 1000]}."""

    outputs = tuple(
        TensorSpec(name, "FP32", (-1, WINDOW_SAMPLES // FRAME_SAMPLES)) for name in (F0, CONFIDENCE)
    )


class VoiceModel(ContentEncoder):
    """A singer, or several: content and melody of N frames -> {"audio": [B, N * 160]}.

    Inputs: content [B, N, 384]; f0_hz and voiced [B, N]; speaker [B, 1], INT64; noise
    [B, N, latent channels]; phase [B, N, 9]; source_noise [B, N * 160].
    """

    def __init__(self, entry: ModelEntry, graph: Graph, device: str) -> None:
        super().__init__(entry, graph, device)
        n_frames, latent = entry.facts["window_frames"], entry.facts["latent_channels"]
        self._n_speakers = len(entry.facts["voices"])
        self.inputs = (
            TensorSpec(CONTENT, "FP32", (-1, n_frames, CONTENT_CHANNELS)),
            TensorSpec(F0, "FP32", (-1, n_frames)),
            TensorSpec(VOICED, "FP32", (-1, n_frames)),
            TensorSpec(SPEAKER, "INT64", (-1, 1)),
            TensorSpec(NOISE, "FP32", (-1, n_frames, latent)),
            TensorSpec(PHASE, "FP32", (-1, n_frames, HARMONICS)),
            TensorSpec(SOURCE_NOISE, "FP32", (-1, n_frames * FRAME_SAMPLES)),
        )
        self.outputs = (TensorSpec(AUDIO, "FP32", (-1, n_frames * FRAME_SAMPLES)),)

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Sing a batch.

        Raises:
            InvalidOption: a speaker that the model does not have.
        """
        speaker = inputs[SPEAKER]
        if speaker.min() < 0 or speaker.max() >= self._n_speakers:
            raise InvalidOption(
                f"speaker is {speaker.ravel().tolist()}; {self.name} has {self._n_speakers}: "
                f"send 0 to {self._n_speakers - 1}."
            )
        return self._graph(inputs)


KINDS: dict[str, type[ContentEncoder]] = {
    "content": ContentEncoder,
    "pitch": PitchEstimator,
    "voice": VoiceModel,
}
"""By the manifest's fact `kind`."""


def served_models(
    entries: list[ModelEntry], sessions: dict[str, OnnxSession], device: str
) -> Iterator[ServedModel]:
    """The models of some manifest entries.

    Args:
        entries: of this stage.
        sessions: of each entry, by name.
        device: whose batch limits hold.

    Raises:
        InvalidModel: an unknown kind, or a voice that was trained on another content encoder's
            features than its manifest entry names.
    """
    for entry in entries:
        kind = str(entry.facts.get("kind"))
        if kind not in KINDS:
            raise InvalidModel(
                f"models.toml: {entry.name} is of kind {kind!r}; this runner knows "
                f"{', '.join(KINDS)}."
            )
        if kind == "voice":
            _check_content(entry, sessions)
        yield KINDS[kind](entry, sessions[entry.name], device)


def _check_content(entry: ModelEntry, sessions: dict[str, OnnxSession]) -> None:
    encoder = sessions.get(str(entry.facts["content_model"]))
    offered = encoder.facts.get("content") if encoder else None
    wanted = sessions[entry.name].facts.get("content")
    if offered is None or offered != wanted:
        raise InvalidModel(
            f"{entry.name} was trained on {wanted!r}; its content encoder "
            f"{entry.facts['content_model']} makes {offered!r}: run `make models`, or mend "
            "content_model in models.toml."
        )


@bentoml.service(**SERVICE)
class ConvertVoice(Runner):
    """The runner of this stage."""

    stage = "convert_voice"

    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """See `Runner.load`."""
        entries = installed(read_manifest(), self.stage, settings.models_dir)
        entries.sort(key=lambda entry: entry.facts.get("kind") != "voice")  # the default: a voice
        sessions = {entry.name: OnnxSession(entry, entry.files[0], settings) for entry in entries}
        yield from served_models(entries, sessions, settings.device)
