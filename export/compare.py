"""original, artefact -> where and by how much they differ.

Two halves. What comes out is compared, on real audio, at several lengths and batch sizes: that
shows that the graph computes what the original computes. And the arrays in the file are compared
with the checkpoint's, to the bit: that shows that every weight is right, also one that is wrong by
so little, or counts for so little, that no output tells (one of a thousand biases).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.exporter import Arrays, Case, Original, ServedCall

NOTHING = 1e-9
"""Of full scale: an output that stays below this is silence, whose difference is absolute."""


@dataclass(frozen=True)
class Bounds:
    """What a comparison must hold.

    Args:
        largest_relative: largest difference by largest value, of every output.
        si_sdr_db: of outputs that are sound. Le Roux et al. 2019, "SDR - half-baked or well done?"
        of_all: whether that is asked of every output.
    """

    largest_relative: float
    si_sdr_db: float
    of_all: bool = False


FP32 = Bounds(1e-3, 60.0)
REDUCED = Bounds(float("inf"), 30.0, of_all=True)
"""Of fp16, int8 and bf16 variants."""


@dataclass(frozen=True)
class Difference:
    """Of one output, on one case.

    Args:
        case: its name.
        output: its name.
        shape: of the output.
        largest_absolute: largest |difference|.
        largest_relative: that, by the largest |value| of the original; by 1 where that is silent.
        si_sdr_db: scale-invariant signal-to-distortion ratio against the original; None where
            the original is silent.
    """

    case: str
    output: str
    shape: tuple[int, ...]
    largest_absolute: float
    largest_relative: float
    si_sdr_db: float | None

    def breaks(self, bounds: Bounds, is_sound: bool) -> bool:
        """Whether a bound is broken (or the difference is no number)."""
        quiet = not self.largest_relative <= bounds.largest_relative
        if self.si_sdr_db is None or not (is_sound or bounds.of_all):
            return quiet
        return quiet or not self.si_sdr_db >= bounds.si_sdr_db


def differences(
    original: Original, served: ServedCall, cases: Iterable[Case]
) -> Iterator[Difference]:
    """Compute every case by both, and compare every output that the artefact gives."""
    for case in cases:
        expected = original.reference(case.inputs)
        yield from compared(case.name, expected, original.served(served, case.inputs))


def compared(case: str, expected: Arrays, found: Arrays) -> Iterator[Difference]:
    """The differences of all outputs of a case."""
    for name in sorted(expected):
        yield difference(case, name, expected[name], found[name])


def difference(
    case: str, name: str, expected: NDArray[np.float32], found: NDArray[np.float32]
) -> Difference:
    """Of two arrays; of other shapes, or with numbers that are none, it is infinite."""
    if expected.shape != found.shape:
        return Difference(case, name, found.shape, np.inf, np.inf, -np.inf)
    largest = float(np.abs(expected).max(initial=0.0))
    absolute = float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))
    absolute = absolute if np.isfinite(absolute) else np.inf
    is_silent = largest <= NOTHING
    return Difference(
        case=case,
        output=name,
        shape=expected.shape,
        largest_absolute=absolute,
        largest_relative=absolute / (1.0 if is_silent else largest),
        si_sdr_db=None if is_silent else si_sdr_db(expected, found),
    )


def si_sdr_db(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Scale-invariant signal-to-distortion ratio, over all channels and rows together.

    >>> tone = np.sin(np.arange(1000, dtype=np.float32))
    >>> round(si_sdr_db(tone, 2 * tone + 0.002 * np.cos(np.arange(1000))), 0)
    60.0
    """
    target, estimate = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    projection = target * (float(target @ estimate) / float(target @ target))
    error = estimate - projection
    ratio = float(projection @ projection) / max(float(error @ error), 1e-300)
    return min(10.0 * math.log10(max(ratio, 1e-30)), 200.0)


def wrong_arrays(wanted: Arrays, found: Arrays) -> list[str]:
    """Arrays of a file that are not the checkpoint's, each in a line that says why.

    An array that another one equals may stand there under the other's name: the exporter stores
    what is equal once.

    >>> wrong_arrays({"bias": np.ones(2)}, {"bias": np.array([1.0, 1.01])})
    ['bias differs in 1 of 2 numbers']
    """
    problems = []
    for name, expected in wanted.items():
        if name not in found:
            if not any(same(expected, array) for array in found.values()):
                problems.append(f"{name} {list(expected.shape)} is not in the graph")
        elif found[name].shape != expected.shape or found[name].dtype != expected.dtype:
            problems.append(
                f"{name} is {found[name].dtype} {list(found[name].shape)}, the checkpoint has "
                f"{expected.dtype} {list(expected.shape)}"
            )
        elif not same(found[name], expected):
            count = int((found[name] != expected).sum())
            problems.append(f"{name} differs in {count} of {expected.size} numbers")
    return problems


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """To the bit, in type and shape too."""
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)


def initializers(graph: Path) -> Arrays:
    """Every array that stands in an ONNX file."""
    model = onnx.load(graph)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
