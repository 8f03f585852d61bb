"""The space-time transformer: causal to the bit, streamed as whole, any size, any length, one set of weights."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from omegaconf import OmegaConf
from torch import Tensor, nn

from vtok.layers import windows
from vtok.layers.rotary import rotate, rotation, rotation_2d
from vtok.layers.spacetime import (
    Cache,
    SpaceTimeConfig,
    SpaceTimeDecoder,
    SpaceTimeEncoder,
    SpatialAttention,
    TemporalAttention,
)
from vtok.layers.windows import alibi_slopes, causal_window_attend, window_spans
from vtok.shipping.bundle import bundle

STRIDES = [(4, 8, 8), (8, 8, 8), (4, 16, 16), (8, 16, 16), (1, 8, 8), (2, 8, 8)]
LATENT = 5
TINY = SpaceTimeConfig(
    width=16,
    num_heads=2,
    encoder_spatial="tws",
    encoder_temporal=2,
    decoder_temporal=2,
    decoder_spatial="tt",
    window=[2, 2],
    temporal_window=3,
)
FORMS = {
    "windows": TINY,
    "whole": replace(TINY, encoder_spatial="tt", temporal_positions="alibi", norm="layer", mlp="swiglu", qk_norm=False),
    "learned": replace(TINY, encoder_spatial="ts", decoder_spatial="w", spatial_positions="learned", grid=[2, 3]),
    "peg": replace(TINY, peg=True),
    "merged": replace(TINY, peg=True, encoder_spatial="wmt", decoder_spatial="tmw", patch=[1, 8, 4]),
}


def build(config: SpaceTimeConfig = TINY, stride=(4, 8, 8), *, seed: int = 0, **kwargs):
    """Encoder and decoder in float64 whose every parameter is drawn large enough to matter."""
    torch.manual_seed(seed)
    encoder = SpaceTimeEncoder(config, latent_channels=LATENT, stride=stride, **kwargs).double().eval()
    decoder = SpaceTimeDecoder(config, latent_channels=LATENT, stride=stride, **kwargs).double().eval()
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        nn.init.normal_(parameter, std=0.3)
    return encoder, decoder


def video(stride, latents: int, grid=(3, 5), *, batch: int = 1, seed: int = 0, channels: int = 3) -> Tensor:
    st, sh, sw = stride
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, 1 + st * (latents - 1), grid[0] * sh, grid[1] * sw)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def stream(module: nn.Module, x: Tensor, cuts: list[int]) -> tuple[Tensor, Cache]:
    cache: Cache = {}
    with torch.no_grad():
        return torch.cat([module(part, cache) for part in x.split(cuts, 2)], 2), cache


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@torch.no_grad()
def test_shapes_of_images_and_videos(stride, form):
    encoder, decoder = build(FORMS[form], stride)
    for latents in (1, 2, 4):
        x = video(stride, latents)
        z = encoder(x)
        assert z.shape == (1, LATENT, latents, 3, 5) and z.isfinite().all()
        assert decoder(z).shape == x.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
@torch.no_grad()
def test_the_future_never_changes_the_past(stride, form):
    encoder, decoder = build(FORMS[form], stride)
    x = video(stride, 5)
    other = video(stride, 5, seed=1)
    # one memory layout for all, as matrix products of another one may round otherwise (they do on AMD's AVX2)
    z, noise = encoder(x).contiguous(), torch.randn(1, LATENT, 5, 3, 5, dtype=torch.float64)
    pixels = decoder(z)
    for keep in (1, 2, 4):
        frames = 1 + stride[0] * (keep - 1)
        changed = encoder(torch.cat([x[:, :, :frames], other[:, :, frames:]], 2))
        assert torch.equal(changed[:, :, :keep], z[:, :, :keep])
        assert (changed[:, :, keep] - z[:, :, keep]).abs().min() > 0
        changed = decoder(torch.cat([z[:, :, :keep], noise[:, :, keep:]], 2))
        assert torch.equal(changed[:, :, :frames], pixels[:, :, :frames])
        assert (changed[:, :, frames] - pixels[:, :, frames]).abs().min() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_streamed_equals_whole_in_any_cuts(stride, form):
    encoder, decoder = build(FORMS[form], stride)  # attention sees 3 latent frames, of 6
    x = video(stride, 6, (2, 3))
    with torch.no_grad():
        z = encoder(x)
        pixels = decoder(z)
    for cuts in ([1] * 6, [2, 4]):
        frames = [1 + stride[0] * (cuts[0] - 1), *(stride[0] * n for n in cuts[1:])]
        torch.testing.assert_close(stream(encoder, x, frames)[0], z, rtol=0, atol=1e-10)
        torch.testing.assert_close(stream(decoder, z, cuts)[0], pixels, rtol=0, atol=1e-10)


@torch.no_grad()
def test_patches_merged_in_time_and_space():
    """8 x 16 x 16 from patches of 4 x 8 x 8: eight patches of later frames become one, four of the first."""
    merged = replace(FORMS["merged"], patch=[4, 8, 8])
    encoder, decoder = build(merged, (8, 16, 16))
    assert encoder.embed.weight.shape == (16, 5 * 3 * 8 * 8) and decoder.last.shape == (5 * 3 * 8 * 8, 16)
    assert encoder.blocks.spatial[1].weight.shape == (16, (4 + 8) * 16)
    x = video((8, 16, 16), 6, (2, 3))
    z = encoder(x)
    assert z.shape == (1, LATENT, 6, 2, 3)
    torch.testing.assert_close(stream(encoder, x, [9, 8, 24])[0], z, rtol=0, atol=1e-10)
    torch.testing.assert_close(stream(decoder, z, [1, 3, 2])[0], decoder(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form, pegs", [("windows", (0, 0)), ("peg", (3, 4))])
@torch.no_grad()
def test_a_stream_needs_no_more_memory_the_longer_it_is(form, pegs):
    def held(cache: Cache) -> int:
        return sum(v.untyped_storage().nbytes() for v in cache.values() if isinstance(v, Tensor))

    encoder, decoder = build(FORMS[form])
    into, out, sizes = {}, {}, []
    decoder(encoder(video((4, 8, 8), 1), into), out)
    for step in range(1, 12):
        z = encoder(video((4, 8, 8), 1 + step % 3, seed=step)[:, :, 1:], into) if step % 3 else None
        if z is not None:
            assert decoder(z, out).shape[2] == 4 * z.shape[2]
            sizes.append((held(into), held(out)))
    # 2 temporal blocks, keys and values, 15 positions, 2 latent frames of the past, 16 channels, 8 bytes
    frame = 15 * 16 * 8
    assert sizes[-1] == tuple(2 * 2 * 2 * frame + 2 * n * frame for n in pegs) and len(set(sizes[1:])) == 1


@torch.no_grad()
def test_a_position_generator_sees_neighbours_of_the_frame_and_two_before():
    encoder, _ = build(FORMS["peg"])
    (block,) = (b for b in encoder.blocks.spatial if b.peg is not None)  # windows have none
    assert all(b.peg is not None for b in encoder.blocks.temporal)
    x = torch.randn(1, 6, 5, 5, 16, dtype=torch.float64)
    for frame, row, column in ((2, 2, 2), (0, 0, 0), (5, 4, 4)):
        changed = x.clone()
        changed[0, frame, row, column] += 1
        moved = (block.place(changed, None) - block.place(x, None))[0].abs().sum(-1) > 1e-9  # [t, h, w]
        t, h, w = (torch.arange(n) for n in moved.shape)
        near = (t - frame).clamp(-1, 2)[:, None, None] == t[:, None, None] - frame
        near = near & (t >= frame)[:, None, None] & ((h - row).abs() <= 1)[:, None] & ((w - column).abs() <= 1)
        assert torch.equal(moved, near)


def test_a_position_generator_begins_as_nothing_and_images_train_its_present():
    torch.manual_seed(0)
    encoder = SpaceTimeEncoder(FORMS["peg"], latent_channels=LATENT, stride=(4, 8, 8))
    plain = SpaceTimeEncoder(TINY, latent_channels=LATENT, stride=(4, 8, 8))
    kernels = {k: v for k, v in encoder.state_dict().items() if ".peg." in k}
    assert len(kernels) == 6 and not any(v.any() for v in kernels.values())
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if k not in kernels})
    x = video((4, 8, 8), 3).float()
    assert torch.equal(encoder(x), plain(x))
    encoder(x[:, :, :1]).square().sum().backward()
    for block in encoder.blocks.temporal:
        gradient = block.peg.weight.grad
        assert gradient[:, :, 2].abs().min() > 0 and not gradient[:, :, :2].any()


@torch.no_grad()
def test_one_cache_may_serve_encoder_and_decoder():
    encoder, decoder = build()
    x, cache = video((4, 8, 8), 3), {}
    parts = [decoder(encoder(part, cache), cache) for part in x.split([1, 8], 2)]
    torch.testing.assert_close(torch.cat(parts, 2), decoder(encoder(x)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    encoder, decoder = build()
    x = video((4, 8, 8), 2, batch=3)
    z = encoder(x)
    torch.testing.assert_close(z, torch.cat([encoder(one) for one in x.split(1)]), rtol=0, atol=1e-10)
    torch.testing.assert_close(decoder(z), torch.cat([decoder(one) for one in z.split(1)]), rtol=0, atol=1e-10)


# -- space -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 4), (5, 9)], ids=str)
@torch.no_grad()
def test_any_height_and_width(grid, form):
    encoder, decoder = build(FORMS[form])
    x = video((4, 8, 8), 2, grid)
    z = encoder(x)
    assert z.shape == (1, LATENT, 2, *grid) and decoder(z).shape == x.shape and z.isfinite().all()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (3, 8), (2, 9), (1, 1)], ids=str)
@torch.no_grad()
def test_windows_are_full_attention_under_a_block_mask(grid, shifted):
    torch.manual_seed(0)
    window = (2, 3)
    by_window = SpatialAttention(12, 3, window=window, shifted=shifted).double()
    for parameter in by_window.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    places = rotation_2d(grid, 4, base=100.0, device=x.device, dtype=x.dtype)
    axes = []
    for size, length in zip(grid, window):
        start = length // 2 if shifted and size > length else 0
        axes.append(torch.div(torch.arange(size) - start, length, rounding_mode="floor"))
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    mask = (place[:, None] == place[None]).all(-1)
    q, k, v = rearrange(by_window.qkv(x), "F h w (three H D) -> three F H (h w) D", three=3, H=3)
    q, k = rotate(by_window.q_norm(q), places), rotate(by_window.k_norm(k), places)
    out = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "F H n D -> F n (H D)")
    torch.testing.assert_close(by_window(x, places).flatten(1, 2), by_window.out(out), rtol=0, atol=1e-12)


def test_windows_that_divide_the_grid_are_one_span():
    assert window_spans(32, 8, shifted=False) == [(0, 32, 8)]
    assert window_spans(32, 8, shifted=True) == [(0, 4, 4), (4, 28, 8), (28, 32, 4)]
    assert window_spans(20, 8, shifted=False) == [(0, 16, 8), (16, 20, 4)]
    assert window_spans(9, 8, shifted=True) == [(0, 4, 4), (4, 9, 5)]
    assert window_spans(8, 8, shifted=True) == window_spans(8, 99, shifted=False) == [(0, 8, 8)]


@torch.no_grad()
def test_a_frame_does_not_see_where_in_the_plane_it_lies():
    """Rotary positions are relative: whole-frame attention of a crop is the same wherever it was cut."""
    attention = SpatialAttention(16, 2, window=None).double()
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    cos, sin = rotation_2d((9, 9), 8, base=100.0, device=x.device, dtype=x.dtype)
    outs = []
    for top, left in ((0, 0), (5, 2)):
        place = (torch.arange(3)[:, None] + top) * 9 + torch.arange(4) + left
        outs.append(attention(x, (cos[place.flatten()], sin[place.flatten()])))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    assert (outs[0] - attention(x, None)).abs().max() > 1e-4


# -- time ------------------------------------------------------------------------------------------------------------


def turns(length: int, head: int):
    return rotation(torch.arange(-length, 0, dtype=torch.float64) + 1, head, base=100.0)


def temporal(*, alibi: bool, window: int = 4) -> tuple[TemporalAttention, tuple[Tensor, Tensor] | None]:
    torch.manual_seed(0)
    attention = TemporalAttention(16, 2, window=window, alibi=alibi).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention, None if alibi else turns(60, 8)


@pytest.mark.parametrize("alibi", [False, True])
@torch.no_grad()
def test_time_is_relative(alibi):
    attention, times = temporal(alibi=alibi)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    late = attention(x[:, 2:], times)
    torch.testing.assert_close(late[:, 3:], attention(x, times)[:, 5:], rtol=0, atol=1e-12)  # whose window is whole
    x[:, [5, 6]] = x[:, [6, 5]]  # the order inside a window counts
    assert (attention(x, times)[:, 8] - late[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("alibi", [False, True])
@torch.no_grad()
def test_a_frame_sees_its_window_and_no_further(alibi):
    attention, times = temporal(alibi=alibi)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    before = attention(x, times)
    x[:, 3] += 1
    moved = (attention(x, times) - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 2


@torch.no_grad()
def test_positions_in_time_are_rotary():
    """Parity with attention whose queries and keys are turned by their own absolute times."""
    attention, times = temporal(alibi=False)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = rearrange(attention.qkv(x), "N t (three H D) -> three N H t D", three=3, H=2)
    absolute = rotation(torch.arange(9, dtype=torch.float64), 8, base=100.0)
    q, k = rotate(attention.q_norm(q), absolute), rotate(attention.k_norm(k), absolute)
    back = torch.arange(9)[:, None] - torch.arange(9)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < 4))
    out = attention.out(rearrange(out, "N H t D -> N t (H D)"))
    torch.testing.assert_close(attention(x, times), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("alibi", [False, True])
def test_long_videos_in_chunks_of_queries_equal_one_banded_mask(alibi, past):
    torch.manual_seed(0)
    length, window = 75, 5
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (length, length + past, length + past))
    back = torch.arange(past, past + length)[:, None] - torch.arange(past + length)
    bias = torch.where((back >= 0) & (back < window), 0.0, -torch.inf).double()[None]
    slopes = alibi_slopes(4, device=q.device, dtype=q.dtype) if alibi else None
    if slopes is not None:
        assert slopes.tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
        bias = bias - slopes[:, None, None] * back
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    torch.testing.assert_close(causal_window_attend(q, k, v, window=window, slopes=slopes), whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_more_sequences_than_one_kernel_takes(monkeypatch):
    encoder, decoder = build()
    x = video((4, 8, 8), 5, batch=2)
    z = encoder(x)
    monkeypatch.setattr(windows, "_MAX_SEQUENCES", 7)
    torch.testing.assert_close(encoder(x), z, rtol=0, atol=1e-12)


def test_temporal_window_is_the_trained_clip_unless_set():
    config = replace(TINY, temporal_window=None)
    for frames, stride, window in ((17, (4, 8, 8), 5), (11, (2, 8, 8), 6), (1, (4, 8, 8), 1), (16, (1, 8, 8), 16)):
        encoder = SpaceTimeEncoder(config, latent_channels=4, stride=stride, num_frames=frames)
        assert {m.window for m in encoder.modules() if isinstance(m, TemporalAttention)} == {window}


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [(4, 8, 8), (1, 8, 8)], ids=str)
def test_every_parameter_learns(stride, form):
    encoder, decoder = build(FORMS[form], stride)
    decoder(encoder(video(stride, 3))).square().mean().backward()
    for half in (encoder, decoder):
        for name, parameter in half.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_first_frame_and_later_frames_have_weights_of_their_own():
    encoder, decoder = build()
    first = encoder.embed.split
    assert first == decoder.head.split == 3 * 8 * 8
    assert decoder.last is decoder.head.weight and decoder.last.shape == (5 * first, 16)
    decoder(encoder(video((4, 8, 8), 1))).square().mean().backward()  # an image
    for grad in (encoder.embed.weight.grad.T, decoder.last.grad):
        assert grad[:first].abs().amax(1).min() > 0 and grad[first:].abs().max() == 0
    encoder.zero_grad(), decoder.zero_grad()
    z = encoder(video((4, 8, 8), 2))
    decoder(z)[:, :, 1:].square().mean().backward()
    assert decoder.last.grad[:first].abs().max() == 0 and decoder.last.grad[first:].abs().amax(1).min() > 0
    assert encoder.embed.weight.grad[:, first:].abs().amax(0).min() > 0


def test_checkpointing_changes_memory_not_numbers(monkeypatch):
    calls = []
    inner = TemporalAttention.forward
    monkeypatch.setattr(TemporalAttention, "forward", lambda self, *a: (calls.append(1), inner(self, *a))[1])
    grads = []
    for checkpoint in (False, True):
        encoder, decoder = build(replace(TINY, checkpoint=checkpoint))
        encoder.train(), decoder.train()
        decoder(encoder(video((4, 8, 8), 3))).square().mean().backward()
        grads.append([p.grad for p in [*encoder.parameters(), *decoder.parameters()]])
    assert len(calls) == 4 + 8  # each block once, then once more to recompute
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("patch", [None, [2, 4, 8]])
@torch.no_grad()
def test_inflated_from_images(patch):
    """A still video's patches have the first frame's vector; every frame of a patch is decoded as a first frame."""
    config = replace(TINY if patch is None else FORMS["merged"], temporal_window=1, patch=patch, peg=False)
    encoder, decoder = build(config)
    encoder.inflate(), decoder.inflate()
    still = repeat(video((4, 8, 8), 1), "B C 1 H W -> B C T H W", T=9)
    z = encoder(still)
    torch.testing.assert_close(z, z[:, :, :1].expand_as(z), rtol=0, atol=1e-10)
    out = decoder(z)
    torch.testing.assert_close(out, out[:, :, :1].expand_as(out), rtol=0, atol=1e-10)


def test_bf16_stays_finite_and_close():
    torch.manual_seed(0)
    config = replace(TINY, width=32)
    encoder, decoder = (
        kind(config, latent_channels=8, stride=(4, 8, 8)) for kind in (SpaceTimeEncoder, SpaceTimeDecoder)
    )
    x = video((4, 8, 8), 5).float()
    whole = decoder(encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(encoder(x))
        cache: Cache = {}
        parts = torch.cat([decoder(encoder(part, cache), cache) for part in x.split([5, 12], 2)], 2)
    out.float().square().mean().backward()
    for close in (out, parts):
        assert (close.float() - whole).abs().max() < 0.05 * whole.abs().max() + 0.05
    assert all(p.grad.isfinite().all() for p in [*encoder.parameters(), *decoder.parameters()])


def test_it_learns_to_reconstruct():
    torch.manual_seed(0)
    config = replace(TINY, width=32)
    encoder, decoder = (
        kind(config, latent_channels=8, stride=(2, 4, 4)) for kind in (SpaceTimeEncoder, SpaceTimeDecoder)
    )
    ramp = torch.linspace(-1, 1, 8)
    x = torch.stack([torch.stack([(ramp * a).roll(t, 0) for t in range(5)]) for a in (1, -1, 0.5, 0.2)])
    x = x[:, None, :, None].expand(-1, 3, -1, 8, -1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (decoder(encoder(x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- sizes, files, errors --------------------------------------------------------------------------------------------

FULL = {
    "omnitokenizer": (SpaceTimeConfig(mlp="swiglu", norm="layer"), (4, 8, 8), (17, 256, 256), (5, 32, 32)),
    "phenaki": (
        SpaceTimeConfig(
            encoder_spatial="tttt", decoder_spatial="tttt", temporal_positions="alibi", norm="layer", qk_norm=False
        ),
        (2, 8, 8),
        (11, 128, 128),
        (6, 16, 16),
    ),
    "merged": (
        SpaceTimeConfig(patch=[4, 8, 8], encoder_spatial="wsmtt", decoder_spatial="ttmws"),
        (8, 16, 16),
        (17, 256, 256),
        (3, 16, 16),
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_on_the_meta_device(name):
    config, stride, (frames, height, width), grid = FULL[name]
    with torch.device("meta"):
        encoder = SpaceTimeEncoder(config, latent_channels=8, stride=stride, num_frames=frames)
        decoder = SpaceTimeDecoder(config, latent_channels=8, stride=stride, num_frames=frames)
        z = encoder(torch.empty(1, 3, frames, height, width))
        assert z.shape == (1, 8, *grid) and decoder(z).shape == (1, 3, frames, height, width)
    count = sum(p.numel() for half in (encoder, decoder) for p in half.parameters())
    st, sh, sw = config.patch or stride
    merged = 2 * (4 + 8) * 512**2 if config.patch else 0
    matrices = 16 * 12 * 512**2 + 2 * (1 + st) * 3 * sh * sw * 512 + 2 * 8 * 512 + merged
    assert matrices < count < 1.01 * matrices


def test_config_is_a_node_of_a_yaml():
    node = OmegaConf.merge(OmegaConf.structured(SpaceTimeConfig), {"window": [4, 4], "temporal_window": 3})
    assert OmegaConf.to_object(node) == SpaceTimeConfig(window=[4, 4], temporal_window=3)


@torch.no_grad()
def test_it_ships_in_one_file_and_loads_strictly(monkeypatch):
    text = bundle([("vtok.layers.spacetime", ["SpaceTimeConfig", "SpaceTimeEncoder", "SpaceTimeDecoder"])])
    assert "from vtok" not in text and "import vtok" not in text
    shipped = types.ModuleType("shipped")
    monkeypatch.setitem(sys.modules, "shipped", shipped)  # where dataclasses look up annotations
    exec(compile(text, "shipped.py", "exec"), vars(shipped))
    x, config = video((4, 8, 8), 2), shipped.SpaceTimeConfig(**vars(TINY))
    for ours, kind in zip(build(), (shipped.SpaceTimeEncoder, shipped.SpaceTimeDecoder)):
        theirs = kind(config, latent_channels=LATENT, stride=(4, 8, 8)).double()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        given, x = x, ours(x)
        assert torch.equal(theirs(given), x)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"encoder_spatial": "ttxx"}, "encoder_spatial='ttxx' has an unknown letter"),
        ({"decoder_spatial": "T"}, "decoder_spatial='T'"),
        ({"patch": [4, 8, 8]}, r"encoder_spatial='tws' and model.transformer.patch=\[4, 8, 8\] do not fit"),
        (
            {"encoder_spatial": "tmw", "decoder_spatial": "tmt"},
            "encoder_spatial='tmw' and model.transformer.patch=None",
        ),
        ({"encoder_spatial": "tmmw", "patch": [4, 8, 8]}, "needs one m in both"),
        ({"patch": [8, 8]}, r"patch=\[8, 8\] must be"),
        ({"decoder_temporal": -1}, "decoder_temporal=-1"),
        ({"window": [8]}, r"window=\[8\] must be \(height, width\)"),
        ({"window": [0, 8]}, r"window=\[0, 8\]"),
        ({"temporal_window": 0}, "temporal_window=0 must be at least 1"),
        ({"spatial_positions": "sin"}, "spatial_positions='sin' is unknown; choose rotary or learned"),
        ({"temporal_positions": "learned"}, "temporal_positions='learned' is unknown; choose rotary or alibi"),
        ({"width": 12}, "spatial_positions=rotary needs heads of a multiple of 4 channels"),
        ({"rotary_base": 1.0}, "rotary_base=1.0 must be more than 1"),
        ({"spatial_positions": "learned"}, "learned positions need grid"),
        ({"grid": [4, 4]}, "rotary ones take none"),
        ({"spatial_positions": "learned", "grid": [4]}, r"grid=\[4\] must be"),
        ({"mlp": "relu"}, "mlp='relu' is unknown"),
        ({"norm": "batch"}, "norm='batch' is unknown"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves no hidden unit"),
    ],
)
def test_bad_settings_name_the_key(change, says):
    with pytest.raises(ValueError, match=says) as error:
        replace(TINY, **change)
    assert "model.transformer." in str(error.value)


@torch.no_grad()
def test_bad_inputs_say_what_was_expected():
    encoder, decoder = build()
    x = video((4, 8, 8), 2)
    with pytest.raises(ValueError, match=r"4 frames given, expected 1 \+ 4 n"):
        encoder(x[:, :, :4])
    with pytest.raises(ValueError, match="24 x 39 pixels must be padded to multiples of 8 x 8"):
        encoder(x[..., :39])
    with pytest.raises(ValueError, match=r"expected \[B, 3, T, H, W\]"):
        encoder(x[:, :2])
    with pytest.raises(ValueError, match=r"expected \[B, 5, t >= 1, h, w\]"):
        decoder(encoder(x)[:, :, :0])
    cache: Cache = {}
    encoder(x, cache)
    with pytest.raises(ValueError, match="expected 4 n, n >= 1, where a stream goes on"):
        encoder(x, cache)
    with pytest.raises(ValueError, match=r"began with \(clips, h, w\) = \(1, 3, 5\) and goes on with \(1, 3, 4\)"):
        encoder(x[:, :, 1:, :, :32], cache)
    with pytest.raises(ValueError, match=r"stride=\(4, 8\) must be"):
        SpaceTimeEncoder(TINY, latent_channels=4, stride=(4, 8))
    with pytest.raises(ValueError, match=r"patch=\[1, 8, 4\] does not divide the compression \(4, 4, 4\)"):
        SpaceTimeDecoder(FORMS["merged"], latent_channels=4, stride=(4, 4, 4))
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        SpaceTimeEncoder(replace(TINY, temporal_window=None), latent_channels=4, stride=(4, 8, 8), num_frames=0)
