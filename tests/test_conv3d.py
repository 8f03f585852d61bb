"""The causal convolutional backbone: shapes, causality, streams, gradients, wavelets and inflation, for every form.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtok.layers.causal import Cache, CausalConv3d, inflate_2d
from vtok.layers.conv3d import ConvDecoder, ConvEncoder
from vtok.layers.conv_blocks import TimeAttention
from vtok.layers.conv_plan import ConvConfig, sampling_plan
from vtok.layers.wavelet import HaarPatch

TINY: dict[str, Any] = {"width": 4, "num_res_blocks": 1, "decoder_res_blocks": 1, "num_heads": 2}
VIDTOK = {"mult": [1, 2, 2, 2]}
MAGVIT = {
    "mult": [1, 1, 2, 2],
    "conv": "full",
    "sampling": "joint",
    "temporal_down": "strided",
    "spatial_up": "depth_to_space",
    "temporal_up": "depth_to_space",
    "attention": "none",
    "adaptive_norm": True,
}
MAGVIT_SEPARATE = MAGVIT | {"sampling": "separate", "norm": "rms", "temporal_padding": "zero"}
COSMOS = {
    "mult": [1, 2, 2],
    "conv": "factorised",
    "spatial_down": "residual",
    "temporal_down": "residual",
    "spatial_up": "residual",
    "temporal_up": "residual",
    "patch": "haar",
    "attention": "spatial_temporal",
    "temporal_window": 2,
}
WAN = {
    "mult": [1, 2, 2, 2],
    "conv": "full",
    "temporal_down": "strided",
    "temporal_up": "interpolate",
    "norm": "rms",
    "qk_norm": False,
}
FORMS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("vidtok", VIDTOK, (4, 8, 8)),
    ("vidtok", VIDTOK | {"decoder_temporal_levels": [0, 1]}, (4, 8, 8)),
    ("vidtok", VIDTOK, (8, 8, 8)),
    ("vidtok", VIDTOK, (1, 8, 8)),
    ("vidtok", VIDTOK | {"attention": "spatial_temporal", "temporal_window": 2}, (2, 8, 8)),
    ("vidtok", VIDTOK | {"mult": [1, 1, 1, 2, 2]}, (4, 16, 16)),
    ("magvit", MAGVIT, (4, 8, 8)),
    ("magvit", MAGVIT | {"mult": [1, 1, 1, 2, 2]}, (8, 16, 16)),
    ("magvit_separate", MAGVIT_SEPARATE, (4, 8, 8)),
    ("cosmos", COSMOS, (4, 8, 8)),
    ("cosmos", COSMOS, (8, 8, 8)),
    ("cosmos", COSMOS, (8, 16, 16)),
    ("cosmos", COSMOS, (1, 8, 8)),
    ("wan", WAN, (4, 8, 8)),
    ("wan", WAN, (2, 4, 8)),
]
EACH = {
    "vidtok": (VIDTOK, (4, 8, 8)),
    "magvit": (MAGVIT, (4, 8, 8)),
    "magvit_separate": (MAGVIT_SEPARATE, (4, 8, 8)),
    "cosmos": (COSMOS, (8, 8, 8)),
    "wan": (WAN, (2, 4, 8)),
}


def build(
    form: dict[str, Any], stride: tuple[int, int, int], *, seed: int = 0, **changes: Any
) -> tuple[ConvEncoder, ConvDecoder]:
    """Encoder and decoder in float64, every parameter moved from its first value, so that nothing is zero or one."""
    torch.manual_seed(seed)
    config = ConvConfig(**(TINY | form | changes))
    pair = ConvEncoder(config, latent_channels=3, stride=stride), ConvDecoder(config, latent_channels=3, stride=stride)
    for module in pair:
        module.double()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return pair


def clip(stride: tuple[int, int, int], groups: int, *, size: tuple[int, int] = (1, 1), batch: int = 1) -> Tensor:
    """[batch, 3, 1 + st groups, sh size[0], sw size[1]] in [-1, 1]."""
    torch.manual_seed(1)
    st, sh, sw = stride
    return torch.rand(batch, 3, 1 + st * groups, sh * size[0], sw * size[1], dtype=torch.float64) * 2 - 1


def stream(module: nn.Module, x: Tensor, cuts: list[int], cache: Cache | None = None) -> Tensor:
    cache = {} if cache is None else cache
    return torch.cat([module(part, cache) for part in x.split(cuts, 2)], 2)


@pytest.fixture(
    scope="module", params=FORMS, ids=[f"{name}-{'x'.join(map(str, s))}-{i}" for i, (name, _, s) in enumerate(FORMS)]
)
def network(request):
    """(encoder, decoder, stride) of each form; tests leave its weights alone."""
    _, form, stride = request.param
    return *build(form, stride), stride


@torch.no_grad()
def test_shapes_of_images_videos_and_other_sizes(network):
    encoder, decoder, stride = network
    for groups, size, batch in ((0, (1, 1), 2), (1, (1, 2), 1), (3, (1, 1), 1)):
        x = clip(stride, groups, size=size, batch=batch)
        z = encoder(x)
        assert z.shape == (batch, 3, 1 + groups, *size) and z.isfinite().all()
        assert decoder(z).shape == x.shape


@torch.no_grad()
def test_later_frames_never_change_earlier_ones(network):
    encoder, decoder, stride = network
    st, x = stride[0], clip(stride, 2)
    z = encoder(x)
    y = decoder(z)
    for i in range(2):
        later = x.clone()
        later[:, :, 1 + st * i :] += torch.randn_like(later[:, :, 1 + st * i :])
        got = encoder(later)
        assert torch.equal(got[:, :, : i + 1], z[:, :, : i + 1])
        assert not torch.allclose(got[:, :, i + 1], z[:, :, i + 1])
        later = z.clone()
        later[:, :, i + 1 :] += torch.randn_like(later[:, :, i + 1 :])
        got = decoder(later)
        assert torch.equal(got[:, :, : 1 + st * i], y[:, :, : 1 + st * i])
        assert not torch.allclose(got[:, :, 1 + st * i :], y[:, :, 1 + st * i :])


@torch.no_grad()
def test_a_stream_equals_the_whole_in_any_cuts(network):
    encoder, decoder, stride = network
    st, x = stride[0], clip(stride, 3)
    z = encoder(x)
    y = decoder(z)
    for cuts in ([1, 1, 2], [2, 2]):
        frames = [st * n - (st - 1) * (i == 0) for i, n in enumerate(cuts)]
        torch.testing.assert_close(stream(encoder, x, frames), z, rtol=0, atol=1e-10)
        torch.testing.assert_close(stream(decoder, z, cuts), y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", [VIDTOK | {"attention": "spatial_temporal", "temporal_window": 3}, MAGVIT, COSMOS])
@torch.no_grad()
def test_the_cache_is_constant_in_the_length_of_the_video(form):
    def held(cache: Cache) -> int:
        tensors = [t for value in cache.values() for t in (value if isinstance(value, tuple) else (value,))]
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))

    stride = (4, 8, 8)
    for module, x in zip(build(form, stride), (clip(stride, 11), torch.randn(1, 3, 12, 1, 1, dtype=torch.float64))):
        step = 4 if isinstance(module, ConvEncoder) else 1
        cache: Cache = {}
        module(x[:, :, :1], cache)
        sizes = []
        for first in range(1, x.shape[2], step):
            module(x[:, :, first : first + step], cache)
            sizes.append(held(cache))
        assert len(sizes) == 11 and sizes[0] > 0 and len(set(sizes[2:])) == 1, sizes


@pytest.mark.parametrize(("form", "stride"), EACH.values(), ids=EACH)
def test_gradients_reach_every_parameter_and_checkpoints_keep_them(form, stride):
    got = []
    for checkpoint in (False, True):
        encoder, decoder = build(form, stride, checkpoint=checkpoint)
        (decoder(encoder(clip(stride, 1))) ** 2).mean().backward()
        named = {f"{i}.{n}": p for i, m in enumerate((encoder, decoder)) for n, p in m.named_parameters()}
        dead = [name for name, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0]
        # One latent position attends to itself alone: its queries and keys have no say.
        assert not [name for name in dead if "attention.q" not in name and "attention.k" not in name]
        got.append({name: p.grad for name, p in named.items()})
    for name, gradient in got[0].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=0)


def test_gradients_reach_queries_and_keys_and_the_output_layer():
    encoder, decoder = build(COSMOS, (4, 8, 8))
    (decoder(encoder(clip((4, 8, 8), 2, size=(2, 2)))) ** 2).mean().backward()
    for module in (encoder, decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert decoder.last.grad is not None and decoder.last.shape[0] == 3 * 64


def test_a_checkpoint_is_taken_only_in_training_and_without_a_cache(monkeypatch):
    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    encoder, _ = build(VIDTOK, (1, 8, 8), checkpoint=True)
    x = clip((1, 8, 8), 0)
    encoder(x, {})
    encoder.eval()(x)
    assert not calls
    encoder.train()(x)
    assert calls


@pytest.mark.parametrize(("form", "stride"), EACH.values(), ids=EACH)
@torch.no_grad()
def test_new_networks_pass_their_input_on_and_begin_grey(form, stride):
    torch.manual_seed(0)
    config = ConvConfig(**(TINY | form | {"width": 16}))
    decoder = ConvDecoder(config, latent_channels=3, stride=stride)
    assert not decoder(torch.randn(1, 3, 2, 2, 2)).any()
    colours = (torch.rand(4, 3, 1, 1, 1) * 2 - 1).expand(-1, -1, 1, 2 * stride[1], 2 * stride[2])
    latents = ConvEncoder(config, latent_channels=8, stride=stride)(colours)
    assert 0.1 < latents.std(0).mean() < 3, "clips of one colour each must differ"


@torch.no_grad()
def test_frames_and_batches_do_not_mix():
    encoder, decoder = build(WAN | {"attention": "spatial_temporal", "temporal_window": 1}, (4, 8, 8))
    x = clip((4, 8, 8), 1, batch=2)
    for i in range(2):
        torch.testing.assert_close(encoder(x[i : i + 1]), encoder(x)[i : i + 1], rtol=0, atol=1e-12)
    still = x[:, :, :1].expand(-1, -1, 9, -1, -1)
    z = encoder(still)
    assert torch.allclose(z, encoder(x[:, :, :1]), atol=1e-12), "a still video is its image, latent by latent"
    assert torch.allclose(decoder(z), decoder(z[:, :, :1]), atol=1e-12)


def test_what_does_not_fit_says_so():
    encoder, _ = build(VIDTOK, (4, 8, 8))
    with pytest.raises(ValueError, match=r"4 frames, the encoder takes 1 \+ 4 n"):
        encoder(torch.zeros(1, 3, 4, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="12 x 8, no multiple of 8 x 8"):
        encoder(torch.zeros(1, 3, 1, 12, 8, dtype=torch.float64))
    cache: Cache = {}
    encoder(clip((4, 8, 8), 0), cache)
    with pytest.raises(ValueError, match="5 frames, the encoder takes 4 n, as the stream has begun"):
        encoder(clip((4, 8, 8), 1), cache)
    encoder(clip((4, 8, 8), 1)[:, :, 1:], cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "group"}, "model.conv.norm='group' is unknown; choose layer, rms"),
        ({"temporal_padding": "reflect"}, "temporal_padding='reflect' is unknown"),
        ({"sampling": "joint", "spatial_up": "residual"}, "sampling=joint"),
        ({"mult": []}, r"mult=\[\] must hold"),
        ({"width": 100, "num_heads": 3}, "num_heads=3 does not divide"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"mid_blocks": 0}, "mid_blocks=0"),
        ({"decoder_res_blocks": 0}, "decoder_res_blocks=0"),
        ({"temporal_window": 0}, "temporal_window=0"),
        ({"temporal_window": 8}, "model.conv.temporal_window=8 needs attention=spatial_temporal, not spatial: leave"),
        ({"patch_size": 2}, "model.conv.patch_size=2 needs patch=haar: leave it out"),
    ],
)
def test_bad_configurations_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        ConvConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "stride", "message"),
    [
        ({}, (4, 16, 16), r"mult=\[1, 2, 4, 4\] has room for 3"),
        ({}, (3, 8, 8), r"model.stride=\[3, 8, 8\] must be three powers of two"),
        ({"temporal_levels": [2]}, (4, 8, 8), r"temporal_levels=\[2\] must be 2 different levels below 3"),
        ({"temporal_kernel": 1}, (4, 8, 8), "temporal_kernel=1 cannot halve time"),
    ],
)
def test_strides_out_of_reach_say_why(changes, stride, message):
    with pytest.raises(ValueError, match=message):
        sampling_plan(ConvConfig(**changes), stride)


def test_where_a_stride_is_spent():
    patch, encoder, decoder = sampling_plan(ConvConfig(decoder_temporal_levels=[0, 1]), (4, 8, 8))
    assert patch == (1, 1, 1) and encoder == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert decoder == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
    patch, encoder, _ = sampling_plan(ConvConfig(mult=[2, 4, 4], patch="haar", temporal_levels=[0]), (8, 16, 16))
    assert patch == (4, 4, 4) and encoder == [(2, 2, 2), (1, 2, 2)]
    assert sampling_plan(ConvConfig(patch="haar"), (1, 8, 4))[:2] == ((1, 4, 4), [(1, 2, 1), (1, 1, 1), (1, 1, 1)])


# ---- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(4, 4, 4), (2, 4, 2), (1, 2, 8)])
def test_haar_bands_are_invertible_and_causal(patch):
    haar = HaarPatch(patch)
    video = torch.randint(0, 256, (2, 3, 1 + 2 * patch[0], 8, 16)).float()
    bands = haar(video)
    assert bands.shape == (2, 3 * haar.channels, 3, 8 // patch[1], 16 // patch[2])
    assert torch.equal(haar.inverse(bands), video), "half sums of bytes are exact in float32"
    first = video[:, :, 0].unfold(2, patch[1], patch[1]).unfold(3, patch[2], patch[2]).mean((-1, -2))
    assert torch.allclose(bands[:, :3, 0], first, atol=1e-3), "the first band is the mean of the block"
    later = video.clone()
    later[:, :, 1:] = 0
    assert torch.equal(haar(later)[:, :, 0], bands[:, :, 0])
    image = HaarPatch((1, *patch[1:]))
    assert torch.equal(image(video[:, :, :1]), bands[:, : 3 * image.channels, :1]), "time is the outermost band"
    with pytest.raises(ValueError, match="powers of two"):
        HaarPatch((3, 4, 4))


@pytest.mark.parametrize("skip", ["none", "add", "blend"])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("padding", ["replicate", "zero"])
@torch.no_grad()
def test_a_skip_inside_the_kernel_is_the_skip_beside_it(skip, stride, padding):
    torch.manual_seed(0)
    conv = CausalConv3d(3, 3, stride=stride, skip=skip, padding=padding).double()
    x = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    before = x[:, :, :1].expand(-1, -1, 2, -1, -1) * (padding == "replicate")
    padded = torch.cat([before, x], 2)
    want = nn.functional.conv3d(padded, conv.weight, conv.bias, stride, (0, 1, 1))
    if skip != "none":
        frames = 3 if skip == "blend" and stride[0] == 2 else stride[0]
        pool = nn.functional.avg_pool3d(padded[:, :, 3 - frames :], (frames, *stride[1:]), stride)
        bias = conv.bias[:, None, None, None]
        want = want + pool if skip == "add" else 0.5 * (want - bias) + 0.5 * pool + bias
    torch.testing.assert_close(conv(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv(x[:, :, :1]), want[:, :, :1], rtol=0, atol=1e-12)


def test_a_convolution_that_would_skip_frames_is_refused():
    with pytest.raises(ValueError, match="kernel=1 frames is less than stride=2"):
        CausalConv3d(3, 3, (1, 3, 3), stride=(2, 1, 1))
    with pytest.raises(ValueError, match="even in space"):
        CausalConv3d(3, 3, (3, 2, 2))
    with pytest.raises(ValueError, match="equal channels, not 3 and 4"):
        CausalConv3d(3, 4, skip="add")


@torch.no_grad()
def test_attention_over_time_is_bounded_and_blind_to_the_clock():
    torch.manual_seed(0)
    attention = TimeAttention(
        8, ConvConfig(width=8, mult=[1], num_heads=2, attention="spatial_temporal", temporal_window=3)
    ).double()
    x = torch.randn(1, 8, 9, 5, 1, dtype=torch.float64)
    y = attention(x)
    shifted = attention(torch.cat([torch.randn(1, 8, 7, 5, 1, dtype=torch.float64), x], 2))
    torch.testing.assert_close(shifted[:, :, 9:], y[:, :, 2:], rtol=0, atol=1e-12)
    assert not torch.allclose(shifted[:, :, 8], y[:, :, 1]), "inside the window the past counts"
    swapped = attention(x[:, :, [1, 0, 2]])
    assert not torch.allclose(swapped[:, :, 2], y[:, :, 2]), "order counts"


# ---- inflation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["last", "mean"])
@pytest.mark.parametrize("form", [VIDTOK, MAGVIT, COSMOS, WAN], ids=["vidtok", "magvit", "cosmos", "wan"])
@torch.no_grad()
def test_an_inflated_image_model_is_that_image_model(form, mode):
    image_form = form | {"temporal_kernel": 1}
    if form.get("attention") == "spatial_temporal":
        image_form |= {"attention": "spatial", "temporal_window": ConvConfig.temporal_window}
    images = build(image_form, (1, 8, 8))
    videos = build(form, (4, 8, 8), seed=2)
    for image, video in zip(images, videos):
        state = {k: v[:, :, 0] if v.ndim == 5 else v for k, v in image.state_dict().items()}  # as a Conv2d has them
        inflate_2d(state, video, mode=mode)
    x = clip((4, 8, 8), 0)
    z = images[0](x)
    still = x.expand(-1, -1, 9, -1, -1)
    for frames in (x, still):
        got = videos[0](frames)
        torch.testing.assert_close(got, z.expand_as(got), rtol=0, atol=1e-12)
        back = videos[1](got)
        torch.testing.assert_close(back, images[1](z).expand_as(back), rtol=0, atol=1e-12)


def test_inflation_is_strict_and_changes_nothing_when_it_fails():
    image, _ = build(VIDTOK | {"temporal_kernel": 1}, (1, 8, 8))
    video, _ = build(VIDTOK, (4, 8, 8))
    before = {k: v.clone() for k, v in video.state_dict().items()}
    good = image.state_dict()
    key = "conv_in.0.weight"
    cases = [
        (good | {"head.weight": torch.zeros(1)}, "last", "1 keys of the image model are not in the video model"),
        ({k: v for k, v in good.items() if k != key}, "last", f"{key} is missing from the image model"),
        (good | {key: torch.zeros(4, 3, 5, 5)}, "last", rf"{key} is \(4, 3, 5, 5\)"),
        (good | {key: torch.zeros(8, 3, 3, 3)}, "last", "does not inflate to"),
        (good, "first", "mode='first' is unknown"),
    ]
    for state, mode, message in cases:
        with pytest.raises(ValueError, match=message):
            inflate_2d(state, video, mode=mode)
    assert all(torch.equal(v, before[k]) for k, v in video.state_dict().items())
    lacked = inflate_2d(good, video)
    assert lacked and not set(lacked) & set(good) and "down.1.time.weight" in lacked


# ---- precision and size --------------------------------------------------------------------------------------------


def test_autocast_keeps_the_stream_of_activations_in_bfloat16():
    config = ConvConfig(**(TINY | MAGVIT | {"width": 8, "attention": "spatial_temporal"}))
    encoder = ConvEncoder(config, latent_channels=3, stride=(4, 8, 8))
    decoder = ConvDecoder(config, latent_channels=3, stride=(4, 8, 8))
    kinds = set()
    for block in itertools.chain(*encoder.levels, *decoder.levels):
        block.register_forward_hook(lambda module, given, out: kinds.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(encoder(clip((4, 8, 8), 1).float()))
    out.float().square().mean().backward()
    assert kinds == {torch.bfloat16} and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("changes", "stride", "low", "high"),
    [
        ({"decoder_temporal_levels": [0, 1]}, (4, 8, 8), 157e6, 158e6),
        (COSMOS | {"mult": [2, 4, 4]}, (8, 8, 8), 104e6, 107e6),
        (MAGVIT | {"mult": [1, 2, 2, 4], "num_res_blocks": 4, "decoder_res_blocks": 4}, (4, 8, 8), 300e6, 330e6),
    ],
)
def test_full_sizes_on_the_meta_device(changes, stride, low, high):
    with torch.device("meta"):
        config = ConvConfig(**(changes | {"temporal_window": 16} if "temporal_window" in changes else changes))
        encoder = ConvEncoder(config, latent_channels=6, stride=stride)
        decoder = ConvDecoder(config, latent_channels=6, stride=stride)
        z = encoder(torch.zeros(1, 3, 1 + stride[0], 64, 64))
        assert z.is_meta and z.shape == (1, 6, 2, 64 // stride[1], 64 // stride[2])
    assert low < sum(p.numel() for m in (encoder, decoder) for p in m.parameters()) < high
