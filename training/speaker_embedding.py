"""speech -> who speaks: 256 numbers that lie close together for one speaker, far apart for two.

The network and its weights are Resemblyzer's (a GE2E encoder); of its package only the weight file
is read. How far apart voices are: `training.samples`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.mel_filters import slaney_mel_filters
from remix.errors import InvalidModel
from remix.vocal_frames import SAMPLE_RATE_HZ

Floats = NDArray[np.float32]

FFT_SAMPLES, HOP_SAMPLES, MELS = 400, 160, 40
WINDOW_FRAMES, STEP_FRAMES = 160, 77
"""1.6 s, 1.3 of them a second. Source: resemblyzer 0.1.4, hparams.py and `embed_utterance`."""

LEVEL_DBFS = -30.0
"""Quieter speech is made as loud. Source: resemblyzer 0.1.4, `audio_norm_target_dBFS`."""


class SpeakerEncoder(nn.Module):
    """Mel spectrogram -> embedding. Source: resemblyzer 0.1.4, `VoiceEncoder`."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        filters = slaney_mel_filters(SAMPLE_RATE_HZ, FFT_SAMPLES, MELS, 0.0, SAMPLE_RATE_HZ / 2)
        self.register_buffer("filters", filters, persistent=False)

    def mel(self, samples: Tensor) -> Tensor:
        """[T] -> [N, 40], power, not its logarithm."""
        window = torch.hann_window(FFT_SAMPLES)
        bins = torch.stft(
            samples, FFT_SAMPLES, HOP_SAMPLES, window=window, pad_mode="constant",
            return_complex=True,
        )  # fmt: skip
        mel: Tensor = (self.filters @ bins.abs().square()).T
        return mel

    def forward(self, mels: Tensor) -> Tensor:
        """[B, N, 40] -> [B, 256] of length 1."""
        _, (hidden, _) = self.lstm(mels)
        raw = torch.relu(self.linear(hidden[-1]))
        embedding: Tensor = raw / raw.norm(dim=1, keepdim=True)
        return embedding


@cache
def load_speaker_encoder() -> SpeakerEncoder:
    """With the weights of the installed package.

    Raises:
        InvalidModel: it is not installed.
    """
    found = importlib.util.find_spec("resemblyzer")
    if found is None or found.origin is None:
        raise InvalidModel(
            "Speakers cannot be told apart: resemblyzer 0.1.4 is not installed.",
            remedy="Run `make export-environment`.",
        )
    stored = torch.load(Path(found.origin).with_name("pretrained.pt"), "cpu", weights_only=True)
    encoder = SpeakerEncoder()
    weights = stored["model_state"]
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("similarity")})
    return encoder.eval()


@torch.inference_mode()
def embed_windows(samples: Floats) -> Floats:
    """An embedding of every 1.6 s, 1.3 of them a second: [N, 256]; what is shorter is padded.

    Args:
        samples: [T], 16 kHz, speech without long pauses.
    """
    encoder = load_speaker_encoder()
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)) + 1e-12))
    louder = max(10.0 ** (LEVEL_DBFS / 20.0) / rms, 1.0)
    mel = encoder.mel(torch.from_numpy(samples * np.float32(louder)))
    if len(mel) < WINDOW_FRAMES:
        mel = nn.functional.pad(mel, (0, 0, 0, WINDOW_FRAMES - len(mel)))
    windows = mel.unfold(0, WINDOW_FRAMES, STEP_FRAMES).transpose(1, 2)
    return np.concatenate([encoder(batch).numpy() for batch in torch.split(windows, 64)])


def mean_embedding(embeddings: Floats) -> Floats:
    """One embedding, of length 1, of many: [N, 256] -> [256]."""
    mean = embeddings.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)
