"""A remix as the paper made it, one command after the other, against ours: the same weights.

    python -m benchmarks.paper_way [--seconds 60] [--rounds 3]

The paper's way: `demucs --two-stems vocals`, `basic-pitch`, generation from its MIDI, `svc infer`,
pretty_midi's FluidSynth, and vocal and band added; each a process of its own with its defaults, on
all cores, its files on a disk. Ours: `philharmonics remix`, to a server that runs, and to one that
it starts. HTDemucs, ContentVec and the voice (quickvc) are of full size with the same random
weights on both sides, Basic Pitch, the generator and the SoundFont the published or trained ones.
What a side makes of its own accord stays as it is: demucs' `--overlap 0.25`, svc's pitch by dio
where ours is FCPE; ours also transcribes bass and other apart, finds beats and balances the mix.
Songs take turns, the stages' cache is off. Writes benchmarks/results/paper_way.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
from numpy.typing import NDArray

from benchmarks.remix import song_of
from client.api import Client
from export.architectures import architecture_of
from export.artefact import Wanted, record, write_artefact
from export.report import machine, with_file
from export.separate_stems import write_random_htdemucs
from export.variants import reduce_precision
from remix.generate_notes import HeardNotes, generate_notes, join_chunks, one_plan, plan_song
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.midi import read_midi, write_midi
from remix.mix_tracks import SAMPLE_RATE_HZ
from remix.models import choose_models
from remix.note_grid import read_grid
from remix.options import RemixOptions
from remix.settings import read_settings
from remix.stages import Tensors
from runners.generate_notes import GenerateNotes

ROOT = MANIFEST_PATH.parent
PEERS = ROOT / ".cache" / "peers"
"""What the `svc` command needs and nothing else does."""

RESULT = ROOT / "benchmarks/results/paper_way.json"
SEPARATOR, SPEAKER = "htdemucs-random", "random-low"
TARGETS = {"warm": 3.0, "with_start": 1.5}
"""Times as fast as the paper's way, at least."""

START_S = 180.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print it; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the song")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        name, source, out = options.step
        STEPS[name](Path(source), Path(out))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.seconds, options.rounds)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    missed = [name for name, least in TARGETS.items() if found["times_as_fast"][name] < least]
    print(f"MISSED: {', '.join(missed)}" if missed else "Both targets hold.")
    return 1 if missed else 0


def measure(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Both ways in turn, on the demo song."""
    song = folder / "song.wav"
    samples, rate_hz = soundfile.read(song_of(seconds, ROOT / ".cache"), dtype="float32")
    soundfile.write(song, 0.25 * samples, rate_hz)  # random networks amplify, demucs clips
    install_peers()
    house = make_house(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(house),
        "PHILHARMONICS_MODELS": str(folder / "models"),
        "PHILHARMONICS_CACHE_BYTES": "0",
    }
    theirs = {**os.environ, "PYTHONPATH": f"{ROOT}:{PEERS}"}
    walls: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    with server(house, environment) as url:
        for number in range(rounds + 1):  # one to warm up
            ours = remix(song, house, environment, folder / "warm", url)
            the_papers = {
                name: run(command, folder, theirs)
                for name, command in papers_commands(folder, song).items()
            }
            if number:
                walls["warm"].append(ours)
                walls["paper"].append(sum(the_papers.values()))
                for name, wall_s in the_papers.items():
                    parts[name].append(wall_s)
    for _ in range(rounds):
        walls["with_start"].append(remix(song, house, environment, folder / "cold", ""))
    medians = {name: round(statistics.median(values), 2) for name, values in walls.items()}
    return {
        "what": "a remix by the paper's commands, one after the other, and by philharmonics remix",
        "command": f"python -m benchmarks.paper_way --seconds {seconds:.0f} --rounds {rounds}",
        "machine": machine(),
        "weights": "HTDemucs, ContentVec and voice are random, of full size",
        "rounds": rounds,
        "wall_s": {name: [round(value, 2) for value in values] for name, values in walls.items()},
        "paper_parts_median_s": {
            name: round(statistics.median(values), 2) for name, values in parts.items()
        },
        "median_s": medians,
        "times_as_fast": {name: round(medians["paper"] / medians[name], 2) for name in TARGETS},
    }


def install_peers() -> None:
    """Install what `svc` imports, once."""
    if PEERS.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=PEERS.parent) as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, "-r", str(ROOT / "requirements/peers.txt")], check=True)
        # It is linked to CUDA and fails beside a torch without; torchaudio does without it.
        (Path(folder) / "torchaudio/lib/_torchaudio.abi3.so").unlink(missing_ok=True)
        shutil.copytree(folder, PEERS)


def make_house(folder: Path) -> Path:
    """The project once more, its manifest and models with the random ones, and theirs."""
    house, models = folder / "house", folder / "models"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    # A separator of random weights is served only where no other is.
    shutil.copytree(
        read_settings().models_dir, models, ignore=shutil.ignore_patterns("spleeter-*.onnx")
    )
    write_random_htdemucs(folder / "repo" / f"{SEPARATOR.replace('-', '_')}.th")
    checkpoints = {
        "quickvc": folder / "voice",
        # Where transformers looks before it asks a hub.
        "contentvec-768l12": folder / "lengyue233" / "content-vec-best",
    }
    for name, checkpoint in checkpoints.items():
        architecture = architecture_of(name)
        architecture.write_random(checkpoint)
        original = architecture.load(checkpoint)
        entry = write_artefact(original, Wanted(name, "random"), models)
        if name == "quickvc":  # what is served on a CPU, see benchmarks/export.py
            graph = models / entry.files[0].path
            reduce_precision("int8", graph, graph, original)
            entry = with_file(entry, models, graph)
        record(entry, house / "models.toml")
    return house


def papers_commands(folder: Path, song: Path) -> dict[str, list[str]]:
    """Name -> command; each reads what the ones before it wrote."""
    python, out = sys.executable, folder / "paper"
    stems = out / SEPARATOR.replace("-", "_") / song.stem
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    step = [python, "-m", "benchmarks.paper_way", "--step"]
    heard = out / "no_vocals_basic_pitch.mid"
    return {
        "demucs": [
            *(python, "-m", "demucs", "--two-stems", "vocals", "-n", SEPARATOR.replace("-", "_")),
            *("--repo", str(folder / "repo"), "-d", "cpu", "-o", str(out), str(song)),
        ],
        "basic-pitch": [
            *(f"{Path(python).parent}/basic-pitch", "--model-serialization", "onnx"),
            *("--save-midi", str(out), str(stems / "no_vocals.wav")),
        ],
        "generate": [*step, "generate", str(heard), str(out / "generated.mid")],
        "svc infer": [
            *(f"{Path(python).parent}/svc", "infer", str(stems / "vocals.wav"), "-na"),
            *("-m", str(folder / "voice" / "G_0.pth"), "-s", SPEAKER, "-d", "cpu"),
            *("-c", str(folder / "voice" / "config.json"), "-o", str(out / "voice.wav")),
        ],
        "fluidsynth": [*step, "play", str(out / "generated.mid"), str(out / "band.wav")],
        "mix": [*step, "mix", str(out), str(out / "remix.wav")],
    }


def generate(source: Path, out: Path) -> None:
    """Notes -> new music, by our stage alone: the paper's generator is in no package."""
    settings, options = read_settings(), RemixOptions(seed=1)
    tracks = read_midi(source.read_bytes())
    duration_s = max(note.end_s for notes in tracks.values() for note in notes)
    grid = read_grid(source.read_bytes(), tracks, duration_s)
    heard: HeardNotes = {role: notes for role, notes in tracks.items()}  # noqa: C416
    plan = plan_song(heard, grid, duration_s, options)
    models = choose_models(read_manifest(), settings.models_dir, options)
    (served,) = cast(Any, GenerateNotes).inner().load(settings)

    async def infer(model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        return cast(dict[str, NDArray[Any]], served(inputs))

    written = asyncio.run(
        join_chunks(
            generate_notes(one_plan(plan), grid, duration_s, models.generator, infer, options)
        )
    )
    out.write_bytes(write_midi(written, grid, duration_s))


def play(source: Path, out: Path) -> None:
    """MIDI -> WAV, as pretty_midi plays it."""
    import pretty_midi

    entry = read_manifest()["musescore-general"]
    font = read_settings().models_dir / entry.files[0].path
    played = pretty_midi.PrettyMIDI(str(source)).fluidsynth(SAMPLE_RATE_HZ, str(font))
    soundfile.write(out, played, SAMPLE_RATE_HZ)


def mix(source: Path, out: Path) -> None:
    """Vocal and band, added."""
    voice, rate_hz = soundfile.read(source / "voice.wav")
    band, _ = soundfile.read(source / "band.wav")
    length = max(len(voice), len(band))
    parts = [np.pad(part, (0, length - len(part))) for part in (voice, band)]
    soundfile.write(out, np.sum(parts, axis=0) / 2, rate_hz)


STEPS = {"generate": generate, "play": play, "mix": mix}


def remix(song: Path, house: Path, environment: dict[str, str], out: Path, url: str) -> float:
    """Our one command; seconds. It starts a server where no address is given."""
    command = [sys.executable, "-m", "client.command", "remix", str(song), "--out", str(out)]
    chosen = ["--voice", SPEAKER]
    server = ["--server", url] if url else []
    shutil.rmtree(out, ignore_errors=True)
    return run([*command, *chosen, *server], house, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a command that must end well."""
    start_s = time.perf_counter()
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall_s = time.perf_counter() - start_s
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return wall_s


@contextmanager
def server(house: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server of the house, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "client.command", "serve", "--port", str(port)]
    with subprocess.Popen(
        [*command, "--grpc-port", "0"],
        cwd=house,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
            with Client(url) as client:
                while not client.is_ready():
                    if process.poll() is not None or time.monotonic() > until_s:
                        raise SystemExit("The server did not start.")
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
