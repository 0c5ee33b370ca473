"""16 kHz audio -> F0 and its confidence, by FCPE, mel spectrogram and decoding included."""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.array_names import require_same_names
from export.exporter import Architecture, Arrays, Case, Original
from export.mel_filters import power_spectrum, slaney_mel_filters
from export.random_weights import fill_at_random
from export.read_arrays import read_arrays
from export.real_audio import mono_song
from export.so_vits import stand_ins
from export.trace import Axes, to_onnx
from remix.stages import Tensors
from remix.vocal_frames import WINDOW_SAMPLES

with stand_ins(["torchaudio"]):  # resamples, which 16 kHz does not need
    import torchfcpe

SAMPLE_RATE_HZ = 16000
N_FFT = 1024
HOP_SAMPLES = 160
N_MELS = 128
REFERENCE_HZ = 10.0  # FCPE counts cents above 10 Hz
THRESHOLD = 0.006
"""Of confidence: below it the original says 0 Hz. Source: torchfcpe 0.0.4, `InferCFNaiveMelPE`."""


class PitchEstimator(nn.Module):
    """torchfcpe's network with its mel extractor and its local argmax decoder around it.

    Source: torchfcpe 0.0.4, `MelModule` and `CFNaiveMelPE.latent2cents_local_decoder`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def log_mel(self, samples: Tensor) -> Tensor:
        """samples: [B, T] -> [B, T / 160, 128]; frame i is centred at sample 160 i + 80."""
        margin = (N_FFT - HOP_SAMPLES) // 2
        padded = F.pad(samples[:, None], (margin, margin), mode="reflect")
        magnitude = (power_spectrum(padded[:, 0], N_FFT, HOP_SAMPLES) + 1e-9).sqrt()
        filters = slaney_mel_filters(SAMPLE_RATE_HZ, N_FFT, N_MELS, 0.0, 8000.0)
        return (filters @ magnitude).clamp(min=1e-5).log().transpose(1, 2)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """samples: [B, T] float32 in [-1, 1] at 16 kHz, T a multiple of 160.

        Returns:
            F0 in Hz, [B, T / 160], also where nothing is voiced; confidence, the same shape.
        """
        mel = self.log_mel(samples)
        # The original hears one frame more, the last one again, and normalises over all of them.
        mel = torch.cat([mel, mel[:, -1:]], dim=1)
        posterior = self.network(mel)[:, :-1]  # [B, N, 360]
        confidence, peak = posterior.max(dim=2, keepdim=True)
        near = (peak + torch.arange(-4, 5)).clamp(0, posterior.shape[2] - 1)
        weight = posterior.gather(2, near)
        cents = (self.network.cent_table[near] * weight).sum(2) / weight.sum(2)
        return REFERENCE_HZ * 2.0 ** (cents / 1200.0), confidence[:, :, 0]


class Fcpe(Original):
    """FCPE of torchfcpe."""

    stage = "convert_voice"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, network: Any) -> None:
        self.estimator = PitchEstimator(network).eval()
        self.facts: Mapping[str, Any] = {"kind": "pitch"}
        with stand_ins(["torchaudio"]), redirect_stdout(io.StringIO()):
            self._original = torchfcpe.models_infer.InferCFNaiveMelPE(
                _description(), _as_stored(network.state_dict())
            ).eval()

    @torch.no_grad()
    def reference(self, inputs: Tensors) -> Arrays:
        """The package's own call: 0 Hz where it is not sure; one frame more than there are hops."""
        samples = torch.from_numpy(inputs["samples"])[:, :, None].to(self.device)
        f0_hz = self._original.to(self.device)(samples, SAMPLE_RATE_HZ)[:, :-1, 0]
        return {"f0_hz": f0_hz.cpu().numpy()}

    def served(self, model: Any, inputs: Tensors) -> Arrays:
        """F0 where the confidence is what the original asks for."""
        outputs = model(inputs)
        is_sure = outputs["confidence"] > THRESHOLD
        return {"f0_hz": np.where(is_sure, outputs["f0_hz"], np.float32(0.0))}

    def onnx(self) -> onnx.ModelProto:
        """{"samples": [B, T]} -> {"f0_hz", "confidence": [B, T / 160]}."""
        axes: Axes = {"samples": ["B", "T"], "f0_hz": ["B", "N"], "confidence": ["B", "N"]}
        model = to_onnx(self.estimator, {"samples": torch.randn(2, 32000)}, axes)
        facts = {
            "stage": self.stage,
            "kind": "pitch",
            "sample_rate_hz": str(SAMPLE_RATE_HZ),
            "hop_samples": str(HOP_SAMPLES),
        }
        onnx.helper.set_model_props(model, facts)
        return model

    def weights(self) -> Arrays:
        """Every parameter but the norms of attention, of which this FCPE has none."""
        return {
            name: parameter.detach().numpy()
            for name, parameter in self.estimator.named_parameters()
            if not re.search(r"encoder_layers\.\d+\.norm\.", name)
        }

    def cases(self) -> Iterator[Case]:
        """The window that the flow sends, other lengths, a batch, silence."""
        for seconds, batch in ((10.0, 1), (3.2, 2), (0.77, 3)):
            samples = mono_song(SAMPLE_RATE_HZ, seconds, batch)
            yield Case(f"song, {seconds:g} s, batch {batch}", {"samples": samples})
        yield Case("silence, 2 s", {"samples": np.zeros((1, 32000), np.float32)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows of the flow."""
        return {"samples": mono_song(SAMPLE_RATE_HZ, WINDOW_SAMPLES / SAMPLE_RATE_HZ, batch)}


def load_pitch_estimator() -> PitchEstimator:
    """FCPE with the weights inside the torchfcpe package."""
    return load_fcpe(packaged()).estimator


def load_fcpe(path: Path) -> Fcpe:
    """FCPE from a file in the format of the one in torchfcpe, of the architecture of that one.

    Raises:
        InvalidModel: the file is damaged, names code, or holds other arrays.
    """
    network = _network()
    arrays = {
        name.removeprefix("model."): array
        for name, array in read_arrays(path.read_bytes()).items()
        if name.startswith("model.")
    }
    wanted = {name: tuple(t.shape) for name, t in _as_stored(network.state_dict()).items()}
    require_same_names(path, arrays, wanted)
    network.load_state_dict(
        {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    )
    return Fcpe(network)


def write_random_fcpe(path: Path) -> None:
    """A file of the true size of seeded random weights."""
    network = _network()
    fill_at_random(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": _as_stored(network.state_dict())}, path)


def stored_name(name: str) -> str:
    """A parameter of torchfcpe's network, as its file calls it: torch 1 named the weight norm."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.replace(f"parametrizations.weight.{new}", old)
    return name


def _as_stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {stored_name(name): tensor for name, tensor in state.items()}


def packaged() -> Path:
    """The weights inside the torchfcpe package."""
    return Path(str(importlib.resources.files("torchfcpe").joinpath("assets/fcpe_c_v001.pt")))


@cache
def _description() -> Any:
    """The configuration that lies beside the weights in torchfcpe's file."""
    description = torch.load(packaged(), map_location="cpu", weights_only=True)["config_dict"]
    description["model"] |= {"conv_dropout": 0.0, "atten_dropout": 0.0}
    return torchfcpe.models_infer.DotDict(description)


def _network() -> Any:
    with redirect_stdout(io.StringIO()):  # it prints what its own file leaves to defaults
        return torchfcpe.models_infer.spawn_model(_description()).eval()


ARCHITECTURES = (Architecture("fcpe", "convert_voice", load_fcpe, write_random_fcpe),)
