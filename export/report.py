"""artefact -> its report: how equal it is, how fast, and what was chosen by that."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from export.artefact import record, specs
from export.compare import (
    FP32,
    REDUCED,
    Bounds,
    Difference,
    compared,
    initializers,
    wrong_arrays,
)
from export.exporter import Original
from export.serve import ServedCall
from export.time_calls import Side, Timing, cores, peak_mb, time_in_turn
from export.variants import reduce_precision
from remix.errors import InvalidModel, RemixError
from remix.manifest import TORCHSCRIPT_SUFFIX, ModelEntry, ModelFile, sha256_of
from remix.settings import Device, Settings

BATCHES = (1, 2, 4, 8)

ENOUGH_S = 12.0
"""Of calls of one side at one batch size: three rounds, or as many as fit, at least one."""

WORTH = 0.95
"""A larger batch is worth making if a row takes less than this of what it takes alone; and a
variant is worth keeping if it takes less than this of what the graph in fp32 takes."""

ORIGINAL = "torch eager"
ONNX = "onnx"
OPENVINO = "openvino"
TORCHSCRIPT = "torchscript"

SERVABLE = {"cpu": (ONNX, OPENVINO), "cuda": (ONNX, TORCHSCRIPT)}
"""What an export may choose by itself on a device: on a CPU nothing that needs torch."""

PRECISIONS_ON = {"cpu": ("int8", "fp16"), "cuda": ("fp16",)}
"""What is compared on a device beside fp32."""

Watch = Callable[[str, float], None]


@dataclass(frozen=True)
class Variant:
    """A way to run the model.

    Args:
        name: of the back end, and the precision where it is not fp32.
        entry: a manifest entry that runs it on the device.
        bounds: of its difference from the original.
        is_timed: fp16 on a CPU is not, which computes it in float32 by detours.
    """

    name: str
    entry: ModelEntry
    bounds: Bounds
    is_timed: bool = True


@dataclass(frozen=True)
class Made:
    """What an export has made.

    Args:
        original: of the checkpoint.
        architecture: its name.
        checkpoint: it was loaded from here.
        entry: of the manifest.
        models_dir: where its files are.
        device: on which it is compared and timed.
    """

    original: Original
    architecture: str
    checkpoint: Path
    entry: ModelEntry
    models_dir: Path
    device: Device = "cpu"


def measured(made: Made, folder: Path, watch: Watch) -> dict[str, Any]:
    """The report, of every precision that could be made."""
    files = {}
    failed = {}
    graph = made.models_dir / made.entry.files[0].path
    for index, precision in enumerate(PRECISIONS_ON[made.device]):
        watch(f"making {precision}", 0.06 + 0.02 * index)
        path = graph.with_name(f"{graph.stem}.{precision}.onnx")
        try:
            reduce_precision(precision, graph, path, made.original)
            files[precision] = path
        except InvalidModel as error:
            failed[f"onnx {precision}"] = str(error)
    try:
        found = report(made, variants_of(made, files), folder, watch)
    finally:
        for path in files.values():
            path.unlink()
    return {**found, "not_run": {**found["not_run"], **failed}}


def variants_of(made: Made, files: Mapping[str, Path]) -> list[Variant]:
    """The graph in ONNX Runtime and OpenVINO, the archive, and the files of other precisions.

    A GPU is held to the bound of reduced precision: since Ampere it multiplies in TF32.
    """
    entry, device = made.entry, made.device
    fp32 = FP32 if device == "cpu" else REDUCED
    variants = [Variant(ONNX, replace(entry, backend={device: ONNX}), fp32)]
    if device == "cpu":
        variants.append(Variant(OPENVINO, replace(entry, backend={device: OPENVINO}), REDUCED))
    if any(file.path.endswith(TORCHSCRIPT_SUFFIX) for file in entry.files):
        variants.append(Variant(TORCHSCRIPT, replace(entry, backend={device: TORCHSCRIPT}), fp32))
    for precision, path in files.items():
        other = replace(with_file(entry, made.models_dir, path), backend={device: ONNX})
        is_timed = device == "cuda" or precision != "fp16"
        variants.append(Variant(f"{ONNX} {precision}", other, REDUCED, is_timed))
    return variants


def with_file(entry: ModelEntry, models_dir: Path, path: Path) -> ModelEntry:
    """The entry with another graph, in ONNX Runtime."""
    import onnx

    graph = onnx.load(path).graph
    file = ModelFile(
        str(path.relative_to(models_dir)),
        sha256_of(path),
        specs(list(graph.input)),
        specs(list(graph.output)),
    )
    return replace(entry, files=(file,), backend={"cpu": ONNX})


def report(made: Made, variants: list[Variant], folder: Path, watch: Watch) -> dict[str, Any]:
    """Compare and time every variant.

    Args:
        made: what was exported.
        variants: of it.
        folder: for files that nobody keeps.
        watch: is told what is done, and how far all of it is.
    """
    parity: dict[str, list[Difference]] = {}
    problems: dict[str, str] = {}
    watch("computing the original", 0.08)
    expected = [(case, made.original.reference(case.inputs)) for case in made.original.cases()]
    for index, variant in enumerate(variants):
        watch(f"comparing {variant.name}", 0.1 + 0.3 * index / len(variants))
        try:
            served = ServedCall(variant.entry, _settings(made, cores()))
            parity[variant.name] = [
                found
                for case, outputs in expected
                for found in compared(case.name, outputs, made.original.served(served, case.inputs))
            ]
        except RemixError as error:
            problems[variant.name] = str(error)
    graph = made.models_dir / made.entry.files[0].path
    weights = made.original.weights()
    wrong = wrong_arrays(weights, initializers(graph))
    kept = [variant for variant in variants if variant.name in parity]
    here = [variant for variant in kept if variant.is_timed]
    speed = measure(made, here, folder, watch)
    return {
        "model": made.entry.name,
        "architecture": made.architecture,
        "weights": made.entry.weights,
        "parameters": sum(array.size for array in weights.values()),
        "machine": machine(made.device),
        "bytes": {variant.name: _file_of(variant, made).stat().st_size for variant in variants},
        "parity": {
            variant.name: {
                "holds": not any(
                    found.breaks(variant.bounds, found.output in made.original.waveforms)
                    for found in parity[variant.name]
                ),
                "differences": [asdict(found) for found in parity[variant.name]],
            }
            for variant in kept
        },
        "arrays_that_differ_from_the_checkpoint": wrong,
        "speed": speed,
        "not_run": problems,
        "peak_mb_of_comparing": round(peak_mb()),
        "chosen": choose(here, parity, made, speed),
    }


def measure(
    made: Made, variants: list[Variant], folder: Path, watch: Watch
) -> dict[str, dict[str, Any]]:
    """Times by batch size, then by side; all sides of a batch size in turn."""
    speed: dict[str, dict[str, Any]] = {}
    for index, batch in enumerate(BATCHES):
        watch(f"timing batches of {batch}", 0.4 + 0.6 * index / len(BATCHES))
        inputs = folder / f"inputs-{batch}.npz"
        np.savez(inputs, allow_pickle=False, **dict(made.original.speed_inputs(batch)))
        sides = [
            Side(
                ORIGINAL,
                str(inputs),
                "",
                made.architecture,
                str(made.checkpoint),
                cores(),
                device=made.device,
            ),
            *(
                Side(
                    variant.name,
                    str(inputs),
                    str(manifest_of(variant, folder)),
                    made.entry.name,
                    str(made.models_dir),
                    cores(),
                    device=made.device,
                )
                for variant in variants
            ),
        ]
        timings = time_in_turn(sides, folder, rounds_for(speed, batch))
        speed[str(batch)] = {name: asdict(timing) for name, timing in timings.items()}
    return speed


def rounds_for(speed: Mapping[str, Mapping[str, Any]], batch: int) -> int:
    """As many rounds as make figures, fewer where a call of the slowest side takes long."""
    if not speed:
        return 3
    slowest = max(timing["median_s"] for timing in speed["1"].values())
    return max(1, min(3, int(ENOUGH_S / max(slowest * batch, 1e-3))))


def manifest_of(variant: Variant, folder: Path) -> Path:
    """A manifest with the variant alone, for the process that times it."""
    path = folder / f"{variant.name.replace(' ', '-')}.toml"
    if not path.is_file():
        path.write_text("")
        record(variant.entry, path)
    return path


def choose(
    variants: list[Variant],
    parity: Mapping[str, list[Difference]],
    made: Made,
    speed: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The fastest variant that holds its bounds, and the batch size that is worth making."""

    def row_s(name: str, batch: int) -> float:
        timing = Timing(**speed[str(batch)].get(name, {"problem": "not run"}))
        return float("inf") if timing.problem else timing.median_s / batch

    holding = {
        variant.name: variant
        for variant in variants
        if not any(f.breaks(variant.bounds, f.output in made.original.waveforms)
                   for f in parity[variant.name])
    }  # fmt: skip
    # Another file is for people to choose.
    servable = [name for name in holding if name in SERVABLE[made.device]]
    best = min(servable, key=lambda name: row_s(name, 1), default=ONNX)
    if ONNX in holding and row_s(best, 1) > WORTH * row_s(ONNX, 1):
        best = ONNX
    worth = 1
    for batch in BATCHES[1:]:
        if row_s(best, batch) < WORTH * row_s(best, worth):
            worth = batch
    return {
        "device": made.device,
        "variant": best,
        "max_batch": worth,
        "times_as_fast_as_the_original": round(row_s(ORIGINAL, 1) / row_s(best, 1), 2),
        "kept": sorted(
            name for name in holding if name == ONNX or row_s(name, 1) < WORTH * row_s(ONNX, 1)
        ),
    }


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether a report says that the artefact is not its checkpoint's."""
    names = {ONNX, found["chosen"]["variant"]} & set(found["parity"])
    holds = bool(names) and all(found["parity"][name]["holds"] for name in names)
    return bool(found["arrays_that_differ_from_the_checkpoint"]) or not holds


def require(device: Device) -> None:
    """Refuse a device that is not there.

    Raises:
        InvalidModel: there is no GPU that torch could use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidModel(
            f"The device cuda needs a GPU, and torch {torch.__version__} finds none: install a "
            "torch with CUDA on a machine with a GPU, or give --device cpu."
        )


def machine(device: Device = "cpu") -> dict[str, Any]:
    """Where the figures are from."""
    packages = ("torch", "onnxruntime", "openvino", "numpy")
    return {
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "processor": _processor(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """A report as tables: parity, then speed."""
    parity = Table("variant", "case", "output", "largest", "relative", "SI-SDR dB", title="Parity")
    for name, rows in found["parity"].items():
        for row in rows["differences"]:
            sound = "silent" if row["si_sdr_db"] is None else f"{row['si_sdr_db']:.1f}"
            parity.add_row(
                name, row["case"], row["output"], f"{row['largest_absolute']:.1e}",
                f"{row['largest_relative']:.1e}", sound,
            )  # fmt: skip
    speed = Table("side", *(f"batch {batch}" for batch in found["speed"]), "peak MB", title="Speed")
    sides = next(iter(found["speed"].values()))
    for name in sides:
        timings = [Timing(**batch[name]) for batch in found["speed"].values()]
        cells = [timing.problem[:30] or f"{timing.median_s:.3f} s" for timing in timings]
        speed.add_row(name, *cells, str(max(timing.peak_mb for timing in timings)))
    return [parity, speed]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_of(variant: Variant, made: Made) -> Path:
    return made.models_dir / variant.entry.graph_file(variant.entry.backend[made.device]).path


def _settings(made: Made, threads: int) -> Settings:
    return Settings(made.models_dir, made.models_dir, threads=threads, device=made.device)
