"""16 kHz audio -> content features, by ContentVec: HuBERT base in two lengths.

Voices of so-vits-svc 4.0 were trained on layer 9 and the final projection (256 channels), later
ones on layer 12 (768 channels); both come out of one checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HubertConfig, HubertModel

from export.array_names import require_same_names
from export.exporter import Architecture, Arrays, Case, Original
from export.random_weights import fill_at_random
from export.read_arrays import read_arrays
from export.real_audio import mono_song
from export.trace import Axes, to_onnx
from remix.stages import Tensors
from remix.vocal_frames import SAMPLE_RATE_HZ, WINDOW_SAMPLES

CONTENT_OF = {
    256: "contentvec, layer 9, final projection",
    768: "contentvec, layer 12",
}
"""Channels -> the fact `content`, which a voice and its encoder must agree on."""

LAYERS_OF = {256: 9, 768: 12}


class HubertWithFinalProjection(HubertModel):  # type: ignore[no-untyped-call]
    """The class of the checkpoint. Source: so-vits-svc-fork 4.2.30, `utils`."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)


class ContentEncoder(nn.Module):
    """The part of HuBERT that a voice listens to, without masks.

    Source: Hsu et al. 2021, "HuBERT"; transformers 5.23.0, `HubertModel`; so-vits-svc-fork 4.2.30,
    `utils.get_content`.
    """

    def __init__(self, hubert: Any, channels: int) -> None:
        super().__init__()
        self.features = hubert.feature_extractor
        self.projection = hubert.feature_projection
        self.positions = hubert.encoder.pos_conv_embed
        self.norm = hubert.encoder.layer_norm
        self.layers = hubert.encoder.layers[: LAYERS_OF[channels]]
        self.final_proj = hubert.final_proj if channels == 256 else nn.Identity()

    def forward(self, samples: Tensor) -> Tensor:
        """samples: [B, T] float32 at 16 kHz, T >= 400.

        Returns:
            [B, (T - 400) / 320 + 1, channels].
        """
        x = self.projection(self.features(samples).transpose(1, 2))
        x = self.norm(x + self.positions(x))
        for layer in self.layers:
            x = layer.layer_norm(x + attend(layer.attention, x))
            x = layer.final_layer_norm(x + layer.feed_forward(x))
        content: Tensor = self.final_proj(x)
        return content


def attend(attention: Any, x: Tensor) -> Tensor:
    """Self-attention of all positions: [B, N, C] -> [B, N, C]."""
    query, key, value = (
        projection(x).reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    attended: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return attended


class ContentVec(Original):
    """ContentVec out of a checkpoint of transformers."""

    stage = "convert_voice"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, hubert: Any, channels: int) -> None:
        self.hubert, self.channels = hubert, channels
        self.facts: Mapping[str, Any] = {"kind": "content"}

    @torch.no_grad()
    def reference(self, inputs: Tensors) -> Arrays:
        """As `get_content` of so-vits-svc-fork calls it."""
        samples = torch.from_numpy(inputs["samples"]).to(self.device)
        hubert = self.hubert.to(self.device)
        if self.channels == 768:
            return {"content": hubert(samples)["last_hidden_state"].cpu().numpy()}
        hidden = hubert(samples, output_hidden_states=True)["hidden_states"][9]
        return {"content": hubert.final_proj(hidden).cpu().numpy()}

    def onnx(self) -> onnx.ModelProto:
        """{"samples": [B, T]} -> {"content": [B, M, channels]}."""
        axes: Axes = {"samples": ["B", "T"], "content": ["B", "M", self.channels]}
        model = to_onnx(self._module(), {"samples": torch.randn(2, 32000)}, axes)
        facts = {
            "stage": self.stage,
            "kind": "content",
            "content": CONTENT_OF[self.channels],
            "sample_rate_hz": str(SAMPLE_RATE_HZ),
            "frames_per_second": "50",
        }
        onnx.helper.set_model_props(model, facts)
        return model

    def weights(self) -> Arrays:
        """Every parameter of the layers that are used."""
        return {name: array.numpy() for name, array in self._module().state_dict().items()}

    def cases(self) -> Iterator[Case]:
        """The window that the flow sends, other lengths, a batch, silence."""
        for seconds, batch in ((10.0, 1), (3.217, 2), (0.5, 3)):
            samples = mono_song(SAMPLE_RATE_HZ, seconds, batch)
            yield Case(f"song, {seconds:g} s, batch {batch}", {"samples": samples})
        yield Case("silence, 2 s", {"samples": np.zeros((1, 32000), np.float32)})

    def speed_inputs(self, batch: int) -> Tensors:
        """Windows of the flow."""
        return {"samples": mono_song(SAMPLE_RATE_HZ, WINDOW_SAMPLES / SAMPLE_RATE_HZ, batch)}

    def _module(self) -> ContentEncoder:
        return ContentEncoder(self.hubert, self.channels).eval()


def load_contentvec(path: Path, channels: int) -> ContentVec:
    """ContentVec from `pytorch_model.bin` or `model.safetensors`, or a folder with one of them.

    Raises:
        InvalidModel: the file is damaged, names code, or holds other arrays.
    """
    if path.is_dir():
        path = next(
            (path / name for name in ("model.safetensors", "pytorch_model.bin")
             if (path / name).is_file()),
            path / "pytorch_model.bin",
        )  # fmt: skip
    arrays = {_present_name(name): array for name, array in read_arrays(path.read_bytes()).items()}
    hubert = _hubert()
    state = hubert.state_dict()
    require_same_names(path, arrays, {name: tuple(array.shape) for name, array in state.items()})
    hubert.load_state_dict(
        {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    )
    nn.utils.parametrize.remove_parametrizations(hubert.encoder.pos_conv_embed.conv, "weight")
    return ContentVec(hubert.eval(), channels)


def write_random_contentvec(path: Path) -> None:
    """A checkpoint of the true size as transformers writes them, of seeded random weights."""
    hubert = _hubert()
    fill_at_random(hubert)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"weights": "random"}))
    torch.save(hubert.state_dict(), path / "pytorch_model.bin")


def _hubert() -> Any:
    hubert: Any = HubertWithFinalProjection(HubertConfig())
    return hubert.eval()


def _present_name(name: str) -> str:
    """Names that torch 1 gave to the two halves of a weight norm, as torch 2 calls them."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(f"conv.{old}", f"conv.parametrizations.weight.{new}")
    return name


ARCHITECTURES = tuple(
    Architecture(
        name,
        "convert_voice",
        partial(load_contentvec, channels=channels),
        write_random_contentvec,
    )
    for name, channels in (("contentvec-256l9", 256), ("contentvec-768l12", 768))
)
