"""What tokens cost and how well their codebooks are used, over every batch and rank since the last reset.

Letters: B clips, K tokens per clip (padded), Q ids per token, V codebook size. A position is a token's rank inside its
group: position 0 is what the smallest budget keeps.

    nominal bits    sum of log2(codebook size) over a clip's tokens: what a fixed-length packing takes
    usage           share of a codebook's entries seen at least once. It grows with the set: n ids show at most n
                    entries, so it is reported with the number of ids counted and with the share they could have shown
    perplexity      exp of the entropy (nats) of the ids' empirical distribution, from 1 to min(V, n)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vtok.types import Tokens


class NominalBits(Metric):
    """Mean nominal bits and tokens per clip; `bits` is NaN for continuous tokens, which have no rate.

    update(tokens); compute() -> {"bits_mean", "tokens_mean", "clips"} of float64 scalars.
    """

    full_state_update = False
    bits: Tensor
    tokens: Tensor
    clips: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("bits", "tokens", "clips"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tokens) -> None:
        self.bits += tokens.bits.sum()
        self.tokens += tokens.lengths.sum()
        self.clips += len(tokens.lengths)

    def compute(self) -> dict[str, Tensor]:
        some = torch.where(self.clips > 0, self.clips, torch.nan)
        return {"bits_mean": self.bits / some, "tokens_mean": self.tokens / some, "clips": self.clips}


def count_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of an int64 tensor, sorted, and how often each occurs."""
    return torch.unique(ids.reshape(-1), return_counts=True)


def perplexity(counts: Tensor) -> float:
    """exp(entropy in nats) of counts; NaN when nothing was counted."""
    total = float(counts.sum())
    if total == 0:
        return math.nan
    share = counts[counts > 0].double() / total
    return math.exp(float(-(share * share.log()).sum()))


class CodebookUsage(Metric):
    """Usage and perplexity of ids, overall and per position.

    Only the (position, quantizer, id) triples that occurred are stored, so 64000 or 2^18 entries at hundreds of
    positions cost what was seen, not their product.

    Args:
        codebook_sizes: Q sizes, as in `Tokens.codebook_sizes`.

    update(tokens); compute() -> dict of
        usage, usage_possible   share of entries seen (mean over the Q quantizers), and the most that the number of
                                counted ids could have shown
        perplexity              geometric mean over the Q quantizers
        entries_used, entries, ids_counted    summed over the quantizers: the sizes behind the shares
        usage_per_position, perplexity_per_position    lists, one value per rank
    Values are NaN before any id was counted. Raises ValueError for continuous tokens or ids outside their codebook.
    """

    full_state_update = False
    keys: list[Tensor]
    counts: list[Tensor]

    def __init__(self, codebook_sizes: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={codebook_sizes}: usage is defined for discrete tokens only")
        self.sizes = tuple(int(size) for size in codebook_sizes)
        self._span = max(self.sizes)
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, tokens: Tokens) -> None:
        if tokens.indices is None or tokens.codebook_sizes != self.sizes:
            raise ValueError(f"tokens have codebook_sizes={tokens.codebook_sizes}, this metric counts {self.sizes}")
        ids = tokens.indices[tokens.mask]  # [n, Q]
        rank = tokens.rank[tokens.mask]
        limit = torch.tensor(self.sizes, device=ids.device)
        if ids.numel() and (int(ids.min()) < 0 or bool((ids >= limit).any())):
            raise ValueError(f"ids lie in [{int(ids.min())}, {int(ids.max())}], codebook_sizes={self.sizes}")
        quantizer = torch.arange(len(self.sizes), device=ids.device)
        keys, counts = count_ids((rank[:, None] * len(self.sizes) + quantizer) * self._span + ids)
        self.keys.append(keys)
        self.counts.append(counts)
        if len(self.keys) > 16:  # what repeats is folded, so that memory follows what differs
            keys, counts = self._merged()
            self.keys, self.counts = [keys], [counts]

    def _merged(self) -> tuple[Tensor, Tensor]:
        def joined(state: list[Tensor] | Tensor) -> Tensor:
            if isinstance(state, Tensor):  # what torchmetrics leaves after a sync
                return state
            return torch.cat(state) if state else torch.zeros(0, dtype=torch.int64)

        keys, where = torch.unique(joined(self.keys), return_inverse=True)
        counts = joined(self.counts)
        return keys, torch.zeros_like(keys).index_add_(0, where, counts.to(keys.dtype))

    def compute(self) -> dict[str, Any]:
        keys, counts = (value.cpu() for value in self._merged())
        entry, place = keys % self._span, keys // self._span
        rank, quantizer = place // len(self.sizes), place % len(self.sizes)
        overall = self._summary(entry, quantizer, counts)
        ranks = int(rank.max()) + 1 if len(rank) else 0
        each = [self._summary(entry[m], quantizer[m], counts[m]) for m in (rank == r for r in range(ranks))]
        return overall | {
            "usage_per_position": [s["usage"] for s in each],
            "perplexity_per_position": [s["perplexity"] for s in each],
        }

    def _summary(self, entry: Tensor, quantizer: Tensor, counts: Tensor) -> dict[str, Any]:
        used, possible, logs, total = [], [], [], 0
        for q, size in enumerate(self.sizes):
            mine = quantizer == q
            seen, where = torch.unique(entry[mine], return_inverse=True)
            folded = torch.zeros(len(seen), dtype=torch.int64).index_add_(0, where, counts[mine])
            number = int(folded.sum())
            used.append(len(seen))
            possible.append(min(1.0, number / size))
            logs.append(math.log(perplexity(folded)) if number else math.nan)
            total += number
        shares = [n / size if total else math.nan for n, size in zip(used, self.sizes)]
        return {
            "usage": sum(shares) / len(shares),
            "usage_possible": sum(possible) / len(possible) if total else math.nan,
            "perplexity": math.exp(sum(logs) / len(logs)),
            "entries_used": sum(used),
            "entries": sum(self.sizes),
            "ids_counted": total,
        }
