"""Registers that begin as a coarse-to-fine pyramid over the patch grid, so that the order nested dropout wants is there
from the first step: 1 cell, then 2x2, 2x2x2, 2x4x4 ... cells (time x height x width), space and time refined in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pyramid_cells(num_cells: int, grid: tuple[int, int, int]) -> Tensor:
    """[num_cells, 6] float: (t0, t1, y0, y1, x0, x1) of the first cells in [0, 1], levels one after the other, raster
    order within a level; the last level may be cut short. A level never exceeds `grid`, the last one is repeated."""
    levels, level, turn = [(1, 1, 1)], (1, 1, 1), 0
    while sum(t * h * w for t, h, w in levels) < num_cells:
        t, h, w = level
        finer_space = (t, min(2 * h, grid[1]), min(2 * w, grid[2]))
        finer_time = (min(2 * t, grid[0]), h, w)
        choice = [finer_space, finer_time] if turn == 0 else [finer_time, finer_space]
        level = next((c for c in choice if c != level), level)
        turn = 1 - turn
        levels.append(level)
    cells = []
    for t, h, w in levels:
        for i in range(t):
            for j in range(h):
                for k in range(w):
                    cells.append((i / t, (i + 1) / t, j / h, (j + 1) / h, k / w, (k + 1) / w))
    return torch.tensor(cells[:num_cells])


def _overlap(cells: Tensor, axis: int, bins: Tensor, count: int) -> Tensor:
    """[M, cells, count]: share of each of bins[m] equal bins of [0, 1] that a cell covers; 0 past bins[m]."""
    low, high = cells[:, 2 * axis, None], cells[:, 2 * axis + 1, None]
    edge = torch.arange(count + 1, device=cells.device) / bins[:, None, None]  # [M, 1, count + 1]
    lower, upper = torch.maximum(low, edge[..., :-1]), torch.minimum(high, edge[..., 1:])
    return ((upper - lower).clamp_min(0) * bins[:, None, None]).clamp(max=1)


def coverage(num_cells: int, grid: tuple[int, int, int], lengths: Tensor, *, full_grid: tuple[int, int, int]) -> Tensor:
    """Share of each patch that each cell covers: rows over their sum pool patches into cells, columns spread cells.

    Args: grid: patches (t, h, w) of the padded clips. lengths: [M] real patches in time: the cells divide the real time
        of each clip, so that padding changes nothing and an image wastes no cell. full_grid: what levels stop at.
    Returns: [M, num_cells, t * h * w] float32.
    """
    cells = pyramid_cells(num_cells, full_grid).to(lengths.device)
    t = _overlap(cells, 0, lengths.clamp_min(1), grid[0])
    y, x = (_overlap(cells, axis, lengths.new_tensor([grid[axis]]), grid[axis])[0] for axis in (1, 2))
    return torch.einsum("mct,cy,cx->mctyx", t, y, x).flatten(2)
