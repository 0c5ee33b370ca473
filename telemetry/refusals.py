"""Errors that callers were answered with, of every transport."""

from __future__ import annotations

from prometheus_client import Counter

REFUSALS = Counter(
    "philharmonics_refusals",
    "Requests that were answered with an error, by its type",
    ["transport", "reason"],
)
