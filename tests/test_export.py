"""Exporting: what is refused, what is compared, what is written; on small networks."""

from __future__ import annotations

import importlib.resources
import io
import json
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from demucs.htdemucs import HTDemucs

from benchmarks.export import main as bench_main
from export.__main__ import main as export_main
from export.architectures import architecture_of, architectures
from export.artefact import Wanted, record, specs, write_artefact
from export.check import main as check_main
from export.check import perturb, perturbed_arrays
from export.compare import FP32, difference, differences, initializers, wrong_arrays
from export.exporter import Case
from export.origins import Places, fetch_checkpoint
from export.separate_stems import Demucs, load_demucs
from export.serve import ServedCall
from export.so_vits_voice import TEMPLATES
from export.time_calls import Side, time_in_turn
from export.trace import OPSET, to_torchscript
from remix.errors import InvalidModel, ModelFailed
from remix.manifest import MANIFEST_PATH, ModelEntry, ModelFile, read_manifest, sha256_of
from remix.settings import Settings
from runners.open_graph import open_graph
from runners.torchscript_session import compute_on
from tests.hub_server import serve_hub

SMALL: dict[str, Any] = {
    "sources": ["drums", "vocals"],
    "channels": 8,
    "depth": 3,
    "t_layers": 2,
    "t_heads": 2,
    "dconv_mode": 1,
    "segment": 0.2,
}


def small(seed: int, **changed: Any) -> HTDemucs:
    """An HTDemucs that takes a moment, no norm and no layer scale of it at its neutral value."""
    torch.manual_seed(seed)
    model: HTDemucs = HTDemucs(**{**SMALL, **changed}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def package(model: HTDemucs, **changed: Any) -> dict[str, Any]:
    return {
        "klass": HTDemucs, "args": (), "kwargs": {**SMALL, **changed}, "state": model.state_dict(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def original() -> Demucs:
    return Demucs([small(0)])


@pytest.fixture(scope="module")
def written(
    original: Demucs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelEntry, Settings]:
    folder = tmp_path_factory.mktemp("models")
    entry = write_artefact(original, Wanted("small", "random"), folder, ("onnx", "torchscript"))
    return entry, Settings(folder, folder)


def noise(original: Demucs, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    shape = (batch, 2, original.window_samples)
    return {"mixture": rng.standard_normal(shape, np.float32)}


# --- what is refused ------------------------------------------------------------------------------


class Planted:
    """What a malicious checkpoint has unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def truncated(path: Path) -> None:
    torch.save(package(small(0)), path)
    path.write_bytes(path.read_bytes()[:20_000])


def mismatching(path: Path) -> None:
    torch.save(package(small(0, channels=12)), path)


def malicious(path: Path) -> None:
    torch.save({**package(small(0)), "extra": Planted(f"touch {path.parent / 'executed'}")}, path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (truncated, "is no checkpoint of an HTDemucs, and nothing in it was executed"),
        (mismatching, "of another shape: encoder.0.conv.weight [12, 4, 8, 1] instead of"),
        (malicious, "is no checkpoint of an HTDemucs, and nothing in it was executed"),
    ],
)
def test_export_refuses_a_bad_checkpoint_and_executes_nothing(
    make: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    make(tmp_path / "model.th")
    manifest = tmp_path / "models.toml"
    manifest.write_text("")
    command = [sys.executable, "-m", "export", "mine", "--architecture", "htdemucs"]
    done = subprocess.run(
        [
            *command, "--checkpoint", str(tmp_path / "model.th"),
            "--models", str(tmp_path), "--manifest", str(manifest),
        ],
        cwd=MANIFEST_PATH.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "executed").exists()
    assert manifest.read_text() == ""


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # so-vits-svc-fork
@pytest.mark.parametrize("name", sorted(architectures()))
def test_no_architecture_takes_a_checkpoint_that_is_cut_short_foreign_or_code(
    name: str, tmp_path: Path
) -> None:
    if name in TEMPLATES:  # a voice is read by what lies beside it
        template = f"preprocessing/config_templates/{TEMPLATES[name]}.json"
        config = importlib.resources.files("so_vits_svc_fork").joinpath(template).read_text()
        (tmp_path / "config.json").write_text(config)
    path = tmp_path / "G_0.pth"
    contents: dict[str, dict[str, Any]] = {
        "foreign": {"model": {"stranger": torch.ones(3)}},
        "code": {"model": {}, "extra": Planted(f"touch {tmp_path / 'executed'}")},
    }
    for content in contents.values():
        torch.save(content, path)
        with pytest.raises(InvalidModel):
            architecture_of(name).load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidModel):
        architecture_of(name).load(path)
    assert not (tmp_path / "executed").exists()


def test_the_malicious_checkpoint_would_have_executed(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    malicious(tmp_path / "model.th")
    torch.load(tmp_path / "model.th", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_missing_and_unexpected_arrays_are_listed(tmp_path: Path) -> None:
    content = package(small(0))
    state = dict(content["state"])
    state["stranger"] = state.pop("encoder.1.conv.bias")
    torch.save({**content, "state": state}, tmp_path / "model.th")
    with pytest.raises(InvalidModel) as refused:
        load_demucs(tmp_path / "model.th")
    assert "1 missing: encoder.1.conv.bias" in str(refused.value)
    assert "1 unexpected: stranger" in str(refused.value)


@pytest.mark.parametrize("content", ["models: 3", "[", "weights: []", "models: [absent]"])
def test_a_bag_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "bag.yaml").write_text(content)
    with pytest.raises(InvalidModel):
        load_demucs(tmp_path / "bag.yaml")


def test_a_pickle_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.th").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InvalidModel):
        load_demucs(tmp_path / "model.th")


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "least_db"), [("onnx", 60.0), ("torchscript", 60.0), ("openvino", 30.0)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_backend_serves_what_demucs_computes(
    backend: str, least_db: float, batch: int, original: Demucs,
    written: tuple[ModelEntry, Settings],
) -> None:  # fmt: skip
    entry, settings = written
    served = ServedCall(replace(entry, backend={"cpu": backend}), settings)
    (found,) = differences(original, served, [Case("noise", noise(original, batch))])
    assert found.si_sdr_db is not None
    assert found.si_sdr_db > least_db


def test_a_backend_that_nobody_knows_is_refused(written: tuple[ModelEntry, Settings]) -> None:
    entry, settings = written
    with pytest.raises(InvalidModel, match="it must be onnx, openvino or torchscript"):
        open_graph(replace(entry, backend={"cpu": "abacus"}), settings)


def test_a_model_without_an_archive_cannot_be_torchscript(
    written: tuple[ModelEntry, Settings],
) -> None:
    entry, settings = written
    with pytest.raises(InvalidModel, match="--to torchscript"):
        open_graph(replace(entry, files=entry.files[:1], backend={"cpu": "torchscript"}), settings)


def test_a_graph_that_openvino_cannot_compute_is_an_error_of_ours(tmp_path: Path) -> None:
    """FCPE's is one: OpenVINO 2026.4 takes it, and fails at the first call."""
    value, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])]
    shape = onnx.numpy_helper.from_array(np.array([3]), "shape")
    graph = onnx.helper.make_graph(
        nodes, "three", [value("x", real, ["N"])], [value("y", real, [3])], [shape]
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "t.onnx")
    file = ModelFile("t.onnx", sha256_of(tmp_path / "t.onnx"), specs(list(graph.input)),
                     specs(list(graph.output)))  # fmt: skip
    entry = ModelEntry(
        name="three", stage="convert_voice", rank=0, weights="random", licence="", source="",
        quality="", sample_rate_hz=0, max_batch={"cpu": 1}, files=(file,),
        backend={"cpu": "openvino"},
    )  # fmt: skip
    served = ServedCall(entry, Settings(tmp_path, tmp_path))
    assert served({"x": np.ones(3, np.float32)})["y"].tolist() == [1, 1, 1]
    with pytest.raises(ModelFailed, match="three broke in openvino"):
        served({"x": np.ones(4, np.float32)})


BLOCKED = """
import sys
sys.modules["{module}"] = None  # as if it were not installed
from pathlib import Path
from remix.errors import InvalidModel, ModelFailed
from remix.manifest import read_manifest
from remix.settings import Settings
from runners.open_graph import open_graph
from runners.torchscript_session import compute_on
folder = Path({folder!r})
entry = read_manifest(folder / "models.toml")["small"]
try:
    print(type(open_graph(entry, Settings(folder, folder))).__name__)
except InvalidModel as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("backend", "module", "says"),
    [
        ("torchscript", "torch", ["not installed here: install it", 'backend = { cpu = "onnx" }']),
        ("openvino", "openvino", ["openvino is not installed", "OnnxSession"]),
    ],
)
def test_a_backend_that_is_not_installed_is_replaced_or_says_what_to_do(
    backend: str,
    module: str,
    says: list[str],
    written: tuple[ModelEntry, Settings],
    tmp_path: Path,
) -> None:
    entry, settings = written
    for file in entry.files:
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).symlink_to(settings.models_dir / file.path)
    (tmp_path / "models.toml").write_text("")
    record(replace(entry, backend={"cpu": backend}), tmp_path / "models.toml")
    script = BLOCKED.format(module=module, folder=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=MANIFEST_PATH.parent, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    for part in says:
        assert part in ended.stdout + ended.stderr


def test_every_array_that_is_1_percent_wrong_is_noticed(
    original: Demucs, written: tuple[ModelEntry, Settings], tmp_path: Path
) -> None:
    entry, settings = written
    graph = settings.models_dir / entry.files[0].path
    weights, stored = original.weights(), initializers(graph)
    assert wrong_arrays(weights, stored) == []
    tried, unnoticed = perturbed_arrays(weights, stored)
    assert tried == len(weights) > 100
    assert unnoticed == []
    # And in a file: the smallest of all biases, which no output would tell.
    smallest = min(
        (name for name in weights if name.endswith("bias")),
        key=lambda name: float(np.abs(weights[name]).sum()),
    )
    assert perturb(graph, tmp_path / "wrong.onnx", smallest)
    (problem,) = wrong_arrays(weights, initializers(tmp_path / "wrong.onnx"))
    assert problem.startswith(smallest)


def test_outputs_tell_a_weight_that_counts(
    original: Demucs, written: tuple[ModelEntry, Settings], tmp_path: Path
) -> None:
    entry, settings = written
    path = tmp_path / "wrong.onnx"
    assert perturb(settings.models_dir / entry.files[0].path, path, "decoder.2.transposed.weight")
    file = replace(entry.files[0], path=path.name, sha256=sha256_of(path))
    served = ServedCall(replace(entry, files=(file,)), Settings(tmp_path, tmp_path))
    (found,) = differences(original, served, [Case("noise", noise(original, 1))])
    assert found.breaks(FP32, is_sound=True)


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (np.ones(8), False),
        (np.full(8, 1.0005), False),
        (np.full(8, 1.002), True),
        (np.full(8, np.nan), True),
        (np.ones(7), True),
    ],
)
def test_a_difference_breaks_its_bounds_when_it_should(found: Any, broken: bool) -> None:
    expected = np.ones(8, np.float32)
    assert difference("c", "o", expected, found.astype(np.float32)).breaks(FP32, False) == broken


def test_silence_is_compared_in_absolute_terms() -> None:
    silence = np.zeros(8, np.float32)
    assert not difference("c", "o", silence, silence).breaks(FP32, True)
    assert difference("c", "o", silence, silence + np.float32(0.01)).breaks(FP32, True)


def test_the_whole_check_fails_of_one_weight_that_is_1_percent_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_main(["basic-pitch", "--spoil"]) == 1
    assert "FAILED: basic-pitch" in capsys.readouterr().out


# --- devices --------------------------------------------------------------------------------------


def test_a_traced_module_makes_its_constants_on_the_device_that_it_is_told() -> None:
    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[0], device=x.device)

    inputs = {"x": torch.ones(3)}
    archive = io.BytesIO(to_torchscript(Counting(), inputs, ["y"], {}))
    module: Any = torch.jit.load(archive, "cpu")  # type: ignore[no-untyped-call]
    assert 'Device = prim::Constant[value="cpu"]' in str(module.inlined_graph)
    compute_on(module, "cuda")
    assert 'Device = prim::Constant[value="cuda"]' in str(module.inlined_graph)
    assert '[value="cpu"]' not in str(module.inlined_graph)
    compute_on(module, "cpu")
    np.testing.assert_array_equal(module(torch.ones(4)), [1, 2, 3, 4])


# Where there is one, the same command measures for minutes: it is then no error to be looked at.
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_report_of_a_gpu_that_is_not_there_is_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["mine", "--architecture", "fcpe", "--checkpoint", str(tmp_path)]
    assert export_main([*arguments, "--device", "cuda"]) == 3
    assert "needs a GPU" in capsys.readouterr().err
    assert bench_main(["--device", "cuda"]) == 3
    assert "needs a GPU" in capsys.readouterr().err


# --- bags, and other stems ------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[[1, 0], [0, 1]], [[1, 1], [0, 3]]])
def test_a_bag_is_what_demucs_makes_of_it(weights: Any, tmp_path: Path) -> None:
    names = ["a1b2c3d4", "b1b2c3d4"]
    torch.save(package(small(1)), tmp_path / f"{names[0]}.th")
    torch.save(package(small(2)), tmp_path / f"{names[1]}-0011aabb.th")
    (tmp_path / "bag.yaml").write_text(yaml.safe_dump({"models": names, "weights": weights}))
    assert_equal_to_demucs(load_demucs(tmp_path / "bag.yaml"), tmp_path)


def test_six_stems_are_served(tmp_path: Path) -> None:
    stems = ["drums", "bass", "other", "vocals", "guitar", "piano"]
    assert_equal_to_demucs(Demucs([small(3, sources=stems, bottom_channels=0)]), tmp_path)


def assert_equal_to_demucs(original: Demucs, folder: Path) -> None:
    """Windows, and a song of one and a half."""
    entry = write_artefact(original, Wanted("bag", "random"), folder)
    served = ServedCall(entry, Settings(folder, folder))
    song = np.random.default_rng(0).standard_normal((1, 2, original.window_samples * 3 // 2), "f4")
    cases = [Case("windows", noise(original, 2)), Case("song", {"song": 0.1 * song})]
    for found in differences(original, served, cases):
        assert not found.breaks(FP32, is_sound=True), found
    weights = original.weights()
    assert wrong_arrays(weights, initializers(folder / entry.files[0].path)) == []
    assert len({id(array) for array in weights.values()}) == len(weights)


def test_a_bag_comes_whole_from_a_hub_and_is_there_without_it(tmp_path: Path) -> None:
    files = {f"{name}.th": tmp_path / name for name in ("a1b2c3d4", "b1b2c3d4")}
    for seed, path in enumerate(files.values()):
        torch.save(package(small(seed)), path)
    with serve_hub() as hub:
        hub.files["o/bag/resolve/v2/bag.yaml"] = b"models: [a1b2c3d4, b1b2c3d4]\n"
        for name, path in files.items():
            hub.files[f"o/bag/resolve/v2/{name}"] = path.read_bytes()
        hub.break_off_after = [1000]
        sums = {"bag.yaml": "", **{name: sha256_of(path) for name, path in files.items()}}
        recipe = {"kind": "hub", "repo": "o/bag", "revision": "v2", "files": sums}
        places = Places(tmp_path, tmp_path / "sources", hub_url=hub.url)
        checkpoint = fetch_checkpoint(recipe, places, lambda what, share: None)
    assert len(load_demucs(checkpoint).models) == 2


# --- what is written ------------------------------------------------------------------------------


def test_the_manifest_keeps_its_comments_and_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(MANIFEST_PATH.read_text())
    before = tomllib.loads(path.read_text())
    entry = read_manifest(path)["basic-pitch"]
    record(replace(entry, max_batch={"cpu": 2, "cuda": 32}), path)
    after = tomllib.loads(path.read_text())
    assert after["basic-pitch"].pop("max_batch") == {"cpu": 2, "cuda": 32}
    del before["basic-pitch"]["max_batch"]
    assert after == before
    comments = [line for line in MANIFEST_PATH.read_text().splitlines() if line.startswith("#")]
    assert [line for line in path.read_text().splitlines() if line.startswith("#")] == comments


def test_a_new_entry_reads_back_as_it_was(
    written: tuple[ModelEntry, Settings], tmp_path: Path
) -> None:
    path = tmp_path / "models.toml"
    path.write_text("# the team's models\n")
    entry = replace(written[0], origin={"kind": "checkpoint"}, backend={"cpu": "openvino"})
    record(entry, path)
    assert path.read_text().startswith("# the team's models\n")
    found = read_manifest(path)["small"]
    assert replace(found, facts=dict(found.facts)) == replace(entry, facts=dict(entry.facts))


def test_sides_are_timed_in_turn_and_serving_has_no_torch(
    written: tuple[ModelEntry, Settings], original: Demucs, tmp_path: Path
) -> None:
    entry, settings = written
    manifest, inputs = tmp_path / "models.toml", tmp_path / "inputs.npz"
    manifest.write_text("")
    record(entry, manifest)
    np.savez(inputs, allow_pickle=False, **noise(original, 1))
    served = Side("served", str(inputs), str(manifest), "small", str(settings.models_dir), 1)
    missing = replace(served, name="missing", entry="small", models=str(tmp_path))
    timings = time_in_turn([served, missing], tmp_path, rounds=2)
    assert timings["served"].problem == ""
    assert len(timings["served"].runs_s) == 2
    assert timings["served"].peak_mb > 50
    assert "is missing: run `make models`" in timings["missing"].problem
    script = "import sys, export.serve, export.time_calls; print('torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=MANIFEST_PATH.parent, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert said.strip() == "False"


def test_the_graph_says_what_it_is(written: tuple[ModelEntry, Settings]) -> None:
    entry, settings = written
    graph = open_graph(entry, settings)
    assert graph.facts["weights_are"] == "random"
    assert json.loads(graph.facts["stems"]) == SMALL["sources"]
