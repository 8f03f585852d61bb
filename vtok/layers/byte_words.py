"""A small text encoder without a vocabulary: a question as one vector a word, from the bytes of its letters.

What it learns, it learns from the questions of the corpus: nothing here has read other text. It is for compressors that
are told what will be asked; an LLM's own word embeddings are another LLM's problem as soon as the LLM changes.

Letters: B texts, L words, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.layers.positions import sincos
from vtok.layers.transformer import MLP, make_norm

WORD_BYTES = 12  # longer words continue as the next word


def split_words(text: str, *, most: int) -> list[bytes]:
    """The first `most` pieces of a text's UTF-8 bytes: words as blanks part them, pieces of WORD_BYTES of longer ones.

    Upper and lower case are one, as questions differ in them without meaning to.
    """
    words = [word.encode() for word in text.lower().split()]
    return [w[i : i + WORD_BYTES] for w in words for i in range(0, len(w), WORD_BYTES)][:most]


class ByteWords(nn.Module):
    """Texts -> ([B, L, width], [B, L] bool of real words); word 0 is one learned vector, so that no text is empty."""

    def __init__(self, width: int, *, most: int):
        super().__init__()
        if most < 1:
            raise ValueError(f"text_words={most} must be at least 1")
        self.most, self.width = most, width
        self.letters = nn.Parameter(torch.randn(WORD_BYTES * 256, width) * (1 / WORD_BYTES**0.5))
        self.begin = nn.Parameter(torch.randn(width))
        self.norm, self.mlp = make_norm("rms", width), MLP(width, ratio=2.0)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        split = [split_words(text, most=self.most) for text in texts]
        device, longest = self.letters.device, max((len(words) for words in split), default=0)
        rows = [
            [[i * 256 + byte for i, byte in enumerate(word)] + [-1] * (WORD_BYTES - len(word)) for word in words]
            + [[-1] * WORD_BYTES] * (longest - len(words))
            for words in split
        ]
        ids = torch.tensor(rows, dtype=torch.int64).reshape(len(texts), longest, WORD_BYTES).to(device)
        there = (ids >= 0).unsqueeze(-1)
        words = (self.letters[ids.clamp_min(0)] * there).sum(2)  # [B, L, width]
        words = torch.cat([self.begin.expand(len(texts), 1, -1), words], 1)
        at = torch.arange(longest + 1, device=device)
        words = words + sincos(at, self.width + self.width % 2)[:, : self.width].to(words)
        words = words + self.mlp(self.norm(words))
        return words, at <= torch.tensor([len(w) for w in split], device=device)[:, None]
