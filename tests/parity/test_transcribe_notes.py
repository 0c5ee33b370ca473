"""Transcription through the runner's model against basic-pitch's own, on real music."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from export.demo_song import write_demo_song
from remix.audio_codec import decode
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.piano_roll import HeardNote, decode_notes, frame_times_s
from remix.resample import to_mono
from remix.settings import read_settings
from remix.stages import Tensors
from remix.transcribe_notes import StemTranscription, Transcriber
from runners.transcribe_notes import BasicPitch

with warnings.catch_warnings():  # upstream's libraries are of their own time
    warnings.simplefilter("ignore")
    inference = importlib.import_module("basic_pitch.inference")
    note_creation = importlib.import_module("basic_pitch.note_creation")

Roll = NDArray[np.float32]


def upstream_notes(frames: Roll, onsets: Roll) -> list[HeardNote]:
    """basic-pitch's decoding at its command's defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides 0 by 0 where nothing rises
        found = note_creation.output_to_notes_polyphonic(
            frames.copy(), onsets.copy(), onset_thresh=0.5, frame_thresh=0.3, min_note_len=11,
            infer_onsets=True, max_freq=None, min_freq=None,
        )  # fmt: skip
    return [HeardNote(int(a), int(b), int(pitch), float(mean)) for a, b, pitch, mean in found]


def noise(random: np.random.Generator, n_frames: int) -> tuple[Roll, Roll]:
    """Posteriors without any structure."""
    frames, onsets = random.random((2, n_frames, 88), np.float32)
    return frames, onsets**3


def waves(random: np.random.Generator, n_frames: int) -> tuple[Roll, Roll]:
    """Posteriors that rise and fall slowly, louder in some keys."""
    walk = random.standard_normal((n_frames, 88)).cumsum(axis=0) * 0.15
    frames = np.abs(walk % 2 - 1) * random.random((1, 88)) ** 2
    return frames.astype(np.float32), random.random((n_frames, 88), np.float32) ** 6


def ties(random: np.random.Generator, n_frames: int) -> tuple[Roll, Roll]:
    """Posteriors of nine levels, so that most of them are equal to another."""
    frames, onsets = random.random((2, n_frames, 88), np.float32)
    return np.round(frames * 8) / 8, np.round(onsets**4 * 8) / 8


@pytest.mark.parametrize("make", [noise, waves, ties])
@pytest.mark.parametrize("n_frames", [9, 200, 901])
def test_decoded_notes_are_identical(make: Any, n_frames: int) -> None:
    frames, onsets = make(np.random.default_rng(n_frames), n_frames)
    assert decode_notes(frames, onsets) == upstream_notes(frames, onsets)


def test_frame_times_are_identical() -> None:
    np.testing.assert_array_equal(frame_times_s(5000), note_creation.model_frames_to_time(5000))


def test_notes_of_a_song_are_identical(tmp_path: Path) -> None:
    write_demo_song(tmp_path / "song.mp3", MANIFEST_PATH.parent / ".cache" / "sources")
    audio = asyncio.run(decode(tmp_path / "song.mp3", new_hz=22_050))
    mono = to_mono(audio.samples)
    soundfile.write(tmp_path / "song.wav", mono[0], 22_050, "FLOAT")

    settings = read_settings()
    entry = read_manifest()["basic-pitch"]
    assert entry.is_installed(settings.models_dir), "run `python -m export.install`"
    served = BasicPitch(entry, settings)

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return await asyncio.to_thread(served, inputs)

    async def transcribe() -> list[Any]:
        stream = StemTranscription(22_050, Transcriber.of(entry), infer)
        for piece in np.array_split(mono, 7, axis=1):
            await stream.push(piece)
        return await stream.finish()

    ours = asyncio.run(transcribe())

    model = inference.Model(settings.models_dir / entry.files[0].path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = inference.run_inference(tmp_path / "song.wav", model)
        _, events = note_creation.model_output_to_notes(output, 0.5, 0.3, min_note_len=11)
    theirs = sorted(
        (float(start), float(end) - float(start), int(pitch), int(np.round(127 * amplitude)))
        for start, end, pitch, amplitude, _ in events
    )
    assert len(theirs) > 50
    assert [(n.onset_s, n.duration_s, n.pitch, n.velocity) for n in ours] == theirs


def test_batches_equal_single_windows() -> None:
    settings = read_settings()
    served = BasicPitch(read_manifest()["basic-pitch"], settings)
    (audio,) = served.inputs
    windows = np.random.default_rng(0).standard_normal((3, 43_844, 1), np.float32)
    together = served({audio.name: windows})
    for index in range(3):
        alone = served({audio.name: windows[index : index + 1]})
        for name, array in together.items():
            np.testing.assert_array_equal(array[index : index + 1], alone[name])
