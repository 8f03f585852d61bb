"""Query-formers: a few queries read many features, packed, all rows in one call.

    queries [M, n, D] --+                        +--> blocks: self-attention over [queries | text],
    text [M, L, width] -+-- width of the blocks -+            cross-attention into the row's context every few blocks
    context [M, S, D] ---------------------------+--> [M, n, D]

BLIP-2's query-former (Li et al. 2023, https://arxiv.org/abs/2301.12597), with norms before the sub-layers and queries
and text sharing their feed-forward layers.

Letters: M packed rows, n queries, L text tokens, S context tokens, D width of queries and context, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.masks import with_valid_keys
from vtok.layers.transformer import MLP, Attention, make_norm


class CrossAttention(nn.Module):
    """Queries [M, n, width] read a context [M, S, dim]: [M, n, width]. Queries and keys are RMS-normalised per head."""

    def __init__(self, width: int, dim: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(dim, 2 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (make_norm("rms", width // num_heads) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """mask: [M, S] bool, True on context that is there, one at least in each row; None: all."""
        q_MHnD = rearrange(self.q(x), "M n (H D) -> M H n D", H=self.num_heads)
        k_MHSD, v_MHSD = rearrange(self.kv(context), "M S (two H D) -> two M H S D", two=2, H=self.num_heads)
        q_MHnD, k_MHSD = self.q_norm(q_MHnD).to(v_MHSD.dtype), self.k_norm(k_MHSD).to(v_MHSD.dtype)
        seen = None if mask is None else mask[:, None, None].expand(-1, -1, x.shape[1], -1)
        out_MHnD = F.scaled_dot_product_attention(q_MHnD, k_MHSD, v_MHSD, attn_mask=seen)
        return self.out(rearrange(out_MHnD, "M H n D -> M n (H D)"))


class QueryBlock(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries (where `cross`), feed-forward of both."""

    def __init__(self, width: int, dim: int, num_heads: int, *, cross: bool):
        super().__init__()
        self.norm1, self.attention = make_norm("rms", width), Attention(width, num_heads)
        self.cross_norm = make_norm("rms", width) if cross else None
        self.cross = CrossAttention(width, dim, num_heads) if cross else None
        self.norm2, self.mlp = make_norm("rms", width), MLP(width)

    def forward(self, x: Tensor, queries: int, mask: Tensor | None, context: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        if self.cross is not None and self.cross_norm is not None:
            read = self.cross(self.cross_norm(x[:, :queries]), context, valid)
            x = torch.cat([x[:, :queries] + read, x[:, queries:]], 1)
        return x + self.mlp(self.norm2(x))


class Resampler(nn.Module):
    """Queries [M, n, D] and context [M, S, D] -> [M, n, D].

    Args:
        dim: D. width, depth, num_heads: of the blocks. cross_every: blocks 0, cross_every, ... read the context.
        num_queries: most queries of a row; query i carries a learned vector of its own beside its content.
    The last layer begins small, so that what is added to its output (a pooled frame, say) is what a fresh model gives.
    """

    def __init__(self, dim: int, *, num_queries: int, width: int, depth: int, num_heads: int, cross_every: int = 1):
        super().__init__()
        if depth < 1 or cross_every < 1:
            raise ValueError(f"depth={depth} and cross_every={cross_every} must be at least 1")
        self.into = nn.Linear(dim, width)
        self.ranks = nn.Parameter(torch.randn(num_queries, width) * 0.5)
        self.context_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(QueryBlock(width, dim, num_heads, cross=i % cross_every == 0) for i in range(depth))
        self.norm, self.out = make_norm("rms", width), nn.Linear(width, dim)
        begin_small(self, depth)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        *,
        valid: Tensor | None = None,
        text: Tensor | None = None,
        text_valid: Tensor | None = None,
    ) -> Tensor:
        """valid: [M, S] bool, context that is there; text: [M, L, width] with text_valid [M, L] bool."""
        count = queries.shape[1]
        x, mask = self.into(queries) + self.ranks[:count], None
        if text is not None:
            x = torch.cat([x, text.to(x.dtype)], 1)
            if text_valid is not None:
                mask = with_valid_keys(None, F.pad(text_valid, (count, 0), value=True))
        context = self.context_norm(context)
        for block in self.blocks:
            x = block(x, count, mask, context, valid)
        return self.out(self.norm(x[:, :count]))


def begin_small(module: nn.Module, depth: int) -> None:
    """Initial values as `Transformer`'s, of a module with `blocks`; its `out` a tenth as large as what enters it."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        if isinstance(part, (Attention, CrossAttention)):
            part.out.weight.data.div_((2 * depth) ** 0.5)
        if isinstance(part, MLP):
            part.down.weight.data.div_((2 * depth) ** 0.5)
    out = module.out
    assert isinstance(out, nn.Linear)
    nn.init.normal_(out.weight, std=0.1 / out.in_features**0.5)
