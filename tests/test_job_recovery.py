"""A composer dies in the middle of a job, and the job ends all the same, byte for byte."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from tests.conftest import ServerProcess, serving
from tests.postgres import postgres

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "bentoml", "serve", "service:Remix"]
READY_S = 240.0
OPTIONS = '{"seed": 3}'
TIMEOUT = httpx.Timeout(300.0)

UNLIKE = ("report.json",)
"""Files that hold times, and so differ from run to run."""


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 s of something with beats, chords and a voice-like lead: several windows everywhere."""
    rng = np.random.default_rng(4)
    t = np.arange(25 * 44_100) / 44_100
    chords = np.array([[220, 277, 330], [147, 185, 220], [165, 208, 247], [220, 277, 330]])
    chord = chords[(t // 2).astype(int) % 4]
    lead = 440 * 2 ** (np.floor(4 * np.sin(t)) / 12)
    phase = 2 * np.pi * np.cumsum(lead) / 44_100
    sound = 0.1 * np.sin(2 * np.pi * chord.T * t).sum(axis=0)
    sound += 0.2 * sum(np.sin(n * phase) / n for n in range(1, 6))
    sound += 0.3 * rng.standard_normal(t.size) * np.exp(-30 * (t % 0.5))
    path = tmp_path_factory.mktemp("song") / "song.wav"
    soundfile.write(path, np.stack([sound, sound]).T.astype(np.float32), 44_100)
    return path


Composer = Callable[..., AbstractContextManager[ServerProcess]]


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """Starts a whole service in a folder of its own (by a short name: its sockets lie there)."""
    return lambda data_dir, **environment: _composer(
        tmp_path_factory.mktemp("s"), data_dir, environment
    )


@contextmanager
def _composer(folder: Path, data_dir: Path, environment: dict[str, str]) -> Iterator[ServerProcess]:
    settings = {
        "PHILHARMONICS_DATA_DIR": str(data_dir),
        "PHILHARMONICS_LEASE_S": "2",
        **environment,
    }
    with serving(COMMAND, folder, READY_S, settings) as server:
        yield server


def submit(server: ServerProcess, song: Path, job_id: str, options: str = OPTIONS) -> Any:
    with song.open("rb") as file:
        answer = httpx.put(
            f"{server.url}/v1/jobs/{job_id}",
            files={"song": file},
            data={"options": options},
            timeout=TIMEOUT,
        )
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


def events(server: ServerProcess, job_id: str) -> Iterator[tuple[str, str]]:
    """(kind, data) of a job's events, as they come."""
    url = f"{server.url}/v1/jobs/{job_id}/events"
    with httpx.stream("GET", url, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, line.removeprefix("data: ")


def finished(server: ServerProcess, job_id: str) -> Any:
    """A job, once it has ended."""
    until_s = time.monotonic() + READY_S
    while True:
        try:
            for _ in events(server, job_id):
                pass
            break
        except (httpx.TransportError, httpx.HTTPStatusError):  # the composer is being started
            assert time.monotonic() < until_s
            time.sleep(0.2)
    job = httpx.get(f"{server.url}/v1/jobs/{job_id}", timeout=TIMEOUT).json()
    assert job["state"] == "done", job
    return job


def sums(job: Any) -> dict[str, str]:
    """Checksums of a job's files."""
    return {a["name"]: a["sha256"] for a in job["artifacts"] if a["name"] not in UNLIKE}


def times(server: ServerProcess, job_id: str) -> Any:
    url = f"{server.url}/v1/jobs/{job_id}/artifacts/report.json"
    return httpx.get(url, timeout=TIMEOUT).json()["times"]["stages"]


@pytest.fixture(scope="module")
def undisturbed(
    song: Path, composer: Composer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What the song becomes where nothing happens."""
    with composer(tmp_path_factory.mktemp("calm")) as server:
        submit(server, song, "calm")
        return sums(finished(server, "calm"))


def test_job_of_a_killed_service_ends_with_the_bytes_of_an_undisturbed_run(
    song: Path, composer: Composer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with composer(tmp_path) as server:
        submit(server, song, "j")
        for kind, data in events(server, "j"):
            if kind == "progress" and "convert_voice" in data:
                break
        os.killpg(server.pid, signal.SIGKILL)
    with composer(tmp_path) as server:
        job = finished(server, "j")
        assert sums(job) == undisturbed
        assert job["attempt"] == 2
        stages = times(server, "j")
        assert stages["separate_stems"]["cached"] > 0  # it went on, it did not begin again
        # Another voice sings on the same song: what it does not sing is not computed.
        submit(server, song, "other", '{"seed": 3, "voice": "carlo"}')
        other = finished(server, "other")
        stages = times(server, "other")
        computed = {stage for stage, time in stages.items() if time["windows"]}
        assert computed == {"convert_voice"}
        assert sums(other)["voice.wav"] != undisturbed["voice.wav"]
        assert sums(other)["generated.mid"] == undisturbed["generated.mid"]


def test_of_two_composers_on_one_database_the_other_goes_on(
    song: Path, composer: Composer, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    names = ("a", "b", "c", "d")
    with postgres() as database, composer(tmp_path, PHILHARMONICS_DATABASE=database.url) as heir:
        with composer(tmp_path, PHILHARMONICS_DATABASE=database.url) as doomed:
            for name in names:  # as many as both can do at once: each does its share of them
                submit(doomed, song, name)
            for kind, data in events(doomed, names[-1]):
                if kind == "progress" and "transcribe_notes" in data:
                    break
            os.killpg(doomed.pid, signal.SIGKILL)
            jobs = [finished(heir, name) for name in names]
        assert [sums(job) for job in jobs] == [undisturbed] * len(names)
        assert {job["attempt"] for job in jobs} == {1, 2}


@pytest.mark.parametrize(
    "doomed",
    [("remix",), ("SeparateStems", "TranscribeNotes", "GenerateNotes", "ConvertVoice",
                  "SynthesizeAudio")],
    ids=["composer", "runners"],
)  # fmt: skip
def test_job_goes_on_when_workers_of_its_service_are_killed(
    doomed: tuple[str, ...],
    song: Path,
    composer: Composer,
    undisturbed: dict[str, str],
    tmp_path: Path,
) -> None:
    with composer(tmp_path) as server:
        submit(server, song, "j")
        for kind, data in events(server, "j"):
            if kind == "progress" and "transcribe_notes" in data:
                break
        for name in doomed:
            os.kill(worker(server, name), signal.SIGKILL)
        assert sums(finished(server, "j")) == undisturbed


def worker(server: ServerProcess, name: str) -> int:
    """The process of one of a server's services."""
    for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if name.encode() in command:
            return int(child)
    raise AssertionError(f"{server} has no worker {name}")
