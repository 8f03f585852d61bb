"""Patches that a learned codebook gave the same id, as clusters.

Letters: S sets, n patches (padded), K clusters (padded), L width of a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtok.layers.cluster import first_member, ranked


@torch.no_grad()
def code_clusters(
    ids: Tensor, most: Tensor, *, mask: Tensor, lookup: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """One cluster for each id that a set uses; of more than `most` those with the most patches, which take in the
    others' patches, each code's going to the kept code nearest to it.

    Args: ids [S, n] int64; most [S], 1 or more; mask [S, n], True on real patches; lookup: [..., 1] -> [..., L].
    Returns: labels [S, n] int64, -1 on padding, clusters by number of patches; their ids [S, K], 0 past a set's own.
    """
    sets, n = ids.shape
    ids_first = torch.where(mask, ids, torch.iinfo(torch.int64).max).sort(dim=1, stable=True)
    steps = torch.ones_like(mask, dtype=torch.int64)
    steps[:, 1:] = ids_first[0][:, 1:] != ids_first[0][:, :-1]
    labels = torch.empty_like(ids).scatter(1, ids_first[1], steps.cumsum(1) - 1)
    labels = torch.where(mask, labels, -1)
    used = labels.amax(1) + 1
    count = int(used.max())
    slots = torch.where(mask, labels, count)
    mass = torch.zeros_like(ids[:, :1]).expand(-1, count + 1).scatter_add(1, slots, mask.long())[:, :count]
    codes = torch.zeros_like(mass[:, :1]).expand(-1, count + 1).scatter(1, slots, ids)[:, :count]
    order = ranked(mass, first_member(labels, count))
    codes, goes = codes.gather(1, order), torch.arange(count, device=ids.device).expand(sets, -1)
    kept = torch.minimum(most, used)
    most_kept = int(kept.max())
    if bool((used > kept).any()):
        vectors = lookup(codes[..., None]).float()
        gap = torch.cdist(vectors, vectors[:, :most_kept], compute_mode="donot_use_mm_for_euclid_dist")
        gap = gap.masked_fill((goes[:, :most_kept] >= kept[:, None])[:, None], math.inf)
        goes = torch.where(goes < kept[:, None], goes, gap.argmin(2))
    labels = goes.gather(1, order.argsort(1).gather(1, labels.clamp_min(0))).masked_fill(~mask, -1)
    indices = codes[:, :most_kept]
    return labels, indices.masked_fill(torch.arange(most_kept, device=ids.device) >= kept[:, None], 0)
