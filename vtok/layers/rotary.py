"""Rotary positions: queries and keys are turned by angles that grow with the position (Su et al. 2021, RoFormer,
https://arxiv.org/abs/2104.09864), so that attention sees differences of positions only.

Letters: N positions, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [N, D / 2]


def rotation(positions: Tensor, dim: int, *, base: float) -> Rotation:
    """Angles position / base ** (2 i / dim), i < dim / 2, of `positions` [N]: cosines and sines [N, dim / 2]."""
    rate = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=positions.dtype) / dim)
    angle = positions[:, None] * rate
    return angle.cos(), angle.sin()


def rotation_2d(grid: tuple[int, int], dim: int, *, base: float, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Rotations of the patches of a frame, row after row: [h * w, dim / 2] each. dim is a multiple of 4.

    The first half of the angles follows y, the second x. Positions are counted in patches and never stretched, so a
    frame of another size has the same neighbourhoods as the trained one.
    """
    height, width = grid
    rows = rotation(torch.arange(height, device=device, dtype=dtype), dim // 2, base=base)
    columns = rotation(torch.arange(width, device=device, dtype=dtype), dim // 2, base=base)
    cos, sin = (
        torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1).flatten(0, 1)
        for y, x in zip(rows, columns)
    )
    return cos, sin


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x [..., N, D] turned by angles of N positions, in the precision of the angles; lengths of vectors stay."""
    cos, sin = by
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
