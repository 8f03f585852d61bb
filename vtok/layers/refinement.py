"""Nested refinement in FSQ tokens: which coefficient each symbol of a token refines, and what its cells are worth.

A level count is split into its prime factors, each a symbol; `allocate` gives the symbols one after the other to the
coefficient whose expected distortion falls most, which gets so many times as many cells. Cells are equal steps of
sigmoid(x / (1.6 s)), FSQ's own tanh bound, where s is the scale of a logistic distribution, under which their means and
distortions are closed forms. `vtok.layers.transform` says why.

Equitz and Cover 1991, https://doi.org/10.1109/18.75242. Finite scalar quantization: Mentzer et al. 2023,
https://arxiv.org/abs/2309.15505.

Letters: K tokens, Q dimensions of a token, S symbols (over all tokens), M coefficients.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

# Width of the compander in logistic scales. Distortion at 2, 4, 8, 64 cells is within 6 % of the best width for each.
COMPANDER = 1.6
LOGISTIC_STD = math.pi / math.sqrt(3)
_MAX_CELLS = 4096  # cells a coefficient may be refined to: 12 bits, what float32 coefficients can tell apart


class Symbols(NamedTuple):
    """The S symbols of a code, by token and inside a token from the largest radix down. Each [S] int64."""

    token: Tensor
    dim: Tensor
    radix: Tensor
    place: Tensor  # value of one step of this symbol in its dimension's level


def prime_factors(value: int) -> list[int]:
    """Prime factors in falling order: prime_factors(12) == [3, 2, 2]."""
    out, divisor = [], 2
    while value > 1:
        while value % divisor == 0:
            out.append(divisor)
            value //= divisor
        divisor += 1
    return out[::-1]


def symbols_of(levels: tuple[int, ...], num_tokens: int, *, split: bool = True) -> Symbols:
    """The symbols that `num_tokens` FSQ tokens of these levels hold; split=False keeps one symbol a dimension."""
    one: list[tuple[int, int, int]] = []
    for dim, level in enumerate(levels):
        place = 1
        for radix in prime_factors(level) if split else [level]:
            one.append((dim, radix, place))
            place *= radix
    one.sort(key=lambda symbol: -symbol[1])  # stable: a coarse symbol on a fresh coefficient is worth most
    dim, radix, place = torch.tensor(one, dtype=torch.int64).T
    token = torch.arange(num_tokens).repeat_interleave(len(one))
    return Symbols(token, dim.repeat(num_tokens), radix.repeat(num_tokens), place.repeat(num_tokens))


def fsq_preimage(level: Tensor, levels: Tensor) -> Tensor:
    """z such that FSQ's bound and rounding give `level`: the inverse of the quantizer at the middle of a level.

    Args:
        level: [..., Q] int64 in [0, levels). levels: [Q].
    Returns: [..., Q] float32. Rounding z to bfloat16 does not change the level.
    """
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return torch.atanh((level - levels // 2 + offset) / half) - torch.atanh(offset / half)


def fsq_level(values: Tensor, levels: Tensor) -> Tensor:
    """The level [..., Q] int64 in [0, levels) of FSQ's values in [-1, 1]."""
    half = levels // 2
    return (values.float() * half).round().long().add(half).clamp_min(0).minimum(levels - 1)


def _cumulative_moment(x: Tensor) -> Tensor:
    """Integral of t f(t) up to x for the standard logistic density f."""
    return x * torch.sigmoid(x) - nnf.softplus(x, threshold=700)


def cell_mean(cell: Tensor, cells: Tensor) -> Tensor:
    """Conditional mean of a standard logistic variable in cell `cell` of `cells` equal companded cells.

    Args: cell: int64, in [0, cells). cells: int64; broadcast against each other.
    Returns: float64 of the broadcast shape; exactly 0 where cells == 1.
    """
    mirror = 2 * cell + 1 > cells  # the left half has the small numbers, and precision
    low = torch.where(mirror, cells - 1 - cell, cell).double()
    # +-300: past every float64 probability, short of infinities that would make 0 * inf
    edges = [(COMPANDER * torch.logit(p / cells)).clamp(-300.0, 300.0) for p in (low, low + 1)]
    mass = torch.sigmoid(edges[1]) - torch.sigmoid(edges[0])
    mean = (_cumulative_moment(edges[1]) - _cumulative_moment(edges[0])) / mass
    return torch.where(cells == 1, 0.0, torch.where(mirror, -mean, mean))


def distortion(cells: int) -> float:
    """Mean squared error left by `cells` companded cells, as a share of a logistic variable's variance."""
    index = torch.arange(cells)
    edge = torch.sigmoid(COMPANDER * torch.logit(torch.arange(cells + 1).double() / cells))
    return 1.0 - float(((edge[1:] - edge[:-1]) * cell_mean(index, torch.tensor(cells)) ** 2).sum()) / LOGISTIC_STD**2


def allocate(variance: Tensor, radix: Tensor) -> tuple[Tensor, Tensor]:
    """Give every symbol to the coefficient whose expected distortion it lowers most, one after the other.

    Args:
        variance: [M] of each coefficient. radix: [S] int64, values of each symbol, in nesting order.
    Returns: (target [S] int64, the coefficient of each symbol; cells [S] int64, that coefficient's cells after it).
    Raises: ValueError when M coefficients cannot hold S symbols.
    """
    left: dict[int, float] = {}

    def gain(coefficient: int, cells: int, step: int) -> float:
        for count in (cells, cells * step):
            if count not in left:
                left[count] = distortion(count)
        return float(power[coefficient]) * (left[cells] - left[cells * step])

    power, count = variance.double().tolist(), [1] * len(variance)
    heaps = {
        step: sorted((-gain(m, 1, step), m, 1) for m in range(len(power))) for step in set(radix.tolist())
    }  # by radix: (-gain, coefficient, cells it was computed for); stale entries are dropped when they surface
    target, cells = [], []
    for step in radix.tolist():
        heap = heaps[step]
        while heap and heap[0][2] != count[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:
            raise ValueError(
                f"{len(power)} coefficients of at most {_MAX_CELLS} cells cannot hold {len(radix)} symbols; "
                "raise num_coefficients or max_frequencies, or ask for fewer tokens"
            )
        m = heap[0][1]
        count[m] *= step
        target.append(m)
        cells.append(count[m])
        for other, entries in heaps.items():
            if count[m] * other <= _MAX_CELLS:
                heapq.heappush(entries, (-gain(m, count[m], other), m, count[m]))
    return torch.tensor(target), torch.tensor(cells)
