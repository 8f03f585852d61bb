"""How many tokens each time block of a video keeps: every way to ask for it, behind one interface.

    steps of a stream (all tokens, their frames) -> LengthPolicy.lengths -> tokens of every block

| asked                   | policy      | what it does                                                               |
|-------------------------|-------------|----------------------------------------------------------------------------|
| budget K                | FixedLength | the first K tokens of every block                                          |
| tokens per second       | Rate        | what a clock allows, never more                                            |
| PSNR or LPIPS           | Searched    | the fewest tokens of each block that reach it, by decoding                 |
| tokens or bytes (video) | Allocated   | the distortion of every length measured (or a scorer's), then shared out  |
| predicted PSNR          | Predicted   | a halting head reads the tokens once: nothing is decoded                   |

`Searched` and `Predicted` are in `vtok.coding.wanted_quality`, `Allocated` in `vtok.coding.sharing`.

Blocks are decided in order, each with the blocks before it as they were decided: a later block is measured after what
its decoder will really have seen. Frames are compared as uint8 levels.

Letters: S lengths, C channels, T frames, H height, W width, G groups (time blocks), K tokens of a group, Q ids a token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vtok.coding.bitstream import StaticModel, Writer
from vtok.coding.prior_coding import PriorModel
from vtok.coding.sharing import Allocated
from vtok.coding.spending import BytePurse, Purse, TokenPurse
from vtok.coding.trial import (
    Step,
    frames_of_groups,
    lpips_distance,
    mean_squared_error,
    most_tokens,
    mse_of,
    unlike_steps,
    usual_frames,
)
from vtok.coding.wanted_quality import Predicted, Searched
from vtok.layers.perceptual import LPIPS
from vtok.types import Tokens

Held = TypeVar("Held")
MOST_DB = 150.0  # of PSNR: one value of 2^31 that is off by one, of 8 bits
WAYS = ("budget", "tokens_per_second", "tokens", "bytes", "psnr_db", "lpips", "predicted_psnr_db")


class LengthPolicy(Protocol):
    """Decides how many tokens the blocks of a stream keep."""

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        """For each step, in order, the tokens of each of its groups, 1 at least. It may read ahead of what it gives."""
        ...

    def report(self) -> str:
        """What there is to know of it at the end, in words; "" for nothing."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a user asked for: one of WAYS, or nothing, which keeps every token.

    look_ahead: blocks that `tokens` and `bytes` see beyond the one they decide; None: the whole video first.
    predicted: `tokens` and `bytes` share out by the distortion that the model's scorer predicts, without decoding.
    """

    budget: int | None = None
    tokens_per_second: Fraction | float | None = None
    tokens: int | None = None
    bytes: int | None = None
    psnr_db: float | None = None
    lpips: float | None = None
    predicted_psnr_db: float | None = None
    look_ahead: int | None = None
    predicted: bool = False

    def __post_init__(self) -> None:
        given = [f"{name}={getattr(self, name)}" for name in WAYS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of the two")
        for name in WAYS[1:]:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a number above 0")
            if value is not None and name in ("psnr_db", "predicted_psnr_db") and value > MOST_DB:
                raise ValueError(
                    f"{name}={value} is above {MOST_DB} dB, which no two videos of 8 bits reach that differ: lower it"
                )
        if self.look_ahead is not None and self.look_ahead < 0:
            raise ValueError(f"look_ahead={self.look_ahead} must be 0 or more blocks")
        shares = self.tokens is not None or self.bytes is not None
        for name, on in (("look_ahead", self.look_ahead is not None), ("predicted", self.predicted)):
            if on and not shares:
                raise ValueError(f"{name}={getattr(self, name)} goes with tokens or bytes of the whole video")

    @property
    def name(self) -> str:
        """The way that was asked for, "" for none."""
        return next((name for name in WAYS if getattr(self, name) is not None), "")

    @property
    def own_lengths(self) -> bool:
        """Whether the lengths are chosen block by block, not by a number or a clock."""
        return self.name in WAYS[2:]


def cut(
    policy: LengthPolicy, steps: Iterable[Step], *, hold: Callable[[Tokens], Held]
) -> Iterator[tuple[Held, Tensor]]:
    """Steps in order, each as `hold` keeps it, with the lengths [1, G] of its groups."""
    waiting: deque[Held] = deque()

    def tap() -> Iterator[Step]:
        for step in steps:
            waiting.append(hold(step.tokens))
            yield step

    for lengths in policy.lengths(tap()):
        yield waiting.popleft(), torch.tensor([lengths])
    assert not waiting, f"{len(waiting)} steps were never decided"


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


class FixedLength:
    """The first `budget` tokens of every block; None keeps all."""

    def __init__(self, model: Any, *, budget: int | None) -> None:
        most = getattr(model, "num_tokens", model.max_tokens)  # of a block
        if budget is not None and not 1 <= budget <= most:
            raise ValueError(f"budget={budget} tokens a time block: this model has 1 to {most}")
        self.budget = budget

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        for step in steps:
            most = most_tokens(step.tokens)
            yield [min(self.budget or most, most)] * int(step.tokens.num_groups[0])

    def report(self) -> str:
        return ""


class Rate:
    """As many tokens by the end of each block as a clock allows, at least one a block.

    A last block can be too short for a token of its own: it takes one from a block before it. One step is held back for
    that, so that the rate is never passed.
    """

    def __init__(self, model: Any, *, tokens_per_second: Fraction | float, fps: Fraction) -> None:
        self.model, self.rate, self.fps = model, as_fraction(tokens_per_second), fps
        self.usual = usual_frames(model)
        self.frames = self.blocks = 0
        self.debt = 0  # tokens given beyond the clock: of a first block of one frame, and of a short last one

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        held: list[int] | None = None
        for step in steps:
            now = self._by_clock(step)
            self._pay(now)
            if held is not None:
                self._pay(held)
                yield held
            held = now
        if self.debt and self.frames > 1:  # a video of one frame has one token at any rate
            self._refuse(f"{self.frames} frames in {self.blocks}")
        if held is not None:
            yield held

    def report(self) -> str:
        return ""

    def _pay(self, lengths: list[int]) -> None:
        """Take what was given beyond the clock from these blocks, the last first, each keeping one token."""
        for g in reversed(range(len(lengths))):
            taken = min(self.debt, lengths[g] - 1)
            lengths[g], self.debt = lengths[g] - taken, self.debt - taken

    def _refuse(self, what: str, *, block: int = 0) -> None:
        least = max(self.fps * self.blocks / self.frames, self.fps / block if block else 0)
        seconds = float((block or self.frames) / self.fps)
        raise ValueError(
            f"tokens_per_second={float(self.rate):g} is less than a token a block of {what} ({seconds:.3f} s); ask for "
            f"{math.ceil(least * 1000) / 1000:.3f} or more"
        )

    def _by_clock(self, step: Step) -> list[int]:
        if step.tokens.frames is None:
            raise ValueError("tokens_per_second needs a model that says how many frames its tokens stand for")
        most, out = most_tokens(step.tokens), []
        parts = frames_of_groups(self.model, step)
        for g, here in enumerate(parts):
            # What the clock allows by the end of this block less what it allowed by its start: a rate that is met
            # exactly in the long run, and never passed.
            start, end = (int(self.rate * n / self.fps) for n in (self.frames, self.frames + here))
            length = end - start - self.debt
            self.debt = max(1 - length, 0)
            self.frames, self.blocks = self.frames + here, self.blocks + 1
            alone = step.begins and g == 0 and here == 1
            if self.debt and here >= (self.usual or max(parts)) and not alone:
                self._refuse(f"{here} frames", block=here)
            out.append(min(max(1, length), most))
        return out


def simple_policy(
    model: Any, asked: Asked, *, fps: Fraction, size: tuple[int, int] = (0, 0), lpips: LPIPS | None = None
) -> LengthPolicy | None:
    """The policy of every way that needs no purse; None for `tokens` and `bytes`, which `shared_policy` makes.

    Raises: ValueError for a setting that the model cannot follow.
    """
    if asked.tokens_per_second is not None:
        return Rate(model, tokens_per_second=asked.tokens_per_second, fps=fps)
    if asked.psnr_db is not None:
        return Searched(model, size, target=mse_of(asked.psnr_db), distance=mean_squared_error)
    if asked.lpips is not None:
        if lpips is None:
            raise ValueError(f"lpips={asked.lpips} needs LPIPS weights: give --lpips-weights")
        return Searched(model, size, target=asked.lpips, distance=lpips_distance(lpips))
    if asked.predicted_psnr_db is not None:
        return Predicted(model, psnr_db=asked.predicted_psnr_db)
    return None if asked.name in ("tokens", "bytes") else FixedLength(model, budget=asked.budget)


def shared_policy(
    model: Any,
    asked: Asked,
    *,
    writer: Writer,
    entropy: StaticModel | PriorModel | None,
    frames: int,
    again: Callable[[], Iterable[np.ndarray]],
) -> LengthPolicy:
    """The policy of a budget for the whole video.

    Args:
        writer, entropy: of the file that the tokens go to.
        frames: of the video, as its container states. again: reads the video from its start.
    """
    if asked.bytes is None:
        assert asked.tokens is not None
        purse: Purse = TokenPurse(asked.tokens)
    else:
        purse = BytePurse(
            asked.bytes,
            writer,
            entropy,
            chunk_tokens=model.max_tokens,
            group_tokens=getattr(model, "num_tokens", model.max_tokens),
            runs=unlike_steps(model),
            frames=max(frames, 1) if asked.look_ahead is not None else 1 << 28,
        )
    return Allocated(
        model,
        writer.header.size,
        purse=purse,
        look_ahead=asked.look_ahead,
        predicted=asked.predicted,
        frames=frames,
        again=again,
    )
