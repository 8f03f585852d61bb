"""How likely a frozen language model finds each of several answers to a prompt.

    clip's tokens and what all its prompts begin with     read once, its keys and values kept
        |-- rest of a prompt, choice, end                 continued from there, all questions and choices of several
        |-- rest of a prompt, choice, end                 clips side by side

A benchmark of 4 questions with 5 choices reads 256 tokens once instead of 20 times. A model without such a cache
(state spaces), or one whose layers are checkpointed, reads every text from its beginning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from vtok.llm.frozen import FrozenLLM
from vtok.llm.reading import answer_ids, prompt_ids, read, tokens_at
from vtok.llm.splice import IGNORED, PLACEHOLDER, check_room, splice
from vtok.types import Tokens


class _Asked(NamedTuple):
    """A text to be judged. row, choice: which; start: ids its group has in common; ids: the rest of the prompt, and the
    choice; answer: how many of them are the choice's."""

    row: int
    choice: int
    ids: list[int]
    answer: int


class _Group(NamedTuple):
    row: int  # whose tokens these are
    start: list[int]
    texts: list[_Asked]


@torch.no_grad()
def score(
    llm: FrozenLLM,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    tokens: Tokens | None,
    *,
    clips: Sequence[Hashable] | None = None,
    texts_per_call: int = 64,
) -> list[list[float]]:
    """Log-likelihood in nats of each choice as the whole answer (its end included) to its prompt.

    With the end counted, the likelihoods of all possible answers sum to 1, whatever their length: nothing is
    normalised.

    Args:
        tokens: of each prompt; None = blind.
        clips: of each prompt, which clip's tokens it has: prompts of one clip have equal ones, read once. None: each
            prompt has its own.
        texts_per_call: texts, one for each choice, that the LLM reads at once; bounds the memory.
    """
    llm.to(tokens.embeddings.device if tokens is not None else llm.device)
    out = [[0.0] * len(offered) for offered in choices]
    groups = _groups(llm, prompts, choices, clips or range(len(prompts)))
    if tokens is not None:
        counts = tokens.lengths.tolist()
        for group in groups:
            for text in group.texts:
                prompt = len(group.start) - group.start.count(PLACEHOLDER) + len(text.ids) - text.answer
                check_room(text.row, counts[group.row], prompt, text.answer, llm.max_length)
    for part in _parts(groups, texts_per_call):
        values = _continued(llm, part, tokens)
        texts = [text for group in part for text in group.texts]
        if values is None:
            own = tokens_at(tokens, [text.row for text in texts]) if tokens is not None else None
            answers = [choices[text.row][text.choice] for text in texts]
            seen = read(llm, [prompts[text.row] for text in texts], answers, own)
            values = -seen.sums(seen.nll())
        for text, value in zip(texts, values.tolist()):
            out[text.row][text.choice] = value
    return out


def _groups(
    llm: FrozenLLM, prompts: Sequence[str], choices: Sequence[Sequence[str]], clips: Sequence[Hashable]
) -> list[_Group]:
    """Texts that begin alike: those of a clip, or those of a prompt where the clip's tokens come after the question."""
    asked = [prompt_ids(llm, prompt) for prompt in prompts]
    rows: dict[Hashable, list[int]] = {}
    for row, clip in enumerate(clips):
        rows.setdefault(clip, []).append(row)
    out = []
    for together in rows.values():
        shared = _shared([asked[row] for row in together])
        if any(PLACEHOLDER in asked[row][shared:] for row in together):
            parted = [([row], _shared([asked[row]])) for row in together]
        else:
            parted = [(together, shared)]
        for members, start in parted:
            texts = []
            for row in members:
                for number, choice in enumerate(choices[row]):
                    answer, _ = answer_ids(llm, prompts[row], choice)
                    texts.append(_Asked(row, number, [*asked[row][start:], *answer], len(answer)))
            if texts:
                out.append(_Group(members[0], asked[members[0]][:start], texts))
    return out


def _shared(prompts: list[list[int]]) -> int:
    """Ids that all prompts begin with; one at least is left, from which the answer's first id is predicted."""
    return min(len(commonprefix(prompts)), min(len(ids) for ids in prompts) - 1)


def _parts(groups: list[_Group], texts_per_call: int) -> list[list[_Group]]:
    """The groups, cut where one has too many texts, in calls of at most so many texts."""
    cut = [
        group._replace(texts=group.texts[i : i + texts_per_call])
        for group in groups
        for i in range(0, len(group.texts), texts_per_call)
    ]
    out: list[list[_Group]] = []
    room = 0
    for group in cut:
        if len(group.texts) > room:
            out.append([])
            room = texts_per_call
        out[-1].append(group)
        room -= len(group.texts)
    return out


def _continued(llm: FrozenLLM, groups: list[_Group], tokens: Tokens | None) -> Tensor | None:
    """Log-likelihood of each text's choice, groups in order; None where what is shared cannot be kept."""
    texts = [text for group in groups for text in group.texts]
    if any(PLACEHOLDER in text.ids for text in texts) or not all(
        len(group.start) > group.start.count(PLACEHOLDER) * (tokens is None) for group in groups
    ):
        return None
    own = tokens_at(tokens, [group.row for group in groups]) if tokens is not None else None
    begun = splice([group.start for group in groups], own, llm.embed, pad="left", device=llm.device)
    cache = llm.prefill(begun.embeds, begun.mask, begun.positions)
    if cache is None:
        return None
    source = torch.tensor([at for at, group in enumerate(groups) for _ in group.texts], device=llm.device)
    cache.batch_select_indices(source)
    ids = pad_sequence([torch.tensor(text.ids) for text in texts], batch_first=True, padding_value=IGNORED)
    ids = ids.to(llm.device)
    there = ids != IGNORED
    before = begun.mask.sum(1)[source]
    first = min(len(text.ids) - text.answer for text in texts) - 1  # position that predicts the first id of an answer
    logits, _ = llm.forward(
        llm.embed(ids.masked_fill(~there, 0)),
        torch.cat([begun.mask[source], there], 1),
        before[:, None] + torch.arange(ids.shape[1], device=llm.device),
        keep=ids.shape[1] - first,
        past=cache,
    )
    sizes = torch.tensor([len(text.ids) - text.answer for text in texts], device=llm.device)
    labels = ids.masked_fill(torch.arange(ids.shape[1], device=llm.device) < sizes[:, None], IGNORED)[:, first + 1 :]
    each = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -each.unflatten(0, labels.shape).sum(1)
