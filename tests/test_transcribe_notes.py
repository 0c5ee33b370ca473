"""Transcription as a flow: windows, streams, silence; and the decoding's properties."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remix.errors import InvalidModel, RunnerUnavailable
from remix.manifest import ModelEntry
from remix.notes import Note
from remix.piano_roll import DecodingOptions, decode_notes, frame_times_s, to_notes
from remix.resample import resample, to_mono
from remix.separate_stems import StemsChunk
from remix.stages import Tensors
from remix.transcribe_notes import (
    TRIMMED_FRAMES,
    WINDOW_HOP_SAMPLES,
    StemTranscription,
    Transcriber,
    transcribe_stems,
)

TRANSCRIBER = Transcriber("toy", "audio", "note", "onset")


class LoudnessAsNotes:
    """`Infer`: frame n of key k sounds as loud as the window's sample 256 n (the same for all k).

    So the joined posteriors show which samples the windows were cut from.
    """

    def __init__(self) -> None:
        self.windows: list[NDArray[np.float32]] = []
        self.now = self.most = 0

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        self.windows.append(inputs["audio"][0, :, 0])
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        frames = np.abs(inputs["audio"][:, ::256, 0])[:, :172]
        roll = np.repeat(frames[:, :, None], 88, axis=2)
        return {"note": roll, "onset": roll * 0}


def windows_of(pieces: list[NDArray[np.float32]], rate_hz: int) -> list[NDArray[np.float32]]:
    async def scenario() -> list[NDArray[np.float32]]:
        infer = LoudnessAsNotes()
        stream = StemTranscription(rate_hz, TRANSCRIBER, infer)
        for piece in pieces:
            await stream.push(piece)
        await stream.finish()
        assert infer.most <= 8
        return infer.windows

    return asyncio.run(scenario())


def upstream_windows(audio: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """basic-pitch 0.4.0, inference.py, `get_audio_input` and `window_audio_file`."""
    padded = np.concatenate([np.zeros(3840, np.float32), audio])
    return [
        np.pad(padded[i : i + 43_844], (0, max(0, 43_844 - len(padded[i : i + 43_844]))))
        for i in range(0, len(padded), 36_164)
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 160_000), st.integers(1, 7))
def test_windows_of_a_stream_are_upstreams_windows_of_the_whole(length: int, pieces: int) -> None:
    audio = 0.1 + np.random.default_rng(length).random((2, length), np.float32)
    cuts = np.sort(np.random.default_rng(pieces).integers(0, length + 1, pieces - 1))
    got = windows_of(np.split(audio, cuts, axis=1), 44_100)
    expected = upstream_windows(resample(to_mono(audio), 44_100, 22_050)[0])
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_silent_windows_are_not_sent_and_have_no_notes() -> None:
    async def scenario() -> tuple[list[Note], int]:
        infer = LoudnessAsNotes()
        stream = StemTranscription(22_050, TRANSCRIBER, infer)
        await stream.push(np.zeros((1, 200_000), np.float32))
        return await stream.finish(), len(infer.windows)

    assert asyncio.run(scenario()) == ([], 0)


def test_no_number_in_the_posteriors_is_no_note() -> None:
    class NoNumber(LoudnessAsNotes):
        async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
            outputs = await super().__call__(model, inputs)
            return {name: array * np.nan for name, array in outputs.items()}

    async def scenario() -> list[Note]:
        stream = StemTranscription(22_050, TRANSCRIBER, NoNumber())
        await stream.push(np.ones((1, 50_000), np.float32))
        return await stream.finish()

    assert asyncio.run(scenario()) == []


async def chunks_of(stems: dict[str, NDArray[np.float32]]) -> AsyncIterator[StemsChunk]:
    for start in range(0, 90_000, 30_000):
        yield StemsChunk(start, {n: s[:, start : start + 30_000] for n, s in stems.items()})


def test_pitched_stems_are_transcribed_one_by_one() -> None:
    tone = 0.5 * np.ones((2, 90_000), np.float32)
    stems = {"drums": tone, "vocals": tone, "bass": tone, "other": 0 * tone}
    notes = asyncio.run(transcribe_stems(chunks_of(stems), 44_100, TRANSCRIBER, LoudnessAsNotes()))
    assert set(notes) == {"bass", "other"}
    assert notes["bass"]
    assert not notes["other"]


def test_a_failing_window_fails_the_transcription() -> None:
    class Failing(LoudnessAsNotes):
        async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
            raise RunnerUnavailable("gone")

    stems = {"bass": np.ones((2, 90_000), np.float32)}
    with pytest.raises(RunnerUnavailable):
        asyncio.run(transcribe_stems(chunks_of(stems), 44_100, TRANSCRIBER, Failing()))


def test_transcriber_without_a_fact_is_an_invalid_model() -> None:
    entry = ModelEntry(
        name="toy", stage="transcribe_notes", rank=0, weights="random", licence="", source="",
        quality="", sample_rate_hz=22_050, max_batch={"cpu": 1}, files=(), facts={},
    )  # fmt: skip
    with pytest.raises(InvalidModel, match="tensors"):
        Transcriber.of(entry)


def roll_with(*notes: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Posteriors of notes (start, end, key)."""
    frames, onsets = np.zeros((2, 300, 88), np.float32)
    for start, end, key in notes:
        frames[start:end, key] = 0.8
        onsets[start, key] = 0.9
    return frames, onsets


def test_decode_notes_finds_what_was_written() -> None:
    written = [(10, 40, 3), (20, 60, 40), (60, 100, 40), (100, 250, 87), (120, 150, 0)]
    heard = decode_notes(*roll_with(*written))
    assert sorted((n.onset_frame, n.end_frame, n.pitch - 21) for n in heard) == written
    assert all(n.amplitude == pytest.approx(0.8) for n in heard)


def test_decode_notes_without_onsets_finds_notes_by_their_energy() -> None:
    frames, onsets = roll_with((10, 40, 3))
    frames[5:12, 3] = np.linspace(0.31, 0.8, 7)  # no jump that would count as an onset
    heard = decode_notes(frames, onsets * 0)
    assert [(n.onset_frame, n.end_frame, n.pitch) for n in heard] == [(5, 39, 24)]


def test_decode_notes_drops_what_is_not_longer_than_the_shortest() -> None:
    assert not decode_notes(*roll_with((10, 21, 3)))
    assert decode_notes(*roll_with((10, 22, 3)))
    assert decode_notes(*roll_with((10, 21, 3)), DecodingOptions(shortest_note_ms=50))


@pytest.mark.parametrize("n_frames", [0, 1, 2, 3, 10])
def test_decode_notes_of_next_to_nothing_is_nothing(n_frames: int) -> None:
    frames = np.full((n_frames, 88), 0.9, np.float32)
    assert decode_notes(frames, frames) == []


def test_decode_notes_leaves_its_input_alone() -> None:
    frames, onsets = roll_with((10, 40, 3))
    before = frames.copy(), onsets.copy()
    decode_notes(frames, onsets)
    np.testing.assert_array_equal((frames, onsets), before)


def test_frame_times_do_not_drift() -> None:
    # 142 frames are kept of a window, and windows are 36,164 samples apart.
    kept = 172 - 2 * TRIMMED_FRAMES
    n_windows = 200
    starts_s = frame_times_s(kept * n_windows)[::kept]
    expected_s = np.arange(n_windows) * WINDOW_HOP_SAMPLES / 22_050
    # Upstream counts a window as 172 frames instead of 142 and makes up for it by a constant:
    # one such constant (10 ms) stays, and does not grow by the 5.2 ms a second of a plain count.
    assert np.abs(starts_s - expected_s).max() < 0.012


def test_to_notes_are_sorted_and_velocities_are_midi() -> None:
    notes = to_notes(decode_notes(*roll_with((100, 150, 3), (10, 40, 3))), 300)
    assert notes == sorted(notes)
    assert [note.velocity for note in notes] == [102, 102]
    assert all(note.duration_s > 0 for note in notes)
