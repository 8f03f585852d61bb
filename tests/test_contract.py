"""The laws of `vtok/types.py`, held by every family of the package in every form that has code of its own.

A new family joins by one entry in FAMILIES. Laws of tokenizers (decode, lookup, streaming) are asked of what has these.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch

from vtok.config import family_names, load_family
from vtok.layers.conv3d import ConvConfig
from vtok.layers.flow import SamplerConfig
from vtok.layers.masks import CrossTime
from vtok.layers.spacetime import SpaceTimeConfig
from vtok.quantize import QuantizerConfig
from vtok.types import Clip, Compressor, Streaming, Tokenizer, to_uint8

FLEXIBLE = dict(num_frames=8, size=[16, 16], patch=[2, 8, 8], width=32, encoder_depth=2, decoder_depth=2, num_heads=2)
FLEXIBLE_FORMS = {
    "full": dict(mask="full", num_tokens=8),
    "causal_last": dict(mask="causal_last", num_tokens=8),
    "pyramid": dict(mask="full", registers="pyramid", num_tokens=8),
    "dct": dict(mask="full", registers="dct", num_tokens=8, dct_frequencies=[4, 6, 6]),
    "cut": dict(mask="causal_last", dropped="cut", num_tokens=8),
    "block_causal": dict(mask="time_block_causal", blocks=4, num_tokens=4, dropped="cut"),
    "block_causal_last": dict(mask="time_block_causal_last", blocks=2, num_tokens=4),
    "block_pyramid": dict(mask="time_block_causal_last", blocks=2, num_tokens=4, registers="pyramid"),
    "sincos": dict(mask="full", positions="sincos", mlp="swiglu", num_tokens=8),
    "vq": dict(mask="full", num_tokens=8, quantizer=QuantizerConfig(name="vq", codebook_size=32, dim=6)),
    "lfq": dict(mask="full", num_tokens=8, quantizer=QuantizerConfig(name="lfq", codebook_size=256)),
    "identity": dict(mask="full", num_tokens=8, quantizer=QuantizerConfig(name="identity", dim=6)),
    "kl": dict(mask="full", num_tokens=8, quantizer=QuantizerConfig(name="identity", dim=6, kl=1e-3)),
}
CONV = dict(width=8, mult=[1, 2], num_res_blocks=1, mid_blocks=1, num_heads=2)
DISCRETE = dict(num_frames=5, size=[16, 16], stride=[2, 2, 2], latent_channels=6, conv=ConvConfig(**CONV))
SPACETIME = dict(
    width=16,
    num_heads=2,
    encoder_spatial="tw",
    encoder_temporal=1,
    decoder_temporal=1,
    decoder_spatial="t",
    window=[2, 2],
)
TRANSFORMER: dict[str, Any] = dict(backbone="transformer", conv=ConvConfig(), transformer=SpaceTimeConfig(**SPACETIME))
DISCRETE_FORMS = {
    "conv": dict(),
    "conv_factorised": dict(
        stride=[4, 4, 4],
        conv=ConvConfig(
            **CONV | dict(mult=[1, 2, 2]), conv="factorised", attention="spatial_temporal", temporal_window=2
        ),
    ),
    "conv_wan": dict(
        stride=[4, 4, 4],
        conv=ConvConfig(
            **CONV | dict(mult=[1, 2, 2]),
            conv="full",
            temporal_padding="zero",
            sampling_kernel="time",
            halve_up=True,
            temporal_down="strided",
            temporal_up="depth_to_space",
            norm="rms",
            qk_norm=False,
        ),
    ),
    "first_fine": dict(
        stride=[2, 4, 4],
        conv=ConvConfig(**CONV | dict(mult=[1, 2, 2]), conv="full", halve_up=True, first_fine=True),
    ),
    "first_fine_kl": dict(
        stride=[4, 4, 4],
        quantizer=QuantizerConfig(name="identity", dim=6, kl=1e-3),
        conv=ConvConfig(**CONV | dict(mult=[1, 2, 2]), temporal_up="depth_to_space", first_fine=True),
    ),
    "haar": dict(stride=[4, 8, 8], conv=ConvConfig(**CONV, patch="haar", norm="rms", adaptive_norm=True)),
    "frames": dict(stride=[1, 2, 2]),
    "tiled": dict(stride=[2, 8, 8], tile=2, tile_overlap=1, conv=ConvConfig(**CONV | dict(mult=[1, 1, 1, 1]))),
    "two_levels": dict(coarse=[2, 2, 2]),
    "two_levels_in_space": dict(coarse=[1, 2, 2], quantizer=QuantizerConfig(name="vq", codebook_size=32, dim=6)),
    "transformer": dict(TRANSFORMER, stride=[2, 4, 4]),
    "transformer_peg": dict(TRANSFORMER, stride=[2, 4, 4], transformer=SpaceTimeConfig(**SPACETIME, peg=True)),
    "transformer_two_levels": dict(TRANSFORMER, stride=[4, 8, 8], coarse=[1, 1, 2]),
    "lfq": dict(quantizer=QuantizerConfig(name="lfq", codebook_size=256)),
    "kl": dict(quantizer=QuantizerConfig(name="identity", dim=6, kl=1e-3)),
}
LATENTS = dict(
    channels=3,
    stride=[4, 4, 4],
    backbone="conv",
    conv=CONV | dict(mult=[1, 1, 2]),
    latent_channels=6,
    coarse=[],
    quantizer=dict(name="identity", dim=4, kl=1e-3),
)
FLOW = dict(
    num_frames=9,
    size=[16, 16],
    width=32,
    head_size=16,
    encoder_depth=2,
    decoder_depth=2,
    num_tokens=4,
    sampler=SamplerConfig(steps=3),
)
FLOW_FORMS = {
    "dct": dict(latents_config=LATENTS, registers="dct", dct_frequencies=[4, 4], patch=2),
    "latents": dict(latents_config=LATENTS, patch=2),
    "guided": dict(
        latents_config=LATENTS,
        mask="time_block_causal",
        sampler=SamplerConfig(steps=3, guidance=3.0, threshold=2.5, momentum=-0.5),
    ),
    "pixels": dict(patch=8, mask="time_block_causal", num_frames=8),
    "images": dict(patch=4, num_frames=1),
    "switched": dict(latents_config=LATENTS, mask="flexible", cross_time=CrossTime(p_r="none", r_r="causal")),
    "continuous": dict(latents_config=LATENTS, quantizer=QuantizerConfig(name="identity", dim=6)),
}
# family: (Config values of a tiny model that sees clips of 16 x 16 pixels, {form: what it changes})
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "flexible": (FLEXIBLE, FLEXIBLE_FORMS),
    "discrete": (DISCRETE, DISCRETE_FORMS),
    "flow": (FLOW, FLOW_FORMS),
}
# read features of a frozen tower, or texts: their laws are asked in test_contract_projectors
PROJECTORS = {"language", "reducer", "temporal", "vqtoken"}
CASES = [(family, form) for family, (_, forms) in FAMILIES.items() for form in sorted(forms)]
# later frames never change earlier tokens
CAUSAL = [("flexible", form) for form in ("block_causal", "block_causal_last", "block_pyramid")]
CAUSAL += [("discrete", form) for form in DISCRETE_FORMS]
CAUSAL += [("flow", form) for form in FLOW_FORMS]
DRAWN = {"flow"}  # frames of a chunk are drawn together
# the transform code computes in float32 whatever the model's precision
TOLERANCE = {("flexible", "dct"): 1e-5, ("flow", "dct"): 1e-5}
PRECISIONS = {torch.float64: 1e-10, torch.float32: 1e-5}

each_form = pytest.mark.parametrize("case", CASES, ids="-".join)


def make_config(family: str, form: str) -> Any:
    small, forms = FAMILIES[family]
    return load_family(family).Config(**copy.deepcopy(small | forms[form]))  # a test may set what is nested in it


def build_model(family: str, form: str, *, seed: int = 0) -> tuple[Any, Any]:
    """(model in eval mode and float64, its config); no weight is zero, so that every path carries signal."""
    torch.manual_seed(seed)
    config = make_config(family, form)
    model = load_family(family).Model(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    codebook = getattr(getattr(model, "quantizer", None), "codebook", None)
    if isinstance(codebook, torch.Tensor) and not codebook.any():  # filled from data otherwise
        codebook.copy_(torch.nn.functional.normalize(torch.randn(codebook.shape), dim=-1))
    return model.eval().double(), config


def video(batch: int, frames: int, size: tuple[int, int] = (16, 16), seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, frames, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(frames, *size), mode="trilinear")


def clip(pixels: torch.Tensor, lengths: list[int] | None = None) -> Clip:
    keys = [str(i) for i in range(pixels.shape[0])]
    return Clip(keys, pixels, None if lengths is None else torch.tensor(lengths))


def same(a, b, tolerance: float = 1e-10) -> None:
    assert a.lengths.tolist() == b.lengths.tolist()
    for name in ("group", "rank"):
        assert torch.equal(getattr(a, name)[a.mask], getattr(b, name)[b.mask])
    assert (a.embeddings[a.mask] - b.embeddings[b.mask]).abs().max() < tolerance
    if a.indices is not None:
        assert torch.equal(a.indices[a.mask], b.indices[b.mask])


class Poison(list):
    """A list that may be counted and carried along, but not looked into."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("encode looked at the answer")

    __iter__ = __getitem__ = __contains__ = __eq__ = __reversed__ = _refuse  # type: ignore[assignment]


def test_every_family_of_the_package_is_here():
    assert set(FAMILIES) | PROJECTORS == set(family_names()), "give each family its tiny forms in FAMILIES"


@each_form
@torch.no_grad()
def test_shapes_and_lookup(case):
    model, config = build_model(*case)
    assert isinstance(model, Compressor) and model.config is config
    for frames, size in itertools.product((1, 5, 8, 19), ((16, 16), (13, 22))):
        pixels = video(2, frames, size)
        tokens = model.encode(clip(pixels))
        assert tokens.embeddings.shape[-1] == model.embedding_dim
        if not isinstance(model, Tokenizer):
            continue
        assert model.decode(tokens, size=size).shape == pixels.shape
        assert tuple(tokens.codebook_sizes) == tuple(model.codebook_sizes)
        if tokens.indices is not None:
            assert torch.equal(model.lookup(tokens.indices).double(), tokens.embeddings.double())
            limit = torch.tensor(model.codebook_sizes)
            assert int(tokens.indices.min()) >= 0 and bool((tokens.indices < limit).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_that_a_model_cannot_see_are_refused(family):
    form = next(iter(FAMILIES[family][1]))
    model, config = build_model(family, form)
    objective = load_family(family).Objective(load_family(family).Objective.Config(), config)
    grey = video(2, 5)[:, :1].float()
    with pytest.raises(ValueError, match="Clip.video has 1 channels, the model takes 3: .*model.channels=1"):
        objective(model.float().train(), clip(grey), 0)
    for shape in ((2, 3, 0, 16, 16), (2, 3, 5, 0, 16)):
        with pytest.raises(ValueError, match=r"frames, height and width must be 1 or more each"):
            model.encode(clip(torch.zeros(shape)))
    for key in ("channels", *(["latent_channels"] if family == "discrete" else [])):
        with pytest.raises(ValueError, match=f"model.{key}=0 must be 1 or more, such as "):
            dataclasses.replace(config, **{key: 0})


@each_form
@torch.no_grad()
def test_encode_never_reads_the_answer(case):
    model, _ = build_model(*case)
    pixels = video(2, 8)
    plain = model.encode(clip(pixels))
    for video_ in (pixels, to_uint8(pixels)):
        poisoned = Clip(["0", "1"], video_, target=Poison(["a", "b"]), qa=Poison([{}, {}]))
        found = model.encode(poisoned)
    same(model.encode(Clip(["0", "1"], pixels, target=Poison(["a", "b"]), qa=Poison([{}, {}]))), plain, 1e-15)
    assert found.lengths.tolist() == plain.lengths.tolist()
    with pytest.raises(AssertionError, match="looked at the answer"):
        list(Poison([1]))


@each_form
@torch.no_grad()
def test_budget_is_truncation_and_is_met(case):
    model, _ = build_model(*case)
    pixels = clip(video(2, 19))
    everything = model.encode(pixels)
    most = int(everything.lengths[0])
    fixed = model.token_counts(19, (16, 16)) if hasattr(model, "token_counts") else None  # the budgets of a grid
    for budget in fixed or (1, 3, 7, most):
        tokens = model.encode(pixels, budget=budget)
        assert tokens.lengths.tolist() == [budget, budget]
        if budget < most or not fixed:
            same(tokens, everything.truncate(budget))
        assert model.decode(tokens, size=(16, 16)).isfinite().all()
    for budget in (0, most + 1, *((1, most - 1) if fixed else ())):
        with pytest.raises(ValueError, match=f"budget={budget}"):
            model.encode(pixels, budget=budget)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@each_form
@torch.no_grad()
def test_padding_and_batching_change_nothing(case, dtype):
    model, _ = build_model(*case)
    model.to(dtype)
    long, short = video(1, 19, seed=3).to(dtype), video(1, 5, seed=4).to(dtype)
    padded = torch.cat([long, torch.cat([short, torch.rand(1, 3, 14, 16, 16, dtype=dtype)], 2)])
    both = model.encode(clip(padded, [19, 5]))
    decoded = model.decode(both, size=(16, 16)) if isinstance(model, Tokenizer) else None
    for row, alone in enumerate((long, short)):
        single = model.encode(clip(alone))
        mask = both.mask[row]
        assert (both.embeddings[row][mask] - single.embeddings[0]).abs().max() < PRECISIONS[dtype]
        if both.indices is not None:
            assert torch.equal(both.indices[row][mask], single.indices[0])
        if decoded is not None:
            error = (decoded[row, :, : alone.shape[2]] - model.decode(single, size=(16, 16))[0]).abs().max()
            assert error < max(TOLERANCE.get(case, 0), PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@each_form
@torch.no_grad()
def test_streamed_equals_offline(case, dtype):
    model, _ = build_model(*case)
    if not isinstance(model, Streaming):
        pytest.skip("this family does not stream")
    model.to(dtype)
    pixels = video(2, 19, (13, 22)).to(dtype)
    times = torch.arange(19.0).expand(2, -1) / 8 + torch.tensor([[0.0], [3.0]])
    offline = model.encode(Clip(["0", "1"], pixels, times=times))
    whole = model.decode(offline, size=(13, 22))
    for cuts in ((19,), (1,) * 19, (3, 8, 7, 1)):
        state, decode_state = model.init_state(2, (13, 22)), model.init_decode_state(2, (13, 22))
        pieces, frames, at = [], [], 0
        for length in (*cuts, None):
            if length is None:
                tokens = model.flush(state)
            else:
                part = slice(at, at + length)
                tokens, state = model.step(Clip(["0", "1"], pixels[:, :, part], times=times[:, part]), state)
                at += length
            if tokens is not None:
                pieces.append(tokens)
                out, decode_state = model.decode_step(tokens, decode_state)
                frames.append(out)
        rest = model.decode_flush(decode_state)
        frames += [] if rest is None else [rest]
        frames = [frame for frame in frames if frame is not None]
        streamed = torch.cat([p.embeddings for p in pieces], 1)
        assert (streamed - offline.embeddings).abs().max() < PRECISIONS[dtype]
        if offline.indices is not None:
            assert torch.equal(torch.cat([p.indices for p in pieces], 1), offline.indices)
        assert torch.equal(torch.cat([p.times for p in pieces], 1), offline.times)
        error = (torch.cat(frames, 2) - whole).abs().max()
        assert error < max(TOLERANCE.get(case, 0), PRECISIONS[dtype])
        assert state.buffer is None


@pytest.mark.parametrize("case", CAUSAL, ids="-".join)
@torch.no_grad()
def test_later_frames_never_change_earlier_tokens(case):
    model, _ = build_model(*case)
    pixels = video(1, 8)
    tokens = model.encode(clip(pixels))
    changed = pixels.clone()
    ends = getattr(model.config, "block_frames", 1)  # of the first group: of a grid, one frame
    changed[:, :, ends:] *= -8  # far outside the range, so that no quantizer hides it
    other = model.encode(clip(changed))
    first = tokens.group == 0
    assert torch.equal(tokens.embeddings[first], other.embeddings[first])
    assert not torch.equal(tokens.embeddings[~first], other.embeddings[~first])
    frames = slice(0, ends)
    if case[0] in DRAWN:
        return
    one, two = (model.decode(t, size=(16, 16))[:, :, frames] for t in (tokens, other))
    assert torch.equal(one, two)


@each_form
def test_loading_what_was_saved_encodes_the_same(case, tmp_path):
    model, _ = build_model(*case)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other, _ = build_model(*case, seed=7)
    pixels = clip(video(2, 9))
    with torch.no_grad():
        assert not torch.equal(model.encode(pixels).embeddings, other.encode(pixels).embeddings)
        other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
        same(model.encode(pixels), other.encode(pixels), 1e-15)


@each_form
def test_a_small_step_lowers_the_loss_and_bfloat16_stays_finite(case):
    torch.manual_seed(0)
    family, config = load_family(case[0]), make_config(*case)
    model, objective = family.Model(config), family.Objective(family.Objective.Config(), config)
    pixels = clip(video(4, min(8, getattr(model, "num_frames", 8)) if case[0] == "flow" else 8).float())
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], 1e-3)
    seen = []
    for step in range(12):
        torch.manual_seed(0)  # the same drop draw every time
        loss = objective(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        assert all(not value.requires_grad for value in loss.report.values())
        seen.append(float(loss.report.get("l1", loss.total)))
    assert seen[-1] < seen[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, pixels, 0)
    assert torch.isfinite(loss.total)
    with torch.no_grad():
        tokens = model.eval().bfloat16().encode(clip(video(2, 8).bfloat16()))
    assert tokens.embeddings.isfinite().all()
    if isinstance(model, Tokenizer):
        assert model.decode(tokens, size=(16, 16)).isfinite().all()


@each_form
@torch.no_grad()
def test_uint8_and_float_videos_give_the_same_tokens(case):
    model, _ = build_model(*case)
    model.float()
    levels = to_uint8(video(1, 8).float())
    same(model.encode(clip(levels)), model.encode(clip(levels.float() / 127.5 - 1)), 1e-15)
