"""Answers to questions become rows of eval.json: accuracy with its interval, what tokens cost, and who wins.

    answers of every (method, budget) --rows--> one row each
                                      --versus--> the model against the best training-free reducer at each budget
                                      --benchmark--> whether these questions can tell compressors apart at all

Intervals are 95 % percentile intervals of a bootstrap over videos, each with all its questions; differences are paired,
question by question. What is undefined is NaN here and null in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vtok.data.stems import stem_of
from vtok.evaluation import free_lengths
from vtok.evaluation.rows import bootstrap, leader
from vtok.llm import Answered
from vtok.metrics.cost import LMShape
from vtok.metrics.language import by_kind, chance, exact_match, retained, token_f1

# accuracy of all tokens above blind that a benchmark needs: below it what compressors lose is lost in the noise
NEEDED = 0.3
ENDS = ("blind", "full")

Question = tuple[str, str, str]  # clip, id, text


@dataclass
class AnswerRow:
    """Every answer of one (method, budget); seconds and operations of making its tokens, per clip."""

    method: str
    budget: int | None
    answers: list[Answered] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    compress_flops: float = math.nan
    notes: list[str] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)  # tokens of the segments that show the answer, of each question

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def accuracy(self) -> float:
        """Share of the questions with choices whose likeliest choice is the answer."""
        return mean([float(each.right) for each in self.answers if each.right is not None])

    @property
    def positions(self) -> float:
        """Mean positions of a whole prompt, tokens and separators included."""
        return mean([float(each.positions) for each in self.answers])

    def videos(self) -> dict[str, str]:
        """The video of each clip, by the clip's key."""
        return {each.key: video_of(each) for each in self.answers}

    def right(self) -> dict[Question, float]:
        """Of each question with choices: 1 right, 0 wrong; a share where several seeds answered it."""
        found: dict[Question, list[float]] = {}
        for each in self.answers:
            if each.right is not None:
                found.setdefault((each.key, each.id, each.question), []).append(float(each.right))
        return {question: mean(values) for question, values in found.items()}


@dataclass(frozen=True)
class Costs:
    """What a prompt costs the language model. shape: None where it is not known, for the reason in `note`.
    first_token_s: measured, by the positions of the prompt."""

    shape: LMShape | None
    note: str
    first_token_s: Mapping[int, float]


def video_of(each: Answered) -> str:
    """The video that an answer is about: the clip's `source`; where clips say none, by their key."""
    return each.source or stem_of(each.key)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def interval(values: Sequence[float], videos: Sequence[str], *, seed: int) -> list[float] | None:
    """95 % interval of the mean of values, which are clustered by their videos."""
    names = {name: at for at, name in enumerate(sorted(set(videos)))}
    clusters = torch.tensor([names[video] for video in videos], dtype=torch.int64)
    return bootstrap(torch.tensor(values, dtype=torch.float64), seed=seed, clusters=clusters) if values else None


def finish(row: AnswerRow, *, full: float, costs: Costs, seed: int, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The row of eval.json. full: accuracy of all tokens; NaN where that was not measured."""
    chosen = [each for each in row.answers if each.right is not None]
    right, videos = [float(bool(each.right)) for each in chosen], [video_of(each) for each in chosen]
    kinds = [each.type or "other" for each in chosen]
    guesses = [1.0 / len(each.choices) for each in chosen]
    guess = chance([{"choices": each.choices} for each in chosen])
    texts = [(each.text, each.answer) for each in row.answers if each.text is not None]
    lost = sum(each.loss is None for each in chosen)
    of_kind = {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds))}
    positions, parts = row.positions, [each for each in row.answers if each.part_positions]
    out = {
        "method": row.method,
        "budget": row.budget,
        "questions": len(row.answers),
        "without_right_choice": lost,
        "tokens_mean": mean([float(each.tokens) for each in row.answers]),
        "positions_mean": positions,
        "accuracy": row.accuracy,
        "accuracy_ci": interval(right, videos, seed=seed),
        "chance": guess,
        "retained": retained(row.accuracy, full=full, chance=guess),
        "by_type": by_kind(right, kinds),
        "by_type_ci": {
            kind: interval([right[i] for i in at], [videos[i] for i in at], seed=seed) for kind, at in of_kind.items()
        },
        "chance_by_type": by_kind(guesses, kinds),
        "loss": mean([each.loss for each in chosen if each.loss is not None]),
        "exact_match": mean([exact_match(a, b) for a, b in texts]),
        "f1": mean([token_f1(a, b) for a, b in texts]),
        "prefill_flops": math.nan,
        "kv_bytes": math.nan,
        "ttft_ms": 1000 * costs.first_token_s.get(round(positions) if positions == positions else 0, math.nan),
        **({"answer_tokens_mean": mean(row.spent)} if row.spent else {}),
        "compress_flops": row.compress_flops,
        "compress_seconds_per_clip": mean(row.compress_s),
    }  # fmt: skip
    told = [*row.notes, *notes, *([costs.note] if costs.note else [])]
    if lost:
        told.append(
            f"accuracy: the answer of {lost} of {len(chosen)} questions is none of their choices, which counts as wrong"
        )
    if costs.shape is not None and row.answers:
        before = [sum(costs.shape.prefill_flops(n) for n in each.part_positions) for each in row.answers]
        out["prefill_flops"] = costs.shape.prefill_flops(round(positions)) + mean([float(n) for n in before])
        out["kv_bytes"] = costs.shape.kv_bytes(round(positions))
    if parts:
        out["parts_positions_mean"] = mean([float(sum(each.part_positions)) for each in row.answers])
        out["parts_seconds_per_question"] = mean([each.part_seconds for each in row.answers])
        told.append("ttft_ms, kv_bytes: of the last prompt; its parts were asked before (parts_seconds_per_question)")
    if math.isnan(out["ttft_ms"]):
        told.append("ttft_ms: the prompt leaves no room for an answer, or was not timed")
    return {**out, "note": "; ".join(told) or None}


def versus(rows: Sequence[AnswerRow], family: str, *, seed: int, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """At each budget, the model against the training-free reducer that answers most questions there.

    The reducer is chosen by the answers it is then compared by, which flatters it: a lead of the model is a lead over
    all of them. difference: of accuracies, ours minus theirs, over the questions both answered. without: methods that
    are no reducers.
    """
    out = []
    for ours in rows:
        if ours.method != family or ours.budget is None:
            continue
        rivals = [row for row in rows if row.method not in (family, *ENDS, *without) and row.budget == ours.budget]
        rivals = [row for row in rivals if not math.isnan(row.accuracy)]
        if not rivals or math.isnan(ours.accuracy):
            continue
        best = max(rivals, key=lambda row: row.accuracy)
        found = paired(ours, best, seed=seed)
        out.append(
            {
                "budget": ours.budget,
                "reducer": best.method,
                "accuracy": ours.accuracy,
                "reducer_accuracy": best.accuracy,
                **found,
                "winner": leader(found["difference_ci"], "model", "reducer"),
            }
        )
    return out


def paired(one: AnswerRow, other: AnswerRow, *, seed: int) -> dict[str, Any]:
    """One row minus the other, question by question: difference, its interval, questions and videos."""
    a, b = one.right(), other.right()
    both = [question for question in a if question in b]
    of_clip = one.videos()
    differences, videos = [a[question] - b[question] for question in both], [of_clip[key] for key, _, _ in both]
    return {
        "difference": mean(differences),
        "difference_ci": interval(differences, videos, seed=seed),
        "questions": len(both),
        "videos": len(set(videos)),
    }


def benchmark(rows: Sequence[AnswerRow], *, seed: int) -> dict[str, Any]:
    """What the two ends of the table say about the questions themselves.

    blind_is_chance: whether chance lies in the blind row's interval, so that the questions do not tell their answers.
    tells_apart: whether all tokens are NEEDED above blind; None where there is no full-token row.
    """
    ends = {row.method: row for row in rows if row.method in ENDS}
    blind, full = ends.get("blind"), ends.get("full")
    out: dict[str, Any] = {"needed": NEEDED, "full_minus_blind": None, "tells_apart": None, "blind_is_chance": None}
    if blind is not None and blind.right():
        guess = chance([{"choices": each.choices} for each in blind.answers if each.right is not None])
        of_clip = blind.videos()
        bounds = interval([*blind.right().values()], [of_clip[key] for key, _, _ in blind.right()], seed=seed)
        out |= {"blind": blind.accuracy, "blind_ci": bounds, "chance": guess}
        out["blind_is_chance"] = None if bounds is None else bounds[0] <= guess <= bounds[1]
        if full is not None and full.right():
            found = paired(full, blind, seed=seed)
            out |= {"full_minus_blind": found["difference"], "full_minus_blind_ci": found["difference_ci"]}
            out["tells_apart"] = found["difference"] >= NEEDED
    return out


def per_question(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    """What every row made of every question, for tests that eval.json does not hold: 1 right, 0 wrong."""
    every = list(dict.fromkeys(question for row in rows for question in row.right()))
    types = {(each.key, each.id, each.question): each.type for row in rows for each in row.answers}
    right: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        found = row.right()
        right.setdefault(row.method, {})["-" if row.budget is None else str(row.budget)] = [
            found.get(question) for question in every
        ]
    of_clip = {key: video for row in rows for key, video in row.videos().items()}
    return {"keys": [q[0] for q in every], "videos": [of_clip[q[0]] for q in every],
            "ids": [q[1] for q in every], "types": [types[q] for q in every], "right": right}  # fmt: skip


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What eval.json says, in words: first whether it can say anything, then who leads at each budget."""
    found, out = result["benchmark"], []
    if found["tells_apart"] is not None:
        gap = f"All tokens are {points(found['full_minus_blind'])} above blind{range_of(found['full_minus_blind_ci'])}"
        out.append(
            f"{gap}."
            if found["tells_apart"]
            else f"{gap}, less than the {points(NEEDED)} needed: this benchmark cannot tell compressors apart."
        )
    if found["blind_is_chance"] is False:
        out.append(
            f"Blind, {100 * found['blind']:.1f} % of the answers are right, chance is {100 * found['chance']:.1f} %: "
            "the questions tell something about their answers."
        )
    for each in result["versus"]:
        tokens = "1 token" if each["budget"] == 1 else f"{each['budget']} tokens"
        gap = f"{points(abs(each['difference']))}{range_of(each['difference_ci'], flip=each['difference'] < 0)}"
        if each["winner"] is None:
            where = "above" if each["difference"] >= 0 else "below"
            out.append(
                f"At {tokens} neither leads: {result['family']} is {gap} {where} the best reducer, {each['reducer']}."
            )
        elif each["winner"] == "model":
            out.append(f"At {tokens} {result['family']} leads: {gap} above the best reducer, {each['reducer']}.")
        else:
            out.append(f"At {tokens} a reducer wins: {each['reducer']} is {gap} above {result['family']}.")
    if result["versus"] and result.get("reads_prompt"):
        out.append(
            f"Tokens of {result['family']} are made for each question, which it reads; those of a reducer serve every "
            "question about a video."
        )
    out += free_lengths.sentences(result.get("lengths"))
    return out


def points(difference: float) -> str:
    """A difference of accuracies in points, per cent of all questions."""
    return f"{100 * difference:.1f} points".replace("-", "\N{MINUS SIGN}")


def range_of(bounds: Sequence[float] | None, *, flip: bool = False) -> str:
    """An interval in points, as it stands behind its middle; "" where there is none."""
    if bounds is None:
        return ""
    low, high = (-bounds[1], -bounds[0]) if flip else bounds
    return f" (95 %: {100 * low:.1f} to {100 * high:.1f})".replace("-", "\N{MINUS SIGN}")
