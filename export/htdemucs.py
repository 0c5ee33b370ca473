"""demucs' HTDemucs -> the same function in the operators that ONNX Runtime computes fast.

The network of demucs 4.1.0 (htdemucs.py, hdemucs.py, transformer.py), rearranged, not changed:

- the Fourier transforms stay outside; spectra come and go as pairs of real numbers;
- a gated convolution becomes two convolutions, so that nothing is split and the gate's sigmoid
  is fused into the second;
- in the residual branches the second group normalisation (over tensors of up to 66 MB) is folded
  into the 1x1 convolution before it, see `ResidualBranch`;
- attention is one operator (`com.microsoft::MultiHeadAttention`, also in Triton's ONNX backend),
  which never stores the [2688, 2688] weights;
- layer scales are folded into the weights before them.

All folding is done by operators on the parameters themselves, which ONNX Runtime computes once,
when it loads the graph: the initializers are demucs' own arrays, under demucs' own names, so that
a published checkpoint fills the committed graph without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from demucs.htdemucs import HTDemucs
from torch import Tensor, nn
from torch.nn import functional as F

from remix.errors import InvalidModel


class HTDemucsGraph(nn.Module):
    """One window: samples and spectra in, both for every stem out.

    Args:
        model: the network, in evaluation mode.
        stems: which of the model's, by index; all, where nothing is said. The last layers do
            not compute the others.

    Raises:
        InvalidModel: it has a part that demucs knows but no published HTDemucs uses.
    """

    def __init__(self, model: HTDemucs, stems: Sequence[int] = ()) -> None:
        super().__init__()
        _check_is_plain(model)
        self.n_stems = len(stems) or len(model.sources)
        self.window_samples = int(model.segment * model.samplerate)
        self.n_frames = -(-self.window_samples // model.hop_length)
        self.spectral_epsilon = 1e-5 * model.nfft**0.5
        """demucs scales its spectra by nfft ** -0.5 and adds 1e-5 to their deviation; ours are
        not scaled, and (x / c - m / c) / (e + s / c) = (x - m) / (c e + s)."""
        self.encoder = nn.ModuleList(EncoderLayer(layer) for layer in model.encoder)
        self.time_encoder = nn.ModuleList(EncoderLayer(layer) for layer in model.tencoder)
        self.decoder = nn.ModuleList(DecoderLayer(layer) for layer in model.decoder)
        self.time_decoder = nn.ModuleList(DecoderLayer(layer) for layer in model.tdecoder)
        embedding = cast(Any, model.freq_emb)
        self.frequency_embedding = embedding.embedding
        self.frequency_scale = embedding.scale * model.freq_emb_scale
        self.bottleneck = Bottleneck(model, self.window_samples, self.n_frames)
        if stems:
            last, last_t = cast(Any, self.decoder[-1]), cast(Any, self.time_decoder[-1])
            last.channels = _channels_of(stems, 2 * model.audio_channels)
            last_t.channels = _channels_of(stems, model.audio_channels)

    def forward(self, mixture: Tensor, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """Separate a batch of windows.

        Args:
            mixture: [B, 2, T].
            spectra: [B, 2, N, F, 2], real and imaginary parts last, without the Nyquist bin.

        Returns:
            Spectra of the stems, [B, S, 2, N, F, 2], and samples to be added to what they
            become, [B, S, 2, T].
        """
        B, C, N, n_bins, _ = spectra.shape
        x = spectra.permute(0, 1, 4, 3, 2).reshape(B, 2 * C, n_bins, N)
        mean, deviation = _mean_and_deviation(x)
        x = (x - mean) / (self.spectral_epsilon + deviation)
        mean_t, deviation_t = _mean_and_deviation(mixture)
        xt = (mixture - mean_t) / (1e-5 + deviation_t)
        skips, time_skips, lengths = [], [], []
        for index, (encode, time_encode) in enumerate(
            zip(self.encoder, self.time_encoder, strict=True)
        ):
            lengths.append(xt.shape[-1])
            x, xt = encode(x), time_encode(xt)
            if index == 0:
                embedding = self.frequency_embedding.weight * self.frequency_scale
                x = x + embedding.t()[None, :, :, None]
            skips.append(x)
            time_skips.append(xt)
        x, xt = self.bottleneck(x, xt)
        for decode, time_decode in zip(self.decoder, self.time_decoder, strict=True):
            x = decode(x, skips.pop(), 0)
            xt = time_decode(xt, time_skips.pop(), lengths.pop())
        x = x * deviation + mean
        xt = xt * deviation_t + mean_t
        x = x.reshape(B, self.n_stems, C, 2, n_bins, N).permute(0, 1, 2, 5, 4, 3)
        return x, xt.reshape(B, self.n_stems, C, self.window_samples)


def gated_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, padding: int | tuple[int, ...] = 0
) -> Tensor:
    """GLU(convolution(x)): two convolutions, one of them under a sigmoid.

    Args:
        x: [B, C, T] or [B, C, F, T].
        weight: of the convolution to twice as many channels; its stride is 1.
        bias: its bias.
        padding: on each side of each axis.
    """
    convolve: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    half = weight.shape[0] // 2
    value = convolve(x, weight[:half], bias[:half], padding=padding)
    gate = convolve(x, weight[half:], bias[half:], padding=padding)
    return cast(Tensor, value * torch.sigmoid(gate))


class ResidualBranch(nn.Module):
    """One layer of demucs' DConv, on [B, C, T] or, per row, on [B, C, F, T].

    x + scale GLU(norm2(W h + b)), h = GELU(norm1(convolution(x))) with few channels. norm2 takes
    mean m and variance v over all channels and time. Both follow from h's own mean and
    covariance K, which are small: with u = W mean(h) + b and bars for means over channels,

        m = u-bar,   v = mean of diag(W K W') + mean((u - m)^2).

    With s = (v + e)^(-1/2) the normalised value is gamma W (s h) + gamma b s - gamma m s + beta:
    a 1x1 convolution over h's channels, times s, and the two constants s and m s.
    """

    def __init__(self, layer: nn.Sequential) -> None:
        super().__init__()
        self.first, self.norm1, _, self.second, self.norm2, _, self.scale = cast(Any, layer)
        self.dilation, self.padding = self.first.dilation[0], self.first.padding[0]

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        mixing, mixing_bias = self.second.weight[:, :, 0], self.second.bias
        ones = torch.ones_like(mixing[:, :1])
        gamma, beta = self.norm2.weight[:, None], self.norm2.bias
        # The layer scale multiplies the gated values, the first half, and not the gates.
        scale = torch.cat([self.scale.scale, ones[len(self.scale.scale) :, 0]])
        weight = torch.cat([mixing, mixing_bias[:, None], -ones], 1) * gamma * scale[:, None]
        weight, bias = weight[:, :, None], beta * scale
        if x.dim() == 3:
            hidden = F.conv1d(
                x, self.first.weight, self.first.bias, padding=self.padding, dilation=self.dilation
            )
            return x + gated_convolution(self._normalised(hidden), weight, bias)
        hidden = F.conv2d(
            x,
            self.first.weight[:, :, None],
            self.first.bias,
            padding=(0, self.padding),
            dilation=(1, self.dilation),
        )
        B, H, n_rows, T = hidden.shape
        rows = self._normalised(hidden.transpose(1, 2).reshape(B * n_rows, H, T))
        rows = rows.reshape(B, n_rows, H + 2, T).transpose(1, 2)
        return x + gated_convolution(rows, weight[..., None], bias)

    def _normalised(self, hidden: Tensor) -> Tensor:
        """[R, H, T] -> [R, H + 2, T]: s h, s, m s."""
        mixing, mixing_bias = self.second.weight[:, :, 0], self.second.bias
        h = F.gelu(
            _normalised(hidden, self.norm1.eps) * _column(self.norm1.weight)
            + _column(self.norm1.bias)
        )
        mean_h = h.mean(2, keepdim=True)
        centred = h - mean_h
        covariance = centred @ centred.transpose(1, 2) / h.shape[2]
        gram = mixing.t() @ mixing / mixing.shape[0]
        u = mean_h[:, :, 0] @ mixing.t() + mixing_bias
        m = u.mean(1, keepdim=True)
        v = (covariance * gram).sum((1, 2))[:, None] + (u - m).square().mean(1, keepdim=True)
        s = torch.rsqrt(v + self.norm2.eps)[:, :, None]
        constants = torch.cat([s, s * m[:, :, None]], 1).expand(-1, -1, h.shape[2])
        return torch.cat([h * s, constants], 1)


class EncoderLayer(nn.Module):
    """demucs' HEncLayer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.stride = 0 if layer.freq else layer.stride
        self.convolution = layer.conv
        self.residual = _residual(layer.dconv)
        self.rewrite = layer.rewrite

    def forward(self, x: Tensor) -> Tensor:
        """A quarter of the rows, or of the samples, with more channels."""
        if self.stride and x.shape[-1] % self.stride:
            x = F.pad(x, (0, self.stride - x.shape[-1] % self.stride))
        x = self.residual(F.gelu(self.convolution(x)))
        return gated_convolution(x, self.rewrite.weight, self.rewrite.bias, self.rewrite.padding)


class DecoderLayer(nn.Module):
    """demucs' HDecLayer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.is_last, self.pad = layer.last, layer.pad
        self.rewrite = layer.rewrite
        self.residual = _residual(layer.dconv)
        self.transposed = layer.conv_tr
        self.channels: list[slice] = [slice(None)]
        """Which of the output channels are computed."""

    def forward(self, x: Tensor, skip: Tensor, length: int) -> Tensor:
        """Four times the rows, or (length not 0) `length` samples, with fewer channels."""
        rewrite, transposed = self.rewrite, self.transposed
        x = gated_convolution(x + skip, rewrite.weight, rewrite.bias, rewrite.padding)
        x = self.residual(x)
        if self.channels == [slice(None)]:
            x = transposed(x)
        else:
            weight = torch.cat([transposed.weight[:, part] for part in self.channels], 1)
            bias = torch.cat([transposed.bias[part] for part in self.channels])
            transpose: Any = F.conv_transpose2d if length == 0 else F.conv_transpose1d
            x = transpose(x, weight, bias, transposed.stride)
        x = x[:, :, self.pad : -self.pad] if length == 0 else x[..., self.pad : self.pad + length]
        return x if self.is_last else F.gelu(x)


class Bottleneck(nn.Module):
    """demucs' CrossTransformerEncoder, with the 1x1 convolutions around it."""

    rates: Tensor
    periods: Tensor
    frames: Tensor
    rows: Tensor
    times: Tensor

    def __init__(self, model: HTDemucs, window_samples: int, n_frames: int) -> None:
        super().__init__()
        transformer: Any = model.crosstransformer
        n_rows, time_steps = model.nfft // 2, window_samples
        for _ in range(model.depth):
            n_rows, time_steps = n_rows // model.stride, -(-time_steps // model.stride)
        self.has_resampling = bool(model.bottom_channels)
        if self.has_resampling:
            self.up, self.down = model.channel_upsampler, model.channel_downsampler
            self.up_t, self.down_t = model.channel_upsampler_t, model.channel_downsampler_t
        dim: int = transformer.norm_in.normalized_shape[0]
        self.place_weight = transformer.weight_pos_embed
        # Buffers become small initializers, and what is made of them operators, not megabytes.
        step = -math.log(transformer.max_period) / (dim // 2)
        half = dim // 2
        periods = [transformer.max_period ** (i / (half - 1)) for i in range(half)]
        rates = [math.exp(step * i) for i in range(0, half, 2)]
        self.register_buffer("rates", torch.tensor(rates))
        self.register_buffer("periods", torch.tensor(periods))
        self.register_buffer("frames", torch.arange(float(n_frames))[:, None])
        self.register_buffer("rows", torch.arange(float(n_rows))[:, None])
        self.register_buffer("times", torch.arange(float(time_steps))[:, None])
        self.norm_in, self.norm_in_t = transformer.norm_in, transformer.norm_in_t
        self.layers = nn.ModuleList(TransformerLayer(layer) for layer in transformer.layers)
        self.layers_t = nn.ModuleList(TransformerLayer(layer) for layer in transformer.layers_t)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches, [B, C, F, N] and [B, C, T], keep their shapes."""
        B, C, n_rows, N = x.shape
        tokens = x.permute(0, 1, 3, 2).reshape(B, C, N * n_rows)
        if self.has_resampling:
            tokens, xt = self.up(tokens), self.up_t(xt)
        tokens = self.norm_in(tokens.transpose(1, 2)) + self.place_weight * self._place()
        tokens_t = self.norm_in_t(xt.transpose(1, 2)) + self.place_weight * self._place_t()
        for layer, layer_t in zip(self.layers, self.layers_t, strict=True):
            tokens, tokens_t = layer(tokens, tokens_t), layer_t(tokens_t, tokens)
        tokens, xt = tokens.transpose(1, 2), tokens_t.transpose(1, 2)
        if self.has_resampling:
            tokens, xt = self.down(tokens), self.down_t(xt)
        return tokens.reshape(B, C, N, n_rows).permute(0, 1, 3, 2), xt

    def _place(self) -> Tensor:
        """[1, N rows, dim]: where a token is. Source: `create_2d_sin_embedding`."""
        of_frame, of_row = (
            torch.stack([(at * self.rates).sin(), (at * self.rates).cos()], 2).flatten(1)
            for at in (self.frames, self.rows)
        )
        n_frames, n_rows = len(of_frame), len(of_row)
        both = [of_frame[:, None].expand(-1, n_rows, -1), of_row[None].expand(n_frames, -1, -1)]
        return torch.cat(both, 2).flatten(0, 1)[None]

    def _place_t(self) -> Tensor:
        """[1, T, dim]: when a token is. Source: `create_sin_embedding`."""
        phase = self.times / self.periods
        return torch.cat([phase.cos(), phase.sin()], 1)[None]


class TransformerLayer(nn.Module):
    """demucs' transformer layer: attention to itself, or to the other branch."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.is_cross = hasattr(layer, "cross_attn")
        attention = layer.cross_attn if self.is_cross else layer.self_attn
        self.norm1 = layer.norm1
        self.norm_other = layer.norm2 if self.is_cross else layer.norm1
        self.norm_ff = layer.norm3 if self.is_cross else layer.norm2
        self.n_heads = attention.num_heads
        self.projection_weight = attention.in_proj_weight
        self.projection_bias = attention.in_proj_bias
        self.out, self.out_scale = attention.out_proj, layer.gamma_1
        self.linear1 = layer.linear1
        self.linear2, self.linear2_scale = layer.linear2, layer.gamma_2
        self.norm_out = layer.norm_out

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """x: [B, T, C], other: [B, T', C] -> [B, T, C]."""
        normed = self.norm1(x)
        attended_to = self.norm_other(other) if self.is_cross else normed
        weights, biases = self.projection_weight.chunk(3), self.projection_bias.chunk(3)
        query, key, value = (
            F.linear(source, weight, bias)
            for source, weight, bias in zip(
                (normed, attended_to, attended_to), weights, biases, strict=True
            )
        )
        heads = attend(query, key, value, self.n_heads)
        x = x + _scaled_linear(heads, self.out, self.out_scale)
        hidden = F.gelu(self.linear1(self.norm_ff(x)))
        x = x + _scaled_linear(hidden, self.linear2, self.linear2_scale)
        if self.norm_out is None:
            return x
        normalised = _normalised(x, self.norm_out.eps)
        return cast(Tensor, normalised * self.norm_out.weight + self.norm_out.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """softmax(q k' / sqrt(D)) v per head: [B, T, C], [B, T', C] twice -> [B, T, C]."""
    if torch.onnx.is_in_onnx_export():
        return cast(Tensor, cast(Any, _Attention).apply(q, k, v, n_heads))
    q, k, v = (t.view(*t.shape[:2], n_heads, -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """`attend`, exported as one operator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
        return torch.empty_like(q)  # the exporter looks at shapes

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, v: Any, n_heads: int) -> Any:
        result = g.op("com.microsoft::MultiHeadAttention", q, k, v, num_heads_i=n_heads)
        result.setType(q.type())
        return result


class HTDemucsBag(nn.Module):
    """Several networks as one: each stem is the weighted mean of the networks' guesses at it.

    A network computes only the stems that its weights are not zero for: of `htdemucs_ft`, whose
    four networks are each good for one stem, each computes that one.

    Args:
        models: networks of the same stems, window and sample rate, in evaluation mode.
        weights: of each network, of each stem. Source: demucs 4.1.0, apply.py, `apply_model`.

    Raises:
        InvalidModel: they do not fit together, or a stem has no weight.
    """

    def __init__(self, models: Sequence[HTDemucs], weights: Sequence[Sequence[float]]) -> None:
        super().__init__()
        first = models[0]
        layout = [(model.sources, model.samplerate, model.segment) for model in models]
        totals = [sum(column) for column in zip(*weights, strict=True)]
        if any(each != layout[0] for each in layout) or len(weights) != len(models):
            raise InvalidModel(f"The networks of a bag differ: {layout}, {len(weights)} weights.")
        if len(totals) != len(first.sources) or min(totals) <= 0:
            raise InvalidModel(
                f"A bag of {len(models)} networks has the weights {weights}: every one of "
                f"{', '.join(first.sources)} needs some."
            )
        self.n_stems = len(totals)
        self.shares = [
            {stem: weight / totals[stem] for stem, weight in enumerate(row) if weight}
            for row in weights
        ]
        self.models = nn.ModuleList(
            HTDemucsGraph(model, list(share))
            for model, share in zip(models, self.shares, strict=True)
        )
        graph = cast(HTDemucsGraph, self.models[0])
        self.window_samples, self.n_frames = graph.window_samples, graph.n_frames

    def forward(self, mixture: Tensor, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """See `HTDemucsGraph.forward`."""
        results: list[list[list[Tensor]]] = [[[], []] for _ in range(self.n_stems)]
        for model, share in zip(self.models, self.shares, strict=True):
            outputs = model(mixture, spectra)
            for index, (stem, weight) in enumerate(share.items()):
                for kind, output in enumerate(outputs):
                    results[stem][kind].append(output[:, index : index + 1] * weight)
        spectra_stems, wave_stems = (
            torch.cat([sum(stem[kind][1:], stem[kind][0]) for stem in results], 1)
            for kind in (0, 1)
        )
        return spectra_stems, wave_stems


def _channels_of(stems: Sequence[int], each: int) -> list[slice]:
    return [slice(stem * each, (stem + 1) * each) for stem in stems]


def _check_is_plain(model: HTDemucs) -> None:
    layers = [*model.encoder, *model.tencoder, *model.decoder, *model.tdecoder]
    transformer = model.crosstransformer
    oddities = {
        "no complex-as-channels": not model.cac,
        "no transformer, or another embedding than sin": (
            transformer is None or transformer.emb != "sin" or transformer.sin_random_shift > 0
        ),
        "sparse or post-norm attention": transformer is not None
        and any(
            layer.sparse or not layer.norm_first
            for layer in [*transformer.layers, *transformer.layers_t]
        ),
        "no frequency embedding": model.freq_emb is None,
        "multi-band, merged, normed or unrewritten layers": any(
            type(layer).__name__ == "MultiWrap"
            or layer.empty
            or layer.rewrite is None
            or not layer.pad
            or not isinstance(getattr(layer, "norm1", None), nn.Identity)
            for layer in layers
        ),
    }
    if found := [name for name, is_there in oddities.items() if is_there]:
        raise InvalidModel(
            f"This HTDemucs has {', '.join(found)}; export/htdemucs.py knows the published "
            "architecture only. Extend it, and its parity test."
        )


def _mean(x: Tensor) -> Tensor:
    """[B, …] -> [B, 1, …]: the mean over all but the batch, axis by axis.

    ONNX Runtime adds the numbers of an axis one after the other: over a million of them in one
    go its float32 mean is wrong by 1e-5, and what follows multiplies that.
    """
    for axis in range(x.dim() - 1, 0, -1):
        x = x.mean(axis, keepdim=True)
    return x


def _mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and standard deviation with N - 1, each [B, 1, …]."""
    mean = _mean(x)
    n = math.prod(x.shape[1:])
    return mean, (_mean((x - mean).square()) * (n / (n - 1))).sqrt()


def _normalised(x: Tensor, epsilon: float) -> Tensor:
    """GroupNorm with one group and without its affine map, the channels on whatever axis."""
    centred = x - _mean(x)
    return centred * torch.rsqrt(_mean(centred.square()) + epsilon)


def _column(channels: Tensor) -> Tensor:
    return channels[:, None]


def _residual(dconv: Any) -> nn.Module:
    return nn.Sequential(*map(ResidualBranch, dconv.layers)) if dconv else nn.Identity()


def _scaled_linear(x: Tensor, linear: nn.Linear, scale: Any) -> Tensor:
    if isinstance(scale, nn.Identity):
        return cast(Tensor, linear(x))
    return F.linear(x, linear.weight * scale.scale[:, None], linear.bias * scale.scale)
