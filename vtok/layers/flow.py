"""Rectified flow: noise levels, the path between data and noise, a network for it, guidance and sampling.

At level s in [0, 1] a sample is x_s = (1 - s) x + s noise, and the network predicts the velocity v = noise - x along
the straight line (Liu et al. 2022, https://arxiv.org/abs/2209.03003). Sampling follows -v from s = 1 to s = 0.

Letters: M chunks, D channels of a latent, t latent frames, h, w height and width, P patches of a latent frame, K tokens
of a latent frame, L length of the sequence, W width of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Generator, Tensor, nn

from vtok.layers.begin import start_attention
from vtok.layers.transformer import MLP, Attention, flex_blocks


@dataclass
class SamplerConfig:
    """How a flow decoder draws; part of the model, since an export must decode as it was judged."""

    steps: int = 20  # Euler steps
    temperature: float = 1.0  # deviation of the noise: below 1, draws nearer to the mean of what the tokens leave open
    guidance: float = 1.0  # scale on the difference that the tokens make; 1 = none, and one network call a step
    projected: bool = True  # adaptive projected guidance instead of the plain difference
    eta: float = 0.0  # of that: share kept of what is parallel to the prediction
    momentum: float = 0.0  # of that: how differences of earlier steps go on; negative pushes away from them
    threshold: float = 0.0  # of that: longest difference, as a norm; 0 = any
    per_channel: bool = False  # of that: norms and projections channel by channel (VideoFlexTok), not of all values
    seed: int = 0  # of the noise: the same tokens give the same video

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"model.sampler.steps={self.steps} must be 1 or more")
        for key in ("guidance", "threshold", "temperature"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"model.sampler.{key}={getattr(self, key)} must be a number of 0 or more")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"model.sampler.eta={self.eta} is a share, 0 to 1")
        if not -1 < self.momentum < 1:
            raise ValueError(f"model.sampler.momentum={self.momentum} must lie between -1 and 1, or it grows for ever")
        unread = [k for k in ("eta", "momentum", "threshold", "per_channel") if getattr(self, k) and not self.projected]
        if unread:
            raise ValueError(
                f"model.sampler.{unread[0]}={getattr(self, unread[0])} is read with model.sampler.projected=true "
                "alone: leave it out, or project"
            )


def draw_levels(count: int, *, mean: float = 0.0, std: float = 1.0, stratified: bool = True) -> Tensor:
    """[count] noise levels sigmoid(N(mean, std)); stratified: one from each of `count` equal shares of the law.

    The logit-normal law of Esser et al. 2024, https://arxiv.org/abs/2403.03206. Drawn on the CPU, so that one seed
    gives one draw on every device.
    """
    uniform = torch.rand(count, dtype=torch.float64)
    if stratified:
        uniform = (torch.randperm(count) + uniform) / count
    normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    return torch.sigmoid(mean + std * normal).float()


def mix(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_s of latents [M, D, t, h, w] at levels [M, t]."""
    s = level[:, None, :, None, None].to(x)
    return (1 - s) * x + s * noise


def gaussian_velocity(noised: Tensor, level: Tensor, guess: Tensor, variance: Tensor) -> Tensor:
    """E[noise - x | x_s] where x is Gaussian around `guess`: what a velocity is before anything else is known of x.

    With r = x_s - (1 - s) guess, which has the variance s^2 + (1 - s)^2 variance, E[noise] = s r / that and
    E[x] = guess + (1 - s) variance r / that.
    Args: noised, guess: [M, D, t, h, w]; level: [M, t]; variance: [M, t, D], above 0.
    """
    s = level[:, None, :, None, None].to(noised)
    v = variance.transpose(1, 2)[..., None, None].to(noised)
    rest = noised - (1 - s) * guess
    return (s - (1 - s) * v) / (s.square() + (1 - s).square() * v) * rest - guess


def level_features(level: Tensor, width: int) -> Tensor:
    """Sine-cosine features [..., width] of noise levels in [0, 1], as of a thousand diffusion steps."""
    half = width // 2
    rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=level.device) / half)
    angle = 1000.0 * level.float()[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], -1)


@dataclass(frozen=True)
class Spans:
    """How a sequence [patches | registers] is made of latent frames: so many positions of each kind a frame."""

    patches: int
    registers: int

    def expand(self, of_patches: Tensor, of_registers: Tensor) -> Tensor:
        """What patches and registers of each latent frame are given, 2 x [M, t, W], at every position [M, L, W]."""
        of_patches = of_patches.repeat_interleave(self.patches, 1)
        return torch.cat([of_patches, of_registers.repeat_interleave(self.registers, 1)], 1)


class FlowBlock(nn.Module):
    """x + gate f(norm(x) (1 + scale) + shift), f attention and then an MLP: adaLN-Zero (Peebles and Xie 2022,
    https://arxiv.org/abs/2212.09748), with modulations of their own for patches and for registers (FlexTok)."""

    def __init__(self, width: int, num_heads: int, *, mlp_ratio: float, mlp: str):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.mlp = MLP(width, ratio=mlp_ratio, kind=mlp)
        self.of_patches, self.of_registers = (nn.Linear(width, 6 * width) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, spans: Spans, mask: Tensor | None, blocks: Any = None) -> Tensor:
        modulation = spans.expand(self.of_patches(condition), self.of_registers(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        y = torch.addcmul(shift1, _norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.attention(y, mask, blocks=blocks))
        y = torch.addcmul(shift2, _norm(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.mlp(y))


class FlowTransformer(nn.Module):
    """`depth` blocks and a modulated norm over [patches | registers]: [M, L, W] -> patches [M, t P, W].

    Every modulation begins at zero, so that the stack begins as the identity, but for `begin_reading`. `flex`,
    `checkpoint`: as `Transformer`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "swiglu",
        flex: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.width, self.flex, self.checkpoint = width, flex, checkpoint
        self.level_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(FlowBlock(width, num_heads, mlp_ratio=mlp_ratio, mlp=mlp) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, FlowBlock)
            nn.init.zeros_(block.of_patches.weight)
            nn.init.zeros_(block.of_registers.weight)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, x: Tensor, level: Tensor, spans: Spans, mask: Tensor | None = None, *, tap: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [M, L, W]; level [M, t], the noise level of each latent frame; mask as in `vtok.layers.transformer`.

        Returns: the patches; what they were after `tap` blocks, or None.
        """
        condition = F.silu(self.level_in(level_features(level, self.width).to(x.dtype)))
        blocks = flex_blocks(mask) if self.flex and mask is not None and x.is_cuda else None
        tapped, patches = None, level.shape[1] * spans.patches
        for number, block in enumerate(self.blocks, 1):
            if self.checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, condition, spans, mask, blocks, use_reentrant=False)  # pyright: ignore
            else:
                x = block(x, condition, spans, mask, blocks)
            if number == tap:
                tapped = x[:, :patches]
        shift, scale = self.last(condition).repeat_interleave(spans.patches, 1).chunk(2, -1)
        return torch.addcmul(shift, _norm(x[:, :patches]), 1 + scale), tapped

    @torch.no_grad()
    def begin_reading(self, places: Tensor, source: nn.Linear) -> None:
        """Initial values, in place, with which the first block's patches take over, from the first step, what tokens
        hold that lie where they are: its attention reads by place (`vtok.layers.begin`), its gate for patches is 1.

        places: [N, W] positions of patches; source: gives the tokens.
        """
        if not len(self.blocks):
            return
        block = self.blocks[0]
        assert isinstance(block, FlowBlock)
        start_attention(block.attention, _norm, places, source)
        block.of_patches.bias[2 * self.width : 3 * self.width] = 1.0


def _norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def guide(told: Tensor, untold: Tensor, config: SamplerConfig, *, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Velocities [M, D, t, h, w] with and without the tokens -> the guided one; the difference, to pass on as `past`.

    Plain: told + (guidance - 1) (told - untold) (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598). Projected:
    the difference goes on from step to step, is shortened to `threshold`, and what of it is parallel to `told` counts
    `eta` times (adaptive projected guidance, Sadat et al. 2024, https://arxiv.org/abs/2410.02416; there of predicted
    data, here of velocities, as FlexTok's).
    """
    difference = told - untold
    if not config.projected:
        return told + (config.guidance - 1) * difference, difference
    if past is not None:
        difference = difference + config.momentum * past
    step, axes = difference, (2, 3, 4) if config.per_channel else (1, 2, 3, 4)
    if config.threshold:
        norm = step.square().sum(axes, keepdim=True).sqrt()
        step = step * (config.threshold / norm.clamp_min(1e-12)).clamp_max(1.0)
    unit = told / told.square().sum(axes, keepdim=True).sqrt().clamp_min(1e-12)
    parallel = (step * unit).sum(axes, keepdim=True) * unit
    return told + (config.guidance - 1) * (step - (1 - config.eta) * parallel), difference


def euler(
    velocity: Callable[[Tensor, Tensor, bool], Tensor],
    noise: Tensor,
    config: SamplerConfig,
    *,
    prefix: Tensor | None = None,
) -> Tensor:
    """Latents [M, D, t, h, w] drawn from `noise` of that shape, in equal steps of the noise level from 1 to 0.

    Args:
        velocity: (x_s, levels [M, t], whether the tokens are withheld) -> v [M, D, t, h, w].
        prefix: [M, D, p, h, w], latents of the first frames where they are known: put back at every step, at level 0.
    """
    x, past = noise * config.temperature, None
    known = 0 if prefix is None else prefix.shape[2]
    for step in range(config.steps):
        level = noise.new_full((noise.shape[0], noise.shape[2]), 1 - step / config.steps)
        if prefix is not None:
            x = torch.cat([prefix.to(x), x[:, :, known:]], 2)
            level[:, :known] = 0.0
        v = velocity(x, level, False)
        if config.guidance != 1.0:
            v, past = guide(v, velocity(x, level, True), config, past=past)
        x = x - v / config.steps
    return x if prefix is None else torch.cat([prefix.to(x), x[:, :, known:]], 2)


def fixed_noise(shape: tuple[int, ...], *, seed: int, chunk: int, device: torch.device) -> Tensor:
    """Gaussian noise of chunk number `chunk` of a video, the same on every device and for every clip of a batch."""
    generator = Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + chunk) & ((1 << 63) - 1))
    return torch.randn(shape, generator=generator).to(device)
