"""A text beside what was made of it again: in words whatever their order, exactly, from its beginning, and by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def sequence_f1(said: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of the items, counted with their multiplicity, in any order: 1.0 where they
    are the same items, 0.0 where they share none. Of ids this is the token F1 of reconstruction experiments."""
    if not said or not truth:
        return float(len(said) == len(truth))
    common = sum((Counter(said) & Counter(truth)).values())
    return 2 * common / (len(said) + len(truth))


def correct_prefix(said: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Share of the truth that is said before the first error, in [0, 1]; 1.0 for an empty truth."""
    same = next((i for i, (a, b) in enumerate(zip(said, truth)) if a != b), min(len(said), len(truth)))
    return same / len(truth) if truth else 1.0


def by_place(hits: Tensor, rows: Tensor, *, parts: int = 10) -> Tensor:
    """Mean of `hits` in each of `parts` equal stretches of the texts: where in a text it is remembered.

    Args:
        hits: [M] of every position of all texts. rows: [M] int64, the text of each, the positions of a text in order
            and side by side.
    Returns: [2, parts] float64: sums of hits, and counts, to be added over batches and divided.
    """
    texts = int(rows.max()) + 1 if len(rows) else 0
    lengths = torch.bincount(rows, minlength=texts)
    place = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
    part = place * parts // lengths[rows]
    out = torch.zeros(2, parts, dtype=torch.float64, device=rows.device)
    out[0].index_add_(0, part, hits.double())
    out[1].index_add_(0, part, torch.ones_like(hits, dtype=torch.float64))
    return out
