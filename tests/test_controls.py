"""Controls: exact bits, prefix order, known clips, statistics from training clips only."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.metrics.controls import (
    CONTROLS,
    DCT,
    Downsample,
    Grid,
    MeanColour,
    MeanFrame,
    area_matrix,
    dct_matrix,
    fit_control,
    grid_candidates,
    linear_matrix,
    lloyd_max,
    nearest_level,
    png_bits,
    repeat_last,
)
from vtok.metrics.distortion import clip_psnr

SHAPE = (4, 16, 20)
RATES = [5.0, 16.0, 63.9, 255.5, 600.0]


def smooth_clips(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Clips with the falling spectrum of real video: blurred noise at three scales that drifts."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(count, 3, *shape)
    for scale, weight in ((2, 60.0), (4, 30.0), (8, 12.0)):
        coarse = torch.randn(count, 3, max(shape[0] // 4, 1), scale, scale, generator=generator)
        out += weight * F.interpolate(coarse, size=shape, mode="trilinear", align_corners=False)
    grey = out.mean(1, keepdim=True)
    return (0.7 * grey + 0.5 * out + 120).round().clamp(0, 255).to(torch.uint8)


TRAIN, VAL = smooth_clips(48), smooth_clips(12, seed=1)


def test_matrices():
    basis = dct_matrix(12).double()
    assert torch.allclose(basis @ basis.T, torch.eye(12, dtype=torch.float64), atol=1e-6)
    x = torch.rand(3, 12)
    assert torch.allclose(x @ area_matrix(12, 4).T, F.adaptive_avg_pool1d(x, 4), atol=1e-6)
    assert torch.allclose(area_matrix(7, 3).sum(1), torch.ones(3)) and torch.equal(area_matrix(5, 5), torch.eye(5))
    want = F.interpolate(x[:, None, :4], size=12, mode="linear", align_corners=False)[:, 0]
    assert torch.allclose(x[:, :4] @ linear_matrix(4, 12).T, want, atol=1e-6)


def test_lloyd_max_reaches_the_gaussian_optimum():
    x = torch.randn(40000, 1, generator=torch.Generator().manual_seed(0))
    table = lloyd_max(x, 8, steps=200)
    error = (table.gather(0, nearest_level(x, table)) - x).square().mean()
    assert float(error) == pytest.approx(0.03454, rel=0.03)  # Max 1960, table I, 8 levels
    assert bool((table.diff(dim=0) > 0).all())
    brute = (x - table.T).abs().argmin(1)
    assert torch.equal(nearest_level(x, table)[:, 0], brute)


@pytest.mark.parametrize("name", CONTROLS)
def test_bits_never_exceed_what_was_asked(name):
    control = fit_control(name, TRAIN, rates=RATES)
    assert not isinstance(control, str)
    for rate in RATES:
        found = control.reconstruct(VAL, rate)
        if isinstance(found, str):
            assert rate == 5.0 and "do not pay" in found
            continue
        recon, used = found
        assert recon.shape == VAL.shape and recon.dtype == torch.uint8 and used.shape == (len(VAL),)
        if not control.own_rate:
            assert bool((used <= rate).all()) and bool((used > 0).all())


@pytest.mark.parametrize("name", ["dct", "downsample"])
def test_more_bits_are_better_on_average(name):
    control = fit_control(name, TRAIN, rates=RATES)
    assert not isinstance(control, str)
    scores = []
    for rate in RATES[1:]:
        found = control.reconstruct(VAL, rate)
        assert not isinstance(found, str)
        scores.append(float(clip_psnr(found[0], VAL).mean()))
    assert scores == sorted(scores) and scores[-1] > scores[0] + 2


def test_dct_is_a_prefix_code():
    """The levels of a coefficient do not depend on the rate, so more bits only add to what fewer bits say."""
    control = DCT(TRAIN, max_bits=600)
    short = DCT(TRAIN, max_bits=60)
    assert torch.equal(control.order[:20], short.order) and torch.allclose(control.table[:, :20], short.table)
    variance = control._forward(TRAIN).var(0)[control.order]
    assert bool((variance.diff() <= 1e-3 * variance[:-1]).all())


def test_dct_with_every_coefficient_is_limited_by_its_levels_only():
    shape = (2, 4, 4)
    train = smooth_clips(8, shape=shape)  # 8 clips, 8 levels: Lloyd-Max has a level for each training value
    control = DCT(train, max_bits=3 * 96)
    found = control.reconstruct(train, 3 * 96)
    assert not isinstance(found, str) and float(clip_psnr(found[0], train).min()) > 40


def test_dct_and_downsampling_beat_the_mean_colour():
    dct, down = (fit_control(name, TRAIN, rates=[255.0]) for name in ("dct", "downsample"))
    scores = []
    for control in (MeanColour(), down, dct):
        assert not isinstance(control, str)
        found = control.reconstruct(VAL, 255.0)
        assert not isinstance(found, str)
        scores.append(float(clip_psnr(found[0], VAL).mean()))
    assert (
        min(scores[1:]) > scores[0] + 3
    )  # synthetic blur is made by interpolation: which of the two wins says nothing


def test_downsample_candidates_fit_and_choice_is_the_best_of_a_few():
    for grid in grid_candidates(64, SHAPE):
        assert 0 < grid.bits <= 64 and grid.frames <= SHAPE[0]
        assert Grid(grid.frames + 1, grid.rows, grid.columns, grid.depth, grid.colour).bits > 64 or (
            grid.frames == SHAPE[0]
        )
    assert grid_candidates(2, SHAPE) == []
    assert Grid(2, 3, 5, 4, "ycbcr420").bits == 4 * 2 * (15 + 2 * 2 * 3)
    control = Downsample(TRAIN, rates=[255])
    chosen, _ = control.choice[255]
    found = control.reconstruct(TRAIN, 255)
    assert not isinstance(found, str)
    best = float(clip_psnr(found[0], TRAIN).mean())
    # a plain choice, 8 bits RGB, must not be better on the clips it was chosen on
    plain = max(
        (grid for grid in grid_candidates(255, SHAPE) if (grid.depth, grid.colour) == (8, "rgb")),
        key=lambda grid: grid.bits,
    )
    other = Downsample.__new__(Downsample)
    other.shape = SHAPE
    from vtok.metrics.controls import _Quantizer

    planes = TRAIN.float() - 127.5
    quantizers = [_Quantizer.fit(other._down(planes, plain, p), 8) for p in range(3)]
    recon = (other._run(planes, plain, quantizers) + 127.5).round().to(torch.uint8)
    assert best > float(clip_psnr(recon, TRAIN).mean())
    assert str(chosen.frames) in control.describe(255)


def test_downsample_prediction_equals_the_real_error():
    """The fast formula of the search is the squared error of one plane through the real pipeline."""
    control = Downsample(TRAIN, rates=[255])
    grid = Grid(2, 4, 5, 3, "rgb")
    errors = control._plane_errors(TRAIN, {0: [grid]}, None)[2, 4, 5, 3]
    from vtok.metrics.controls import _Quantizer

    planes = TRAIN.float() - 127.5
    quantizers = [_Quantizer.fit(control._down(planes, grid, p), 3) for p in range(3)]
    real = (control._run(planes, grid, quantizers) - planes).double().square().sum((0, 2, 3, 4))
    assert torch.allclose(errors[:3], real, rtol=1e-4)


def test_mean_colour_is_565():
    clip = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    clip[:, 0], clip[:, 1], clip[:, 2] = 100, 101, 255
    recon, bits = MeanColour().reconstruct(clip)
    assert bits.tolist() == [16] and recon[0, :, 0, 0, 0].tolist() == [99, 101, 255]


def test_mean_frame_is_the_mean_and_costs_its_png():
    recon, bits = MeanFrame().reconstruct(VAL)
    assert torch.equal(recon[:, :, 0], VAL.double().mean(2).round().to(torch.uint8))
    assert bits.tolist() == [png_bits(frame) for frame in recon[:, :, 0]]
    import av

    # the counted bytes are a real PNG: decode one of the same size
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 20, 16, "rgb24", 1
    codec.options = {"pred": "mixed"}
    image = recon[0, :, 0].permute(1, 2, 0).contiguous().numpy()
    data = b"".join(bytes(packet) for packet in codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    assert 8 * len(data) == int(bits[0])
    with av.open(io.BytesIO(data)) as container:
        back = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert (back == image).all()


def test_padding_frames_change_nothing():
    lengths = torch.tensor([4, 2, 1, 3] * 3)
    other = VAL.clone()
    for row, n in enumerate(lengths.tolist()):
        other[row, :, n:] = 255 - other[row, :, n:]
    for name in CONTROLS:
        control = fit_control(name, TRAIN, rates=[255.0])
        assert not isinstance(control, str)
        a, b = control.reconstruct(VAL, 255.0, lengths), control.reconstruct(other, 255.0, lengths)
        assert not isinstance(a, str) and not isinstance(b, str)
        assert torch.equal(a[1], b[1]) and torch.equal(clip_psnr(a[0], VAL, lengths), clip_psnr(b[0], VAL, lengths))
    still = repeat_last(VAL, lengths)
    assert torch.equal(still[1, :, 3], VAL[1, :, 1]) and torch.equal(still[0], VAL[0])


def test_what_cannot_be_measured_says_why():
    for name in ("dct", "downsample"):
        assert "training clips" in str(fit_control(name, None, rates=[16.0]))
        assert "rate" in str(fit_control(name, TRAIN, rates=[math.nan]))
    with pytest.raises(ValueError, match="mean_colour"):
        fit_control("gif", TRAIN, rates=[16.0])
    control = DCT(TRAIN, max_bits=64)
    with pytest.raises(ValueError, match="fitted on clips"):
        control.reconstruct(VAL[:, :, :2], 60)
    with pytest.raises(ValueError, match="max_bits"):
        control.reconstruct(VAL, 6000)
    with pytest.raises(ValueError, match="uint8 RGB"):
        control.reconstruct(VAL[:, :1], 60)
