"""The discriminator of StyleGAN2, for frames of any size: images [N, C, H, W] in [-1, 1] to logits.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, https://arxiv.org/abs/1912.04958: residual
blocks that blur before they halve, the spread over a minibatch as one more channel, and one logit an image.

Letters: N images, C channels, H height, W width, h, w those of a feature.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST = 4  # places a side in front of the last layers
WIDEST = 512


class _EqualConv2d(nn.Module):
    """A convolution whose weights, drawn from N(0, 1), are scaled by 1 / sqrt(fan in) where they are used, so that
    Adam's steps are as large for every layer (Karras et al. 2017, https://arxiv.org/abs/1710.10196)."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.gain = 1 / math.sqrt(channels * kernel**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


class _EqualLinear(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))
        self.bias = nn.Parameter(torch.zeros(out))
        self.gain = 1 / math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class _Activation(nn.Module):
    """Leaky ReLU that keeps the variance."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class Blur(nn.Module):
    """Each channel under the binomial filter (1, 3, 3, 1) in both directions, its weights summing to 1 (Zhang 2019,
    https://arxiv.org/abs/1904.11486: what is halved without it depends on a shift by one pixel)."""

    filter: Tensor

    def __init__(self, padding: int):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("filter", torch.outer(row, row)[None, None], persistent=False)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        each = self.filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, each, padding=self.padding, groups=x.shape[1])


class _Block(nn.Module):
    """[N, channels, H, W] -> [N, out, H // 2, W // 2]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            _EqualConv2d(channels, channels, 3, padding=1),
            _Activation(),
            Blur(2),
            _EqualConv2d(channels, out, 3, stride=2),
            _Activation(),
        )
        self.skip = nn.Sequential(Blur(1), _EqualConv2d(channels, out, 1, stride=2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)) / math.sqrt(2)


def minibatch_spread(x: Tensor, *, group: int = 4) -> Tensor:
    """[N, C, h, w] -> [N, C + 1, h, w]: the last channel is the standard deviation over a group of images, averaged
    over channels and places (Karras et al. 2017, https://arxiv.org/abs/1710.10196).

    group: images compared, at most; the largest divisor of N up to it. Images of a group are N / group apart, so that
    of several clips, frame after frame, the same frames are compared. Groups do not cross processes: with several of
    them the logits are those of one process with the whole batch only where groups are.
    """
    n = len(x)
    size = max(g for g in range(1, min(group, n) + 1) if n % g == 0)
    wide = x if x.dtype == torch.float64 else x.float()
    groups = wide.reshape(size, n // size, *x.shape[1:])
    spread = ((groups - groups.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))  # [N / size]
    spread = spread.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    return torch.cat([x, spread.to(x.dtype)], 1)


class StyleGANDiscriminator(nn.Module):
    """[N, C, H, W] -> [N, 1] logits. Frames are halved while more than 4 places a side are left, and what is left is
    averaged to 4 x 4 where it is not that already (sides that are no power of two; StyleGAN2 has none).

    Args:
        width: channels at full size, doubled with each halving, at most 512. size: (height, width) of the frames.
    Raises: ValueError when frames have less than 8 pixels a side.
    """

    def __init__(self, *, channels: int = 3, width: int = 64, size: tuple[int, int] = (128, 128)):
        super().__init__()
        halvings = int(math.log2(min(size) / LAST)) if min(size) >= LAST else 0
        if halvings < 1:
            raise ValueError(
                f"objective.adversarial.discriminator=stylegan halves frames down to {LAST}x{LAST}, frames of "
                f"{size[0]}x{size[1]} are too small; choose discriminator=conv3d"
            )
        have = min(width, WIDEST)
        self.first = nn.Sequential(_EqualConv2d(channels, have, 1), _Activation())
        blocks = []
        for _ in range(halvings):
            want = min(2 * have, WIDEST)
            blocks.append(_Block(have, want))
            have = want
        self.blocks = nn.ModuleList(blocks)
        self.mix = nn.Sequential(_EqualConv2d(have + 1, have, 3, padding=1), _Activation())
        self.hidden = nn.Sequential(_EqualLinear(have * LAST**2, have), _Activation())
        self.head = _EqualLinear(have, 1)

    def features(self, image: Tensor) -> list[Tensor]:
        x = self.first(image)
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        x = self.mix(minibatch_spread(x))
        if x.shape[2:] != (LAST, LAST):
            x = F.adaptive_avg_pool2d(x, LAST)
        return [*out, self.head(self.hidden(x.flatten(1)))]

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[-1]
