"""Tokens of the segments of many clips, made in one packed batch, as `Tokens`: a group for each segment.

Letters: B clips, G segments of a clip, M segments of the batch, n tokens made of a segment, K tokens per clip, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.types import Tokens


def fair_shares(lengths: Tensor, totals: Tensor) -> Tensor:
    """[B, G] int64: as many tokens of each segment as fit into a clip's total, none above what it has.

    Short segments keep all; long ones are cut to one length, what is left going to the earliest of them. A larger total
    takes no token from any segment.

    Args:
        lengths: [B, G] int64, tokens that each segment has. totals: [B] int64.
    """
    level = torch.arange(int(lengths.max()) + 1, device=lengths.device)
    sums = torch.minimum(lengths[..., None], level).sum(1)  # [B, levels], rising
    at = (sums <= totals[:, None]).sum(1) - 1
    kept = torch.minimum(lengths, at[:, None])
    left = totals - kept.sum(1)
    longer = lengths > kept
    return kept + (longer & (longer.cumsum(1) <= left[:, None])).long()


def segment_ends(times: Tensor, there: Tensor, *, frames: Tensor | None = None) -> Tensor:
    """[B, G] float64: seconds at which segments end: where the next one begins, the last one with its last frame, which
    is on show as long as the frame before it was.

    A clip's only segment ends by its own frames, at twice its length where their number is not known; one of a single
    frame never ends: nobody knows how long that is on show.

    Args:
        times: [B, G, 2] seconds, first and last frame of each segment. there: [B, G] bool, segments that there are.
        frames: [B, G] int64, frames of each.
    """
    begin, final = times.double().unbind(-1)
    following = torch.cat([begin[:, 1:], begin[:, -1:]], 1)
    last = torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], 1).logical_not()
    own = final - begin
    alone = own if frames is None else own / (frames - 1).clamp(min=1)
    alone = torch.where(own > 0, alone, torch.inf)
    gap = torch.cat([alone[:, :1], (begin[:, 1:] - final[:, :-1]).clamp(min=0)], 1)
    return torch.where(last, final + gap, following)


def segment_tokens(made: Tensor, kept: Tensor, groups: Tensor, *, times: Tensor | None = None) -> Tokens:
    """The first tokens of each segment, segment after segment.

    Args:
        made: [M, n, D], the segments of each clip side by side, in time order. kept: [B, G] int64, tokens of each
            segment, 0 past a clip's own. groups: [B] int64, segments of each clip. times: [B, G, 2] seconds.
    """
    segments, count = made.shape[:2]
    clip = torch.repeat_interleave(torch.arange(len(groups), device=made.device), groups, output_size=segments)
    place = torch.arange(segments, device=made.device) - (groups.cumsum(0) - groups)[clip]
    rank = torch.arange(count, device=made.device)
    keep = rank < kept[clip, place][:, None]
    lengths = kept.sum(1)
    begin = (kept.cumsum(1) - kept)[clip, place]
    row = clip[:, None].expand_as(keep)[keep]
    column = (begin[:, None] + rank)[keep]
    shape = (len(groups), max(int(lengths.max()), 1))

    def padded(values: Tensor, fill: float) -> Tensor:
        return values.new_full((*shape, *values.shape[2:]), fill).index_put((row, column), values[keep])

    middle = ((place + 0.5) / groups[clip]).to(made)[:, None, None].expand(-1, count, 1)
    positions = torch.cat([middle, middle.new_full((*middle.shape[:2], 2), torch.nan)], -1)
    return Tokens(
        embeddings=padded(made, 0),
        lengths=lengths,
        positions=padded(positions, torch.nan),
        group=padded(place[:, None].expand_as(keep), 0),
        rank=padded(rank.expand_as(keep), 0),
        times=times,
    )
