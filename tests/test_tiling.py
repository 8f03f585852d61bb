"""Tiles: identity to the bit, weights that sum to 1, no seam, streams with a cache for each tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.spacetime import SpaceTimeConfig, SpaceTimeDecoder, SpaceTimeEncoder
from vtok.layers.tiling import TileCaches, decode_tiled, encode_tiled, ramp, tile_spans, tiled

SIZES = [(8, 8), (9, 20), (13, 5), (7, 31), (1, 1), (21, 22)]
TILES = [((8, 8), (2, 2)), ((4, 6), (2, 3)), ((5, 3), (0, 1)), ((8, 7), (0, 0)), ((2, 2), (1, 1))]


@pytest.mark.parametrize("size", [1, 5, 8, 9, 14, 15, 20, 31])
@pytest.mark.parametrize("tile, overlap", [(8, 2), (8, 0), (8, 4), (2, 1), (1, 0)])
def test_tiles_cover_an_axis_and_neighbours_share_the_overlap(size, tile, overlap):
    spans = tile_spans(size, tile=tile, overlap=overlap)
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert all(left[1] - right[0] == overlap for left, right in zip(spans, spans[1:]))
    assert all(stop - start == tile for start, stop in spans[:-1])
    assert len(spans) == 1 or overlap < spans[-1][1] - spans[-1][0] <= tile
    assert all(first[1] <= third[0] for first, third in zip(spans, spans[2:]))  # never three in one place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tile, overlap", TILES, ids=str)
def test_the_identity_is_reproduced_to_the_bit(tile, overlap, dtype):
    for size in SIZES:
        x = torch.randn(2, 3, 2, *size).to(dtype)
        assert torch.equal(tiled(lambda part: part, x, tile=tile, overlap=overlap), x)


@pytest.mark.parametrize("scale_in, scale_out", [((4, 2), (1, 1)), ((1, 1), (2, 4)), ((2, 2), (3, 1))])
def test_resampling_is_reproduced_to_the_bit(scale_in, scale_out):
    """Functions that see no further than a latent: mean over one, copies of one."""

    def local(x: Tensor) -> Tensor:
        x = F.avg_pool2d(x.flatten(0, 2)[:, None], scale_in, scale_in)
        return x.repeat_interleave(scale_out[0], -2).repeat_interleave(scale_out[1], -1)[:, 0].unflatten(0, (2, 3, 1))

    x = torch.randn(2, 3, 1, 11 * scale_in[0], 17 * scale_in[1])
    whole, by_tiles = local(x), tiled(local, x, tile=6, overlap=3, scale_in=scale_in, scale_out=scale_out)
    assert by_tiles.shape == (2, 3, 1, 11 * scale_out[0], 17 * scale_out[1])
    torch.testing.assert_close(by_tiles, whole, rtol=0, atol=1e-6)  # the pooling kernel's own rounding


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile, overlap", TILES, ids=str)
def test_weights_are_shares_that_sum_to_one(tile, overlap, size):
    """Every tile says 1 in a channel of its own: the channels are then the tiles' weights."""
    spans = [tile_spans(n, tile=t, overlap=o) for n, t, o in zip(size, tile, overlap)]
    tiles = [(row, column) for row in spans[0] for column in spans[1]]
    turn = iter(range(len(tiles)))

    def mark(part: Tensor) -> Tensor:
        out = torch.zeros(len(tiles), 2 * part.shape[-2], 2 * part.shape[-1], dtype=torch.float64)
        out[next(turn)] = 1
        return out

    weights = tiled(mark, torch.zeros(1, *size), tile=tile, overlap=overlap, scale_out=2)
    inside = torch.zeros_like(weights, dtype=torch.bool)
    for mine, ((top, bottom), (left, right)) in zip(inside, tiles):
        mine[2 * top : 2 * bottom, 2 * left : 2 * right] = True
    assert torch.equal(weights > 0, inside) and weights.max() <= 1
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]), rtol=0, atol=1e-15)


def test_ramps_are_linear_and_the_same_from_both_sides():
    assert ramp(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    for length in range(1, 40):
        up = ramp(length, dtype=torch.float64)
        torch.testing.assert_close(up + up.flip(0), torch.ones_like(up), rtol=0, atol=1e-15)


# -- seams -----------------------------------------------------------------------------------------------------------


class Local(nn.Module):
    """Two convolutions over space after pixels are spread over the latent's area: sees 2 latents around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 24, 3, padding=1), nn.Conv2d(24, 3 * 64, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.second(torch.tanh(2 * self.first(z.transpose(1, 2).flatten(0, 1)))), 8)
        return x.unflatten(0, (z.shape[0], z.shape[2])).transpose(1, 2)


def transformer_decoder() -> nn.Module:
    config = SpaceTimeConfig(
        width=32, num_heads=2, decoder_spatial="tw", decoder_temporal=1, window=[4, 4], temporal_window=2
    )
    decoder = SpaceTimeDecoder(config, latent_channels=4, stride=(2, 8, 8))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return decoder


def seams(decoder: nn.Module, *, overlap: int) -> tuple[float, float, float, float]:
    """What tiles of 16 latents do to a decoded frame of 44, by latent columns: (near, far, across, elsewhere).

    near, far: mean absolute error of tiles against the whole frame in the two columns at a tile's border, and in all
    others. across, elsewhere: mean absolute step of that error from column to column, over a tile's border and inside.
    """
    z = torch.randn(6, 4, 2, 12, 44, generator=torch.Generator().manual_seed(0))
    z = F.avg_pool3d(F.pad(z, (2, 2, 2, 2, 0, 0), mode="replicate"), (1, 5, 5), 1) * 3  # neighbours alike, as in videos
    with torch.no_grad():
        error = decode_tiled(decoder, z, stride=(8, 8), tile=(12, 16), overlap=(0, overlap)) - decoder(z)
    error = F.avg_pool3d(error, (1, 8, 8))
    spans = tile_spans(44, tile=16, overlap=overlap)
    borders = torch.tensor(sorted({start for start, _ in spans[1:]} | {stop for _, stop in spans[:-1]}))
    size, step = (e.abs().flatten(0, -2).mean(0) for e in (error, error.diff(dim=-1)))
    close, across = torch.zeros(44, dtype=torch.bool), torch.zeros(43, dtype=torch.bool)
    close[borders] = close[borders - 1] = across[borders - 1] = True
    means = [part.mean().item() for part in (size[close], size[~close], step[across], step[~across])]
    return means[0], means[1], means[2], means[3]


def test_no_seam_of_a_local_network():
    """Tiles differ from the whole only for want of what lies outside of them, and there the neighbour has the word."""
    torch.manual_seed(0)
    decoder = Local()
    near, far, across, elsewhere = seams(decoder, overlap=0)
    assert near > 10 * far and across > 5 * elsewhere  # without an overlap there is a seam, and it is seen here
    blended = seams(decoder, overlap=4)
    assert blended[0] < near / 8 and blended[2] < across / 6


def test_no_seam_of_the_transformer():
    """Attention over the frame makes a tile differ everywhere; with a quarter of overlap no border stands out."""
    torch.manual_seed(0)
    decoder = transformer_decoder()
    _, _, across, elsewhere = seams(decoder, overlap=0)
    assert across > 3 * elsewhere
    near, far, blended, inside = seams(decoder, overlap=4)
    assert blended < across / 2 and blended < 2 * inside and near < 1.2 * far


# -- streams ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_streams_by_tiles_equal_tiles_of_the_whole():
    torch.manual_seed(0)
    config = SpaceTimeConfig(
        width=16, num_heads=2, encoder_spatial="t", encoder_temporal=1, decoder_spatial="t", decoder_temporal=1
    )
    encoder = SpaceTimeEncoder(config, latent_channels=4, stride=(2, 4, 4), num_frames=5).double()
    decoder = SpaceTimeDecoder(config, latent_channels=4, stride=(2, 4, 4), num_frames=5).double()
    x = torch.randn(1, 3, 9, 28, 36, dtype=torch.float64)
    cut: dict = {"stride": (4, 4), "tile": 4, "overlap": 1}
    z = encode_tiled(encoder, x, **cut)
    assert z.shape == (1, 4, 5, 7, 9)
    pixels = decode_tiled(decoder, z, **cut)
    into: TileCaches = {}
    out: TileCaches = {}
    latents = [encode_tiled(encoder, part, **cut, caches=into) for part in x.split([1, 4, 4], 2)]
    torch.testing.assert_close(torch.cat(latents, 2), z, rtol=0, atol=1e-10)
    frames = [decode_tiled(decoder, part, **cut, caches=out) for part in latents]
    torch.testing.assert_close(torch.cat(frames, 2), pixels, rtol=0, atol=1e-10)
    assert set(into) == set(out) == {(i, j) for i in range(2) for j in range(3)}
    with pytest.raises(ValueError, match="caches hold 6 tiles, this frame has 2 x 2: a stream keeps its size"):
        encode_tiled(encoder, x[:, :, 1:, :, :28], **cut, caches=into)


def test_one_tile_is_one_call():
    seen = []
    x = torch.randn(1, 3, 1, 16, 16)
    tiled(lambda part: seen.append(part) or part, x, tile=4, overlap=1, scale_in=4, scale_out=4)
    assert len(seen) == 1 and torch.equal(seen[0], x)


def test_gradients_pass():
    x = torch.randn(1, 1, 1, 9, 10, requires_grad=True)
    tiled(lambda part: part * 3, x, tile=4, overlap=2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"tile": 0}, r"tile=\(0, 0\).*must be at least 1"),
        ({"overlap": -1}, "must lie between 0 and half of tile"),
        ({"overlap": (2, 3)}, r"overlap=\(2, 3\) must lie between 0 and half of tile=\(4, 4\)"),
        ({"tile": (4, 4, 4)}, r"tile=\(4, 4, 4\) must be an int or"),
        ({"scale_in": 3}, "multiples of 3 x 3"),
        ({"scale_out": 2}, "a tile of .* became"),
    ],
)
def test_bad_tiles_say_what_is_wrong(change, says):
    with pytest.raises(ValueError, match=says):
        tiled(lambda part: part, torch.zeros(1, 1, 1, 8, 8), **{"tile": 4, "overlap": 1, **change})
