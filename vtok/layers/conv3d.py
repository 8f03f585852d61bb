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
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from vtok.layers.begin_conv import keep_places
from vtok.layers.causal import Axes, Cache, CausalConv3d, begins
from vtok.layers.conv_blocks import (
    AdaptiveNorm,
    Chain,
    ChannelNorm,
    FrameAttention,
    ResBlock,
    TimeAttention,
    Upsample,
    conv_chain,
)
from vtok.layers.conv_plan import SKIPS, ConvConfig, sampling_plan
from vtok.layers.wavelet import HaarPatch


class _Backbone(nn.Module):
    """What encoder and decoder share: the kernels of a configuration, and gradient checkpoints."""

    levels: nn.ModuleList

    def __init__(self, config: ConvConfig, stride: Axes):
        super().__init__()
        self.config, self.stride = config, (stride[0], stride[1], stride[2])
        kt = config.temporal_kernel
        both: list[Axes] = [(1, 3, 3)] + ([(kt, 1, 1)] if kt > 1 else [])
        self.kernels: list[Axes] = both if config.conv == "factorised" else [(kt, 3, 3)]
        self.level_kernels = [[kernel] for kernel in both] if config.conv == "separate" else [self.kernels]
        in_time = config.sampling_kernel == "time" or config.conv == "factorised"
        self.sampling_kernel: Axes = (kt, 1, 1) if in_time else (kt, 3, 3)

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
                modules["space"] = FrameAttention(channels, self.config)
            if i == 0 and self.config.attention == "spatial_temporal":
                modules["time"] = TimeAttention(channels, self.config)
        return modules

    def blocks(self, level: int) -> Iterable[nn.Module]:
        blocks = self.levels[level]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @torch.no_grad()
    def begin(self) -> None:
        """Initial values: convolutions keep the variance of their input, biases are zero, residual blocks and attention
        begin as no change (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, so begin residual networks).

        With torch's own, each convolution loses 2/3 of the variance and adds a constant: latents then hardly differ
        between clips, and narrow networks paint the mean for their first hundred steps.

        The inner norm of a residual block begins with a gain of 1 over the number of blocks: an AdamW step moves all of
        them alike, and together they should not move the output more than one would (as depth-muP scales rates and
        branches, Yang et al. 2023, https://arxiv.org/abs/2310.02244).
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        branches = [module for module in self.modules() if isinstance(module, ResBlock)]
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2[-1].weight)  # pyright: ignore[reportArgumentType]
                nn.init.constant_(module.norm2.weight, 1 / len(branches))
            elif isinstance(module, FrameAttention | TimeAttention):
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

    With `first_fine` two grids: the first frame's [B, Z, 1 or 0, 2 h, 2 w], and the other ones' [B, Z, t - 1, h, w].

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
        keep_places(self, besides=[self.conv_in])

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

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor | tuple[Tensor, Tensor]:
        (st, sh, sw), frames = self.stride, x.shape[2]
        if x.shape[3] % sh or x.shape[4] % sw:
            raise ValueError(f"video is {x.shape[3]} x {x.shape[4]}, no multiple of {sh} x {sw}; pad it before")
        first = cache is None or self not in cache
        if frames < 1 or (frames - first) % st:
            rule = f"1 + {st} n" if first else f"{st} n, as the stream has begun"
            raise ValueError(f"video has {frames} frames, the encoder takes {rule}; pad it before")
        begins(self, cache)
        x = self.run([self.conv_in], self.patch(x, cache), cache)
        fine = None
        for i, down in enumerate(self.down):
            x = self.run(self.blocks(i), x, cache)
            if self.config.first_fine and first and i == len(self.down) - 1:
                fine = x[:, :, :1]
            assert isinstance(down, nn.ModuleDict)
            x = self.run(down.values(), x, cache)
        out = self.lowest(x, cache)
        if not self.config.first_fine:
            return out
        if fine is not None:
            return self.lowest(fine, None), out[:, :, 1:]
        return out.new_zeros(*out.shape[:2], 0, 2 * out.shape[3], 2 * out.shape[4]), out

    def lowest(self, x: Tensor, cache: Cache | None) -> Tensor:
        """From the lowest resolution (or, the first frame alone, twice that) to latents."""
        x = self.run(self.blocks(len(self.levels) - 1), x, cache)
        x = self.run(self.mid.values(), x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class ConvDecoder(_Backbone):
    """Codes to video: [B, D, t, h, w] -> [B, C, T, H, W], not clamped. T = 1 + st (t - 1), or st t as a stream goes on.

    With `first_fine` the codes are the encoder's two grids. A strided convolution of the first frame's stands at the
    head of the others, and its features take the first frame's place behind the first doubling: later frames look back
    at the finer one (OneVAE, Zhou et al. 2025, https://arxiv.org/abs/2508.09857).

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
        halves = [1 + (config.halve_up and factor[1:] != (1, 1)) for factor in factors] + [1]
        for i, (width, above) in enumerate(pairwise([*widths, widths[-1]])):
            before = above // halves[i]
            self.levels.append(self.level(before, width, depth))
            if i > 0:
                self.up.append(self.upsample(width, width // halves[i - 1], factors[i - 1]))
            if config.adaptive_norm:
                ft, fh, fw = (math.prod(factor[axis] for factor in factors[i:]) for axis in range(3))
                self.adaptive.append(AdaptiveNorm(config.norm, before, latent_channels, (ft, fh, fw)))
        self.norm_out = ChannelNorm(config.norm, widths[0])
        self.conv_out = conv_chain(widths[0], channels * self.patch.channels, self.kernels, config, grown="bands")
        self.first_down = self.first_up = None
        if config.first_fine:
            self.first_down = CausalConv3d(latent_channels, latent_channels, (1, 3, 3), stride=(1, 2, 2))
            self.first_up = CausalConv3d(widths[-1], widths[-1] // halves[-2], (1, 1, 1))
        self.begin()
        keep_places(self)
        nn.init.zeros_(self.last)  # grey, until it has learned better
        # pixels are sums of bands: an AdamW step of as many weights would move them so much further
        nn.init.constant_(self.norm_out.weight, self.patch.channels**-0.5)

    @property
    def read_out(self) -> CausalConv3d:
        """The output layer."""
        conv = self.conv_out[-1]
        assert isinstance(conv, CausalConv3d)
        return conv

    @property
    def last(self) -> nn.Parameter:
        """The weight of the output layer, for the adaptive weight of an adversarial term."""
        assert isinstance(self.read_out.weight, nn.Parameter)
        return self.read_out.weight

    def upsample(self, channels: int, out_channels: int, factor: Axes) -> nn.ModuleDict:
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
            given["out_channels"] = out_channels
            modules["space"] = Upsample(channels, (1, 3, 3), factor=(1, fh, fw), kind=config.spatial_up, **given)
        return modules

    def forward(self, z: Tensor | tuple[Tensor, Tensor], cache: Cache | None = None) -> Tensor:
        fine = None
        if not isinstance(z, Tensor):
            first, z = z
            assert self.first_down is not None and self.first_up is not None
            if first.shape[2]:
                z = torch.cat([self.first_down(first), z], 2)
                fine = self.first_up(self.lowest(first, None))
        x = self.lowest(z, cache)
        for i in reversed(range(len(self.up))):
            up = self.up[i]
            assert isinstance(up, nn.ModuleDict)
            x = self.run(up.values(), x, cache)
            if fine is not None and i == len(self.up) - 1:
                x = torch.cat([fine, x[:, :, 1:]], 2)
            if len(self.adaptive):
                x = self.adaptive[i](x, z)
            x = self.run(self.blocks(i), x, cache)
        x = self.conv_out(F.silu(self.norm_out(x)), cache)
        return self.patch.inverse(x, cache)

    def lowest(self, z: Tensor, cache: Cache | None) -> Tensor:
        """From codes to the features of the lowest resolution (or, the first frame alone, twice that)."""
        x = self.run([self.conv_in], z, cache)
        x = self.run(self.mid.values(), x, cache)
        if len(self.adaptive):
            x = self.adaptive[len(self.levels) - 1](x, z)
        return self.run(self.blocks(len(self.levels) - 1), x, cache)
