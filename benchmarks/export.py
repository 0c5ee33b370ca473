"""Exported models: what is served against the original library's own inference call.

    python -m benchmarks.export [ARCHITECTURE …] [--rounds 5] [--seconds 20]

Both compute the same thing from the same seeded random weights of full size, in processes of
their own, in turn, `--rounds` times after one call that does not count. The served side runs what
the stage's runner runs and imports no torch. Of separation the call is a whole song, as demucs'
`apply_model` takes it. Of transcription it is a song's windows, one after the other as basic-pitch
computes them, and in batches of four, two at once, as our runner does. Of the others it is one
batch of one window. Writes benchmarks/results/export.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.architectures import architecture_of
from export.artefact import Wanted, backend_of, record, write_artefact
from export.compare import si_sdr_db
from export.exporter import Original
from export.report import machine, with_file
from export.serve import ServedCall
from export.time_calls import Side, cores, time_in_turn
from export.variants import reduce_precision
from remix.manifest import MANIFEST_PATH, ModelEntry
from remix.piano_roll import SAMPLE_RATE_HZ
from remix.settings import Settings
from remix.stages import Tensors
from remix.transcribe_notes import WINDOW_HOP_SAMPLES

RESULT = MANIFEST_PATH.parent / "benchmarks/results/export.json"

TARGETS = {"htdemucs": 1.8, "quickvc": 2.0, "fcpe": 1.0, "basic-pitch": 1.0}
"""Times as fast as the original, at least; within `NOISE` of a machine that others use too."""

NOISE = 0.97

TRANSCRIBED_AT_ONCE = 4
"""Windows of a batch: `max_batch` of basic-pitch in models.toml."""

PRECISION = {"quickvc": "int8"}
"""What is served on a CPU where it is not fp32: in fp32 a vocoder is at the processor's peak on
both sides."""

LEAST_AGREEMENT_DB = {"htdemucs": 40.0, "quickvc": 30.0}
"""SI-SDR of what is served against the original; 30 dB in reduced precision."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print it; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the song")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the originals are of their own time
    results = {}
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder), options.rounds, options.seconds)
        print(f"{name}: {json.dumps(results[name]['summary'])}", flush=True)
    found = {"rounds": options.rounds, "machine": machine(), "models": results}
    if set(options.names) >= set(TARGETS):
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    missed = [name for name, result in results.items() if not result["summary"]["holds"]]
    print(f"MISSED: {', '.join(missed)}" if missed else "All targets hold.")
    return 1 if missed else 0


def measure(name: str, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """One architecture."""
    architecture = architecture_of(name)
    checkpoint, models = folder / "checkpoint", folder / "models"
    architecture.write_random(checkpoint)
    original = architecture.load(checkpoint)
    written = write_artefact(original, Wanted(f"{name}-random", "random"), models)
    if precision := PRECISION.get(name):
        graph = models / written.files[0].path
        reduce_precision(precision, graph, graph, original)
        written = with_file(written, models, graph)
    entry = replace(written, backend=backend_of(name))
    manifest, inputs_path = folder / "models.toml", folder / "inputs.npz"
    manifest.write_text("")
    record(entry, manifest)
    inputs = inputs_of(original, seconds)
    np.savez(inputs_path, allow_pickle=False, **dict(inputs))
    is_song = original.stage in ("separate_stems", "transcribe_notes")
    threads = max(1, cores() // 2) if is_song else cores()
    sides = [
        Side("original", str(inputs_path), "", name, str(checkpoint), cores()),
        Side(
            "served",
            str(inputs_path),
            str(manifest),
            entry.name,
            str(models),
            threads,
            TRANSCRIBED_AT_ONCE if original.stage == "transcribe_notes" else 0,
        ),
    ]
    agreement = agreement_db(original, entry, Settings(models, models, threads=threads), inputs)
    timings = time_in_turn(sides, folder, rounds)
    first, second = timings["original"], timings["served"]
    times = round(first.median_s / second.median_s, 2) if second.median_s else 0.0
    return {
        "call": f"a song of {seconds:g} s" if is_song else "one window",
        "backend": entry.backend.get("cpu", "onnx"),
        "precision": PRECISION.get(name, "fp32"),
        "timings": {side: asdict(timing) for side, timing in timings.items()},
        "summary": {
            "times_as_fast": times,
            "target": TARGETS.get(name),
            "agreement_db": agreement,
            "peak_mb": {side: timing.peak_mb for side, timing in timings.items()},
            "problems": [timing.problem for timing in timings.values() if timing.problem],
            "holds": (
                times >= TARGETS.get(name, 0.0) * (NOISE if TARGETS.get(name) == 1.0 else 1.0)
                and second.peak_mb <= first.peak_mb
                and agreement >= LEAST_AGREEMENT_DB.get(name, -np.inf)
            ),
        },
    }


def inputs_of(original: Original, seconds: float) -> Tensors:
    """A typical call: of separation and transcription a song, else one window."""
    if original.stage == "transcribe_notes":
        return original.speed_inputs(round(seconds * SAMPLE_RATE_HZ / WINDOW_HOP_SAMPLES))
    if original.stage != "separate_stems":
        return original.speed_inputs(1)
    songs = [case.inputs["song"] for case in original.cases() if "song" in case.inputs]
    longest = max(songs, key=lambda song: song.shape[2])
    n_samples = round(seconds * original.sample_rate_hz)
    index = np.arange(n_samples) % longest.shape[2]
    return {"song": np.ascontiguousarray(longest[..., index])}


def agreement_db(
    original: Original, entry: ModelEntry, settings: Settings, inputs: Tensors
) -> float:
    """SI-SDR of the served outputs, the worst of them (and of every stem), on one call."""
    expected = original.reference(inputs)
    found = original.served(ServedCall(entry, settings), inputs)
    ratios = []
    for name, array in expected.items():
        parts = array.shape[1] if name == "stems" else 1
        rows, served = np.array_split(array, parts, 1), np.array_split(found[name], parts, 1)
        ratios += [si_sdr_db(*pair) for pair in zip(rows, served, strict=True)]
    return round(min(ratios), 1)


if __name__ == "__main__":
    sys.exit(main())
