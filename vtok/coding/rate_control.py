"""How many tokens each time block of a video keeps: every way to ask for it, behind one interface.

    steps of a stream (all tokens, their frames) -> LengthPolicy.lengths -> tokens of every block

| asked                   | policy      | what it does                                                               |
|-------------------------|-------------|----------------------------------------------------------------------------|
| budget K                | FixedLength | the first K tokens of every block                                          |
| tokens per second       | Rate        | what a clock allows, never more                                            |
| PSNR or LPIPS           | Searched    | the fewest tokens of each block that reach it, by decoding                 |
| tokens or bytes (video) | Allocated   | the distortion of every length measured (or a scorer's), then shared out  |
| predicted PSNR          | Predicted   | a halting head reads the tokens once: nothing is decoded                   |

Blocks are decided in order, each with the blocks before it as they were decided: a later block is measured after what
its decoder will really have seen. Frames are compared as uint8 levels.

Letters: S lengths, C channels, T frames, H height, W width, G groups (time blocks), K tokens of a group, Q ids a token.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vtok.budget import Found, allocate_ahead, allocate_lagrange, interpolate_lengths, search_length, spread_lengths
from vtok.coding.bitstream import Chunk, StaticModel, Writer
from vtok.coding.prior_coding import PriorModel
from vtok.coding.spending import BytePurse, Purse, TokenPurse
from vtok.coding.trial import (
    Distance,
    Group,
    Step,
    Trial,
    drawn_together,
    frames_of_groups,
    groups_of,
    lpips_distance,
    mean_squared_error,
    most_tokens,
    mse_of,
    squared_error,
    stand_alone,
    steps_to_come,
    unlike_steps,
    usual_frames,
)
from vtok.layers.halting import next_level
from vtok.layers.perceptual import LPIPS
from vtok.layers.stream import StreamedTokenizer
from vtok.types import Clip, StreamState, Tokens

log = logging.getLogger(__name__)
Held = TypeVar("Held")
TOLERANCE = 1e-6  # bits, of sums in float64: prices are rounded up by whole bytes
NEAR = 256  # blocks that a decision weighs one by one; of those further off, a sample
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
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
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
        if budget is not None and not 1 <= budget <= model.max_tokens:
            raise ValueError(f"budget={budget} tokens a time block: this model has 1 to {model.max_tokens}")
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


# ---- a wanted quality ------------------------------------------------------------------------------------------------


class Searched:
    """The fewest tokens of each block whose distortion is within the target (`vtok.budget.search_length`).

    A block is tried as if the video ended with it. Where frames of a chunk are drawn together, later blocks of the
    chunk change it: there a whole chunk is decoded again once its lengths are found, and blocks that fall short get
    more tokens until none does, or they have all.
    """

    def __init__(self, model: Any, size: tuple[int, int], *, target: float, distance: Distance) -> None:
        self.model, self.target = model, target
        self.trial = Trial(model, size, distance)
        self.together = drawn_together(model)
        self.blocks = self.missed = self.scanned = self.probes = self.mended = self.fell = 0

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        for chunk in self._chunks(steps):
            start, groups = self.trial.mark(), [group for step in chunk for group in step]
            found = [self._search(group) for group in groups]
            lengths = [each.length for each in found]
            if self.together and len(groups) > 1:
                self._mend(groups, lengths, start, [each.met for each in found])
            for step in chunk:
                yield lengths[: len(step)]
                del lengths[: len(step)]

    def _chunks(self, steps: Iterator[Step]) -> Iterator[list[list[Group]]]:
        """The groups of each step; steps that share a chunk, as a stream's last two can, come together."""
        held: list[list[Group]] = []
        for step in steps:
            held.append(groups_of(self.model, step))
            have = sum(map(len, held))
            if not self.together or have >= self.together + (self.blocks == 0):
                yield held
                held = []
        if held:
            yield held

    def _search(self, group: Group) -> Found:
        found = search_length(
            lambda lengths: self.trial.measure(group, lengths), most=most_tokens(group.tokens), target=self.target
        )
        self.trial.accept(group, found.length)
        self.blocks, self.missed = self.blocks + 1, self.missed + (not found.met)
        self.scanned, self.probes = self.scanned + (not found.monotone), self.probes + found.probes
        return found

    def _mend(self, groups: list[Group], lengths: list[int], start: StreamState, met: list[bool]) -> None:
        """Lengthen, in place, the blocks that miss the target once their chunk is decoded whole after `start`."""
        before = list(lengths)
        while True:
            distortion = self.trial.measure_together(groups, lengths, start)
            self.probes += len(groups)
            short = [g for g, value in enumerate(distortion) if met[g] and value > self.target]
            grown = False
            for g in short:
                longer = [k for k in spread_lengths(most_tokens(groups[g].tokens)) if k > lengths[g]]
                lengths[g], grown = (longer[0], True) if longer else (lengths[g], grown)
            if not grown:
                break
        self.mended, self.fell = self.mended + sum(a != b for a, b in zip(lengths, before)), self.fell + len(short)
        self.trial.state = start
        for group, length in zip(groups, lengths):
            self.trial.accept(group, length)

    def report(self) -> str:
        if not self.blocks:
            return ""
        words = f"{self.probes / self.blocks:.1f} decodes a block"
        words += f"; {self.scanned} of {self.blocks} blocks scanned: more tokens were worse" if self.scanned else ""
        words += f"; {self.mended} got more tokens once their chunk was decoded whole" if self.mended else ""
        words += f"; {self.fell} fall below it for what comes after them in their chunk" if self.fell else ""
        return words + (f"; {self.missed} of {self.blocks} blocks do not reach it at any length" if self.missed else "")


class Predicted:
    """What the model's halting head predicts for a wanted PSNR from the tokens alone: nothing is decoded."""

    def __init__(self, model: Any, *, psnr_db: float) -> None:
        if not hasattr(model, "halting"):
            fix = (
                "set model.halting_depth and train it" if hasattr(model.config, "halting_depth") else "ask for psnr_db"
            )
            raise ValueError(
                f"predicted_psnr_db needs a model with a halting head, which only family flexible can have: {fix} "
                "(configs/flexible/halting.yaml)"
            )
        self.model, self.psnr_db = model, psnr_db

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        for step in steps:
            groups = int(step.tokens.num_groups[0])
            codes = step.tokens.embeddings.unflatten(1, (groups, -1))
            yield self.model.halting.predict(codes[0], self.psnr_db).tolist()

    def report(self) -> str:
        head = self.model.halting
        if not head.calibrated:
            return "the halting head is not calibrated, about half of the blocks miss it: run `vtok calibrate`"
        if math.isinf(head.threshold(next_level(self.psnr_db))):
            return "too few calibration videos reach it: every token is kept"
        return f"{head.coverage:.0%} of the blocks that can are to reach it"


# ---- a budget of the whole video -------------------------------------------------------------------------------------


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
        video = torch.from_numpy(step.frames).permute(3, 0, 1, 2)[None].to(device)
        table = self.model.predict_distortion(Clip(keys=["stream"], video=video))[0].double().cpu()  # [G, S]
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
