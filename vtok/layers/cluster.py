"""k-means of many sets of vectors at once, and of a stream.

    x [B, n, D] --seeds--> Lloyd's iterations --> Clusters      kmeans: K the same for all, or one for each set
    memory + the next block --weighted kmeans--> memory         absorb: sums of K clusters, however long the stream

Every set is clustered as if it were alone: what is random is drawn once and read by all, padding has mass 0, and a set
that has converged rests while the others go on. Sums over members are products with one-hot matrices, which add in the
same order each time on a GPU too. float32 whatever autocast says (float64 stays). Nothing here has a gradient but
`pool`, through which what is clustered reaches its clusters.

Letters: B sets, n vectors (padded), D width, K clusters (padded), P width of values pooled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

CELLS = 1 << 22  # similarities of one set held at once
METRICS = ("cosine", "euclidean")
INITS = ("kmeans++", "farthest")


class Clusters(NamedTuple):
    """labels [B, n] int64, -1 on padding. centres [B, K, D], means of the members (of unit vectors for cosine), 0 past
    a set's own. mass [B, K]. lengths [B] int64, clusters of each set, none of them empty. inertia [B], the sum of
    squared distances to the centre, for cosine those of unit vectors, 2 - 2 cos."""

    labels: Tensor
    centres: Tensor
    mass: Tensor
    lengths: Tensor
    inertia: Tensor


def pool(values: Tensor, labels: Tensor, count: int, *, mass: Tensor | None = None) -> Tensor:
    """Sums over the members of each cluster.

    values [B, n, P], labels [B, n] (-1: of none), mass [B, n] weights of the sum (None: 1) -> [B, count, P].
    Differentiable in `values`.
    """
    size, out = max(1, CELLS // max(count, 1)), values.new_zeros(values.shape[0], count, values.shape[2])
    places = torch.arange(count, device=labels.device)
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, values.shape[1], size):
            part = slice(start, start + size)
            member = (labels[:, part, None] == places).to(values.dtype)
            if mass is not None:
                member = member * mass[:, part, None].to(values.dtype)
            out = out + member.transpose(1, 2) @ values[:, part]
    return out


def first_member(labels: Tensor, count: int) -> Tensor:
    """[B, n] labels (-1: of none) -> [B, count] int64, the lowest place of a member of each cluster; n where empty."""
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return _lowest(places, labels, count, labels.shape[1])


def _lowest(places: Tensor, labels: Tensor, count: int, empty: int) -> Tensor:
    out = labels.new_full((labels.shape[0], count + 1), empty)
    return out.scatter_reduce(1, torch.where(labels < 0, count, labels), places, "amin")[:, :count]


def ranked(mass: Tensor, first: Tensor) -> Tensor:
    """[B, K] -> [B, K]: clusters by mass, largest first, of equals the one whose first member comes first.

    An order that does not depend on the clusters' numbers.
    """
    by_first = first.argsort(dim=1, stable=True)
    return by_first.gather(1, (-mass.gather(1, by_first)).argsort(dim=1, stable=True))


@torch.no_grad()
def kmeans(
    x: Tensor,
    count: int | Tensor,
    *,
    mass: Tensor | None = None,
    metric: str = "cosine",
    init: str = "kmeans++",
    centres: Tensor | None = None,
    given: Tensor | None = None,
    generator: Generator | None = None,
    chance: Tensor | None = None,
    trials: int = 4,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Clusters:
    """Lloyd's k-means of each set; with `cosine` spherical k-means (Dhillon and Modha 2001).

    Seeds are those of k-means++ (Arthur and Vassilvitskii 2007), of `trials` candidates each the one that lowers the
    distances most; or `farthest`, the vector farthest from the mean and then each time the one farthest from all seeds,
    which no chance decides. A cluster that loses its members takes the vector farthest from its centre, so K clusters
    are asked and K are given, also where fewer vectors are distinct.

    Args:
        count: clusters, or [B] one number for each set; at most the set's vectors.
        mass: [B, n] weights, or a bool mask; 0 = padding. None: all 1.
        centres: [B, K, D] to begin from instead of seeds; `given` [B] bool: which sets do (None: all).
        generator: on the CPU; None: one seeded with 0. K x trials numbers are drawn, the same for each set.
        chance: [B, K, trials] in [0, 1), numbers of each set's own in their place.
        tolerance: a set has converged when no label changed, or when its centres moved, squared and summed, by less
            than this share of its variance.
    Raises: ValueError for unknown settings and where a set has fewer vectors than clusters are asked of it.
    """
    if metric not in METRICS or init not in INITS:
        raise ValueError(f"metric={metric!r}, init={init!r}: choose one of {METRICS} and one of {INITS}")
    with torch.autocast(x.device.type, enabled=False):
        x, mass, shift = _prepared(x, mass, metric)
        real = mass > 0
        lengths = _counted(count, real)
        most = int(lengths.max())
        valid = torch.arange(most, device=x.device) < lengths[:, None]
        if bool((lengths == real.sum(1)).all()):
            labels = torch.where(real, real.cumsum(1) - 1, -1)
            return _clusters(x, labels, mass, lengths, shift, metric)
        start = None if centres is None else centres.to(x.dtype) - shift
        if start is not None and start.shape != (x.shape[0], most, x.shape[2]):
            raise ValueError(f"centres are {list(start.shape)}, expected {[x.shape[0], most, x.shape[2]]}")
        if start is None or (given is not None and not bool(given.all())):
            if chance is None:
                generator = torch.Generator().manual_seed(0) if generator is None else generator
                chance = torch.rand(most, trials, generator=generator, dtype=torch.float64).expand(len(x), -1, -1)
            seeds = _seeds(x, mass, most, init=init, chance=chance.to(x.device))
            start = seeds if start is None or given is None else torch.where(given[:, None, None], start, seeds)
        labels = _lloyd(x, mass, start, valid, metric=metric, iterations=iterations, tolerance=tolerance)
        return _clusters(x, labels, mass, lengths, shift, metric)


def _prepared(x: Tensor, mass: Tensor | None, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """x as it is compared (unit vectors, or less the set's mean: small numbers cancel less), mass, what was taken off.

    Padding is 0, whatever it was.
    """
    x = x if x.dtype == torch.float64 else x.float()
    mass = x.new_ones(x.shape[:2]) if mass is None else mass.to(x.dtype)
    x = x.masked_fill(mass[..., None] <= 0, 0)
    if metric == "cosine":
        return F.normalize(x, dim=-1), mass, x.new_zeros(x.shape[0], 1, x.shape[2])
    shift = (mass[:, None] @ x) / mass.sum(1).clamp_min(1e-30)[:, None, None]
    return (x - shift).masked_fill(mass[..., None] <= 0, 0), mass, shift


def _counted(count: int | Tensor, real: Tensor) -> Tensor:
    """[B] clusters of each set, checked against its vectors."""
    have = real.sum(1)
    asked = torch.full_like(have, count) if isinstance(count, int) else count.to(have.device, have.dtype)
    if asked.shape != have.shape:
        raise ValueError(f"count is {list(asked.shape)}, expected one number for each of {have.shape[0]} sets")
    if bool(((asked < 1) | (asked > have)).any()):
        raise ValueError(
            f"count={asked.tolist()} clusters are asked of sets with {have.tolist()} vectors: ask for 1 to as many"
        )
    return asked


def _compared(centres: Tensor, metric: str) -> Tensor:
    return F.normalize(centres, dim=-1) if metric == "cosine" else centres


def _seeds(x: Tensor, mass: Tensor, count: int, *, init: str, chance: Tensor) -> Tensor:
    """[B, count, D]: vectors to begin from; chance [B, count, trials]. The first k of more are the k of fewer."""
    square = x.square().sum(-1)  # to the mean, or 1 for unit vectors
    nearest, chosen = torch.full_like(square, math.inf), []
    for place in range(count):
        if init == "farthest":
            far = nearest if place else (x - (mass[:, None] @ x) / mass.sum(1)[:, None, None]).square().sum(-1)
            pick = far.masked_fill(mass <= 0, -1).argmax(1, keepdim=True)
        else:
            weight = mass * nearest if place else mass
            weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, mass)
            pick = _drawn(weight, chance[:, place])
        candidate = x.gather(1, pick[..., None].expand(-1, -1, x.shape[2]))  # [B, trials, D]
        distance = square[..., None] + candidate.square().sum(-1)[:, None] - x @ (2 * candidate).transpose(1, 2)
        distance = torch.minimum(distance.clamp_min(0), nearest[..., None])  # [B, n, trials]
        best = (mass[:, None] @ distance).argmin(2)  # [B, 1]
        nearest = distance.gather(2, best[..., None].expand(-1, x.shape[1], -1))[..., 0]
        chosen.append(candidate.gather(1, best[..., None].expand(-1, -1, x.shape[2])))
    return torch.cat(chosen, 1)


def _drawn(weight: Tensor, chance: Tensor) -> Tensor:
    """[B, n] weights, [B, L] numbers in [0, 1) -> [B, L] places drawn in proportion.

    Summed as whole numbers: exact, so that padding, other sets and the order of a GPU's sums decide nothing.
    """
    share = (weight / weight.amax(1, keepdim=True) * (1 << 30)).long()
    steps = share.cumsum(1)
    return torch.searchsorted(steps, (chance * steps[:, -1:]).long(), right=True)


def _assigned(x: Tensor, square: Tensor, centres: Tensor, valid: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """[B, n] label and squared distance of the nearest centre; ties go to the lowest. square [B, n] is |x|^2."""
    compared = _compared(centres, metric)
    bias = (compared.square().sum(-1) / 2).masked_fill(~valid, math.inf)[:, None]
    size = max(1, CELLS // centres.shape[1])
    best = [(part @ compared.transpose(1, 2) - bias).max(-1) for part in x.split(size, 1)]
    scores, labels = (torch.cat(parts, 1) for parts in zip(*best))
    return labels, (square - 2 * scores).clamp_min(0)


def _revived(labels: Tensor, distance: Tensor, dead: Tensor, real: Tensor) -> Tensor:
    """labels, with each `dead` cluster [B, K] given the vector farthest from its centre that its own can spare."""
    batch, n = labels.shape
    count = dead.shape[1]
    first = first_member(torch.where(real, labels, -1), count)
    kept = torch.zeros(batch, n + 1, dtype=torch.bool, device=labels.device).scatter(1, first, True)[:, :n]
    spare = distance.masked_fill(kept | ~real, -1)
    order = spare.sort(dim=1, descending=True, stable=True)[1][:, :count]
    giver = order.gather(1, (dead.cumsum(1) - 1).clamp_min(0))
    place = torch.where(dead, giver, n)
    out = torch.cat([labels, labels[:, :1]], 1)
    return out.scatter(1, place, torch.arange(count, device=labels.device).expand(batch, -1))[:, :n]


def _lloyd(
    x: Tensor, mass: Tensor, centres: Tensor, valid: Tensor, *, metric: str, iterations: int, tolerance: float
) -> Tensor:
    """[B, n] labels, no valid cluster without a member."""
    real, square = mass > 0, x.square().sum(-1)
    mean = (mass[:, None] @ x) / mass.sum(1)[:, None, None]
    spread = (mass * square).sum(1) / mass.sum(1) - mean.square().sum((1, 2))
    out, rows = torch.full(mass.shape, -1, device=x.device), torch.arange(x.shape[0], device=x.device)
    previous, runs = out, torch.ones_like(rows, dtype=torch.bool)
    for turn in range(iterations):
        labels, distance = _assigned(x, square, centres, valid, metric)
        members = torch.zeros_like(valid, dtype=torch.int64).scatter_add(1, labels, real.long())
        dead = valid & (members == 0)
        if bool(dead.any()):
            labels = _revived(labels, distance, dead, real)
        labels = torch.where(real, labels, -1)
        moved = _means(x, labels, mass, centres.shape[1])
        step, size = (moved - centres).square().sum((1, 2)), moved.square().sum((1, 2))
        # the last: what rounding moves, or sets of equal vectors would never rest
        done = (labels == previous).all(1) | (step <= tolerance * spread) | (step <= 1e-12 * size)
        ends = runs & (done | (turn == iterations - 1))
        out[rows[ends]] = labels[ends]
        centres, previous, runs = moved, labels, runs & ~ends
        left = int(runs.sum())
        if not left:
            break
        if 2 * left <= len(runs):  # sets that have converged are put aside when they are half, as this copies the rest
            x, square, mass, real, centres, valid = (v[runs] for v in (x, square, mass, real, centres, valid))
            rows, previous, spread, runs = rows[runs], previous[runs], spread[runs], runs[runs]
    return out


def _means(x: Tensor, labels: Tensor, mass: Tensor, count: int) -> Tensor:
    total = pool(torch.ones_like(mass)[..., None], labels, count, mass=mass)
    return pool(x, labels, count, mass=mass) / total.clamp_min(1e-30)


def _clusters(x: Tensor, labels: Tensor, mass: Tensor, lengths: Tensor, shift: Tensor, metric: str) -> Clusters:
    """What partitions of prepared vectors are, ids as they stand."""
    count = int(lengths.max())
    total = pool(torch.ones_like(mass)[..., None], labels, count, mass=mass)
    sums = pool(x, labels, count, mass=mass)
    centres = sums / total.clamp_min(1e-30)
    own = _compared(centres, metric)  # sum of m |x - c|^2 without a vector of differences for each x
    inertia = (mass * x.square().sum(-1)).sum(1) + (own * (total * own - 2 * sums)).sum((1, 2))
    return Clusters(labels, torch.where(total > 0, centres + shift, 0), total[..., 0], lengths, inertia.clamp_min(0))


class Memory(NamedTuple):
    """What is kept of a stream: sums over the members of each of K clusters. keys [B, K, D] of what is compared (unit
    vectors for cosine), values [B, K, P], mass [B, K], 0 where there is no cluster yet, first [B, K] int64, the place
    of the first member in the stream, by which clusters stand."""

    keys: Tensor
    values: Tensor
    mass: Tensor
    first: Tensor


def absorb(
    memory: Memory | None,
    keys: Tensor,
    values: Tensor,
    count: int | Tensor,
    *,
    mask: Tensor,
    start: int = 0,
    metric: str = "cosine",
    restart: bool = True,
    **settings: Any,
) -> tuple[Memory, Tensor]:
    """A memory of at most `count` clusters ([B]: so many of each set), with the next block in it: k-means of a stream.

    The clusters so far, weighted by their members, and the new vectors are clustered together. With `restart` from new
    seeds (as divide-and-conquer k-means of a stream, Guha et al. 2003): what comes late finds a cluster. Without, from
    the old centres, once there are `count` (mini-batch k-means, Sculley 2010): clusters keep their identity, and one
    that begins as one thing takes in what lies nearest.

    Args:
        keys: [B, n, D], values: [B, n, P] of the new vectors, `mask` [B, n] where they are real; `start`: place of the
            first of them in the stream. settings: of `kmeans`.
    Returns: the memory (a set without new vectors keeps its own as it was), and [B, K + n] int64: which of its clusters
        each old cluster and each new vector went to, -1 where there was none.
    """
    batch, n = mask.shape
    keys = keys if keys.dtype == torch.float64 else keys.float()
    if metric == "cosine":
        keys = F.normalize(keys, dim=-1)
    places = torch.arange(start, start + n, device=mask.device).expand(batch, -1)
    new = Memory(keys.masked_fill(~mask[..., None], 0), values, mask.to(keys.dtype), places)
    if memory is None:
        memory = Memory(new.keys[:, :0], new.values[:, :0], new.mass[:, :0], new.first[:, :0])
    held = memory.mass.shape[1]
    keys, values, weight, first = (torch.cat([old, now.to(old.dtype)], 1) for old, now in zip(memory, new))
    joined = Memory(keys, values, weight, first)
    vectors = keys.detach()
    if metric == "cosine":  # sums of unit vectors: of the objective they take part in by their length
        weight = torch.where(weight > 0, vectors.norm(dim=-1).clamp_min(1e-6), 0)
    else:
        vectors = vectors / weight.clamp_min(1e-30)[..., None]
    most = torch.as_tensor(count, device=mask.device)
    lengths = torch.minimum((joined.mass > 0).sum(1), most)
    kept = int(lengths.max())
    full = (memory.mass > 0).sum(1) == most
    begin = {} if restart else {"centres": vectors[:, :kept], "given": full}
    labels = kmeans(vectors, lengths, mass=weight, metric=metric, **begin, **settings).labels
    rests = ~mask.any(1, keepdim=True)  # nothing new: as it was, number for number
    own = torch.arange(held + n, device=mask.device)
    labels = torch.where(rests, torch.where(joined.mass > 0, own, -1), labels)
    order = _lowest(joined.first, labels, kept, start + n).argsort(dim=1, stable=True)
    labels = torch.where(labels < 0, -1, order.argsort(dim=1).gather(1, labels.clamp_min(0)))
    keys, values, mass = joined.keys.detach(), joined.values, joined.mass[..., None]
    keys, values, mass = (pool(part, labels, kept) for part in (keys, values, mass))
    return Memory(keys, values, mass[..., 0], _lowest(joined.first, labels, kept, start + n)), labels
