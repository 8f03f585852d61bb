"""Chunks of video as sequences of space-time patches, padded to whole ones, and back.

Letters: M chunks, C channels, T frames, H height, W width, N patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtok.layers.chunked import Chunks
from vtok.layers.pyramid import coverage

Size3 = tuple[int, int, int] | list[int]


def pad_to_patches(video: Tensor, lengths: Tensor, *, patch: Size3, block_frames: int | None) -> Chunks:
    """[M, C, T, H, W] padded to whole patches, and to whole time blocks of `block_frames` unless that is None.

    In time the last real frame stands in, in space the edge. lengths: [M] real frames, 0 where a chunk is all padding.
    """
    unit = block_frames or patch[0]
    frames = -(-video.shape[2] // unit) * unit
    at = torch.arange(frames, device=video.device).expand(video.shape[0], -1)
    at = torch.minimum(at, (lengths - 1).clamp_min(0)[:, None])  # the last real frame stands in for padding
    if frames != video.shape[2] or bool((lengths < frames).any()):
        video = video.gather(2, at[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:]))
    bottom, right = -video.shape[3] % patch[1], -video.shape[4] % patch[2]
    if bottom or right:
        video = F.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate")
    grid = (frames // patch[0], video.shape[3] // patch[1], video.shape[4] // patch[2])
    starts = torch.arange(grid[0], device=video.device) * patch[0]
    patch_valid = (starts < lengths[:, None]).repeat_interleave(grid[1] * grid[2], 1)
    blocks = frames // block_frames if block_frames else 1
    block_starts = torch.arange(blocks, device=video.device) * (block_frames or 0)
    return Chunks(video, lengths, grid, blocks, patch_valid, block_starts < lengths[:, None])


def to_patches(video: Tensor, patch: Size3) -> Tensor:
    """[M, C, T, H, W] -> [M, N, C * patch volume], in raster order of (t, h, w)."""
    p, q, r = patch
    return rearrange(video, "M C (t p) (h q) (w r) -> M (t h w) (C p q r)", p=p, q=q, r=r)


def from_patches(patches: Tensor, grid: tuple[int, int, int], patch: Size3) -> Tensor:
    """[M, N, C * patch volume] -> [M, C, T, H, W]."""
    (p, q, r), (t, h, w) = patch, grid
    return rearrange(patches, "M (t h w) (C p q r) -> M C (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r)


def block_coverage(chunks: Chunks, num_cells: int, *, full_grid: tuple[int, int, int], full_blocks: int) -> Tensor:
    """[M, blocks, num_cells, N / blocks]: share of each patch of a time block that each pyramid cell covers.

    full_grid, full_blocks: patches (t, h, w) and time blocks of a full chunk, which set how fine the pyramid gets.
    """
    t, h, w = chunks.grid
    per_block = t // chunks.blocks
    valid = rearrange(chunks.patch_valid, "M (b t n) -> (M b) t n", b=chunks.blocks, t=per_block)
    full = (full_grid[0] // full_blocks, full_grid[1], full_grid[2])
    cells = coverage(num_cells, (per_block, h, w), valid[..., 0].sum(1), full_grid=full)
    return rearrange(cells, "(M b) K n -> M b K n", b=chunks.blocks)
