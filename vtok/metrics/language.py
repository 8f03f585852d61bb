"""Answers beside the truth: exact match, token F1, accuracy by kind of question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OTHER = re.compile(r"[^\w\s]|_")


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (as SQuAD's script; Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", _OTHER.sub(" ", text.lower())).split())


def exact_match(answer: str, truth: str) -> float:
    """1.0 where both are the same after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(truth))


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with their multiplicity, after `normalise`."""
    a, b = normalise(answer).split(), normalise(truth).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def by_kind(values: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Mean of `values` for each kind of question, in order of the kinds' names."""
    groups: dict[str, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        groups.setdefault(kind, []).append(value)
    return {kind: sum(found) / len(found) for kind, found in sorted(groups.items())}


def chance(questions: Sequence[Mapping[str, object]]) -> float:
    """Expected accuracy of guessing uniformly among each question's choices; NaN where one has none."""
    shares = []
    for question in questions:
        choices = question.get("choices")
        shares.append(1.0 / len(choices) if isinstance(choices, Sequence) and choices else float("nan"))
    return sum(shares) / len(shares) if shares else float("nan")


def retained(accuracy: float, *, full: float, chance: float) -> float:
    """Share of what the full-token row knows above chance that is kept: (accuracy - chance) / (full - chance).

    NaN where the full row is not above chance: nothing is there to be kept. (Papers divide plain accuracies, which
    calls a model at chance "80 % retained".)
    """
    return (accuracy - chance) / (full - chance) if full > chance else float("nan")
