"""The weight-free proxy for rFVD: what raises it, and by how much against what it says of equal sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, interpolate

from vtok.metrics.bands import FLOOR, SPACE, TIME, Bands
from vtok.metrics.frechet import FrechetDistance
from vtok.types import to_uint8


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """uint8 [24, 3, 12, 32, 40]: things that move over grounds."""
    torch.manual_seed(0)
    coarse = torch.rand(24, 3, 4, 8, 10)
    return to_uint8(interpolate(coarse, (12, 32, 40), mode="trilinear") * 2 - 1)


def distance(recon: Tensor, target: Tensor) -> float:
    metric = FrechetDistance(Bands())
    metric.update(recon, target)
    assert int(metric.samples) == len(target)
    return float(metric.compute())


def blurred(clips: Tensor, size: int) -> Tensor:
    pad = size // 2
    return avg_pool3d(clips.float(), (1, size, size), 1, (0, pad, pad), count_include_pad=False).round().byte()


def test_equal_sets_are_at_zero_and_damage_is_not(clips):
    assert distance(clips, clips) < 1e-6
    assert distance(clips.flip(0), clips) < 1e-6, "a set has no order"
    mild, strong = (distance(blurred(clips, size), clips) for size in (3, 7))
    frozen = clips[:, :, :1].expand_as(clips).contiguous()
    flicker = clips.clone()
    flicker[:, :, ::2] = (flicker[:, :, ::2].float() * 0.9).byte()
    noise = (clips.float() + 4 * torch.randn(clips.shape)).clamp(0, 255).byte()
    assert 0.1 < mild < strong
    assert min(distance(other, clips) for other in (frozen, flicker, noise)) > 1


def test_energies_are_those_of_parseval(clips):
    """A clip of one value lies in the first band alone; of a cosine in time, in its octave."""
    net = Bands()
    flat = torch.full((1, 3, 8, 16, 16), 51, dtype=torch.uint8)
    found = net.features(flat, torch.tensor([8]))[0][0].double().exp() - FLOOR
    assert torch.isclose(found[0], torch.tensor(0.04 * 8 * 256, dtype=torch.float64), rtol=1e-4)
    assert found[1:].abs().max() < 1e-6 and len(found) == net.dim == len(SPACE) * (len(TIME) + 1)
    frames = torch.cos(torch.pi * 3 * (torch.arange(8) + 0.5) / 8)  # 3 / 16 cycles a frame: the fourth band of time
    wave = to_uint8((0.5 * frames)[None, None, :, None, None].expand(1, 3, 8, 16, 16))
    luma = net.features(wave, torch.tensor([8]))[0][0][: len(SPACE) * len(TIME)].unflatten(0, (len(TIME), len(SPACE)))
    assert int(luma[1:, 0].argmax()) == 2


def test_short_clips_give_no_sample_and_padding_none_of_its_own(clips):
    net = Bands()
    short = net.features(clips[:2], torch.tensor([7, 12]))
    assert [len(each) for each in short] == [0, 1]
    other = clips[:2].clone()
    other[0, :, 9:] = 0
    assert torch.equal(
        net.features(other, torch.tensor([9, 12]))[0], net.features(clips[:2, :, :9], torch.tensor([9, 9]))[0]
    )
    tiny = net.features(clips[:1, :, :, :4, :4], torch.tensor([12]))[0]
    assert tiny.isfinite().all(), "frames without low frequencies"
