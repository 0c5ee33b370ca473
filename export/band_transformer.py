"""tokens -> next-token logits: the decoder-only transformer of the generator, in torch."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remix.note_tokens import VOCABULARY_SIZE


@dataclass(frozen=True)
class ModelSize:
    """The shape of the network; the defaults are the starter model's.

    Args:
        heads: query heads; all of them share one key and value head (multi-query attention), so
            that the cache of a sequence is 2 * layers * head_channels floats a token.
        hidden_channels: of the gated feed-forward (SwiGLU).
    """

    layers: int = 4
    channels: int = 192
    heads: int = 3
    hidden_channels: int = 512
    context_tokens: int = 1024
    vocabulary_size: int = VOCABULARY_SIZE

    @property
    def head_channels(self) -> int:
        """Channels of one head."""
        return self.channels // self.heads

    def as_dict(self) -> dict[str, int]:
        """For the checkpoint and the graph's metadata."""
        return asdict(self)


def rotary(positions: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles: [..., channels / 2] each.

    Source: Su et al. 2021, RoFormer, eq. 34, base 10,000.
    """
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * 10_000.0 ** (-pairs / channels)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + channels / 2) of x: [..., channels] by the given angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RmsNorm(nn.Module):
    """x / rms(x) * weight, spelled out: the exporter does not know `nn.RMSNorm`.

    Source: Zhang & Sennrich 2019, eq. 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.attention_norm = RmsNorm(size.channels)
        self.query = nn.Linear(size.channels, size.channels, bias=False)
        self.key_value = nn.Linear(size.channels, 2 * size.head_channels, bias=False)
        self.output = nn.Linear(size.channels, size.channels, bias=False)
        self.feed_norm = RmsNorm(size.channels)
        self.gate_up = nn.Linear(size.channels, 2 * size.hidden_channels, bias=False)
        self.down = nn.Linear(size.hidden_channels, size.channels, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, heads, S, D] and keys [B, 1, S, D], and values [B, 1, S, D]."""
        batch, steps, _ = x.shape
        x = self.attention_norm(x)
        cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
        query = self.query(x).view(batch, steps, self.size.heads, self.size.head_channels)
        key, value = self.key_value(x).unsqueeze(1).chunk(2, dim=-1)
        return rotate(query.transpose(1, 2), cos, sin), rotate(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block: attended [B, heads, S, D] back into the stream [B, S, C]."""
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, dim=-1)
        finished: Tensor = x + self.down(F.silu(gate) * up)
        return finished

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The whole block over complete sequences [B, S, C]."""
        query, key, value = self.project(x, cos, sin)
        heads = (-1, self.size.heads, -1, -1)
        attended = F.scaled_dot_product_attention(
            query, key.expand(heads), value.expand(heads), is_causal=True
        )
        return self.finish(x, attended)


class BandTransformer(nn.Module):
    """Pre-norm decoder with rotary positions; the output layer shares the embedding."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary_size, size.channels)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RmsNorm(size.channels)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("output.weight", "down.weight"))
                scale = (2 * size.layers) ** -0.5 if last else 1.0
                nn.init.normal_(parameter, std=scale * size.channels**-0.5)

    def layers(self) -> list[Block]:
        """The blocks, by their own type."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream [..., C] as logits [..., V]."""
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] after each of the tokens [B, S]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        cos, sin = rotary(positions, self.size.head_channels)
        x = self.embedding(tokens)
        for block in self.layers():
            x = block(x, cos, sin)
        return self.logits(x)
