"""How many tokens each time block of a stream keeps.

Letters: G groups (time blocks), K tokens.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from vtok.types import Tokens


def as_fraction(value: Fraction | float) -> Fraction:
    """A rate as a ratio: 29.97002997 is 30000/1001, 7.5 is 15/2."""
    if isinstance(value, (Fraction, int)):
        return Fraction(value)
    exact = Fraction(value)
    for limit in (1, 1001, 1 << 16):
        near = exact.limit_denominator(limit)
        if near > 0 and abs(near - exact) <= abs(exact) * Fraction(1, 10**6):
            return near
    return exact.limit_denominator(1 << 24)


class Lengths:
    """Tokens that each time block may keep."""

    def __init__(
        self, model: Any, *, budget: int | None, tokens_per_second: Fraction | float | None, fps: Fraction
    ) -> None:
        if budget is not None and tokens_per_second is not None:
            raise ValueError(f"budget={budget} and tokens_per_second={tokens_per_second}: give one of the two")
        if budget is not None and not 1 <= budget <= model.max_tokens:
            raise ValueError(f"budget={budget} tokens a time block: this model has 1 to {model.max_tokens}")
        if tokens_per_second is not None and not tokens_per_second > 0:
            raise ValueError(f"tokens_per_second={tokens_per_second} must be above 0")
        self.budget, self.fps, self.frames = budget, fps, 0
        self.rate = None if tokens_per_second is None else as_fraction(tokens_per_second)
        self.block = getattr(model.config, "block_frames", None)

    def cut(self, tokens: Tokens) -> Tokens:
        """The step's tokens (groups numbered from 0) within their budgets."""
        if self.budget is None and self.rate is None:
            return tokens
        groups = int(tokens.num_groups[0])
        most = int(tokens.rank.max()) + 1 if tokens.rank.numel() else 1
        if self.rate is None:
            asked = [self.budget or most] * groups
        else:
            asked = self._by_rate(tokens, groups, most)
        return tokens.truncate(torch.tensor([[min(k, most) for k in asked]]))

    def _by_rate(self, tokens: Tokens, groups: int, most: int) -> list[int]:
        if tokens.frames is None or self.rate is None:
            raise ValueError("tokens_per_second needs a model that says how many frames its tokens stand for")
        frames = int(tokens.frames[0])
        block = self.block or -(-frames // groups)
        out = []
        for g in range(groups):
            here = min(block, frames - g * block)
            # What the clock allows by the end of this block less what it allowed by its start: a rate that is met
            # exactly in the long run, and never passed.
            start, end = (int(self.rate * n / self.fps) for n in (self.frames, self.frames + here))
            if end == start and here == block:
                raise ValueError(
                    f"tokens_per_second={float(self.rate):g} leaves a block of {block} frames "
                    f"({float(block / self.fps):.3f} s) without a token; ask for {float(self.fps / block):.3f} or more"
                )
            out.append(max(1, end - start))
            self.frames += here
        return out
