"""What a prior learns from: the words of a clip's condition, what a corpus is like, and clips as rows of tokens.

    clips --scan()--> Corpus: frequencies, vocabulary, commonest layout
    ids of a clip --row_of()--> digits, and where what is known before each stands --stack()--> TokenRows

Letters: B clips, L tokens, S digits, Q ids a token, G groups.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.coding.entropy import StaticModel, to_symbols
from vtok.data.token_reader import TokenSample
from vtok.layers.token_prior import NULL, START, WORDS, TokenPriorConfig, TokenRows
from vtok.types import Tokens

MAX_VOCABULARY = 4096


@dataclass(frozen=True)
class Corpus:
    """What a pass over the first training clips finds. layout: groups, frames, fps and size of the commonest clip."""

    static: StaticModel
    vocabulary: list[str]
    max_words: int
    layout: dict[str, Any]
    nested: bool


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def condition_of(facts: dict[str, Any], condition: str) -> list[str]:
    """The words that a clip's json gives as its condition; [] where it has none."""
    value = facts.get(condition)
    if condition == "caption":
        return words_of(str(value or ""))
    return [str(value)] if condition == "label" and value not in (None, "") else []


def prefix_of(words: Sequence[str], config: TokenPriorConfig) -> list[int]:
    """Words as numbers, START first; unknown words are left out, and NULL stands where none is left."""
    if config.condition == "none":
        return [START]
    known = {word: WORDS + n for n, word in enumerate(config.vocabulary)}
    found = [known[word] for word in words if word in known][: config.max_words]
    return [START, *(found or [NULL])]


def scan(samples: Iterable[TokenSample], *, index_factors: list[list[int]], ranks: int, condition: str) -> Corpus:
    """Frequencies, vocabulary and layout of some clips. Raises: ValueError where no clip has the condition."""
    words: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    longest, nested, count = 0, True, 0

    def tokens() -> Iterator[Tokens]:
        nonlocal longest, nested, count
        for sample in samples:
            here = condition_of(sample.facts, condition)
            words.update(here)
            longest, count = max(longest, len(here)), count + 1
            nested &= not sample.tokens.grids
            shape = {name: getattr(sample.tokens, name) for name in ("groups", "frames", "fps", "size")}
            layouts[json.dumps(shape)] += 1
            yield tokens_of_ids(sample.ids, sample.tokens.groups, sample.tokens.codebook_sizes)

    static = StaticModel.fit(tokens(), index_factors=index_factors, max_rank=ranks)
    if not count:
        raise ValueError("the training shards hold no clip")
    if condition != "none" and not words:
        raise ValueError(f"--condition {condition}: no clip has a {condition} in its json; use --condition none")
    often = [word for word, n in words.most_common(MAX_VOCABULARY) if n > 1 or condition == "label"]
    return Corpus(static, sorted(often), max(1, min(longest, 32)), json.loads(layouts.most_common(1)[0][0]), nested)


def tokens_of_ids(ids: np.ndarray, groups: Sequence[int], sizes: Sequence[int]) -> Tokens:
    """Ids [K, Q] as `Tokens` of one clip without embeddings: for whoever reads ids, ranks and groups only."""
    counts = np.array(groups, np.int64)
    group = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Tokens(
        embeddings=torch.zeros(1, len(ids), 1),
        lengths=torch.tensor([len(ids)]),
        positions=torch.full((1, len(ids), 3), math.nan),
        group=torch.from_numpy(group)[None],
        rank=torch.from_numpy(rank)[None],
        indices=torch.from_numpy(ids)[None],
        codebook_sizes=tuple(sizes),
    )


def row_of(
    ids: np.ndarray, group: np.ndarray, rank: np.ndarray, factors: Sequence[Sequence[int]], *, start: int, length: int
) -> dict[str, np.ndarray]:
    """Tokens start ... start + length of a clip, with the places of what is known before each. ids [K, Q]."""
    here = slice(start, start + length)
    ids, group, rank = ids[here], group[here], rank[here]
    place = {key: n for n, key in enumerate(zip(group.tolist(), rank.tolist()))}
    above = [place.get((g - 1, r), -1) for g, r in zip(group.tolist(), rank.tolist())]
    return {
        "digits": to_symbols(ids, factors),
        "previous": np.arange(len(ids)) - 1,
        "above": np.array(above, np.int64),
        "group": group,
        "rank": rank,
    }


def stack(rows: Sequence[dict[str, np.ndarray]], prefixes: Sequence[list[int]]) -> TokenRows:
    """Rows of different lengths as one batch; padding has place -1, group and rank 0."""
    longest, widest = max(len(row["rank"]) for row in rows), max(map(len, prefixes))

    def padded(name: str, fill: int = 0) -> Tensor:
        first = rows[0][name]
        out = np.full((len(rows), longest, *first.shape[1:]), fill, np.int64)
        for n, row in enumerate(rows):
            out[n, : len(row[name])] = row[name]
        return torch.from_numpy(out)

    lengths = torch.tensor([len(row["rank"]) for row in rows])
    words = torch.zeros(len(rows), widest, dtype=torch.int64)
    for n, prefix in enumerate(prefixes):
        words[n, : len(prefix)] = torch.tensor(prefix)
    return TokenRows(
        digits=padded("digits"),
        previous=padded("previous", -1),
        above=padded("above", -1),
        group=padded("group"),
        rank=padded("rank"),
        mask=torch.arange(longest) < lengths[:, None],
        words=words,
        words_mask=torch.arange(widest) < torch.tensor([len(p) for p in prefixes])[:, None],
    )
