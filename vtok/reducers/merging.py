"""Reducers that merge neighbours in space, in time or in likeness: pooling, ToMe, STTM, ApET.

Letters: B clips, T frames, N patches of a frame, h, w its grid, n = T * N, D width, K tokens of the clip that gets
most, M tokens before a pass, R levels of a quadtree.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor

from vtok.reducers.patches import Patches, compact, deciding, lowest_threshold, means, nearest, top, unit
from vtok.types import Budget, Features, Tokens, share


def pooling(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    frames: int = 0,
) -> Tokens:
    """Average pooling to a coarser grid in time and space: the control that no table should lack. O(n D).

    Spans of frames, rows of these, cells of a row, each as even as can be: T' spans share K out evenly (the remainder
    to the earliest), a span's h' rows share its tokens in the same way. Where K = T' h' w' with equal parts this is
    plain pooling of that kernel; else some rows have one cell more, and the number of tokens is exact all the same.
    T' / T is about h' / h and w' / w; `frames` sets T' instead (raised to K / N, lowered to the clip's and to K).
    """
    with deciding(features):
        p = Patches.of(features, budget)
        source = torch.full(p.valid.shape, -1, dtype=torch.int64)
        for b, (length, keep) in enumerate(zip(p.frames.tolist(), p.keep.tolist())):  # plans only, on the host
            source[b, : length * p.size] = pooling_plan(length, *p.grid, keep, frames)
        source = source.to(p.vectors.device)
    return p.merged(source)


@lru_cache(maxsize=256)
def pooling_plan(length: int, h: int, w: int, keep: int, frames: int = 0) -> Tensor:
    """[length * h * w] int64: which of `keep` cells takes each patch, in time order."""
    spans = frames or round(length * (keep / (length * h * w)) ** (1 / 3))
    spans = min(max(spans, -(-keep // (h * w)), 1), length, keep)
    out, begin = torch.empty(length, h, w, dtype=torch.int64), 0
    for t, tokens in enumerate(share(keep, spans)):
        rows = round((tokens * h / w) ** 0.5)
        rows = min(max(rows, -(-tokens // w), 1), h, tokens)
        cell = torch.empty(h, w, dtype=torch.int64)
        for y, columns in enumerate(share(tokens, rows)):
            cell[_span(y, rows, h)] = begin + torch.arange(w) * columns // w
            begin += columns
        out[_span(t, spans, length)] = cell
    return out.flatten()


def _span(i: int, parts: int, size: int) -> slice:
    """Part i of `size` things cut into even parts: those with floor(thing * parts / size) == i."""
    return slice(-(-i * size // parts), -(-(i + 1) * size // parts))


def merge_down(x: Tensor, labels: Tensor, number: Tensor, keep: Tensor) -> Tensor:
    """Bipartite soft matching of the means of groups until each clip has `keep` of them: new labels [B, n].

    Groups are numbered in time order. In a pass those of even number look for the one of odd number most like them, the
    most alike pairs merge, half of all groups at most.

    Args:
        x: [B, n, D]. labels: [B, n] in [0, number) or -1. number, keep: [B], keep <= number.
    """
    while bool((number > keep).any()):
        most = int(number.max())
        group = means(x, labels, most)[0]
        group = torch.nn.functional.pad(unit(group), (0, 0, 0, most % 2))
        even, odd = group[:, 0::2], group[:, 1::2]
        index = torch.arange(even.shape[1], device=x.device)
        bias = torch.zeros(odd.shape[:2], device=x.device).masked_fill(2 * index + 1 >= number[:, None], -torch.inf)
        alike, to = nearest(even, odd, bias)
        merges = torch.minimum(number - keep, number // 2)
        goes = top(alike.masked_fill(2 * index >= number[:, None], -torch.inf), merges)
        target = torch.stack([torch.where(goes, 2 * to + 1, 2 * index), (2 * index + 1).expand_as(to)], -1).flatten(1)
        stays = torch.stack([~goes, torch.ones_like(goes)], -1).flatten(1)
        place = (stays.cumsum(1) - 1).gather(1, target)
        labels = torch.where(labels < 0, -1, place.gather(1, labels.clamp(min=0)))
        number = number - merges
    return labels


def tome(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    keys: bool = False,
) -> Tokens:
    """Pairs of tokens most alike merge, pass after pass. O(n^2 D / 4) in the first, 4 times less in each later one.

    Token merging by bipartite soft matching (Bolya et al. 2022, https://arxiv.org/abs/2210.09461), after the tower
    rather than inside it: min(M - K, M / 2) pairs a pass, over the whole clip. What is compared are the patches, or the
    tower's attention keys (the paper's choice, all heads side by side instead of their mean) with `keys`.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        metric = p.vectors
        if keys:
            if features.keys is None:
                raise ValueError("reducer 'tome': keys=True needs Features.keys; ask the tower for them, or keys=False")
            metric = features.keys.detach().float().flatten(1, 2).masked_fill(~p.valid[..., None], 0.0)
        labels = torch.where(p.valid, p.index, -1)
        source = merge_down(metric, labels, p.valid.sum(1), p.keep)
    return p.merged(source)


def sttm(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    gap: float = 0.3,
    steps: int = 16,
) -> Tokens:
    """Quadtrees of each frame, whose like cells merge with those of the frame before. O(n D R^2).

    STTM (Hyun et al. 2025, https://arxiv.org/abs/2507.07990), at the input of the LLM instead of at a layer of it: a
    cell of the mean pyramid (down to a side of 2; the first row or column of an odd side stays alone) is split unless
    its cosine to each child reaches a threshold; cells of neighbouring frames of which one contains the other are
    linked when their cosine reaches a second one, and what is linked becomes one mean.

    The paper tunes both thresholds for each model, data set and budget. Here the temporal one lies `gap` below the
    spatial one, which is bisected to the lowest that leaves K tokens at least; pairs most alike are then merged (as in
    `tome`) down to K. All clips at once: trees are levels of a pyramid, links are followed by label propagation.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        similar, across, first = quadtree(p)

        def left(threshold: Tensor) -> Tensor:
            return linked(p, similar, across, first, threshold, gap)[1]

        threshold = lowest_threshold(left, p.keep, -1.01, 1.01 + max(gap, 0.0), steps=steps)
        labels, number = compact(linked(p, similar, across, first, threshold, gap)[0], p.valid)
        source = merge_down(p.vectors, labels, number, p.keep)
    return p.merged(source)


def _parents(size: int) -> Tensor:
    """[size] int64: the cell of the next level above each cell of a side; of an odd side the first stays alone."""
    return (torch.arange(size) + size % 2) // 2


def quadtree(p: Patches) -> tuple[Tensor, Tensor, Tensor]:
    """Three things by level (0 = patches), all told at the patches.

    similar: [B, T, R, N], the smallest cosine of the cell around a patch to a child of it, inf at level 0.
    across: [R, R, B, T - 1, N], the cosine of the cell of a frame at one level to that of the next frame at another.
    first: [R, N], the first patch of the cell.
    """
    (h, w), device = p.grid, p.vectors.device
    rows, columns = [torch.arange(h)], [torch.arange(w)]
    while min(int(rows[-1].max()), int(columns[-1].max())) >= 2:
        for side in (rows, columns):
            side.append(_parents(int(side[-1].max()) + 1)[side[-1]])
    cells, firsts = [], []
    for row, column in zip(rows, columns):
        cell = (row[:, None] * (int(column.max()) + 1) + column).flatten().to(device)
        cells.append(cell)
        spots = torch.full((int(cell.max()) + 1,), p.size, device=device)
        firsts.append(spots.scatter_reduce(0, cell, torch.arange(p.size, device=device), "amin")[cell])
    x = p.by_frame(p.vectors).flatten(0, 1)  # [B * T, N, D]
    at = [unit(means(x, c.expand(len(x), -1), int(c.max()) + 1)[0])[:, c] for c in cells]
    similar = [torch.full(x.shape[:2], torch.inf, device=device)]
    for above, below, cell in zip(at[1:], at, cells[1:]):
        cosine, index = (above * below).sum(-1), cell.expand(len(x), -1)
        worst = torch.full_like(cosine, torch.inf).scatter_reduce(1, index, cosine, "amin")
        similar.append(worst.gather(1, index))
    framed = [a.unflatten(0, (-1, p.steps)) for a in at]
    across = torch.stack([torch.stack([(a[:, :-1] * b[:, 1:]).sum(-1) for b in framed]) for a in framed])
    return torch.stack(similar, 1).unflatten(0, (-1, p.steps)), across, torch.stack(firsts)


def linked(
    p: Patches, similar: Tensor, across: Tensor, first: Tensor, threshold: Tensor, gap: float
) -> tuple[Tensor, Tensor]:
    """The first patch of the group of each patch [B, n] at one spatial threshold a clip, and the groups' number [B]."""
    levels = similar.shape[2]
    ok = similar.flip(2) >= threshold[:, None, None, None]
    leaf = levels - 1 - ok.to(torch.int8).argmax(2)  # the coarsest level that is not split, [B, T, N]
    node = first.expand(*leaf.shape[:2], -1, -1).gather(2, leaf[:, :, None])[:, :, 0]
    node = (node + torch.arange(p.steps, device=node.device)[:, None] * p.size).flatten(1)
    cosine = across.flatten(0, 1).gather(0, (leaf[:, :-1] * levels + leaf[:, 1:])[None])[0]
    real = p.by_frame(p.valid)[:, 1:]
    link = ((cosine >= threshold[:, None, None] - gap) & real).flatten(1)
    earlier, later = node[:, : link.shape[1]], node[:, p.size :]
    labels = node
    while True:
        low = torch.minimum(labels.gather(1, earlier), labels.gather(1, later))
        low = torch.where(link, low, labels.shape[1])
        new = labels.scatter_reduce(1, earlier, low, "amin").scatter_reduce(1, later, low, "amin")
        new = new.gather(1, new)
        if torch.equal(new, labels):
            break
        labels = new
    labels = labels.gather(1, node)
    return labels, ((labels == p.index) & p.valid).sum(1)


def apet(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    basis: int = 10,
) -> Tokens:
    """The patches that a small basis explains worst, and the basis; dropped ones join the nearest. O(n (basis + K) D).

    ApET (Ma et al. 2026, https://arxiv.org/abs/2602.19870), at the input of the LLM only: the basis is found by
    farthest-point sampling (from the patch farthest from the mean), every patch is fitted by least squares (with a
    ridge of 1e-5 of the largest squared length in the basis), and what has the largest error is kept. Dropped patches
    are averaged into the most similar kept one outside the basis.
    Basis patches stand at their own places (the released code writes them over others'), and half of the tokens at
    most are of the basis, so that a budget below 20 keeps the start of it.
    """
    if basis < 1:
        raise ValueError(f"reducer 'apet': basis={basis} must be 1 at least")
    with deciding(features):
        p = Patches.of(features, budget)
        chosen = _farthest_points(p.vectors, p.valid, basis)  # [B, k], a clip's own come first
        size = torch.minimum(p.valid.sum(1), torch.full_like(p.keep, chosen.shape[1]))
        own = torch.arange(chosen.shape[1], device=chosen.device) < size[:, None]
        b = p.vectors.gather(1, chosen[..., None].expand(-1, -1, p.vectors.shape[-1])) * own[..., None]
        gram = b @ b.transpose(1, 2)
        ridge = 1e-5 * (gram.diagonal(dim1=1, dim2=2).amax(1) + 1e-12)[:, None, None]
        fitted = torch.linalg.solve(gram + ridge * torch.eye(len(b[0]), device=b.device), b @ p.vectors.transpose(1, 2))
        error = (p.vectors - fitted.transpose(1, 2) @ b).norm(dim=-1).masked_fill(~p.valid, -torch.inf)
        kept_basis = torch.minimum(size, p.keep // 2)
        counts = torch.arange(chosen.shape[1], device=chosen.device) < kept_basis[:, None]
        in_basis = torch.zeros_like(p.index).expand_as(p.valid).scatter_reduce(1, chosen, counts.long(), "amax") > 0
        worst = top(error.masked_fill(in_basis, -torch.inf), p.keep - kept_basis)
        kept = worst | in_basis
        place = torch.where(kept, kept.cumsum(1) - 1, -1)
        order = p.picks(worst)
        x = unit(p.vectors)
        bias = torch.zeros_like(order, dtype=x.dtype).masked_fill(~worst.gather(1, order), -torch.inf)
        to = order.gather(1, nearest(x, x.gather(1, order[..., None].expand(-1, -1, x.shape[-1])), bias)[1])
        source = torch.where(kept, place, place.gather(1, to)).masked_fill(~p.valid, -1)
    return p.merged(source, score=error.gather(1, p.picks(kept)))


def _farthest_points(x: Tensor, valid: Tensor, count: int) -> Tensor:
    """[B, min(count, n)] int64: each next patch is the one farthest from those before; the first, from the mean."""
    rows, out = torch.arange(len(x), device=x.device), []
    distance = (x - x.sum(1, keepdim=True) / valid.sum(1)[:, None, None]).square().sum(-1)
    free = valid.clone()
    for step in range(min(count, x.shape[1])):
        at = distance.masked_fill(~free, -torch.inf).argmax(1)
        out.append(at)
        free[rows, at] = False
        new = (x - x[rows, at][:, None]).square().sum(-1)
        distance = new if step == 0 else torch.minimum(distance, new)
    return torch.stack(out, 1)
