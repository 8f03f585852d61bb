"""The words of a text as tokens for the language model they belong to: all of them, the first ones, or sums of runs.

All of them are what a compressor of texts is held against from above, the others from below, at as many tokens as it
makes: truncation keeps the beginning exactly, pooling keeps a little of everything.

Letters: B texts, W words (ids) of a text, k tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtok.layers.latent_queries import run_sums
from vtok.llm.frozen import FrozenLLM
from vtok.types import Clip, Tokens


def count_words(llm: FrozenLLM, texts: Sequence[str]) -> list[int]:
    """Ids of each text in the language model's tokenizer: the positions it would take uncompressed."""
    return [len(row) for row in _ids(llm, texts)]


def words_as_tokens(llm: FrozenLLM, texts: Sequence[str]) -> Tokens:
    """The word embeddings of each text, one group, in order: the language model reads what it would read of its ids."""
    ids = _ids(llm, texts)
    lengths = torch.tensor([len(row) for row in ids], device=llm.device)
    padded = torch.zeros(len(ids), max(int(lengths.max()), 1), dtype=torch.int64, device=llm.device)
    for row, own in enumerate(ids):
        padded[row, : len(own)] = torch.tensor(own, device=llm.device)
    with torch.no_grad():
        return _in_order(llm.embed(padded), lengths)


def first_words(words: Tokens, counts: Tensor) -> Tokens:
    """The first words [B] of each text."""
    return words.truncate(counts[:, None].clamp(max=words.embeddings.shape[1]))


def mean_words(words: Tokens, counts: Tensor) -> Tokens:
    """[B] runs of equal length (within one word) of each text, as `vtok.layers.latent_queries.run_sums`."""
    counts = torch.minimum(counts.to(words.lengths.device), words.lengths)
    return _in_order(run_sums(words.embeddings, words.lengths, counts), counts)


class WordsTeacher:
    """The teacher of a compressor of texts: the language model reads the text itself. encode: all words as tokens."""

    def __init__(self, llm: FrozenLLM):
        self.llm, self.embedding_dim, self.config = llm, llm.embedding_dim, None

    def to(self, device: torch.device | str) -> WordsTeacher:
        self.llm.to(device)
        return self

    def encode(self, clip: Clip) -> Tokens:
        return words_as_tokens(self.llm, clip.text or [""] * len(clip))


def _ids(llm: FrozenLLM, texts: Sequence[str]) -> list[list[int]]:
    return [llm.tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in texts]


def _in_order(embeddings: Tensor, lengths: Tensor) -> Tokens:
    batch, count = embeddings.shape[:2]
    at = torch.arange(count, device=embeddings.device).expand(batch, -1)
    time = (at + 0.5) / lengths[:, None].clamp(min=1)
    nowhere = torch.full_like(time, torch.nan)
    positions = torch.stack([time, nowhere, nowhere], -1).to(embeddings.dtype)
    return Tokens(embeddings, lengths, positions, torch.zeros_like(at), at)
