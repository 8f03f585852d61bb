"""What teaches the scores of segments: questions that say when their answer is on show.

    {"question": ..., "start_s": 12.0, "end_s": 12.5}    segments   .  .  X  .        scores   1.1 0.2 3.0 0.4
                                                          ranking_loss = -log softmax(scores)[X]

Letters: B clips, G segments of a clip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtok.layers.segment_tokens import segment_ends
from vtok.llm.tasks import ask_as, draw, instruction, is_question
from vtok.types import Clip

TOLERANCE = 1e-3  # seconds: times are float32, and those of questions rounded


def answer_span(question: Any) -> tuple[float, float] | None:
    """Seconds from which and to which a question's answer is on show; None where it does not say."""
    span = (question.get("start_s"), question.get("end_s"))
    if not all(type(second) in (int, float) and math.isfinite(second) for second in span):
        return None
    return float(span[0]), float(span[1])


def asked_spans(clip: Clip, templates: list[str]) -> Tensor:
    """[B, 2] seconds of the answer of the question that each clip's prompt asks by one of the templates; NaN where that
    is none of its questions, or one that does not say."""
    out = torch.full((len(clip), 2), torch.nan, dtype=torch.float64)
    for row, prompt in enumerate(clip.prompt or []):
        for question in (clip.qa[row] if clip.qa else None) or []:
            if not is_question(question) or (span := answer_span(question)) is None:
                continue
            if prompt in (instruction(ask_as(template, question)) for template in templates):
                out[row] = torch.tensor(span)
                break
    return out


def known_spans(clip: Clip, templates: list[str], *, step: int, seed: int) -> tuple[list[int], list[str], Tensor]:
    """(rows, prompts, [Q, 2] seconds) of all questions of a batch that say when their answer is on show, each put by a
    template drawn for the step. Where there is none, a question of the first clip that teaches nothing: NaN."""
    rows, prompts, spans = [], [], []
    for row, questions in enumerate(clip.qa or []):
        for number, question in enumerate(questions or []):
            if is_question(question) and (span := answer_span(question)) is not None:
                template = draw(seed, step, f"question {number} of {clip.keys[row]}").choice(templates)
                rows.append(row)
                prompts.append(instruction(ask_as(template, question)))
                spans.append(span)
    if not rows:
        rows, prompts, spans = [0], [""], [(torch.nan, torch.nan)]
    return rows, prompts, torch.tensor(spans, dtype=torch.float64)


def answering(times: Tensor, spans: Tensor, there: Tensor) -> Tensor:
    """[B, G] bool: segments that are on show during the spans [B, 2]; none where these are NaN.

    A segment is on show until `segment_ends`. A span without a length lies in the segment that it begins in.

    Args:
        times: [B, G, 2] seconds, first and last frame of each segment. there: [B, G] bool, segments that exist.
    """
    begin, end = times[..., 0].double(), segment_ends(times, there)
    start, stop = spans.to(begin.device)[:, None].unbind(-1)  # [B, 1]
    inside = (start < end - TOLERANCE) & (stop > begin + TOLERANCE)
    last = torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1).logical_not()
    here = (start >= begin - TOLERANCE) & (start < torch.where(last, end, end - TOLERANCE))
    short = (stop >= start) & (stop <= start + 2 * TOLERANCE)
    return torch.where(short, here, inside) & there


def ranking_loss(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(scalar loss, [B] whether the highest score is right), over the clips that have a right segment.

    The negative log-likelihood that a segment drawn by the softmax of the scores is a right one. 0, with gradients that
    are 0, where no clip has any.

    Args:
        scores: [B, G], -inf where there is no segment. right: [B, G] bool.
    """
    there = scores.isfinite()
    known = (right & there).any(1)
    real = scores.masked_fill(~there, -1e4).float()
    chosen = real.masked_fill(~(right & there), -1e4).logsumexp(1) - real.logsumexp(1)
    loss = -torch.where(known, chosen, real.masked_fill(~there, 0).sum(1) * 0).sum() / known.sum().clamp(min=1)
    hit = right.gather(1, real.argmax(1, keepdim=True))[:, 0]
    return loss, hit[known]


def random_prefixes(
    keys: list[str], segments: Tensor, *, most: int, step: int, seed: int, total: int | None = None
) -> Tensor:
    """[B, G] int64: tokens of each segment, log-uniform in 1 to `most`, by itself; the same for a clip in any batch.

    total: tokens of a clip at most. Where the draws sum to more, segments get theirs in a drawn order while it lasts,
    and one each after that (none where there are more segments than that).
    """
    out = torch.zeros(len(keys), int(segments.max()), dtype=torch.int64)
    for row, (key, count) in enumerate(zip(keys, segments.tolist())):
        rng = draw(seed, step, f"prefixes {key}")
        drawn = [min(int((most + 1) ** rng.random()), most) for _ in range(count)]
        if total is not None and sum(drawn) > total:
            left = total
            for waiting, at in zip(reversed(range(count)), rng.sample(range(count), count)):
                drawn[at] = max(min(drawn[at], left - waiting), min(1, left))
                left -= drawn[at]
        out[row, :count] = torch.tensor(drawn)
    return out
