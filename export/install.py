"""models.toml -> a folder of verified model files. `make models` runs this; it needs no torch.

Each file has an origin (`export/origins.py`). A model that needs a hub or torch and finds none is
left out, and the report says so; its stage is then served by its other models. Everything else
that cannot be installed is an error.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.origins import MAKERS, OPTIONAL_KINDS, LeftOut, Places, recipe_of, require_what_it_needs
from export.progress import Progress
from remix.errors import InvalidModel
from remix.manifest import (
    MANIFEST_PATH,
    RECEIPT,
    Manifest,
    ModelEntry,
    ModelFile,
    default_model,
    expected_sha256,
    installed,
    read_manifest,
    read_receipt,
    sha256_of,
)
from remix.settings import read_settings
from remix.stages import STAGES, Stage


@dataclass
class Report:
    """What became of each model, by name."""

    installed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def install(manifest: Manifest, places: Places, progress: Progress) -> Report:
    """Bring the models folder to what the manifest says; what is right already is not touched.

    Returns:
        What became of each model. A model that failed does not keep others from being installed.
    """
    report = Report()
    places.models_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(places.models_dir), _receipt(places.models_dir) as receipt:
        for entry in manifest.values():
            pending = [f for f in entry.files if not _is_right(places.models_dir, f, receipt)]
            if not pending:
                report.unchanged.append(entry.name)
                continue
            try:
                for file in pending:
                    require_what_it_needs(recipe_of(entry, file), places)
                    with progress.of(entry.name) as watch:
                        sha256 = _install_file(entry, file, places, watch)
                    receipt[file.path] = _seen(places.models_dir / file.path, sha256)
                report.installed.append(entry.name)
            except LeftOut as reason:
                report.left_out[entry.name] = str(reason)
            except (InvalidModel, OSError) as error:
                report.failed[entry.name] = str(error)
    return report


def check(manifest: Manifest, models_dir: Path) -> Report:
    """Verify the checksum of every file that is there; nothing is fetched or changed."""
    report = Report()
    for entry in manifest.values():
        try:
            for file in entry.files:
                entry.verified_path(models_dir, file)
            report.unchanged.append(entry.name)
        except InvalidModel as error:
            optional = not any((models_dir / f.path).exists() for f in entry.files) and all(
                recipe_of(entry, f)["kind"] in OPTIONAL_KINDS for f in entry.files
            )
            (report.left_out if optional else report.failed)[entry.name] = str(error)
    return report


def _install_file(
    entry: ModelEntry, file: ModelFile, places: Places, watch: Callable[[str, float], None]
) -> str:
    """Make one file and return its checksum, which is the manifest's if that has one."""
    recipe = recipe_of(entry, file)
    path = places.models_dir / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.new")
    made.unlink(missing_ok=True)
    try:
        MAKERS[recipe["kind"]](entry, recipe, places, made, watch)
        if (found := sha256_of(made)) != (file.sha256 or found):
            raise InvalidModel(
                f"{file.path} of model {entry.name} came out with sha256 {found}, the manifest "
                f"says {file.sha256}: its origin has changed, or the manifest is wrong."
            )
        made.replace(path)
        return found
    except KeyError as error:
        raise InvalidModel(f"The origin of model {entry.name} lacks {error}.") from error
    finally:
        made.unlink(missing_ok=True)


# --- the receipt: a second run looks at sizes and times, not at contents -------------------

Receipt = dict[str, dict[str, Any]]


@contextmanager
def _receipt(models_dir: Path) -> Iterator[Receipt]:
    path = models_dir / RECEIPT
    before = read_receipt(models_dir)
    receipt = dict(before)
    try:
        yield receipt
    finally:
        if receipt != before or not path.is_file():
            new = path.with_name(f"{path.name}.new")
            new.write_text(json.dumps(receipt, indent=1, sort_keys=True))
            new.replace(path)


def _seen(path: Path, sha256: str) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": sha256, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def note_installed(models_dir: Path, paths: list[str]) -> None:
    """Enter files into the receipt that somebody else than `install` has made."""
    with _only_one(models_dir), _receipt(models_dir) as receipt:
        for path in paths:
            receipt[path] = _seen(models_dir / path, sha256_of(models_dir / path))


def _is_right(models_dir: Path, file: ModelFile, receipt: Receipt) -> bool:
    path = models_dir / file.path
    if not path.is_file():
        return False
    seen = _seen(path, expected_sha256(models_dir, file))
    if receipt.get(file.path) == seen:
        return True
    if sha256_of(path) != seen["sha256"]:
        return False
    receipt[file.path] = seen
    return True


@contextmanager
def _only_one(models_dir: Path) -> Iterator[None]:
    """Let a second `make models` wait for the first."""
    with (models_dir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- the command ---------------------------------------------------------------------------


def explain(manifest: Manifest, models_dir: Path, report: Report) -> Iterator[str]:
    """Say in lines what is there, what is not, and why."""
    left_out: dict[tuple[Stage, str], list[str]] = {}
    for name, reason in report.left_out.items():
        if manifest[name].weights != "random":  # of use to measurements only, which say so
            left_out.setdefault((manifest[name].stage, reason), []).append(name)
    for (stage, reason), names in left_out.items():
        others = [e.name for e in installed(manifest, stage, models_dir)]
        instead = f"{stage} is served by {others[0]}" if others else f"{stage} has no model"
        yield f"left out: {', '.join(names)}: {reason.rstrip('.')}; {instead}."
    for name, reason in report.failed.items():
        yield f"FAILED: {name}: {reason}"
    for stage in STAGES:
        if not any(entry.stage == stage for entry in manifest.values()):
            yield f"FAILED: the manifest has no model for {stage}."
        elif not installed(manifest, stage, models_dir):
            yield f"FAILED: no model for {stage} is installed."
        else:
            entry = default_model(manifest, stage, models_dir)
            yield f"{stage}: {entry.name} ({entry.weights} weights, {entry.licence})"


def main(arguments: list[str] | None = None) -> int:
    """Install or check the models; 0 if every stage has what it needs, else 1."""
    settings = read_settings()
    parser = argparse.ArgumentParser(prog="python -m export.install", description=__doc__)
    parser.add_argument("--manifest", type=Path, default=MANIFEST_PATH)
    parser.add_argument("--models", type=Path, default=settings.models_dir)
    parser.add_argument("--sources", type=Path, default=MANIFEST_PATH.parent / ".cache/sources")
    parser.add_argument("--hub", default="", help="base address of the model hub")
    parser.add_argument("--check", action="store_true", help="verify only")
    options = parser.parse_args(arguments)

    try:
        manifest = read_manifest(options.manifest)
    except InvalidModel as error:
        print(f"FAILED: {error}")
        return 1
    if options.check:
        report = check(manifest, options.models)
    else:
        places = Places(options.models, options.sources, hub_url=options.hub)
        report = install(manifest, places, Progress(sys.stdout))
    lines = list(explain(manifest, options.models, report))
    print("\n".join(lines))
    return 1 if any(line.startswith("FAILED") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
