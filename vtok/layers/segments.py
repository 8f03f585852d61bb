"""Where a video is cut into segments, from how alike neighbouring frames are; and windows inside segments.

    features --cosine of neighbours--> similarity [B, T-1] --topk | threshold | scene_tilling--> starts [B, T]
    lengths --fixed--> starts                               starts --> windows of a few frames, none across a cut

Whole batches of ragged clips at once: a cut depends on the clip's own real frames alone. Nothing here learns.

Letters: B clips, T frames (padded), N patches, D width. The gap i of a clip lies between its frames i and i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vtok.layers.unread import refuse_unread
from vtok.types import Features

SEGMENTERS = ("topk", "threshold", "scene_tilling", "fixed")


@dataclass
class SegmentConfig:
    """How clips are cut."""

    name: str = "topk"  # topk | threshold | scene_tilling | fixed
    of: str = "patches"  # patches (all of a frame as one vector) | frame (the tower's vector of the frame)
    most: int = 25  # segments of a clip at most; topk makes that many where there are as many frames
    threshold: float = 0.9  # `threshold`: cosine below which neighbours are cut apart
    alpha: float = 0.5  # `scene_tilling`: cut where a depth is above mean + alpha x deviation of the clip's depths
    min_depth: float = 0.0  # `scene_tilling`: and at least so deep; above 0, noise alone makes no cut in a still clip
    causal: bool = False  # `scene_tilling`: depths from the left and statistics of the past alone, for streams
    length: int = 8  # `fixed`: frames of a segment

    def __post_init__(self) -> None:
        if self.name not in SEGMENTERS:
            raise ValueError(f"segments.name={self.name!r} is unknown; choose one of {', '.join(SEGMENTERS)}")
        if self.of not in ("patches", "frame"):
            raise ValueError(f"segments.of={self.of!r} is unknown; choose patches or frame")
        for name in ("most", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"segments.{name}={getattr(self, name)} must be at least 1")
        if self.causal and self.name in ("topk",):
            raise ValueError(
                "segments.causal=true: topk compares all gaps of a clip; choose scene_tilling or threshold"
            )
        readers = {"threshold": "threshold", "alpha": "scene_tilling", "min_depth": "scene_tilling", "length": "fixed"}
        unread = [(key, f"segments.name={its}") for key, its in readers.items() if self.name != its]
        if self.name == "fixed":
            unread += [(key, "segmenters that look at frames, and fixed looks at none") for key in ("of", "causal")]
        refuse_unread(self, unread, where="segments")


class Windows(NamedTuple):
    """index: [B, T] int64, which window of the clip a frame lies in (in time order from 0; padding repeats the last).
    first: [B, T] bool, True on the first frame of a window; False on padding."""

    index: Tensor
    first: Tensor


def segment(features: Features, config: SegmentConfig) -> Tensor:
    """[B, T] bool: True on the first frame of every segment (frame 0 is one), False on padding."""
    lengths, frames = features.count(), features.patches.shape[1]
    if config.name == "fixed":
        return fixed_cuts(lengths, frames, length=config.length, most=config.most)
    similarity = neighbour_similarity(features, of=config.of)
    if config.name == "topk":
        return topk_cuts(similarity, lengths, most=config.most)
    if config.name == "threshold":
        return threshold_cuts(similarity, lengths, threshold=config.threshold, most=config.most)
    c = config
    return tilling_cuts(similarity, lengths, alpha=c.alpha, most=c.most, min_depth=c.min_depth, causal=c.causal)


@torch.no_grad()
def neighbour_similarity(features: Features, *, of: str = "patches") -> Tensor:
    """[B, T-1] cosine of each frame and the next, in float32 at least; 0 where one of them is padding."""
    if of == "frame":
        if features.frame is None:
            raise ValueError("segments.of='frame': these features have no frame vectors; choose patches")
        vectors = features.frame
    else:
        vectors = features.patches.flatten(2)
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    left, right = vectors[:, :-1], vectors[:, 1:]
    scale = (left.square().sum(-1) * right.square().sum(-1)).sqrt()
    cosine = (left * right).sum(-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return cosine.masked_fill(~features.mask[:, 1:], 0)


def _gaps(similarity: Tensor, lengths: Tensor) -> Tensor:
    """[B, T-1] bool: gaps between two real frames."""
    return torch.arange(similarity.shape[1], device=similarity.device) < (lengths - 1)[:, None]


def _starts(cuts: Tensor) -> Tensor:
    """Cuts at gaps [B, T-1] as starts [B, T]."""
    return torch.cat([torch.ones_like(cuts[:, :1]), cuts], 1) if cuts.shape[1] else cuts.new_ones(len(cuts), 1)


def _largest(score: Tensor, valid: Tensor, count: int) -> Tensor:
    """[B, T-1] bool: the `count` largest scores among `valid`, of equal ones the earlier."""
    order = score.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return valid & (rank < count)


def topk_cuts(similarity: Tensor, lengths: Tensor, *, most: int) -> Tensor:
    """[B, T] starts: cuts at the most - 1 gaps of least similarity, as in TDC (Hao et al. 2025,
    https://arxiv.org/abs/2504.10443). A clip of up to `most` frames has a segment for each frame."""
    return _starts(_largest(-similarity, _gaps(similarity, lengths), most - 1))


def threshold_cuts(similarity: Tensor, lengths: Tensor, *, threshold: float, most: int) -> Tensor:
    """[B, T] starts: cuts at the gaps below `threshold`; the first most - 1 of them, so that what comes later in a
    clip never moves an earlier cut."""
    cuts = _gaps(similarity, lengths) & (similarity < threshold)
    return _starts(cuts & (cuts.cumsum(1) < most))


def fixed_cuts(lengths: Tensor, frames: int, *, length: int, most: int) -> Tensor:
    """[B, T] starts: a segment every `length` frames; the last of `most` segments takes all that is left."""
    at = torch.arange(frames, device=lengths.device)
    return ((at % length == 0) & (at // length < most)) & (at < lengths[:, None])


def _climb(similarity: Tensor) -> Tensor:
    """[B, T-1] the peak that is reached from each gap to its left while similarity rises (itself where none does)."""
    if similarity.shape[1] < 2:
        return similarity
    at = torch.arange(similarity.shape[1], device=similarity.device).expand_as(similarity)
    rises = similarity[:, :-1] > similarity[:, 1:]  # seen from the right one of the two
    ends = torch.cat([torch.ones_like(rises[:, :1]), ~rises], 1)
    return similarity.gather(1, at.masked_fill(~ends, -1).cummax(1).values)


def tilling_cuts(
    similarity: Tensor, lengths: Tensor, *, alpha: float, most: int, min_depth: float = 0.0, causal: bool = False
) -> Tensor:
    """[B, T] starts: cuts in the valleys of similarity, SceneTilling (VideoLLaMB, Wang et al. 2024,
    https://arxiv.org/abs/2409.01071; depths as TextTiling's, Hearst 1997).

    The depth of a gap is how far similarity rises from it, without a fall, to the left plus how far to the right. Gaps
    deeper than mean + alpha x standard deviation of the clip's depths (and than `min_depth`) are cut, the deepest
    most - 1 of them.
    causal: the rise to the left alone, mean and deviation of the gaps so far, the first most - 1: whether there is a
    cut before a frame is known when that frame is, and frames to come change nothing.
    """
    valid = _gaps(similarity, lengths)
    values = similarity.masked_fill(~valid, -torch.inf)  # the right of the last gap is no rise
    rise = _climb(values) - values
    if not causal:
        rise = rise + _climb(values.flip(1)).flip(1) - values
    depth = torch.where(valid, rise, torch.zeros_like(rise))
    if causal:
        count = valid.cumsum(1).clamp_min(1)
        mean = depth.cumsum(1) / count
        deviation = (depth.square().cumsum(1) / count - mean.square()).clamp_min(0).sqrt()
        cuts = valid & (depth > (mean + alpha * deviation).clamp_min(min_depth))
        return _starts(cuts & (cuts.cumsum(1) < most))
    count = valid.sum(1, keepdim=True).clamp_min(1)
    mean = depth.sum(1, keepdim=True) / count
    deviation = (torch.where(valid, depth - mean, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    deep = valid & (depth > (mean + alpha * deviation).clamp_min(min_depth))
    return _starts(_largest(depth, deep, most - 1))


def windows(starts: Tensor, lengths: Tensor, *, length: int) -> Windows:
    """Segments in windows of `length` frames, the last one of a segment as long as what is left."""
    at = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    begin = at.masked_fill(~starts, -1).cummax(1).values
    first = ((at - begin) % length == 0) & (at < lengths[:, None])
    return Windows(first.cumsum(1) - 1, first)
