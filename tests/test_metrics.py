"""Distortion and rate: known answers, references, padding, sums over batches and ranks."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from waiting import PATIENCE_S

from vtok.layers.perceptual import LPIPS, load_lpips
from vtok.metrics.distortion import (
    PSNR,
    SSIM,
    PerceptualDistance,
    TemporalDifferencePSNR,
    clip_lpips,
    clip_psnr,
    clip_ssim,
    clip_tdiff_psnr,
)
from vtok.metrics.rate import CodebookUsage, NominalBits
from vtok.types import Tokens


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make_tokens(indices: Tensor, sizes: tuple[int, ...], lengths: Tensor | None = None) -> Tokens:
    batch, count, _ = indices.shape
    return Tokens(
        embeddings=torch.zeros(batch, count, 2),
        lengths=torch.full((batch,), count) if lengths is None else lengths,
        positions=torch.full((batch, count, 3), torch.nan),
        group=torch.zeros(batch, count, dtype=torch.int64),
        rank=torch.arange(count).expand(batch, count),
        indices=indices,
        codebook_sizes=sizes,
    )


def test_psnr_of_known_errors():
    target = torch.full((2, 3, 4, 16, 16), 100, dtype=torch.uint8)
    recon = target.clone()
    recon[0] += 5  # squared error 25 everywhere
    recon[1, :, :2] += 10  # 100 on half of the frames
    expected = [10 * math.log10(255**2 / 25), 10 * math.log10(255**2 / 50)]
    assert clip_psnr(recon, target).tolist() == pytest.approx(expected, abs=1e-9)
    assert float(clip_psnr(recon - 0, target).mean()) == pytest.approx(sum(expected) / 2)


def test_psnr_of_noise_against_uniform_is_its_closed_form():
    target = torch.zeros(1, 3, 8, 64, 64, dtype=torch.uint8)
    # E[x^2] of uniform 0..255 levels
    mse = sum(v * v for v in range(256)) / 256
    assert float(clip_psnr(noise(1, 3, 8, 64, 64), target)) == pytest.approx(10 * math.log10(255**2 / mse), abs=0.05)


def test_an_exact_copy_is_finite_and_above_every_other_reconstruction():
    target = noise(1, 3, 2, 16, 16)
    off = target.clone()
    off[0, 0, 0, 0, 0] ^= 1
    exact, one_off = clip_psnr(target, target), clip_psnr(off, target)
    assert float(exact) == float(one_off) == pytest.approx(10 * math.log10(255**2 * target.numel()))
    assert torch.isfinite(clip_tdiff_psnr(target, target)).all()


def test_temporal_difference_sees_motion_and_not_offsets():
    target = torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8)
    offset = target + 7
    assert float(clip_tdiff_psnr(offset, target)) == float(clip_tdiff_psnr(target, target))
    flicker = target.clone()
    flicker[:, :, 1::2] = 6  # every difference is off by 6
    assert float(clip_tdiff_psnr(flicker, target)) == pytest.approx(10 * math.log10(255**2 / 36))
    assert clip_tdiff_psnr(target[:, :, :1], target[:, :, :1]).isnan().all()


def test_padding_never_counts():
    target, lengths = noise(3, 3, 6, 24, 24), torch.tensor([6, 4, 1])
    recon = noise(3, 3, 6, 24, 24, seed=1)
    net = LPIPS("vgg")
    for fn in (clip_psnr, clip_tdiff_psnr, clip_ssim, lambda *a: clip_lpips(net, *a)):
        other = recon.clone()
        for row, n in enumerate(lengths.tolist()):
            other[row, :, n:] = 255 - other[row, :, n:]
        a, b = fn(recon, target, lengths), fn(other, target, lengths)
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        short = fn(recon[1:2, :, :4].contiguous(), target[1:2, :, :4].contiguous())
        assert float(a[1]) == pytest.approx(float(short), rel=1e-6)


@pytest.mark.parametrize("size", [(11, 11), (32, 48)])
def test_ssim_equals_torchmetrics(size):
    """torchmetrics averages over windows that reach into a reflected border too; its map, cropped, is ours."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    base = noise(1, 3, 1, *size).expand(2, 3, 3, *size)
    recon = (base.float() * 0.7 + noise(2, 3, 3, *size, seed=3).float() * 0.3).round().to(torch.uint8)
    ours = clip_ssim(recon, base)
    for row in range(2):
        _, full = structural_similarity_index_measure(
            recon[row].transpose(0, 1).double(),
            base[row].transpose(0, 1).double(),
            data_range=255.0,
            reduction="none",
            return_full_image=True,
        )
        assert float(ours[row]) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=2e-5)
    assert clip_ssim(base, base).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_ssim_is_undefined_below_its_window():
    small = noise(1, 3, 2, 10, 32)
    assert clip_ssim(small, small).isnan().all()
    metric = SSIM()
    metric.update(small, small)
    assert metric.compute().isnan()


def test_metrics_add_up_over_batches():
    target, recon = noise(5, 3, 3, 16, 16), noise(5, 3, 3, 16, 16, seed=2)
    lengths = torch.tensor([3, 3, 1, 2, 3])
    for metric, fn in ((PSNR(), clip_psnr), (SSIM(), clip_ssim), (TemporalDifferencePSNR(), clip_tdiff_psnr)):
        metric.update(recon[:2], target[:2], lengths[:2])
        metric.update(recon[2:], target[2:], lengths[2:])
        whole = fn(recon, target, lengths)
        assert float(metric.compute()) == pytest.approx(float(whole[~whole.isnan()].mean()), abs=1e-12)


@pytest.mark.parametrize(
    "recon, lengths, message",
    [
        (noise(1, 3, 2, 16, 17), None, "one shape"),
        (torch.zeros(1, 3, 2, 16, 16), None, "uint8"),
        (noise(1, 3, 2, 16, 16), torch.tensor([3]), r"\[1, 2\]"),
    ],
)
def test_bad_input_is_named(recon, lengths, message):
    with pytest.raises(ValueError, match=message):
        clip_psnr(recon, noise(1, 3, 2, 16, 16), lengths)


def random_lpips_file(path, net: str) -> str:
    torch.manual_seed(0)
    torch.save(LPIPS(net).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_a_distance_after_loading(tmp_path, net):
    sha = random_lpips_file(tmp_path / "w.pth", net)
    model = load_lpips(tmp_path / "w.pth", sha)
    assert model.net == net and not any(p.requires_grad for p in model.parameters())
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    x.requires_grad_(True)
    d = model(x, y)
    assert d.shape == (2,) and bool((d > 0).all())
    assert torch.allclose(d, model(y, x)) and model(x, x).abs().max() == 0
    assert torch.isfinite(torch.autograd.grad(d.sum(), x)[0]).all()
    metric = PerceptualDistance(model)
    pair = noise(2, 3, 2, 32, 32), noise(2, 3, 2, 32, 32, seed=5)
    metric.update(*pair)
    frames = [p.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1 for p in pair]
    assert float(metric.compute()) == pytest.approx(float(model(*frames).mean()), rel=1e-5)


def test_lpips_gradient_is_finite_on_flat_images():
    model, flat = LPIPS("vgg"), torch.full((1, 3, 16, 16), -1.0, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(model(flat, torch.zeros(1, 3, 16, 16)).sum(), flat)[0]).all()


def test_lpips_refuses_other_weights(tmp_path):
    random_lpips_file(tmp_path / "w.pth", "alex")
    with pytest.raises(ValueError, match="sha256"):
        load_lpips(tmp_path / "w.pth", "0" * 64)
    with pytest.raises(FileNotFoundError, match="no LPIPS weights"):
        load_lpips(tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="features.0.weight"):
        load_lpips(tmp_path / "other.pth")
    state = LPIPS("alex").state_dict()
    del state["lin3.model.1.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="lin3.model.1.weight"):
        load_lpips(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="too small"):
        LPIPS("alex")(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))
    with pytest.raises(ValueError, match="alex"):
        LPIPS("squeeze")


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_torchmetrics_with_its_heads(tmp_path, net):
    """The released heads are in torchmetrics' wheel; the backbone is random on both sides."""
    pytest.importorskip("torchvision")
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(1)
    theirs = _LPIPS(pretrained=True, net=net, pnet_rand=True, eval_mode=True)
    # scale the random backbone up, or every feature of the last layers is nearly 0
    for name, weight in theirs.net.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(weight)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")  # the lpips package's own names
    ours = load_lpips(tmp_path / "w.pth")
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours(x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-6)


def test_safetensors_and_torchvision_names(tmp_path):
    from safetensors.torch import save_file

    model = LPIPS("alex")
    save_file(model.state_dict() | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    loaded = load_lpips(tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    vision = pytest.importorskip("torchvision").models.alexnet(weights=None).features.state_dict()
    assert {f"features.{k}": v.shape for k, v in vision.items()} == {
        k: v.shape for k, v in model.state_dict().items() if k.startswith("features.")
    }


def test_nominal_bits():
    metric = NominalBits()
    metric.update(make_tokens(torch.zeros(2, 4, 2, dtype=torch.int64), (64000, 8), torch.tensor([4, 2])))
    out = metric.compute()
    assert float(out["bits_mean"]) == pytest.approx(3 * (math.log2(64000) + 3)) and float(out["tokens_mean"]) == 3


def test_usage_and_perplexity_of_known_ids():
    ids = torch.tensor([[[0], [1], [5]], [[0], [2], [7]]])  # position 0 says 0 twice
    metric = CodebookUsage((8,))
    metric.update(make_tokens(ids, (8,), torch.tensor([3, 2])))  # the 7 is padding
    out = metric.compute()
    assert out["usage"] == 4 / 8 and out["entries_used"] == 4 and out["ids_counted"] == 5
    assert out["usage_possible"] == 5 / 8
    entropy = -(2 / 5 * math.log(2 / 5) + 3 / 5 * math.log(1 / 5))
    assert out["perplexity"] == pytest.approx(math.exp(entropy))
    assert out["usage_per_position"] == [1 / 8, 2 / 8, 1 / 8]
    assert out["perplexity_per_position"] == pytest.approx([1, 2, 1])


def test_usage_of_large_codebooks_is_sparse_and_adds_up():
    sizes = (2**18, 64000)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 64000, (3, 256, 2), generator=generator) for _ in range(40)]
    metric, whole = CodebookUsage(sizes), CodebookUsage(sizes)
    for ids in batches:
        metric.update(make_tokens(ids, sizes))
    assert sum(len(k) for k in metric.keys) <= 40 * 3 * 256 * 2
    ids = torch.cat(batches)
    whole.update(make_tokens(ids, sizes))
    a, b = metric.compute(), whole.compute()
    assert a == b
    expected = [len(ids[..., q].unique()) / sizes[q] for q in range(2)]
    assert a["usage"] == pytest.approx(sum(expected) / 2) and len(a["usage_per_position"]) == 256


def test_usage_refuses_continuous_and_foreign_ids():
    with pytest.raises(ValueError, match="discrete"):
        CodebookUsage(())
    metric = CodebookUsage((8,))
    with pytest.raises(ValueError, match="codebook_sizes"):
        metric.update(make_tokens(torch.zeros(1, 2, 1, dtype=torch.int64), (9,)))
    with pytest.raises(ValueError, match="ids lie in"):
        metric.update(make_tokens(torch.full((1, 2, 1), 8), (8,)))
    with pytest.warns(UserWarning, match="before"):
        assert math.isnan(CodebookUsage((8,)).compute()["usage"])


def _rank_main(rank: int, world: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    usage, psnr = CodebookUsage((8,)), PSNR()
    ids = torch.tensor([[[0], [1]], [[2], [3]], [[0], [5]]])
    target, recon = noise(3, 3, 2, 16, 16), noise(3, 3, 2, 16, 16, seed=1)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)  # uneven on purpose
    usage.update(make_tokens(ids[mine], (8,)))
    psnr.update(recon[mine], target[mine])
    results.put((rank, usage.compute(), float(psnr.compute())))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_rank_main, args=(rank, 2, str(tmp_path / "store"), results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
        assert worker.exitcode == 0
    seen = [results.get() for _ in range(2)]
    alone = CodebookUsage((8,))
    alone.update(make_tokens(torch.tensor([[[0], [1]], [[2], [3]], [[0], [5]]]), (8,)))
    want = float(clip_psnr(noise(3, 3, 2, 16, 16, seed=1), noise(3, 3, 2, 16, 16)).mean())
    for _, usage, psnr in seen:
        assert usage == alone.compute() and psnr == pytest.approx(want, abs=1e-12)


def test_usage_survives_a_change_of_length():
    tokens = make_tokens(torch.zeros(1, 4, 1, dtype=torch.int64), (8,))
    metric = CodebookUsage((8,))
    metric.update(tokens.truncate(2))
    metric.update(replace(tokens, lengths=torch.tensor([3])))
    assert len(metric.compute()["usage_per_position"]) == 3
