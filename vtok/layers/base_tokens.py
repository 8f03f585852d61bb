"""A few tokens of a segment that say what it looks like: averages over its frames and patches, or a query-former's.

They stand beside the soft captions of LangDC (https://arxiv.org/abs/2509.00969), which says what words say badly with
pooled patches of every frame; the former begins as those averages and reads all patches of the segment.

Letters: M segments, F frames of a segment (padded), N patches of a frame, n tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtok.layers.frames import bin_means, centres, place_code, pool_grid, pool_shape
from vtok.layers.projector import MLPProjector
from vtok.layers.resampler import Resampler

KINDS = ("", "pool", "former")


@dataclass
class BaseConfig:
    """Tokens of a segment beside its soft caption: `frames` x `patches` of them."""

    kind: str = ""  # "" = none | pool: averages | former: a query-former that begins from them
    frames: int = 1  # equally long stretches of a segment, each averaged over its frames
    patches: int = 16  # of a stretch, averaged over a grid
    width: int = 768  # of the former, as depth and num_heads
    depth: int = 4
    num_heads: int = 12

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            known = ", ".join(repr(kind) for kind in KINDS)
            raise ValueError(f"model.base.kind={self.kind!r} is unknown; choose one of {known}")
        for name in ("frames", "patches", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.base.{name}={getattr(self, name)} must be at least 1")

    @property
    def tokens(self) -> int:
        """Of a segment."""
        return self.frames * self.patches if self.kind else 0


class BaseTokens(nn.Module):
    """Patches of a tower as `config.tokens` vectors a segment, at the scale of words (`rms`)."""

    def __init__(self, config: BaseConfig, *, in_dim: int, dim: int, rms: float):
        super().__init__()
        self.config, self.rms = config, rms
        self.projector = MLPProjector(in_dim, dim, rms=rms)
        sizes = dict(width=config.width, depth=config.depth, num_heads=config.num_heads)
        former = config.kind == "former"
        self.former = Resampler(dim, num_queries=config.tokens, **sizes) if former else None

    def forward(self, patches: Tensor, grid: tuple[int, int], frames: Tensor) -> Tensor:
        """[M, n, D] of patches [M, F, N, in_dim], frames [M] of each real. Tokens lie in time order, then raster."""
        c = self.config
        seen = self.projector(patches)
        shape = pool_shape(c.patches, grid)
        pooled = pool_grid(seen.flatten(0, 1), grid, shape).unflatten(0, seen.shape[:2])
        edges = torch.linspace(0, 1, c.frames + 1, device=frames.device, dtype=torch.float64)
        means = bin_means(pooled.flatten(2), frames, edges[:-1], edges[1:])
        means = means.unflatten(2, pooled.shape[2:]).flatten(1, 2)
        if self.former is None:
            return means
        count, width = seen.shape[1], seen.shape[3]
        time = (torch.arange(count, device=seen.device, dtype=seen.dtype) + 0.5) / frames[:, None]
        places = centres(grid, seen)[None, None].expand(*seen.shape[:2], -1, -1)
        code = place_code(torch.cat([time[..., None, None].expand(*seen.shape[:3], 1), places], -1), width)
        there = torch.arange(count, device=frames.device) < frames[:, None]
        valid = there[:, :, None].expand(seen.shape[:3]).flatten(1)
        return means + self.rms * self.former(means / self.rms, (seen / self.rms + code).flatten(1, 2), valid=valid)
