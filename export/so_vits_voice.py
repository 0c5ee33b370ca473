"""G_*.pth and config.json of so-vits-svc-fork -> a voice: so-vits-svc 4.0 and quickvc."""

from __future__ import annotations

import importlib.resources
import inspect
import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.array_names import require_same_names
from export.contentvec import CONTENT_OF
from export.exporter import Architecture, Arrays, Case, Original
from export.pitch_estimator import load_pitch_estimator
from export.random_weights import fill_at_random
from export.read_arrays import read_arrays
from export.real_audio import mono_song
from export.so_vits import ServedVoice, fork_module, fuse_weight_norms
from export.static_int8 import quantise_convolutions
from export.trace import Axes, to_onnx, to_torchscript
from remix.errors import InvalidModel
from remix.pitch import MIN_CONFIDENCE, interpolate_unvoiced
from remix.stages import Tensors
from remix.vocal_frames import FRAME_SAMPLES, SAMPLE_RATE_HZ

ENCODER_OF = {256: "contentvec-256l9", 768: "contentvec-768l12"}
"""Channels of content -> the manifest entry of the encoder that makes them."""

NOISE_SCALE = 0.4
"""Source: so-vits-svc-fork 4.2.30, `Svc.infer`."""

WINDOW_FRAMES = 512
"""5.9 s. Source: `max_speclen` of its configurations, the longest that a voice is trained on."""

F0_RANGE_HZ = (50.0, 1100.0)
"""What `f0_to_coarse` tells apart. A checkpoint does not say where its speakers are at home."""

NOT_FOR_INFERENCE = ("enc_q.", "f0_decoder.")
"""Parts of the network that only training, or `auto_predict_f0`, runs: may be absent."""

INT8_CHANNELS = 64
"""Narrower residual blocks stay in float: they cost little, and all of so-vits-svc 4.0's decoder in
int8 has 29 dB of SI-SDR against float, without them 32 dB (random weights)."""

HARMONICS = 9
TEMPLATES = {"so-vits-4.0": "so-vits-svc-4.0v1-legacy", "quickvc": "quickvc"}
"""Architecture -> the configuration in the package that describes it."""


class SoVits(Original):
    """A SynthesizerTrn of so-vits-svc-fork, its weight norms fused as `Svc.load_model` does."""

    stage = "convert_voice"
    waveforms = frozenset({"audio"})

    def __init__(self, net: Any, speakers: dict[str, int]) -> None:
        fuse_weight_norms(net)
        self.net = net.eval()
        self.voice = ServedVoice(net).eval()
        self.sample_rate_hz: int = net.sampling_rate
        low_hz, high_hz = F0_RANGE_HZ
        self.facts = {
            "kind": "voice",
            "content_model": ENCODER_OF[net.ssl_dim],
            "pitch_model": "fcpe",
            "window_frames": WINDOW_FRAMES,
            "frame_samples": self.voice.frame_samples,
            "content_expansion": "repeat",
            "unvoiced_f0": "interpolated",
            "latent_channels": net.inter_channels,
            "noise_scale": NOISE_SCALE,
            "voices": {
                name: {"speaker": speaker, "low_hz": low_hz, "high_hz": high_hz}
                for name, speaker in speakers.items()
            },
        }

    def reference(self, inputs: Tensors) -> Arrays:
        """See `infer`."""
        return {"audio": infer(self.net.to(self.device), inputs, self.device)}

    def onnx(self) -> onnx.ModelProto:
        """See `export_voice`."""
        model = export_voice(self.voice)
        onnx.helper.set_model_props(model, self._graph_facts())
        return model

    def _graph_facts(self) -> dict[str, str]:
        return {
            "stage": self.stage,
            "kind": "voice",
            "content": CONTENT_OF[self.net.ssl_dim],
            "sample_rate_hz": str(self.sample_rate_hz),
            "frame_samples": str(self.voice.frame_samples),
        }

    def int8(self, graph: Path, out: Path) -> bool:
        """The decoder's wide residual blocks, most of all the work, in int8."""
        examples = [self._inputs(1, 200), voice_inputs(self.voice, hum(1, 150))]
        widths = [self.net.upsample_initial_channel >> level for level in range(1, 9)]
        levels = sum(width >= INT8_CHANNELS for width in widths[: len(self.net.dec.ups)])
        blocks = range(levels * self.net.dec.num_kernels)
        quantise_convolutions(
            graph, out, tuple(f"/resblocks.{block}/" for block in blocks), examples
        )
        return True

    def torchscript(self) -> bytes:
        """See `onnx`."""
        inputs = as_tensors(voice_inputs(self.voice, hum(2, 120)))
        return to_torchscript(self.voice, inputs, ["audio"], self._graph_facts())

    def weights(self) -> Arrays:
        """Every parameter of the parts that sing, with the weight norms multiplied out."""
        return {
            name: tensor.numpy()
            for name, tensor in self.voice.state_dict().items()
            if not name.removeprefix("net.").startswith(NOT_FOR_INFERENCE)
        }

    def cases(self) -> Iterator[Case]:
        """Melodies of the demo song at several lengths and batch sizes; nothing voiced."""
        for n_frames, batch in ((120, 2), (WINDOW_FRAMES, 1), (37, 3)):
            yield Case(
                f"song's melody, {n_frames} frames, batch {batch}",
                self._inputs(batch, n_frames),
            )
        silence = (np.full((1, 86), 100.0, np.float32), np.zeros((1, 86), np.bool_))
        yield Case("silence, 86 frames", voice_inputs(self.voice, silence))

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows of the flow."""
        return self._inputs(batch, WINDOW_FRAMES)

    def _inputs(self, batch: int, n_frames: int) -> Tensors:
        return voice_inputs(self.voice, melody(batch, n_frames))


Melody = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""F0 in Hz, positive everywhere, and where it is voiced: [B, N] both."""


def melody(batch: int, n_frames: int, frame_s: float = 512 / 44100) -> Melody:
    """The demo song's F0 by FCPE, at a voice's frames."""
    seconds = np.ceil(n_frames * frame_s * 100) / 100
    samples = torch.from_numpy(mono_song(SAMPLE_RATE_HZ, float(seconds), batch))
    with torch.no_grad():
        estimates = [estimate.numpy() for estimate in _pitch_estimator()(samples)]
    position = np.arange(n_frames) * frame_s * (SAMPLE_RATE_HZ / FRAME_SAMPLES) - 0.5
    nearest = np.clip(np.round(position).astype(np.int64), 0, estimates[0].shape[1] - 1)
    f0_hz, voiced = estimates[0][:, nearest], estimates[1][:, nearest] >= MIN_CONFIDENCE
    rows = [interpolate_unvoiced(*row) for row in zip(f0_hz, voiced, strict=True)]
    return np.stack(rows), voiced


def hum(batch: int, n_frames: int) -> Melody:
    """A glide from 100 to 400 Hz whose last third is unvoiced."""
    f0_hz = np.geomspace(100.0, 400.0, n_frames).astype(np.float32)
    voiced = np.arange(n_frames) < n_frames * 2 // 3
    return np.tile(f0_hz, (batch, 1)), np.tile(voiced, (batch, 1))


@cache
def _pitch_estimator() -> Any:
    return load_pitch_estimator()


def voice_inputs(voice: ServedVoice, sung: Melody) -> dict[str, NDArray[Any]]:
    """A melody with seeded content, and the noise and phases that `SynthesizerTrn.infer` draws.

    The original adds noise to nine harmonics before it sums them; here stands the sum.
    """
    net, frame_samples = voice.net, voice.frame_samples
    f0_hz, voiced = sung
    batch, n_frames = f0_hz.shape
    rng = np.random.default_rng(n_frames)
    inputs: dict[str, NDArray[Any]] = {
        "content": rng.standard_normal((batch, n_frames, net.ssl_dim), np.float32),
        "f0_hz": f0_hz,
        "voiced": voiced.astype(np.float32),
        "speaker": rng.integers(0, net.n_speakers, (batch, 1)),
    }
    torch.manual_seed(n_frames)
    noise = torch.randn(batch, net.inter_channels, n_frames).transpose(1, 2)
    inputs["noise"] = np.ascontiguousarray(noise.numpy() * np.float32(NOISE_SCALE))
    if net.type_ != "hifi-gan":
        return inputs
    weight = net.dec.m_source.l_linear.weight[0].detach()
    start = torch.rand(batch, HARMONICS).numpy().astype(np.float64)
    start[:, 0] = 0.0
    step = f0_hz[:, :, None].astype(np.float64) * np.arange(1, HARMONICS + 1)
    step *= frame_samples / net.sampling_rate
    begin = np.cumsum(step, axis=1) - step + start[:, None]
    inputs["phase"] = np.mod(begin, 1.0).astype(np.float32)
    drawn = torch.randn(batch, n_frames * frame_samples, HARMONICS)
    inputs["source_noise"] = ((drawn @ weight) / weight.norm()).numpy()
    return inputs


@torch.no_grad()
def infer(net: Any, inputs: Tensors, device: str = "cpu") -> NDArray[np.float32]:
    """`SynthesizerTrn.infer`; on a CPU it draws what `voice_inputs` drew: [B, T]."""
    torch.manual_seed(inputs["f0_hz"].shape[1])
    given = {name: tensor.to(device) for name, tensor in as_tensors(inputs).items()}
    audio: NDArray[np.float32] = (
        net.infer(
            given["content"].transpose(1, 2),
            given["f0_hz"].clone(),
            given["voiced"],
            g=given["speaker"],
            noice_scale=NOISE_SCALE,
        )[:, 0]
        .cpu()
        .numpy()
    )
    return audio


def as_tensors(inputs: Tensors) -> dict[str, torch.Tensor]:
    """The same arrays for torch."""
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def export_voice(voice: ServedVoice) -> onnx.ModelProto:
    """A voice as a graph in fp32, any batch size and length.

    Inputs and outputs: see `ServedVoice.forward`; `phase` and `source_noise` only with an NSF
    decoder.
    """
    net = voice.net
    axes: Axes = {
        "content": ["B", "N", net.ssl_dim],
        "f0_hz": ["B", "N"],
        "voiced": ["B", "N"],
        "speaker": ["B", 1],
        "noise": ["B", "N", net.inter_channels],
        "phase": ["B", "N", HARMONICS],
        "source_noise": ["B", "T"],
        "audio": ["B", "T"],
    }
    if not voice.has_excitation:
        del axes["phase"], axes["source_noise"]
    return to_onnx(voice, as_tensors(voice_inputs(voice, hum(2, 120))), axes)


def load_so_vits(path: Path, architecture: str) -> SoVits:
    """A voice from a folder with `config.json` and `G_*.pth`, the latest; or from one `G_*.pth`.

    Raises:
        InvalidModel: a file is missing or damaged or names code, or its arrays are not those of
            the network that `config.json` describes.
    """
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / "config.json")
    net = _network(config)
    found = "quickvc" if net.type_ == "ms-istft" else "so-vits-4.0"
    if found != architecture or net.type_ not in ("ms-istft", "hifi-gan"):
        raise InvalidModel(
            f"{folder / 'config.json'} describes a decoder {net.type_!r}: that is not "
            f"{architecture}. Known are hifi-gan (so-vits-4.0) and ms-istft (quickvc)."
        )
    checkpoint = path if path.is_file() else _latest(folder)
    arrays = {
        name.removeprefix("model."): array
        for name, array in read_arrays(checkpoint.read_bytes()).items()
        if name.startswith("model.")
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    for names in (arrays, wanted):
        for name in [name for name in names if name.startswith(NOT_FOR_INFERENCE)]:
            del names[name]
    require_same_names(checkpoint, arrays, wanted)
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    net.load_state_dict(state, strict=False)
    return SoVits(net, _speakers(config, net.n_speakers, folder / "config.json"))


def write_random_so_vits(path: Path, architecture: str) -> None:
    """A folder with a full-size `G_0.pth` of seeded random weights and its `config.json`."""
    template = f"preprocessing/config_templates/{TEMPLATES[architecture]}.json"
    config = json.loads(
        importlib.resources.files("so_vits_svc_fork").joinpath(template).read_text()
    )
    config["spk"] = {"random-high": 0, "random-low": 1}
    net = _network(config)
    fill_at_random(net)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    state = {
        name: tensor
        for name, tensor in net.state_dict().items()
        if not name.startswith(NOT_FOR_INFERENCE)
    }
    torch.save({"model": state, "iteration": 0, "learning_rate": 1e-4}, path / "G_0.pth")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidModel(f"{path} is missing: a G_*.pth needs its config.json beside it.")
    try:
        config = json.loads(path.read_text())
        return {"model": dict(config["model"]), "data": dict(config["data"]), "spk": config["spk"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"{path} is no config.json of so-vits-svc: {error!r}.") from error


def _latest(folder: Path) -> Path:
    found = sorted(folder.glob("G_*.pth"), key=lambda path: (len(path.stem), path.stem))
    if not found:
        raise InvalidModel(f"{folder} holds no G_*.pth: give the folder that training wrote.")
    return found[-1]


def _network(config: dict[str, Any]) -> Any:
    network = fork_module("modules.synthesizers").SynthesizerTrn
    known = inspect.signature(network).parameters
    options = {name: value for name, value in config["model"].items() if name in known}
    data = config["data"]
    try:
        net = network(
            **{
                "spec_channels": data["filter_length"] // 2 + 1,
                "segment_size": 20,  # training's alone
                "sampling_rate": data["sampling_rate"],
                **options,
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModel(
            f"config.json describes no network of so-vits-svc: {error!r}."
        ) from error
    frame_samples, hop = ServedVoice(net).frame_samples, data.get("hop_length")
    is_projected = data.get("contentvec_final_proj", True)
    if frame_samples != hop or net.ssl_dim != (256 if is_projected else 768):
        raise InvalidModel(
            f"config.json contradicts itself: hop_length is {hop}, its decoder makes "
            f"{frame_samples} samples a frame; ssl_dim is {net.ssl_dim}, and "
            f"contentvec_final_proj is {is_projected} (256 with, 768 without)."
        )
    return net.eval()


def _speakers(config: dict[str, Any], n_speakers: int, path: Path) -> dict[str, int]:
    speakers = config["spk"]
    is_map = isinstance(speakers, dict) and all(
        isinstance(number, int) and 0 <= number < n_speakers for number in speakers.values()
    )
    if not is_map or not speakers:
        raise InvalidModel(
            f"{path}: spk is {speakers!r}; it must map each speaker's name to a number from 0 to "
            f"{n_speakers - 1}."
        )
    return dict(speakers)


ARCHITECTURES = tuple(
    Architecture(
        name,
        "convert_voice",
        partial(load_so_vits, architecture=name),
        partial(write_random_so_vits, architecture=name),
    )
    for name in TEMPLATES
)
