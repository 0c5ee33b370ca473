"""models.toml -> entries: what each model is, where its files are, what they must be.

Voices that were enrolled here are no part of models.toml: each has a folder of its own in the
models folder, `voices/NAME`, with an entry of the same form (`OwnVoices`).

A model's files are verified here and nowhere else; who loads a file asks for `verified_path`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from remix.errors import InvalidModel, NotFound
from remix.stages import STAGES, Stage

MANIFEST_PATH = Path(__file__).resolve().parent.parent / "models.toml"

_log = logging.getLogger(__name__)

RECEIPT = "installed.json"
"""In the models folder: what `make models` verified."""


VOICES_DIR, VOICE_FILE = "voices", "voice.toml"
"""In the models folder: enrolled voices, a folder each; and the manifest entry in it."""

TORCHSCRIPT_SUFFIX = ".ts"
"""Of files that the back end `torchscript` reads."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, Open Inference datatype (FP32, INT64, …) and shape of a tensor; -1 is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFile:
    """One file of a model, and the signature of the graph in it (empty if it is no graph).

    Args:
        path: in the models folder.
        sha256: of the file; empty where only a hub knows it, and then the one that was recorded
            when the file was installed (`RECEIPT`).
        inputs: of the graph.
        outputs: of the graph.
    """

    path: str
    sha256: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class ModelEntry:
    """One model of the manifest.

    Args:
        name: how it is called in every option, report and answer.
        stage: the runner that serves it.
        rank: among a stage's models that are installed, the highest rank is the default.
        weights: `published` (its authors' own), `trained-here`, or `random` (for speed and
            parity only, and labelled so wherever it answers).
        licence: SPDX identifier, or words where there is none.
        source: where the weights come from.
        quality: what was measured and by which command, or who reports it.
        sample_rate_hz: of its audio, 0 where it has none.
        max_batch: the largest batch worth making, by device: `cpu`, chosen on CPU cores, and
            `cuda`, a guess until somebody has measured it.
        files: what lies in the models folder.
        backend: what runs it, by device: `onnx` (where nothing is said), `openvino` or
            `torchscript` (runners/open_graph.py).
        origin: how `make models` gets the files; read by `export/install.py`.
        facts: everything else that the flow needs to know of it.
    """

    name: str
    stage: Stage
    rank: int
    weights: Literal["published", "trained-here", "random"]
    licence: str
    source: str
    quality: str
    sample_rate_hz: int
    max_batch: Mapping[str, int]
    files: tuple[ModelFile, ...]
    backend: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def is_installed(self, models_dir: Path) -> bool:
        """Whether every file is there (unverified: a checksum takes time)."""
        return all((models_dir / file.path).is_file() for file in self.files)

    def file(self, name: str) -> ModelFile:
        """The file whose path ends in `name`."""
        for file in self.files:
            if file.path.endswith(name):
                return file
        raise InvalidModel(f"Model {self.name} has no file {name} in the manifest.")

    def graph_file(self, backend: str) -> ModelFile:
        """The file that a back end reads: a TorchScript archive, or the first of the others.

        Raises:
            InvalidModel: there is none.
        """
        for file in self.files:
            if file.path.endswith(TORCHSCRIPT_SUFFIX) == (backend == "torchscript"):
                return file
        raise InvalidModel(
            f"Model {self.name} has no file for the backend {backend}: export it with "
            f"`philharmonics export {self.name} --to {backend}`."
        )

    def verified_path(self, models_dir: Path, file: ModelFile) -> Path:
        """Where the file lies, after its checksum was seen to be right.

        Raises:
            InvalidModel: the file is missing, or is not the manifest's.
        """
        path = models_dir / file.path
        if not path.is_file():
            raise InvalidModel(f"{path} of model {self.name} is missing: run `make models`.")
        found, expected = sha256_of(path), expected_sha256(models_dir, file)
        if found != expected:
            raise InvalidModel(
                f"{path} of model {self.name} has sha256 {found}, the manifest says "
                f"{expected or 'nothing'}: remove the file and run `make models`."
            )
        return path


Manifest = dict[str, ModelEntry]


def read_receipt(models_dir: Path) -> dict[str, dict[str, Any]]:
    """What `make models` saw of each file: checksum, size and time, by path."""
    path = models_dir / RECEIPT
    if path.is_file():
        with suppress(ValueError):  # a damaged receipt is as good as none
            return dict(json.loads(path.read_text()))
    return {}


def expected_sha256(models_dir: Path, file: ModelFile) -> str:
    """The manifest's checksum, or the one that was recorded at installation; empty if none."""
    return file.sha256 or str(read_receipt(models_dir).get(file.path, {}).get("sha256", ""))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def read_manifest(path: Path = MANIFEST_PATH) -> Manifest:
    """Every entry of a manifest, by name.

    Raises:
        InvalidModel: an entry lacks a field or has a wrong one.
    """
    return dict(_entries(path))


def _entries(path: Path) -> Iterator[tuple[str, ModelEntry]]:
    for name, table in tomllib.loads(path.read_text()).items():
        try:
            entry = _entry(name, dict(table))
        except (KeyError, TypeError) as error:
            raise InvalidModel(f"{path}: entry {name} is not a model: {error!r}.") from error
        if entry.stage not in STAGES:
            raise InvalidModel(f"{path}: entry {name} has stage {entry.stage!r}.")
        yield name, entry


class OwnVoices:
    """Keeps a manifest as the enrolled voices in the models folder are, while it is in use.

    Args:
        manifest: without them; it is changed, so that whoever has it sees what is new.
        models_dir: where they are.
    """

    def __init__(self, manifest: Manifest, models_dir: Path) -> None:
        self._manifest = manifest
        self._folder = models_dir / VOICES_DIR
        self._seen: dict[Path, int] = {}
        self._names: set[str] = set()

    def refresh(self) -> tuple[list[ModelEntry], list[str]]:
        """Take in what was enrolled, and out what was revoked; what is unreadable is left out.

        Returns:
            The new entries, and the names of those that are gone.
        """
        seen = {}
        for path in sorted(self._folder.glob(f"*/{VOICE_FILE}")):
            with suppress(OSError):  # revoked this moment
                seen[path] = path.stat().st_mtime_ns
        if seen == self._seen:
            return [], []
        self._seen = seen
        entries: Manifest = {}
        for path in seen:
            try:
                entries |= {name: entry for name, entry in _entries(path) if _is_own_voice(entry)}
            except (InvalidModel, OSError, ValueError) as error:
                _log.warning("The voice in %s is left out: %s", path.parent, error)
        known = self._names
        own = {n: entry for n, entry in entries.items() if n in known or n not in self._manifest}
        gone = sorted(known - set(own))
        for name in gone:
            del self._manifest[name]
        self._manifest |= own
        self._names = set(own)
        return [entry for name, entry in own.items() if name not in known], gone


def stage_of(manifest: Manifest, model: str) -> Stage:
    """Which stage a model works in.

    Raises:
        NotFound: it is a voice that was revoked while it sang.
    """
    if model not in manifest:
        raise NotFound(
            f"Model {model} is there no more.",
            value=model,
            limit="a model that is installed",
            remedy="Choose another voice.",
        )
    return manifest[model].stage


def _is_own_voice(entry: ModelEntry) -> bool:
    """Nobody's voice is served from a user's folder without a consent."""
    return entry.facts.get("kind") == "voice" and "consent" in entry.facts


def installed(manifest: Manifest, stage: Stage, models_dir: Path) -> list[ModelEntry]:
    """The models of a stage whose files are there, the default first."""
    found = [e for e in manifest.values() if e.stage == stage and e.is_installed(models_dir)]
    return sorted(found, key=lambda entry: -entry.rank)


def default_model(manifest: Manifest, stage: Stage, models_dir: Path) -> ModelEntry:
    """The installed model of highest rank.

    Raises:
        NotFound: the stage has no installed model.
    """
    found = installed(manifest, stage, models_dir)
    if not found:
        raise NotFound(
            f"0 models for {stage} are installed in {models_dir}; at least 1 is needed.",
            value=0,
            limit=1,
            remedy="Run `make models`.",
        )
    return found[0]


def _entry(name: str, table: dict[str, Any]) -> ModelEntry:
    files = tuple(
        ModelFile(
            path=file["path"],
            sha256=file["sha256"],
            inputs=_specs(file.get("inputs", [])),
            outputs=_specs(file.get("outputs", [])),
        )
        for file in table.pop("files")
    )
    return ModelEntry(name=name, files=files, **table)


def _specs(rows: list[list[Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in rows)
