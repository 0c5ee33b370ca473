"""What a stage is to the flow: a name, and a way to have a model run on tensors.

The five stages, in the order of the flow; each has one module of its name in `remix/` (cuts a
song into windows and joins the results), in `runners/` (runs the model on windows) and in
`export/` (makes the model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from numpy.typing import NDArray

Stage = Literal[
    "separate_stems", "transcribe_notes", "generate_notes", "convert_voice", "synthesize_audio"
]

STAGES: tuple[Stage, ...] = get_args(Stage)

Tensors = Mapping[str, NDArray[Any]]
"""Named arrays, each with the batch axis first: [B, ...]."""


class Infer(Protocol):
    """Runs one model on one window (or a few, along the batch axis), wherever the model is.

    Windows of several songs may be computed in one batch; the result does not depend on it.
    """

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Return the model's outputs, [B, ...] each.

        Args:
            model: name of a manifest entry.
            inputs: the model's inputs by name, [B, ...] each.

        Raises:
            RunnerUnavailable, QueueFull, DeadlineExceeded, InvalidInput: see `remix.errors`.
        """
        ...


class Progress(Protocol):
    """Is told how far a stage is."""

    def __call__(self, stage: Stage, fraction: float) -> None:
        """Note that `stage` has done `fraction` (0 to 1) of its work."""
        ...
