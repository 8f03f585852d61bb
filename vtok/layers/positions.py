"""Where a patch is: factorised (t, y, x) position vectors that stretch to any grid.

Letters: D width, N number of positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos(positions: Tensor, width: int, *, longest: float = 1000.0) -> Tensor:
    """Sine-cosine features of positions [N] in patch units: [N, width] (width even), wavelengths 2 pi to `longest`."""
    half = width // 2
    rate = torch.exp(-math.log(longest) * torch.arange(half, device=positions.device) / max(half - 1, 1))
    angle = positions.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


def _axis_widths(width: int) -> tuple[int, int, int]:
    """width split over (t, y, x): thirds rounded down to even numbers, the rest to t."""
    space = width // 3 // 2 * 2
    return width - 2 * space, space, space


def _stretched(table: Tensor, count: int) -> Tensor:
    """[n, D] -> [count, D], over the same extent."""
    return F.interpolate(table.T[None], size=count, mode="linear", align_corners=False)[0].T


def later_as_last(table: Tensor, count: int, *, group: int = 1) -> Tensor:
    """Rows of a table over time [n, D], `group` of them at a time, cut or continued to [count, D]: what is later than
    the table knows is as the last it knows."""
    missing = (count - len(table)) // group
    return torch.cat([table, table[-group:].repeat(max(missing, 0), 1)])[:count]


class Positions(nn.Module):
    """Position vectors of a (t, h, w) patch grid: [t * h * w, D].

    kind "learned": one table per axis, summed; a grid of another size in space reads them by linear interpolation, so
    that the picture keeps its extent. "sincos": fixed, concatenated over axes, stretched in the same way. Time is never
    stretched: patch t of a short clip is patch t of a long one, and t may not exceed the trained number.
    """

    def __init__(self, width: int, grid: tuple[int, int, int], *, kind: str = "learned"):
        super().__init__()
        if kind not in ("learned", "sincos"):
            raise ValueError(f"positions={kind!r} is unknown; choose learned or sincos")
        if kind == "sincos" and width % 2:
            raise ValueError(f"width={width} is odd: sincos positions need an even width")
        self.grid, self.width, self.kind = grid, width, kind
        if kind == "learned":
            self.tables = nn.ParameterList(nn.Parameter(torch.randn(n, width) * 0.02) for n in grid)

    def resized(self, name: str, given: Tensor) -> Tensor | None:
        """A table trained for another grid (`name`: tables.AXIS), for this one: in space interpolated, as `forward`
        reads it; in time patch t stays patch t, and later ones begin as the last. None for one of another width."""
        axis = int(name.rpartition(".")[2])
        if given.shape[1] != self.width:
            return None
        if axis == 0:
            return later_as_last(given, self.grid[0])
        return _stretched(given, self.grid[axis])

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        if grid[0] > self.grid[0]:
            raise ValueError(
                f"{grid[0]} patches in time, the positions know {self.grid[0]}: encode longer clips in chunks"
            )
        axes: list[Tensor] = []
        for axis, (have, want) in enumerate(zip(self.grid, grid)):
            if self.kind == "learned":
                table = self.tables[axis]
                if axis and want != have:
                    table = _stretched(table, want)
                axes.append(table[:want])
            else:
                place = torch.arange(want, dtype=torch.float32)
                if axis:
                    place = (place + 0.5) * have / want - 0.5
                axes.append(sincos(place, _axis_widths(self.width)[axis]))
        t, y, x = axes
        if self.kind == "learned":
            return (t[:, None, None] + y[None, :, None] + x[None, None, :]).flatten(0, 2)
        full = [a.reshape([-1 if i == axis else 1 for i in range(3)] + [a.shape[-1]]) for axis, a in enumerate(axes)]
        out = torch.cat([a.expand(*grid, a.shape[-1]) for a in full], -1).flatten(0, 2)
        return out
