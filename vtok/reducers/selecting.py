"""Reducers that keep some of the patches as they are and drop the others.

Letters: B clips, T frames, N patches of a frame, h, w its grid, n = T * N, D width, K tokens asked.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor

from vtok.reducers.patches import BLOCK, Patches, allocate, deciding, lowest_threshold, spread, top, uniforms, unit
from vtok.types import Budget, Features, Tokens


def random(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    seed: int | Tensor = 0,
) -> Tokens:
    """Patches drawn evenly without replacement: the control that every table needs. O(n log n).

    With a generator each clip draws its own places, a batch what its clips one by one would; without one the places are
    those of `seed`, one for all clips or one for each ([B] int64), whatever it is batched with.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        drawn = uniforms(generator, *p.valid.shape, seed=seed, like=p.vectors)
        score = drawn.masked_fill(~p.valid, -torch.inf)
        chosen = top(score, p.keep)
    return p.selected(chosen, score)


@lru_cache(maxsize=64)
def farthest_first(h: int, w: int) -> Tensor:
    """[h * w] int64: the cells of a grid so that the first k are spread over it for every k, from the centre on.

    Each next cell is the one farthest from those before (of equals the first), in a picture of sides 1. Few cells lie
    farther apart so than in the quasirandom order that learned tokens have (`vtok.layers.pieces.spread_grid`), which
    begins in a corner; that one is in trained models.
    """
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], -1).double()
    distance = -(place - 0.5).square().sum(-1)  # the first is the most central one
    out = []
    for step in range(h * w):
        out.append(int(distance.argmax()))
        new = (place - place[out[-1]]).square().sum(-1)
        distance = new if step == 0 else torch.minimum(distance, new)
        distance[out[-1]] = -torch.inf
    return torch.tensor(out)


def uniform(
    features: Features, *, budget: Budget, prompt: list[str] | None = None, generator: Generator | None = None
) -> Tokens:
    """Whole frames, evenly spaced in time: the control for methods that look at what is in them. O(n).

    ceil(K / N) frames stand in the middles of as many equal spans of the clip. If K is no multiple of N, the middle one
    of them gives what is left, patches spread over its grid.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        whole = -(-p.keep // p.size)
        frame = p.frame.expand_as(p.valid)
        # the first span whose middle, floor((2 i + 1) L / (2 whole)), is not before this frame
        nth = (2 * frame * whole[:, None] + p.frames[:, None] - 1) // (2 * p.frames[:, None])
        nth = nth.minimum(whole[:, None] - 1)
        middle = (2 * nth + 1) * p.frames[:, None] // (2 * whole[:, None])
        order = torch.empty(p.size, dtype=torch.int64)
        order[farthest_first(*p.grid)] = torch.arange(p.size)
        order = order.to(frame.device).repeat(p.steps).expand_as(frame)
        partial = p.keep - (whole - 1) * p.size
        allowed = torch.where(nth == whole[:, None] // 2, partial[:, None], p.size)
        chosen = p.valid & (frame == middle) & (order < allowed)
    return p.selected(chosen, -order.float())


def divprune(
    features: Features, *, budget: Budget, prompt: list[str] | None = None, generator: Generator | None = None
) -> Tokens:
    """The most diverse patches: greedy max-min of the cosine distance. O(n^2 D + n K D).

    DivPrune (Alvar et al. 2025, https://arxiv.org/abs/2503.02175): first the patch whose nearest other one is farthest
    away, then always the one farthest from all kept. Any budget keeps a prefix of what a larger one keeps.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        x = unit(p.vectors)
        taken = ~p.valid
        order = torch.zeros_like(p.index).expand_as(taken).clone()
        distance = _nearest_other(x, p.valid)
        rows = torch.arange(len(x), device=x.device)
        for step in range(p.most):
            best = distance.masked_fill(taken, -torch.inf).argmax(1)
            order[rows, best] = torch.where(taken[rows, best], order[rows, best], p.index.numel() - step)
            taken[rows, best] = True
            away = 1 - torch.bmm(x, x[rows, best][..., None])[..., 0]
            distance = away if step == 0 else torch.minimum(distance, away)
        chosen = p.valid & top(order, p.keep)
    return p.selected(chosen, order.float())


def _nearest_other(x: Tensor, valid: Tensor) -> Tensor:
    """[B, n]: cosine distance of each of x [B, n, D] to the nearest other valid one (1 where there is none)."""
    itself = torch.arange(x.shape[1], device=x.device)
    block = max(1, BLOCK // max(1, x.shape[0] * x.shape[1]))
    out = []
    for rows in itself.split(block):
        near = torch.bmm(x[:, rows], x.transpose(1, 2)).masked_fill(~valid[:, None], -torch.inf)
        near[:, torch.arange(len(rows), device=x.device), rows] = -torch.inf
        out.append(near.amax(-1))
    near = torch.cat(out, 1)
    return torch.where(near.isinf(), 1.0, 1 - near)


def dart(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    pivots: int = 8,
    keys: bool = False,
) -> Tokens:
    """A few pivots, and for each the patches that repeat it least. O(n D pivots + pivots n log n).

    DART (Wen et al. 2025, https://arxiv.org/abs/2502.11494), at the input of the LLM instead of inside it: the pivots
    are the patches with the largest L1 norm (of their keys with `keys`), all visual, where the paper's stand at a layer
    of the LLM and are partly words; each then takes the patches with the lowest cosine to it that no pivot took before,
    the remainder of (K - pivots) / pivots going to the first ones.
    """
    if pivots < 1:
        raise ValueError(f"reducer 'dart': pivots={pivots} must be 1 at least")
    with deciding(features):
        p = Patches.of(features, budget)
        x = unit(p.vectors)
        norm = p.vectors.abs().sum(-1)
        if keys:
            if features.keys is None:
                raise ValueError("reducer 'dart': keys=True needs Features.keys; ask the tower for them, or keys=False")
            norm = features.keys.detach().float().abs().sum(-1).flatten(1)
        number = p.keep.clamp(max=pivots)
        score = norm.masked_fill(~p.valid, -torch.inf)
        order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :pivots]
        chosen = top(score, number)
        importance = torch.where(chosen, 2.0, -torch.inf)
        for i in range(order.shape[1]):
            share = ((p.keep - number) // number + (i < (p.keep - number) % number)) * (i < number)
            pivot = x.gather(1, order[:, i, None, None].expand(-1, 1, x.shape[-1]))
            different = 1 - torch.bmm(x, pivot.transpose(1, 2))[..., 0]
            new = top(different.masked_fill(chosen | ~p.valid, -torch.inf), share)
            importance = torch.where(new, different - 2.0, importance)  # below the pivots
            chosen = chosen | new
    return p.selected(chosen, importance)


def change(p: Patches) -> Tensor:
    """[B, T, N]: cosine distance of each patch to the one at its place a frame earlier.

    In frame 0, which has none, to the mean of the frame: its plain ground changes least.
    """
    x = p.by_frame(unit(p.vectors))
    before = torch.cat([unit(p.by_frame(p.vectors)[:, :1].mean(2, keepdim=True)).expand_as(x[:, :1]), x[:, :-1]], 1)
    return 1 - (x * before).sum(-1)


def evs(
    features: Features, *, budget: Budget, prompt: list[str] | None = None, generator: Generator | None = None
) -> Tokens:
    """Frame 0, and the patches of all later frames that changed most since the frame before. O(n D).

    Efficient Video Sampling (Bagrov et al. 2025, https://arxiv.org/abs/2510.14624), on features, one quota for the
    whole clip. The paper never keeps fewer than the N patches of frame 0; here, below N tokens, frame 0 competes with
    the others by the distance of its patches to their mean.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        score = change(p).flatten(1).masked_fill(~p.valid, -torch.inf)
        first = (p.frame == 0) & (p.keep >= p.size)[:, None]
        chosen = top(torch.where(first, score + 4.0, score), p.keep)
    return p.selected(chosen, score)


def dtd(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    mode: str = "relative",
    reference: str = "previous",
) -> Tokens:
    """Frame 0, and in every later frame the patches that differ most from what was there before. O(n D).

    Differential Token Drop of TimeChat-Online (Yao et al. 2025, https://arxiv.org/abs/2504.17343), on features.

    Args:
        mode: "relative" keeps the same share of each later frame. "absolute" drops what is nearer than a threshold,
            which is bisected to the highest cosine that leaves K tokens at least; of these the nearest ones go.
        reference: "previous" frame, as in the paper, or "last_kept", the patch last kept at that place, which slow
            drift leaves behind at last ("absolute" only).

    Below N tokens frame 0 competes, as in `evs`; "absolute" with "previous" then is `evs`.
    """
    if mode not in ("relative", "absolute") or reference not in ("previous", "last_kept"):
        raise ValueError(
            f"reducer 'dtd': mode={mode!r}, reference={reference!r}; choose relative or absolute, previous or last_kept"
        )
    if mode == "relative" and reference == "last_kept":
        raise ValueError(
            "reducer 'dtd': reference='last_kept' needs mode='absolute': a share per frame has no threshold"
        )
    with deciding(features):
        p = Patches.of(features, budget)
        score = change(p)
        whole = p.keep >= p.size
        if mode == "relative":
            later = spread(p.keep - p.size, (p.frames - 1).clamp(min=1), p.steps)
            later = torch.cat([torch.full_like(later[:, :1], p.size), later[:, :-1]], 1)
            quota = torch.where(whole[:, None], later, spread(p.keep, p.frames, p.steps))
            chosen = top(score, quota).flatten(1)
        else:
            if reference == "last_kept":
                score = _since_kept(p, score, whole)
            score = score.masked_fill(~p.by_frame(p.valid), -torch.inf)
            first = (p.frame == 0) & whole[:, None]
            chosen = top(torch.where(first, score.flatten(1) + 4.0, score.flatten(1)), p.keep)
    return p.selected(chosen, score.flatten(1))


def _since_kept(p: Patches, score: Tensor, whole: Tensor) -> Tensor:
    """[B, T, N]: distance to the patch last kept at that place, at the lowest similarity threshold that leaves K."""
    x, valid = p.by_frame(unit(p.vectors)), p.by_frame(p.valid)

    def follow(threshold: Tensor) -> tuple[Tensor, Tensor]:
        away = score.clone()
        kept = torch.zeros_like(valid)
        kept[:, 0] = whole[:, None] | (1 - score[:, 0] <= threshold[:, None])
        last = x[:, 0]
        for t in range(1, p.steps):
            away[:, t] = 1 - (x[:, t] * last).sum(-1)
            kept[:, t] = (1 - away[:, t] <= threshold[:, None]) & valid[:, t]
            last = torch.where(kept[:, t, :, None], x[:, t], last)
        return away, kept

    low = lowest_threshold(lambda t: follow(t)[1].flatten(1).sum(1), p.keep, -1.1, 1.1, steps=20)
    away, kept = follow(low)
    return away + 2.0 * kept  # what the threshold dropped comes after what it kept


def dycoke(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    window: int = 4,
) -> Tokens:
    """In every window of frames the first whole, of the others what changed. O(n D).

    Temporal token merging of DyCoke (Tao et al. 2025, https://arxiv.org/abs/2411.15024), its first stage: in windows of
    4 frames, frame 1 is compared with 0, 3 with 2, 2 with 0, place by place, and each keeps the same share of what
    differs most. That share follows from K. Where the windows' first frames alone are more than K, windows grow until
    they fit (frame i is compared with i - 1 if i is odd, else i - 2); below N tokens there is one window and its first
    frame gives its even share too, the patches farthest from its mean.
    """
    if window < 1:
        raise ValueError(f"reducer 'dycoke': window={window} must be 1 at least")
    with deciding(features):
        p = Patches.of(features, budget)
        fits = (p.keep // p.size).clamp(min=1)
        wide = torch.maximum(-(-p.frames // fits), torch.full_like(p.frames, window))[:, None]
        step = torch.arange(p.steps, device=wide.device)
        phase = step % wide
        x = p.by_frame(unit(p.vectors))
        back = torch.where(phase % 2 == 1, 1, torch.where(phase > 0, 2, 0))
        before = x.gather(1, (step - back)[..., None, None].expand_as(x))
        score = torch.where((step == 0)[:, None], change(p), 1 - (x * before).sum(-1))
        base = (phase == 0) & (step < p.frames[:, None]) & (p.keep >= p.size)[:, None]
        rest = ((step < p.frames[:, None]) & ~base).long()
        quota = allocate(p.keep - base.sum(1) * p.size, rest, rest * p.size) + base * p.size
        quota = torch.where((p.keep < p.size)[:, None], spread(p.keep, p.frames, p.steps), quota)
        chosen = top(score, quota).flatten(1)
    return p.selected(chosen, score.flatten(1))


def vidcom2(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    temperature: float = 0.01,
) -> Tokens:
    """More patches from frames unlike the rest of the video, in each those unlike the frame and the video. O(n D).

    VidCom2 (Liu et al. 2025, https://arxiv.org/abs/2505.14454): over the half of the channels that varies least, a
    patch's sameness is the sum of five Gaussians of its distance to the video's centre and to its frame's; the least
    same are kept. A frame's share of K is proportional to 1 + p - mean(p), p the softmax over frames of their mean
    distinctness / temperature. The paper rounds each frame's number; here the largest remainders make up K exactly.
    """
    if temperature <= 0:
        raise ValueError(f"reducer 'vidcom2': temperature={temperature} must be above 0")
    with deciding(features):
        p = Patches.of(features, budget)
        total = p.valid.sum(1)[:, None]
        centre = p.vectors.sum(1) / total
        variance = ((p.vectors - centre[:, None]) * p.valid[..., None]).square().sum(1)
        half = torch.argsort(variance, dim=1, stable=True)[:, : max(1, p.vectors.shape[-1] // 2)]
        x = unit(p.vectors.gather(2, half[:, None].expand(-1, p.vectors.shape[1], -1)))
        to_video = _sameness(x, x.sum(1, keepdim=True) / total[..., None])
        frames = p.by_frame(x)
        to_frame = _sameness(frames, frames.mean(2, keepdim=True)).flatten(1)
        real = p.features.mask.to(x.device)
        distinct = -p.by_frame(to_video).mean(-1)
        shares = (distinct / temperature).masked_fill(~real, -torch.inf).softmax(1)
        weight = (1 + shares - 1 / p.frames[:, None]) * real
        quota = allocate(p.keep, weight, real * p.size)
        score = -(to_video + to_frame)
        chosen = top(p.by_frame(score), quota).flatten(1)
    return p.selected(chosen, score)


def _sameness(x: Tensor, centre: Tensor) -> Tensor:
    squared = (x - centre).square().sum(-1)
    return sum((torch.exp(-squared / (2 * 2.0**power)) for power in range(-3, 2)), torch.zeros_like(squared))
