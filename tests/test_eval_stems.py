"""The measures of `make eval-stems`: what they say of sounds whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.eval_stems import (
    BOUNDS_DB,
    SPLEETER,
    Song,
    as_text,
    leak_db,
    misses,
    note_f1,
    notes_table,
    read_songs,
    sdr_db,
    split_by_shape,
    stems_table,
)
from remix.audio import Samples
from remix.notes import Note
from tests.test_stem_training import write_tones

RATE_HZ = 44_100


def noise(seed: int, seconds: float = 7.0) -> Samples:
    samples = np.random.default_rng(seed).standard_normal((2, round(seconds * RATE_HZ)))
    return (0.1 * samples).astype(np.float32)


def test_sdr_of_a_stem_at_half_its_level_is_6_db() -> None:
    stem = noise(0)
    assert sdr_db(stem, 0.5 * stem) == pytest.approx(6.02, abs=0.01)


def test_sdr_leaves_out_seconds_without_the_stem() -> None:
    stem = noise(0)
    stem[:, : 2 * RATE_HZ] = 0
    estimate = 0.5 * stem
    estimate[:, : 2 * RATE_HZ] = 1.0
    assert sdr_db(stem, estimate) == pytest.approx(6.02, abs=0.01)
    assert np.isnan(sdr_db(np.zeros_like(stem), estimate))


def test_leak_is_the_guitars_share_of_a_stem() -> None:
    guitar, rest = noise(1), noise(2)
    assert leak_db(guitar, rest, guitar + rest) == pytest.approx(0.0, abs=0.1)
    assert leak_db(guitar, rest, 0.1 * guitar + rest) == pytest.approx(-20.0, abs=0.5)
    assert leak_db(guitar, rest, rest) < -100.0  # the stem is explained exactly
    # Another sound as loud as the guitar: chance alone, see its docstring.
    assert leak_db(guitar, rest, noise(3)) < -24.0


def test_note_f1_counts_pitch_and_onset() -> None:
    truth = [(0.5, 0.2, 40), (1.0, 0.2, 45)]
    heard = [Note(0.5, 0.1, 40, 80), Note(1.0, 0.5, 45, 80)]
    assert note_f1(truth, heard) == 1.0
    assert note_f1(truth, [Note(0.5, 0.1, 40, 80), Note(1.06, 0.1, 45, 80)]) == 0.5
    assert note_f1(truth, [Note(0.5, 0.1, 52, 80)]) == 0.0
    assert note_f1(truth, []) == 0.0


def test_baseline_without_a_model_adds_up_and_hears_what_is_low_and_what_is_sudden() -> None:
    times_s = np.arange(3 * RATE_HZ) / RATE_HZ
    low = 0.1 * np.sin(2 * np.pi * 80 * times_s).astype(np.float32)
    beats = np.where(times_s % 0.5 < 0.02, noise(5, 3.0)[0], 0.0).astype(np.float32)
    mixture = np.stack([low + beats] * 2)
    parts = split_by_shape(mixture)
    # The transform comes back to 1e-5 of full scale in float32.
    np.testing.assert_allclose(np.sum(list(parts.values()), axis=0), mixture, atol=1e-4)
    for part, name in ((low, "bass"), (beats, "drums")):
        truth = np.stack([part, part])
        assert sdr_db(truth, parts[name]) > sdr_db(truth, mixture) + 6.0, name


def test_tables_find_a_perfect_separator_perfect(tmp_path: Path) -> None:
    write_tones(tmp_path / "train" / "song-0", 110.0)
    write_tones(tmp_path / "test" / "song-0", 140.0, seconds=2.5)
    song = read_songs(tmp_path, 5)[0]
    table = stems_table([song], {"perfect": lambda _mixture: dict(song.stems)})
    assert min(scores["sdr_db"] for scores in table["perfect"].values()) > 60.0
    song = Song(song.name, song.stems, {"bass": [(0.5, 0.2, 40)], "other": []})
    found = notes_table([song], {}, lambda _samples: [Note(0.5, 0.2, 40, 90)])
    assert found == {"the true stems": {"bass": 1.0}, "the true accompaniment": {"bass": 1.0}}


def test_misses_are_found_and_a_missing_model_is_one() -> None:
    def row(db: float) -> dict[str, dict[str, float]]:
        return {stem: {"si_sdr_db": db, "sdr_db": db} for stem in BOUNDS_DB}

    result: dict[str, Any] = {
        "stems": {"ours": row(7.0), "mixture": row(-5.0), SPLEETER: {"vocals": row(6.5)["vocals"]}},
        "guitar_leak_db": {"ours": {"bass": -12.0, "other": -1.0, "vocals": -11.0}},
        "note_f1": {"ours": {"bass": 0.7, "other": 0.5}, SPLEETER: {"bass": 0.6, "other": 0.45}},
    }
    assert misses(result, "ours") == []
    assert len(misses(result, None)) == 1
    result["stems"][SPLEETER]["vocals"]["sdr_db"] = 7.5
    result["guitar_leak_db"]["ours"]["bass"] = -9.0
    result["guitar_leak_db"]["ours"]["other"] = -9.0
    result["note_f1"]["ours"]["other"] = 0.49
    assert [miss.split(":")[0] for miss in misses(result, "ours")] == [
        "vocals",
        "guitar in bass",
        "guitar in other",
        "notes of other",
    ]
    assert "MISSED: vocals" in as_text({**result, "misses": misses(result, "ours")})
