"""How many clusters a set of vectors has: one k-means, the tree of its clusters, and a criterion read along the tree.

    x --kmeans of `most`--> leaves --Ward's tree--> a partition for every K --criterion--> one of them, polished

Letters: B sets, n vectors (padded), D width, K clusters (padded).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtok.layers.cluster import Clusters, kmeans

CRITERIA = ("variance", "elbow", "silhouette")


class Tree(NamedTuple):
    """Ward's tree over leaves. labels [B, K + 1, K] int64: of leaf l when k clusters are left, named by one of their
    leaves. within [B, K + 1]: sum of squares within k clusters, inf where a set never had so many."""

    labels: Tensor
    within: Tensor


def ward(centres: Tensor, mass: Tensor, lengths: Tensor, within: Tensor) -> Tree:
    """Joins, again and again, the two clusters of each set whose union adds least to the sum of squares (Ward 1963).

    Args: centres [B, K, D] with their mass [B, K], the first `lengths` [B] of each set. within [B]: the sum of squares
        within them. The sums along the tree are exact: a union adds m m' / (m + m') |c - c'|^2.
    """
    batch, count = mass.shape
    each, places = torch.arange(batch, device=mass.device), torch.arange(count, device=mass.device)
    alive = places < lengths[:, None]
    gap = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    cost = gap * (mass[:, :, None] * mass[:, None] / (mass[:, :, None] + mass[:, None]).clamp_min(1e-30))
    apart = alive[:, :, None] & alive[:, None] & (places[:, None] < places)
    cost = cost.masked_fill(~apart, math.inf)
    current, left, total = places.expand(batch, -1).clone(), lengths.clone(), within.clone()
    labels = places.expand(batch, count + 1, -1).clone()
    curve = mass.new_full((batch, count + 1), math.inf)
    centres, mass = centres.clone(), mass.clone()
    labels[each, left], curve[each, left] = current, total
    for _ in range(count - 1):
        least, where = cost.flatten(1).min(1)
        joins = left > 1
        low, high = where // count, where % count
        weight = mass[each, low], mass[each, high]
        merged = (weight[0][:, None] * centres[each, low] + weight[1][:, None] * centres[each, high]) / (
            weight[0] + weight[1]
        ).clamp_min(1e-30)[:, None]
        centres[each, low] = torch.where(joins[:, None], merged, centres[each, low])
        mass[each, low] = torch.where(joins, weight[0] + weight[1], weight[0])
        alive[each, high] &= ~joins
        current = torch.where(joins[:, None] & (current == high[:, None]), low[:, None], current)
        total = torch.where(joins, total + least, total)
        left = torch.where(joins, left - 1, left)
        grown = (centres - centres[each, low][:, None]).square().sum(-1)
        grown = grown * mass * mass[each, low][:, None] / (mass + mass[each, low][:, None]).clamp_min(1e-30)
        grown = grown.masked_fill(~alive | (places == low[:, None]), math.inf)
        cost[each, low] = torch.where(places > low[:, None], grown, math.inf)
        cost[each, :, low] = torch.where(places < low[:, None], grown, math.inf)
        cost = cost.masked_fill(~alive[:, :, None] | ~alive[:, None], math.inf)
        labels[each, left], curve[each, left] = current, total
    return Tree(labels, curve)


@torch.no_grad()
def adaptive_kmeans(
    x: Tensor,
    most: int | Tensor,
    *,
    least: int = 1,
    criterion: str = "variance",
    share: float = 0.9,
    mass: Tensor | None = None,
    metric: str = "cosine",
    **settings: Any,
) -> Clusters:
    """k-means with as many clusters as each set calls for, between `least` and `most`.

    The sets are clustered once, with `most` clusters; Ward's tree over these gives a partition for every smaller K with
    its exact sum of squares (of unit vectors for cosine). Iterations from the chosen one's centres end it.

    criterion:
        variance    the smallest K that leaves at most 1 - share of the sum of squares around the mean
        elbow       the K at which the curve of the sum of squares over 1 ... most lies farthest below its chord, both
                    axes scaled to 1 (Satopaa et al. 2011)
        silhouette  the K of the highest mean silhouette (Rousseeuw 1987), exact for squared distances: a vector's mean
                    squared distance to a cluster's members is that to their mean plus their variance. K = 1 counts as 0
    A set whose vectors are all alike has 1. Ties go to the smaller K; `least` is lowered to a set's `most`.

    Args: most: at most the set's vectors; x, mass (a mask alone), metric, settings: as `kmeans`.
    Raises: ValueError for an unknown criterion, a share outside (0, 1] and a `least` below 1.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
    if not 0 < share <= 1 or least < 1:
        raise ValueError(f"share={share} must lie in (0, 1], least={least} be 1 or more")
    leaves = kmeans(x, most, mass=mass, metric=metric, **settings)
    with torch.autocast(x.device.type, enabled=False):
        real = leaves.labels >= 0
        seen = (x if x.dtype == torch.float64 else x.float()).masked_fill(~real[..., None], 0)
        if metric == "cosine":
            seen = normalize(seen, dim=-1)
        own = leaves.centres.gather(1, leaves.labels.clamp_min(0)[..., None].expand_as(seen))
        spread = (seen - own).square().sum(-1).masked_fill(~real, 0)  # [B, n]
        tree = ward(leaves.centres, leaves.mass, leaves.lengths, spread.sum(1))
        if criterion == "silhouette":
            score = _silhouettes(seen, leaves, spread, tree)
        elif criterion == "variance":
            enough = tree.within <= (1 - share) * tree.within[:, 1:2]
            score = enough.to(seen.dtype)
        else:
            score = _below_chord(tree.within, leaves.lengths)
        counts = torch.arange(score.shape[1], device=x.device)
        inside = (counts >= leaves.lengths[:, None].clamp(max=least)) & (counts <= leaves.lengths[:, None])
        chosen = score.masked_fill(~inside, -math.inf).argmax(1)
        if criterion == "variance":  # where no K is enough, all of them
            chosen = torch.where((enough & inside).any(1), chosen, leaves.lengths)
        size = seen.square().sum((1, 2)).clamp_min(1e-30)
        alike = tree.within[:, 1] <= 1e-10 * size  # float32 leaves as much of vectors that are equal
        chosen = torch.where(alike, leaves.lengths.clamp(max=least), chosen)
        most_chosen = int(chosen.max())
        of_leaf = tree.labels[torch.arange(len(chosen), device=x.device), chosen]  # [B, K], named by a leaf
        named = torch.zeros_like(of_leaf).scatter(1, of_leaf, 1)
        named = named * (torch.arange(named.shape[1], device=x.device) < leaves.lengths[:, None])
        of_leaf = (named.cumsum(1) - 1).gather(1, of_leaf)
        member = (of_leaf[..., None] == torch.arange(most_chosen, device=x.device)) * leaves.mass[..., None]
        total = member.sum(1)[..., None]
        centres = (member.transpose(1, 2) @ leaves.centres) / total.clamp_min(1e-30)
    return kmeans(x, chosen, mass=mass, metric=metric, centres=centres, **settings)


def _below_chord(within: Tensor, lengths: Tensor) -> Tensor:
    """[B, K + 1]: how far each K lies below the line from K = 1 to the last, axes scaled to 1."""
    last = within.gather(1, lengths[:, None])
    counts = torch.arange(within.shape[1], device=within.device)
    along = (counts - 1) / (lengths[:, None] - 1).clamp_min(1)
    fall = (within - last) / (within[:, 1:2] - last).clamp_min(1e-30)
    return torch.nan_to_num(1 - along - fall, nan=-math.inf, neginf=-math.inf)


def _silhouettes(x: Tensor, leaves: Clusters, spread: Tensor, tree: Tree) -> Tensor:
    """[B, K + 1]: mean silhouette of the partition into K, for squared distances; 0 for K = 1, -inf past its leaves."""
    batch, n, _ = x.shape
    count, real = leaves.centres.shape[1], leaves.labels >= 0
    member = (leaves.labels[..., None] == torch.arange(count, device=x.device)).to(x.dtype)
    numbers = member.sum(1)  # [B, K]
    own = (spread[..., None] * member).sum(1)
    gap = x.square().sum(-1, keepdim=True) + leaves.centres.square().sum(-1)[:, None]
    gap = (gap - 2 * x @ leaves.centres.transpose(1, 2)).clamp_min(0)
    sums = gap * numbers[:, None] + own[:, None]  # [B, n, K]: squared distances to all members of a leaf
    out = x.new_full((batch, count + 1), -math.inf)
    out[:, 1] = 0
    places = torch.arange(count, device=x.device)
    for k in range(2, count + 1):
        to = (tree.labels[:, k, :, None] == places) * (places[:, None] < leaves.lengths[:, None, None])  # [B, leaf, K]
        to = to.to(x.dtype)
        total, size = sums @ to, (numbers[:, None] @ to)[:, 0]  # [B, n, K], [B, K]
        label = tree.labels[:, k].gather(1, leaves.labels.clamp_min(0))[..., None]
        alone = size.gather(1, label[..., 0]) <= 1
        inner = total.gather(2, label)[..., 0] / (size.gather(1, label[..., 0]) - 1).clamp_min(1)
        mean = (total / size.clamp_min(1)[:, None]).masked_fill(size[:, None] == 0, math.inf)
        outer = mean.scatter(2, label, math.inf).amin(2)
        value = (outer - inner) / torch.maximum(outer, inner).clamp_min(1e-30)
        value = value.masked_fill(alone | ~real, 0).sum(1) / real.sum(1)
        out[:, k] = torch.where(k <= leaves.lengths, value, -math.inf)
    return out
