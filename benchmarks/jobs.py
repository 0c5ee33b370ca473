"""What a job costs the second time, and how soon it is heard.

    python -m benchmarks.jobs [--rounds 2] [--seconds 180]

A song is handed over as a job and heard while it is made; then the same song with another voice;
then the first request again. Each round has a song of its own (the same, begun elsewhere), so that
nothing of it is in the cache. Times are from the request's first byte to the job's last event, and
to the first second of sound; ratios are within a round, because machines are busy unevenly. Writes
benchmarks/results/jobs.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

from benchmarks.remix import ROOT, song_of
from client.local_server import local_server

RESULT = ROOT / "benchmarks/results/jobs.json"

SHIFT_SAMPLES = 1_234
"""Between the beginnings of two rounds' songs; no window of one is then a window of the other."""

FIRST_SECOND_BYTES = 44 + 44_100 * 4
"""Of the stream: the header, and a second of 16-bit stereo."""

VOICES = ("allison", "carlo")


class Listener(threading.Thread):
    """Hears a job, and notes when its first second was there."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.first_second_s = 0.0
        self.digest = hashlib.sha256()

    def run(self) -> None:
        """Until the sound ends."""
        received = 0
        with httpx.stream("GET", self._url, timeout=None) as answer:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                self.digest.update(piece)
                received += len(piece)
                if not self.first_second_s and received >= FIRST_SECOND_BYTES:
                    self.first_second_s = time.perf_counter()


def job(server: str, song: Path, voice: str) -> tuple[float, float]:
    """Seconds until a job was done, and until its first second was heard."""
    start_s = time.perf_counter()
    with song.open("rb") as file:
        options = json.dumps({"voice": voice, "seed": 1})
        answer = httpx.post(
            f"{server}/v1/jobs", files={"song": file}, data={"options": options}, timeout=None
        )
    answer.raise_for_status()
    address = server + answer.headers["location"]
    listener = Listener(f"{address}/audio")
    listener.start()
    with httpx.stream("GET", f"{address}/events", timeout=None) as events:
        for _ in events.iter_lines():
            pass
    done_s = time.perf_counter() - start_s
    listener.join()
    (remix, *_) = httpx.get(address).raise_for_status().json()["artifacts"]
    assert listener.digest.hexdigest() == remix["sha256"], "what was heard is not the file"
    return done_s, listener.first_second_s - start_s


def run(server: str, song: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by what was measured."""
    samples, rate_hz = soundfile.read(song, dtype="int16")
    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            own = Path(folder) / f"{number}.wav"
            soundfile.write(own, np.roll(samples, -number * SHIFT_SAMPLES, axis=0), rate_hz)
            first_s, heard_s = job(server, own, VOICES[0])
            other_s, _ = job(server, own, VOICES[1])
            again_s, _ = job(server, own, VOICES[0])
            if number == 0:  # warm-up
                continue
            times["first_s"].append(first_s)
            times["first_second_heard_s"].append(heard_s)
            times["other_voice_s"].append(other_s)
            times["same_again_s"].append(again_s)
            print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
    return times


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180.0)
    arguments = parser.parse_args()
    song = song_of(arguments.seconds, ROOT / ".cache")
    with tempfile.TemporaryDirectory() as data:
        os.environ["PHILHARMONICS_DATA_DIR"] = data
        with local_server(notify=print) as server:
            times = run(server, song, arguments.rounds)

    def share(name: str) -> float:
        pairs = zip(times[name], times["first_s"], strict=True)
        return round(statistics.median(value / first_s for value, first_s in pairs), 3)

    result: dict[str, Any] = {
        "benchmark": "jobs",
        "command": f"python -m benchmarks.jobs --rounds {arguments.rounds} "
        f"--seconds {arguments.seconds:.0f}",
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores",
        "song_s": arguments.seconds,
        **{name: [round(value, 2) for value in values] for name, values in times.items()},
        "first_second_share": share("first_second_heard_s"),
        "other_voice_share": share("other_voice_s"),
        "same_again_share": share("same_again_s"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
