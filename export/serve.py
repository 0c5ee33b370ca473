"""manifest entry -> its model as the stage's runner calls it. No torch: what serves has none."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.audio import Audio
from remix.errors import ModelFailed
from remix.manifest import ModelEntry
from remix.separate_stems import Separator, join_chunks, separate_stems
from remix.settings import Settings
from remix.stages import Tensors
from runners.open_graph import open_graph
from runners.runner import Runner
from runners.separate_stems import served_model

Arrays = dict[str, NDArray[Any]]


class ServedCall:
    """A model as the flow has it: a runner's model, and what `remix` does around it.

    The runners of other stages than separation hand their inputs to the graph as they are (the
    generator step by step): there the call is the graph's.

    Args:
        entry: of the manifest.
        settings: where its file is, and where it runs.
    """

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        self._entry = entry
        separates = entry.stage == "separate_stems"
        self.model: Any = (served_model if separates else open_graph)(entry, settings)

    def __call__(self, inputs: Tensors) -> Arrays:
        """Compute a batch; of {"song": [1, 2, T]}, T free, the stems of the whole song.

        Raises:
            ModelFailed: the runtime loaded the graph and cannot compute it.
        """
        if "song" not in inputs:
            return self._compute(inputs)
        return {"stems": asyncio.run(self._separate(inputs["song"][0]))[None]}

    def in_batches(self, inputs: Tensors, rows: int) -> Arrays:
        """The same, as a runner computes many rows: so many a batch, some batches at once."""
        count = len(next(iter(inputs.values())))
        pieces = [
            {name: array[start : start + rows] for name, array in inputs.items()}
            for start in range(0, count, rows)
        ]
        with ThreadPoolExecutor(Runner.workers) as workers:
            results = list(workers.map(self, pieces))
        return {name: np.concatenate([each[name] for each in results]) for name in results[0]}

    def _compute(self, inputs: Tensors) -> Arrays:
        try:
            return dict(self.model(inputs))
        except Exception as error:  # the runtimes' exceptions share no public base
            raise ModelFailed(
                f"{self._entry.name} broke in {self._entry.backend.get('cpu', 'onnx')}: "
                f"{str(error).strip():.500}"
            ) from error

    async def _separate(self, song: NDArray[np.float32]) -> NDArray[np.float32]:
        workers = asyncio.Semaphore(Runner.workers)  # as the runner computes

        async def infer(model: str, inputs: Tensors) -> Arrays:
            async with workers:
                return await asyncio.to_thread(self._compute, inputs)

        separator = Separator.of(self._entry)
        mixture = Audio(song, self._entry.sample_rate_hz)
        stems = await join_chunks(separate_stems(mixture, separator, infer))
        return np.stack([stems[name] for name in separator.stems])
