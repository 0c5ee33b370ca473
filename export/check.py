"""every architecture, at full size, with random weights: exported, and compared with its original.

    python -m export.check [ARCHITECTURE …] [--perturb N]

Each in a process of its own, which is also how its peak memory is known. Of each, what the
runner makes of the artefact is held against the original's own inference call (1e-3 of the
largest value; 60 dB of SI-SDR for sound), and every array in the artefact against the
checkpoint's, to the bit. Then the check is checked: every weight in turn is wrong by 1 %, and it
must be noticed; and N times a weight of the served graph is really changed, by 1 %, and the
outputs are compared, to see which of them outputs alone would tell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.architectures import architecture_of, architectures
from export.artefact import Wanted, write_artefact
from export.compare import FP32, Difference, differences, initializers, wrong_arrays
from export.exporter import Arrays, Original
from export.serve import ServedCall
from export.time_calls import peak_mb
from remix.manifest import MANIFEST_PATH, ModelEntry, sha256_of
from remix.settings import Settings

RESULT = MANIFEST_PATH.parent / "benchmarks/results/export_check.json"

PERTURBED_BY = 1.01


def main(arguments: list[str] | None = None) -> int:
    """Check; 0 if all hold, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m export.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="default: all")
    parser.add_argument("--perturb", type=int, default=2, metavar="N", help="weights to change")
    parser.add_argument("--one", metavar="OUT", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.names or list(architectures())
    if options.one:
        options.one.write_text(json.dumps(check(names[0], options.perturb)))
        return 0
    results = {}
    for name in names:
        results[name] = in_its_own_process(name, options.perturb)
        print("\n".join(explain(name, results[name])), flush=True)
    if not options.names:
        RESULT.write_text(json.dumps(results, indent=2) + "\n")
    broken = [name for name, result in results.items() if result["problems"]]
    print(f"FAILED: {', '.join(broken)}" if broken else f"{len(results)} architectures hold.")
    return 1 if broken else 0


def in_its_own_process(name: str, perturb: int) -> dict[str, Any]:
    """`check`, with what the process took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "export.check", name, "--perturb", str(perturb)]
        start_s = time.monotonic()
        done = subprocess.run(
            [*command, "--one", str(out)],
            cwd=MANIFEST_PATH.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            return {"problems": [f"the check itself failed: {done.stderr[-2000:]}"]}
        result: dict[str, Any] = json.loads(out.read_text())
        return {**result, "wall_s": round(time.monotonic() - start_s, 1)}


def check(name: str, perturb: int) -> dict[str, Any]:
    """One architecture."""
    architecture = architecture_of(name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        checkpoint = folder / "checkpoint"
        architecture.write_random(checkpoint)
        original = architecture.load(checkpoint)
        wanted = Wanted(f"{name}-random", "random")
        entry = write_artefact(original, wanted, folder / "models")
        settings = Settings(folder / "models", folder, threads=1)
        found = list(differences(original, ServedCall(entry, settings), original.cases()))
        graph = settings.models_dir / entry.files[0].path
        problems = [
            f"{each.case}, {each.output}: {_figures(each)}"
            for each in found
            if each.breaks(FP32, each.output in original.waveforms)
        ]
        weights, stored = original.weights(), initializers(graph)
        problems += wrong_arrays(weights, stored)
        tried, unnoticed = perturbed_arrays(weights, stored)
        problems += [f"{weight} may be wrong by 1 % unnoticed" for weight in unnoticed]
        changed = list(islice(perturbed_graphs(original, entry, settings), perturb))
        return {
            "stage": architecture.stage,
            "weights": "random",
            "parameters": sum(array.size for array in original.weights().values()),
            "artefact_bytes": graph.stat().st_size,
            "differences": [asdict(each) for each in found],
            "arrays_perturbed_and_noticed": tried,
            "graphs_perturbed": changed,
            "peak_mb": round(peak_mb()),
            "problems": problems,
        }


def perturbed_arrays(weights: Arrays, stored: Arrays) -> tuple[int, list[str]]:
    """Every array that stands in a graph, wrong by 1 %, as the check would see it.

    Returns:
        How many were tried (all but those that are all zeros), and those that went unnoticed.
    """
    tried = [name for name in weights if name in stored and stored[name].any()]
    unnoticed = [
        name
        for name in tried
        if not wrong_arrays({name: weights[name]}, {name: wrong(stored[name])})
    ]
    return len(tried), unnoticed


def wrong(array: NDArray[Any]) -> NDArray[Any]:
    """1 % larger, in its own type."""
    larger: NDArray[Any] = (array * array.dtype.type(PERTURBED_BY)).astype(array.dtype)
    return larger


def perturbed_graphs(
    original: Original, entry: ModelEntry, settings: Settings
) -> Iterator[dict[str, Any]]:
    """The artefact with one weight changed by 1 %, checked as it would be: in both halves.

    The first is the smallest bias (of all, the one that outputs tell least), then seeded choices.
    """
    weights = original.weights()
    vectors = {name: array for name, array in weights.items() if array.ndim == 1 and array.any()}
    smallest = min(vectors, key=lambda name: float(np.abs(vectors[name]).mean()))
    rng = np.random.default_rng(0)
    order = [name for name in rng.permutation(sorted(weights)) if weights[name].any()]
    case = next(original.cases())
    for name in [smallest, *order]:
        file = entry.files[0]
        path = settings.models_dir / file.path
        changed_path = path.with_name("perturbed.onnx")
        if not perturb(path, changed_path, name):
            continue  # stored under the name of an array that equals it
        changed_file = replace(
            file,
            path=str(changed_path.relative_to(settings.models_dir)),
            sha256=sha256_of(changed_path),
        )
        served = ServedCall(replace(entry, files=(changed_file,)), settings)
        found = list(differences(original, served, [case]))
        listed = wrong_arrays(weights, initializers(changed_path))
        yield {
            "weight": name,
            "mean_magnitude": float(np.abs(weights[name]).mean()),
            "noticed_by_the_arrays": bool(listed),
            "noticed_by_the_outputs": any(
                each.breaks(FP32, each.output in original.waveforms) for each in found
            ),
            "outputs": [_figures(each) for each in found],
        }


def perturb(source: Path, target: Path, name: str) -> bool:
    """Write a graph again with one initializer 1 % larger; False if it has none of this name."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(wrong(numpy_helper.to_array(tensor)), name))
            onnx.save(model, target)
            return True
    return False


def explain(name: str, result: dict[str, Any]) -> Iterator[str]:
    """A result in lines."""
    if "differences" in result:
        yield (
            f"{name}: {result['parameters'] / 1e6:.1f} M random weights, "
            f"{result['wall_s']:.0f} s, peak {result['peak_mb']} MB"
        )
        for row in result["differences"]:
            yield f"  {row['case']:34s} {_figures(Difference(**row))}"
        yield f"  {result['arrays_perturbed_and_noticed']} arrays, each noticed if 1 % wrong"
        for row in result["graphs_perturbed"]:
            by = [half for half in ("arrays", "outputs") if row[f"noticed_by_the_{half}"]]
            yield f"  {row['weight']} 1 % larger: noticed by {' and '.join(by) or 'NOTHING'}"
    for problem in result["problems"]:
        yield f"  FAILED {name}: {problem}"


def _figures(found: Difference) -> str:
    sound = "silence" if found.si_sdr_db is None else f"SI-SDR {found.si_sdr_db:.1f} dB"
    return (
        f"{found.output} {list(found.shape)}: largest difference {found.largest_absolute:.1e}, "
        f"relative {found.largest_relative:.1e}, {sound}"
    )


if __name__ == "__main__":
    sys.exit(main())
