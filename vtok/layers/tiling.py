"""Large frames tile by tile: memory of one tile, overlaps blended so that no seam shows.

    |<---- tile ---->|
               |<---- tile ---->|          step = tile - overlap
               |over-|     |<-- last -->|  ends where the frame ends, and is narrower
                lap         (more than overlap)

Tiles and overlaps are counted in latent units, whatever the direction, so encoder and decoder cut at the same places.
Across an overlap the newer tile's weight rises linearly and the older one's falls: they sum to 1 everywhere, and where
both say the same the result is that to the bit. Any function of a frame that keeps its place will do; a causal one
streams with a cache for each tile.

Latents of an encoder are blended before they are quantized.

Letters: B clips, C channels, T frames, H height, W width; `...` stands for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtok.layers.causal import Cache

TileCaches = dict[tuple[int, int], Cache]  # (row, column) of a tile -> what its stream keeps; {} where it begins
Size2 = int | tuple[int, int]  # (height, width), or both


def tile_spans(size: int, *, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles along one axis of `size` latents.

    Neighbours share `overlap`; the last is as wide as what is left, always more than `overlap`. One tile if all fits.
    """
    spans = [(0, min(tile, size))]
    while spans[-1][1] < size:
        start = spans[-1][1] - overlap
        spans.append((start, min(start + tile, size)))
    return spans


def ramp(length: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of the newer tile at the places of an overlap, (i + 1/2) / length: the same seen from either side."""
    return (torch.arange(length, device=device, dtype=dtype) + 0.5) / max(length, 1)


def tiled(
    function: Callable[..., Tensor],
    x: Tensor,
    *,
    tile: Size2,
    overlap: Size2,
    scale_in: Size2 = 1,
    scale_out: Size2 = 1,
    caches: TileCaches | None = None,
) -> Tensor:
    """function(x) by tiles: [..., H, W] -> [..., H', W'], H' = H / scale_in x scale_out.

    Args:
        function: of a tile [..., h, w], where h, w are multiples of scale_in, to [..., h', w']; with `caches`, of a
            tile and its cache.
        tile, overlap: in latents, int or (height, width); twice the overlap is at most a tile.
        scale_in, scale_out: values of x, and of the result, for each latent: (8, 8) and 1 to encode at 8 x 8.
        caches: {} where a stream begins, and the same again for what follows. One cache for each tile is kept in it.
    Raises: ValueError for tiles that do not fit each other, frames of a broken latent, functions of another scale.
    """
    (high, wide), (over_y, over_x) = _pair(tile, "tile"), _pair(overlap, "overlap")
    (in_y, in_x), (out_y, out_x) = _pair(scale_in, "scale_in"), _pair(scale_out, "scale_out")
    _check((high, wide), (over_y, over_x), (in_y, in_x, out_y, out_x))
    if x.ndim < 2 or x.shape[-2] % in_y or x.shape[-1] % in_x or not x.numel():
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., H, W] of multiples of {in_y} x {in_x}")
    grid = x.shape[-2] // in_y, x.shape[-1] // in_x
    rows = tile_spans(grid[0], tile=high, overlap=over_y)
    columns = tile_spans(grid[1], tile=wide, overlap=over_x)
    if caches:
        _check_caches(caches, (len(rows), len(columns)))
    out: Tensor | None = None
    for i, (top, bottom) in enumerate(rows):
        strip: Tensor | None = None  # [..., h', W']
        for j, (left, right) in enumerate(columns):
            part = x[..., top * in_y : bottom * in_y, left * in_x : right * in_x]
            done = function(part) if caches is None else function(part, caches.setdefault((i, j), {}))
            expected = (bottom - top) * out_y, (right - left) * out_x
            if done.shape[-2:] != expected:
                raise ValueError(
                    f"a tile of {list(part.shape[-2:])} became {list(done.shape[-2:])}, scale_in={scale_in} and "
                    f"scale_out={scale_out} say {list(expected)}"
                )
            if len(columns) > 1:
                strip = done.new_empty(*done.shape[:-1], grid[1] * out_x) if strip is None else strip
                _lay(strip, done, at=left * out_x, overlap=over_x * out_x if j else 0, axis=-1)
            else:
                strip = done
        assert strip is not None
        if len(rows) > 1:
            out = strip.new_empty(*strip.shape[:-2], grid[0] * out_y, strip.shape[-1]) if out is None else out
            _lay(out, strip, at=top * out_y, overlap=over_y * out_y if i else 0, axis=-2)
        else:
            out = strip
    assert out is not None
    return out


def encode_tiled(
    encoder: Callable[..., Tensor],
    video: Tensor,
    *,
    stride: tuple[int, int],
    tile: Size2,
    overlap: Size2,
    caches: TileCaches | None = None,
) -> Tensor:
    """Latents [B, Z, t, h, w] of a video [B, C, T, H, W] by tiles; stride (sh, sw) pixels a latent. See `tiled`."""
    return tiled(encoder, video, tile=tile, overlap=overlap, scale_in=stride, caches=caches)


def decode_tiled(
    decoder: Callable[..., Tensor],
    latents: Tensor,
    *,
    stride: tuple[int, int],
    tile: Size2,
    overlap: Size2,
    caches: TileCaches | None = None,
) -> Tensor:
    """Video [B, C, T, H, W] of latents [B, D, t, h, w] by tiles; stride (sh, sw) pixels a latent. See `tiled`."""
    return tiled(decoder, latents, tile=tile, overlap=overlap, scale_out=stride, caches=caches)


def _lay(out: Tensor, part: Tensor, *, at: int, overlap: int, axis: int) -> None:
    """Write a part into `out` from `at` on along an axis, mixed with what is there over the first `overlap` places."""
    length = part.shape[axis]
    out.narrow(axis, at + overlap, length - overlap).copy_(part.narrow(axis, overlap, length - overlap))
    if overlap:
        weight = ramp(overlap, device=part.device, dtype=part.dtype)
        weight = weight if axis == -1 else weight[:, None]
        there = out.narrow(axis, at, overlap)
        there.copy_(torch.lerp(there, part.narrow(axis, 0, overlap), weight))  # equal ends stay what they are, exactly


def _pair(value: Size2, key: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{key}={value} must be an int or (height, width)")
    return pair[0], pair[1]


def _check(tile: tuple[int, int], overlap: tuple[int, int], scales: tuple[int, ...]) -> None:
    if min(tile) < 1 or min(scales) < 1:
        raise ValueError(f"tile={tile} and the scales {scales} must be at least 1")
    if min(overlap) < 0 or any(2 * o > t for o, t in zip(overlap, tile)):
        raise ValueError(
            f"overlap={overlap} must lie between 0 and half of tile={tile}, so that at most two tiles meet on an axis"
        )


def _check_caches(caches: TileCaches, count: tuple[int, int]) -> None:
    if set(caches) != {(i, j) for i in range(count[0]) for j in range(count[1])}:
        raise ValueError(
            f"caches hold {len(caches)} tiles, this frame has {count[0]} x {count[1]}: a stream keeps its size and its "
            "tiles; begin another with {}"
        )
