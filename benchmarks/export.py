"""Exported models: what is served against the original library's own inference call.

    python -m benchmarks.export [ARCHITECTURE …] [--rounds 5] [--seconds 20]
    python -m benchmarks.export --device cuda [ARCHITECTURE …]

Both compute the same thing from the same seeded random weights of full size, in processes of
their own, in turn, `--rounds` times after one call that does not count. The served side runs what
the stage's runner runs and imports no torch. Of separation the call is a whole song, as demucs'
`apply_model` takes it. Of transcription it is a song's windows, one after the other as basic-pitch
computes them, and in batches of two, two at once, as our runner does. Of the others it is one
batch of one window. HTDemucs, which computes in bfloat16 where the processor can, is also timed in
float32, as on a processor that cannot. Writes benchmarks/results/export.json.

On a CUDA device: the report of `philharmonics export` for every architecture, TorchScript and, with
onnxruntime-gpu, ONNX, in float32 and in half precision. Writes benchmarks/results/export_cuda.json.
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
import onnx
from rich.console import Console

from export.architectures import architecture_of, architectures
from export.artefact import Format, Wanted, backend_of, record, write_artefact
from export.compare import si_sdr_db
from export.exporter import Original
from export.report import (
    OPENVINO,
    Made,
    is_wrong,
    machine,
    measured,
    require,
    tables,
    with_file,
)
from export.serve import ServedCall
from export.time_calls import Side, Timing, cores, time_in_turn
from export.variants import reduce_precision
from remix.errors import InvalidModel
from remix.manifest import MANIFEST_PATH, ModelEntry
from remix.piano_roll import SAMPLE_RATE_HZ
from remix.settings import Device, Settings
from remix.stages import Tensors
from remix.transcribe_notes import WINDOW_HOP_SAMPLES
from runners.openvino_session import BF16

RESULT = MANIFEST_PATH.parent / "benchmarks/results/export.json"
CUDA_RESULT = RESULT.with_name("export_cuda.json")

TARGETS = {"htdemucs": 1.8, "quickvc": 2.0, "fcpe": 1.0, "basic-pitch": 1.0}
"""Times as fast as the original, at least; within `NOISE` of a machine that others use too."""

NOISE = 0.97

TRANSCRIBED_AT_ONCE = 2
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
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the song")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the originals are of their own time
    if options.device == "cuda":
        return on_cuda(options.names or list(architectures()))
    results = {}
    names = options.names or list(TARGETS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder), options.rounds, options.seconds)
        print(f"{name}: {json.dumps(results[name]['summary'])}", flush=True)
    found = {"rounds": options.rounds, "machine": machine(), "models": results}
    if set(names) >= set(TARGETS):
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
    missed = [name for name, result in results.items() if not result["summary"]["holds"]]
    print(f"MISSED: {', '.join(missed)}" if missed else "All targets hold.")
    return 1 if missed else 0


def on_cuda(names: list[str]) -> int:
    """The report of every architecture on a GPU; 1 if one is not what its checkpoint is."""
    try:
        require("cuda")
    except InvalidModel as error:
        print(error, file=sys.stderr)
        return 3
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = report_of(name, Path(folder), "cuda")
        for table in tables(results[name]):
            Console().print(table)
        CUDA_RESULT.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(is_wrong(found) for found in results.values()) else 0


def report_of(name: str, folder: Path, device: Device) -> dict[str, Any]:
    """What `philharmonics export` finds out of an architecture with random weights."""
    architecture = architecture_of(name)
    checkpoint, models = folder / "checkpoint", folder / "models"
    architecture.write_random(checkpoint)
    original = architecture.load(checkpoint)
    has_archive = type(original).torchscript is not Original.torchscript
    formats: tuple[Format, ...] = ("onnx", "torchscript") if has_archive else ("onnx",)
    entry = write_artefact(original, Wanted(f"{name}-random", "random"), models, formats)
    made = Made(original, name, checkpoint, entry, models, device)
    return measured(made, folder, lambda what, done: print(f"{name}: {what}", flush=True))


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
    if in_fp32 := without_bf16(entry, models):
        record(in_fp32, manifest)
        sides.append(replace(sides[1], name="served in float32", entry=in_fp32.name))
    agreement = agreement_db(original, entry, Settings(models, models, threads=threads), inputs)
    timings = time_in_turn(sides, folder, rounds)
    first, second = timings["original"], timings["served"]
    times = times_as_fast(first, second)
    return {
        "call": f"a song of {seconds:g} s" if is_song else "one window",
        "backend": entry.backend.get("cpu", "onnx"),
        "precision": PRECISION.get(name, "fp32"),
        "timings": {side: asdict(timing) for side, timing in timings.items()},
        "summary": {
            "times_as_fast": times,
            "times_as_fast_in_float32": (
                times_as_fast(first, timings["served in float32"]) if in_fp32 else None
            ),
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


def times_as_fast(original: Timing, served: Timing) -> float:
    """By the medians; 0 where a side failed."""
    return round(original.median_s / served.median_s, 2) if served.median_s else 0.0


def without_bf16(entry: ModelEntry, models_dir: Path) -> ModelEntry | None:
    """A model that OpenVINO runs in bfloat16 in part, all in float32; None if it is not one."""
    source = models_dir / entry.files[0].path
    graph = onnx.load(source)
    facts = {fact.key: fact.value for fact in graph.metadata_props}
    if entry.backend.get("cpu") != OPENVINO or facts.pop(BF16, None) is None:
        return None
    onnx.helper.set_model_props(graph, facts)
    target = source.with_name(f"{source.stem}-fp32.onnx")
    onnx.save(graph, target)
    other = with_file(entry, models_dir, target)
    return replace(other, name=f"{entry.name}-fp32", backend=entry.backend)


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
