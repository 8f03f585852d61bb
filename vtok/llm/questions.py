"""The questions of clips, put to a frozen language model that reads a compressor's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vtok.llm.choices import score
from vtok.llm.frozen import FrozenLLM
from vtok.llm.parts import PartsConfig, Said, ask_parts, compressed, with_parts
from vtok.llm.reading import PLACE, generate, prompt_ids, tokens_at, with_times
from vtok.llm.tasks import ask_as, is_question, plain
from vtok.types import Budget, Clip, Tokens


@dataclass(frozen=True)
class Answered:
    """One question and what the LLM made of it.

    likelihoods: log-likelihood in nats of each choice; [] where the question has none. text: its own greedy answer;
    None where none was asked. tokens: of the clip. positions: of the whole prompt, tokens and separators included.
    parts: what the parts of the clip said before, and part_positions, of their prompts; part_ids: that were generated
    for them; part_seconds: this question's share of the time they took. source: the video that the clip was cut from.
    """

    key: str
    id: str
    type: str
    question: str
    answer: str
    choices: list[str]
    likelihoods: list[float]
    text: str | None
    tokens: int
    positions: int
    parts: list[str] = field(default_factory=list)
    part_positions: list[int] = field(default_factory=list)
    part_ids: int = 0
    part_seconds: float = 0.0
    source: str = ""

    @property
    def chosen(self) -> str | None:
        """The likeliest choice."""
        return self.choices[self.likelihoods.index(max(self.likelihoods))] if self.likelihoods else None

    @property
    def right(self) -> bool | None:
        """Whether the likeliest choice is the answer; None without choices."""
        return _same(self.chosen, self.answer) if self.chosen is not None else None

    @property
    def loss(self) -> float | None:
        """Nats of the choice that is the answer; None where none of them is."""
        found = [value for choice, value in zip(self.choices, self.likelihoods) if _same(choice, self.answer)]
        return -max(found) if found else None


def _same(one: str, other: str) -> bool:
    return one.strip().rstrip(".").casefold() == other.strip().rstrip(".").casefold()


@torch.no_grad()
def ask(
    llm: FrozenLLM,
    clip: Clip,
    model: Any = None,
    *,
    template: str,
    budget: Budget | None = None,
    captions: bool = False,
    timestamps: bool = False,
    max_new_tokens: int = 0,
    parts: PartsConfig | None = None,
    texts_per_call: int = 64,
) -> list[Answered]:
    """All questions of a batch, in order. A clip is compressed once, or once for each question where the model reads
    prompts (`model.reads_prompt`).

    Args:
        model: a projector, at `budget`; None: the LLM is blind, or reads the clip's caption where `captions`.
        template: a prompt with "<video>" and "{question}". timestamps: the start of each group is told before it.
        max_new_tokens: length of the LLM's own answer; 0 = only choices are scored.
        parts: ask the parts of each clip first and tell what they said (`vtok.llm.parts`); a blind LLM has none.
        texts_per_call: texts that the LLM reads at once; bounds the memory.
    """
    every = [(row, question) for row, of_clip in enumerate(clip.qa or []) for question in of_clip or []]
    asked = [(row, question) for row, question in every if is_question(question)]
    if not asked:
        return []
    rows = [row for row, _ in asked]
    prompts = [ask_as(template, question) for _, question in asked]
    tokens: Tokens | None = None
    said, seconds = [Said([], [], 0)] * len(asked), 0.0
    if model is not None:
        tokens = compressed(model, clip, rows, prompts, budget=budget)
        if parts is not None and parts.count > 1:
            how: dict[str, Any] = dict(budget=budget, timestamps=timestamps, texts_per_call=texts_per_call)
            said, seconds = ask_parts(llm, clip, model, asked, parts, **how)
            prompts = [with_parts(prompt, each) for prompt, each in zip(prompts, said)]
    elif captions:
        told = clip.text or [""] * len(clip)
        prompts = [prompt.replace(PLACE, plain(told[row])) for prompt, row in zip(prompts, rows)]
    if tokens is not None and timestamps:
        prompts = with_times(prompts, tokens)
    choices = [[str(choice) for choice in question.get("choices") or []] for _, question in asked]
    clips = None if getattr(model, "reads_prompt", False) else rows
    likelihoods = score(llm, prompts, choices, tokens, clips=clips, texts_per_call=texts_per_call)
    texts: list[str | None] = [None] * len(asked)
    if max_new_tokens:
        texts = []
        for part in torch.arange(len(asked)).split(texts_per_call):
            own = tokens_at(tokens, part.tolist()) if tokens is not None else None
            texts += generate(llm, [prompts[i] for i in part.tolist()], own, max_new_tokens=max_new_tokens)
    counts = tokens.lengths.tolist() if tokens is not None else [0] * len(asked)
    return [
        Answered(
            key=clip.keys[row],
            id=str(question.get("id", "")),
            type=str(question.get("type", "")),
            question=str(question["question"]),
            answer=str(question["answer"]),
            choices=choices[i],
            likelihoods=likelihoods[i],
            text=texts[i],
            tokens=counts[i],
            positions=sum(item >= 0 for item in prompt_ids(llm, prompts[i])) + counts[i],
            parts=said[i].lines,
            part_positions=said[i].positions,
            part_ids=said[i].generated,
            part_seconds=seconds / len(asked),
            source=clip.sources[row] if clip.sources else "",
        )
        for i, (row, question) in enumerate(asked)
    ]
