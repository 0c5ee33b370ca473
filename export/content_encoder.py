"""16 kHz audio -> content features, by the encoder of Whisper tiny.en, log-mel included."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from export.array_names import require_same_names
from export.exporter import Architecture, Arrays, Case, Original
from export.mel_filters import power_spectrum, slaney_mel_filters
from export.random_weights import fill_at_random
from export.read_arrays import read_arrays
from export.real_audio import mono_song
from export.trace import Axes, to_onnx
from remix.stages import Tensors
from remix.vocal_frames import WINDOW_SAMPLES

CONTENT = "whisper-tiny.en, layer 4, before the closing norm"
"""The fact `content`, which a voice and its encoder must agree on."""

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


class WhisperTinyEncoder(Original):
    """Whisper tiny.en's encoder out of a `model.bin` of CTranslate2.

    Its reference is `WhisperEncoder` in torch: openai/whisper's own classes know no encoder
    without the closing norm, and CTranslate2 runs no encoder alone in float32 with its mel.
    """

    stage = "convert_voice"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, encoder: WhisperEncoder) -> None:
        self.encoder = encoder
        self.facts: Mapping[str, Any] = {"kind": "content"}

    @torch.no_grad()
    def reference(self, inputs: Tensors) -> Arrays:
        """The encoder in torch."""
        return {"content": self.encoder(torch.from_numpy(inputs["samples"])).numpy()}

    def onnx(self) -> onnx.ModelProto:
        """{"samples": [B, T]} -> {"content": [B, T / 320, 384]}."""
        axes: Axes = {"samples": ["B", "T"], "content": ["B", "M", WIDTH]}
        model = to_onnx(self.encoder, {"samples": torch.randn(2, 32000)}, axes)
        facts = {
            "stage": self.stage,
            "kind": "content",
            "content": CONTENT,
            "sample_rate_hz": str(SAMPLE_RATE_HZ),
            "hop_samples": "320",
            "frames_per_second": "50",
        }
        onnx.helper.set_model_props(model, facts)
        return model

    def weights(self) -> Arrays:
        """Every parameter."""
        return {name: array.numpy() for name, array in self.encoder.state_dict().items()}

    def cases(self) -> Iterator[Case]:
        """The window that the flow sends, other lengths, a batch, silence."""
        for seconds, batch in ((10.0, 1), (3.2, 2), (0.5, 3)):
            samples = mono_song(SAMPLE_RATE_HZ, seconds, batch)
            yield Case(f"song, {seconds:g} s, batch {batch}", {"samples": samples})
        yield Case("silence, 2 s", {"samples": np.zeros((1, 32000), np.float32)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows of the flow."""
        return {"samples": mono_song(SAMPLE_RATE_HZ, WINDOW_SAMPLES / SAMPLE_RATE_HZ, batch)}


def load_whisper(path: Path) -> WhisperTinyEncoder:
    """Whisper tiny.en's encoder from a `model.bin` of CTranslate2; its decoder is passed over.

    Raises:
        InvalidModel: the file is damaged, or its encoder holds other arrays.
    """
    arrays = {
        name: array
        for name, array in read_arrays(path.read_bytes()).items()
        if name.startswith("encoder/") and name not in NOT_USED
    }
    state = WhisperEncoder().state_dict()
    wanted = {name: tuple(state[ours].shape) for ours, name in array_names().items()}
    require_same_names(path, arrays, wanted)
    return WhisperTinyEncoder(load_whisper_encoder(arrays))


NOT_USED = ("encoder/num_heads", "encoder/layer_norm/gamma", "encoder/layer_norm/beta")


def write_random_whisper(path: Path) -> None:
    """A `model.bin` of seeded random weights, in CTranslate2's layout."""
    encoder = WhisperEncoder()
    fill_at_random(encoder)
    state = encoder.state_dict()

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(state))]
    for ours, name in array_names().items():
        array = state[ours].numpy()
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", 0, array.nbytes), array.tobytes()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([*parts, struct.pack("<I", 0)]))


ARCHITECTURES = (
    Architecture("whisper-tiny-en-encoder", "convert_voice", load_whisper, write_random_whisper),
)
