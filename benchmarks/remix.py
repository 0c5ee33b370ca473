"""The whole remix: through the running service, against the same stages one after the other.

    python -m benchmarks.remix [--rounds 3] [--seconds 60] [--server URL]

Both sides decode the same file, run the same served models with the same options, and write the
same WAV; they take turns. The sequence is what a script would do: one process, one stage after
the other, one window after the other, each model with all cores. The service overlaps the stages
and batches windows. Writes benchmarks/results/remix.json.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
from numpy.typing import NDArray

from client.api import Client
from client.local_server import local_server
from export.demo_song import write_demo_song
from remix.audio import Audio
from remix.audio_codec import decode, encode
from remix.beats import find_beats
from remix.convert_voice import Vocal, convert_voice
from remix.convert_voice import join_chunks as join_vocal
from remix.generate_notes import generate_notes, plan_while_heard
from remix.generate_notes import join_chunks as join_notes
from remix.manifest import read_manifest
from remix.mix_tracks import MixParts, mix_tracks
from remix.models import Models, choose_models
from remix.options import RemixOptions
from remix.pipeline import VOCALS, to_mixture
from remix.separate_stems import StemsChunk, join_chunks, separate_stems
from remix.settings import Settings, read_settings
from remix.stages import Tensors
from remix.synthesize_audio import synthesize_tracks
from remix.transcribe_notes import Section, transcribe_stems
from runners.convert_voice import ConvertVoice
from runners.generate_notes import GenerateNotes
from runners.inference_protocol import ServedModel
from runners.separate_stems import SeparateStems
from runners.synthesize_audio import SynthesizeAudio
from runners.transcribe_notes import TranscribeNotes

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/remix.json"
OPTIONS: dict[str, Any] = {"seed": 1, "noise_seed": 1}
RUNNERS = (SeparateStems, TranscribeNotes, GenerateNotes, ConvertVoice, SynthesizeAudio)


class InProcess:
    """`remix.stages.Infer` in this process: one call at a time, on all cores."""

    def __init__(self, settings: Settings) -> None:
        """Load and warm every model, as the runners do."""
        self._models: dict[str, ServedModel] = {}
        for runner in RUNNERS:
            # A BentoML service keeps the class that it was made of in `inner`.
            instance = cast(Any, runner).inner()
            for model in instance.load(settings):
                model.warm_up()
                self._models[model.name] = model

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `remix.stages.Infer`; nothing else runs meanwhile."""
        return self._models[model](inputs)


async def one_after_the_other(
    path: Path, options: RemixOptions, models: Models, infer: InProcess, spent: dict[str, float]
) -> bytes:
    """The flow of `remix.pipeline` without any overlap; `spent` gets the seconds of each part."""
    with timed(spent, "decode"):
        mixture = to_mixture(await decode(path))
    length = mixture.samples.shape[1]
    with timed(spent, "separate_stems"):
        stems = await join_chunks(separate_stems(mixture, models.separator, infer, windows_ahead=1))
    with timed(spent, "convert_voice"):
        vocal = Vocal(length, mixture.sample_rate_hz)
        sung = convert_voice(
            stream(stems[VOCALS]),
            vocal,
            models.voice,
            infer,
            octaves=options.octaves,
            noise_seed=options.noise_seed,
        )
        voice = await join_vocal(sung, vocal)
    with timed(spent, "transcribe_notes"):
        chunk = stream(StemsChunk(0, stems))
        sections: list[Section] = []
        await transcribe_stems(
            chunk,
            mixture.sample_rate_hz,
            models.transcriber,
            infer,
            on_section=sections.append,
        )
    with timed(spent, "find_beats"):
        grid = find_beats(mixture)
    duration_s = mixture.duration_s
    with timed(spent, "generate_notes"):
        plans = plan_while_heard(stream(*sections), grid, duration_s, options)
        written = await join_notes(
            generate_notes(plans, grid, duration_s, models.generator, infer, options)
        )
    with timed(spent, "synthesize_audio"):
        played = await synthesize_tracks(written, length, models.synthesizer, infer)
    with timed(spent, "mix_tracks"):
        parts = MixParts(mixture.samples, stems[VOCALS], voice.audio.samples, played)
        audio, _ = mix_tracks(parts, options)
    with timed(spent, "encode"):
        return encode(audio, "wav16")


async def stream(*items: Any) -> AsyncIterator[Any]:
    """What is there already, as a stage takes it."""
    for item in items:
        yield item


@contextmanager
def timed(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block."""
    start_s = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - start_s


def song_of(seconds: float, folder: Path) -> Path:
    """The demo song, over and over, cut to a length; WAV."""
    demo, path = folder / "demo_song.mp3", folder / f"song_{seconds:.0f}_s.wav"
    write_demo_song(demo, folder / "sources")
    samples, rate_hz = soundfile.read(demo, dtype="float32", always_2d=True)
    frames = round(seconds * rate_hz)
    repeated = np.tile(samples, (-(-frames // len(samples)), 1))[:frames]
    path.write_bytes(encode(Audio(np.ascontiguousarray(repeated.T), rate_hz), "wav16"))
    return path


def correlation(first: bytes, second: bytes) -> float:
    """Of two WAV files at lag 0: 1 if the two sides made the same remix."""
    one, two = (soundfile.read(io.BytesIO(data))[0].ravel() for data in (first, second))
    length = min(len(one), len(two))
    return float(np.corrcoef(one[:length], two[:length])[0, 1])


def run(song: Path, seconds: float, rounds: int, client: Client) -> dict[str, Any]:
    """Both sides in turn."""
    settings = read_settings()
    options = RemixOptions(**OPTIONS)
    models = choose_models(read_manifest(), settings.models_dir, options)
    infer = InProcess(replace(settings, threads=len(os.sched_getaffinity(0))))
    service_s, sequence_s, busy_s, parts = [], [], 0.0, defaultdict(list)
    client.remix_audio(song, OPTIONS)  # warm-up of the service; the models are warm on both sides
    for number in range(rounds):
        start_s = time.perf_counter()
        from_service = client.remix_audio(song, OPTIONS)
        service_s.append(time.perf_counter() - start_s)
        spent: dict[str, float] = defaultdict(float)
        start_s, start_busy_s = time.perf_counter(), time.process_time()
        in_sequence = asyncio.run(one_after_the_other(song, options, models, infer, spent))
        sequence_s.append(time.perf_counter() - start_s)
        busy_s += time.process_time() - start_busy_s
        for name, value in spent.items():
            parts[name].append(value)
        print(f"round {number + 1}: service {service_s[-1]:.1f} s, sequence {sequence_s[-1]:.1f} s")
    service, sequence = statistics.median(service_s), statistics.median(sequence_s)
    return {
        "benchmark": "remix",
        "command": f"python -m benchmarks.remix --rounds {rounds} --seconds {seconds:.0f}",
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, {settings.device}",
        "song_s": seconds,
        "options": OPTIONS,
        "models": models.names(),
        "service_s": rounded(service_s),
        "sequence_s": rounded(sequence_s),
        "sequence_parts_s": {name: rounded(values) for name, values in parts.items()},
        "median_service_s": round(service, 2),
        "median_sequence_s": round(sequence, 2),
        "times_as_fast": round(sequence / service, 2),
        # What the sequence leaves idle is all that overlapping can gain.
        "cores_that_the_sequence_keeps_busy": round(busy_s / sum(sequence_s), 2),
        "correlation_of_the_two_remixes": round(correlation(from_service, in_sequence), 4),
    }


def rounded(values: list[float]) -> list[float]:
    """To centiseconds."""
    return [round(value, 2) for value in values]


@contextmanager
def server_at(url: str) -> Iterator[Client]:
    """The server at an address; without one, one of our own."""
    if url:
        with Client(url) as client:
            yield client
    else:
        os.environ["PHILHARMONICS_CACHE_BYTES"] = "0"  # every round computes all of it
        with local_server(notify=print) as own, Client(own) as client:
            yield client


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--server", default="")
    arguments = parser.parse_args()
    song = song_of(arguments.seconds, ROOT / ".cache")
    with server_at(arguments.server) as client:
        result = run(song, arguments.seconds, arguments.rounds, client)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
