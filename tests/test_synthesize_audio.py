"""A band of samples: what it plays is there, on time, and the same in windows as whole."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from remix.audio import Samples
from remix.errors import InvalidModel, InvalidOption
from remix.generate_notes import NotesChunk
from remix.manifest import read_manifest
from remix.midi import without_overlaps
from remix.notes import ROLES, Note, Role, Tracks
from remix.stages import Stage, Tensors
from remix.synthesize_audio import (
    OUTPUT,
    PROGRAM,
    Synthesizer,
    join_chunks,
    program_of,
    synthesize_audio,
    synthesize_tracks,
)
from runners.soundfont_player import SoundFontPlayer
from runners.synthesize_audio import SampledBand
from tests.conftest import ROOT

ENTRY = read_manifest()["musescore-general"]
SYNTHESIZER = Synthesizer.of(ENTRY)
RATE_HZ = SYNTHESIZER.sample_rate_hz

INAUDIBLE = 1e-4
"""-80 dBFS: the manifest's tails are cut there."""


@pytest.fixture(scope="module")
def player() -> SoundFontPlayer:
    path = Path(ENTRY.origin["path"])
    assert path.is_file(), f"install the system package {ENTRY.origin['package']}"
    return SoundFontPlayer(path, RATE_HZ)


class Band:
    """An `Infer` over the real player, in this process, that notes what was asked."""

    def __init__(self, player: SoundFontPlayer, synthesizer: Synthesizer) -> None:
        facts = {"window_samples": synthesizer.window_samples, "tail_s": synthesizer.tail_s}
        self._model = SampledBand(replace(ENTRY, facts=facts), player)
        self.programs: list[int] = []

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        self.programs.append(int(inputs[PROGRAM][0, 0]))
        return await asyncio.to_thread(self._model, inputs)


def windows_of(seconds: float) -> Synthesizer:
    return replace(SYNTHESIZER, window_samples=64 * round(seconds * RATE_HZ / 64))


def busy_tracks(duration_s: float) -> Tracks:
    """Notes of all lengths, many of them across every window's edge."""
    rng = np.random.default_rng(0)
    drum_keys, tracks = [36, 38, 42, 46, 49, 51], {}
    for role in ROLES:
        notes = []
        for _ in range(round(duration_s * 4)):
            pitch = rng.choice(drum_keys) if role == "drums" else rng.integers(33, 96)
            length_s = 0.1 if role == "drums" else rng.uniform(0.1, 4.0)
            onset_s, velocity = rng.uniform(0, duration_s), rng.integers(30, 128)
            notes.append(Note(float(onset_s), float(length_s), int(pitch), int(velocity)))
        tracks[role] = without_overlaps(notes)
    return tracks


def test_windows_joined_are_the_whole(player: SoundFontPlayer) -> None:
    duration_s = 12.0
    length, tracks = round(duration_s * RATE_HZ), busy_tracks(duration_s)
    stems = {}
    for window_s in (2.0, duration_s + 1):
        synthesizer = windows_of(window_s)
        band = Band(player, synthesizer)
        stems[window_s] = asyncio.run(synthesize_tracks(tracks, length, synthesizer, band))
    for role in ROLES:
        whole, joined = stems[duration_s + 1][role], stems[2.0][role]
        assert whole.shape == joined.shape == (2, length)
        assert np.abs(whole).max() > 0.05
        # Notes that have rung out are left out of a window, each below the tail's threshold. A
        # voice's first block depends on the voice that had its place: see the player.
        difference = np.abs(whole - joined)
        edges = range(64 * round(2.0 * RATE_HZ / 64), length, 64 * round(2.0 * RATE_HZ / 64))
        assert max(difference[:, at : at + 64].max() for at in edges) < INAUDIBLE
        # And of everything at most a block in a hundred differs audibly.
        audible = (difference.max(axis=0) > INAUDIBLE).mean()
        assert audible < 0.01


@pytest.mark.parametrize("role", ROLES)
def test_note_sounds_when_and_as_high_as_it_is_written(player: SoundFontPlayer, role: Role) -> None:
    tracks: Tracks = {role: [Note(1.0, 0.5, 36 if role == "drums" else 57, 100)]}
    synthesizer = windows_of(4.0)
    stems = asyncio.run(
        synthesize_tracks(tracks, 4 * RATE_HZ, synthesizer, Band(player, synthesizer))
    )
    assert list(stems) == [role]
    level = np.abs(stems[role]).max(axis=0)
    assert level[: RATE_HZ - 64].max() == 0  # nothing before the block in which it begins
    assert level[RATE_HZ : RATE_HZ + 4_410].max() > 0.01
    if role != "drums":
        spectrum = np.abs(np.fft.rfft(stems[role].sum(axis=0)[RATE_HZ : RATE_HZ * 3 // 2]))
        harmonics = spectrum[[round(220 * k / 2) for k in (1, 2)]]  # bins of 2 Hz
        assert harmonics.max() > 0.5 * spectrum.max()


def test_tails_of_the_manifest_are_long_enough(player: SoundFontPlayer) -> None:
    for role in ROLES:
        pitches = (38, 46, 49, 52, 57) if role == "drums" else (28, 45, 64, 89, 93)
        tail, length = round(SYNTHESIZER.tail_s[role] * RATE_HZ), 64 * (7 * RATE_HZ // 64)
        for pitch in pitches:
            note = np.array([[0, RATE_HZ / 2, pitch, 127]], np.float32)
            sound = player.render(note, program_of(role), length)
            assert np.abs(sound[:, RATE_HZ // 2 + tail :]).max() < INAUDIBLE, (role, pitch)


def test_same_notes_give_the_same_samples_whatever_was_played_before(
    player: SoundFontPlayer,
) -> None:
    notes = np.array([[0, 20_000, 60, 100], [9_000, 9_000, 64, 90]], np.float32)
    first = player.render(notes, 0, 64 * 1000)
    player.render(np.array([[0, 90_000, 50, 127]], np.float32), 48, 64 * 1000)
    assert np.array_equal(first, player.render(notes, 0, 64 * 1000))


def test_windows_begin_while_notes_are_still_being_written(player: SoundFontPlayer) -> None:
    synthesizer = windows_of(1.0)
    band = Band(player, synthesizer)
    seen = []

    async def chunks() -> AsyncIterator[NotesChunk]:
        for start in range(4):
            yield NotesChunk(start, start + 1.01, {"piano": [Note(start, 0.5, 60, 90)]})
            while not len(band.programs) > start:  # the window that this chunk completes
                await asyncio.sleep(0.001)
            seen.append(len(band.programs))

    progress: list[float] = []

    def note_progress(stage: Stage, fraction: float) -> None:
        progress.append(fraction)

    async def played() -> dict[Role, Samples]:
        sounds = synthesize_audio(chunks(), 4 * RATE_HZ, synthesizer, band, progress=note_progress)
        return await join_chunks(sounds, 4 * RATE_HZ)

    stems = asyncio.run(played())
    assert seen == [1, 2, 3, 4]
    assert stems["piano"].shape == (2, 4 * RATE_HZ)
    assert progress[-1] == 1
    assert progress == sorted(progress)


def test_silent_windows_and_absent_roles_cost_nothing(player: SoundFontPlayer) -> None:
    synthesizer = windows_of(1.0)
    band = Band(player, synthesizer)
    tracks: Tracks = {"drums": [], "bass": [Note(7.2, 0.2, 40, 90)]}
    stems = asyncio.run(synthesize_tracks(tracks, 9 * RATE_HZ, synthesizer, band))
    assert list(stems) == ["bass"]
    assert band.programs == [program_of("bass")]
    assert asyncio.run(synthesize_tracks({}, 9 * RATE_HZ, synthesizer, band)) == {}


def test_failure_of_a_window_is_told_and_ends_the_others(player: SoundFontPlayer) -> None:
    cancelled = []

    async def failing(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        if inputs[PROGRAM][0, 0] == program_of("bass"):
            raise InvalidModel("no bass")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return {OUTPUT: np.zeros((1, 2, SYNTHESIZER.window_samples), np.float32)}

    note = [Note(0.0, 1.0, 60, 90)]
    with pytest.raises(InvalidModel, match="no bass"):
        asyncio.run(synthesize_tracks({"piano": note, "bass": note}, RATE_HZ, SYNTHESIZER, failing))
    assert cancelled


def test_song_of_any_length_has_its_length(player: SoundFontPlayer) -> None:
    synthesizer = windows_of(0.5)
    band = Band(player, synthesizer)
    for length in (1, 22_050, 50_001):
        stems = asyncio.run(
            synthesize_tracks({"piano": [Note(0, 9, 60, 90)]}, length, synthesizer, band)
        )
        assert stems["piano"].shape == (2, length)


@pytest.mark.parametrize(
    ("note", "program", "message"),
    [
        ((np.nan, 1, 60, 90), 0, "onset and duration"),
        ((0, 1e9, 60, 90), 0, "durations are 0 to 600 s"),
        ((-1e9, 1, 60, 90), 0, "onsets lie within 600 s"),
        ((0, 1, 128, 90), 0, "pitch and velocity at most 127"),
        ((0, 1, 60, 128), 0, "pitch and velocity at most 127"),
        ((0, 1, 60, 90), 129, "General MIDI has 0 to 127"),
    ],
)
def test_note_out_of_range_is_refused(
    player: SoundFontPlayer, note: tuple[float, ...], program: int, message: str
) -> None:
    model = SampledBand(ENTRY, player)
    with pytest.raises(InvalidOption, match=message):
        model({"notes": np.array([[note]], np.float32), "program": np.array([[program]])})


def test_file_that_is_no_soundfont_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "font.sf3"
    path.write_bytes(b"RIFF no SoundFont")
    with pytest.raises(InvalidModel, match="FluidSynth cannot read"):
        SoundFontPlayer(path, RATE_HZ)


def test_soundfont_is_decoded_by_one_library_beside_the_composer_and_alone() -> None:
    """Two versions of libsndfile decode it to samples that differ in the last bit."""
    libraries = set()
    for first in ("service", "runners.synthesize_audio"):
        code = (
            f"import {first}, runners.synthesize_audio; "
            "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libsndfile' in line})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        libraries.add(done.stdout)
    assert len(libraries) == 1
    assert libraries.pop().count("libsndfile") == 1
