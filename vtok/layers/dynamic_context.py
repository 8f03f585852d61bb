"""A static frame and what changes after it: the compressors that read single frames with a query-former.

    TDC        window:  [frame 0: its patches]  [frame 1: n queries]  [frame 2: n queries] ...
    dual path  frame:   [pooled patches, n queries over the frame and its neighbours]

TDC: temporal dynamic context (Hao et al. 2025, https://arxiv.org/abs/2504.10443). All frames of a batch go through the
query-former in one call, where the paper's code has a call for each window.

Letters: B clips, T frames, N patches, M packed frames, n queries, A audio tokens of a frame, L words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vtok.layers.frames import Frames, Rows, centres, pack, pool_grid, pool_shape
from vtok.layers.pieces import Piece, spread_grid, spread_order
from vtok.layers.resampler import Resampler

Words = tuple[Tensor, Tensor]  # [B, L, width] and [B, L] bool


@dataclass
class FormerConfig:
    """The query-former of single frames."""

    num_queries: int = 16  # tokens of a frame
    queries: str = "avgpool"  # avgpool (of the window's static frame) | learned
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    cross_every: int = 2  # every second block reads the frame
    residual: bool = True  # what it gives is added to the frame's own average pooling

    def __post_init__(self) -> None:
        if self.queries not in ("avgpool", "learned"):
            raise ValueError(f"former.queries={self.queries!r} is unknown; choose avgpool or learned")
        for name in ("num_queries", "depth", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"former.{name}={getattr(self, name)} must be at least 1")


@dataclass
class StaticConfig:
    """What becomes of the first frame of a window."""

    keep: str = (
        "all"  # all (its patches are tokens) | pool (averaged to `tokens`) | none (read by queries as others are)
    )
    tokens: int = 16  # `pool`

    def __post_init__(self) -> None:
        if self.keep not in ("all", "pool", "none"):
            raise ValueError(f"static.keep={self.keep!r} is unknown; choose all, pool or none")
        if self.tokens < 1:
            raise ValueError(f"static.tokens={self.tokens} must be at least 1")


@dataclass
class DualConfig:
    """Pooled tokens beside queries' tokens."""

    pooled: int = 4  # tokens of a frame by average pooling
    reach: int = 1  # frames before and after that the queries read as well
    former: FormerConfig = field(default_factory=FormerConfig)


class FrameFormer(nn.Module):
    """Packed frames' context -> [M, n, D]."""

    def __init__(self, dim: int, config: FormerConfig):
        super().__init__()
        self.config = config
        shape = dict(width=config.width, depth=config.depth, num_heads=config.num_heads, cross_every=config.cross_every)
        self.resampler = Resampler(dim, num_queries=config.num_queries, **shape)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        rows: Rows,
        own: Tensor,
        grid: tuple[int, int],
        words: Words | None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """queries: [M, n, D], content they begin with. context: [M, S, D]. own: [M, N, D], patches of the frames."""
        text, text_valid = (None, None) if words is None else (words[0][rows.clip], words[1][rows.clip])
        out = self.resampler(queries, context, valid=valid, text=text, text_valid=text_valid)
        if self.config.residual:
            out = out + pool_grid(own, grid, pool_shape(self.config.num_queries, grid))
        return out

    def level(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[n] which query comes first."""
        return spread_grid(pool_shape(self.config.num_queries, grid), device)


class DynamicContext(nn.Module):
    """Static frames as patches, all others as queries that begin as the pooled static frame and read their own.

    Args:
        separator: a learned token closes every frame, the last to be kept of all tokens.
    """

    def __init__(self, dim: int, *, former: FormerConfig, static: StaticConfig, separator: bool):
        super().__init__()
        self.static, self.former = static, FrameFormer(dim, former)
        learned = former.queries == "learned"
        self.queries = nn.Parameter(torch.randn(former.num_queries, dim)) if learned else None
        self.separator = nn.Parameter(torch.randn(dim)) if separator else None

    def forward(self, frames: Frames, words: Words | None, audio: Tensor | None) -> tuple[list[Piece], list[Piece]]:
        """audio: [B, T, A, D] or None. Returns: pieces made here, and those that are the projector's own patches."""
        patches, grid = frames.patches, frames.grid
        first = frames.windows.first
        static, moving = pack(first), pack(frames.mask if self.static.keep == "none" else frames.mask & ~first)
        made, plain = [], []
        if self.static.keep != "none":
            still = patches[static.clip, static.frame]
            shape = grid if self.static.keep == "all" else pool_shape(self.static.tokens, grid)
            _check_fits("static.tokens", shape, grid)
            tokens, level = pool_grid(still, grid, shape), spread_grid(shape, patches.device)
            plain.append(frames.piece(tokens, static, level, centres(shape, frames.time)))
            if audio is not None:
                heard = spread_order(audio.shape[2], patches.device) + len(level)
                made.append(frames.piece(audio[static.clip, static.frame], static, heard))
        own = patches[moving.clip, moving.frame]
        context = own if audio is None else torch.cat([own, audio[moving.clip, moving.frame]], 1)
        queries = self._queries(frames, static, moving)
        read = self.former(queries, context, moving, own, grid, words)
        made.append(frames.piece(read, moving, self.former.level(grid, patches.device)))
        if self.separator is not None:
            rows = pack(frames.mask)
            last = torch.full((1,), max(int(p.level.max()) for p in [*made, *plain]) + 1, device=patches.device)
            made.append(frames.piece(self.separator.expand(len(rows.clip), 1, -1), rows, last))
        return made, plain

    def _queries(self, frames: Frames, static: Rows, moving: Rows) -> Tensor:
        """[M, n, D] what the queries of each moving frame begin with."""
        if self.queries is not None:
            return self.queries.expand(len(moving.clip), -1, -1)
        shape = pool_shape(self.former.config.num_queries, frames.grid)
        pooled = pool_grid(frames.patches[static.clip, static.frame], frames.grid, shape)
        which = frames.windows.first.flatten().cumsum(0) - 1  # the static row of each frame
        return pooled[which[moving.clip * frames.patches.shape[1] + moving.frame]]


class DualPath(nn.Module):
    """Each frame: its patches averaged to a few tokens, then queries that read it and its neighbours, as EVE does."""

    def __init__(self, dim: int, config: DualConfig):
        super().__init__()
        if config.pooled < 1 or config.reach < 0:
            raise ValueError(f"dual_path.pooled={config.pooled} must be at least 1 and reach={config.reach} at least 0")
        self.config, self.former = config, FrameFormer(dim, config.former)
        learned = config.former.queries == "learned"
        self.queries = nn.Parameter(torch.randn(config.former.num_queries, dim)) if learned else None
        self.near = nn.Parameter(torch.randn(2 * config.reach + 1, dim) * 0.5)  # which neighbour a patch is of

    def forward(self, frames: Frames, words: Words | None, audio: Tensor | None) -> tuple[list[Piece], list[Piece]]:
        grid, rows = frames.grid, pack(frames.mask)
        own = frames.patches[rows.clip, rows.frame]
        shape = pool_shape(self.config.pooled, grid)
        _check_fits("dual_path.pooled", shape, grid)
        level = spread_grid(shape, own.device)
        pooled = pool_grid(own, grid, shape)
        near = torch.arange(-self.config.reach, self.config.reach + 1, device=own.device)
        index = rows.frame[:, None] + near
        there = (index >= 0) & (index < frames.lengths[rows.clip][:, None])
        context = frames.patches[rows.clip[:, None], index.clamp(0, frames.patches.shape[1] - 1)]
        context = (context + self.near[:, None]).flatten(1, 2)
        valid = there.repeat_interleave(own.shape[1], 1)
        if audio is not None:
            context = torch.cat([context, audio[rows.clip, rows.frame]], 1)
            valid = nn.functional.pad(valid, (0, audio.shape[2]), value=True)
        count = self.config.former.num_queries
        begin = pool_grid(own, grid, pool_shape(count, grid)) if self.queries is None else None
        queries = self.queries.expand(len(own), -1, -1) if begin is None and self.queries is not None else begin
        assert queries is not None
        read = self.former(queries, context, rows, own, grid, words, valid)
        return [frames.piece(read, rows, self.former.level(grid, own.device))], [
            frames.piece(pooled, rows, level, centres(shape, frames.time))
        ]


def _check_fits(key: str, shape: tuple[int, int], grid: tuple[int, int]) -> None:
    if shape[0] * shape[1] > grid[0] * grid[1]:
        raise ValueError(
            f"model.{key}={shape[0] * shape[1]} is more than the {grid[0] * grid[1]} patches of a frame of this tower"
        )
