"""The demo song, sung and played, at a rate and in a length: what exports are compared on."""

from __future__ import annotations

import asyncio
from functools import cache

import numpy as np
from numpy.typing import NDArray

from export.demo_song import write_demo_song
from remix.audio import Samples
from remix.audio_codec import Limits, decode
from remix.manifest import MANIFEST_PATH
from remix.resample import resample, to_mono

STAGGER_S = 1.7
"""How much later the next excerpt of a batch begins, so that rows differ."""


@cache
def song(sample_rate_hz: int) -> Samples:
    """[2, T]: all 10.9 s of it."""
    path = MANIFEST_PATH.parent / ".cache" / "demo_song.mp3"
    write_demo_song(path, path.parent / "sources")
    audio = asyncio.run(decode(path, Limits()))
    return resample(audio.samples, audio.sample_rate_hz, sample_rate_hz)


def mono_song(sample_rate_hz: int, seconds: float, batch: int) -> NDArray[np.float32]:
    """[batch, seconds * sample_rate_hz]: excerpts that begin 1.7 s apart, over and over."""
    mono = to_mono(song(sample_rate_hz))[0]
    index = np.arange(round(seconds * sample_rate_hz))
    starts = np.round(np.arange(batch) * STAGGER_S * sample_rate_hz).astype(np.int64)
    return np.ascontiguousarray(mono[(starts[:, None] + index) % len(mono)])
