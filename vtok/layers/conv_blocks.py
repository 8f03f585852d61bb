"""What the causal convolutional backbone is made of: norms, residual blocks, attention, doubling of frames and places.

Letters: B clips, C channels, T frames, H, W places; D channels of a code.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.causal import Axes, Cache, CausalConv3d, begins
from vtok.layers.conv_plan import SKIPS, ConvConfig
from vtok.layers.temporal import TemporalAttention, rotations_of_times
from vtok.layers.transformer import Attention, make_norm


class Chain(nn.Sequential):
    """Modules one after another, each with the cache."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x, cache)
        return x


class ChannelNorm(nn.Module):
    """`layer` or `rms` norm over the channels of each position of [B, C, T, H, W], in the dtype of its input.

    The kernels sum in float32 anyway; autocast would keep float32 copies of every activation for the backward pass.
    """

    def __init__(self, kind: str, channels: int):
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if on else nullcontext():
            tokens, weight = x.movedim(1, -1), self.weight.to(x.dtype)
            if self.bias is None:
                out = F.rms_norm(tokens, (self.channels,), weight, 1e-6)
            else:
                out = F.layer_norm(tokens, (self.channels,), weight, self.bias.to(x.dtype), 1e-6)
        return out.movedim(-1, 1)


class AdaptiveNorm(nn.Module):
    """A scale and a shift of the features at each position, from the code at that position; the identity at first.

    MAGVIT-v2 calls for adaptive group normalisation on the code. Open-MAGVIT2 takes the code's mean and deviation over
    the whole clip, which lets later frames change earlier ones; here each position is conditioned on its own code.
    """

    def __init__(self, kind: str, channels: int, code_channels: int, stretch: Axes):
        super().__init__()
        self.norm = ChannelNorm(kind, channels)
        self.modulation = nn.Linear(code_channels, 2 * channels)
        self.stretch = stretch  # features a code spans: (frames, rows, columns)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.modulation(code.movedim(1, -1)).movedim(-1, 1).chunk(2, 1)
        scale, shift = (repeat(part, self.stretch)[:, :, -x.shape[2] :] for part in (scale, shift))
        return torch.addcmul(shift, self.norm(x), 1 + scale)


def repeat(x: Tensor, factor: Axes) -> Tensor:
    """Nearest neighbours: [B, C, T, H, W] -> [B, C, ft T, fh H, fw W], in one copy."""
    if factor == (1, 1, 1):
        return x
    b, c, t, h, w = x.shape
    ft, fh, fw = factor
    x = x.movedim(1, -1)[:, :, None, :, None, :, None].expand(b, t, ft, h, fh, w, fw, c)
    return x.reshape(b, t * ft, h * fh, w * fw, c).movedim(-1, 1)


class Upsample(nn.Module):
    """`factor` times the frames, rows and columns; of the video's first frame, one copy is made in time.

    kind "depth_to_space": a convolution to more channels, which become places (the first ones of time outermost);
    else nearest neighbours and a convolution, alone ("interpolate"), blended ("blend") or added ("residual").
    out_channels: `channels` where it is left out; others for "interpolate" and "depth_to_space" only.
    """

    def __init__(
        self, channels: int, kernel: Axes, *, factor: Axes, kind: str, padding: str, out_channels: int | None = None
    ):
        super().__init__()
        self.factor, self.unfold = factor, kind == "depth_to_space"
        given = channels if out_channels is None else out_channels
        out = given * factor[0] * factor[1] * factor[2] if self.unfold else given
        self.conv = CausalConv3d(channels, out, kernel, padding=padding, skip=SKIPS[kind], grown="repeat")
        self.temporal_only = factor[0] > 1 and factor[1:] == (1, 1)

    def begin_as_identity(self) -> None:
        """Give back each frame `factor` times."""
        self.conv.begin_as_identity()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        drop = self.factor[0] - 1 if begins(self, cache) else 0
        if not self.unfold:
            return self.conv(repeat(x, self.factor)[:, :, drop:], cache)
        ft, fh, fw = self.factor
        x = rearrange(self.conv(x, cache), "B (ft fh fw C) T H W -> B (T ft) (H fh) (W fw) C", ft=ft, fh=fh, fw=fw)
        return x[:, drop:].movedim(-1, 1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 x 1 convolution where channels change."""

    def __init__(self, in_channels: int, out_channels: int, kernels: list[Axes], config: ConvConfig):
        super().__init__()
        self.norm1 = ChannelNorm(config.norm, in_channels)
        self.conv1 = conv_chain(in_channels, out_channels, kernels, config)
        self.norm2 = ChannelNorm(config.norm, out_channels)
        self.conv2 = conv_chain(out_channels, out_channels, kernels, config)
        self.dropout = config.dropout
        same = in_channels == out_channels
        self.shortcut = None if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))
        self.temporal_only = same and all(kernel[0] > 1 and kernel[1:] == (1, 1) for kernel in kernels)

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Give back x."""
        for parameter in self.conv2[-1].parameters():
            parameter.zero_()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), cache)
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        h = self.conv2(h, cache)
        return (x if self.shortcut is None else self.shortcut(x)) + h


class FrameAttention(nn.Module):
    """x + attention(norm(x)) among the positions of each frame."""

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm = make_norm(config.norm, channels)
        self.attention = Attention(channels, config.num_heads, qk_norm=config.qk_norm)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        tokens = rearrange(x, "B C T H W -> (B T) (H W) C")
        out = self.attention(self.norm(tokens).to(x.dtype), None)
        return x + rearrange(out, "(B T) (H W) C -> B C T H W", T=x.shape[2], H=x.shape[3])


class TimeAttention(nn.Module):
    """x + attention(norm(x)) among the present and past frames of each position."""

    temporal_only = True

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm = make_norm(config.norm, channels)
        self.attention = TemporalAttention(
            channels, config.num_heads, window=config.temporal_window, qk_norm=config.qk_norm
        )

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Give back x."""
        for parameter in self.attention.out.parameters():
            parameter.zero_()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        tokens = rearrange(x, "B C T H W -> (B H W) T C")
        attention = self.attention
        head = tokens.shape[2] // attention.num_heads
        times = rotations_of_times(tokens.shape[1], attention.window, head, like=x)
        out = attention(self.norm(tokens).to(x.dtype), times, cache)
        return x + rearrange(out, "(B H W) T C -> B C T H W", H=x.shape[3], W=x.shape[4])


def conv_chain(
    in_channels: int, out_channels: int, kernels: list[Axes], config: ConvConfig, *, grown: str = ""
) -> Chain:
    """Convolutions of these kernels in a row; the first one changes the channels."""
    sizes = pairwise([in_channels] + [out_channels] * len(kernels))
    padding = config.temporal_padding
    return Chain(*(CausalConv3d(*io, k, padding=padding, grown=grown) for io, k in zip(sizes, kernels)))
