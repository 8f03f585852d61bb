"""Learned queries for a language model, and the way from its states to the words of another.

    input, q_1 ... q_n --causal language model--> states of q_1 ... q_n --WordHead--> vectors as large as words

A query sees the input and the queries before it, never those after: its state is the same however many follow, so the
first k of n queries are what k queries alone would have given. Queries that each begin from a run of the input
(`run_sums`) give this up: which run depends on how many there are.

Letters: M packed rows, S inputs of a row, L positions, n queries, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.projector import MLPProjector

CHUNK = 1 << 14  # words that are squared at once: a large vocabulary in float64 is gigabytes, on every rank


class LatentQueries(nn.Module):
    """n query vectors [n, D]; called with k, it gives the first k."""

    def __init__(self, count: int, width: int, *, rms: float):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(count, width) * rms)

    @torch.no_grad()
    def begin_like(self, words: Tensor) -> None:
        """Drawn with the mean and deviation of each number of the word embeddings [V, D], as Tempo's memory tokens
        (https://arxiv.org/abs/2604.08120): they look like words to a model that was trained on words."""
        words = words.float()
        self.vectors.copy_(words.mean(0) + torch.randn_like(self.vectors) * words.std(0))

    def forward(self, count: int) -> Tensor:
        return self.vectors[:count]


class WordHead(nn.Module):
    """States [..., width] as vectors [..., dim] of the size of a language model's words.

    linear: one layer (as C3, https://arxiv.org/abs/2511.15244), brought to that size by a norm with learned gain and
    shift; mlp: `MLPProjector`, which has the same. The papers' heads keep whatever size comes out.

    skip: what a query began from is added before the norm, by a linear map of its own. Where this begins as the map of
    the small model's words to the large one's (`begin_at_words`), the tokens begin as sums of the large model's words.
    """

    def __init__(self, width: int, dim: int, *, kind: str, rms: float, skip: bool = False):
        super().__init__()
        self.mlp = MLPProjector(width, dim, rms=rms) if kind == "mlp" else None
        self.skip = nn.Linear(width, dim, bias=False) if skip else None
        if self.mlp is None:
            self.out, self.rms = nn.Linear(width, dim), rms
            self.gain, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def begin_at_words(self, small: Tensor, large: Tensor) -> float:
        """Set the skip to the least-squares map of the same words' embeddings, small [V, width] -> large [V, dim], and
        all else to 0. Returns: the share of the large ones' sum of squares that the map explains."""
        assert self.skip is not None
        gram, cross, total = (torch.zeros((), dtype=torch.float64),) * 3
        for some, same in zip(small.split(CHUNK), large.split(CHUNK)):
            x, y = some.double(), same.double()
            gram, cross, total = gram + x.mT @ x, cross + x.mT @ y, total + y.square().sum()
        ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge, cross)
        explained = (weight * (2 * cross - gram @ weight)).sum() / total
        # both come in units of words of size 1: sums of a few words are small, and a norm follows
        self.skip.weight.copy_(weight.mT / (total / large.numel()).sqrt())
        last = self.out if self.mlp is None else self.mlp.out
        for parameter in last.parameters():
            parameter.zero_()
        return float(explained)

    def forward(self, x: Tensor, passed: Tensor | None = None) -> Tensor:
        """passed: [..., width], what goes by the skip."""
        beside = None
        if self.skip is not None and passed is not None:
            beside = self.skip(passed.to(self.skip.weight.dtype))
        if self.mlp is not None:
            return self.mlp(x, beside)
        x = self.out(x.to(self.out.weight.dtype))
        x = x if beside is None else x + beside
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return (x * self.gain + self.shift) * self.rms


def run_sums(x: Tensor, inside: Tensor, counts: Tensor) -> Tensor:
    """Runs of equal length (within one) of each row, in order, each as its sum over the root of its length: a mean of
    vectors that have little in common would be far smaller than one of them.

    Args:
        x: [M, S, D]. inside: [M] int64, of S real. counts: [M] int64, runs of each row.
    Returns: [M, n, D], n the most of `counts` and at least 1; 0 past a row's own, and where a run has nothing in it
        (more runs than inputs).
    """
    most, at = max(int(counts.max()), 1), torch.arange(x.shape[1], device=x.device)
    run = torch.div(at * counts[:, None], inside[:, None].clamp(min=1), rounding_mode="floor")
    run = torch.where((at < inside[:, None]) & (counts > 0)[:, None], run, most)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 counts to 256
    sums = wide.new_zeros(len(x), most + 1, x.shape[2]).scatter_add(1, run[..., None].expand_as(x), wide)
    sizes = wide.new_zeros(len(x), most + 1).scatter_add(1, run, torch.ones_like(run, dtype=wide.dtype))
    return (sums[:, :most] / sizes[:, :most].clamp(min=1).sqrt()[..., None]).to(x.dtype)


def at_the_end(states: Tensor, ends: Tensor, count: int) -> Tensor:
    """The last `count` of each row's own positions: states [M, L, D], ends [M] int64 -> [M, count, D]."""
    at = ends[:, None] - count + torch.arange(count, device=ends.device)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
