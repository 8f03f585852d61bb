"""A causal transformer over token ids in stream order: what an id is likely to be, given the ids before it.

    previous token ------------+
    same rank, one group ago --+--> x --> blocks, attention over the last groups --> digit heads --> logits of a digit
    rank, block, condition ----+

An id is predicted digit by digit (its mixed-radix factors; FSQ levels): `chain` gives each digit the ones before it,
`parallel` only the hidden state. The logits begin as the log-frequencies of each digit at each rank, so the network
starts as the static model and learns what that leaves over. Nothing in it is an exp, tanh or sin but the softmaxes:
`vtok.layers.exact` runs the same weights in arithmetic that every machine agrees on.

Squared ReLU: So et al. 2021, https://arxiv.org/abs/2109.08668. Classifier-free guidance (the null condition): Ho and
Salimans 2022, https://arxiv.org/abs/2207.12598.

Letters: B rows, P places of the prefix (condition), L tokens, N = P + L, S digits of a token, V values of a digit,
W width, H heads, C groups of context, M width of a digit's head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.transformer import RMSNorm

MAX_RADIX = 4096  # values of a digit; larger factors of an id are split
START, NULL = 0, 1  # words every prefix may hold: where a stream begins, and that nothing is said of it
WORDS = 2  # of the two above; the vocabulary's own follow
DIGITS = ("chain", "parallel")
CONDITIONS = ("none", "label", "caption")


@dataclass
class TokenPriorConfig:
    """What a prior is. index_factors: of each id, least significant first, as coded (`coded_factors`)."""

    codebook_sizes: list[int]
    index_factors: list[list[int]]
    max_rank: int  # ranks with parameters of their own; later ones share the last's
    blocks: int = 1  # groups of one window of the tokenizer
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    head_width: int = 64
    context_groups: int = 4  # groups that attention sees, the token's own included
    digits: str = "chain"
    dropout: float = 0.1
    condition: str = "none"
    vocabulary: list[str] = field(default_factory=list)  # of labels or of caption words
    max_words: int = 1  # of a prefix, after its start

    def __post_init__(self) -> None:
        self._check_types()
        sizes = [math.prod(each) for each in self.index_factors]
        if len(sizes) != len(self.codebook_sizes) or any(a < b for a, b in zip(sizes, self.codebook_sizes)):
            raise ValueError(f"index_factors={self.index_factors} do not hold codebook_sizes={self.codebook_sizes}")
        if not self.radices or min(self.radices) < 1 or max(self.radices) > MAX_RADIX:
            raise ValueError(f"index_factors={self.index_factors} must lie in 1 ... {MAX_RADIX}")
        whole = ("max_rank", "blocks", "width", "depth", "num_heads", "head_width", "context_groups", "max_words")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        for name, choices in (("digits", DIGITS), ("condition", CONDITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if not 0 <= self.dropout < 1 or self.mlp_ratio <= 0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1), mlp_ratio={self.mlp_ratio} above 0")
        if (self.condition == "none") == bool(self.vocabulary):
            raise ValueError(f"condition={self.condition!r} and a vocabulary of {len(self.vocabulary)} do not fit")

    def _check_types(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind = {"int": int, "float": (int, float), "str": str}.get(str(f.type), list)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{f.name}={value!r} is not of type {f.type}")
        whole = [*self.codebook_sizes, *(n for each in self.index_factors for n in each)]
        if not all(type(n) is int for n in whole) or not all(isinstance(word, str) for word in self.vocabulary):
            raise ValueError("codebook_sizes and index_factors hold whole numbers, the vocabulary strings")

    @property
    def radices(self) -> list[int]:
        return [radix for each in self.index_factors for radix in each]

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)


def coded_factors(index_factors: list[list[int]] | tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Index factors with those above 4096 split in two or more of about equal size.

    Their product may then exceed the codebook: an id is d0 + r0 (d1 + ...), and the ids beyond it never come.
    """
    out: list[list[int]] = []
    for factors in index_factors:
        parts: list[int] = []
        for factor in factors:
            count = 1
            while (root := math.ceil(factor ** (1 / count) - 1e-9)) > MAX_RADIX:
                count += 1
            left = factor
            for _ in range(count - 1):
                parts.append(root)
                left = -(-left // root)
            parts.append(left)
        out.append(parts)
    return out


class TokenRows(NamedTuple):
    """Tokens of B streams, and what the prior knows before each.

    digits: [B, L, S] of the tokens themselves. previous, above: [B, L] places in [0, L) of the token before, and of the
    same rank one group ago; -1 where there is none. group, rank: [B, L]. mask: [B, L], False on padding.
    words: [B, P] of the prefix, START first. words_mask: [B, P].
    """

    digits: Tensor
    previous: Tensor
    above: Tensor
    group: Tensor
    rank: Tensor
    mask: Tensor
    words: Tensor
    words_mask: Tensor

    def to(self, device: torch.device | str) -> TokenRows:
        return TokenRows(*(each.to(device) for each in self))


class Block(nn.Module):
    def __init__(self, config: TokenPriorConfig):
        super().__init__()
        c = config
        self.heads, self.dropout = c.num_heads, c.dropout
        self.norm1, self.norm2 = RMSNorm(c.width), RMSNorm(c.width)
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.q_norm, self.k_norm = RMSNorm(c.width // c.num_heads), RMSNorm(c.width // c.num_heads)
        self.distance = nn.Parameter(torch.zeros(c.num_heads, c.context_groups + 1))  # bias; the last: of the prefix
        self.up, self.down = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x: Tensor, apart: Tensor, slot: Tensor, allowed: Tensor) -> Tensor:
        """x [B, N, W]. apart: [B, N, C + 1], which bias a query has for keys of each slot; slot: [B, N, C + 1], that of
        each key, one-hot. allowed: [B, N, N] bool.

        The bias is a product of C + 1 more channels: no tensor [B, H, N, N] of floats, and none to sum gradients over.
        """
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, N, H, W / H] each
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        width, more = q.shape[-1], apart.shape[-1]
        bias = self.distance.t()[apart].permute(0, 3, 1, 2) * width**0.5  # [B, H, N, C + 1]
        q = torch.cat([q, bias.to(q)], -1)
        k = torch.cat([k, slot[:, None].expand(-1, self.heads, -1, -1).to(k)], -1)
        v = F.pad(v, (0, more))  # fused attention wants one width
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=width**-0.5)[..., :width]
        x = x + F.dropout(self.out(seen.transpose(1, 2).flatten(2)), self.dropout, self.training)
        hidden = self.up(self.norm2(x)).relu().square()
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class TokenPrior(nn.Module):
    """The network that is trained; coding and sampling run its weights through `vtok.layers.exact`."""

    offsets: Tensor

    def __init__(self, config: TokenPriorConfig):
        super().__init__()
        c = self.config = config
        total, digits = sum(c.radices), len(c.radices)
        edges = torch.tensor([0, *c.radices]).cumsum(0)
        self.register_buffer("offsets", edges[:-1], persistent=False)
        self.previous = nn.Embedding(total + 1, c.width)  # last row: there is none
        self.above = nn.Embedding(total + 1, c.width)
        self.rank = nn.Embedding(c.max_rank, c.width)
        self.scale = nn.Embedding(c.max_rank, 2 * c.width)  # what the inputs weigh at each rank, less 1
        self.phase = nn.Embedding(c.blocks + 1, c.width)  # the first group of all, then by block
        self.words = nn.Embedding(WORDS + len(c.vocabulary), c.width)
        self.word_place = nn.Embedding(c.max_words + 1, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = RMSNorm(c.width)
        self.head_in = nn.Linear(c.width, digits * c.head_width)
        self.chain = nn.Embedding(total, c.head_width) if c.digits == "chain" else None
        self.head_out = nn.ParameterList(torch.zeros(c.head_width, radix) for radix in c.radices)
        self.base = nn.Parameter(torch.zeros(c.max_rank, total))  # log-frequencies to begin with
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.startswith(("base", "head_out", "scale", "blocks.")):
                nn.init.normal_(parameter, std=0.5 / math.sqrt(digits) if "above" in name or "prev" in name else 0.3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.scale.weight)
        if self.chain is not None:  # begins as `parallel`: 0.3 of noise there cost 0.07 bits a token after 120 steps
            nn.init.zeros_(self.chain.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.out, block.down):
                last.weight.data.div_(math.sqrt(2 * c.depth))

    @torch.no_grad()
    def begin(self, frequencies: Tensor) -> None:
        """Start as the static model of these frequencies, [max_rank, sum of radices], positive."""
        self.base.copy_(frequencies.double().log().float())
        for first, radix in zip(self._offsets, self.config.radices):
            part = self.base[:, first : first + radix]
            part.sub_(part.amax(1, keepdim=True))

    @property
    def _offsets(self) -> list[int]:
        return [int(sum(self.config.radices[:s])) for s in range(len(self.config.radices))]

    def hidden(self, s: TokenRows) -> Tensor:
        """[B, L, W]: what is known before each token."""
        c = self.config
        none = self.previous.num_embeddings - 1
        values = s.digits + self.offsets  # [B, L, S]
        rank = s.rank.clamp(0, c.max_rank - 1)
        scale = 1 + self.scale(rank)
        x = self.rank(rank) + self.phase(torch.where(s.group == 0, 0, 1 + s.group % c.blocks))
        for table, where, weight in (
            (self.previous, s.previous, scale[..., : c.width]),
            (self.above, s.above, scale[..., c.width :]),
        ):
            taken = values.gather(1, where.clamp(min=0)[..., None].expand_as(values))
            vector = torch.where((where >= 0)[..., None], table(taken).sum(2), table.weight[none])
            x = x + vector * weight
        places = torch.arange(s.words.shape[1], device=x.device)
        x = torch.cat([self.words(s.words) + self.word_place(places), x], 1)  # [B, P + L, W]
        visible = self._visible(s)
        for block in self.blocks:
            x = block(x, *visible)
        return self.norm(x[:, s.words.shape[1] :])

    def _visible(self, s: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
        """`Block`'s apart, slot and allowed. Keys of a group lie in slot group mod C, those of the prefix in slot C."""
        c, prefix = self.config, s.words.shape[1]
        group = torch.cat([s.words.new_full(s.words.shape, -1), s.group], 1)  # [B, N]
        real = torch.cat([s.words_mask, s.mask], 1)
        order = torch.arange(group.shape[1], device=group.device)
        is_word = order < prefix
        slots = torch.arange(c.context_groups + 1, device=group.device)
        slot = torch.where(is_word, c.context_groups, group % c.context_groups)
        apart = (group[..., None] - slots) % c.context_groups
        apart = torch.where(slots == c.context_groups, c.context_groups, apart)
        near = is_word | (group[:, :, None] - group[:, None, :] < c.context_groups)
        itself = order[:, None] == order  # padding looks at itself, or its softmax would be 0 / 0
        allowed = near & (order[:, None] >= order) & real[:, None, :] | itself
        return apart, slot[..., None] == slots, allowed

    def logits(self, s: TokenRows) -> list[Tensor]:
        """By digit, [B, L, V]."""
        c = self.config
        inner = self.head_in(self.hidden(s)).unflatten(-1, (len(c.radices), c.head_width))  # [B, L, S, M]
        if self.chain is not None:
            told = self.chain(s.digits + self.offsets)
            inner = inner + told.cumsum(2) - told
        inner = inner.relu().square()
        base = self.base[s.rank.clamp(0, c.max_rank - 1)]
        parts = base.split(c.radices, -1)
        return [inner[:, :, at] @ weight + part for at, (weight, part) in enumerate(zip(self.head_out, parts))]

    def bits(self, s: TokenRows) -> Tensor:
        """[B, L]: -log2 p of every token; 0 on padding."""
        total = torch.zeros(s.mask.shape, device=s.digits.device)
        for at, logits in enumerate(self.logits(s)):
            total = total + F.cross_entropy(logits.float().transpose(1, 2), s.digits[..., at], reduction="none")
        return total.masked_fill(~s.mask, 0.0) / math.log(2)
