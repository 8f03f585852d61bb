"""Nested dropout: how many leading tokens each clip keeps in training.

Letters: B batch, G groups (time blocks), K tokens per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

MODES = ("full", "uniform", "pow2", "uniform_pow2", "truncnormal", "mixed")


@dataclass
class NestedConfig:
    """The law of nested dropout: how many leading tokens each clip keeps in training."""

    mode: str = "uniform"  # full | uniform | pow2 | uniform_pow2 | truncnormal | mixed (half uniform, half pow2)
    per: str = "sample"  # sample | batch (one draw for all) | block (independent for each time block and sample)
    min_tokens: int = 1
    mean: float = 256.0  # truncnormal, in tokens
    std: float = 128.0


def nested_keep(
    max_tokens: int,
    batch: int,
    *,
    groups: int = 1,
    config: NestedConfig | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Sample how many leading tokens each group keeps (nested dropout, Rippel et al. 2014,
    https://arxiv.org/abs/1402.0915).

    Modes over {min .. max}: "uniform" (One-D-Piece, Miwa et al. 2025, https://arxiv.org/abs/2501.10064), "pow2" uniform
    over the powers of two, as FlexTok (Bachmann et al. 2025, https://arxiv.org/abs/2502.13967), "uniform_pow2" uniform
    then rounded up to a power of two, "truncnormal" (AdapTok, Li et al. 2025, https://arxiv.org/abs/2505.17011),
    "mixed" a coin between uniform and pow2, "full" keeps all.

    Returns: [batch, groups] int64. Drawn on the CPU, so that every rank agrees given one seed.
    Raises: ValueError for an unknown mode, an empty range, or powers of two that do not end at `max_tokens`.
    """
    config = config or NestedConfig()
    mode, low = config.mode, config.min_tokens
    if mode not in MODES:
        raise ValueError(f"nested.mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if not 1 <= low <= max_tokens:
        raise ValueError(f"nested.min_tokens={low} is outside 1 to {max_tokens}, the tokens of a group")
    if config.per not in ("sample", "batch", "block"):
        raise ValueError(f"nested.per={config.per!r} is unknown; choose sample, batch or block")
    if mode in ("pow2", "uniform_pow2", "mixed") and max_tokens & (max_tokens - 1):
        raise ValueError(f"nested.mode={mode!r} needs num_tokens to be a power of two, got {max_tokens}")
    rows = {"sample": (batch, 1), "batch": (1, 1), "block": (batch, groups)}[config.per]
    count = rows[0] * rows[1]

    def uniform() -> Tensor:
        return torch.randint(low, max_tokens + 1, (count,), generator=generator)

    def pow2() -> Tensor:
        powers = [1 << i for i in range(max_tokens.bit_length()) if low <= 1 << i <= max_tokens]
        return torch.tensor(powers)[torch.randint(len(powers), (count,), generator=generator)]

    if mode == "full":
        keep = torch.full((count,), max_tokens)
    elif mode == "uniform":
        keep = uniform()
    elif mode == "pow2":
        keep = pow2()
    elif mode == "uniform_pow2":
        keep = (2 ** uniform().double().log2().ceil()).long()
    elif mode == "truncnormal":
        keep = _truncnormal(count, low, max_tokens, config.mean, config.std, generator)
    else:
        coin = torch.rand(count, generator=generator) < 0.5
        keep = torch.where(coin, uniform(), pow2())
    return keep.reshape(rows).expand(batch, groups).contiguous()


def _truncnormal(count: int, low: int, high: int, mean: float, std: float, generator: Generator | None) -> Tensor:
    """Integers in [low, high] from a normal truncated to that range, by inversion of its distribution function."""
    if std <= 0:
        raise ValueError(f"nested.std={std} must be positive")

    def cdf(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / (std * math.sqrt(2))))

    a, b = cdf(low - 0.5), cdf(high + 0.5)
    if b - a < 1e-9:
        raise ValueError(f"nested.mean={mean} and std={std} leave nothing in [{low}, {high}] tokens")
    u = a + (b - a) * torch.rand(count, generator=generator, dtype=torch.float64)
    drawn = mean + std * math.sqrt(2) * torch.erfinv(2 * u - 1)
    return drawn.round().clamp(low, high).long()
