"""every architecture, at full size, with random weights: exported, and compared with its original.

    python -m export.check [ARCHITECTURE …] [--perturb N] [--resume] [--spoil]

Each in a process of its own, which is also how its peak memory is known. Of each, what the
runner makes of the artefact is held against the original's own inference call (1e-3 of the
largest value; 60 dB of SI-SDR for sound), and every array in the artefact against the
checkpoint's, to the bit. Where models.toml has a model run in another runtime than ONNX Runtime,
that is held to the bound of reduced precision. Then the check is checked: every weight in turn is
wrong by 1 %, and it must be noticed; and N times a weight of the served graph is really changed,
by 1 %, and the outputs are compared, to see which of them outputs alone would tell.

`--spoil` makes one weight of each artefact wrong by 1 % before all else: the check must fail.
Results go to benchmarks/results/export_check.json as they are found; after an interruption
`--resume` passes over what holds there, of the same code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from export.architectures import architecture_of, architectures
from export.artefact import Wanted, backend_of, write_artefact
from export.compare import (
    FP32,
    REDUCED,
    Bounds,
    Difference,
    compared,
    initializers,
    wrong_arrays,
)
from export.exporter import Arrays, Case, Original
from export.serve import ServedCall
from export.time_calls import cores, peak_mb
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
    parser.add_argument("--resume", action="store_true", help="pass over what holds already")
    parser.add_argument("--spoil", action="store_true", help="show that the check can fail")
    parser.add_argument("--one", metavar="OUT", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.names or list(architectures())
    if options.one:
        found = check(names[0], options.perturb, options.spoil)
        options.one.write_text(json.dumps(found))
        return 0
    known: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    code, results = digest_of_code(), {}
    for name in names:
        holds = not known.get(name, {}).get("problems", ["never checked"])
        if options.resume and holds and known[name]["code"] == code:
            results[name] = known[name]
            print(f"{name}: holds, as found before", flush=True)
            continue
        results[name] = {"code": code, **in_its_own_process(name, options.perturb, options.spoil)}
        print("\n".join(explain(name, results[name])), flush=True)
        if not options.spoil:
            known[name] = results[name]
            RESULT.write_text(json.dumps(known, indent=2) + "\n")
    failing = [name for name, result in results.items() if result["problems"]]
    print(f"FAILED: {', '.join(failing)}" if failing else f"{len(results)} architectures hold.")
    return 1 if failing else 0


def digest_of_code() -> str:
    """Of all that a result depends on: our exporters and runners, and the versions of the rest."""
    root = MANIFEST_PATH.parent
    patterns = ("export/*.py", "runners/*.py", "remix/*.py", "requirements/*.txt")
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def in_its_own_process(name: str, perturb: int, spoil: bool) -> dict[str, Any]:
    """`check`, with what the process took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "export.check", name, "--perturb", str(perturb)]
        start_s = time.monotonic()
        done = subprocess.run(
            [*command, "--one", str(out), *(["--spoil"] if spoil else [])],
            cwd=MANIFEST_PATH.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            return {"problems": [f"the check itself failed: {done.stderr[-2000:]}"]}
        result: dict[str, Any] = json.loads(out.read_text())
        return {**result, "wall_s": round(time.monotonic() - start_s, 1)}


def check(name: str, perturb: int, spoil: bool = False) -> dict[str, Any]:
    """One architecture.

    Args:
        name: its name.
        perturb: how many weights of the served graph to change, each alone.
        spoil: whether a weight is wrong from the start.
    """
    architecture = architecture_of(name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        checkpoint = folder / "checkpoint"
        architecture.write_random(checkpoint)
        original = architecture.load(checkpoint)
        entry = write_artefact(original, Wanted(f"{name}-random", "random"), folder / "models")
        settings = Settings(folder / "models", folder, threads=cores())
        if spoil:
            entry, perturb = next(spoiled(original, entry, settings))[1], 0
        graph = settings.models_dir / entry.files[0].path
        computed = [(case, original.reference(case.inputs)) for case in original.cases()]
        found = list(held_against(computed, original, entry, settings))
        problems = broken(found, FP32, original)
        reduced = []
        if backend := backend_of(name):
            other = replace(entry, backend=backend)
            reduced = list(held_against(computed[:1], original, other, settings))
            problems += broken(reduced, REDUCED, original)
        weights, stored = original.weights(), initializers(graph)
        problems += wrong_arrays(weights, stored)
        tried, unnoticed = perturbed_arrays(weights, stored)
        problems += [f"{weight} may be wrong by 1 % unnoticed" for weight in unnoticed]
        changed = [
            noticed(weight, list(held_against(computed[:1], original, wrong_entry, settings)),
                    original, settings.models_dir / wrong_entry.files[0].path)
            for weight, wrong_entry in islice(spoiled(original, entry, settings), perturb)
        ]  # fmt: skip
        problems += [
            f"{each['weight']} was wrong by 1 % in the graph, unnoticed"
            for each in changed
            if not (each["noticed_by_the_arrays"] or each["noticed_by_the_outputs"])
        ]
        return {
            "stage": architecture.stage,
            "weights": "random",
            "parameters": sum(array.size for array in weights.values()),
            "artefact_bytes": graph.stat().st_size,
            "differences": [asdict(each) for each in found],
            "served_by": {**backend, "differences": [asdict(each) for each in reduced]},
            "arrays_perturbed_and_noticed": tried,
            "graphs_perturbed": changed,
            "peak_mb": round(peak_mb()),
            "problems": problems,
        }


Computed = tuple[Case, Arrays]
"""A case, and what the original makes of it."""


def held_against(
    computed: Iterable[Computed], original: Original, entry: ModelEntry, settings: Settings
) -> Iterator[Difference]:
    """What the runner makes of the artefact, compared with what was computed."""
    served = ServedCall(entry, settings)
    for case, expected in computed:
        yield from compared(case.name, expected, original.served(served, case.inputs))


def broken(found: Iterable[Difference], bounds: Bounds, original: Original) -> list[str]:
    """The differences that are too large, in words."""
    return [
        f"{each.case}, {each.output}: {_figures(each)}"
        for each in found
        if each.breaks(bounds, each.output in original.waveforms)
    ]


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


def spoiled(
    original: Original, entry: ModelEntry, settings: Settings
) -> Iterator[tuple[str, ModelEntry]]:
    """A weight, and the artefact with that weight 1 % larger, in the place of the one before.

    The first is the smallest bias (of all, the one that outputs tell least), then seeded choices.
    """
    weights = original.weights()
    vectors = {name: array for name, array in weights.items() if array.ndim == 1 and array.any()}
    smallest = min(vectors, key=lambda name: float(np.abs(vectors[name]).mean()))
    rng = np.random.default_rng(0)
    order = [name for name in rng.permutation(sorted(weights)) if weights[name].any()]
    file = entry.files[0]
    source = settings.models_dir / file.path
    target = source.with_name("spoiled.onnx")
    for name in [smallest, *order]:
        if perturb(source, target, name):  # else it is stored under the name of one that equals it
            path = str(target.relative_to(settings.models_dir))
            yield name, replace(entry, files=(replace(file, path=path, sha256=sha256_of(target)),))


def noticed(
    weight: str, found: list[Difference], original: Original, graph: Path
) -> dict[str, Any]:
    """Which half of the check tells that a weight of a graph is wrong."""
    array = original.weights()[weight]
    return {
        "weight": weight,
        "mean_magnitude": float(np.abs(array).mean()),
        "noticed_by_the_arrays": bool(wrong_arrays({weight: array}, initializers(graph))),
        "noticed_by_the_outputs": bool(broken(found, FP32, original)),
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
        for row in result["served_by"]["differences"]:
            label = f"{row['case']}, {result['served_by']['cpu']}"
            yield f"  {label:34s} {_figures(Difference(**row))}"
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
