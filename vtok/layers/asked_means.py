"""Means of a clip's patches, weighted by what a question asks for: where queries of whole clips begin.

    question's words --a query of each stretch reads them--> what it looks for --.
    patches, where and when they lie --------------------------> keys ----------+--> weights --> mean of each stretch

A fresh layer weighs all patches of a stretch nearly alike, which is the plain mean.

Letters: B clips, T frames, N patches of a frame, n stretches, L words, D width of patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtok.layers.frames import Frames, centres, place_code, stretches
from vtok.layers.transformer import make_norm


class AskedMeans(nn.Module):
    """Patches [B, T, N, D] and words [B, L, width] -> [B, n, D]: one mean for each stretch of the clip.

    Args:
        dim: D. words: width of the words. width: of queries and keys. count: most stretches.
    """

    def __init__(self, dim: int, *, words: int, width: int, count: int):
        super().__init__()
        self.looks = nn.Parameter(torch.randn(count, width) * 0.5)
        self.word_norm, self.word = make_norm("rms", words), nn.Linear(words, 2 * width)
        self.norm, self.query = make_norm("rms", width), nn.Linear(width, width)
        self.patch_norm, self.key = nn.LayerNorm(dim), nn.Linear(dim, width)
        self.key_norm = make_norm("rms", width)
        for layer in (self.word, self.query, self.key):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, frames: Frames, begin: Tensor, end: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """begin, end: [n] in [0, 1], of stretches as `bin_means` has them. real: [B, L] bool, words that are there."""
        width, count = self.key.out_features, len(begin)
        key_BLW, value_BLW = self.word(self.word_norm(words)).chunk(2, -1)
        heard = torch.einsum("nw,blw->bnl", self.looks[:count], key_BLW) / math.sqrt(width)
        heard = heard.masked_fill(~real[:, None], -torch.inf).softmax(-1) @ value_BLW
        query_BnW = self.query(self.norm(heard + self.looks[:count]))
        patches_BSD = frames.patches.flatten(1, 2)
        key_BSW = self.key_norm(self.key(self.patch_norm(patches_BSD)))
        key_BSW = key_BSW + self.places(frames).to(key_BSW)
        score_BnS = torch.einsum("bnw,bsw->bns", query_BnW, key_BSW) / math.sqrt(width)
        first, last = stretches(frames.lengths, begin, end)
        at = torch.arange(frames.patches.shape[1], device=first.device)
        inside = (at >= first[..., None]) & (at < last[..., None])  # [B, n, T]
        inside = inside.repeat_interleave(frames.patches.shape[2], 2)
        weights = (
            score_BnS.to(torch.promote_types(score_BnS.dtype, torch.float32))
            .masked_fill(~inside, -torch.inf)
            .softmax(-1)
        )
        return weights.to(patches_BSD) @ patches_BSD

    def places(self, frames: Frames) -> Tensor:
        """[B, T * N, width] code of when and where each patch is."""
        inside = centres(frames.grid, frames.time)
        time = frames.time[:, :, None, None].expand(-1, -1, len(inside), 1)
        at = torch.cat([time, inside.expand(*time.shape[:3], 2)], -1)
        return place_code(at, self.key.out_features).flatten(1, 2)
