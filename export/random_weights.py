"""seeded random numbers -> the weights of a network, to the bit the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

SCALES = ("weight_g", "original0")
"""The lengths of a weight norm, whatever their shape."""


def fill_at_random(network: nn.Module, seed: int = 20261124) -> None:
    """Gives every parameter and statistic of a network a value of its own.

    A layer keeps the scale of what it sees (variance 1 / fan-in), and no bias, norm or statistic
    is neutral, so that nothing in the network is idle. Only products of uniform numbers are used:
    logarithms and exponentials differ between machines in their last bit.
    """
    random = np.random.default_rng(seed)
    for _, module in sorted(network.named_modules()):
        tensors = dict(module.named_parameters(recurse=False))
        tensors |= {
            name: value
            for name, value in module.named_buffers(recurse=False)
            if name.startswith("running_")
        }
        for name in sorted(tensors):
            values = _values(module, name, tuple(tensors[name].shape), random)
            with torch.no_grad():
                tensors[name].copy_(torch.from_numpy(values))


def _values(
    module: nn.Module, name: str, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[Any]:
    noise: NDArray[Any] = random.random(shape, np.float32) - np.float32(0.5)  # variance 1 / 12
    if isinstance(module, nn.Embedding):
        return np.asarray(noise * np.sqrt(12), np.float32)
    if len(shape) > 1 and name not in SCALES:
        return np.asarray(noise * np.sqrt(12 / np.prod(shape[1:])), np.float32)
    if name in ("bias", "beta", "running_mean"):
        return np.asarray(0.2 * noise, np.float32)
    return np.asarray(1.0 + 0.4 * noise, np.float32)
