"""original -> artefact: the file that a runner serves, and the manifest entry that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import tomlkit

from export.exporter import Original
from export.trace import write
from remix.errors import InvalidModel
from remix.manifest import (
    TORCHSCRIPT_SUFFIX,
    ModelEntry,
    ModelFile,
    TensorSpec,
    read_manifest,
    sha256_of,
)

Format = Literal["onnx", "torchscript"]

DATATYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.BOOL: "BOOL",
}
"""ONNX's types -> the Open Inference Protocol's."""


@dataclass(frozen=True)
class Wanted:
    """What an artefact shall be called, and where it comes from.

    Args:
        name: of the manifest entry.
        weights: `published`, `trained-here` or `random`.
        licence: of the weights.
        source: of the weights.
        path: of the graph, in the models folder; `STAGE/NAME.onnx` where nothing is said.
    """

    name: str
    weights: Literal["published", "trained-here", "random"]
    licence: str = "not stated"
    source: str = "a checkpoint of the user's"
    path: str = ""


def write_artefact(
    original: Original, wanted: Wanted, models_dir: Path, formats: tuple[Format, ...] = ("onnx",)
) -> ModelEntry:
    """Export, and describe what was exported.

    Args:
        original: the model.
        wanted: how it is called.
        models_dir: gets the graph and, where asked for, an archive of the same name (`.ts`).
        formats: to write; the graph is always among them, its signature is what both have.

    Returns:
        The manifest entry: batches of one until somebody has measured more.
    """
    graph = graph_of(original, wanted)
    path = Path(wanted.path or f"{original.stage}/{wanted.name}.onnx")
    write(graph.SerializeToString(deterministic=True), models_dir / path)
    signature = specs(list(graph.graph.input)), specs(list(graph.graph.output))
    files = [ModelFile(str(path), sha256_of(models_dir / path), *signature)]
    if "torchscript" in formats:
        archive = original.torchscript()
        if archive is None:
            raise InvalidModel(f"{wanted.name} has no TorchScript form: export it --to onnx.")
        path = path.with_suffix(TORCHSCRIPT_SUFFIX)
        write(archive, models_dir / path)
        files.append(ModelFile(str(path), sha256_of(models_dir / path), *signature))
    return ModelEntry(
        name=wanted.name,
        stage=original.stage,
        rank=-100 if wanted.weights == "random" else 5,
        weights=wanted.weights,
        licence=wanted.licence,
        source=wanted.source,
        quality="Not measured here; that the artefact is the checkpoint: report beside it",
        sample_rate_hz=original.sample_rate_hz,
        max_batch={"cpu": 1, "cuda": 1},
        files=tuple(files),
        facts=original.facts,
    )


def graph_of(original: Original, wanted: Wanted) -> onnx.ModelProto:
    """The graph, which says in its metadata whose it is."""
    graph = original.onnx()
    add_facts(graph, {"model": wanted.name, "weights_are": wanted.weights})
    return graph


def add_facts(graph: onnx.ModelProto, facts: Mapping[str, str]) -> None:
    """Add to what a graph says of itself."""
    known = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, {**known, **facts})


def specs(values: list[Any]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph, as the manifest has them."""
    return tuple(
        TensorSpec(
            value.name,
            DATATYPES[value.type.tensor_type.elem_type],
            tuple(
                axis.dim_value if axis.HasField("dim_value") else -1
                for axis in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    )


def record(entry: ModelEntry, manifest_path: Path) -> None:
    """Write an entry into a manifest, which keeps its comments and all else that it says.

    Of an entry that is there already, only what the export has found out is replaced: files,
    back ends and batch sizes. A new entry is added at the end.
    """
    document = tomlkit.parse(manifest_path.read_text())
    found: dict[str, Any] = {
        "max_batch": _inline(entry.max_batch),
        **({"backend": _inline(entry.backend)} if entry.backend else {}),
        "files": _files(entry.files),
    }
    if entry.name in document:
        table: Any = document[entry.name]
        kept = {file["path"] for file in table.get("files", [])}
        if kept != {file.path for file in entry.files}:
            table["files"] = found["files"]
        else:
            for old, new in zip(table["files"], _files(entry.files), strict=True):
                if old["sha256"]:  # where a hub knows it, the receipt has it
                    old["sha256"] = new["sha256"]
        for key in ("max_batch", "backend"):
            if key in found and table.get(key) != found[key]:
                table[key] = found[key]
    else:
        table = tomlkit.table()
        for key in ("stage", "rank", "weights", "licence", "source", "quality", "sample_rate_hz"):
            table[key] = getattr(entry, key)
        for key in ("max_batch", "backend"):
            if key in found:
                table[key] = found[key]
        table["origin"] = _inline(entry.origin)
        table["facts"] = dict(entry.facts)
        table["files"] = found["files"]
        document.add(tomlkit.nl())
        document[entry.name] = table
    write(tomlkit.dumps(document).encode(), manifest_path)


def with_backend(entry: ModelEntry, device: str, backend: str) -> ModelEntry:
    """The same model, run by another back end on a device."""
    return replace(entry, backend={**entry.backend, device: backend})


def backend_of(architecture: str) -> dict[str, str]:
    """What the manifest has this architecture run in."""
    for entry in read_manifest().values():
        named = entry.origin.get("architecture") or entry.facts.get("architecture") or entry.name
        if named == architecture:
            return dict(entry.backend)
    return {}


def _inline(table: Mapping[str, Any]) -> Any:
    inline = tomlkit.inline_table()
    inline.update(dict(table))
    return inline


def _files(files: tuple[ModelFile, ...]) -> Any:
    tables = tomlkit.aot()
    for file in files:
        table = tomlkit.table()
        table["path"], table["sha256"] = file.path, file.sha256
        for key, tensors in (("inputs", file.inputs), ("outputs", file.outputs)):
            table[key] = json.loads(
                json.dumps([[t.name, t.datatype, list(t.shape)] for t in tensors])
            )
        tables.append(table)
    return tables
