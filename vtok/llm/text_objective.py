"""The loss of a compressor of texts: a frozen language model repeats the text, goes on with it, answers questions.

A frozen model that is only ever asked to repeat would be spoken to in vectors that mean nothing but "repeat"; other
tasks over the same tokens keep them to what the model understands, and so does its own reading of the text, which
is the teacher here (`teacher: text`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vtok.llm.objective import ObjectiveConfig, ProjectorObjective, with_tower_features
from vtok.llm.reading import PLACE, Read
from vtok.llm.relevance import answering, asked_spans, known_spans, random_prefixes, ranking_loss
from vtok.llm.tasks import Told, draw, instruction
from vtok.llm.words import WordsTeacher, count_words
from vtok.types import Budget, Clip, Tokens

TAUGHT = ("yes_no", "learned", "similarity")  # of model.ata.score: scores that have gradients
TEXT = "text"  # objective.teacher: the language model on the words themselves


@dataclass
class TextObjectiveConfig(ObjectiveConfig):
    # share of the clips whose text is cut in two, the first part compressed and the second one learned as the answer
    continuation: float = 0.0
    continuation_prompts: list[str] = field(default_factory=lambda: [f"{PLACE}\nContinue the text:"])
    # words of the LLM for each token, one drawn a step: every clip gets tokens by its length; [] = as budgets says
    ratios: list[float] = field(default_factory=list)
    # of models whose segments have scores (`model.ata`):
    relevance: float = 0.0  # weight of what questions that say when their answer is on show teach the scores
    prefixes: float = 0.0  # share of the steps in which each segment has a length of its own, drawn, whatever its score

    def __post_init__(self) -> None:
        if not 0 <= self.continuation < 1:
            raise ValueError(f"objective.continuation={self.continuation} is a share of the clips, 0 to below 1")
        if any(prompt.count(PLACE) != 1 for prompt in self.continuation_prompts) or not self.continuation_prompts:
            raise ValueError(
                f"objective.continuation_prompts={list(self.continuation_prompts)}: each holds {PLACE} once"
            )
        if any(ratio < 1 for ratio in self.ratios):
            raise ValueError(f"objective.ratios={list(self.ratios)}: words a token, 1 or more")
        if self.relevance < 0 or not 0 <= self.prefixes <= 1:
            raise ValueError(
                f"objective.relevance={self.relevance} is a weight, 0 or above; objective.prefixes={self.prefixes} a "
                "share of the steps, 0 to 1"
            )


class TextObjective(ProjectorObjective):
    """`ProjectorObjective` whose clips are texts; of videos it is that objective."""

    Config = TextObjectiveConfig

    def __init__(self, config: Any, model_config: Any, *, load: Callable[[str], Any] | None = None):
        score = getattr(getattr(model_config, "ata", None), "score", "")
        taught = score in TAUGHT
        if config.relevance and not taught:
            raise ValueError(
                f"objective.relevance={config.relevance} teaches scores that learn: model.ata.score={score!r} is none; "
                f"choose one of {', '.join(TAUGHT)}, or set it to 0"
            )
        if score in ("learned", "similarity") and not config.relevance:
            raise ValueError(f"model.ata.score={score} learns by objective.relevance, which is 0: set it above")
        source = getattr(model_config, "source", "")
        if config.prefixes and (source == TEXT or getattr(model_config, "mode", "") != "latent_lm"):
            raise ValueError(
                f"objective.prefixes={config.prefixes} is for segments of videos: model.mode=latent_lm, "
                "model.source=video; set it to 0"
            )
        if source != TEXT:
            for key, value, open_value in (
                ("ratios", list(config.ratios), []),
                ("continuation", config.continuation, 0.0),
                ("teacher", config.teacher if config.teacher == TEXT else "", ""),
            ):
                if value != open_value:
                    raise ValueError(
                        f"objective.{key}={value!r} is for texts, and model.source={source!r}: set it to {open_value!r}"
                    )
        budgets = config.budgets
        if config.ratios and (budgets.values or budgets.law != "full"):
            raise ValueError(
                f"objective.ratios={list(config.ratios)} and objective.budgets (values={list(budgets.values)}, "
                f"law={budgets.law}) both say how many tokens a text is given: leave one of them out"
            )
        super().__init__(config, model_config, load=load)
        self._found: dict[str, torch.Tensor] = {}  # of the last step, for the report

    def begin_model(self, model: Any) -> str:
        """What a fresh model takes from the LLM before its first step, and says of it."""
        return model.begin_at_words(self.llm) if hasattr(model, "begin_at_words") else ""

    def load_teacher(self, load: Callable[[str], Any] | None) -> Any:
        return WordsTeacher(self.llm) if self.config.teacher == TEXT else super().load_teacher(load)

    def tell(self, clip: Clip, step: int) -> tuple[Clip, Told]:
        """Some of the texts are cut: what was compressed is then gone on with."""
        c = self.config
        clip, told = super().tell(clip, step)
        if not c.continuation or clip.text is None:
            return clip, told
        texts, parts = list(clip.text), [list(column) for column in told]
        for row, text in enumerate(texts):
            rng = draw(c.seed, step, f"continuation {clip.keys[row]}")
            words = text.split(" ")
            if rng.random() >= c.continuation or len(words) < 2 or told.tasks[row] == "given":
                continue
            cut = rng.randint(max(1, len(words) // 4), max(1, 3 * len(words) // 4))
            prompt = rng.choice(list(c.continuation_prompts))
            texts[row], answer = " ".join(words[:cut]), " ".join(words[cut:])
            for column, value in zip(parts, (prompt, answer, instruction(prompt), "continuation")):
                column[row] = value
        return replace(clip, text=texts), Told(*parts)

    def budget_of(self, model: Any, clip: Clip, step: int) -> Budget | None:
        """Tokens at a step: by the length of each text where `ratios` are given; of each segment by `prefixes`."""
        c = self.config
        if c.prefixes and draw(c.seed, step, "prefixes").random() < c.prefixes:
            most, total = model.config.most_of_segment, model.max_tokens
            return random_prefixes(clip.keys, model.segments(clip), most=most, total=total, step=step, seed=c.seed)
        if not c.ratios or clip.text is None:
            return super().budget_of(model, clip, step)
        ratio = draw(c.seed, step, "ratio").choice(list(c.ratios))
        return tokens_at_ratio(count_words(self.llm, clip.text), ratio, most=model.max_tokens)

    def prepare(self, model: Any, clip: Clip) -> Clip:
        return with_tower_features(model, clip) if self.config.relevance and _matches(model) else clip

    def terms(self, model: Any, clip: Clip, tokens: Tokens, seen: Read, step: int) -> dict[str, torch.Tensor]:
        """What the questions teach the scores: the one that is asked, or, where a score costs no pass, all of them."""
        scores, c = getattr(tokens, "scores", None), self.config
        self._found = {}
        if scores is None or not c.relevance:
            return {}
        if tokens.times is None:
            raise ValueError("objective.relevance needs the times of segments: the clips bring none")
        spans, times = asked_spans(clip, [*c.tasks.qa_prompts]), tokens.times
        if _matches(model):  # all that is known of the clips
            rows, prompts, spans = known_spans(clip, [*c.tasks.qa_prompts], step=step, seed=c.seed)
            there = scores[rows].isfinite()
            scores = model.similarity(clip, prompts, rows).masked_fill(~there, -torch.inf)
            times = times[rows]
        loss, hit = ranking_loss(scores, answering(times, spans, scores.isfinite()))
        if len(hit):
            self._found = {"relevant_first": hit.float().mean()}
        return {"relevance": c.relevance * loss}

    def told(self, model: Any) -> dict[str, torch.Tensor]:
        return self._found

    @torch.no_grad()
    def measure(self, model: Any, clip: Clip, *, budget: Budget | None = None) -> dict[str, list[float]]:
        """Of each text, how well it is repeated word after word, those before given; {} where videos are compressed."""
        if clip.text is None or getattr(model.config, "source", "") != TEXT:
            return {}
        prompts = [self.config.tasks.reconstruction_prompts[0]] * len(clip)
        told = Told(prompts, list(clip.text), [instruction(p) for p in prompts], ["reconstruction"] * len(clip))
        seen = self.read(told, model.encode(replace(clip, prompt=told.instructions, target=None), budget=budget))
        hits = (seen.logits.argmax(-1) == seen.labels).float()
        return {"repeated_nll": seen.means(seen.nll()).tolist(), "repeated_accuracy": seen.means(hits).tolist()}

    def generate(self, model: Any, clip: Clip, *, prompts: list[str] | None = None, **keywords: Any) -> list[str]:
        """The LLM's greedy answers; where the clips are texts and no prompts are given, it is to repeat them."""
        if prompts is None and getattr(model.config, "source", "") == TEXT:
            prompts = [self.config.tasks.reconstruction_prompts[0]] * len(clip)
            words = max(count_words(self.llm, clip.text or []), default=0)  # what is missed is seen from a few more
            keywords.setdefault("max_new_tokens", min(words + 8, self.config.max_answer))
        return super().generate(model, clip, prompts=prompts, **keywords)


def tokens_at_ratio(words: list[int], ratio: float, *, most: int) -> torch.Tensor:
    """[B] int64: tokens of texts of so many words at `ratio` words a token, 1 at least."""
    return torch.tensor([min(max(int(count / ratio), 1), most) for count in words], dtype=torch.int64)


def _matches(model: Any) -> bool:
    """Whether a score costs no pass of the small model."""
    return getattr(getattr(model.config, "ata", None), "score", "") == "similarity"
