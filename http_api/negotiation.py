"""Accept -> the media type to answer in (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence

from http_api.problems import Refusal

ALIASES = {
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "audio/mp3": "audio/mpeg",
    "audio/x-midi": "audio/midi",
    "audio/mid": "audio/midi",
}
"""Other names under which clients ask for the same."""


def choose(accept: str | None, offers: Sequence[str]) -> str:
    """The offer that the caller likes best; the first offer where the caller does not mind.

    Args:
        accept: the header, if there was one.
        offers: media types, the preferred first.

    Raises:
        Refusal: 406, nothing on offer is acceptable.

    >>> choose("audio/flac;q=0.5, audio/mpeg", ["audio/wav", "audio/flac", "audio/mpeg"])
    'audio/mpeg'
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [_range(part) for part in accept.split(",") if part.strip()]
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise Refusal(
            406,
            f"Accept is {accept!r}; this route answers with one of {', '.join(offers)}.",
            value=accept,
            limit=list(offers),
            remedy=f"Send Accept: {offers[0]}.",
        )
    return best


def _range(part: str) -> tuple[str, float]:
    media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = min(1.0, max(0.0, float(value)))
            except ValueError:
                quality = 0.0
    return ALIASES.get(media_type, media_type), quality


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Of the most specific range that covers the offer."""
    for pattern in (offer, offer.split("/")[0] + "/*", "*/*"):
        for media_type, quality in ranges:
            if media_type == pattern:
                return quality
    return 0.0
