"""16 kHz audio -> F0 and its confidence, by FCPE, mel spectrogram and decoding included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.mel_filters import power_spectrum, slaney_mel_filters
from export.so_vits import stand_ins

SAMPLE_RATE_HZ = 16000
N_FFT = 1024
HOP_SAMPLES = 160
N_MELS = 128
REFERENCE_HZ = 10.0  # FCPE counts cents above 10 Hz


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
        posterior = self.network(self.log_mel(samples))  # [B, N, 360]
        confidence, peak = posterior.max(dim=2, keepdim=True)
        near = (peak + torch.arange(-4, 5)).clamp(0, posterior.shape[2] - 1)
        weight = posterior.gather(2, near)
        cents = (self.network.cent_table[near] * weight).sum(2) / weight.sum(2)
        return REFERENCE_HZ * 2.0 ** (cents / 1200.0), confidence[:, :, 0]


def load_pitch_estimator() -> PitchEstimator:
    """FCPE with the weights inside the torchfcpe package."""
    with stand_ins(["torchaudio"]):
        return PitchEstimator(_network())


def _network() -> Any:
    import importlib.resources

    import torchfcpe.models_infer as fcpe

    with (
        importlib.resources.files("torchfcpe").joinpath("assets/fcpe_c_v001.pt").open("rb") as file
    ):
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    checkpoint["config_dict"]["model"] |= {"conv_dropout": 0.0, "atten_dropout": 0.0}
    network = fcpe.spawn_model(fcpe.DotDict(checkpoint["config_dict"]))
    network.load_state_dict(checkpoint["model"])
    return network.eval()
