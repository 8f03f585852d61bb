"""Features on another grid of time and space.

Letters: B clips, T feature frames, t frames asked, N patches of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtok.types import Features


def resample_features(
    features: Features, grid: tuple[int, int], frames: int | Sequence[int], *, lengths: Tensor | None = None
) -> Features:
    """The features of another (t, h, w) grid: bilinear over space (antialiased), averages over windows of time.

    The targets of representation alignment (REPA, Yu et al. 2024, https://arxiv.org/abs/2410.06940) on a tokenizer's
    grid. Both grids are taken to cover the same frame: give the tower a size, so that it crops nothing.

    Args:
        grid: (h, w) asked.
        frames: feature frames asked: fewer are averages over equal shares of the time, more are interpolated. Or the
            length of each window, which sum to T: [1, 4, 4, 4, 4] for the latents of a causal tokenizer at 17 frames.
        lengths: [B] real feature frames (`Tower.feature_frames`); windows average those alone, and are zero without.
    Returns: Features with patches [B, t, h * w, D], frame vectors and times; attention and keys are left out.
    Raises: ValueError for windows that do not sum to T, or sizes below 1.
    """
    patches = features.patches
    batch, have = patches.shape[:2]
    if min(grid) < 1:
        raise ValueError(f"grid={tuple(grid)} has no patches")
    weights = _time_weights(frames, have).to(patches.device).expand(batch, -1, -1)  # [B, t, T]
    if lengths is not None:
        real = torch.arange(have, device=patches.device) < lengths.to(patches.device)[:, None]
        weights = weights * real[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)

    def over_time(values: Tensor) -> Tensor:
        mixed = torch.einsum(
            "btT,bT...->bt...", weights.to(torch.promote_types(values.dtype, torch.float32)), _wide(values)
        )
        return mixed.to(values.dtype)

    x = over_time(patches)
    if tuple(grid) != tuple(features.grid):
        maps = rearrange(x, "b t (h w) d -> (b t) d h w", h=features.grid[0])
        maps = F.interpolate(_wide(maps), size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)
        x = rearrange(maps.to(x.dtype), "(b t) d h w -> b t (h w) d", b=batch)
    times = None if features.times is None else over_time(features.times)
    frame = None if features.frame is None else over_time(features.frame)
    return Features(x, (grid[0], grid[1]), times=times, frame=frame)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _time_weights(frames: int | Sequence[int], have: int) -> Tensor:
    """[t, T]: what each frame asked takes of each frame there is; rows sum to 1."""
    if not isinstance(frames, int):
        if sum(frames) != have or min(frames, default=0) < 1:
            raise ValueError(
                f"frames={list(frames)} must be windows of at least 1 that sum to the {have} feature frames"
            )
        which = torch.repeat_interleave(torch.arange(len(frames)), torch.tensor(list(frames)))
        weights = F.one_hot(which, len(frames)).float().T
        return weights / weights.sum(1, keepdim=True)
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1")
    if frames > have:
        identity = torch.eye(have)[None]
        return F.interpolate(identity, size=frames, mode="linear", align_corners=False)[0].T
    edges = torch.arange(frames + 1, dtype=torch.float64) * have / frames
    start, stop = torch.arange(have), torch.arange(have) + 1
    overlap = torch.minimum(edges[1:, None], stop) - torch.maximum(edges[:-1, None], start)
    weights = overlap.clamp_min(0).float()
    return weights / weights.sum(1, keepdim=True)
