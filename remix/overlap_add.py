"""overlapping pieces -> one signal, whole or as a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.audio import Samples


def overlap_add(frames: NDArray[Any], hop_samples: int) -> NDArray[Any]:
    """Add frames where they belong, `hop_samples` apart.

    Args:
        frames: [..., N, size].
        hop_samples: from the start of one frame to the start of the next, at most size.

    Returns:
        [..., (N - 1) * hop + size], of the frames' dtype.

    >>> overlap_add(np.ones((3, 4)), 2).tolist()
    [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    """
    *outer, n_frames, size = frames.shape
    n_hops = -(-size // hop_samples)
    summed = np.zeros((*outer, n_frames + n_hops - 1, hop_samples), frames.dtype)
    # Part p of every frame falls p hops after the frame's start: one addition adds part p of all.
    for part in range(n_hops):
        piece = frames[..., part * hop_samples : (part + 1) * hop_samples]
        summed[..., part : part + n_frames, : piece.shape[-1]] += piece
    length = (n_frames - 1) * hop_samples + size if n_frames else 0
    return summed.reshape(*outer, -1)[..., :length]


def triangle(size: int) -> NDArray[np.float32]:
    """Weights that rise from the edges to 1 in the middle, and are nowhere 0.

    Source: demucs 4.1.0, apply.py, `apply_model` with transition power 1.

    >>> triangle(4).tolist()
    [0.5, 1.0, 1.0, 0.5]
    """
    half = size // 2
    rising = np.arange(1, half + 1, dtype=np.float32)
    falling = np.arange(size - half, 0, -1, dtype=np.float32)
    return np.asarray(np.concatenate([rising, falling]) / (size - half), np.float32)


class StreamingOverlapAdd:
    """The weighted mean of overlapping pieces, given out as soon as no later piece can change it.

    Piece k covers the samples from `k hop`; pieces are added in order. The mean at a sample is
    sum(weight * piece) / sum(weight) over the pieces that cover it, so pieces of one signal give
    back the signal, whatever the weights.

    Args:
        weights: [size], above 0; a shorter last piece takes the first of them.
        hop_samples: from the start of one piece to the start of the next, at most size.
    """

    def __init__(self, weights: NDArray[np.float32], hop_samples: int) -> None:
        self._weights = weights
        self._hop = hop_samples
        self._sum: Samples | None = None
        self._weight_sum = np.zeros(0, np.float32)

    def push(self, piece: Samples, *, is_last: bool = False) -> Samples:
        """Add the next piece.

        Args:
            piece: [..., t], t at most size, and size for all but the last.
            is_last: whether it is the last.

        Returns:
            [..., t'], the samples that are final now and were not returned before.
        """
        length = piece.shape[-1]
        weights = self._weights[:length]
        pending = 0 if self._sum is None else self._sum.shape[-1]
        total = max(pending, length)
        summed = np.zeros((*piece.shape[:-1], total), np.float32)
        weight_sum = np.zeros(total, np.float32)
        if self._sum is not None:
            summed[..., :pending] = self._sum
            weight_sum[:pending] = self._weight_sum
        summed[..., :length] += weights * piece
        weight_sum[:length] += weights
        final = total if is_last else self._hop
        self._sum, self._weight_sum = summed[..., final:], weight_sum[final:]
        return np.asarray(summed[..., :final] / weight_sum[:final], np.float32)
