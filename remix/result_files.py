"""remix, stems -> files: what a caller gets, over every transport and from every job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from remix.audio import Audio
from remix.audio_codec import encode
from remix.composer import tracks_of_stems
from remix.manifest import Manifest
from remix.midi import write_midi
from remix.report import MadeRemix, report

MEDIA_TYPES = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".mid": "audio/midi",
    ".json": "application/json",
    ".png": "image/png",
}


def media_type_of(name: str) -> str:
    """Of the content, by the name's suffix.

    >>> media_type_of("stems/vocals.wav")
    'audio/wav'
    """
    return MEDIA_TYPES[PurePosixPath(name).suffix]


def remix_files(
    made: MadeRemix, manifest: Manifest, models_dir: Path
) -> Iterator[tuple[str, bytes]]:
    """All there is of a remix: name and content, made one by one as they are asked for."""
    remix = made.remix
    rate_hz, duration_s = remix.song.sample_rate_hz, remix.song.duration_s
    yield "remix.wav", encode(remix.audio, "wav16")
    yield from stem_files({name: Audio(stem, rate_hz) for name, stem in remix.stems.items()})
    yield "notes.mid", write_midi(tracks_of_stems(remix.band.heard), remix.band.grid, duration_s)
    yield "generated.mid", write_midi(remix.band.written, remix.band.grid, duration_s)
    yield "voice.wav", encode(remix.voice.audio, "wav")
    facts, picture = report(made, manifest, models_dir)
    yield "report.json", json.dumps(facts, indent=2).encode()
    yield "report.png", picture


def stem_files(stems: Mapping[str, Audio]) -> Iterator[tuple[str, bytes]]:
    """Stems, as they came out of the separation: floats, not clipped."""
    for name, stem in stems.items():
        yield f"stems/{name}.wav", encode(stem, "wav")
