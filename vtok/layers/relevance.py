"""How much each segment of a clip matters: for a question, or as news after what came before. Scores [B, G].

    word_similarity  cosine of the question's words and the segment's patches, in a language model's space, where a
                     projector leads to
    novelty          how unlike the frames of a segment are to every earlier frame; needs no question
    yes_no           what a language model says when it is asked whether a segment is relevant

Scores go to `vtok.budget.allocate_scores`. Those of a segment depend on no later one, so streams may use them.

Letters: B clips, T frames (padded), G segments (padded), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.types import Features


def word_similarity(
    patches: Tensor,
    words: Tensor,
    *,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """[M] in [-1, 1]: cosine of each word of a question with the patch of the segment most like it, averaged.

    As late interaction compares texts (ColBERT, Khattab & Zaharia 2020, https://arxiv.org/abs/2004.12832).

    Args:
        patches: [M, S, D] of M segments, as large as words. words: [M, W, D] embeddings of each segment's question.
        mask: [M, S] bool, real patches. real: [M, W] bool, real words; a segment without any has 0.
        weights: [M, W] of the words, with the sum 1; None: all real ones weigh the same.
    """
    mask = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device) if mask is None else mask
    real = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device) if real is None else real
    cosine = torch.einsum("msd,mwd->msw", F.normalize(patches.float(), dim=-1), F.normalize(words.float(), dim=-1))
    best = cosine.masked_fill(~mask[..., None], -torch.inf).amax(1).masked_fill(~real, 0)
    return best.sum(1) / real.sum(1).clamp(min=1) if weights is None else (best * weights).sum(1)


def novelty(features: Features, segments: Tensor, *, memory: int = 0, of: str = "mean") -> Tensor:
    """[B, G] in [0, 2]: 1 - the cosine of a frame and the earlier frame most like it; the first frame has 1.

    Args:
        segments: [B, T] int64, the segment each frame lies in. memory: earlier frames looked at; 0 = all.
        of: "mean" over the segment's frames, or "max".
    """
    frames = F.normalize(frame_vectors(features), dim=-1)
    at = torch.arange(frames.shape[1], device=frames.device)
    behind = at[:, None] - at  # [T, T]
    earlier = (behind > 0) & (behind <= (memory or frames.shape[1]))
    alike = torch.einsum("btd,bsd->bts", frames, frames).masked_fill(~earlier, -torch.inf).amax(-1)
    new = torch.where(at > 0, 1 - alike, 1.0).clamp(0, 2)
    return by_segment(new, segments, features.mask, of=of)


def yes_no(states: Tensor, head: Tensor, *, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """[...] log-odds of "yes": what `allocate_scores` takes as it is; a sigmoid makes a probability of it.

    Of several ids for a word (capitals, spaces) the probabilities are summed.

    Args:
        states: [..., D], last hidden states at the position that would predict the answer. head: [V, D], the output
            map of the language model. yes, no: ids.
    Raises: ValueError where a word has no id, or both have the same.
    """
    if not yes or not no or set(yes) & set(no):
        raise ValueError(f"yes={list(yes)}, no={list(no)}: each needs ids of its own")
    logits = states.float() @ head[[*yes, *no]].float().mT
    return logits[..., : len(yes)].logsumexp(-1) - logits[..., len(yes) :].logsumexp(-1)


def frame_vectors(features: Features) -> Tensor:
    """[B, T, D] float32: the tower's vector of each frame, or the mean of its patches where it gives none."""
    return (features.patches.mean(2) if features.frame is None else features.frame).float()


def by_segment(values: Tensor, segments: Tensor, mask: Tensor, *, of: str) -> Tensor:
    """Values of frames [B, T] as values of segments [B, G], G = the largest number of segments; 0 where there is none.

    Args:
        segments: [B, T] int64. mask: [B, T] bool, real frames. of: "mean" or "max".
    Raises: ValueError for another `of`.
    """
    if of not in ("mean", "max"):
        raise ValueError(f"of={of!r} is unknown; choose mean or max")
    where = segments.masked_fill(~mask, 0)
    count = int(where.max()) + 1
    filled = values.new_zeros(len(values), count).scatter_add(1, where, mask.to(values.dtype))
    if of == "mean":
        return values.new_zeros(len(values), count).scatter_add(1, where, values * mask) / filled.clamp(min=1)
    lowest = values.masked_fill(~mask, -torch.inf)
    most = values.new_full((len(values), count), -torch.inf).scatter_reduce(1, where, lowest, "amax")
    return torch.where(filled > 0, most, 0)
