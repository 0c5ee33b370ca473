"""vocal windows -> content features, F0, and sung windows: three kinds of model, one runner.

Every graph works on samples and features as they come over the wire; nothing is computed here.
Voices that are enrolled while the runner works are served a second later, and those that are
revoked are let go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import bentoml
from numpy.typing import NDArray

from remix.convert_voice import (
    AUDIO,
    SAMPLES,
    SOURCE_NOISE,
    SPEAKER,
    Voice,
    voice_names,
)
from remix.errors import InvalidModel, InvalidOption, NotFound, RemixError
from remix.manifest import ModelEntry, OwnVoices, TensorSpec, installed, read_manifest
from remix.settings import Settings
from remix.stages import Tensors
from remix.vocal_frames import WINDOW_SAMPLES
from runners.inference_protocol import ServedModel, silent_ends
from runners.open_graph import Graph, open_graph
from runners.runner import MODEL_INFO, SERVICE, Runner

LOOK_S = 1.0
"""Between two looks for voices that were enrolled or revoked."""

_log = logging.getLogger(__name__)


class WindowModel(ServedModel):
    """A content encoder or a pitch estimator: what is sung, or the melody.

    {"samples": [B, 160000]} -> {"content": [B, M, F]} or {"f0_hz", "confidence": [B, 1000]}.
    """

    inputs: Sequence[TensorSpec] = (TensorSpec(SAMPLES, "FP32", (-1, WINDOW_SAMPLES)),)

    def __init__(self, entry: ModelEntry, graph: Graph, device: str) -> None:
        self.name = entry.name
        self.max_batch = entry.max_batch[device]
        self.outputs: Sequence[TensorSpec] = entry.files[0].outputs
        self._graph: Graph | None = graph

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Compute a batch.

        Raises:
            NotFound: it was let go.
        """
        graph = self._graph
        if graph is None:
            raise NotFound(
                f"{self.name} was revoked.",
                value=self.name,
                limit="a voice that is enrolled",
                remedy="Choose another voice.",
            )
        return graph(inputs)

    def let_go(self) -> None:
        """Forget the weights, for good."""
        self._graph = None

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """See `ServedModel.padding`."""
        return silent_ends(inputs[SAMPLES])


class VoiceModel(WindowModel):
    """A singer, or several: content and melody of N frames -> {"audio": [B, N * hop]}.

    Inputs: content [B, N, F]; f0_hz and voiced [B, N]; speaker [B, 1], INT64; noise
    [B, N, latent channels]; with an excitation also phase [B, N, 9] and source_noise [B, N * hop].
    """

    def __init__(self, entry: ModelEntry, graph: Graph, device: str) -> None:
        super().__init__(entry, graph, device)
        voice = Voice.of(entry, voice_names(entry)[0])
        n_frames, n_samples = voice.window_frames, voice.window_frames * voice.frame_samples
        self._n_speakers = 1 + max(each["speaker"] for each in entry.facts["voices"].values())

        def in_window(spec: TensorSpec) -> TensorSpec:
            if spec.name == SPEAKER:
                return spec
            size = n_samples if spec.name in (SOURCE_NOISE, AUDIO) else n_frames
            return TensorSpec(spec.name, spec.datatype, (-1, size, *spec.shape[2:]))

        self.inputs = tuple(map(in_window, entry.files[0].inputs))
        self.outputs = tuple(map(in_window, entry.files[0].outputs))

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
        return super().__call__(inputs)

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """Of what a window has behind the song's end, its inputs say nothing: noise goes on."""
        return 0.0


KINDS: dict[str, type[WindowModel]] = {
    "content": WindowModel,
    "pitch": WindowModel,
    "voice": VoiceModel,
}
"""By the manifest's fact `kind`."""


def served_models(
    entries: list[ModelEntry], sessions: Mapping[str, Graph], device: str
) -> Iterator[WindowModel]:
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


def _check_content(entry: ModelEntry, sessions: Mapping[str, Graph]) -> None:
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
        self._sessions = {entry.name: open_graph(entry, settings) for entry in entries}
        yield from served_models(entries, self._sessions, settings.device)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """See `Runner.start`; and serve the voices that are enrolled here."""
        await super().start()
        self._voices = OwnVoices(dict(read_manifest()), self._settings.models_dir)
        self._own: dict[str, tuple[ModelEntry, WindowModel]] = {}
        await self._look()
        self._looking = asyncio.create_task(self._look_again())

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    async def _look(self) -> None:
        """Serve what was enrolled, and let go of what was revoked, since the last look."""
        new, gone = await asyncio.to_thread(self._voices.refresh)
        for entry in new:
            try:
                model = await asyncio.to_thread(self._open, entry)
            except (RemixError, OSError) as error:
                _log.warning("The voice %s is not served: %s", entry.name, error)
                continue
            self._own[entry.name] = entry, model
            self._inference.add(model)
            MODEL_INFO.labels(self.stage, model.name, entry.files[0].sha256).set(1)
            _log.info("The voice %s is served.", entry.name)
        for name in set(gone) & set(self._own):
            entry, model = self._own.pop(name)
            model.let_go()
            MODEL_INFO.labels(self.stage, name, entry.files[0].sha256).set(0)
            _log.info("The voice %s was revoked.", name)

    def _open(self, entry: ModelEntry) -> WindowModel:
        sessions = {**self._sessions, entry.name: open_graph(entry, self._settings)}
        (model,) = served_models([entry], sessions, self._settings.device)
        model.warm_up()
        return model

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """See `Runner.stop`."""
        self._looking.cancel()
        await super().stop()
