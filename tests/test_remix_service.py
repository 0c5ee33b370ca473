"""The whole flow over the real service: five real runners, real models, a real song.

The song is the demo song of `make remix` (a real singer and band), whole or cut.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import mido
import numpy as np
import pytest
import soundfile

from export.demo_song import write_demo_song
from remix.audio import Audio
from remix.loudness import loudness_lufs, true_peak_db
from tests.conftest import ROOT, ServerProcess
from tests.test_http_api import problem_of

pytestmark = pytest.mark.slow

ROWS = 20
"""Remixes in a row that must leave nothing behind."""

MAX_GROWTH = 0.03
"""Of the memory of all processes over `ROWS` remixes. A remix of 5 s holds about 20 MB at its
peak, 1 % of the whole; the allocator moves by as much from one remix to the next."""


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=600.0) as client:
        yield client


@pytest.fixture(scope="module")
def song() -> bytes:
    path = ROOT / ".cache/demo_song.mp3"
    write_demo_song(path, ROOT / ".cache/sources")
    return path.read_bytes()


@pytest.fixture(scope="module")
def short_song(song: bytes) -> bytes:
    samples, rate_hz = soundfile.read(io.BytesIO(song))
    file = io.BytesIO()
    soundfile.write(file, samples[: 5 * rate_hz], rate_hz, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def parts(http: httpx.Client, song: bytes) -> dict[str, bytes]:
    answer = http.post(
        "/v1/remix", files={"song": ("song.mp3", song)}, headers={"Accept": "application/zip"}
    )
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sound(data: bytes) -> Audio:
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return Audio(np.ascontiguousarray(samples.T), rate_hz)


def played_tracks(data: bytes) -> list[str]:
    file = mido.MidiFile(file=io.BytesIO(data))
    return [
        track.name
        for track in file.tracks
        if any(message.type == "note_on" and message.velocity > 0 for message in track)
    ]


def test_remix_is_a_finished_stereo_file_of_the_songs_length(
    parts: dict[str, bytes], song: bytes
) -> None:
    remix, original = sound(parts["remix.wav"]), sound(song)
    assert (remix.samples.shape[0], remix.sample_rate_hz) == (2, 44_100)
    assert abs(remix.duration_s - original.duration_s) < 0.1
    assert np.isfinite(remix.samples).all()
    # Half a step of 16 bits above the ceiling: the file is rounded after the limiter.
    assert true_peak_db(remix.samples) < -1.0 + 0.001
    assert -16.0 <= loudness_lufs(remix) <= -9.0


def test_stems_add_up_to_the_song(parts: dict[str, bytes], song: bytes) -> None:
    stems = [sound(data) for name, data in parts.items() if name.startswith("stems/")]
    together = np.sum([stem.samples for stem in stems], axis=0)
    length = min(together.shape[1], sound(song).samples.shape[1])
    original = sound(song).samples[:, :length]
    # Another decoder of the same MP3, and another resampling if the rate differs: -30 dB.
    if sound(song).sample_rate_hz == stems[0].sample_rate_hz:
        assert np.corrcoef(together[0, :length], original[0])[0, 1] > 0.99


def test_midi_files_have_notes_within_the_song(parts: dict[str, bytes], song: bytes) -> None:
    assert played_tracks(parts["notes.mid"])
    assert len(played_tracks(parts["generated.mid"])) >= 3
    for name in ("notes.mid", "generated.mid"):
        file = mido.MidiFile(file=io.BytesIO(parts[name]))
        assert 0 < file.length <= sound(song).duration_s + 0.01


def test_report_says_what_made_the_remix(parts: dict[str, bytes]) -> None:
    report: dict[str, Any] = json.loads(parts["report.json"])
    stages = {model["stage"] for model in report["models"]}
    assert stages == set(report["times"]["stages"])
    assert len(stages) == 5
    for model in report["models"]:
        assert model["weights"] in {"published", "trained-here", "random"}
        assert model["licence"]
        assert all(len(file["sha256"]) == 64 for file in model["files"])
    assert {"seed", "noise_seed", "voice"} <= set(report["options"])
    for spent in report["times"]["stages"].values():
        assert spent["windows"] + spent["cached"] > 0  # others may have sent this song before
        assert (spent["compute_s"] > 0) == (spent["windows"] > 0)
    evaluation = report["evaluation"]
    assert evaluation["max_abs_correlation"] > 0
    assert 0 <= evaluation["normalised_correlation"] <= 1
    assert "lag_s" in evaluation
    assert parts["report.png"].startswith(b"\x89PNG")


def test_same_seeds_make_the_same_remix(http: httpx.Client, short_song: bytes) -> None:
    files, data = {"song": ("song.wav", short_song)}, {"options": '{"seed": 3, "noise_seed": 3}'}
    first, second = (http.post("/v1/remix", files=files, data=data).content for _ in range(2))
    assert first == second


def test_unknown_voice_and_model_are_not_found(http: httpx.Client, short_song: bytes) -> None:
    for options in ('{"voice": "nobody"}', '{"separator": "none"}'):
        answer = http.post(
            "/v1/remix", files={"song": ("s", short_song)}, data={"options": options}
        )
        problem_of(answer, 404, "not-found")


def test_each_stage_answers_alone(http: httpx.Client, short_song: bytes) -> None:
    stems = http.post("/v1/separate", files={"song": ("s", short_song)})
    with zipfile.ZipFile(io.BytesIO(stems.content)) as archive:
        vocals = archive.read("stems/vocals.wav")
        others = [name for name in archive.namelist() if name != "stems/vocals.wav"]
        accompaniment = archive.read(others[0])
    heard = http.post("/v1/transcribe", files={"song": ("s", accompaniment)})
    assert played_tracks(heard.content)
    options = {"options": '{"tracks": ["bass", "drums"], "seed": 2}'}
    written = http.post("/v1/generate", files={"notes": ("n.mid", heard.content)}, data=options)
    assert written.status_code == 200, written.text
    assert set(played_tracks(written.content)) <= {"bass", "drums"}
    band = http.post("/v1/synthesize", files={"notes": ("n.mid", heard.content)})
    assert np.abs(sound(band.content).samples).max() > 0.01
    sung = http.post("/v1/convert", files={"vocals": ("v.wav", vocals)})
    assert sung.status_code == 200, sung.text
    assert sound(sung.content).samples.shape[1] == sound(vocals).samples.shape[1]


def test_lists_name_the_installed_models_and_voices(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()["models"]
    assert {model["stage"] for model in models if model["default"]} == {
        "separate_stems",
        "transcribe_notes",
        "generate_notes",
        "convert_voice",
        "synthesize_audio",
    }
    voices = http.get("/v1/voices").json()["voices"]
    assert [voice["default"] for voice in voices] == [True] + [False] * (len(voices) - 1)


def test_many_remixes_leave_memory_and_files_as_they_were(
    server: ServerProcess, http: httpx.Client, short_song: bytes
) -> None:
    samples, rate_hz = soundfile.read(io.BytesIO(short_song), dtype="float32")

    def remix(seed: int) -> None:
        another = io.BytesIO()  # a little softer: no window of it is in the cache
        soundfile.write(another, samples * (1 - seed / 1000), rate_hz, format="WAV")
        answer = http.post(
            "/v1/remix",
            files={"song": ("s", another.getvalue())},
            data={"options": json.dumps({"seed": seed})},
            headers={"Accept": "application/zip", "X-Request-Id": f"row-{seed}"},
        )
        assert answer.status_code == 200, answer.text

    for seed in range(5):
        remix(seed)
    before, before_bytes = server.traces(), server.memory_bytes()
    for seed in range(ROWS):
        remix(100 + seed)
    assert server.traces_become(before) == before
    assert server.memory_bytes() < before_bytes * (1 + MAX_GROWTH)
