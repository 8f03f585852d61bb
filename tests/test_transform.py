"""The nested transform code: laws of a code, and that it is worth more than a plain one at equal bits."""

import copy
import math

import pytest
import torch
from vector_quantize_pytorch import FSQ

from vtok.layers.coefficient_predictor import CoefficientPredictor
from vtok.layers.refinement import (
    allocate,
    cell_mean,
    distortion,
    fsq_level,
    fsq_preimage,
    prime_factors,
    symbols_of,
)
from vtok.layers.transform import TransformCode, cosine_basis
from vtok.types import ShapeError

LEVELS = (8, 8, 8, 5, 5, 5)
SIZE = (8, 16, 16)


def clips(count: int, seed: int, *, size: tuple[int, int, int] = SIZE, channels: int = 3) -> torch.Tensor:
    """Synthetic clips with a natural spectrum: 1/f in space and time, correlated colours, a vertical gradient."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, *size, generator=generator)
    frequency = torch.meshgrid(*(torch.fft.fftfreq(n) * n for n in size), indexing="ij")
    t, h, w = frequency
    gain = 1 / (1 + 2 * t.abs() + (h**2 + w**2).sqrt()) ** 1.5
    out = torch.fft.ifftn(torch.fft.fftn(noise, dim=(2, 3, 4)) * gain, dim=(2, 3, 4)).real
    out = out * (1 + torch.rand(count, 1, 1, 1, 1, generator=generator))
    out = 0.3 * out + out.mean(1, keepdim=True) + torch.linspace(0.05, -0.05, size[1])[:, None]
    return (out * 3).clamp(-1, 1)


def code(**changes) -> TransformCode:
    options = dict(num_tokens=16, levels=LEVELS, max_frequencies=SIZE, num_rotated=48)
    return TransformCode(**{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted() -> TransformCode:
    module = code()
    module.fit([clips(64, seed) for seed in range(3)])
    return module


def quantize(z: torch.Tensor, levels: tuple[int, ...] = LEVELS) -> torch.Tensor:
    return FSQ(list(levels))(z.float())[0]


def decode(module: TransformCode, video: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        values = quantize(module.encode(module.analyse(video)))[:, :tokens]
        frames = torch.full((len(video),), video.shape[2])
        return module.decode(values, frames=frames, num_frames=video.shape[2], size=tuple(video.shape[3:]))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().mean((1, 2, 3, 4)))).mean())


# -- parts ---------------------------------------------------------------------------------------------------------


def test_prime_factors():
    assert [prime_factors(n) for n in (2, 5, 8, 12, 240)] == [[2], [5], [2, 2, 2], [3, 2, 2], [5, 3, 2, 2, 2, 2]]


@pytest.mark.parametrize("split", [True, False])
def test_symbols_fill_every_level(split):
    symbols = symbols_of((8, 6, 5), 3, split=split)
    for dim, level in enumerate((8, 6, 5)):
        mine = (symbols.dim == dim) & (symbols.token == 1)
        assert int(symbols.radix[mine].prod()) == level
        assert int(((symbols.radix - 1) * symbols.place)[mine].sum()) == level - 1  # largest digits: largest level


@pytest.mark.parametrize("level", [3, 4, 5, 7, 8, 9, 16, 240])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preimage_is_what_fsq_rounds_back(level, dtype):
    if dtype == torch.bfloat16 and level > 16:
        pytest.skip("240 levels are finer than bfloat16")
    wanted = torch.arange(level)[:, None]
    z = fsq_preimage(wanted, torch.tensor([level])).to(dtype)
    assert torch.equal(fsq_level(quantize(z[None], (level,))[0], torch.tensor([level])), wanted)


def test_cell_means_are_the_logistic_conditional_means():
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    sample = torch.logit(u)
    for cells in (2, 5, 8, 40):
        cell = (torch.sigmoid(sample / 1.6) * cells).floor().long()
        for index in range(cells):
            got = float(cell_mean(torch.tensor(index), torch.tensor(cells)))
            assert got == pytest.approx(float(sample[cell == index].mean()), abs=2e-3)
    assert float(cell_mean(torch.tensor(0), torch.tensor(1))) == 0.0
    assert torch.isfinite(cell_mean(torch.arange(4096), torch.tensor(4096))).all()


def test_distortion_falls_with_cells_and_matches_the_sign_bit():
    values = [distortion(n) for n in (1, 2, 3, 4, 5, 8, 16, 64, 512)]
    assert values[0] == pytest.approx(1.0) and values == sorted(values, reverse=True)
    # one bit tells the sign: 1 - E|x|^2 / var = 1 - (2 ln 2)^2 / (pi^2 / 3)
    assert values[1] == pytest.approx(1 - (2 * math.log(2)) ** 2 / (math.pi**2 / 3), abs=1e-9)


def test_allocation_is_greedy_and_refines_the_strong():
    variance = torch.tensor([100.0, 10.0, 1.0, 0.1])
    radix = torch.tensor([2] * 10)
    target, cells = allocate(variance, radix)
    count, best = [1] * 4, []
    for _ in range(10):
        gains = [float(v) * (distortion(n) - distortion(2 * n)) for v, n in zip(variance, count)]
        best.append(gains.index(max(gains)))
        count[best[-1]] *= 2
    assert target.tolist() == best
    assert cells.tolist() == [2 ** best[: i + 1].count(m) for i, m in enumerate(best)]
    with pytest.raises(ValueError, match="num_coefficients"):
        allocate(torch.ones(1), torch.tensor([2] * 20))


def test_cosine_basis_is_orthonormal_under_the_mean():
    basis = cosine_basis(6, torch.tensor([1, 4, 7]), 7)
    for row, length in enumerate((1, 4, 7)):
        held = min(length, 6)
        gram = basis[row] @ basis[row].T / length
        torch.testing.assert_close(gram[:held, :held], torch.eye(held), atol=1e-6, rtol=0)
        assert not basis[row, held:].any() and not basis[row, :, length:].any()


# -- transform -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 16, 16), (1, 16, 16), (5, 12, 20), (8, 9, 7), (1, 1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_coefficients_return_the_clip(size, channels):
    module = code(channels=channels, max_frequencies=(8, 16, 20), num_coefficients=channels * 8 * 16 * 20)
    video = clips(3, 0, size=size, channels=channels)
    back = module.synthesise(module.analyse(video), frames=torch.full((3,), size[0]), num_frames=size[0], size=size[1:])
    torch.testing.assert_close(back, video, atol=2e-5, rtol=0)


def test_fitted_transform_returns_the_clip_too():
    module = code(num_coefficients=3 * math.prod(SIZE))
    module.fit([clips(32, 0)])
    assert not torch.equal(module.rotation, torch.eye(48)) and module.mean.any()
    for size in (SIZE, (1, 16, 16), (5, 12, 10)):
        video = clips(2, 5, size=size)
        back = module.synthesise(
            module.analyse(video), frames=torch.full((2,), size[0]), num_frames=size[0], size=size[1:]
        )
        torch.testing.assert_close(back, video, atol=1e-4, rtol=0)


def test_padding_never_matters(fitted):
    short = clips(2, 1, size=(5, 16, 16))
    padded = torch.cat([short, torch.full((2, 3, 3, 16, 16), math.nan)], 2)
    lengths = torch.tensor([5, 5])
    want, got = fitted.analyse(short), fitted.analyse(padded, lengths)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    mixed = torch.cat([padded, clips(1, 2)])
    lengths = torch.tensor([5, 5, 8])
    torch.testing.assert_close(fitted.analyse(mixed, lengths)[:2], want, atol=1e-5, rtol=0)
    values = quantize(fitted.encode(fitted.analyse(mixed, lengths)))
    video = fitted.decode(values, frames=lengths, num_frames=8, size=(16, 16))
    alone = fitted.decode(values[:2], frames=lengths[:2], num_frames=5, size=(16, 16))
    torch.testing.assert_close(video[:2, :, :5], alone, atol=1e-5, rtol=0)
    assert not video[:2, :, 5:].any()


@pytest.mark.parametrize("size", [(8, 16, 16), (1, 16, 16), (3, 10, 24), (4, 32, 20)])
def test_more_tokens_more_quality_at_any_size(fitted, size):
    video = clips(6, 9, size=size)
    scores = [psnr(decode(fitted, video, k), video) for k in (1, 4, 16)]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1


# -- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [LEVELS, (5,), (16, 7, 3), (4, 4)])
@pytest.mark.parametrize("split", [True, False])
def test_the_code_tells_each_coefficient_up_to_its_cell(levels, split):
    module = code(levels=levels, split_levels=split, num_coefficients=200)
    coefficients = torch.randn(7, module.num_coefficients, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = quantize(module.encode(coefficients), levels)
        got, bits = module.dequantize(values)
    asked = sum(math.log2(level) for level in levels) * module.num_tokens
    assert float(bits[0].sum()) == pytest.approx(asked, rel=1e-5)  # not one bit is wasted
    assert torch.equal(module.encode(got), module.encode(coefficients))  # a conditional mean lies in its own cell
    known = bits > 0
    assert not got[~known].any()
    error = (got - coefficients).square()
    assert float(error[known].mean()) < float(coefficients[known].square().mean()) / 2
    fine = bits >= 5
    if fine.any():
        assert float(error[fine].mean()) < 0.02


def test_enough_tokens_return_the_clip():
    module = code(num_tokens=256, max_frequencies=(4, 6, 6), num_coefficients=432)
    module.fit([clips(64, seed, size=(4, 6, 6)) for seed in range(2)])
    video = clips(4, 7, size=(4, 6, 6))
    assert psnr(decode(module, video), video) > 45


def test_a_prefix_is_unaffected_by_later_tokens(fitted):
    values = quantize(fitted.encode(fitted.analyse(clips(4, 3))))
    noise = quantize(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)) * 3)
    for k in (1, 3, 7):
        cut, bits = fitted.dequantize(values[:, :k])
        keep = (torch.arange(values.shape[1]) < k).expand(4, -1)
        other = torch.where(keep[..., None], values, noise)
        masked, masked_bits = fitted.dequantize(other, keep)
        assert torch.equal(cut, masked) and torch.equal(bits, masked_bits)
        gap = keep.clone()
        gap[:, k + 2 :] = True  # tokens after a dropped one say nothing
        assert torch.equal(fitted.dequantize(other, gap)[0], cut)


def test_keeping_nothing_gives_the_mean(fitted):
    values = quantize(fitted.encode(fitted.analyse(clips(2, 3))))
    got, bits = fitted.dequantize(values, torch.zeros(values.shape[:2], dtype=torch.bool))
    assert not got.any() and not bits.any()


def test_clips_may_keep_different_counts(fitted):
    values = quantize(fitted.encode(fitted.analyse(clips(3, 3))))
    keep = torch.arange(values.shape[1]) < torch.tensor([1, 5, 16])[:, None]
    together, _ = fitted.dequantize(values, keep)
    for row, count in enumerate((1, 5, 16)):
        assert torch.equal(together[row], fitted.dequantize(values[row : row + 1, :count])[0][0])


def test_bf16_autocast_gives_identical_levels(fitted):
    video = clips(4, 11)
    plain = fitted.analyse(video)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fitted.analyse(video)
        z = fitted.encode(cast)
        out = fitted.decode(quantize(z), frames=torch.full((4,), 8), num_frames=8, size=(16, 16))
    assert cast.dtype == z.dtype == out.dtype == torch.float32
    assert torch.equal(plain, cast) and torch.equal(fitted.encode(plain), z)
    assert torch.equal(out, decode(fitted, video))


def test_a_cast_module_gives_identical_levels(fitted):
    video = clips(4, 11)
    cast = copy.deepcopy(fitted).bfloat16()
    assert cast.rotation.dtype == torch.float32
    assert torch.equal(cast.encode(cast.analyse(video)), fitted.encode(fitted.analyse(video)))


# -- learning ------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_correction_and_the_transform():
    module = code()
    module.fit([clips(64, 0)])
    video = clips(4, 5)
    coefficients = module.analyse(video)
    delta = torch.zeros_like(coefficients, requires_grad=True)
    used = coefficients + delta
    values = quantize(module.encode(coefficients, delta))
    keep = torch.arange(16) < torch.tensor([1, 4, 8, 16])[:, None]
    out = module.decode(values, keep, frames=torch.full((4,), 8), num_frames=8, size=(16, 16), through=used)
    (out - video).square().mean().backward()
    known = module.dequantize(values, keep)[1] > 0
    assert delta.grad is not None and torch.equal(delta.grad != 0, known)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_straight_through_is_the_gradient_of_the_unrounded_code(fitted):
    video = clips(2, 5)
    used = fitted.analyse(video).detach().requires_grad_()
    values = quantize(fitted.encode(used))
    weight = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    common = dict(frames=torch.full((2,), 8), num_frames=8, size=(16, 16))
    (fitted.decode(values, through=used, **common) * weight).sum().backward()
    exact = torch.zeros_like(used, requires_grad=True)
    (fitted.synthesise(exact, **common) * weight).sum().backward()
    known = fitted.dequantize(values)[1] > 0
    torch.testing.assert_close(used.grad[known], exact.grad[known])
    assert torch.equal(fitted.decode(values, through=used, **common).detach(), fitted.decode(values, **common).detach())


def test_training_its_parameters_lowers_the_error():
    module = code(num_tokens=4)
    module.fit([clips(24, 0)])
    video = clips(32, 1)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        used = module.analyse(video)
        out = module.decode(
            quantize(module.encode(used)), frames=torch.full((32,), 8), num_frames=8, size=(16, 16), through=used
        )
        loss = (out - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


def test_the_predictor_starts_as_the_identity_and_learns_what_a_rotation_cannot():
    """Coefficient 1 is the square of coefficient 0, less its mean: uncorrelated with it, and told by it."""
    torch.manual_seed(0)
    predictor = CoefficientPredictor(2, width=32, dropout=0.0)
    known = torch.randn(512, 1)
    wanted = torch.cat([known, known**2 - 1], 1)
    told = torch.cat([known, torch.zeros_like(known)], 1)
    bits = torch.tensor([12.0, 0.0]).expand(512, -1)
    assert torch.equal(predictor(told, bits), told)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    for _ in range(80):
        loss = (predictor(told, bits) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    got = predictor(told, bits).detach()
    assert float((got - wanted)[:, 1].square().mean()) < 0.1 * float(wanted[:, 1].square().mean())
    assert float((got - told)[:, 0].abs().max()) < 0.01  # what is known to 12 bits hardly moves
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(predictor(told, bits), got)
    with pytest.raises(ValueError, match="dropout=1"):
        CoefficientPredictor(2, dropout=1.0)


# -- fit -----------------------------------------------------------------------------------------------------------


def test_fit_improves_and_an_unfitted_code_works(fitted):
    video = clips(24, 77)
    plain = code()
    assert not plain.fitted and fitted.fitted
    for k in (1, 4, 16):
        before, after = psnr(decode(plain, video, k), video), psnr(decode(fitted, video, k), video)
        flat = psnr(torch.zeros_like(video), video)
        assert flat < before < after


def test_fit_is_deterministic_and_reports_what_it_expects():
    batches = [clips(32, seed) for seed in range(3)]
    first, second = code(), code()
    report = first.fit(batches)
    assert report == second.fit(iter(batches)) and report["clips"] == 96
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    expected = [report[f"psnr_db_{k}"] for k in (1, 4, 16)]
    assert expected == sorted(expected)
    video = torch.cat(batches)
    error = float((decode(first, video) - video).square().mean())
    assert 10 * math.log10(4 / error) == pytest.approx(expected[-1], abs=0.7)


def test_fit_does_not_depend_on_batching():
    video = clips(40, 0)
    whole, parts = code(), code()
    whole.fit([video])
    parts.fit(video.split(7))
    torch.testing.assert_close(parts.std, whole.std, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("video", [torch.zeros(2, 3, 8, 16, 16), clips(1, 0), clips(3, 0, size=(1, 4, 4))])
def test_fit_on_little_stays_finite(video):
    module = code()
    report = module.fit([video])
    assert all(math.isfinite(value) for value in report.values())
    assert torch.isfinite(decode(module, clips(2, 1))).all()


def test_state_dict_carries_the_fit(fitted):
    other = code()
    other.load_state_dict(fitted.state_dict(), strict=True)
    video = clips(3, 8)
    assert torch.equal(decode(other, video), decode(fitted, video))
    with pytest.raises(RuntimeError, match="size mismatch"):
        code(num_tokens=8).load_state_dict(fitted.state_dict())


def test_beats_a_plain_code_at_equal_bits(fitted):
    """Control: cosine coefficients in order of training variance, each rounded to 8 levels (Lloyd-Max)."""
    train, video = torch.cat([clips(64, seed) for seed in range(3)]), clips(32, 99)
    plain = code(num_coefficients=3 * math.prod(SIZE))  # its analysis is the bare cosine transform, scaled
    with torch.no_grad():
        sample, held = plain.analyse(train) * plain.std, plain.analyse(video) * plain.std
        order = sample.var(0).argsort(descending=True)[:100]  # 16 tokens are 255 bits: 85 coefficients
        points = torch.quantile(sample[:, order], (torch.arange(8) + 0.5) / 8, dim=0)
        for _ in range(20):
            nearest = (sample[:, order, None] - points.T).abs().argmin(-1)
            for level in range(8):
                share = (nearest == level).float()
                new = (sample[:, order] * share).sum(0) / share.sum(0).clamp_min(1)
                points[level] = torch.where(share.sum(0) > 0, new, points[level])
        rounded = points.T.gather(1, (held[:, order, None] - points.T).abs().argmin(-1).T).T
        for k in (4, 16):
            count = int(k * sum(math.log2(level) for level in LEVELS) / 3)
            coefficients = sample.mean(0).expand_as(held).clone()
            coefficients[:, order[:count]] = rounded[:, :count]
            control = plain.synthesise(
                coefficients / plain.std, frames=torch.full((32,), 8), num_frames=8, size=(16, 16)
            )
            assert psnr(decode(fitted, video, k), video) > psnr(control, video) + 0.2


def test_bad_arguments_name_themselves(fitted):
    with pytest.raises(ValueError, match="num_tokens=0"):
        code(num_tokens=0)
    with pytest.raises(ValueError, match=r"levels=\(8, 1\)"):
        code(levels=(8, 1))
    with pytest.raises(ValueError, match="no clip"):
        code().fit([])
    with pytest.raises(ShapeError, match="expected"):
        fitted.analyse(torch.zeros(1, 2, 4, 8, 8))
    with pytest.raises(ShapeError, match="up to 16"):
        fitted.dequantize(torch.zeros(1, 17, 6))
