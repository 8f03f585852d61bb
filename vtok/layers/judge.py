"""What a small language model says of a segment, in the very pass that compresses it, or what its words do: one score
each.

    frames, question, "... Yes or No:"   q_1 ... q_n
                                   |-- state here --Judge--> score

As Tempo (2026, https://arxiv.org/abs/2604.08120) has it: the state that comes before the first query would predict the
answer's first word, so a score costs no pass of its own; one without queries where queries begin from what they are to
keep (`queries=pooled`), since the score decides how many there are. `WordMatch` needs no pass at all.

Letters: B clips, G segments of a clip, M segments of the batch, Q questions about its clips, S patches of a segment,
W words of a question, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.relevance import word_similarity, yes_no
from vtok.types import Features, Tokens

JUDGED = ("yes_no", "learned")  # of ata.score: what a judge tells
SPELLINGS = ((" Yes", " No"), ("Yes", "No"), (" yes", " no"), ("yes", "no"))


@dataclass
class JudgeConfig:
    """How the small model is asked, where `ata.score` is yes_no."""

    ask: str = "\nDoes this segment help to answer that? Yes or No:"  # follows the question
    yes: list[int] | None = None  # ids that such answers begin with; None = read off the tokenizer
    no: list[int] | None = None


class Judge(nn.Module):
    """Scores [M] float32 of the states [M, D] before the first query.

    yes_no: log-odds of "yes" by the language model's own output map, whose rows are kept here and do not learn.
    learned: a linear map that begins at 0, so that all segments are equal before it has learned.
    """

    rows: Tensor

    def __init__(self, width: int, *, kind: str, yes: Sequence[int] = (), no: Sequence[int] = ()):
        super().__init__()
        self.count = len(yes)
        self.out = nn.Linear(width, 1) if kind == "learned" else None
        if self.out is None:
            if not yes or not no:
                raise ValueError("model.judge.yes and no are open: they are read off the tokenizer when a run begins")
            self.register_buffer("rows", torch.zeros(len(yes) + len(no), width))
        else:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def take_rows(self, output: Tensor, ids: Sequence[int]) -> None:
        """Rows of the language model's output map [V, D]."""
        self.rows.copy_(output[list(ids)])

    def forward(self, states: Tensor) -> Tensor:
        if self.out is not None:
            return self.out(states.to(self.out.weight.dtype)).squeeze(-1).float()
        ids = list(range(len(self.rows)))
        return yes_no(states, self.rows, yes=ids[: self.count], no=ids[self.count :])


class WordMatch(nn.Module):
    """Scores [M] float32: how well patches [M, S, in_dim] of a tower meet the words of a question [M, W, width]
    (`word_similarity`): patches seen through a learned map, words weighed by another, at a learned scale.

    Late interaction, as ColBERT's. The map is the scores' own: what a language model reads well of a patch need not
    lie near the words for what it shows, and teaching scores is not to change what is read. Weights begin equal, the
    scale at 1 / 0.07; it stays below 100, as CLIP's (Radford et al. 2021, https://arxiv.org/abs/2103.00020).
    """

    def __init__(self, width: int, *, in_dim: int):
        super().__init__()
        self.look = nn.Linear(in_dim, width)
        self.weigh = nn.Linear(width, 1, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # DeepSpeed has no parameters without a dimension
        nn.init.zeros_(self.weigh.weight)

    def forward(self, patches: Tensor, words: Tensor, *, mask: Tensor, real: Tensor) -> Tensor:
        """mask: [M, S] bool, real patches. real: [M, W] bool, real words; a segment without any has 0."""
        even = F.layer_norm(words.to(self.weigh.weight.dtype), words.shape[-1:])
        weights = self.weigh(even)[..., 0].float().masked_fill(~real, -1e4).softmax(-1)
        looked = self.look(patches.to(self.look.weight.dtype))
        alike = word_similarity(looked, words, mask=mask, real=real, weights=weights)
        return self.log_scale.float().exp().clamp(max=100.0) * alike


def segment_scores(
    match: Callable[..., Tensor], shown: Features, words: Tensor, *, real: Tensor, rows: Sequence[int], window: int
) -> Tensor:
    """[Q, G]: how well the segments of clips meet questions about them; 0 where there is no segment.

    Args:
        match: a `WordMatch`, or `word_similarity`; called once. shown: of B clips. words: [Q, W, D]. real: [Q, W] bool.
        rows: the clip of each question. window: frames of a segment.
    """
    patches = F.pad(shown.patches, (0, 0, 0, 0, 0, -shown.patches.shape[1] % window)).unflatten(1, (-1, window))
    at = torch.arange(patches.shape[1] * window, device=patches.device).view(-1, window, 1)
    inside = (at < shown.count()[:, None, None, None]).expand(patches.shape[:4])  # [B, G, window, N]
    asked = torch.as_tensor(list(rows), device=patches.device)
    there = inside[asked].flatten(3).any(3).any(2)  # [Q, G]
    mask = inside[asked].flatten(2) | ~there[..., None]  # what does not exist is looked at, and its score left out
    count = patches.shape[1]
    found = match(
        patches[asked].flatten(2, 3).flatten(0, 1),
        words.repeat_interleave(count, 0),
        mask=mask.flatten(0, 1),
        real=real.repeat_interleave(count, 0),
    )
    return found.unflatten(0, (-1, count)).masked_fill(~there, 0)


def first_ids(encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """(ids that begin "yes", ids that begin "no") in any spelling; encode: text -> ids.

    A spelling whose two words begin alike (with a space of its own, say) tells nothing and is left out.
    Raises: ValueError where that leaves none.
    """
    yes, no = [], []
    for pair in SPELLINGS:
        one, other = (encode(word) for word in pair)
        if one and other and one[0] != other[0]:
            yes.append(one[0])
            no.append(other[0])
    yes, no = list(dict.fromkeys(yes)), list(dict.fromkeys(no))
    if not yes or set(yes) & set(no):
        raise ValueError("ata.score=yes_no: the tokenizer's ids do not tell yes from no; choose ata.score=learned")
    return yes, no


@dataclass(frozen=True)
class Scored(Tokens):
    """Tokens of segments that have scores [B, G], -inf where there is no segment."""

    scores: Tensor | None = None


def with_scores(tokens: Tokens, scores: Tensor | None, segments: Tensor) -> Tokens:
    """The tokens, with the scores [B, G] of their segments where there are any. segments: [B] of each clip."""
    if scores is None:
        return tokens
    there = torch.arange(scores.shape[1], device=scores.device) < segments[:, None]
    own = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    return Scored(**own, scores=scores.masked_fill(~there, -torch.inf))


def by_clip(values: Tensor, there: Tensor) -> Tensor:
    """Values of packed segments [M] as those of each clip's [B, G]; there: [B, G] bool, M of them True; 0 elsewhere."""
    return values.new_zeros(there.shape).index_put(there.nonzero(as_tuple=True), values)
