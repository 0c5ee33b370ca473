"""Overlap-add: pieces of a signal give back the signal."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from remix.overlap_add import StreamingOverlapAdd, overlap_add, triangle


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_overlap_add_is_the_sum_over_frames(n_frames: int, size: int, hop: int) -> None:
    hop = min(hop, size)
    frames = np.random.default_rng(0).integers(-9, 9, (2, n_frames, size))
    expected = np.zeros((2, (n_frames - 1) * hop + size), frames.dtype)
    for index in range(n_frames):
        expected[:, index * hop : index * hop + size] += frames[:, index]
    np.testing.assert_array_equal(overlap_add(frames, hop), expected)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(2, 60), st.floats(0, 0.9))
def test_overlap_add_of_identity_is_identity(length: int, size: int, overlap: float) -> None:
    hop = max(1, int((1 - overlap) * size))
    signal = np.random.default_rng(length).standard_normal((2, length), np.float32)
    joined = StreamingOverlapAdd(triangle(size), hop)
    starts = range(0, length, hop)
    parts = [
        joined.push(signal[:, start : start + size], is_last=start == starts[-1])
        for start in starts
    ]
    # Up to ten float32 pieces are averaged.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), signal, atol=1e-6)


def test_push_gives_out_all_that_no_later_piece_can_change() -> None:
    joined = StreamingOverlapAdd(triangle(8), 6)
    piece = np.ones((1, 8), np.float32)
    assert [joined.push(piece).shape[1] for _ in range(3)] == [6, 6, 6]
    assert joined.push(piece[:, :3], is_last=True).shape[1] == 3


def test_triangle_is_symmetric_and_positive() -> None:
    for size in (2, 7, 343_980):
        weights = triangle(size)
        np.testing.assert_array_equal(weights, weights[::-1])
        assert weights.min() > 0
        assert weights.max() == 1
