"""What `benchmarks/eval_generate.py` measures, part by part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A figure and its limit.

    Args:
        name: what was measured.
        value: as it is said.
        limit: in words.
        holds: whether it is kept.
    """

    name: str
    value: str
    limit: str
    holds: bool
