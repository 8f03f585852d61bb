"""Causal 3D Haar wavelets: blocks of pixels become channels, exactly invertibly.

    pixels [B, C, T, H, W] --first frame repeated--> log2(p) rounds over each axis --> [B, C pt ph pw, 1 + n, h, w]

Each round replaces neighbours a, b by (a + b) / 2 and (a - b) / 2, of all bands of the round before (a wavelet packet).
Letters: B clips, C channels, T frames, H, W pixels; pt, ph, pw the block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtok.layers.causal import Axes, Cache, begins


def _split(x: Tensor, axis: int) -> Tensor:
    """One round over `axis`: half as long there, twice the channels, (means, half differences)."""
    a, b = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return torch.cat([a + b, a - b], 1).mul_(0.5)


def _join(x: Tensor, axis: int) -> Tensor:
    """`_split` undone."""
    low, high = x.chunk(2, 1)
    return torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1)


class HaarPatch(nn.Module):
    """Pixels to bands and back, for blocks of pt frames x ph x pw pixels (powers of two), as in Cosmos (Agarwal et al.
    2025, https://arxiv.org/abs/2501.03575).

    Without parameters. Bands keep the range of the pixels. The first frame counts pt times, so 1 + pt n frames give
    1 + n and the first of them knows the first frame only. Band order: time is outermost, so that the first
    C ph pw channels are those of the same patch with pt = 1; low before high.
    Raises: ValueError for a block that is not of powers of two.
    """

    def __init__(self, patch: Axes):
        super().__init__()
        if any(n < 1 or n & (n - 1) for n in patch):
            raise ValueError(f"patch={patch}: Haar wavelets halve, choose powers of two")
        self.patch, self.channels = patch, math.prod(patch)
        self.rounds = [
            axis for axis, n in ((4, patch[2]), (3, patch[1]), (2, patch[0])) for _ in range(n.bit_length() - 1)
        ]

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C pt ph pw, t, H / ph, W / pw]; T = 1 + pt n at the beginning, pt n later on."""
        if self.patch[0] > 1 and begins(self, cache):
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.patch[0] - 1, -1, -1), x], 2)
        for axis in self.rounds:
            x = _split(x, axis)
        return x

    def inverse(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """[B, C pt ph pw, t, h, w] -> [B, C, T, h ph, w pw], the copies of the first frame dropped."""
        for axis in reversed(self.rounds):
            x = _join(x, axis)
        return x[:, :, self.patch[0] - 1 :] if self.patch[0] > 1 and begins(self, cache) else x
