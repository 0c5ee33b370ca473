"""What every side computes: Basic Pitch's graph on windows of noise, one batch at a time.

A request is the number of a window, so that no side's transport matters: numbers there, numbers
back. Two of them are special: `BAD` breaks the batch that it is in, as a window that a model chokes
on does; `COUNT` costs nothing, and is answered with how many rows have been computed so far.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

MODEL = os.environ.get("BATCHERS_MODEL", ".models/transcribe_notes/nmp.onnx")

WINDOWS = 64

BAD, COUNT = -1, -2

MAX_BATCH = 4
"""`max_batch` of basic-pitch in models.toml."""

WAIT_S = 0.005
"""How long the sides that wait for company wait for it: what a lone request may cost at most."""


class Model:
    """Rows of numbers -> rows of numbers."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            MODEL, options, providers=["CPUExecutionProvider"]
        )
        (spec,) = self._session.get_inputs()
        self._input = spec.name
        shape = [size for size in spec.shape if isinstance(size, int)]
        noise = np.random.default_rng(0).standard_normal((WINDOWS, *shape))
        self._windows = (0.1 * noise).astype(np.float32)
        self.computed = 0
        self(np.arange(MAX_BATCH))
        self.computed = 0

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """[B] -> [B].

        Raises:
            ValueError: one of them is bad.
        """
        if (numbers == BAD).any():
            raise ValueError("bad window")
        asks = numbers == COUNT
        answers = np.full(len(numbers), float(self.computed))
        if not asks.all():
            windows = self._windows[numbers[~asks] % WINDOWS]
            outputs = self._session.run(None, {self._input: windows})
            self.computed += len(windows)
            answers[~asks] = [float(np.abs(row).sum()) for row in outputs[0]]
        return answers
