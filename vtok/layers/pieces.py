"""Tokens of many frames of many clips, made packed, put together as one ragged batch with one nesting order per clip.

    pieces (packed rows of tokens: of a frame, a window, a clip) --by time--> sequences   --cut to a budget--> Tokens
                                                                 --by importance--> rank

Any number of tokens from 1 to all of a clip's can be kept, and every number is reached exactly: the order goes level by
level (each frame's most important token, then each frame's second ...), inside a level from frame to frame in steps of
the golden ratio, so that the frames of any prefix are spread evenly over the clip.

Letters: B clips, T frames, M packed rows, n tokens of a row, P tokens of a batch, K tokens per clip, G groups, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.types import Budget, Tokens

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Piece:
    """Packed rows of tokens, n of each row's frame (or of its whole clip: frame -1, before all frames).

    embeddings: [M, n, D]. clip, frame: [M] int64. positions: [M, n, 3] as in `Tokens`.
    level: [M, n] or [n] int64, importance, 0 first; tokens of a row share no level with one another.
    keep: [M, n] bool, tokens that exist; None: all.
    """

    embeddings: Tensor
    clip: Tensor
    frame: Tensor
    positions: Tensor
    level: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of some pieces go. Every field is [P], a clip's tokens side by side, in time order.

    source: index into the pieces' tokens laid end to end. clip, frame, group, rank: as in `Piece` and `Tokens`.
    turn: place in the nesting order of the whole clip. rank is the order of turns inside a group.
    """

    source: Tensor
    clip: Tensor
    frame: Tensor
    turn: Tensor
    group: Tensor
    rank: Tensor


def spread_order(count: int, device: torch.device | None = None) -> Tensor:
    """[count] int64: when each of `count` places is taken, so that any first few lie evenly. Of two places, the one
    that is taken first is the same in any row that has both."""
    at = torch.arange(count, dtype=torch.float64, device=device)
    return (at * GOLDEN).frac().argsort(stable=True).argsort(stable=True)


def spread_grid(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """[h * w] int64, raster order: when each place of a grid is taken; any first few lie evenly in both directions.

    Steps are powers of 1 / 1.3247 (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    height, width = grid
    y = torch.arange(height, dtype=torch.float64, device=device)[:, None] * 0.7548776662466927
    x = torch.arange(width, dtype=torch.float64, device=device) * 0.5698402909980532
    return (y + x).frac().flatten().argsort(stable=True).argsort(stable=True)


def _sorted_by(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, equal ones by the second, and so on."""
    order = keys[-1].argsort(stable=True)
    for key in reversed(keys[:-1]):
        order = order[key[order].argsort(stable=True)]
    return order


def _place_inside(bins: Tensor, order: Tensor) -> Tensor:
    """[P] int64: place of each item among those of its bin; `order` sorts items by bin first."""
    sizes = torch.bincount(bins, minlength=1)
    begins = sizes.cumsum(0) - sizes
    place = torch.empty_like(order)
    place[order] = torch.arange(len(bins), device=bins.device) - begins[bins[order]]
    return place


def arrange(pieces: list[Piece], *, frames: int, groups: Tensor | None = None) -> Layout:
    """The tokens of all pieces in time order, those of one frame in the order of `pieces`, ranked.

    Args:
        frames: T. groups: [B, T] int64, the group of each frame, from 0 in time order; tokens of whole clips are then
            group 0 and all others one further. None: a clip is one group.
    """
    rows = []
    for lane, piece in enumerate(pieces):
        slot = torch.arange(piece.embeddings.shape[1], device=piece.clip.device)
        keep = torch.ones_like(slot) if piece.keep is None else piece.keep.long()
        columns = (piece.clip[:, None], piece.frame[:, None], torch.full_like(slot, lane), slot, piece.level, keep)
        rows.append(torch.stack([c.expand(piece.embeddings.shape[:2]) for c in columns], -1).flatten(0, 1))
    table = torch.cat(rows)
    source = table[:, 5].nonzero()[:, 0]
    clip, frame, lane, slot, level, _ = table[source].unbind(1)
    order = _sorted_by(clip, frame, lane, slot)
    source, clip, frame, lane, slot, level = (x[order] for x in (source, clip, frame, lane, slot, level))
    later = (frame >= 0).long()  # tokens of whole clips come first
    spread = torch.cat([spread_order(frames, clip.device), clip.new_zeros(1)])[frame]
    importance = (later, level, spread, lane, slot)
    turn = _place_inside(clip, _sorted_by(clip, *importance))
    if groups is None:
        return Layout(source, clip, frame, turn, torch.zeros_like(clip), turn)
    whole = torch.zeros(len(groups), dtype=torch.int64, device=clip.device)
    whole[clip[frame < 0]] = 1
    group = torch.where(frame < 0, 0, groups[clip, frame.clamp_min(0)] + whole[clip])
    bins = clip * (int(group.max()) + 1 if len(group) else 1) + group
    return Layout(source, clip, frame, turn, group, _place_inside(bins, _sorted_by(bins, *importance)))


def kept(layout: Layout, *, batch: int, most: int, budget: Budget | None) -> Tensor:
    """[P] bool: the tokens within `most` of each clip and within the budget, in the nesting order.

    An int budget is met exactly by every clip that has as many tokens.
    Raises: ValueError for a budget outside 1 to `most`, or one per group of another shape than [B, G].
    """
    inside = layout.turn < most
    if budget is None:
        return inside
    if isinstance(budget, Tensor):
        shape = (batch, int(layout.group[inside].max()) + 1 if len(layout.group) else 1)
        if budget.shape != shape or budget.is_floating_point() or int(budget.min()) < 0:
            raise ValueError(f"budget is {budget.dtype} {list(budget.shape)}, expected int64 {list(shape)}, 0 or more")
        return inside & (layout.rank < budget.to(layout.rank.device)[layout.clip, layout.group.clamp(max=shape[1] - 1)])
    if not 1 <= budget <= most:
        raise ValueError(f"budget={budget} is out of range: this model gives 1 to max_tokens={most} tokens of a clip")
    return inside & (layout.turn < budget)


def gather_tokens(
    pieces: list[Piece], layout: Layout, keep: Tensor, *, lengths: Tensor, seconds: Tensor | None
) -> Tokens:
    """The tokens where `keep` [P] is True, as a padded batch.

    lengths: [B] frames of each clip. seconds: [B, T] of the frames: a group's times are those of its first and last
    frame, with or without tokens kept; of the clip's where it holds tokens of the whole clip.
    """
    batch = len(lengths)
    chosen = keep.nonzero()[:, 0]
    clip, source = layout.clip[chosen], layout.source[chosen]
    counts = torch.bincount(clip, minlength=batch)
    column = torch.arange(len(clip), device=clip.device) - (counts.cumsum(0) - counts)[clip]
    longest = max(int(counts.max()), 1)

    def padded(values: Tensor, fill: float) -> Tensor:
        out = values.new_full((batch, longest, *values.shape[1:]), fill)
        return out.index_put((clip, column), values)

    embeddings = torch.cat([p.embeddings.flatten(0, 1) for p in pieces])
    positions = torch.cat([p.positions.flatten(0, 1) for p in pieces])
    return Tokens(
        embeddings=padded(embeddings[source], 0),
        lengths=counts,
        positions=padded(positions[source].to(embeddings), torch.nan),
        group=padded(layout.group[chosen], 0),
        rank=padded(layout.rank[chosen], 0),
        times=None if seconds is None else _group_times(layout, seconds, lengths),
    )


def _group_times(layout: Layout, seconds: Tensor, lengths: Tensor) -> Tensor:
    """[B, G, 2] first and last second of each group; groups without tokens hold 0."""
    batch, count = len(seconds), int(layout.group.max()) + 1 if len(layout.group) else 1
    where, whole = layout.clip * count + layout.group, layout.frame < 0
    out = seconds.new_zeros(batch * count, 2)
    for side, (how, edge) in enumerate((("amin", torch.zeros_like(lengths)), ("amax", lengths - 1))):
        frame = torch.where(whole, edge[layout.clip], layout.frame)
        out[:, side] = out[:, side].scatter_reduce(0, where, seconds[layout.clip, frame], how, include_self=False)
    return out.unflatten(0, (batch, count))
