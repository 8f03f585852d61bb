"""Reducers that follow the attention inside the tower, frame by frame.

Letters: B clips, T frames, N patches of a frame, h, w its grid, n = T * N, D width.
"""

from __future__ import annotations

import torch
from torch import Generator

from vtok.reducers.patches import Patches, attention_of, deciding, nearest, ranks, required, spread, top, unit
from vtok.types import Budget, Features, Tokens


def visionzip(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    dominant: float = 0.84,
    match: str = "keys",
    layer: int | None = None,
) -> Tokens:
    """In each frame the patches with the most attention, and means of the others around evenly spaced ones. O(n N D).

    VisionZip (Yang et al. 2024, https://arxiv.org/abs/2412.04467): `dominant` of a frame's tokens (54 of 64 in the
    paper) are its patches with the most attention; from the rest, targets are taken at even steps, and every other
    patch joins the target whose keys are most like its own.

    Needs Features.attention (`layer`; None: the first one asked) and Features.keys; match="patches" compares the
    patches instead. A contextual token is the mean of target and what joined it: the released code adds both, which
    doubles its length. Frames share K evenly; one with no token is dropped, and so is the rest of a frame that has
    dominant tokens only.
    """
    if match not in ("keys", "patches") or not 0 <= dominant <= 1:
        raise ValueError(f"reducer 'visionzip': match={match!r}, dominant={dominant}; choose keys or patches, [0, 1]")
    received = attention_of(features, layer, "visionzip")
    metric = features.patches.detach().float()
    if match == "keys":
        metric = required(features.keys, "keys", "visionzip", "ask the tower for them (keys=True), or match='patches'")
    with deciding(features):
        p = Patches.of(features, budget)
        quota = spread(p.keep, p.frames, p.steps)
        main = torch.where(quota == 1, quota, (quota * dominant + 0.5).floor().long())
        first = top(received, main)  # [B, T, N]
        rest, number = (~first).cumsum(-1) - 1, (p.size - main)[..., None]
        count = (quota - main)[..., None]
        # the i-th of `count` targets is number floor(i * rest / count) of the rest
        nth = (rest * count + number - 1) // number.clamp(min=1)
        target = ~first & (nth < count) & (nth * number // count.clamp(min=1) == rest)
        x = unit(metric).flatten(0, 1)
        bias = torch.zeros(x.shape[:2], device=x.device).masked_fill(~target.flatten(0, 1), -torch.inf)
        to = nearest(x, x, bias)[1].unflatten(0, received.shape[:2])
        kept = (first | target).flatten(1)
        place = torch.where(kept, kept.cumsum(1) - 1, -1)
        to = (to + torch.arange(p.steps, device=to.device)[:, None] * p.size).flatten(1)
        joins = ~kept & p.valid & (count > 0).expand_as(received).flatten(1)
        source = torch.where(joins, place.gather(1, to), place)
        score = received.flatten(1).gather(1, p.picks(kept))
    return p.merged(source, score=score)


def hiprune(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    anchors: float = 0.1,
    object_layer: int | None = None,
    last_layer: int | None = None,
) -> Tokens:
    """In each frame what a middle layer attends to, its neighbours, and what the last layer attends to. O(n log n).

    HiPrune (Liu et al. 2025, https://arxiv.org/abs/2508.00553): round(anchors * k / 5) of a frame's k tokens are the
    patches with the most attention in the object layer, those beside, above and below them come with them, and the
    patches with the most attention in the last layer make up k.

    Needs Features.attention of two layers (None: the first and the last of those asked). Frames share K evenly.
    """
    if not 0 <= anchors <= 1:
        raise ValueError(f"reducer 'hiprune': anchors={anchors} must lie in [0, 1]")
    if features.attention is not None and len(features.attention) < 2 and object_layer is None:
        raise ValueError(
            f"reducer 'hiprune' needs the attention of an object layer and of the last one, these features have "
            f"{list(features.attention)}: ask the tower for two layers, or name object_layer and last_layer"
        )
    middle = attention_of(features, object_layer, "hiprune")
    last = attention_of(features, last_layer, "hiprune", which=-1)
    with deciding(features):
        p = Patches.of(features, budget)
        quota = spread(p.keep, p.frames, p.steps)
        anchor = top(middle, (anchors * quota / 5).round().long())
        grid = anchor.unflatten(-1, p.grid)
        around = grid.clone()
        around[..., 1:, :] |= grid[..., :-1, :]
        around[..., :-1, :] |= grid[..., 1:, :]
        around[..., :, 1:] |= grid[..., :, :-1]
        around[..., :, :-1] |= grid[..., :, 1:]
        # anchors before buffers before the rest, each by its attention: a rank is below the number of patches
        kind = 2 * anchor.long() + around.flatten(-2).long()
        place = torch.where(kind == 0, ranks(last), ranks(middle))
        score = (kind * p.size - place).flatten(1).float()
        chosen = top(p.by_frame(score), quota).flatten(1)
    return p.selected(chosen, score)
