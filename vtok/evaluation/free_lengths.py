"""Whether a model that chooses how many tokens it makes chooses well: what its lengths follow, and what they are worth.

    lengths of segments --follow--> rank correlation with the complexity of videos, at equal duration too
                        --fixed_lengths, shuffled_lengths--> the same total elsewhere, imposed on the same model

A mean length alone says nothing: lengths that are free have to answer as well as the fixed length of the same mean, and
better than the same lengths given to other videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.data.stems import stem_of, stems
from vtok.types import Budget, Clip, Tokens

FIXED, SHUFFLED = "fixed length of the same mean", "shuffled lengths"
MARGIN = 0.02  # of accuracy: what free lengths may lose against the fixed one and still be called no worse
COUNT = "complexity"  # of a video's facts
TIME = "duration"

Lengths = dict[str, list[int]]  # words of each segment, by clip


class Observed:
    """A model whose captions' lengths are written down, by clip, in `lengths`: words that were handed on where no
    budget was asked. Asked as the model is."""

    def __init__(self, model: Any):
        self.model, self.lengths = model, Lengths()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        tokens = self.model.encode(clip, budget=budget)
        if budget is None:
            self._note(clip, tokens)
        return tokens

    def _note(self, clip: Clip, tokens: Tokens) -> None:
        kept = self.model.captioner.kept.tolist()
        for key, row, groups in zip(clip.keys, kept, tokens.num_groups.tolist()):
            self.lengths[key] = row[:groups]


class Imposed(Observed):
    """A model whose captions have the lengths that are given, past their stop or cut. What the most tokens of a clip
    leave of them is in `lengths`."""

    def __init__(self, model: Any, asked: Mapping[str, Sequence[int]]):
        super().__init__(model)
        self.asked = asked

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        rows = [list(self.asked[key]) for key in clip.keys]
        most = max(len(row) for row in rows)
        exact = torch.tensor([row + [0] * (most - len(row)) for row in rows])
        tokens = self.model.compress(self.model.features(clip), budget=budget, prompt=clip.prompt, exact=exact)
        self._note(clip, tokens)
        return tokens


def fixed_lengths(lengths: Lengths) -> Lengths:
    """The same total, as evenly as whole words allow: every segment of every clip has the mean, rounded up or down."""
    counts = [len(row) for row in lengths.values()]
    total, segments = sum(map(sum, lengths.values())), sum(counts)
    even = [(i + 1) * total // segments - i * total // segments for i in range(segments)]
    return _dealt(lengths, even)


def shuffled_lengths(lengths: Lengths, *, seed: int) -> Lengths:
    """The same lengths, each at a segment drawn at random."""
    every = [count for row in lengths.values() for count in row]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    return _dealt(lengths, [every[i] for i in order])


def _dealt(lengths: Lengths, values: Sequence[int]) -> Lengths:
    out, at = Lengths(), 0
    for key, row in lengths.items():
        out[key] = list(values[at : at + len(row)])
        at += len(row)
    return out


def controlled(lengths: Lengths, *, seed: int) -> dict[str, Lengths]:
    """The lengths that are imposed, by the name of their row."""
    return {FIXED: fixed_lengths(lengths), SHUFFLED: shuffled_lengths(lengths, seed=seed)}


def read_facts(path: str | Path) -> dict[str, dict[str, float]]:
    """{name: {complexity, duration}} of the lines of a manifest (jsonl), as `data/demo_corpus.py` writes it. name: how
    the keys of a file's clips begin (`vtok.data.stems`).

    Raises: ValueError where no line tells a complexity.
    """
    out: dict[str, dict[str, float]] = {}
    keyed: set[str] = set()
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line) if line.strip() else {}
        name = row.get("key") or row.get("file") or row.get("path")
        if name and isinstance(row.get(COUNT), (int, float)):
            told = {key: float(row[key]) for key in (COUNT, TIME) if isinstance(row.get(key), (int, float))}
            out[str(name)], keyed = told, keyed | ({name} if row.get("key") else set())
    stem = stems({name: name for name in out if name not in keyed})
    out = {stem.get(name, name): told for name, told in out.items()}
    if not out:
        raise ValueError(f"{path}: no line has a file and its `{COUNT}`, a number; give a corpus's captions.jsonl")
    return out


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing theirs; NaN where one of them never changes."""
    if len(x) < 2:
        return math.nan
    a, b = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def correlation_interval(x: Sequence[float], y: Sequence[float], *, seed: int, draws: int = 500) -> list[float] | None:
    """95 % percentile interval of `rank_correlation`, videos drawn with replacement; None for fewer than 8."""
    if len(x) < 8:
        return None
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        at = torch.randint(len(x), (len(x),), generator=generator).tolist()
        found.append(rank_correlation([x[i] for i in at], [y[i] for i in at]))
    known = torch.tensor([value for value in found if not math.isnan(value)], dtype=torch.float64)
    return known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if len(known) else None


def follow(lengths: Lengths, facts: Mapping[str, Mapping[str, float]], *, seed: int) -> dict[str, Any]:
    """What lengths follow, over the clips whose facts are known.

    spearman: of the words of a segment, mean of a clip, with its complexity; spearman_clip: of all its words.
    by_duration: the same in stretches of duration. by_level: words of each level of complexity, and `spearman` over the
    clips of that level and of those next to it: whether a level, left out of training perhaps, lies where it should.

    Raises: ValueError where no clip has facts.
    """
    known = [(facts[name], row) for key, row in lengths.items() if (name := _named(key, facts)) is not None]
    if not known:
        raise ValueError(f"--facts: none of the clips {list(lengths)[:3]} is in it, whose names are {list(facts)[:3]}")
    level = [told[COUNT] for told, _ in known]
    words, whole = [sum(row) / len(row) for _, row in known], [float(sum(row)) for _, row in known]
    out: dict[str, Any] = {
        "videos": len(known),
        "spearman": rank_correlation(words, level),
        "spearman_ci": correlation_interval(words, level, seed=seed),
        "spearman_clip": rank_correlation(whole, level),
        "by_duration": [],
        "by_level": [],
    }
    if all(TIME in told for told, _ in known):
        seconds = [told[TIME] for told, _ in known]
        for low, high in _stretches(seconds):
            at = [i for i, value in enumerate(seconds) if low <= value <= high]
            found = rank_correlation([words[i] for i in at], [level[i] for i in at])
            out["by_duration"].append({"from_s": low, "to_s": high, "videos": len(at), "spearman": found})
    every = sorted(set(level))
    for place, value in enumerate(every):
        near = every[max(place - 1, 0) : place + 2]
        at, around = ([i for i, each in enumerate(level) if each in group] for group in ([value], near))
        entry = {"level": value, "videos": len(at), "words_mean": sum(words[i] for i in at) / len(at)}
        entry["spearman"] = rank_correlation([words[i] for i in around], [level[i] for i in around])
        out["by_level"].append(entry)
    return out


def _named(key: str, facts: Mapping[str, Any]) -> str | None:
    """The name under which a clip's video has facts: its key, without what a part of it adds."""
    video = stem_of(key)
    return next((name for name in (key, video) if name in facts), None)


def _stretches(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """(from, to) of up to three stretches with about as many videos each; each value where there are few."""
    every = sorted(seconds)
    if len(set(every)) <= 3:
        return [(value, value) for value in sorted(set(every))]
    cuts = [every[len(every) * k // 3] for k in range(3)]
    ends = [max(value for value in every if value < cut) for cut in cuts[1:] if cut > every[0]]
    return list(zip(dict.fromkeys(cuts), [*dict.fromkeys(ends), every[-1]]))


def judged(
    lengths: Lengths,
    differences: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any] | None,
    *,
    seed: int,
    spent: Mapping[str, Lengths] | None = None,
) -> dict[str, Any]:
    """The `lengths` of eval.json. differences: of accuracies, free minus imposed, by the imposed row's name, as
    `vtok.evaluation.answer_rows.paired` has them. spent: by the same names, lengths as they were handed on
    (`Imposed.lengths`); fewer words than the free ones where clips were cut to `model.max_tokens`."""
    every = [count for row in lengths.values() for count in row]
    out: dict[str, Any] = {
        "words_mean": sum(every) / len(every),
        "words_least": min(every),
        "words_most": max(every),
        "segments_mean": len(every) / len(lengths),
        "margin": MARGIN,
        "fixed": None,
        "shuffled": None,
        "complexity": None if facts is None else follow(lengths, facts, seed=seed),
    }
    for key, name in (("fixed", FIXED), ("shuffled", SHUFFLED)):
        found = differences.get(name)
        if found is not None:
            low = (found["difference_ci"] or [math.nan])[0]
            verdict = {"no_worse": low > -MARGIN} if key == "fixed" else {"loses": low > 0}
            out[key] = {**found, **verdict}
            if spent is not None:
                handed = [count for row in spent[name].values() for count in row]
                out[key] |= {"words_mean": sum(handed) / len(handed), "words_lost": sum(every) - sum(handed)}
    return out


def sentences(found: Mapping[str, Any] | None) -> list[str]:
    """The same in words."""
    if not found:
        return []
    out = [
        f"A caption has {found['words_mean']:.1f} words ({found['words_least']} to {found['words_most']}), a clip "
        f"{found['segments_mean']:.1f} of them."
    ]
    complexity = found["complexity"]
    if complexity is not None and complexity["spearman"] is not None:
        inner = [each["spearman"] for each in complexity["by_duration"] if each["spearman"] is not None]
        text = (
            f"Lengths follow complexity: Spearman {complexity['spearman']:.2f}{_bounds(complexity['spearman_ci'], 1)}"
        )
        text += f" over {complexity['videos']} videos"
        out.append(text + (f", {min(inner):.2f} or more at equal duration." if inner else "."))
    fixed, shuffled = found["fixed"], found["shuffled"]
    if fixed is not None and fixed["difference"] is not None:
        verdict = "no worse than" if fixed["no_worse"] else "not shown to be as good as"
        out.append(
            f"Free lengths are {verdict} the fixed length of the same mean: {100 * fixed['difference']:+.1f} points"
            f"{_bounds(fixed['difference_ci'], 100)}, {100 * found['margin']:.0f} allowed.{_lost(fixed)}"
        )
    if shuffled is not None and shuffled["difference"] is not None:
        verdict = "lose" if shuffled["loses"] else "are not shown to lose"
        out.append(
            f"The same lengths shuffled between videos {verdict}: free ones are {100 * shuffled['difference']:+.1f} "
            f"points{_bounds(shuffled['difference_ci'], 100)} ahead.{_lost(shuffled)}"
        )
    return [text.replace("-", "\N{MINUS SIGN}") if "points" in text else text for text in out]


def _lost(found: Mapping[str, Any]) -> str:
    """That a row had fewer words than the free lengths."""
    if not found.get("words_lost"):
        return ""
    return (
        f" Not of the same total: model.max_tokens cut {found['words_lost']} words of these, to "
        f"{found['words_mean']:.1f} a caption."
    )


def _bounds(bounds: Sequence[float] | None, scale: float) -> str:
    if not bounds:
        return ""
    low, high = (scale * bound for bound in bounds)
    return f" (95 %: {low:.1f} to {high:.1f})" if scale > 1 else f" (95 %: {low:.2f} to {high:.2f})"
