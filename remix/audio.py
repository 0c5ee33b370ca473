"""Audio: samples with their rate, the value that flows between stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
"""[C, T] float32, nominally in [-1, 1]; never clipped inside the flow."""


@dataclass(frozen=True)
class Audio:
    """Sound at a known rate.

    Args:
        samples: [C, T], float32, nominally in [-1, 1].
        sample_rate_hz: samples a second and channel.
    """

    samples: Samples
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return int(self.samples.shape[-1]) / self.sample_rate_hz
