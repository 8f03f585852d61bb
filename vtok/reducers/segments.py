"""Reducers that cut a video into segments first, and in each treat what stands still and what moves differently.

    frames --segments--> static places: one mean over the segment      --density peaks--> tokens
                         other patches: one by one, frame by frame     --density peaks, attention--> tokens

Letters: B clips, T frames, N patches of a frame, n = T * N, D width, K tokens of the clip that gets most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vtok.reducers.clustering import level, peaks
from vtok.reducers.merging import merge_down
from vtok.reducers.patches import (
    Patches,
    allocate,
    attention_of,
    compact,
    counts,
    deciding,
    lowest_threshold,
    means,
    nearest,
    required,
    spread,
    top,
    unit,
)
from vtok.types import Budget, Features, Tokens


@dataclass(frozen=True)
class Parts:
    """What is left once static places are means over their segment: survivors, in two parts a frame.

    slot: [B, n], the survivor that takes each patch, named by its own place: a static one stands in the first frame of
    its segment. vectors: [B, n, D] of survivors. static, moving: [B, T, N], whether a survivor of that kind is there.
    """

    slot: Tensor
    vectors: Tensor
    static: Tensor
    moving: Tensor

    @classmethod
    def of(cls, p: Patches, segment: Tensor, still: Tensor) -> Parts:
        """segment: [B, T], the first frame of each frame's segment. still: [B, T, N], the same within a segment."""
        place = torch.arange(p.size, device=segment.device)
        own = p.index.unflatten(0, (p.steps, p.size))
        slot = torch.where(still, segment[..., None] * p.size + place, own).flatten(1)
        slot = torch.where(p.valid, slot, -1)
        first = segment == torch.arange(p.steps, device=segment.device)
        real = p.features.mask.to(first.device)[..., None]
        vectors = means(level(p), slot, p.index.numel())[0]
        return cls(slot, vectors, still & first[..., None] & real, ~still & real)

    def sizes(self) -> Tensor:
        """[B, 2 T]: survivors of each part, the static ones of each frame before the moving ones."""
        return torch.cat([self.static.sum(-1), self.moving.sum(-1)], 1)


def _clustered(p: Patches, parts: Parts, kind: Tensor, quota: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Density peaks in the parts of one kind: the survivor that each survivor joins [B, n], and which are centres.

    kind: [B, T, N], `static` or `moving`. quota: [B, T], centres in each part; a part with none joins nothing (-1).
    """
    batch, steps = quota.shape
    x, inside = p.by_frame(parts.vectors).flatten(0, 1), kind.flatten(0, 1)  # sets [B * T, N, D]
    centre = top(peaks(x, inside, neighbours)[1], quota.flatten())
    bias = (-0.5 * x.square().sum(-1)).masked_fill(~centre, -torch.inf)
    to = torch.where(centre, torch.arange(p.size, device=x.device), nearest(x, x, bias)[1])
    to = (to.unflatten(0, (batch, steps)) + torch.arange(steps, device=x.device)[:, None] * p.size).flatten(1)
    joins = (kind & (quota > 0)[..., None]).flatten(1)
    return torch.where(joins, to, -1), centre.unflatten(0, (batch, steps)).flatten(1)


def _runs(changes: Tensor) -> Tensor:
    """[B, T] int64: the first frame of the segment of each frame; changes [B, T - 1] is True where a new one begins."""
    step = torch.arange(1, changes.shape[1] + 1, device=changes.device)
    begin = torch.where(changes, step, 0)
    return torch.cat([torch.zeros_like(begin[:, :1]) if begin.shape[1] else begin.new_zeros(len(begin), 1), begin], 1)


def prunevid(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    threshold: float = 0.8,
    segment_ratio: float = 0.25,
    neighbours: int = 7,
) -> Tokens:
    """Clusters of the static and of the moving patches of each segment. O((T N^2 + T^2) D).

    PruneVid (Huang et al. 2024, https://arxiv.org/abs/2412.16117), its first stage: density peaks among the frames'
    means give segment_ratio * T segments; a place is static if the mean cosine between its patches in a segment is
    above `threshold`, and becomes their mean; the static part of a segment and the moving part of each frame are then
    clustered by density peaks and averaged.

    A run of frames of one cluster is a segment. The parts share K in proportion to their sizes, small ones too, where
    the paper halves parts of more than 14 tokens; with fewer tokens than parts each part is one and those most alike
    are merged (as in `tome`). Where fewer than K tokens are left before clustering, the threshold rises until K are.
    """
    if not 0 < segment_ratio <= 1:
        raise ValueError(f"reducer 'prunevid': segment_ratio={segment_ratio} must be above 0 and 1 at most")
    with deciding(features):
        p = Patches.of(features, budget)
        segment = _frame_clusters(p, segment_ratio, neighbours)
        static, saves = _static_similarity(p, segment)

        def left(limit: Tensor) -> Tensor:
            return p.valid.sum(1) - (saves * (static > limit[:, None, None])).sum((1, 2))

        limit = lowest_threshold(left, p.keep, threshold, 1.01, steps=20)
        parts = Parts.of(p, segment, static > limit[:, None, None])
        sizes = parts.sizes()
        floor = (sizes > 0).long()
        spare = (p.keep - floor.sum(1)).clamp(min=0)
        quota = floor + allocate(spare, sizes, sizes - floor)
        join = torch.full_like(p.valid, -1, dtype=torch.int64)
        for kind, share in zip((parts.static, parts.moving), quota.chunk(2, 1)):
            join = torch.maximum(join, _clustered(p, parts, kind, share, neighbours)[0])
        survivor, number = compact(join, join >= 0)
        survivor = merge_down(parts.vectors, survivor, number, p.keep)
        source = torch.where(p.valid, survivor.gather(1, parts.slot.clamp(min=0)), -1)
        inner = counts(parts.slot, p.index.numel()).gather(1, parts.slot.clamp(min=0))
        outer = counts(survivor, p.most).gather(1, source.clamp(min=0))
    return p.merged(source, weight=1 / (inner * outer).clamp(min=1))


def _frame_clusters(p: Patches, ratio: float, neighbours: int) -> Tensor:
    """[B, T]: first frame of each frame's segment, runs of equal density-peaks clusters of the frames' means."""
    real = p.features.mask.to(p.vectors.device)
    x = p.by_frame(level(p)).mean(2)
    centre = top(peaks(x, real, neighbours)[1], (p.frames * ratio).round().long().clamp(min=1))
    bias = (-0.5 * x.square().sum(-1)).masked_fill(~centre, -torch.inf)
    cluster = torch.where(centre, torch.arange(p.steps, device=x.device), nearest(x, x, bias)[1])
    return _first_of_run(cluster)


def _first_of_run(cluster: Tensor) -> Tensor:
    return _runs(cluster[:, 1:] != cluster[:, :-1]).cummax(1).values


def _static_similarity(p: Patches, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine between the patches of a place in its segment, -inf in segments of one frame: [B, T, N].

    From the length of their sum: |sum|^2 = m + m (m - 1) mean. Also what one mean for them saves, m - 1, told at the
    segment's first frame (0 elsewhere): [B, T, N] int64.
    """
    place = torch.arange(p.size, device=segment.device)
    slot = torch.where(p.valid, (segment[..., None] * p.size + place).flatten(1), -1)
    mean, number = means(unit(p.vectors), slot, p.index.numel())
    m = number.float()
    cosine = ((m * mean.square().sum(-1) - 1) / (m - 1).clamp(min=1)).masked_fill(number < 2, -torch.inf)
    return p.by_frame(cosine.gather(1, slot.clamp(min=0))), p.by_frame((number - 1).clamp(min=0))


def holitom(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    threshold: float = 0.65,
    neighbours: int = 7,
    centre_weight: float = 0.6,
    layer: int | None = None,
) -> Tokens:
    """Static places of the best windows of frames clustered, moving patches by attention. O(T N^2 D + T^2 N).

    HoliTom (Shao et al. 2025, https://arxiv.org/abs/2505.21334), its part outside the LLM. The clip is cut so that the
    sum over windows of static places x (frames - 1) is largest (dynamic programming), a place being static if the
    cosine of its patches to the next frame's is above `threshold` all through the window. Static places become means
    over the window and are clustered by density peaks, a token being centre_weight * centre + (1 - centre_weight) *
    mean of what joined it; of the moving patches of a frame those with the most attention are kept.

    Needs Features.attention (`layer`; None: the first one asked). All parts share K in proportion to their sizes. Where
    fewer than K tokens are left after static places are means, the threshold rises until K are.
    """
    if not 0 <= centre_weight <= 1:
        raise ValueError(f"reducer 'holitom': centre_weight={centre_weight} must lie in [0, 1]")
    received = attention_of(features, layer, "holitom")
    with deciding(features):
        p = Patches.of(features, budget)
        x = p.by_frame(unit(p.vectors))
        alike = (x[:, 1:] * x[:, :-1]).sum(-1).masked_fill(~p.features.mask.to(x.device)[:, 1:, None], -torch.inf)
        limit = lowest_threshold(
            lambda t: p.valid.sum(1) - _best_windows(alike, t)[2], p.keep, threshold, 1.01, steps=16
        )
        segment, still, _ = _best_windows(alike, limit)
        parts = Parts.of(p, segment, still)
        sizes = parts.sizes()
        static_share, moving_share = allocate(p.keep, sizes, sizes).chunk(2, 1)
        join, centre = _clustered(p, parts, parts.static, static_share, neighbours)
        seen = top(received.masked_fill(~parts.moving, -torch.inf), moving_share).flatten(1)
        join = torch.where(seen, p.index, join)
        centre = centre | seen
        survivor, _ = compact(join, join >= 0)
        source = torch.where(p.valid, survivor.gather(1, parts.slot.clamp(min=0)), -1)
        inner = counts(parts.slot, p.index.numel()).gather(1, parts.slot.clamp(min=0))
        others = counts(survivor, p.most).gather(1, source.clamp(min=0)) - 1
        joined = (1 - centre_weight) / others.clamp(min=1)
        weight = torch.where(centre.gather(1, parts.slot.clamp(min=0)), 1 - joined * others, joined) / inner
    return p.merged(source, weight=weight)


def _best_windows(alike: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows with the largest sum of static places x (frames - 1); of equals those with the later last cut.

    alike: [B, T - 1, N], cosine of each place to the next frame's. threshold: [B].
    Returns: the first frame of each frame's window [B, T], the static places [B, T, N], the sum [B].
    """
    batch, gaps, size = alike.shape
    holds = alike > threshold[:, None, None]
    steps = torch.arange(gaps + 1, device=alike.device)
    saved = torch.zeros(batch, gaps + 1, gaps + 1, dtype=torch.int64, device=alike.device)  # [b, first, last]
    all_through = torch.ones(batch, gaps + 1, size, dtype=torch.bool, device=alike.device)
    for length in range(1, gaps + 1):  # static from first to first + length
        all_through = all_through[:, :-1] & holds[:, length - 1 :]
        saved[:, steps[: gaps + 1 - length], steps[length:]] = all_through.sum(-1) * length
    best = [torch.zeros(batch, dtype=torch.int64, device=alike.device)]  # best[e]: of the frames before e
    cut = []
    for last in range(gaps + 1):
        total = torch.stack(best, 1) + saved[:, : last + 1, last]
        top_total = total.amax(1)
        cut.append(torch.where(total == top_total[:, None], steps[: last + 1], -1).amax(1))
        best.append(top_total)
    starts, at = torch.stack(cut, 1), torch.full((batch,), gaps, device=alike.device)
    segment = torch.zeros_like(starts)
    for frame in range(gaps, -1, -1):  # back from the end: `at` is the last frame of the window
        begin = starts.gather(1, at[:, None])[:, 0]
        segment[:, frame] = begin
        at = torch.where((begin == frame) & (frame > 0), frame - 1, at)
    return segment, _static_through(holds, segment), best[-1]


def _static_through(holds: Tensor, segment: Tensor) -> Tensor:
    """[B, T, N]: places whose similarity holds between all frames of the window of each frame, of two at least."""
    batch, gaps, size = holds.shape
    inside = segment[:, 1:] == segment[:, :-1]
    slot = segment[:, 1:, None].expand(-1, -1, size)
    broken = (~holds & inside[..., None]).long()
    number = torch.zeros(batch, gaps + 1, size, dtype=torch.int64, device=holds.device)
    broken = number.scatter_add(1, slot, broken)
    links = number.scatter_add(1, slot, inside[..., None].expand_as(holds).long())
    window = segment[..., None].expand(-1, -1, size)
    return ((broken == 0) & (links > 0)).gather(1, window)


def fastvid(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    segments: int = 8,
    threshold: float = 0.9,
    context: float = 0.4,
    period: int = 4,
    neighbours: int = 4,
    anchor_weight: float = 0.6,
    layer: int | None = None,
) -> Tokens:
    """Salient patches of all frames, and dense ones of anchor frames that take the others in. O(n N D + n K D).

    FastVID (Shen et al. 2025, https://arxiv.org/abs/2503.11187): the clip is cut at the segments - 1 lowest
    similarities of neighbouring frame vectors and at all below `threshold`. 1 - context of the tokens are the patches
    with the most attention, the same number in each frame; the others are density peaks of anchor frames, every
    `period`-th of a segment counted from its end. All other patches join the most similar of their segment's peaks, a
    token being w * peak + (1 - w) * mean of what joined it, w = max(1 / (1 + their number), anchor_weight).

    Needs Features.attention (`layer`; None: the first one asked) and Features.frame. The anchors' share is shared over
    segments by their frames; what anchor frames cannot hold goes to the patches with the next most attention.
    """
    if segments < 1 or period < 1 or not 0 <= context <= 1:
        raise ValueError(
            f"reducer 'fastvid': segments={segments}, period={period}, context={context}: the first two must be 1 at "
            f"least, context lies in [0, 1]"
        )
    received = attention_of(features, layer, "fastvid").flatten(1)
    frame = required(features.frame, "frame", "fastvid", "take a tower with a vector for each frame")
    with deciding(features):
        p = Patches.of(features, budget)
        real = p.features.mask.to(frame.device)
        alike = (unit(frame)[:, 1:] * unit(frame)[:, :-1]).sum(-1).masked_fill(~real[:, 1:], torch.inf)
        cuts = top(-alike, (p.frames - 1).clamp(max=segments - 1)) | (alike < threshold)
        segment = _runs(cuts).cummax(1).values
        length = counts(torch.where(real, segment, -1), p.steps).gather(1, segment)
        from_end = segment + length - 1 - torch.arange(p.steps, device=frame.device)
        anchor = real & (from_end % period == 0)
        number = counts(torch.where(anchor, segment, -1), p.steps).gather(1, segment)

        salient = torch.round(p.keep * (1 - context)).long()
        quota = spread(salient, p.frames, p.steps)
        received = received.masked_fill(~p.valid, -torch.inf)
        chosen = top(p.by_frame(received), quota)
        room = anchor * (p.size - quota)
        dense = torch.minimum(p.keep - salient, room.sum(1))
        dense = allocate(dense, anchor * length / number.clamp(min=1), room)
        x = p.by_frame(level(p)).flatten(0, 1)
        free = (~chosen & real[..., None]).flatten(0, 1)
        peak = top(peaks(x, free, neighbours)[1], dense.flatten()).unflatten(0, (-1, p.steps)).flatten(1)
        chosen = chosen.flatten(1)
        more = received.masked_fill(chosen | peak, -torch.inf)
        chosen = chosen | top(more, p.keep - chosen.sum(1) - peak.sum(1))

        kept = chosen | peak
        place = torch.where(kept, kept.cumsum(1) - 1, -1)
        order = p.picks(peak)
        own = peak.gather(1, order) if order.shape[1] else peak[:, :0]
        source = place
        if order.shape[1]:
            x, home = unit(p.vectors), segment.repeat_interleave(p.size, 1)
            bias = torch.zeros(order.shape, device=x.device).masked_fill(~own, -torch.inf)
            to = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
            best, at = nearest(x, to, bias, groups=(home, home.gather(1, order)))
            source = torch.where(kept | best.isinf(), place, place.gather(1, order.gather(1, at)))
            source = source.masked_fill(~p.valid, -1)
        joined = counts(source, p.most).gather(1, source.clamp(min=0)) - 1
        w = (1 / (1 + joined)).clamp(min=anchor_weight)
        w = torch.where(joined > 0, w, torch.ones_like(w))
        weight = torch.where(kept, w, (1 - w) / joined.clamp(min=1))
    return p.merged(source, weight=weight)
