"""The frames of a ragged batch as compressors of tower features see them: thinned, placed, cut in windows, packed.

Letters: B clips, T frames (padded), N patches of a frame, M packed frames, n tokens of a frame, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.pieces import Piece
from vtok.layers.positions import sincos
from vtok.layers.segments import Windows
from vtok.types import Features

# what of a clip and a frame one unit of a position code is: 1/64 of the time, 1/16 of the height and width
_UNITS = (64.0, 16.0, 16.0)


@dataclass(frozen=True)
class Rows:
    """Packed frames. clip, frame: [M] int64. real: [M] bool; M is 1 at least, the row not real where nothing is."""

    clip: Tensor
    frame: Tensor
    real: Tensor


@dataclass(frozen=True)
class Frames:
    """patches: [B, T, N, D] around 1 in size. lengths: [B]. time: [B, T], place in the clip in [0, 1]."""

    patches: Tensor
    grid: tuple[int, int]
    lengths: Tensor
    time: Tensor
    windows: Windows
    segment: Tensor  # [B, T] int64, as Windows.index

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: True on real frames."""
        return torch.arange(self.patches.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def piece(self, embeddings: Tensor, rows: Rows, level: Tensor, places: Tensor | None = None) -> Piece:
        """Tokens [M, n, D] of packed frames; places: [n, 2] (y, x) in [0, 1], None where they have none."""
        time = self.time[rows.clip, rows.frame][:, None, None].expand(*embeddings.shape[:2], 1)
        inside = time.new_full((embeddings.shape[1], 2), torch.nan) if places is None else places.to(time)
        positions = torch.cat([time, inside.expand(*embeddings.shape[:2], 2)], -1)
        return Piece(embeddings, rows.clip, rows.frame, positions, level, rows.real[:, None].expand(*time.shape[:2]))


def pack(where: Tensor) -> Rows:
    """The frames where [B, T] is True, clip after clip; one row that is not real where there are none."""
    clip, frame = where.nonzero(as_tuple=True)
    if len(clip):
        return Rows(clip, frame, torch.ones_like(clip, dtype=torch.bool))
    return Rows(clip.new_zeros(1), frame.new_zeros(1), torch.zeros(1, dtype=torch.bool, device=clip.device))


def clip_piece(embeddings: Tensor, positions: Tensor | None = None) -> Piece:
    """Tokens [B, n, D] of whole clips, in nesting order."""
    batch, count = embeddings.shape[:2]
    if positions is None:
        positions = embeddings.new_full((batch, count, 3), torch.nan)
    at = torch.arange(batch, device=embeddings.device)
    return Piece(embeddings, at, torch.full_like(at, -1), positions, torch.arange(count, device=at.device))


def pool_patches(features: Features, count: int) -> Features:
    """Patches of each frame averaged over a grid of `count` cells (`pool_shape`); 0: as they are."""
    if not count:
        return features
    grid = pool_shape(count, features.grid)
    patches = pool_grid(features.patches.flatten(0, 1), features.grid, grid).unflatten(0, features.patches.shape[:2])
    return replace(features, patches=patches, grid=grid, attention=None, keys=None)


def thin(features: Features, most: int) -> tuple[Features, Tensor]:
    """At most `most` frames of each clip, evenly, and [B, T] the place of each in its clip, in [0, 1]."""
    lengths = features.count()
    taken = lengths.clamp(max=most)
    at = torch.arange(min(features.patches.shape[1], most), device=lengths.device)
    index = (2 * at + 1) * lengths[:, None] // (2 * taken[:, None])
    index = torch.minimum(index, lengths[:, None] - 1)
    time = (index + 0.5) / lengths[:, None]
    if features.patches.shape[1] <= most:
        return features, time.to(_wide(features.patches))

    def take(value: Tensor) -> Tensor:
        out = value[torch.arange(len(value), device=value.device)[:, None], index.to(value.device)]
        real = (at < taken[:, None]).reshape(*index.shape, *[1] * (value.ndim - 2))
        return out.masked_fill(~real.to(out.device), 0)

    changed: dict[str, object] = {"lengths": taken}
    for field in fields(features):
        value = getattr(features, field.name)
        if field.name == "attention" and value is not None:
            changed["attention"] = {layer: take(received) for layer, received in value.items()}
        elif isinstance(value, Tensor) and field.name != "lengths":
            changed[field.name] = take(value)
    return replace(features, **changed), time.to(_wide(features.patches))  # pyright: ignore[reportArgumentType]


def repeat_images(features: Features, times: int) -> Features:
    """Clips of one frame as videos of `times` equal frames; all others as they are."""
    lengths = features.count()
    missing = max(times - features.patches.shape[1], 0)

    def repeat(value: Tensor) -> Tensor:
        value = F.pad(value, [0] * (2 * (value.ndim - 2)) + [0, missing])
        still = torch.arange(value.shape[1], device=value.device) < times
        still = (still & (lengths == 1).to(value.device)[:, None]).reshape(*value.shape[:2], *[1] * (value.ndim - 2))
        return torch.where(still, value[:, :1], value)

    return replace(
        features,
        patches=repeat(features.patches),
        times=None if features.times is None else repeat(features.times),
        frame=None if features.frame is None else repeat(features.frame),
        attention=None,
        keys=None,
        lengths=torch.where(lengths == 1, times, lengths),
    )


def pool_shape(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) with rows x columns = count, as close as may be to the grid's aspect."""
    aspect = math.log(grid[0] / grid[1])
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: (abs(math.log(pair[0] / pair[1]) - aspect), pair))


def pool_grid(patches: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Patches [M, N, D] of a grid, averaged over the cells of another: [M, rows x columns, D]."""
    if shape == grid:
        return patches
    pooled = F.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(2, grid), shape)
    return pooled.flatten(2).transpose(1, 2)


def centres(shape: tuple[int, int], like: Tensor) -> Tensor:
    """[rows x columns, 2] (y, x) of the cells of a grid over the frame, in [0, 1]."""
    y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in shape)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def bin_means(values: Tensor, lengths: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Means of ragged rows [B, T, D] over stretches (`stretches`) of each row's own length: [B, n, D]."""
    real = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    wide = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~real[..., None], 0)
    sums = F.pad(wide.cumsum(1), (0, 0, 1, 0))
    first, last = stretches(lengths, begin, end)

    def at(index: Tensor) -> Tensor:
        return sums.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

    return ((at(last) - at(first)) / (last - first)[..., None]).to(values)


def stretches(lengths: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """First entry of stretches of rows of `lengths` [B], and the one after their last: [B, n] int64 each.

    begin, end: [n] or [B, n] in shares of a row, end above begin. A stretch takes every entry it touches, so one at
    least; one that lies past the row's end (1), as those of padding do, takes the last entry.
    """
    scale = lengths[:, None].double()
    first = (begin * scale + 1e-6).floor().long()  # 1e-6: what a third of 3 frames lacks to the next one
    first = torch.minimum(first, lengths[:, None] - 1)
    last = (end * scale - 1e-6).ceil().long()
    return first, torch.maximum(torch.minimum(last, lengths[:, None]), first + 1)


def halves(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Begin and end, [count] each in [0, 1]: the whole, its two halves, its four quarters, ... the first `count`."""
    at = torch.arange(1, count + 1, device=device, dtype=torch.float64)
    parts = 2.0 ** at.log2().add(1e-9).floor()
    return (at - parts) / parts, (at - parts + 1) / parts


def place_code(positions: Tensor, width: int) -> Tensor:
    """Sine-cosine code [..., width] of positions [..., 3] (t, y, x) in [0, 1]; zeros along axes that are NaN."""
    third = width // 6 * 2
    parts = []
    for axis, (unit, size) in enumerate(zip(_UNITS, (width - 2 * third, third, third))):
        value = positions[..., axis]
        code = sincos(value.nan_to_num(0).flatten() * unit, size + size % 2)[:, :size].to(value)
        parts.append(code.reshape(*value.shape, size).masked_fill(value.isnan()[..., None], 0))
    return torch.cat(parts, -1)


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
