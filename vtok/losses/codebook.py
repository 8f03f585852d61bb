"""What a training step reports of its ids: counts, which add up over steps and ranks.

Letters: Q ids per token, V codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BINS = 1 << 20  # 8 MB of counts; larger codebooks share bins


def bins_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Bins in which the ids of each codebook are counted: one an id while all fit into MOST_BINS, else equal shares.

    With shared bins ids are counted modulo the share: usage and perplexity are then those of the bins. They tell
    collapse as well as the codebook's own would, since a window holds far fewer ids than bins.
    """
    if sum(sizes) <= MOST_BINS:
        return sizes
    share = MOST_BINS // len(sizes)
    return tuple(min(size, share) for size in sizes)


def codebook_report(indices: Tensor | None, sizes: tuple[int, ...], *, mask: Tensor | None = None) -> dict[str, Tensor]:
    """{"codebook_counts": [sum of bins] int64}: how often each id came up, codebook after codebook (`bins_of`).

    A family adds it to its Loss.report; the training loop sums it over the steps of a metrics line and over ranks and
    writes train/codebook_usage and train/codebook_perplexity. It waits for no device.

    Args:
        indices: [..., Q] int64; None (continuous tokens) gives {}. sizes: the Q codebook sizes.
        mask: [...] bool, real tokens; None = all.
    """
    if indices is None or not sizes:
        return {}
    bins = bins_of(sizes)
    counts = torch.zeros(sum(bins), dtype=torch.int64, device=indices.device)
    weight = torch.ones_like(indices[..., 0]) if mask is None else mask.to(torch.int64).expand(indices.shape[:-1])
    start = 0
    for q, count in enumerate(bins):
        ids = indices[..., q].detach()
        ids = (ids if count == sizes[q] else ids % count) + start
        counts.scatter_add_(0, ids.flatten(), weight.flatten())
        start += count
    return {"codebook_counts": counts}
