"""Visual tokens into a text: ids with placeholders and ragged Tokens as what a language model reads.

    ids      5 8 -1 9 4 | 7 2        -1 = PLACEHOLDER, | = where the answer begins
    embeds   w w v v v w w w w       w word embeddings, v the clip's own tokens, as many as it has
    labels   . . . . . . . 7 2       the answer alone is learned
    padding  on the right to train and to score, on the left to generate

Letters: B texts, L positions, D width, K tokens per clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.types import Tokens

PLACEHOLDER = -1  # an id that no vocabulary has
IGNORED = -100  # label of a position that is not learned, as transformers has it


class Spliced(NamedTuple):
    """embeds [B, L, D]; mask [B, L] bool, False on padding; labels [B, L] int64, IGNORED outside answers; positions
    [B, L] int64, counted from a text's own first position; visual [B, L] bool, True on visual tokens."""

    embeds: Tensor
    mask: Tensor
    labels: Tensor
    positions: Tensor
    visual: Tensor


def splice(
    prompts: Sequence[Sequence[int]],
    tokens: Tokens | None,
    embed: Callable[[Tensor], Tensor],
    *,
    answers: Sequence[Sequence[int]] | None = None,
    pad: str = "right",
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> Spliced:
    """Texts whose placeholders are filled with their clips' tokens, in order; padding is masked.

    A prompt has one placeholder for all tokens of its clip, or one for each of its groups (text in between may say
    their times), or for each that has tokens. Nothing is ever cut.

    Args:
        prompts: ids of each text, PLACEHOLDER where tokens go.
        tokens: of the same clips; None = blind, every placeholder is filled with nothing.
        embed: ids [B, L] -> word embeddings [B, L, D]; called once. tokens are cast to their dtype.
        answers: ids that follow each prompt and are its labels.
        pad: "right" or "left". max_length: most positions a text may take. device: where tokens=None.
    Raises: ValueError for placeholders that do not fit the tokens, ids below 0, tokens of another width than the
        words', an empty text, and a text that is too long.
    """
    if pad not in ("right", "left"):
        raise ValueError(f"pad={pad!r} is unknown; choose right (training) or left (generation)")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
    spans = _spans([list(p).count(PLACEHOLDER) for p in prompts], tokens)
    codes, starts = [], []
    for row, (prompt, places) in enumerate(zip(prompts, spans)):
        ids: list[int] = []  # a word's id, or -1 - k for the clip's token k
        place = iter(places)
        for item in prompt:
            if item == PLACEHOLDER:
                first, count = next(place)
                ids += range(-1 - first, -1 - first - count, -1)
            else:
                ids.append(item)
        answer = list(answers[row]) if answers is not None else []
        if min([*answer, *(i for i in prompt if i != PLACEHOLDER)], default=0) < 0:
            raise ValueError(f"text {row} has an id below 0 that is not the placeholder {PLACEHOLDER}")
        starts.append(len(ids))
        codes.append(ids + answer)
        if not codes[-1]:
            raise ValueError(f"text {row} is empty: a language model needs one position at least")
        if max_length is not None:
            visual = sum(count for _, count in places)
            check_room(row, visual, starts[-1] - visual, len(answer), max_length)
    return _assemble(codes, starts, tokens, embed, left=pad == "left", device=device)


def check_room(text: int, visual: int, prompt: int, answer: int, most: int) -> None:
    """Raises: ValueError where so many positions of a text are more than a language model has."""
    length = visual + prompt + answer
    if length > most:
        raise ValueError(
            f"text {text} takes {length} positions ({visual} visual tokens, {prompt} of the prompt, {answer} of the "
            f"answer), the language model has {most}: lower the budget or shorten the answers"
        )


def _spans(placeholders: list[int], tokens: Tokens | None) -> list[list[tuple[int, int]]]:
    """(first, count) of the tokens that fill each placeholder of each text."""
    if tokens is None:
        return [[(0, 0)] * count for count in placeholders]
    if len(placeholders) != len(tokens.lengths):
        raise ValueError(f"{len(placeholders)} prompts for the tokens of {len(tokens.lengths)} clips")
    lengths = tokens.lengths.tolist()
    groups: list[list[int]] = []
    if any(count != 1 for count in placeholders):
        groups = [row[:count] for row, count in zip(tokens.group_sizes.tolist(), tokens.num_groups.tolist())]
    out = []
    for row, count in enumerate(placeholders):
        if count == 1:
            out.append([(0, lengths[row])])
            continue
        filled = [size for size in groups[row] if size]
        if count not in (len(groups[row]), len(filled)):
            raise ValueError(
                f"text {row} has {count} placeholders, its clip {lengths[row]} tokens in {len(groups[row])} groups: "
                f"give 1 placeholder, or {len(groups[row])}"
            )
        sizes = groups[row] if count == len(groups[row]) else filled
        out.append([(sum(sizes[:g]), size) for g, size in enumerate(sizes)])
    return out


def _assemble(
    codes: list[list[int]],
    starts: list[int],
    tokens: Tokens | None,
    embed: Callable[[Tensor], Tensor],
    *,
    left: bool,
    device: torch.device | str | None,
) -> Spliced:
    most = max(len(row) for row in codes)
    every = torch.zeros(len(codes), most, dtype=torch.int64)
    mask, labels = torch.zeros_like(every, dtype=torch.bool), torch.full_like(every, IGNORED)
    for row, (code, start) in enumerate(zip(codes, starts)):
        shift = most - len(code) if left else 0
        every[row, shift : shift + len(code)] = torch.tensor(code)
        mask[row, shift : shift + len(code)] = True
        labels[row, shift + start : shift + len(code)] = every[row, shift + start : shift + len(code)]
    device = tokens.embeddings.device if tokens is not None else device
    every, mask, labels = (x.to(device) for x in (every, mask, labels))
    embeds, visual = embed(every.clamp(min=0)), every < 0
    if tokens is not None:
        width = tokens.embeddings.shape[-1]
        if width != embeds.shape[-1]:
            raise ValueError(
                f"the tokens are {width} wide, the language model's words {embeds.shape[-1]}: "
                f"set model.embedding_dim={embeds.shape[-1]}"
            )
        index = (-1 - every).clamp(min=0)[..., None].expand(-1, -1, width)
        embeds = torch.where(visual[..., None], tokens.embeddings.to(embeds.dtype).gather(1, index), embeds)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Spliced(embeds, mask, labels, positions, visual)
