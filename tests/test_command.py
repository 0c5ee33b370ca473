"""The `philharmonics` command as a user runs it: a process, its exit code, what it prints."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from client.api import Client, Refused, Unreachable
from export.demo_song import write_demo_song
from tests.conftest import CRASH_SEED, ROOT, SLOW_SEED, ServerProcess
from tests.test_http_api import wav

COMMAND = [sys.executable, "-m", "client.command"]
NOBODY = "http://127.0.0.1:9"
"""The discard port: nobody listens."""


def run(
    *arguments: str | Path, cwd: Path = ROOT, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **settings}
    environment.pop("PHILHARMONICS_SERVER", None)
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )


@pytest.fixture
def song(tmp_path: Path) -> Path:
    path = tmp_path / "my song.wav"
    path.write_bytes(wav())
    return path


def test_remix_writes_everything(fake_server: ServerProcess, song: Path, tmp_path: Path) -> None:
    done = run("remix", song, "--server", fake_server.url, "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "my song"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {
        "remix.wav",
        "stems/vocals.wav",
        "notes.mid",
        "generated.mid",
        "voice.wav",
        "report.json",
        "report.png",
    }
    assert sorted(done.stdout.splitlines()) == sorted(
        str(Path("out", "my song", name)) for name in written
    )
    # Not a terminal: plain lines, no control characters.
    assert "separate stems: 100%" in done.stderr
    assert "\x1b" not in done.stderr


def test_remix_draws_bars_on_a_terminal(
    fake_server: ServerProcess, song: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "remix", str(song), "--out", str(tmp_path / "o"), "--server", fake_server.url],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    drawn = b""
    while chunk := _read(ours):
        drawn += chunk
    os.close(ours)
    assert process.wait(10) == 0
    assert b"separate stems" in drawn
    assert "━".encode() in drawn
    assert b"100%" in drawn


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # a terminal whose other end is closed
        return b""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--option", "tempo=1"], 3, "There is no option 'tempo'"),
        (["-o", "temperature=9"], 3, "temperature"),
        (["--voice", "nobody"], 3, "nobody"),
        (["--option", "tempo"], 2, "not NAME=VALUE"),
        (["--seed", "x"], 2, "not a valid integer"),
        (["--seed", str(CRASH_SEED)], 5, "log has the details"),
        (["--server", NOBODY], 4, "philharmonics serve"),
    ],
)
def test_failure_is_a_readable_line_and_an_exit_code(
    fake_server: ServerProcess,
    song: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    out = tmp_path / "out"
    done = run("remix", song, "--out", out, "--server", fake_server.url, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_song_that_is_no_song_is_refused(fake_server: ServerProcess, tmp_path: Path) -> None:
    text = tmp_path / "song.mp3"
    text.write_text("la la la\n" * 50)
    done = run("remix", text, "--server", fake_server.url, "--out", tmp_path / "out")
    assert (done.returncode, "no audio" in done.stderr) == (3, True), done.stderr


def test_song_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    done = run("remix", tmp_path / "none.wav")
    assert done.returncode == 2
    assert "does not exist" in done.stderr


def test_busy_server_is_an_exit_code_of_its_own(fake_server: ServerProcess, song: Path) -> None:
    holders = [
        subprocess.Popen(
            [*COMMAND, "remix", str(song), "--server", fake_server.url, "--seed", str(SLOW_SEED)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        for holder in holders:
            assert holder.stderr
            assert b"separate stems" in holder.stderr.readline()
        done = run("remix", song, "--server", fake_server.url)
        assert done.returncode == 6, done.stderr
    finally:
        for holder in holders:
            holder.terminate()
            holder.communicate()
    _await_free_slot(fake_server, song)


def _await_free_slot(server: ServerProcess, song: Path) -> None:
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        answer = httpx.post(
            f"{server.url}/v1/remix", files={"song": song.read_bytes()}, timeout=60.0
        )
        if answer.status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("The slots of callers who left were not freed.")


@pytest.mark.parametrize(
    ("command", "columns"),
    [("models", ["name", "stage", "weights", "licence"]), ("voices", ["name", "model", "weights"])],
)
def test_lists_are_tables(fake_server: ServerProcess, command: str, columns: list[str]) -> None:
    done = run(command, "--server", fake_server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split("\t")[: len(columns)] == columns


def test_voices_are_listed_with_and_without_the_word(fake_server: ServerProcess) -> None:
    alone = run("voices", "--server", fake_server.url)
    assert run("voices", "list", "--server", fake_server.url).stdout == alone.stdout != ""


def test_voice_without_consent_is_not_enrolled(tmp_path: Path) -> None:
    done = run("voices", "add", "june", "--samples", tmp_path, PHILHARMONICS_MODELS=str(tmp_path))
    assert (done.returncode, "no consent file" in done.stderr) == (3, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_voice_that_is_not_enrolled_cannot_be_revoked(tmp_path: Path) -> None:
    done = run("voices", "remove", "june", PHILHARMONICS_MODELS=str(tmp_path))
    assert (done.returncode, "No voice 'june' is enrolled" in done.stderr) == (1, True), done.stderr


@pytest.mark.slow
def test_remix_without_a_server_starts_one_and_stops_it(tmp_path: Path) -> None:
    with Client() as client:
        if client.is_ours():
            # Somebody serves at the default address: the command rightly uses that server, there
            # is nothing to start, and a test does not end a server that is not its own.
            pytest.skip(f"A server is running at {client.base_url}.")
    song = ROOT / ".cache/demo_song.mp3"
    write_demo_song(song, ROOT / ".cache/sources")
    marker = f"{tmp_path}/run"
    done = run("remix", song, "--out", tmp_path / "out", PHILHARMONICS_RUNTIME_DIR=marker)
    assert done.returncode == 0, done.stderr
    assert "starting one" in done.stderr
    assert (tmp_path / "out/remix.wav").stat().st_size > 0
    assert not [pid for pid in all_pids() if marker in environment_of(pid)]


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def environment_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def test_client_reports_progress_and_typed_errors(
    fake_server: ServerProcess, song: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, float]] = []
    with Client(fake_server.url) as client:
        files = client.remix(
            song, tmp_path / "out", on_progress=lambda stage, done: seen.append((stage, done))
        )
        assert files.remix.stat().st_size > 0
        assert files.report["warnings"] == ["Nobody plays: a fake."]
        assert seen[-1] == ("separate_stems", 1.0)
        with song.open("rb") as stream, pytest.raises(Refused) as refused:
            client.remix_audio(stream, {"voice": "nobody"})
        assert refused.value.status == 404
        assert refused.value.type == "urn:philharmonics:problem:not-found"
    with Client(NOBODY) as client, pytest.raises(Unreachable):
        client.voices()
    assert threading.active_count() < 10
