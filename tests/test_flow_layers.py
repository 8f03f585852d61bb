"""The flow itself: levels, paths, guidance and sampling, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from vtok.layers.flow import (
    FlowTransformer,
    SamplerConfig,
    Spans,
    draw_levels,
    euler,
    fixed_noise,
    gaussian_velocity,
    guide,
    mix,
)


@pytest.mark.parametrize("stratified", [True, False])
def test_levels_follow_the_logit_normal_law(stratified):
    torch.manual_seed(0)
    levels = torch.cat([draw_levels(64, mean=0.3, std=0.8, stratified=stratified) for _ in range(400)])
    logits = torch.logit(levels.double())
    assert abs(float(logits.mean()) - 0.3) < 0.02 and abs(float(logits.std()) - 0.8) < 0.02
    if stratified:  # mean 0, std 1: one level from each eighth of the law
        standard = torch.distributions.Normal(0.0, 1.0)
        for _ in range(9):
            eighth = (standard.cdf(torch.logit(draw_levels(8).double())) * 8).long()
            assert sorted(eighth.tolist()) == list(range(8))


def test_mixing_takes_a_level_for_each_latent_frame():
    x, noise = torch.ones(2, 1, 3, 1, 1), torch.zeros(2, 1, 3, 1, 1)
    level = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.5, 0.5]])
    assert mix(x, noise, level)[:, 0, :, 0, 0].tolist() == [[1.0, 0.75, 0.0], [0.5, 0.5, 0.5]]


def test_gaussian_velocity_is_the_conditional_mean_and_draws_the_gaussian():
    torch.manual_seed(0)
    guess, variance = 0.7, 0.3
    x = guess + math.sqrt(variance) * torch.randn(400_000, dtype=torch.float64)
    noise = torch.randn_like(x)
    for s in (0.1, 0.5, 0.9):
        noised = (1 - s) * x + s * noise
        shape = (-1, 1, 1, 1, 1)
        level = torch.full((len(x), 1), s, dtype=torch.float64)
        table = torch.full((len(x), 1, 1), variance, dtype=torch.float64)
        v = gaussian_velocity(noised.view(shape), level, torch.full_like(x, guess).view(shape), table).flatten()
        error = noise - x - v
        # orthogonality: what is left is uncorrelated with the noised sample, and has mean zero
        assert abs(float(error.mean())) < 0.01
        assert abs(float((error * (noised - noised.mean())).mean())) < 0.01

    def velocity(x: torch.Tensor, level: torch.Tensor, withheld: bool) -> torch.Tensor:
        table = torch.full((len(x), 1, 1), variance, dtype=torch.float64)
        return gaussian_velocity(x, level, torch.full_like(x, guess), table)

    start = torch.randn(20_000, 1, 1, 1, 1, dtype=torch.float64)
    drawn = euler(velocity, start, SamplerConfig(steps=200))
    assert abs(float(drawn.mean()) - guess) < 0.02 and abs(float(drawn.var()) - variance) < 0.02
    certain = euler(velocity, start, SamplerConfig(steps=200, temperature=0.0))
    assert float((certain - guess).abs().max()) < 1e-9


def test_a_straight_path_is_sampled_exactly_in_one_step():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    drawn = euler(lambda *_: noise - x, noise, SamplerConfig(steps=1))
    assert torch.allclose(drawn, x, atol=1e-6)
    seen = []

    def velocity(now: torch.Tensor, level: torch.Tensor, withheld: bool) -> torch.Tensor:
        seen.append((level[0].tolist(), torch.equal(now[:, :, :1], x[:, :, :1])))
        return noise - x

    drawn = euler(velocity, noise, SamplerConfig(steps=4), prefix=x[:, :, :1])
    assert torch.allclose(drawn, x, atol=1e-5) and torch.equal(drawn[:, :, :1], x[:, :, :1])
    assert seen == [([0.0, 1 - s / 4, 1 - s / 4], True) for s in range(4)]


def test_guidance_plain_and_projected():
    torch.manual_seed(0)
    told, untold = torch.randn(3, 4, 2, 2, 2).double(), torch.randn(3, 4, 2, 2, 2).double()
    plain, difference = guide(told, untold, SamplerConfig(guidance=3.0, projected=False))
    assert torch.allclose(plain, untold + 3 * (told - untold)) and torch.equal(difference, told - untold)
    whole, _ = guide(told, untold, SamplerConfig(guidance=3.0, eta=1.0))
    assert torch.allclose(whole, plain), "with eta 1 and no threshold, projection takes nothing away"
    update = guide(told, untold, SamplerConfig(guidance=3.0))[0] - told
    assert (update * told).sum((1, 2, 3, 4)).abs().max() < 1e-9, "the update is orthogonal to the prediction"
    by_channel = guide(told, untold, SamplerConfig(guidance=3.0, per_channel=True))[0] - told
    assert (by_channel * told).sum((2, 3, 4)).abs().max() < 1e-9
    short = guide(told, untold, SamplerConfig(guidance=2.0, eta=1.0, threshold=0.5))[0] - told
    assert torch.allclose(short.square().sum((1, 2, 3, 4)).sqrt(), torch.full((3,), 0.5).double())
    past = torch.randn_like(told)
    moved, carried = guide(told, untold, SamplerConfig(guidance=2.0, eta=1.0, momentum=-0.5), past=past)
    assert torch.allclose(carried, told - untold - 0.5 * past) and torch.allclose(moved, told + carried)


def test_noise_depends_on_seed_and_chunk_alone():
    device, shape = torch.device("cpu"), (1, 2, 3, 4, 4)
    one = fixed_noise(shape, seed=0, chunk=0, device=device)
    assert torch.equal(one, fixed_noise(shape, seed=0, chunk=0, device=device))
    for seed, chunk in ((1, 0), (0, 1)):
        assert not torch.equal(one, fixed_noise(shape, seed=seed, chunk=chunk, device=device))


def test_the_network_begins_as_the_identity_and_modulates_patches_and_registers_apart():
    torch.manual_seed(0)
    net, spans = FlowTransformer(32, 2, 2), Spans(4, 3)
    x, level = torch.randn(2, 14, 32), torch.rand(2, 2)
    out, tapped = net(x, level, spans, tap=1)
    patches = torch.nn.functional.layer_norm(x[:, :8], (32,), eps=1e-6)
    assert torch.equal(tapped, x[:, :8]) and torch.allclose(out, patches, atol=1e-6)
    for block in net.blocks:
        torch.nn.init.normal_(block.of_registers.weight, std=0.5)
    changed, tapped = net(x, level, spans, tap=1)
    assert torch.equal(tapped, x[:, :8]), "what modulates registers leaves patches of the first block alone"
    for block in net.blocks:
        torch.nn.init.normal_(block.of_patches.weight, std=0.5)
    changed, _ = net(x, level, spans)
    assert not torch.allclose(changed, out)
    late = level.clone()
    late[:, 1] += 0.1  # another noise level of the second latent frame
    other, tapped = net(x, late, spans, tap=1)
    first = net(x, level, spans, tap=1)[1]
    assert not torch.allclose(first[:, 4:], tapped[:, 4:])


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match="model.sampler.steps=0"):
        SamplerConfig(steps=0)
    with pytest.raises(ValueError, match="model.sampler.temperature=-1"):
        SamplerConfig(temperature=-1)
