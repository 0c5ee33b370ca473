"""16 kHz audio -> content features, by the encoder of Whisper tiny.en, log-mel included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.mel_filters import power_spectrum, slaney_mel_filters

SAMPLE_RATE_HZ = 16000
N_FFT = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms; the encoder's second convolution halves it to 50 frames/s
N_MELS = 80
WIDTH = 384
N_HEADS = 6
N_LAYERS = 4
MAX_FRAMES = 1500  # 30 s of position encodings


class AttentionBlock(nn.Module):
    """One pre-norm layer; the parameters have the layout of CTranslate2's arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, 384] -> [B, N, 384]."""
        heads = self.query_key_value(self.attention_norm(x))
        heads = heads.reshape(*x.shape[:2], 3, N_HEADS, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, 64]
        scores = (query @ key.transpose(2, 3)) * (WIDTH // N_HEADS) ** -0.5
        mixed = (scores.softmax(dim=3) @ value).transpose(1, 2).flatten(2)
        x = x + self.attention_out(mixed)
        added: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + added


class WhisperEncoder(nn.Module):
    """Log-mel spectrogram and encoder, to the last layer before its closing norm.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision";
    openai/whisper `audio.log_mel_spectrogram` and `model.AudioEncoder`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(N_MELS, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.position_encodings = nn.Parameter(torch.zeros(MAX_FRAMES, WIDTH))
        self.layers = nn.ModuleList(AttentionBlock() for _ in range(N_LAYERS))

    def log_mel(self, samples: Tensor) -> Tensor:
        """samples: [B, T] -> [B, 80, T / 160], floored 80 dB below each window's loudest bin."""
        padded = F.pad(samples[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")
        power = power_spectrum(padded[:, 0], N_FFT, HOP_SAMPLES)[:, :, :-1]
        filters = slaney_mel_filters(SAMPLE_RATE_HZ, N_FFT, N_MELS, 0.0, 8000.0)
        log_mel = (filters @ power).clamp(min=1e-10).log10()
        loudest = log_mel.flatten(1).max(dim=1).values[:, None, None]
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0

    def forward(self, samples: Tensor) -> Tensor:
        """samples: [B, T] float32 at 16 kHz, T a multiple of 320, at most 30 s.

        Returns:
            [B, T / 320, 384].
        """
        x = F.gelu(self.conv1(self.log_mel(samples)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.position_encodings[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x


def array_names() -> dict[str, str]:
    """Parameter of WhisperEncoder -> array of CTranslate2's `model.bin`."""
    names = {"position_encodings": "encoder/position_encodings/encodings"}
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            names[f"{conv}.{kind}"] = f"encoder/{conv}/{kind}"
    for index in range(N_LAYERS):
        ours, theirs = f"layers.{index}", f"encoder/layer_{index}"
        for norm, block in (("attention_norm", "self_attention"), ("mlp_norm", "ffn")):
            names[f"{ours}.{norm}.weight"] = f"{theirs}/{block}/layer_norm/gamma"
            names[f"{ours}.{norm}.bias"] = f"{theirs}/{block}/layer_norm/beta"
        for linear, block in (
            ("query_key_value", "self_attention/linear_0"),
            ("attention_out", "self_attention/linear_1"),
            ("mlp_in", "ffn/linear_0"),
            ("mlp_out", "ffn/linear_1"),
        ):
            for kind in ("weight", "bias"):
                names[f"{ours}.{linear}.{kind}"] = f"{theirs}/{block}/{kind}"
    return names


def load_whisper_encoder(arrays: Mapping[str, NDArray[np.generic]]) -> WhisperEncoder:
    """The encoder with the arrays of a CTranslate2 `model.bin` of Whisper tiny.en."""
    encoder = WhisperEncoder()
    names = array_names()
    encoder.load_state_dict(
        {ours: torch.from_numpy(np.array(arrays[name], np.float32)) for ours, name in names.items()}
    )
    return encoder.eval()
