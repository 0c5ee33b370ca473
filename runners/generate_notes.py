"""bars to write -> their tokens, by the band transformer: the runner of this stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import bentoml

from remix.manifest import installed, read_manifest
from remix.settings import Settings
from runners.band_transformer import BandTransformer
from runners.inference_protocol import ServedModel
from runners.open_graph import open_graph
from runners.runner import SERVICE, Runner


@bentoml.service(**SERVICE)
class GenerateNotes(Runner):
    """The runner of this stage."""

    stage = "generate_notes"

    def load(self, settings: Settings) -> Iterator[ServedModel]:
        """See `Runner.load`."""
        for entry in installed(read_manifest(), self.stage, settings.models_dir):
            # One token's work is too small to be shared: a second thread costs more than it does.
            session = open_graph(entry, replace(settings, threads=1))
            yield BandTransformer(
                entry.name, session, session.facts, entry.max_batch[settings.device]
            )
