"""names and shapes of a checkpoint's arrays -> an error that lists what is amiss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from remix.errors import InvalidModel


def require_same_names(
    path: Path, found: Mapping[str, NDArray[Any]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares a checkpoint with the network that it is for.

    Args:
        path: of the checkpoint, for the message.
        found: its arrays.
        wanted: shape of each of the network's.

    Raises:
        InvalidModel: an array is missing, unexpected or of another shape; all are listed.
    """
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    unexpected = [f"{name} {list(found[name].shape)}" for name in found if name not in wanted]
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names
        )
        raise InvalidModel(f"{path} is not of this architecture: {lists}.")
