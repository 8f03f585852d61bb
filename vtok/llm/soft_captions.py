"""Soft captions: a small language model describes a segment, and its states at the words are the segment's tokens.

    segment, request --small language model--> word, word ... stop      as many words as there is to tell
                                        states there: state, state ...  one token for each word

LangDC (https://arxiv.org/abs/2509.00969). A token is the state of a chosen layer at the position that reads a word of
the caption, whether the word was given (`teach`), written by the model itself (`write`), or is one of all that are
written at once (`sketch`): what training hands to the large model is what inference hands to it, and given a caption
that the model wrote, `teach` gives the states that `write` gave. The released code reads states in one of its branches
and word embeddings in the other.

The length is the model's own: it ends at the stop word, which dense target captions teach it to place, or after as many
words as a head said before the first of them.

Letters: M segments, P positions of the prompt, n words of a caption (padded), L positions, V words, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, pad, smooth_l1_loss

from vtok.llm.small import SmallReader
from vtok.llm.splice import IGNORED

HOW, LENGTHS = ("teacher_forced", "generate", "parallel"), ("stop", "head")


@dataclass
class CaptionConfig:
    """Soft captions (mode caption_lm)."""

    # where the words of training come from: teacher_forced, the target captions | generate, the model itself, as in
    # inference | parallel: learned queries in the place of words, all of them in one pass, in inference too
    how: str = "teacher_forced"
    learn: bool = True  # targets are learned (objective.density, objective.lengths); needed by teacher_forced
    request: str = "\nDescription:"  # what the small model is told after a segment: the caption follows
    length: str = "stop"  # stop: where the stop word is written | head: told by a head before the first word

    def __post_init__(self) -> None:
        for name, value, choices in (("how", self.how, HOW), ("length", self.length, LENGTHS)):
            if value not in choices:
                raise ValueError(f"model.captions.{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        if self.how == "teacher_forced" and not self.learn:
            raise ValueError("model.captions.how=teacher_forced reads the targets: set learn=true, or how=generate")


class Written(NamedTuple):
    """Captions of M segments. states: [M, n, D] at the words. ids: [M, n] int64, the words. lengths: [M] int64, 1 or
    more. before: [M, D], the state that knows the segment and no word yet. logits: [M, n + 1, V] that predict each word
    and the stop, where they are asked for."""

    states: Tensor
    ids: Tensor
    lengths: Tensor
    before: Tensor
    logits: Tensor | None = None


class Learned(NamedTuple):
    """What target captions teach. nll: mean negative log-likelihood of their words and stops, in nats. accuracy: share
    of these that are the likeliest. length: loss of the length head, or None. words: mean of the targets' lengths. cut:
    share of the targets that were shortened. described: share of the segments that have a target."""

    nll: Tensor
    accuracy: Tensor
    length: Tensor | None
    words: Tensor
    cut: Tensor
    described: Tensor


class Prompt(NamedTuple):
    """What stands before the captions: embeds [M, P, D]; mask [M, P] bool, False on padding, which is on the left."""

    embeds: Tensor
    mask: Tensor


class LengthHead(nn.Module):
    """States [M, D] -> [M], the logarithm of the number of words."""

    def __init__(self, width: int, *, most: int):
        super().__init__()
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, torch.tensor(float(most)).sqrt().log().item())

    def forward(self, states: Tensor) -> Tensor:
        states = layer_norm(states.to(self.out.weight.dtype), states.shape[-1:])
        return self.out(states)[:, 0].float()

    @staticmethod
    def words(logarithm: Tensor, *, most: int) -> Tensor:
        """[M] int64: 1 to `most`."""
        return logarithm.exp().round().clamp(1, most).long()


def teach(reader: SmallReader, prompt: Prompt, words: Sequence[Sequence[int]], *, logits: bool) -> Written:
    """The model reads captions that it is given, one pass for all."""
    lengths = torch.tensor([len(row) for row in words], device=prompt.mask.device)
    count = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (count - len(row))] for row in words], device=lengths.device)
    there = torch.arange(count, device=lengths.device) < lengths[:, None]
    embeds = torch.cat([prompt.embeds, reader.embed_words(ids).to(prompt.embeds.dtype)], 1)
    mask = torch.cat([prompt.mask, there], 1)
    told, states, _ = reader.speak(embeds, mask, states=count + 1, logits=count + 1 if logits else 1)
    return Written(states[:, 1:], ids, lengths, states[:, 0], told if logits else None)


@torch.no_grad()
def write(
    reader: SmallReader,
    prompt: Prompt,
    *,
    stop: int,
    most: int,
    counts: Callable[[Tensor], Tensor] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> Written:
    """The model's own captions, likeliest word after likeliest word, all segments side by side on a cache.

    Args:
        stop: the word that ends a caption; never the first one. most: words of a caption.
        counts: of the state before the first word: words of each caption [M], exactly; it then goes on past its stop.
            None: up to its stop.
        anyone: whether any rank goes on, given whether this one does: where a model's weights are split over ranks, all
            of them have to take the same number of steps.
    """
    with reader.settled():
        logits, states, cache = reader.speak(prompt.embeds, prompt.mask, states=1, logits=1, caching=True)
        before, mask = states[:, 0], prompt.mask
        wanted = None if counts is None else counts(before)
        ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        lengths = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        ids, kept = [], []
        while True:
            scores = logits[:, -1].float()
            if wanted is not None or not ids:
                scores = scores.index_fill(1, torch.tensor([stop], device=scores.device), -torch.inf)
            word = scores.argmax(-1)
            ended = ended | (word == stop) | (len(ids) >= (most if wanted is None else wanted.clamp(max=most)))
            if not anyone(not bool(ended.all())):
                break
            lengths = lengths + ~ended
            ids.append(word.masked_fill(ended, stop))
            mask = torch.cat([mask, ~ended[:, None]], 1)
            following = reader.embed_words(ids[-1][:, None]).to(prompt.embeds.dtype)
            logits, states, cache = reader.speak(following, mask, states=1, logits=1, cache=cache, caching=True)
            kept.append(states)
    return Written(torch.cat(kept, 1), torch.stack(ids, 1), lengths, before)


def sketch(
    reader: SmallReader,
    prompt: Prompt,
    queries: Tensor,
    *,
    stop: int,
    counts: Callable[[Tensor], Tensor] | None = None,
) -> Written:
    """All words at once, at learned queries [n, D]: query k stands for word k, and the first that means `stop` ends the
    caption (never the first one); `counts` as of `write`."""
    count = len(queries)
    embeds = torch.cat([prompt.embeds, queries.to(prompt.embeds.dtype).expand(len(prompt.mask), -1, -1)], 1)
    mask = pad(prompt.mask, (0, count), value=True)
    logits, states, _ = reader.speak(embeds, mask, states=count + 1, logits=count)
    ids = logits.detach().argmax(-1)
    if counts is None:
        ends = pad(ids == stop, (0, 1), value=True).long()
        ends[:, 0] = 0
        lengths = ends.argmax(1)
    else:
        lengths = counts(states[:, 0].detach()).clamp(1, count)
    return Written(states[:, 1:], ids, lengths, states[:, 0], logits)


def learn(
    written: Written, words: Sequence[Sequence[int]], *, stop: int, most: int, head: LengthHead | None = None
) -> Learned:
    """What the target captions `words` teach the model that wrote, or read, `written` with logits.

    An empty caption is none; of those above `most` words the first ones are learned, and no stop.
    """
    assert written.logits is not None
    width, device = written.logits.shape[1], written.logits.device
    rows = [list(row[:most]) + [stop] * (len(row) <= most) if row else [] for row in words]
    rows = [row[:width] + [IGNORED] * (width - len(row)) for row in rows]
    labels = torch.tensor(rows, device=device)
    logits = written.logits.float().flatten(0, 1)
    counted = (labels != IGNORED).sum().clamp(min=1)
    nll = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / counted
    hits = (written.logits.argmax(-1) == labels).sum() / counted
    told = torch.tensor([len(row) for row in words], device=device)
    described, length = (told > 0).float(), None
    few = described.sum().clamp(min=1)
    if head is not None:
        target = told.clamp(1, most).float().log()
        length = (smooth_l1_loss(head(written.before), target, reduction="none") * described).sum() / few
    cut = (told > most).float().sum() / few
    return Learned(nll, hits, length, told.sum() / few, cut, described.mean())


def caption_ids(encode: Callable[[str], list[int]], request: str, caption: str) -> list[int]:
    """Ids of a caption as it follows the request."""
    text = caption.strip()
    if not text:
        return []
    text = text if not request or request[-1].isspace() else f" {text}"
    alone, whole = encode(request), encode(request + text)
    # some tokenizers mark the start of every text they are given: a caption is what follows the request
    return whole[len(alone) :] if whole[: len(alone)] == alone else encode(text)


def segment_captions(captions: Sequence[Any], begins: Sequence[float], ends: Sequence[float]) -> list[str]:
    """What is told of each stretch of time: the captions that lie in it for at least half of it or of themselves.

    captions: {start_s, end_s, text}; one without times, or a string, belongs to all stretches.
    """
    out = []
    for begin, end in zip(begins, ends):
        told = []
        for entry in captions:
            entry = entry if isinstance(entry, dict) else {"text": entry}
            start, stop = entry.get("start_s"), entry.get("end_s")
            start, stop = (begin if start is None else start), (end if stop is None else stop)
            shared = min(end, stop) - max(begin, start)
            if shared > 0 and 2 * shared >= min(end - begin, stop - start) - 1e-6:
                told.append(str(entry.get("text") or "").strip())
        out.append(" ".join(text for text in told if text))
    return out
