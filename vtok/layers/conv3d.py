"""Causal 3D convolutional encoder and decoder of video: images and videos, whole or streamed, at any height and width.

    pixels --[Haar patch]--> conv --> (residual blocks, down in space, then time) x levels --> middle --> latents
    latents --> conv --> middle --> (residual blocks, up in time, then space) x levels --> conv --[Haar patch]--> pixels

One configuration reaches the published families: VidTok (Tang et al. 2024, https://arxiv.org/abs/2412.13061),
MAGVIT-v2 (Yu et al. 2023, https://arxiv.org/abs/2310.05737) and its open form Open-MAGVIT2 (Luo et al. 2024,
https://arxiv.org/abs/2409.04410), Cosmos (Agarwal et al. 2025, https://arxiv.org/abs/2501.03575) and Wan (Wan Team
2025, https://arxiv.org/abs/2503.20314). Different from some of them: every normalisation is per position, over
channels, so no statistic of time or space reaches a latent and later frames never change earlier ones.

Letters: B clips, C channels, T frames, H, W pixels; (st, sh, sw) stride; t = 1 + (T - 1) / st, h = H / sh, w = W / sw;
Z latent channels, D channels of the decoder's input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.causal import Axes, Cache, CausalAttention, CausalConv3d, begins, check_padding
from vtok.layers.transformer import Attention, make_norm
from vtok.layers.wavelet import HaarPatch

CHOICES = {
    "conv": ("full", "factorised", "separate"),
    "sampling": ("separate", "joint"),
    "spatial_down": ("strided", "residual"),
    "temporal_down": ("strided", "blend", "residual"),
    "spatial_up": ("interpolate", "residual", "depth_to_space"),
    "temporal_up": ("interpolate", "blend", "residual", "depth_to_space"),
    "patch": ("none", "haar"),
    "attention": ("none", "spatial", "spatial_temporal"),
    "norm": ("layer", "rms"),
}
SKIPS = {"strided": "none", "interpolate": "none", "depth_to_space": "none", "blend": "blend", "residual": "add"}


@dataclass
class ConvConfig:
    """A causal convolutional backbone. The defaults are VidTok's."""

    width: int = 128  # channels of the first level
    mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # channels of each level, in widths
    num_res_blocks: int = 2  # of each encoder level
    decoder_res_blocks: int | None = None  # of each decoder level; empty: num_res_blocks + 1
    mid_blocks: int = 2  # residual blocks at the lowest resolution; attention stands behind the first of them
    conv: str = "separate"  # full (3x3x3) | factorised (1x3x3, then 3x1x1) | separate (a block of space, one of time)
    temporal_kernel: int = 3  # frames a convolution sees; 1: an image model, every frame for itself
    temporal_padding: str = "replicate"  # replicate | zero: what stands before the first frame
    sampling: str = "separate"  # separate (space, then time) | joint (one convolution for both)
    spatial_down: str = "strided"  # strided | residual (plus average pooling)
    temporal_down: str = "blend"  # strided | blend (learned, of strided convolution and average) | residual
    spatial_up: str = (
        "interpolate"  # interpolate (nearest, then a convolution) | residual (plus nearest) | depth_to_space
    )
    temporal_up: str = "blend"  # interpolate | blend (learned, of convolution and nearest) | residual | depth_to_space
    temporal_levels: list[int] | None = None  # levels behind which time is halved; empty: the last ones possible
    decoder_temporal_levels: list[int] | None = None  # levels before which time is doubled; empty: temporal_levels
    patch: str = "none"  # none | haar (wavelet bands of blocks of patch_size in time, height and width)
    patch_size: int = 4
    attention: str = (
        "spatial"  # none | spatial (inside a frame) | spatial_temporal (and over past frames), in the middle
    )
    num_heads: int = 8
    qk_norm: bool = True  # queries and keys are RMS-normalised per head, which keeps bfloat16 stable
    temporal_window: int = 16  # latent frames that temporal attention sees, the present one included
    norm: str = "layer"  # layer | rms, both over channels at each position
    adaptive_norm: bool = False  # the decoder's levels are scaled and shifted by the code at each position
    dropout: float = 0.0
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.mult = list(self.mult)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose {', '.join(choices)}")
        check_padding(self.temporal_padding)
        counts = ("width", "num_res_blocks", "decoder_res_blocks", "mid_blocks", "temporal_kernel", "patch_size")
        for name in (*counts, "num_heads", "temporal_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.mult or min(self.mult) < 1:
            raise ValueError(f"mult={self.mult} must hold a positive number for each level")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.attention != "none" and self.width * self.mult[-1] % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width x mult[-1] = {self.width * self.mult[-1]}"
            )
        pairs = (self.temporal_down, self.spatial_down), (self.temporal_up, self.spatial_up)
        if self.sampling == "joint" and any(time != space for time, space in pairs):
            raise ValueError(
                "sampling=joint is one convolution over space and time: set temporal_down like "
                f"spatial_down={self.spatial_down} and temporal_up like spatial_up={self.spatial_up}"
            )


def sampling_plan(config: ConvConfig, stride: Axes) -> tuple[Axes, list[Axes], list[Axes]]:
    """How a total stride is shared out: (Haar block, factors behind each level, the same for the decoder).

    Space is halved behind the first levels, time behind the last ones or behind `temporal_levels`; entry i of the lists
    lies between levels i and i + 1.
    Raises: ValueError if strides are no powers of two or the levels are too few for them.
    """
    if len(stride) != 3 or any(n < 1 or n & (n - 1) for n in stride):
        raise ValueError(
            f"stride={tuple(stride)} must be three powers of two (frames, height, width), such as 4 x 8 x 8"
        )
    size = config.patch_size if config.patch == "haar" else 1
    patch: Axes = (min(size, stride[0]), min(size, stride[1]), min(size, stride[2]))
    times, rows, columns = ((n // p).bit_length() - 1 for n, p in zip(stride, patch))
    gaps = len(config.mult) - 1
    if max(times, rows, columns) > gaps:
        raise ValueError(
            f"stride={tuple(stride)} halves {max(times, rows, columns)} times after a patch of {patch}, but "
            f"mult={config.mult} has room for {gaps}, between its levels; give mult more entries"
        )
    if times and config.temporal_kernel < 2:
        raise ValueError(f"temporal_kernel=1 cannot halve time, which stride={tuple(stride)} asks for; choose 3")

    def halving(levels: list[int] | None, name: str) -> set[int]:
        chosen = list(range(gaps - times, gaps)) if levels is None else list(levels)
        if len(chosen) != times or len(set(chosen)) != times or not set(chosen) <= set(range(gaps)):
            raise ValueError(
                f"{name}={chosen} must be {times} different levels below {gaps}, one for each halving of time that "
                f"stride={tuple(stride)} needs after a patch of {patch}"
            )
        return set(chosen)

    encoder = halving(config.temporal_levels, "temporal_levels")
    given = config.decoder_temporal_levels
    decoder = encoder if given is None else halving(given, "decoder_temporal_levels")
    factors = [
        [(1 + (i in levels), 1 + (i < rows), 1 + (i < columns)) for i in range(gaps)] for levels in (encoder, decoder)
    ]
    return patch, factors[0], factors[1]


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
    """

    def __init__(self, channels: int, kernel: Axes, *, factor: Axes, kind: str, padding: str):
        super().__init__()
        self.factor, self.unfold = factor, kind == "depth_to_space"
        out = channels * factor[0] * factor[1] * factor[2] if self.unfold else channels
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


class SpatialAttention(nn.Module):
    """x + attention(norm(x)) among the positions of each frame."""

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm = make_norm(config.norm, channels)
        self.attention = Attention(channels, config.num_heads, qk_norm=config.qk_norm)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        tokens = rearrange(x, "B C T H W -> (B T) (H W) C")
        out = self.attention(self.norm(tokens).to(x.dtype), None)
        return x + rearrange(out, "(B T) (H W) C -> B C T H W", T=x.shape[2], H=x.shape[3])


class TemporalAttention(nn.Module):
    """x + attention(norm(x)) among the present and past frames of each position."""

    temporal_only = True

    def __init__(self, channels: int, config: ConvConfig):
        super().__init__()
        self.norm = make_norm(config.norm, channels)
        self.attention = CausalAttention(
            channels, config.num_heads, window=config.temporal_window, qk_norm=config.qk_norm
        )

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Give back x."""
        for parameter in self.attention.out.parameters():
            parameter.zero_()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        tokens = rearrange(x, "B C T H W -> (B H W) T C")
        out = self.attention(self.norm(tokens).to(x.dtype), cache)
        return x + rearrange(out, "(B H W) T C -> B C T H W", H=x.shape[3], W=x.shape[4])


def conv_chain(
    in_channels: int, out_channels: int, kernels: list[Axes], config: ConvConfig, *, grown: str = ""
) -> Chain:
    """Convolutions of these kernels in a row; the first one changes the channels."""
    sizes = pairwise([in_channels] + [out_channels] * len(kernels))
    padding = config.temporal_padding
    return Chain(*(CausalConv3d(*io, k, padding=padding, grown=grown) for io, k in zip(sizes, kernels)))


class _Backbone(nn.Module):
    """What encoder and decoder share: the kernels of a configuration, and gradient checkpoints."""

    def __init__(self, config: ConvConfig, stride: Axes):
        super().__init__()
        self.config, self.stride = config, (stride[0], stride[1], stride[2])
        kt = config.temporal_kernel
        both: list[Axes] = [(1, 3, 3)] + ([(kt, 1, 1)] if kt > 1 else [])
        self.kernels: list[Axes] = both if config.conv == "factorised" else [(kt, 3, 3)]
        self.level_kernels = [[kernel] for kernel in both] if config.conv == "separate" else [self.kernels]
        self.sampling_kernel: Axes = (kt, 1, 1) if config.conv == "factorised" else (kt, 3, 3)

    def level(self, in_channels: int, out_channels: int, depth: int) -> nn.ModuleList:
        """`depth` residual blocks, each of the parts that `conv` gives it."""
        parts = len(self.level_kernels)
        sizes = [in_channels] + [out_channels] * (depth * parts)
        blocks = [ResBlock(*pair, self.level_kernels[i % parts], self.config) for i, pair in enumerate(pairwise(sizes))]
        return nn.ModuleList(Chain(*blocks[i : i + parts]) for i in range(0, len(blocks), parts))

    def middle(self, channels: int) -> nn.ModuleDict:
        modules = nn.ModuleDict()
        for i in range(self.config.mid_blocks):
            modules[f"block{i}"] = ResBlock(channels, channels, self.kernels, self.config)
            if i == 0 and self.config.attention != "none":
                modules["space"] = SpatialAttention(channels, self.config)
            if i == 0 and self.config.attention == "spatial_temporal":
                modules["time"] = TemporalAttention(channels, self.config)
        return modules

    @torch.no_grad()
    def begin(self) -> None:
        """Initial values: convolutions keep the variance of their input, biases are zero, residual blocks and attention
        begin as no change (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, so begin residual networks).

        With torch's own, each convolution loses 2/3 of the variance and adds a constant: latents then hardly differ
        between clips, and narrow networks paint the mean for their first hundred steps.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2[-1].weight)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, SpatialAttention | TemporalAttention):
                nn.init.zeros_(module.attention.out.weight)
            elif isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.modulation.weight)

    def run(self, modules: Iterable[nn.Module], x: Tensor, cache: Cache | None) -> Tensor:
        for module in modules:
            if self.config.checkpoint and self.training and cache is None:
                x = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = module(x, cache)
        return x


class ConvEncoder(_Backbone):
    """Video in [-1, 1] to latents: [B, C, T, H, W] -> [B, Z, t, h, w].

    Args:
        config: the architecture.
        channels: C of the video. latent_channels: Z. stride: (st, sh, sw), powers of two.
    Raises: ValueError where the configuration cannot reach the stride.
    """

    def __init__(self, config: ConvConfig, *, channels: int = 3, latent_channels: int, stride: Axes):
        super().__init__(config, stride)
        patch, factors, _ = sampling_plan(config, self.stride)
        widths = [config.width * m for m in config.mult]
        self.patch = HaarPatch(patch)
        self.conv_in = conv_chain(channels * self.patch.channels, config.width, self.kernels, config, grown="bands")
        self.levels, self.down = nn.ModuleList(), nn.ModuleList()
        for i, (before, width) in enumerate(pairwise([config.width, *widths])):
            self.levels.append(self.level(before, width, config.num_res_blocks))
            if i < len(factors):
                self.down.append(self.downsample(width, factors[i]))
        self.mid = self.middle(widths[-1])
        self.norm_out = ChannelNorm(config.norm, widths[-1])
        self.conv_out = conv_chain(widths[-1], latent_channels, self.kernels, config)
        self.begin()

    def downsample(self, channels: int, factor: Axes) -> nn.ModuleDict:
        """`space` and `time`, or `joint`; empty where nothing is halved."""
        config, modules, (ft, fh, fw) = self.config, nn.ModuleDict(), factor
        kernel: Axes = (config.temporal_kernel, 3, 3)
        if config.sampling == "joint" and factor != (1, 1, 1):
            skip = SKIPS[config.spatial_down]
            modules["joint"] = CausalConv3d(
                channels, channels, kernel, stride=factor, padding=config.temporal_padding, skip=skip
            )
            return modules
        if (fh, fw) != (1, 1):
            modules["space"] = CausalConv3d(
                channels, channels, (1, 3, 3), stride=(1, fh, fw), skip=SKIPS[config.spatial_down]
            )
        if ft > 1:
            skip = SKIPS[config.temporal_down]
            modules["time"] = CausalConv3d(
                channels, channels, self.sampling_kernel, stride=(ft, 1, 1), padding=config.temporal_padding, skip=skip
            )
        return modules

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        (st, sh, sw), frames = self.stride, x.shape[2]
        if x.shape[3] % sh or x.shape[4] % sw:
            raise ValueError(f"video is {x.shape[3]} x {x.shape[4]}, no multiple of {sh} x {sw}; pad it before")
        first = cache is None or self not in cache
        if frames < 1 or (frames - first) % st:
            rule = f"1 + {st} n" if first else f"{st} n, as the stream has begun"
            raise ValueError(f"video has {frames} frames, the encoder takes {rule}; pad it before")
        begins(self, cache)
        x = self.run([self.conv_in], self.patch(x, cache), cache)
        for i, level in enumerate(self.levels):
            assert isinstance(level, nn.ModuleList)
            x = self.run(level, x, cache)
            if i < len(self.down):
                down = self.down[i]
                assert isinstance(down, nn.ModuleDict)
                x = self.run(down.values(), x, cache)
        x = self.run(self.mid.values(), x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class ConvDecoder(_Backbone):
    """Codes to video: [B, D, t, h, w] -> [B, C, T, H, W], not clamped. T = 1 + st (t - 1), or st t as a stream goes on.

    Args: as ConvEncoder's; latent_channels: D, the channels of the code.
    """

    def __init__(self, config: ConvConfig, *, channels: int = 3, latent_channels: int, stride: Axes):
        super().__init__(config, stride)
        patch, _, factors = sampling_plan(config, self.stride)
        widths = [config.width * m for m in config.mult]
        depth = config.num_res_blocks + 1 if config.decoder_res_blocks is None else config.decoder_res_blocks
        self.patch = HaarPatch(patch)
        self.conv_in = conv_chain(latent_channels, widths[-1], self.kernels, config)
        self.mid = self.middle(widths[-1])
        # Entry i of these is level i, as in the encoder; they run from the last to the first.
        self.levels, self.adaptive, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (width, before) in enumerate(pairwise([*widths, widths[-1]])):
            self.levels.append(self.level(before, width, depth))
            if i > 0:
                self.up.append(self.upsample(width, factors[i - 1]))
            if config.adaptive_norm:
                ft, fh, fw = (math.prod(factor[axis] for factor in factors[i:]) for axis in range(3))
                self.adaptive.append(AdaptiveNorm(config.norm, before, latent_channels, (ft, fh, fw)))
        self.norm_out = ChannelNorm(config.norm, widths[0])
        self.conv_out = conv_chain(widths[0], channels * self.patch.channels, self.kernels, config, grown="bands")
        self.begin()
        nn.init.zeros_(self.last)  # grey, until it has learned better
        # pixels are sums of bands: an AdamW step of as many weights would move them so much further
        nn.init.constant_(self.norm_out.weight, self.patch.channels**-0.5)

    @property
    def last(self) -> nn.Parameter:
        """The weight of the output layer, for the adaptive weight of an adversarial term."""
        conv = self.conv_out[-1]
        assert isinstance(conv, CausalConv3d) and isinstance(conv.weight, nn.Parameter)
        return conv.weight

    def upsample(self, channels: int, factor: Axes) -> nn.ModuleDict:
        """`time` and `space`, or `joint`; empty where nothing is doubled."""
        config, modules, (ft, fh, fw) = self.config, nn.ModuleDict(), factor
        kernel: Axes = (config.temporal_kernel, 3, 3)
        given: dict[str, Any] = {"padding": config.temporal_padding}
        if config.sampling == "joint" and factor != (1, 1, 1):
            modules["joint"] = Upsample(channels, kernel, factor=factor, kind=config.spatial_up, **given)
            return modules
        if ft > 1:
            kind = config.temporal_up
            modules["time"] = Upsample(channels, self.sampling_kernel, factor=(ft, 1, 1), kind=kind, **given)
        if (fh, fw) != (1, 1):
            modules["space"] = Upsample(channels, (1, 3, 3), factor=(1, fh, fw), kind=config.spatial_up, **given)
        return modules

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.run([self.conv_in], z, cache)
        x = self.run(self.mid.values(), x, cache)
        for i in reversed(range(len(self.levels))):
            if len(self.adaptive):
                x = self.adaptive[i](x, z)
            level = self.levels[i]
            assert isinstance(level, nn.ModuleList)
            x = self.run(level, x, cache)
            if i > 0:
                up = self.up[i - 1]
                assert isinstance(up, nn.ModuleDict)
                x = self.run(up.values(), x, cache)
        x = self.conv_out(F.silu(self.norm_out(x)), cache)
        return self.patch.inverse(x, cache)
