"""windows of a stem -> posteriors of its notes, by Basic Pitch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bentoml
from numpy.typing import NDArray

from remix.manifest import ModelEntry, installed, read_manifest
from remix.settings import Settings
from remix.stages import Tensors
from runners.inference_protocol import ServedModel, silent_ends
from runners.open_graph import open_graph
from runners.runner import SERVICE, Runner


class BasicPitch(ServedModel):
    """The graph as it is: its tensors are those of the manifest entry."""

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._session = open_graph(entry, settings)
        self.name = entry.name
        self.inputs, self.outputs = self._session.inputs, self._session.outputs
        self.max_batch = entry.max_batch[settings.device]

    def __call__(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Posteriors of a batch of windows."""
        return self._session(inputs)

    def padding(self, inputs: Tensors, outputs: Tensors) -> float:
        """See `ServedModel.padding`."""
        samples = inputs[self.inputs[0].name]
        return silent_ends(samples.reshape(len(samples), -1))


@bentoml.service(**SERVICE)
class TranscribeNotes(Runner):
    """The runner of this stage."""

    stage = "transcribe_notes"

    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """See `Runner.load`."""
        for entry in installed(read_manifest(), self.stage, settings.models_dir):
            yield BasicPitch(entry, settings)
