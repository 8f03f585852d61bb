"""The laws of `vtok/types.py`, held by the flexible family in every form it has."""

from __future__ import annotations

import itertools

import pytest
import torch

from vtok import losses
from vtok.budget import nested_keep
from vtok.families.flexible import Config, Model, Objective, ObjectiveConfig
from vtok.quantize import QuantizerConfig
from vtok.types import Clip, Tokenizer, to_uint8

SMALL = dict(num_frames=8, size=[16, 16], patch=[2, 8, 8], width=32, encoder_depth=2, decoder_depth=2, num_heads=2)
FORMS = {
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


TOLERANCE = {"dct": 1e-5}  # the transform code computes in float32 whatever the model's precision


def build(form: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model(Config(**SMALL, **FORMS[form]))
    for parameter in model.parameters():  # away from zero initialisation, so that every path carries signal
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    if form == "vq":
        model.quantizer.codebook.copy_(torch.nn.functional.normalize(torch.randn(32, 6), dim=-1))
    return model.eval().double()


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


@pytest.fixture(params=sorted(FORMS))
def form(request) -> str:
    return request.param


@torch.no_grad()
def test_shapes_and_lookup(form):
    model = build(form)
    assert isinstance(model, Tokenizer)
    for frames, size in itertools.product((1, 5, 8, 19), ((16, 16), (13, 22))):
        pixels = video(2, frames, size)
        tokens = model.encode(clip(pixels))
        assert model.decode(tokens, size=size).shape == pixels.shape
        if tokens.indices is not None:
            assert torch.equal(model.lookup(tokens.indices).double(), tokens.embeddings.double())
            assert int(tokens.indices.min()) >= 0 and int(tokens.indices.max()) < model.codebook_sizes[0]


@torch.no_grad()
def test_budget_is_truncation_and_is_met(form):
    model = build(form)
    pixels = clip(video(2, 19))
    everything = model.encode(pixels)
    for budget in (1, 3, 7, int(everything.lengths[0])):
        tokens = model.encode(pixels, budget=budget)
        same(tokens, everything.truncate(budget))
        assert tokens.lengths.tolist() == [budget, budget]
    with pytest.raises(ValueError, match="budget=0"):
        model.encode(pixels, budget=0)


@torch.no_grad()
def test_padding_and_batching_change_nothing(form):
    model = build(form)
    long, short = video(1, 19, seed=3), video(1, 5, seed=4)
    padded = torch.cat([long, torch.cat([short, torch.rand(1, 3, 14, 16, 16, dtype=torch.float64)], 2)])
    both = model.encode(clip(padded, [19, 5]))
    decoded = model.decode(both, size=(16, 16))
    for row, alone in enumerate((long, short)):
        single = model.encode(clip(alone))
        mask = both.mask[row]
        assert (both.embeddings[row][mask] - single.embeddings[0]).abs().max() < 1e-10
        error = (decoded[row, :, : alone.shape[2]] - model.decode(single, size=(16, 16))[0]).abs().max()
        assert error < TOLERANCE.get(form, 1e-10)


@torch.no_grad()
def test_streamed_equals_offline(form):
    model = build(form)
    pixels = video(2, 19, (13, 22))
    offline = model.encode(clip(pixels))
    for cuts in ((19,), (1,) * 19, (3, 8, 7, 1)):
        state, decode_state = model.init_state(2, (13, 22)), model.init_decode_state(2, (13, 22))
        pieces, frames, at = [], [], 0
        for length in (*cuts, None):
            if length is None:
                tokens = model.flush(state)
            else:
                tokens, state = model.step(clip(pixels[:, :, at : at + length]), state)
                at += length
            if tokens is not None:
                pieces.append(tokens)
                out, decode_state = model.decode_step(tokens, decode_state)
                frames.append(out)
        streamed = torch.cat([p.embeddings for p in pieces], 1)
        assert (streamed - offline.embeddings).abs().max() < 1e-10
        error = (torch.cat(frames, 2) - model.decode(offline, size=(13, 22))).abs().max()
        assert error < TOLERANCE.get(form, 1e-10)
        assert state.buffer is None


@pytest.mark.parametrize("form", ["block_causal", "block_causal_last", "block_pyramid"])
@torch.no_grad()
def test_later_frames_never_change_earlier_tokens(form):
    model = build(form)
    pixels = video(1, 8)
    tokens = model.encode(clip(pixels))
    changed = pixels.clone()
    changed[:, :, model.config.block_frames :] = torch.rand_like(changed[:, :, model.config.block_frames :])
    other = model.encode(clip(changed))
    first = tokens.group == 0
    assert torch.equal(tokens.embeddings[first], other.embeddings[first])
    assert not torch.equal(tokens.embeddings[~first], other.embeddings[~first])
    frames = slice(0, model.config.block_frames)
    one, two = (model.decode(t, size=(16, 16))[:, :, frames] for t in (tokens, other))
    assert torch.equal(one, two)


@torch.no_grad()
def test_causal_last_registers_do_not_see_later_ones():
    model = build("causal_last")
    tokens = model.encode(clip(video(1, 8)))
    model.registers[5:] += 1.0
    other = model.encode(clip(video(1, 8)))
    assert torch.equal(tokens.embeddings[:, :5], other.embeddings[:, :5])
    assert not torch.equal(tokens.embeddings[:, 5:], other.embeddings[:, 5:])


@torch.no_grad()
def test_dropped_tokens_do_not_reach_the_pixels(form):
    model = build(form)
    tokens = model.encode(clip(video(1, 8)))
    short = tokens.truncate(model.config.blocks * 2)
    poisoned = tokens.embeddings.clone()
    poisoned[tokens.rank >= 2] = 7.0
    other = type(tokens)(**{**vars(tokens), "embeddings": poisoned}).truncate(model.config.blocks * 2)
    assert torch.equal(model.decode(short, size=(16, 16)), model.decode(other, size=(16, 16)))


def test_save_and_load(form, tmp_path):
    model = build(form)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = build(form, seed=7)
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    with torch.no_grad():
        same(model.encode(clip(video(2, 9))), other.encode(clip(video(2, 9))), 1e-15)


def test_steps_lower_the_loss_and_bfloat16_stays_finite(form):
    torch.manual_seed(0)
    config = Config(**SMALL, **FORMS[form])
    model, objective = Model(config), Objective(ObjectiveConfig(), config)
    pixels = clip(video(4, 8).float())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    seen = []
    for step in range(12):
        torch.manual_seed(0)  # the same drop draw every time
        loss = objective(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(float(loss.report["l1"]))
    assert seen[-1] < seen[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, pixels, 0)
    assert torch.isfinite(loss.total)


@torch.no_grad()
def test_ids_are_float32_under_autocast():
    model = build("full").float()
    z = torch.randn(4, 100, 6)
    plain = model.quantizer(z).indices
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantizer(z).indices, plain)


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
@pytest.mark.parametrize("discriminator", ["conv3d", "transformer"])
def test_one_backward_equals_two(kind, discriminator):
    """Gradients of the summed loss are those of separate generator and discriminator passes."""
    config = Config(**SMALL, **FORMS["full"])
    settings = ObjectiveConfig(
        adversarial=losses.AdversarialConfig(
            weight=0.3, kind=kind, discriminator=discriminator, width=32, depth=1, num_heads=1, lecam=0.01
        )
    )
    torch.manual_seed(0)
    model, objective = Model(config).train(), Objective(settings, config).train()
    pixels = clip(video(2, 8).float())
    torch.manual_seed(1)
    loss = objective(model, pixels, 0)
    loss.total.backward()
    adversary = objective.adversarial
    net = adversary.discriminator
    joint = {n: p.grad.clone() for n, p in net.named_parameters()}
    generator = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    net.zero_grad()
    adversary.real_average.zero_(), adversary.fake_average.zero_()
    torch.manual_seed(1)
    keep = nested_keep(8, 2)
    out = model(pixels.video, pixels.frames(), keep)
    recon, quantized = out.recon, out.quantized
    fake = net(recon)
    hinge = kind == "hinge"
    adversarial = losses.generator_adversarial(fake) if hinge else losses.generator_nonsaturating(fake)
    ((recon - pixels.video).abs().mean() + quantized.loss + 0.3 * adversarial).backward()
    for name, gradient in generator.items():
        assert torch.allclose(dict(model.named_parameters())[name].grad, gradient, atol=1e-6), name
    net.zero_grad()
    real, fake = net(pixels.video), net(recon.detach())
    own = losses.discriminator_hinge(real, fake) if hinge else losses.discriminator_nonsaturating(real, fake)
    averages = dict(real_average=real.detach().mean() * 0.001, fake_average=fake.detach().mean() * 0.001)
    (own + 0.01 * losses.lecam(real, fake, **averages)).backward()
    for name, gradient in joint.items():
        assert torch.allclose(dict(net.named_parameters())[name].grad, gradient, atol=1e-6), name


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(mask="casual_last"), "causal_last"),
        (dict(registers="dtc"), "learned, pyramid or dct"),
        (dict(num_frames=7), "multiple of blocks x patch"),
        (dict(blocks=2), "time_block masks need blocks > 1"),
        (dict(registers="dct", quantizer=QuantizerConfig(name="vq")), "quantizer.name=fsq"),
        (dict(dropped="zero"), "mask or cut"),
    ],
)
def test_settings_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**SMALL, **wrong})


def test_uint8_and_float_videos_give_the_same_tokens():
    model = build("full").float()
    levels = to_uint8(video(1, 8).float())
    floats = levels.float() / 127.5 - 1
    with torch.no_grad():
        assert torch.equal(model.encode(clip(levels)).indices, model.encode(clip(floats)).indices)
