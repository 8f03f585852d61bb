"""What every reducer works on, and how its choice becomes Tokens: the patches of a batch of clips in one row each.

    Features --Patches.of--> vectors in float32 --a method decides--> source (or a mask) --> Tokens with gradients

A method only decides which token takes which patch, without gradients and in float32 whatever autocast says; the
embeddings are then weighted means of the patches themselves, so that gradients reach the projector before.

Letters: B clips, T frames, N patches of a frame, h, w its grid, n = T * N patches of a clip, D width, K tokens of the
clip that gets most, P parts that share a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.types import Budget, Features, Tokens

BLOCK = 1 << 25  # numbers of a similarity matrix held at once (128 MiB in float32)


@contextmanager
def deciding(features: Features) -> Iterator[None]:
    """No gradients, no autocast: similarities in bfloat16 would tie and flip."""
    with torch.no_grad(), torch.autocast(features.patches.device.type, enabled=False):
        yield


@dataclass(frozen=True)
class Patches:
    """The patches of a batch of clips, flattened in time order.

    vectors: [B, n, D] float32 without gradient, zeros where `valid` [B, n] is False. keep: [B] tokens asked.
    frames: [B] real frames. frame, row, column: [n], where each patch is.
    """

    features: Features
    vectors: Tensor
    valid: Tensor
    keep: Tensor
    frames: Tensor

    @classmethod
    def of(cls, features: Features, budget: Budget) -> Patches:
        """Raises: ValueError where a clip has fewer patches than the budget asks of it, or the budget is below 1."""
        batch, steps, size, _ = features.patches.shape
        frames = features.count().to(features.patches.device)
        valid = (torch.arange(steps, device=frames.device) < frames[:, None]).repeat_interleave(size, 1)
        vectors = features.patches.detach().flatten(1, 2).float().masked_fill(~valid[..., None], 0.0)
        return cls(features, vectors, valid, _totals(budget, frames * size), frames)

    @property
    def grid(self) -> tuple[int, int]:
        return self.features.grid

    @property
    def steps(self) -> int:
        return self.features.patches.shape[1]

    @property
    def size(self) -> int:
        """N, patches of a frame."""
        return self.features.patches.shape[2]

    @property
    def most(self) -> int:
        """K, tokens of the clip that gets most."""
        return int(self.keep.max())

    @property
    def index(self) -> Tensor:
        return torch.arange(self.valid.shape[1], device=self.valid.device)

    @property
    def frame(self) -> Tensor:
        return self.index // self.size

    @property
    def row(self) -> Tensor:
        return self.index % self.size // self.grid[1]

    @property
    def column(self) -> Tensor:
        return self.index % self.grid[1]

    def by_frame(self, values: Tensor) -> Tensor:
        """[B, n, ...] as [B, T, N, ...]."""
        return values.unflatten(1, (self.steps, self.size))

    def picks(self, chosen: Tensor) -> Tensor:
        """[B, k] int64: the patches where `chosen` [B, n] is True, in order, then others; k is the largest count."""
        return torch.argsort(chosen.logical_not().to(torch.int8), dim=1, stable=True)[:, : int(chosen.sum(1).max())]

    def selected(self, chosen: Tensor, score: Tensor) -> Tokens:
        """Tokens of the patches where `chosen` [B, n] is True (`keep` of each clip), unchanged; the rest is dropped.

        score: [B, n], the importance that ranks the tokens of a group, highest first.
        """
        place = torch.where(chosen, chosen.cumsum(1) - 1, -1)
        order = self.picks(chosen)
        patches = self.features.patches.flatten(1, 2)
        embeddings = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1]))
        return self._tokens(embeddings, place, score.gather(1, order))

    def merged(
        self, source: Tensor, *, weight: Tensor | None = None, extra: Tensor | None = None, score: Tensor | None = None
    ) -> Tokens:
        """Tokens that are weighted means of their patches.

        Args:
            source: [B, n] in [-1, K), the token that takes each patch; every token of a clip takes one at least.
            weight: [B, n], summing to 1 over the patches of a token; None: even.
            extra: [B, n] in [-1, K), a second assignment: the even mean of these patches counts as one more patch of
                the token. Not with `weight`.
            score: [B, K], the importance that ranks the tokens of a group; None: the number of patches.
        """
        patches = self.features.patches.flatten(1, 2)
        with torch.autocast(patches.device.type, enabled=False):
            x, slots = patches.float(), self.most
            if weight is None:
                embeddings, mass = means(x, source, slots)
            else:
                embeddings, mass = sums(x * weight[..., None].to(x.dtype), source, slots), counts(source, slots)
            if extra is not None:
                embeddings = (embeddings * mass[..., None] + means(x, extra, slots)[0]) / (mass[..., None] + 1)
        return self._tokens(embeddings.to(patches.dtype), source, mass.float() if score is None else score)

    def _tokens(self, embeddings: Tensor, source: Tensor, score: Tensor) -> Tokens:
        """Sorted by the mean frame of their patches, then by their first patch; padding is zeros at the end."""
        with torch.no_grad():
            slots, (h, w) = self.most, self.grid
            real = torch.arange(slots, device=source.device) < self.keep[:, None]
            mass = counts(source, slots)
            where = torch.stack([self.frame, self.row, self.column], -1).expand(len(source), -1, -1)
            middle = sums(where, source, slots).double() / mass.clamp(min=1)[..., None]  # sums of integers: exact
            first = torch.full((len(source), slots + 1), self.index.numel(), device=source.device)
            first = first.scatter_reduce(1, _slot(source, slots), self.index.expand_as(source), "amin")[:, :slots]
            order = torch.argsort(first.masked_fill(~real, self.index.numel() + 1), dim=1, stable=True)
            late = middle[..., 0].masked_fill(~real, torch.inf).gather(1, order)
            order = order.gather(1, torch.argsort(late, dim=1, stable=True))
            middle, mass, score = (v.gather(1, _like(order, v)) for v in (middle, mass, score))
            extent = torch.stack([self.frames, torch.full_like(self.frames, h), torch.full_like(self.frames, w)], -1)
            positions = ((middle + 0.5) / extent[:, None]).float().masked_fill(~real[..., None], 0.0)
            frame = middle[..., 0].floor().long()
            new = real & torch.cat([real[:, :1], frame[:, 1:] != frame[:, :-1]], 1)
            group = (new.cumsum(1) - 1).masked_fill(~real, 0)
            back = torch.empty_like(order).scatter_(1, order, torch.arange(slots, device=order.device).expand_as(order))
            source = torch.where(source < 0, -1, back.gather(1, source.clamp(min=0)))
        embeddings = embeddings.gather(1, _like(order, embeddings))
        return Tokens(
            embeddings=embeddings.masked_fill(~real[..., None], 0.0),
            lengths=self.keep,
            positions=positions,
            group=group,
            rank=_rank_in_group(score, group, real),
            mass=mass.float(),
            source=source,
            times=_spans(self.features.times, self.frames, frame, new),
        )


def _totals(budget: Budget, available: Tensor) -> Tensor:
    """[B] tokens of each clip from an int or a [B] or [B, 1] tensor, checked against the patches it has."""
    if isinstance(budget, Tensor):
        if budget.is_floating_point() or budget.numel() != len(available):
            raise ValueError(
                f"budget has shape {list(budget.shape)} ({budget.dtype}): a reducer shares its tokens out over the "
                f"frames itself, give one int for all clips or int64 [{len(available)}, 1], a total for each"
            )
        keep = budget.reshape(-1).to(available.device, torch.int64)
    else:
        keep = torch.full_like(available, budget)
    bad = ((keep < 1) | (keep > available)).nonzero().flatten()
    if len(bad):
        b = int(bad[0])
        raise ValueError(
            f"budget={int(keep[b])} is out of range: clip {b} of the batch has {int(available[b])} patches; ask for 1 "
            f"to {int(available[b])}, or give a tensor [B, 1] with a total for each clip"
        )
    return keep


def _like(index: Tensor, values: Tensor) -> Tensor:
    """An index [B, k] for a gather along dimension 1 of values [B, m, ...]."""
    return index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(*index.shape, *values.shape[2:])


def _rank_in_group(score: Tensor, group: Tensor, real: Tensor) -> Tensor:
    """[B, K] int64: 0 for the highest score of each group, and so on; ties to the earlier token."""
    count = torch.arange(score.shape[1], device=score.device).expand_as(group)
    order = torch.argsort(score.double().masked_fill(~real, -torch.inf), dim=1, descending=True, stable=True)
    key = group.masked_fill(~real, int(group.max()) + 1 if group.numel() else 0).gather(1, order)
    by_group = torch.argsort(key, dim=1, stable=True)
    order, key = order.gather(1, by_group), key.gather(1, by_group)
    starts = torch.cat([torch.ones_like(key[:, :1], dtype=torch.bool), key[:, 1:] != key[:, :-1]], 1)
    begin = torch.where(starts, count, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, count - begin).masked_fill(~real, 0)


def _spans(times: Tensor | None, frames: Tensor, frame: Tensor, new: Tensor) -> Tensor | None:
    """[B, G, 2] seconds: a frame lasts from its time to the next one's; the last is as long as the one before.

    times: [B, T]. frame: [B, K], that of each token; new: [B, K], whether it begins a group.
    """
    if times is None:
        return None
    size, last = times.shape[1], frames[:, None] - 1
    begin = frame.gather(1, torch.argsort(new.logical_not().to(torch.int8), dim=1, stable=True))
    begin = begin[:, : int(new.sum(1).max())].clamp(min=0, max=size - 1)
    start, end = times.gather(1, begin), times.gather(1, torch.minimum(begin + 1, last))
    step = times.gather(1, last) - times.gather(1, (last - 1).clamp(min=0))
    spans = torch.stack([start, torch.where(begin == last, start + step, end)], -1)
    own = torch.arange(begin.shape[1], device=times.device) < new.sum(1)[:, None]
    return spans.masked_fill(~own[..., None], 0.0)


# Sums over the patches of a token.


def _slot(source: Tensor, slots: int) -> Tensor:
    return torch.where(source < 0, slots, source)


def sums(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """[B, slots, D]: sums of x [B, n, D] by `source` [B, n], -1 left out.

    On CUDA the order of the additions varies unless torch.use_deterministic_algorithms is on.
    """
    batch, _, dim = x.shape
    index = _slot(source, slots) + torch.arange(batch, device=x.device)[:, None] * (slots + 1)
    out = x.new_zeros(batch * (slots + 1), dim).index_add(0, index.flatten(), x.flatten(0, 1))
    return out.unflatten(0, (batch, slots + 1))[:, :slots]


def counts(source: Tensor, slots: int) -> Tensor:
    """[B, slots] int64: patches of each token."""
    out = source.new_zeros(len(source), slots + 1)
    return out.scatter_add(1, _slot(source, slots), torch.ones_like(source))[:, :slots]


def means(x: Tensor, source: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Means of x [B, n, D] by `source`, zeros where there is nothing: [B, slots, D], and the counts [B, slots]."""
    mass = counts(source, slots)
    return sums(x, source, slots) / mass.clamp(min=1)[..., None], mass


def best_member(score: Tensor, source: Tensor, slots: int) -> Tensor:
    """[B, slots] int64: the patch of each token with the highest score [B, n], the first of equals; n where none."""
    slot, size = _slot(source, slots), score.shape[1]
    best = score.new_full((len(score), slots + 1), -torch.inf).scatter_reduce(1, slot, score, "amax")
    index = torch.arange(size, device=score.device).expand_as(source)
    hit = torch.where(score == best.gather(1, slot), index, size)
    return torch.full_like(source[:, :1], size).repeat(1, slots + 1).scatter_reduce(1, slot, hit, "amin")[:, :slots]


def compact(labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that are indices of patches [B, n] as 0, 1, ... in the order of those indices; and how many there are.

    Where `valid` is False they become -1.
    """
    used = torch.zeros_like(valid).long().scatter_reduce(1, labels.clamp(min=0), valid.long(), "amax")
    place = used.cumsum(1) - 1
    return torch.where(valid, place.gather(1, labels.clamp(min=0)), -1), used.sum(1)


# Choosing.


def unit(x: Tensor) -> Tensor:
    """x at length 1 over its last dimension; zeros stay zeros."""
    return torch.nn.functional.normalize(x, dim=-1)


def ranks(score: Tensor) -> Tensor:
    """Place of each entry among the last dimension's, 0 = highest; ties to the earlier one."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def top(score: Tensor, count: Tensor) -> Tensor:
    """True on the `count` [...] highest of score [..., m]; ties to the earlier one."""
    return ranks(score) < count[..., None]


def spread(total: Tensor, frames: Tensor, steps: int) -> Tensor:
    """[B, T] int64: `total` [B] shared evenly over the clip's own frames, the larger shares evenly in between."""
    edge = torch.arange(steps + 1, device=total.device).clamp(max=frames[:, None])
    return ((2 * edge * total[:, None] + frames[:, None]) // (2 * frames[:, None])).diff(dim=1)


def allocate(total: Tensor, weight: Tensor, cap: Tensor) -> Tensor:
    """[B, P] int64: `total` [B] shared out in proportion to `weight`, none above `cap`; largest remainders first.

    total may not exceed the caps' sum; parts of weight 0 get something only when all others are full.
    """
    cap = cap.double()
    weight = weight.double().clamp(min=1e-9) * (cap > 0)
    # Parts reach their caps in this order. If the first i are full, a unit of weight of the others gets share_i; every
    # share_i is at most the true one, and one of them is it.
    order = torch.argsort(cap / weight.clamp(min=1e-9), dim=1, stable=True)
    full = torch.nn.functional.pad(cap.gather(1, order).cumsum(1)[:, :-1], (1, 0))
    open_ = weight.gather(1, order).flip(1).cumsum(1).flip(1)
    high = ((total[:, None] - full) / open_).masked_fill(open_ <= 0, 0.0).amax(1)
    ideal = torch.minimum(cap, high[:, None] * weight)
    given = (ideal + 1e-9).floor().minimum(cap)
    rest = (ideal - given).masked_fill(given >= cap, -torch.inf)
    return (given + top(rest, (total - given.sum(1)).long())).long()


def lowest_threshold(count: Callable[[Tensor], Tensor], keep: Tensor, low: float, high: float, *, steps: int) -> Tensor:
    """[B] thresholds, each the lowest found by bisection that leaves `keep` tokens at least.

    count: from thresholds [B] to the tokens they leave [B]; it may have steps, and `high` must leave enough.
    """
    below = torch.full(keep.shape, low, device=keep.device)
    above = torch.where(count(below) >= keep, below, torch.full_like(below, high))
    for _ in range(steps):
        middle = (below + above) / 2
        enough = count(middle) >= keep
        below, above = torch.where(enough, below, middle), torch.where(enough, middle, above)
    return above


def nearest(
    x: Tensor, to: Tensor, bias: Tensor, *, groups: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The largest x . to + bias of each x, and where: [B, m] each. Rows go in blocks, memory stays bounded.

    Args:
        x: [B, m, D]. to: [B, k, D].
        bias: [B, k]: -inf leaves a candidate out; minus half its squared length makes it the nearest in distance.
        groups: of x [B, m] and of `to` [B, k]: only candidates of the same group count.
    """
    block = max(1, BLOCK // max(1, x.shape[0] * to.shape[1]))
    best: list[tuple[Tensor, Tensor]] = []
    for begin in range(0, x.shape[1], block):
        value = torch.baddbmm(bias[:, None], x[:, begin : begin + block], to.transpose(1, 2))
        if groups is not None:
            value = value.masked_fill(groups[0][:, begin : begin + block, None] != groups[1][:, None], -torch.inf)
        value, index = value.max(-1)
        best.append((value, index))
    return torch.cat([b[0] for b in best], 1), torch.cat([b[1] for b in best], 1)


# Reproducible chance.


def _mix(x: Tensor) -> Tensor:
    """Scrambles int64 numbers (the finaliser of SplitMix64); shifts are logical."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms(generator: torch.Generator | None, batch: int, count: int, *, seed: int | Tensor, like: Tensor) -> Tensor:
    """[B, count] float64 in [0, 1), a pure function of each clip's seed and the place: padding moves nothing.

    With a generator each clip draws a seed of its own, one after another: a batch draws what its clips one by one
    would. Without, each has its own of `seed` [B], or all have the one that it is, and so the same numbers.
    """
    if generator is None:
        seeds = seed if isinstance(seed, Tensor) else torch.full((batch,), seed, dtype=torch.int64)
    else:
        seeds = torch.randint(1 << 62, (batch,), generator=generator, device=generator.device)
    place = torch.arange(1, count + 1, device=like.device) * -7046029254386353131  # 2^64 over the golden ratio
    return ((_mix(_mix(seeds.to(like.device))[:, None] + place) >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def everything(features: Features) -> Tokens:
    """All patches as tokens, as every reducer gives them for a budget of all."""
    with deciding(features):
        p = Patches.of(features, features.count() * features.patches.shape[2])
    return p.selected(p.valid, torch.zeros_like(p.index).expand_as(p.valid).float())


# What only some towers give.


def attention_of(features: Features, layer: int | None, method: str, *, which: int = 0) -> Tensor:
    """[B, T, N] float32: attention received per patch; layer None: the one of number `which` among those asked."""
    found = features.attention or {}
    if not found:
        raise ValueError(
            f"reducer {method!r} needs the attention that patches receive, these features have none: ask the tower for "
            f"it (attention=[...]), or take a reducer that needs none"
        )
    if layer is None:
        layer = list(found)[which]
    if layer not in found:
        raise ValueError(
            f"reducer {method!r}: layer={layer}, the features have that of layers {list(found)}, counted from 0"
        )
    return found[layer].detach().float()


def required(value: Any, name: str, method: str, advice: str) -> Tensor:
    """A tensor of the features that a method cannot do without, in float32."""
    if value is None:
        raise ValueError(f"reducer {method!r} needs Features.{name}, these features have none: {advice}")
    return value.detach().float()
