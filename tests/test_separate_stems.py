"""Separation as a flow, with a model that is a known function of its window."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from remix.audio import Audio
from remix.errors import InvalidAudio, InvalidModel, RunnerUnavailable
from remix.manifest import ModelEntry
from remix.separate_stems import (
    Separator,
    StemsChunk,
    cut_window,
    join_chunks,
    separate_stems,
)
from remix.stages import Stage, Tensors
from runners.separate_stems import HTDemucs, SeparationModel, Spleeter

SEPARATOR = Separator("toy", ("half", "rest"), 44_100, 100, 0.25, is_normalised=False)


class Halver:
    """`Infer`: the first stem is a quarter of the mixture, the second the rest."""

    def __init__(self, fails_at: int = -1) -> None:
        self.now = self.most = self.calls = 0
        self.fails_at = fails_at

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        self.calls += 1
        call = self.calls
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            # A later window may well be ready before an earlier one.
            await asyncio.sleep(0.001 * (call % 3))
            if call == self.fails_at:
                raise RunnerUnavailable("gone")
            mixture = inputs["mixture"]
            return {"stems": np.stack([mixture / 4, mixture * 3 / 4], axis=1)}
        finally:
            self.now -= 1


def song_of(length: int, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).standard_normal((2, length), np.float32), 44_100)


def separated(
    song: Audio, separator: Separator = SEPARATOR, infer: Halver | None = None
) -> dict[str, NDArray[np.float32]]:
    return asyncio.run(join_chunks(separate_stems(song, separator, infer or Halver())))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.booleans())
def test_separation_by_gains_gives_the_song_times_the_gains(length: int, normalise: bool) -> None:
    song = song_of(length, seed=length)
    stems = separated(song, replace(SEPARATOR, is_normalised=normalise))
    # The mean goes to every stem (as in demucs), so gains hold for what is left of it.
    mean = song.samples.mean() if normalise else 0.0
    for name, gain in {"half": 0.25, "rest": 0.75}.items():
        # Normalising and undoing it costs two float32 roundings.
        np.testing.assert_allclose(stems[name] - mean, gain * (song.samples - mean), atol=3e-6)


def test_chunks_follow_each_other_and_the_first_comes_after_one_window() -> None:
    async def scenario() -> tuple[list[StemsChunk], int]:
        infer = Halver()
        chunks = separate_stems(song_of(1000), SEPARATOR, infer, windows_ahead=2)
        first = await anext(chunks)
        calls_before_first = infer.calls
        return [first, *[chunk async for chunk in chunks]], calls_before_first

    chunks, calls_before_first = asyncio.run(scenario())
    assert calls_before_first <= 2
    assert [chunk.start_sample for chunk in chunks] == list(range(0, 1000, 75))
    assert sum(chunk.stems["half"].shape[1] for chunk in chunks) == 1000


@pytest.mark.parametrize("windows_ahead", [1, 2, 5])
def test_no_more_windows_are_in_flight_than_allowed(windows_ahead: int) -> None:
    async def scenario() -> int:
        infer = Halver()
        async for _ in separate_stems(song_of(2000), SEPARATOR, infer, windows_ahead=windows_ahead):
            pass
        return infer.most

    assert asyncio.run(scenario()) == windows_ahead


def test_closing_the_stream_cancels_what_is_in_flight() -> None:
    async def scenario() -> int:
        infer = Halver()
        chunks = separate_stems(song_of(2000), SEPARATOR, infer, windows_ahead=4)
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        return infer.now

    assert asyncio.run(scenario()) == 0


def test_a_failing_window_fails_the_stream_and_leaves_nothing_in_flight() -> None:
    infer = Halver(fails_at=3)
    with pytest.raises(RunnerUnavailable):
        separated(song_of(2000), infer=infer)
    assert infer.now == 0


def test_progress_rises_to_one() -> None:
    told: list[tuple[Stage, float]] = []

    async def scenario() -> None:
        chunks = separate_stems(
            song_of(500), SEPARATOR, Halver(), progress=lambda *step: told.append(step)
        )
        async for _ in chunks:
            pass

    asyncio.run(scenario())
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert told[-1] == ("separate_stems", 1.0)


def test_silence_is_silent_and_asks_no_model() -> None:
    infer = Halver()
    for is_normalised in (False, True):
        separator = replace(SEPARATOR, is_normalised=is_normalised)
        stems = separated(Audio(np.zeros((2, 450), np.float32), 44_100), separator, infer)
        assert not any(samples.any() for samples in stems.values())
    assert infer.calls == 0


def test_normalisation_of_opposite_channels_stays_within_reason() -> None:
    class Loudest(Halver):
        loudest = 0.0

        async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
            self.loudest = max(self.loudest, float(np.abs(inputs["mixture"]).max()))
            return await super().__call__(model, inputs)

    left = np.random.default_rng(0).standard_normal((1, 450), np.float32)
    infer = Loudest()
    song = Audio(np.concatenate([left, -left]), 44_100)
    stems = separated(song, replace(SEPARATOR, is_normalised=True), infer)
    # Noise of deviation 1 has its largest of 900 samples near 3.3; demucs would send 1e8.
    assert infer.loudest < 5
    np.testing.assert_allclose(stems["half"], song.samples / 4, atol=1e-6)


@pytest.mark.parametrize(
    "song",
    [
        Audio(np.zeros((2, 0), np.float32), 44_100),
        Audio(np.zeros((1, 9), np.float32), 44_100),
        Audio(np.zeros((2, 9), np.float32), 48_000),
    ],
    ids=["empty", "mono", "rate"],
)
def test_audio_that_does_not_fit_is_refused(song: Audio) -> None:
    with pytest.raises(InvalidAudio):
        separated(song)


def test_cut_window_shows_the_songs_own_neighbours() -> None:
    song = np.arange(1.0, 201.0, dtype=np.float32)[None]
    window, offset = cut_window(song, 150, 100)
    assert offset == 25
    np.testing.assert_array_equal(window[0, :75], np.arange(126, 201))
    assert not window[0, 75:].any()


def entry_of(**facts: Any) -> ModelEntry:
    return ModelEntry(
        name="toy", stage="separate_stems", rank=0, weights="random", licence="", source="",
        quality="", sample_rate_hz=44_100, max_batch={"cpu": 1}, files=(), facts=facts,
    )  # fmt: skip


FACTS = {"window_samples": 16_384, "overlap": 0.25, "is_normalised": False}


def test_separator_without_a_fact_is_an_invalid_model() -> None:
    with pytest.raises(InvalidModel, match="stems"):
        Separator.of(entry_of(**FACTS))


def test_spleeter_stems_sum_to_the_mixture() -> None:
    def graph(inputs: Tensors) -> dict[str, NDArray[Any]]:
        return {"vocals_mask": np.full_like(inputs["magnitudes"], 0.25)}

    model: SeparationModel = Spleeter(entry_of(stems=["vocals", "rest"], **FACTS), graph, "cpu")
    mixture = np.random.default_rng(0).standard_normal((3, 2, 16_384), np.float32)
    stems = model({"mixture": mixture})["stems"]
    # A constant mask is a gain: the transforms undo each other, to float32.
    np.testing.assert_allclose(stems[:, 0], mixture / 4, atol=1e-5)
    np.testing.assert_allclose(stems.sum(axis=1), mixture, atol=1e-5)


def test_htdemucs_adds_both_branches() -> None:
    def graph(inputs: Tensors) -> dict[str, NDArray[Any]]:
        assert inputs["spectra"].shape == (2, 2, 16, 2048, 2)
        return {
            "spectra_stems": np.stack([inputs["spectra"] * gain for gain in (1.0, 0.5)], axis=1),
            "wave_stems": np.stack([inputs["mixture"] * gain for gain in (0.0, 2.0)], axis=1),
        }

    model = HTDemucs(entry_of(stems=["a", "b"], **FACTS), graph, "cpu")
    at = np.arange(16_384)
    tone = np.cos(2 * np.pi * 0.01 * at).astype(np.float32)
    stems = model({"mixture": np.broadcast_to(tone, (2, 2, 16_384)).copy()})["stems"]
    inner = slice(4096, -4096)  # the frames that demucs takes to be silent reach 2560 samples in
    np.testing.assert_allclose(stems[1, 0, :, inner], np.stack([tone[inner]] * 2), atol=1e-4)
    np.testing.assert_allclose(stems[1, 1, :, inner], np.stack([tone[inner]] * 2) * 2.5, atol=1e-4)


def test_join_chunks_is_what_collecting_them_gives() -> None:
    async def chunks() -> AsyncIterator[StemsChunk]:
        for start in (0, 3):
            yield StemsChunk(start, {"a": np.full((2, 3), start, np.float32)})

    joined = asyncio.run(join_chunks(chunks()))
    np.testing.assert_array_equal(joined["a"][0], [0, 0, 0, 3, 3, 3])


GRAPHS = Path(__file__).parent.parent / "starter" / "graphs"


@pytest.mark.parametrize("name", ["spleeter-2stems", "htdemucs"])
def test_committed_graph_has_no_weights_and_names_no_folder(name: str) -> None:
    graph = (GRAPHS / f"{name}.onnx").read_bytes()
    assert len(graph) < 2e6
    assert b"site-packages" not in graph
