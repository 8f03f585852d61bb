"""A frozen language model reads tokens: teacher-forced answers, and greedy answers.

    prompt "<video>\\nQuestion: ..." --tokenizer--> ids with placeholders --splice(tokens)--> FrozenLLM --> answer

Letters: B texts, L positions, M answer positions of all texts, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vtok.llm.frozen import FrozenLLM
from vtok.llm.splice import IGNORED, PLACEHOLDER, splice
from vtok.types import Tokens

PLACE = "<video>"  # in a prompt's text: here go the clip's tokens


class Read(NamedTuple):
    """What the LLM made of the answers given to it. row [M]: the text of each position; labels [M]; logits [M, V]
    float32 that predict them; hidden: states [M, D] that the logits come from, of the layers asked; texts: B;
    positions: of all texts together; cut: answers that were shortened."""

    row: Tensor
    labels: Tensor
    logits: Tensor
    hidden: list[Tensor]
    texts: int
    positions: int
    cut: int

    def sums(self, values: Tensor) -> Tensor:
        """[M] -> [B]: summed over each text's answer."""
        return values.new_zeros(self.texts).index_add(0, self.row, values)

    def means(self, values: Tensor) -> Tensor:
        """[M] -> [B]: averaged over each text's answer; 0 for a text without one."""
        return self.sums(values) / self.sums(torch.ones_like(values)).clamp(min=1)

    def nll(self) -> Tensor:
        """[M] negative log-likelihood of each answer position, in nats."""
        return cross_entropy(self.logits, self.labels, reduction="none")


def prompt_ids(llm: FrozenLLM, prompt: str) -> list[int]:
    """Ids of a prompt, PLACEHOLDER for each "<video>"; in the chat template where the LLM uses one."""
    pieces = [_encode(llm, piece) for piece in _written(llm, prompt).split(PLACE)]
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, PLACEHOLDER, *piece]
    start = llm.tokenizer.bos_token_id
    if not llm.chat and start is not None and llm.tokenizer("").input_ids[:1] == [start]:
        ids = [start, *ids]  # a chat template writes its own
    return ids


def answer_ids(llm: FrozenLLM, prompt: str, answer: str, *, most: int = 0) -> tuple[list[int], bool]:
    """Ids of an answer as it follows its prompt, ended; whether it was cut to `most` ids (then it is not ended)."""
    before = _written(llm, prompt).split(PLACE)[-1]
    text = answer if llm.chat or not before or before[-1].isspace() else f" {answer}"
    alone, whole = _encode(llm, before), _encode(llm, before + text)
    # some tokenizers mark the start of every text they are given: an answer is what follows the prompt
    ids = whole[len(alone) :] if whole[: len(alone)] == alone else _encode(llm, text)
    if most and len(ids) + 1 > most:
        return ids[:most], True
    return [*ids, llm.end_ids[0]], False


def _written(llm: FrozenLLM, prompt: str) -> str:
    if not llm.chat:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return llm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _encode(llm: FrozenLLM, text: str) -> list[int]:
    return llm.tokenizer(text, add_special_tokens=False).input_ids if text else []


def with_times(prompts: Sequence[str], tokens: Tokens) -> list[str]:
    """Each prompt with its "<video>" once for every group of its clip's tokens, the group's start in seconds before.

    A group that has no token at this budget is left out: its time would be told of nothing, or of what follows it.
    Raises: ValueError where the tokens have no times.
    """
    if tokens.times is None:
        raise ValueError("timestamps=true needs Tokens.times: the clips bring no times, or the compressor drops them")
    starts, sizes = tokens.times[..., 0].tolist(), tokens.group_sizes.tolist()
    rows = [[start for start, size in zip(*row) if size] for row in zip(starts, sizes)]
    spread = [" ".join(f"{start:.1f}s: {PLACE}" for start in row) for row in rows]
    return [prompt.replace(PLACE, text) for prompt, text in zip(prompts, spread)]


def tokens_at(tokens: Tokens, index: Sequence[int]) -> Tokens:
    """The tokens of these clips, in this order; a clip may come several times."""
    at = torch.as_tensor(list(index), dtype=torch.int64, device=tokens.lengths.device)
    found = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    return replace(tokens, **{name: v[at] for name, v in found.items() if isinstance(v, Tensor)})


def read(
    llm: FrozenLLM,
    prompts: Sequence[str],
    answers: Sequence[str],
    tokens: Tokens | None,
    *,
    hidden: Sequence[int] = (),
    max_answer: int = 0,
    device: torch.device | str | None = None,
) -> Read:
    """The LLM's predictions of answers that it is given (teacher forcing).

    Args:
        prompts: with one "<video>", or one for each group of the clip that has tokens. answers: "" is no answer at
            all: the text is read and nothing is predicted.
        tokens: of the prompts' clips; None = blind. device: of a blind read; None = where the LLM is.
        hidden: layers whose states are asked, as in `FrozenLLM.forward`.
        max_answer: longer answers are cut to so many ids, and counted; 0 = never, a text that is too long is an error.
    """
    asked = [prompt_ids(llm, prompt) for prompt in prompts]
    told = [answer_ids(llm, p, a, most=max_answer) if a else ([], False) for p, a in zip(prompts, answers)]
    llm.to(tokens.embeddings.device if tokens is not None else device or llm.device)
    known = [ids for ids, _ in told]
    made = splice(asked, tokens, llm.embed, answers=known, max_length=llm.max_length, device=llm.device)
    learned = made.labels != IGNORED
    length = made.labels.shape[1]
    columns = learned.any(0).nonzero()
    first = max(int(columns[0]) - 1, 0) if len(columns) else length - 1  # position that predicts the first answer id
    logits, states = llm.forward(made.embeds, made.mask, made.positions, keep=length - first, hidden=hidden)
    row, column = learned[:, first + 1 :].nonzero(as_tuple=True)
    return Read(
        row=row,
        labels=made.labels[row, first + 1 + column],
        logits=logits[row, column].float(),
        hidden=[state[row, column].float() for state in states],
        texts=len(prompts),
        positions=int(made.mask.sum()),
        cut=sum(cut for _, cut in told),
    )


def generate(
    llm: FrozenLLM, prompts: Sequence[str], tokens: Tokens | None, *, max_new_tokens: int | Sequence[int] = 64
) -> list[str]:
    """Greedy answers; a batch gives what its texts give one by one. max_new_tokens: of each text, or of all."""
    llm.to(tokens.embeddings.device if tokens is not None else llm.device)
    asked = [prompt_ids(llm, prompt) for prompt in prompts]
    most = [max_new_tokens] * len(asked) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    with torch.no_grad():
        made = splice(asked, tokens, llm.embed, pad="left", max_length=llm.max_length, device=llm.device)
    ids = llm.generate(made.embeds, made.mask, max_new_tokens=max(most))
    return [llm.tokenizer.decode(row[:own], skip_special_tokens=True).strip() for row, own in zip(ids, most)]
