"""One total, shared over a video's segments in several ways by the same weights, and what that does to the answers.

    model's own scores | even | novelty | similarity | truth     at every total, each with the fewest a segment is given
        --> rows of the table, tokens that went to what shows the answer, paired margins (vtok.evaluation.answer_rows)

`truth` gives all it can to the segments on show while the answer is, by the questions' `start_s` and `end_s`: no model
may know these; it tells what scores could bring at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtok.budget import allocate_segments
from vtok.evaluation.answer_rows import AnswerRow, paired, points, range_of
from vtok.evaluation.rows import leader
from vtok.llm.relevance import answer_span, answering
from vtok.llm.tasks import is_question
from vtok.types import Clip, Tokens

TRUTH = "truth"
SCORES = {"even": "", "novelty": "novelty", "similarity": "similarity", TRUTH: ""}  # method -> ata.score
READS = ("similarity", TRUTH)


def parse_allocations(text: str) -> dict[int, int]:
    """`128:1,320:4` as {total: fewest tokens of a segment}. Raises: ValueError."""
    out = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        total, _, least = part.partition(":")
        if not (total.isdigit() and least.isdigit() and int(total)):
            raise ValueError(f"--allocations: {part!r} is not TOTAL:MINIMUM, such as 320:4")
        out[int(total)] = int(least)
    return out


def can_allocate(model: Any) -> bool:
    """Whether a model shares its tokens over segments by scores."""
    return bool(getattr(getattr(model.config, "ata", None), "score", ""))


def allocated(model: Any, method: str, *, minimum: int) -> Any:
    """The model with shares by a method; "" = its own scores. Weights are shared."""
    if not method:
        return model.allocating(minimum=minimum)
    other = model.allocating(minimum=minimum, score=SCORES[method])
    other.reads_prompt = other.reads_prompt or method == TRUTH  # its shares are of single questions
    return other


class Noted:
    """A model whose last tokens are kept; asked as the model is."""

    def __init__(self, model: Any):
        self.model, self.tokens = model, None
        self.config, self.reads_prompt = model.config, model.reads_prompt

    def features(self, clip: Clip, **asked: Any) -> Any:
        return self.model.features(clip, **asked)

    def compress(self, features: Any, **asked: Any) -> Tokens:
        self.tokens = self.model.compress(features, **asked)
        return self.tokens

    def encode(self, clip: Clip, **asked: Any) -> Tokens:
        self.tokens = self.model.encode(clip, **asked)
        return self.tokens


def spans_of(clip: Clip) -> tuple[list[int], Tensor]:
    """Of every question of a batch, in the order in which they are asked: its clip, and [Q, 2] when its answer is on
    show, in seconds, NaN where it does not say."""
    asked = [(row, each) for row, of_clip in enumerate(clip.qa or []) for each in of_clip or [] if is_question(each)]
    spans = [answer_span(question) or (torch.nan, torch.nan) for _, question in asked]
    return [row for row, _ in asked], torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)


def true_shares(model: Any, clip: Clip, *, total: int, minimum: int) -> Tensor:
    """[Q, G] int64: tokens of each segment for every question of a batch, most of them where the answer is on show."""
    rows, spans = spans_of(clip)
    if not rows:
        return torch.zeros(0, 1, dtype=torch.int64)
    segments = model.segments(clip).cpu()[rows]
    anything = replace(clip, prompt=[""] * len(clip))  # times are those of the segments, whatever is asked
    times = model.allocating(score="").encode(anything, budget=1).times
    if times is None:
        raise ValueError("shares by truth need the times of frames: the clips bring none")
    times = times.cpu()[rows, : int(segments.max())]  # the longest clip may have no question
    there = torch.arange(times.shape[1]) < segments[:, None]
    right = answering(times, spans, there).double()
    config = replace(model.config.ata, minimum=minimum, weights="minmax", stream=False)
    asked = torch.full((len(rows),), total)
    return allocate_segments(right, total=asked, segments=segments, most=model.config.num_tokens, config=config)


def answer_tokens(clip: Clip, noted: Noted, segments: Tensor) -> list[float]:
    """Tokens of the segments that show the answer, of each question that says when that is.

    Args: noted: asked all of the clip's questions. segments: [B] of each clip.
    """
    tokens, (rows, spans) = noted.tokens, spans_of(clip)
    if tokens is None or tokens.times is None or not rows:
        return []
    own = list(range(len(rows))) if noted.reads_prompt else rows
    times, group, mask = (value.cpu()[own] for value in (tokens.times, tokens.group, tokens.mask))
    there = torch.arange(times.shape[1]) < segments.cpu()[rows][:, None]
    right = answering(times, spans, there)
    spent = (right.gather(1, group.clamp(max=right.shape[1] - 1)) & mask).sum(1)
    return [float(count) for count, known in zip(spent.tolist(), right.any(1).tolist()) if known]


def margins(
    rows: Sequence[AnswerRow], family: str, methods: Sequence[str], minima: Mapping[int, int], *, seed: int
) -> list[dict[str, Any]]:
    """At each total, the model's own shares against each other way: paired, question by question.

    difference: of accuracies, the model's own minus the other's; its 95 % interval is clustered by video.
    """
    found = {(row.method, row.budget): row for row in rows}
    out = []
    for total, least in sorted(minima.items()):
        ours = found.get((family, total))
        for method in methods:
            other = found.get((method, total))
            if ours is None or other is None:
                continue
            gap = paired(ours, other, seed=seed)
            lead = leader(gap["difference_ci"], family, method)
            entry = {"budget": total, "minimum": least, "against": method, "accuracy": ours.accuracy}
            out.append({**entry, "other_accuracy": other.accuracy, **gap, "winner": lead})
    return out


def told(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each margin."""
    out = []
    for each in result.get("allocations") or []:
        gap = f"{points(each['difference'])}{range_of(each['difference_ci'])}"
        out.append(
            f"{each['budget']} tokens, {each['minimum']} a segment at least: {result['family']} against "
            f"{each['against']} {gap}, {each['questions']} questions of {each['videos']} videos."
        )
    return out
