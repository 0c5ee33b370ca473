"""an enrolment from end to end, on a CPU, with a short schedule: `make train-voice SMOKE=1`.

Some minutes of a speaker whom the base does not know (June, of Debian's
asterisk-core-sounds-fr-g722; her recordings are under CC-BY-SA-3.0, and the consent file says so:
she was not asked) become WAV files; `philharmonics voices add` makes a voice of them, and is killed
once on the way; a server that ran all the time sings with it; the voice is revoked. Models and data
are in a folder that is deleted. The last line is JSON; the exit code is 1 if it took longer than 15
minutes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from remix.audio import Audio
from remix.audio_codec import encode
from remix.consent import read_consent
from remix.settings import read_settings
from remix.vocal_frames import SAMPLE_RATE_HZ
from training.debian import unpack
from training.samples import read_recording as read_file
from training.samples import speaker_of
from training.voice_data import read_recording

Floats = NDArray[np.float32]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "target": ("asterisk-core-sounds-fr-g722", "usr/share/asterisk/sounds/fr_CA_f_June"),
    "source": ("asterisk-core-sounds-ru-g722", "usr/share/asterisk/sounds/ru_RU_f_IvrvoiceRU"),
}
VOICE = "june"
N_SAMPLES, N_STATEMENT, N_SOURCE = 45, 3, 4
"""Recordings of 3 s and more."""

STEPS = 300
LIMIT_S = 900.0
READY_S = 240.0

CONSENT = """\
who = "June Wallack"
statement = "statement.wav"
purpose = "a smoke test; her recordings are under CC-BY-SA-3.0, she was not asked"
given = 2006-01-01
until = 2999-12-31
"""


def main() -> int:
    """See the module."""
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="train-voice-") as temporary:
        folder = Path(temporary)
        source = write_material(folder)
        with served(folder) as (url, environment):
            found = check(folder, url, environment, source)
    seconds = time.monotonic() - begin_s
    print(json.dumps({**found, "seconds": round(seconds)}))
    return 0 if seconds <= LIMIT_S else 1


def check(folder: Path, url: str, environment: dict[str, str], source: Floats) -> dict[str, float]:
    """Enrol, be killed, enrol, sing, revoke; what was measured."""
    add = [
        *("voices", "add", VOICE, "--samples", str(folder / "samples")),
        *("--consent", str(folder / "consent.toml"), "--steps", str(STEPS)),
    ]
    voice_folder = folder / "models" / "voices" / VOICE
    checkpoint = voice_folder / "training" / "checkpoint.pt"
    with command(add, environment) as enrolment:
        wait_until(checkpoint.exists, LIMIT_S, enrolment)
        os.killpg(enrolment.pid, signal.SIGKILL)
    print("killed once it had a checkpoint; again:", flush=True)
    with command(add, environment) as enrolment:
        assert enrolment.wait() == 0, "the second enrolment failed"
    noted = json.loads((voice_folder / "enrolment.json").read_text())

    listed_s = time.monotonic()
    wait_until(lambda: VOICE in voices(url), 60.0)
    sung = sing(url, source, folder)
    served_s = time.monotonic() - listed_s
    target = read_file(folder / "statement.wav").samples
    to_target, to_source = (float(speaker_of(sung) @ speaker_of(o)) for o in (target, source))
    with command(["voices", "remove", VOICE], environment) as removal:
        assert removal.wait() == 0, "the voice was not revoked"
    wait_until(lambda: VOICE not in voices(url), 60.0)
    left = [str(path) for path in folder.rglob(f"*{VOICE}*") if path.is_file()]
    assert not left, left
    return {
        "speech_s": noted["speech_s"],
        "snr_db": noted["snr_db"],
        "statement_similarity": noted["statement_similarity"],
        "served_and_sung_after_s": round(served_s, 1),
        "similarity_to_target": round(to_target, 3),
        "similarity_to_source": round(to_source, 3),
        "similarity_of_source_to_target": round(float(speaker_of(source) @ speaker_of(target)), 3),
        "left_after_revocation": len(left),
    }


def write_material(folder: Path) -> Floats:
    """Samples, statement and consent of the target; a recording of the source, also returned."""
    target, source = recordings("target"), recordings("source")
    (folder / "samples").mkdir()
    for index, samples in enumerate(target[N_STATEMENT : N_STATEMENT + N_SAMPLES]):
        write_wav(folder / "samples" / f"{index:02}.wav", samples)
    write_wav(folder / "statement.wav", np.concatenate(target[:N_STATEMENT]))
    (folder / "consent.toml").write_text(CONSENT)
    read_consent(folder / "consent.toml")
    return np.concatenate(source[:N_SOURCE])


def recordings(which: str) -> list[Floats]:
    """Of one package, those of 3 s and more, in a random order that is always the same."""
    package, inside = PACKAGES[which]
    folder = Path("/") / inside
    if not folder.is_dir():
        [unpacked] = unpack(package)
        folder = unpacked / inside
    paths = sorted(path for path in folder.glob("*.g722") if path.stat().st_size > 3 * 8000)
    order = np.random.default_rng(3).permutation(len(paths))
    return [read_recording(paths[index]) for index in order[: N_SAMPLES + N_STATEMENT]]


def write_wav(path: Path, samples: Floats) -> None:
    """A file of 16 bits."""
    path.write_bytes(encode(Audio(samples[None], SAMPLE_RATE_HZ), "wav16"))


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server with the installed models and a data folder of its own, in `folder`."""
    (folder / "models").mkdir()
    for path in read_settings().models_dir.resolve().iterdir():
        if path.name != "voices":
            (folder / "models" / path.name).symlink_to(path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PHILHARMONICS_MODELS": str(folder / "models"),
        "PHILHARMONICS_DATA_DIR": str(folder / "data"),
        "PHILHARMONICS_RUNTIME_DIR": str(folder / "run"),
        "PHILHARMONICS_GRPC_PORT": "0",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (
        (folder / "server.log").open("w") as log,
        command(["serve", "--port", str(port)], environment, log.fileno()) as server,
    ):
        try:
            wait_until(lambda: answers(f"{url}/readyz"), READY_S, server)
            yield url, environment
        finally:
            server.terminate()


@contextmanager
def command(
    arguments: Sequence[str], environment: dict[str, str], output: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A `philharmonics` command, with what it starts in a group of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "client.command", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=output,
        stderr=output,
        start_new_session=True,
    ) as process:
        yield process


def wait_until(
    is_so: Callable[[], bool], limit_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Look four times a second."""
    until_s = time.monotonic() + limit_s
    while not is_so():
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < until_s, f"not so after {limit_s:.0f} s"
        time.sleep(0.25)


def answers(url: str) -> bool:
    """Whether a URL answers with 200."""
    try:
        return httpx.get(url, timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def voices(url: str) -> list[str]:
    """Who can sing."""
    return [voice["name"] for voice in httpx.get(f"{url}/v1/voices").json()["voices"]]


def sing(url: str, source: Floats, folder: Path) -> Floats:
    """The source in the new voice, once its runner has it too."""
    write_wav(folder / "source.wav", source)
    until_s = time.monotonic() + 30.0
    while True:
        with (folder / "source.wav").open("rb") as file:
            answer = httpx.post(
                f"{url}/v1/convert",
                files={"vocals": file},
                data={"options": json.dumps({"voice": VOICE})},
                timeout=300.0,
            )
        if answer.status_code == 200 or time.monotonic() > until_s:
            break
        time.sleep(0.5)
    answer.raise_for_status()
    path = folder / "sung.wav"
    path.write_bytes(answer.content)
    return read_file(path).samples


if __name__ == "__main__":
    sys.exit(main())
