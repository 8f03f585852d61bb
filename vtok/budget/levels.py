"""Lengths that are paid by what they gain: the best levels for a total, and the fewest tokens for a quality.

Letters: B batch, G groups (time blocks), S levels (lengths a group may have).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # of sums of rates: the same numbers added in another order


def allocate_levels(distortion: Tensor, valid: Tensor, *, total: int, unit: int) -> Tensor:
    """The best lengths for each clip on its own: minimise the summed distortion, spend at most `total` tokens.

    Exact (dynamic programming over groups and units), for non-convex and non-monotone distortions too. Every real
    group gets one unit at least. AdapTok (Li et al. 2025, https://arxiv.org/abs/2505.17011) solves an integer
    program whose equality constraint spans a batch; here each clip keeps its own budget, so N = 1 adapts as well.

    Args:
        distortion: [B, G, S], of s + 1 units of `unit` tokens for a group.
        valid: [B, G] bool, groups that exist. total: tokens of a clip.
    Returns: [B, G] int64 tokens, 0 for groups that do not exist.
    Raises: ValueError when `total` does not cover one unit for each group.
    """
    batch, groups, levels = distortion.shape
    out = torch.zeros(batch, groups, dtype=torch.int64)
    units = total // unit
    for row in range(batch):
        where = valid[row].nonzero()[:, 0].tolist()
        if units < len(where):
            raise ValueError(
                f"budget of {total} tokens is too small: {len(where)} time blocks take at least {unit} tokens each, "
                f"ask for {len(where) * unit} or more"
            )
        room = min(units, len(where) * levels)
        best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
        best[0] = 0.0
        choices = []
        for group in where:
            cost = distortion[row, group].double().cpu()
            # candidates[s, u]: best of the groups before with u - (s + 1) units, plus this group's cost at s + 1 units
            candidates = torch.full((levels, room + 1), torch.inf, dtype=torch.float64)
            for level in range(min(levels, room)):
                candidates[level, level + 1 :] = best[: room - level] + cost[level]
            best, choice = candidates.min(0)
            choices.append(choice)
        left = int(best.argmin())
        for group, choice in zip(reversed(where), reversed(choices)):
            level = int(choice[left])
            out[row, group] = (level + 1) * unit
            left -= level + 1
    return out.to(distortion.device)


def spread_lengths(most: int, *, per_octave: int = 2) -> list[int]:
    """The lengths at which a curve of distortion is measured: 1, 2, 3, 4, 6, 8, 12, 16 ... and `most` itself."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({k for p in powers for i in range(per_octave) if (k := p + p * i // per_octave) <= most} | {most})


def interpolate_lengths(distortion: Tensor, lengths: list[int], most: int) -> Tensor:
    """Distortion [..., S] measured at `lengths` (ascending) as distortion [..., most] of 1, 2 ... `most` tokens, along
    straight lines of log distortion over log length; flat outside the lengths that were measured."""
    x = torch.tensor(lengths, dtype=torch.float64).log2()
    y = distortion.double().cpu().clamp_min(1e-12).log()
    at = torch.arange(1, most + 1, dtype=torch.float64).log2()
    right = torch.searchsorted(x, at).clamp(0, len(lengths) - 1)
    left = (right - 1).clamp_min(0)
    weight = ((at - x[left]) / (x[right] - x[left]).clamp_min(1e-12)).clamp(0, 1)
    return (y[..., left] + (y[..., right] - y[..., left]) * weight).exp()


def allocate_lagrange(distortion: Tensor, rate: Tensor, *, total: float) -> Tensor:
    """The best level for each group: minimise the summed distortion at a summed rate of at most `total`.

    1. A Lagrange multiplier found by bisection picks levels on each group's lower convex hull (Shoham and Gersho 1988,
       Efficient bit allocation for an arbitrary set of quantizers), and bounds what any choice could reach.
    2. What the hulls leave unspent goes to single moves, best gain per rate first.
    3. Where the bound leaves room for more than 0.1 %, levels and partial choices that the bound does not rule out are
       searched, dominated ones left out; this is where tables that are not convex need it.

    Rates need not be uniform, nor tables convex or monotone. `allocate_levels` is the case of uniform rates.

    Args:
        distortion, rate: [G, S]; a level that a group lacks has a rate of infinity.
    Returns: [G] int64 levels.
    Raises: ValueError when `total` does not cover the cheapest level of every group.
    """
    cost, price = distortion.detach().double().cpu(), rate.detach().double().cpu()
    least = float(price.amin(1).sum())
    if total < least - ROUNDING * abs(least):
        raise ValueError(f"a total of {total:g} is too small: the cheapest levels of all groups take {least:g}")
    cost = torch.where(price.isinf(), torch.inf, cost)
    choice, multiplier = _by_multiplier(cost, price, torch.ones(len(cost), dtype=torch.float64), total)
    choice = _fill(cost, price, choice, total)
    return _search(cost, price, choice, total, multiplier)


def allocate_ahead(
    distortion: Tensor,
    rate: Tensor,
    *,
    past_distortion: Tensor,
    past_rate: Tensor,
    unknown: int,
    total: float,
    reserve: float,
) -> int:
    """The level of the next group of a stream, of which only the next n groups are known.

    Groups not yet known are taken to be like those known and those that came before: one multiplier is found for all
    that is to come, and the next group is cut by it. Without unknown groups this is `allocate_lagrange`.

    Args:
        distortion, rate: [n, S] of the next groups, the one to decide first.
        past_distortion, past_rate: [m, S] of groups already decided, m may be 0.
        unknown: groups that come after these n. total: what may be spent on all groups from here on.
        reserve: what the unknown groups need at least, out of `total`; it is kept whatever they turn out to be.
    Raises: ValueError when `total` does not cover the cheapest levels and the reserve.
    """
    cost, price = distortion.detach().double().cpu(), rate.detach().double().cpu()
    room = total - reserve - float(price[1:].amin(1).sum())
    room += ROUNDING * abs(total)
    if room < float(price[0].min()):
        least = reserve + float(price.amin(1).sum())
        raise ValueError(f"a total of {total:g} is too small: the cheapest levels of all groups take {least:g}")
    if not unknown:
        return int(allocate_lagrange(cost, price, total=total)[0])
    cost = torch.where(price.isinf(), torch.inf, cost)
    like_cost, like_price = torch.cat([cost, past_distortion.double()]), torch.cat([price, past_rate.double()])
    weight = torch.full((len(like_cost),), unknown / len(like_cost), dtype=torch.float64)
    weight[: len(cost)] += 1
    level = int(_by_multiplier(like_cost, like_price, weight, total)[0][0])
    if float(price[0, level]) > room:
        level = int(torch.where(price[0] <= room, cost[0], torch.inf).argmin())
    return level


def _by_multiplier(cost: Tensor, price: Tensor, weight: Tensor, total: float) -> tuple[Tensor, float]:
    """[G] the levels that minimise cost + multiplier x price, and the smallest multiplier that spends at most `total`,
    each group's spending counted `weight` times. Levels of the least price where none does."""

    def spent(choice: Tensor) -> float:
        return float((_at(price, choice) * weight).sum())

    def first(value: Tensor, then: Tensor) -> Tensor:
        return torch.where(value <= value.amin(1, keepdim=True), then, torch.inf).argmin(1)

    free = first(cost, price)
    if spent(free) <= total:
        return free, 0.0
    known = price.masked_fill(price.isinf(), 0)
    steps = price[price.isfinite()].unique().diff()
    swing = float((cost.masked_fill(cost.isinf(), -torch.inf).amax(1) - cost.amin(1)).max())
    # past `high` no drop in cost pays for the smallest rise in price
    high = math.log2(max(swing, 1e-300) / float(steps.min() if len(steps) else 1.0)) + 1
    low, best = high - 100, first(price, cost)
    for _ in range(60):
        middle = (low + high) / 2
        choice = (cost + 2.0**middle * known).argmin(1)
        if spent(choice) <= total:
            best, high = choice, middle
        else:
            low = middle
    return best, 2.0**high


def _at(table: Tensor, choice: Tensor) -> Tensor:
    return table.gather(1, choice[:, None])[:, 0]


def _fill(cost: Tensor, price: Tensor, choice: Tensor, total: float) -> Tensor:
    """Single moves, the best gain per price first, until none lowers the cost within `total`."""
    choice = choice.clone()
    for _ in range(8 * len(cost)):
        slack = total - float(_at(price, choice).sum())
        gain, extra = _at(cost, choice)[:, None] - cost, price - _at(price, choice)[:, None]
        value = torch.where((extra <= slack) & (gain > 0), gain / extra.clamp_min(1e-12), 0.0)
        group, level = divmod(int(value.argmax()), cost.shape[1])
        if not float(value[group, level]) > 0:
            break
        choice[group] = level
    return choice


def _search(
    cost: Tensor,
    price: Tensor,
    choice: Tensor,
    total: float,
    multiplier: float,
    *,
    tolerance: float = 1e-3,
    widest: int = 1 << 14,
) -> Tensor:
    """A choice whose cost is within `tolerance` of the least possible, as long as `widest` partial choices suffice."""
    lagrangian = cost + multiplier * price.masked_fill(price.isinf(), 0)
    excess = lagrangian - lagrangian.amin(1, keepdim=True)  # what taking a level costs above the bound
    now = float(_at(cost, choice).sum())
    gap = now - (float(lagrangian.amin(1).sum()) - multiplier * total) - tolerance * abs(now)
    if gap <= 0:
        return choice
    later = total - price.amin(1).flip(0).cumsum(0).flip(0)[1:]
    limits = torch.cat([later, later.new_tensor([total])])
    spent = lost = torch.zeros(1, dtype=torch.float64)
    cost_so_far, trail = torch.zeros(1, dtype=torch.float64), []
    for group in range(len(cost)):
        levels = (excess[group] < gap).nonzero()[:, 0]
        before = torch.arange(len(spent)).repeat_interleave(len(levels))
        level = levels.repeat(len(spent))
        r, x, d = spent[before] + price[group, level], lost[before] + excess[group, level], cost_so_far[before]
        d = d + cost[group, level]
        kept = ((r <= limits[group]) & (x < gap)).nonzero()[:, 0]
        kept = kept[torch.argsort(d[kept], stable=True)]
        kept = kept[torch.argsort(r[kept], stable=True)]  # by price, equal prices by cost
        best = d[kept].cummin(0)[0]
        kept = kept[torch.cat([best[:1] == best[:1], best[1:] < best[:-1]])]
        if len(kept) > widest:
            kept = kept[x[kept].argsort()[:widest]]
        if not len(kept):
            return choice  # nothing can be better by more than the tolerance
        spent, lost, cost_so_far = r[kept], x[kept], d[kept]
        trail.append((before[kept], level[kept]))
    at = int(cost_so_far.argmin())
    if float(cost_so_far[at]) >= now:
        return choice
    out = torch.zeros_like(choice)
    for group in range(len(cost) - 1, -1, -1):
        before, level = trail[group]
        out[group], at = level[at], int(before[at])
    return out


@dataclass(frozen=True)
class Found:
    """What `search_length` settled on. met: whether `distortion` at `length` tokens is within the target.
    monotone: no probe contradicted that more tokens are better. probes: lengths that were measured."""

    length: int
    distortion: float
    met: bool
    monotone: bool
    probes: int


def search_length(
    measure: Callable[[list[int]], list[float]], *, most: int, target: float, menu: list[int] | None = None
) -> Found:
    """The fewest tokens whose distortion is at most `target`: by bisection, as long as more tokens are better.

    Every probe is compared with those around it. The first that lies outside them ends the bisection, as does a longest
    length that misses the target: distortion is then measured over the whole `menu`, and the fewest tokens that meet
    the target there (or at a probe) are taken. Where nothing meets it, the length of least distortion is.

    Args:
        measure: distortions of lengths in [1, most]. menu: lengths to scan, `spread_lengths(most)` by default.
    """
    known = dict(zip((1, most), measure([1, most]))) if most > 1 else {1: measure([1])[0]}
    low, high = 1, most
    monotone = known[most] <= known[1]
    while monotone and known[1] > target >= known[most] and high - low > 1:
        middle = (low + high) // 2
        known[middle] = measure([middle])[0]
        monotone = known[high] <= known[middle] <= known[low]
        low, high = (low, middle) if known[middle] <= target else (middle, high)
    if known[1] > target and not (monotone and known[most] <= target):
        rest = [k for k in menu or spread_lengths(most) if k not in known]
        known |= dict(zip(rest, measure(rest))) if rest else {}
        curve = [known[k] for k in sorted(known)]
        monotone = monotone and all(more <= fewer for fewer, more in zip(curve, curve[1:]))
    enough = [k for k, value in known.items() if value <= target]
    length = min(enough) if enough else min(known, key=lambda k: (known[k], k))
    return Found(length, known[length], bool(enough), monotone, len(known))
