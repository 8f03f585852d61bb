"""A budget of tokens or bytes shared out over the time blocks of one video, known as a whole or while it streams.

`Allocated` is a policy of `vtok.coding.rate_control`; what a length costs, its purse says (`vtok.coding.spending`).

Letters: S lengths, C channels, T frames, H height, W width, G groups (time blocks), K tokens of a group.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.budget import allocate_ahead, allocate_lagrange, interpolate_lengths, spread_lengths
from vtok.coding.records import Chunk
from vtok.coding.spending import Purse
from vtok.coding.trial import (
    Group,
    Step,
    Trial,
    groups_of,
    most_tokens,
    squared_error,
    stand_alone,
    steps_to_come,
    usual_frames,
)
from vtok.layers.stream import StreamedTokenizer
from vtok.types import Clip

TOLERANCE = 1e-6  # bits, of sums in float64: prices are rounded up by whole bytes
NEAR = 256  # blocks that a decision weighs one by one; of those further off, a sample


@dataclass
class _Known:
    group: Group
    distortion: Tensor  # [K]
    prices: Tensor  # [K]


class Allocated:
    """A budget shared out over the blocks of one video: the least summed squared error within the purse.

    The distortion of every block is measured at a menu of lengths and interpolated between them, or predicted by the
    model's scorer. With `look_ahead`, a block is decided once the blocks after it are known that far, the rest of the
    video taken to be like what was seen; without, once the whole video is. Either way the earlier blocks are as
    decided: where they matter to later ones, a block is measured again before it is decided.

    Args:
        frames: of the whole video as its container states them, for a look-ahead.
        again: the frames of the video from its start, for a second pass where one is needed.
    """

    def __init__(
        self,
        model: Any,
        size: tuple[int, int],
        *,
        purse: Purse,
        look_ahead: int | None = None,
        predicted: bool = False,
        frames: int = 0,
        again: Callable[[], Iterable[np.ndarray]] | None = None,
    ) -> None:
        if look_ahead is not None and frames < 1:
            raise ValueError("look_ahead needs a container that states its number of frames: leave it out")
        if predicted and not hasattr(model, "scorer"):
            fix = "set model.scorer_depth and train it" if hasattr(model.config, "scorer_depth") else "leave it out"
            raise ValueError(f"predicted=true needs a model with a scorer, which only family flexible can have: {fix}")
        self.model, self.purse, self.look_ahead, self.predicted = model, purse, look_ahead, predicted
        self.frames, self.again = frames, again
        self.trial, self.scout = (Trial(model, size, squared_error) for _ in range(2))
        self.alone = predicted or stand_alone(model)
        self.known: deque[_Known] = deque()
        self.sizes: list[int] = []  # groups of each step
        self.step_frames: list[int | None] = []
        self.past: deque[tuple[Tensor, Tensor]] = deque(maxlen=NEAR)
        self.seen = 0  # frames so far
        self.chunk: list[np.ndarray] = []  # frames [T, H, W, 3] of a chunk that is not whole yet, for a scorer
        self.block = usual_frames(model)  # of a block, where the model says
        self.at_least = False  # whether nothing but one token a block is within the setting

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        if self.look_ahead is not None:
            yield from self._streamed(steps, self.look_ahead)
            return
        while self._load(steps):
            pass
        if self.alone:
            yield from self._rest(0)
            return
        second = self._second_pass()
        for at in range(len(self.sizes)):
            out: list[int] = []
            while len(out) < self.sizes[at]:
                out.append(self._decide(at, out, second))
            yield out
            self.purse.handed_on()

    def _streamed(self, steps: Iterator[Step], look_ahead: int) -> Iterator[list[int]]:
        at, more = 0, True

        def look() -> bool:
            """Whether there is more to come once so many blocks are known beyond the next."""
            while more and len(self.known) <= look_ahead:
                if not self._load(steps):
                    return False
            return more

        while True:
            more = look()
            if not self.known:
                return
            if more and self.seen >= self.frames:  # by its container, the video ends here
                more = self._load(steps)
            if not more and self.alone:
                yield from self._rest(at)
                return
            out: list[int] = []
            while len(out) < self.sizes[at]:
                more = look()
                out.append(self._decide(at, out, None))
            at += 1
            yield out
            self.purse.handed_on()

    def report(self) -> str:
        return ""

    def _load(self, steps: Iterator[Step]) -> bool:
        step = next(steps, None)
        if step is None:
            return False
        groups = groups_of(self.model, step)
        predicted = self._predict(step, groups) if self.predicted else None
        for g, group in enumerate(groups):
            distortion = self._curve(self.scout, group) if predicted is None else predicted[g]
            if not self.alone:
                self.scout.accept(group, most_tokens(group.tokens))
            if self.alone or self.look_ahead is None:  # what is measured once, or again in a second pass
                group.frames = None
            self.known.append(_Known(group, distortion, self.purse.prices(group.ids, chosen=False)))
        self.sizes.append(len(groups))
        self.step_frames.append(int(step.tokens.frames[0]) if step.tokens.frames is not None else None)
        self.seen += sum(group.num_frames for group in groups)
        self.block = max(self.block, *(group.num_frames for group in groups))
        return True

    def _curve(self, trial: Trial, group: Group) -> Tensor:
        """[K] squared error of 1, 2 ... K tokens."""
        most = most_tokens(group.tokens)
        menu = spread_lengths(most)
        return interpolate_lengths(torch.tensor(trial.measure(group, menu), dtype=torch.float64), menu, most)

    def _predict(self, step: Step, groups: list[Group]) -> list[Tensor]:
        device = step.tokens.embeddings.device
        self.chunk = [*self.chunk, step.frames]  # a last chunk can come in two steps, and its blocks see each other
        frames = np.concatenate(self.chunk)
        if len(frames) >= self.model.num_frames:
            self.chunk = []
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device)
        table = self.model.predict_distortion(Clip(keys=["stream"], video=video))[0]  # [G, S]
        table = table[-len(groups) :].double().cpu()
        most = most_tokens(groups[0].tokens)
        unit = most // table.shape[1]
        menu = [unit * (s + 1) for s in range(table.shape[1])]
        # below the shortest length it knows, the scorer says nothing: such lengths count as bad as that one, and more
        curves = interpolate_lengths(table, menu, most)
        below = (unit / torch.arange(1, most + 1).double()).clamp_min(1)
        return [curve * below * group.num_frames for curve, group in zip(curves, groups)]

    def _second_pass(self) -> Iterator[Tensor]:
        """The frames [3, T, H, W] of every block, read from the video again."""
        if self.again is None:
            raise ValueError("blocks that depend on earlier ones need a look_ahead, or a source that is read twice")
        source = iter(self.again())
        for known in list(self.known):
            frames = [next(source) for _ in range(known.group.num_frames)]
            yield torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)

    def _decide(self, at: int, before: list[int], second: Iterator[Tensor] | None) -> int:
        """Tokens of the next block, of step `at`, whose earlier blocks have `before`."""
        first = self.known[0]
        if second is not None:
            first.group.frames = next(second)
        if not self.alone:
            first.distortion = self._curve(self.trial, first.group)
        first.prices = self.purse.prices(first.group.ids, chosen=True)
        near, later = list(islice(self.known, NEAR)), list(islice(self.known, NEAR, None))
        unknown = 0 if self.look_ahead is None else -(-max(self.frames - self.seen, 0) // self.block)
        reserve = unknown * self.purse.least + float(sum(known.prices.min() for known in later))
        like = later[:: -(-len(later) // NEAR)] if later else list(self.past)
        (distortion, prices), total = _stack(near), self.purse.left()
        past = _stack(like) if like else (distortion[:0], prices[:0])
        least, others = reserve + float(prices.amin(1).sum()), unknown + len(self.known) - 1
        # Prices are bounds one by one; what the lengths of all steps make of the file is closer, and takes longer.
        if least > total or others < NEAR:
            total = max(total, least - self._beyond([*before, 1], at))

        def beyond(level: int) -> float:
            """How far the setting may be passed, in prices, if the block has this level and all others the least."""
            rest = reserve + float(prices[1:].amin(1).sum()) if self.purse.firm else others * self.purse.least
            priced = float(prices[0, level]) + rest - self.purse.left()
            return 0.0 if priced <= TOLERANCE else min(priced, self._beyond([*before, level + 1], at))

        level = 0
        if not self.at_least:
            missing = beyond(0)
            if missing > 0 and self.look_ahead is None and not at and not before:
                missing = self._exactly_beyond()
                self.at_least = missing <= 0
            if missing > 0:
                raise self.purse.short_of(missing)
        if not self.at_least and total > least:
            level = allocate_ahead(
                distortion,
                prices,
                past_distortion=past[0],
                past_rate=past[1],
                unknown=unknown + len(later),
                total=total,
                reserve=reserve,
            )
            if beyond(level) > 0:
                low, high = 0, level
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if beyond(middle) <= 0 else (low, middle)
                level = low
        self.known.popleft()
        if self.look_ahead is not None:
            self.past.append((first.distortion, first.prices))
        self._settle(first, level)
        return level + 1

    def _beyond(self, lengths: list[int], at: int) -> float:
        """How far the setting is passed at most, in units of price, if step `at` begins with these lengths and every
        block after them has one token, whatever its ids are."""
        if self.look_ahead is not None and not isinstance(self.model, StreamedTokenizer):
            return math.inf  # its next steps are not known
        known = zip(self.sizes[at:], self.step_frames[at:])
        plan: list[tuple[list[int], int | None]] = [([1] * count, frames) for count, frames in known]
        plan[0][0][: len(lengths)] = lengths
        if self.look_ahead is not None:
            coming = steps_to_come(self.model, self.frames - self.seen, begins=False)
            plan += [([1] * len(groups), sum(groups)) for groups in coming]
        most = self.purse.most(plan, frames=max(self.frames, self.seen) if self.look_ahead is not None else self.seen)
        return float(most - self.purse.total) * self.purse.unit

    def _exactly_beyond(self) -> float:
        """The same of one token for every block of a video that is known as a whole, measured by writing."""
        size = self._size(torch.zeros(len(self.known), dtype=torch.int64), 0)
        return float(size - self.purse.total) * self.purse.unit

    def _settle(self, known: _Known, level: int) -> None:
        if not self.alone:
            self.trial.accept(known.group, level + 1)
        self.purse.pay(known.group.ids, level + 1, float(known.prices[level]))

    def _rest(self, first: int) -> Iterator[list[int]]:
        """Every block from step `first` on at once. The size is measured by writing, so that what the purse's bounds
        leave over is spent too, and one length for all, which costs less to signal, is taken where it is better."""
        if not self.known:
            return
        distortion, prices = _stack(self.known)
        choice, unit, limit = torch.zeros(len(prices), dtype=torch.int64), self.purse.unit, self.purse.total
        size, floor = self._size(choice, first), float(prices.amin(1).sum())
        if size > limit:
            raise self.purse.short_of((size - limit) * unit)
        low, high, capacity = floor, math.inf, max(self.purse.left(), floor)
        for _ in range(10):
            asked = allocate_lagrange(distortion, prices, total=capacity)
            spare = (limit - self._size(asked, first)) * unit
            if spare >= 0:
                same, choice, low = torch.equal(asked, choice), asked, capacity
                if spare < unit or (same and capacity > floor):
                    break
            else:
                high = capacity
            capacity += spare
            if not low < capacity < high:
                capacity = (low + high) / 2
        low_level, high_level = 0, distortion.shape[1]  # one length for all: the longest that fits
        while high_level - low_level > 1:
            level = (low_level + high_level) // 2
            fits = self._size(torch.full_like(choice, level), first) <= limit
            low_level, high_level = (level, high_level) if fits else (low_level, level)
        if float(distortion[:, low_level].sum()) < float(distortion.gather(1, choice[:, None]).sum()):
            choice = torch.full_like(choice, low_level)
        lengths, at = (choice + 1).tolist(), 0
        for count in self.sizes[first:]:
            yield lengths[at : at + count]
            at += count

    def _size(self, choice: Tensor, first: int) -> int:
        lengths, groups, chunks, at = (choice + 1).tolist(), list(self.known), [], 0
        for count, frames in zip(self.sizes[first:], self.step_frames[first:]):
            here = lengths[at : at + count]
            ids = [known.group.ids[:k] for known, k in zip(groups[at : at + count], here)]
            chunks.append(Chunk(np.concatenate(ids), tuple(here), frames))
            at += count
        return self.purse.size(chunks, frames=self.seen)


def _stack(known: Sequence[Any]) -> tuple[Tensor, Tensor]:
    pairs = [(k.distortion, k.prices) if isinstance(k, _Known) else k for k in known]
    return torch.stack([d for d, _ in pairs]), torch.stack([p for _, p in pairs])
