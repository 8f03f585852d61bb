"""rFVD and rFID: the distance against closed forms, sums that add up, weights refused; networks with random weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok import config as vtok_config
from vtok import evaluate
from vtok.data import shards, synthetic
from vtok.evaluate import print_table
from vtok.evaluation.evaluator import Evaluator
from vtok.evaluation.report import write_report
from vtok.evaluation.rows import check_same_weights
from vtok.export import write_export
from vtok.families.flexible import Config, Model
from vtok.metrics.frechet import FeatureCache, FeatureNet, FrechetDistance, frechet_distance
from vtok.metrics.i3d import I3D, load_i3d
from vtok.metrics.inception import Inception, load_inception, resize_tf1
from vtok.types import Clip

ROOT = Path(__file__).resolve().parents[1]


class Quadrants(FeatureNet):
    """Five fixed mixtures of the mean colours of a frame's quadrants: a network small enough to count on."""

    dim, unit, min_frames, about = 5, "frames", 1, "quadrants"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(5, 12, generator=generator), requires_grad=False)
        self.seen = 0

    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        self.seen += int(lengths.sum())
        frames = [clip[:, : int(length)].transpose(0, 1) / 255 for clip, length in zip(video, lengths)]
        return [F.adaptive_avg_pool2d(x, 2).flatten(1) @ self.mix.T for x in frames]


class ShortRefusing(Quadrants):
    min_frames = 3

    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        return [x if len(x) >= 3 else x[:0] for x in super().features(video, lengths)]


def videos(batch: int, frames: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    """uint8 [B, 3, T, H, W] of coarse moving colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 2, 4, 4, generator=generator) * 255
    return F.interpolate(coarse, size=(frames, size, size), mode="trilinear").to(torch.uint8)


def blurred(video: Tensor) -> Tensor:
    return F.avg_pool3d(video.float(), (1, 3, 3), 1, padding=(0, 1, 1), count_include_pad=False).to(torch.uint8)


def noisy(video: Tensor, deviation: float = 60.0) -> Tensor:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1)) * deviation
    return (video + noise).clamp(0, 255).to(torch.uint8)


def randomised(net: nn.Module) -> nn.Module:
    """Random weights under which signals keep their size through the depth, and normalisation does something."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return net


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(randomised(I3D()).state_dict(), folder / "i3d.pt")
    state = randomised(Inception()).state_dict()
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, folder / "inception.pth")
    return {"i3d": folder / "i3d.pt", "inception": folder / "inception.pth"}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the distance -----------------------------------------------------------------------------------------------------


def test_distance_has_the_closed_form_of_commuting_covariances():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    a, b = torch.rand(2, 12, generator=generator, dtype=torch.float64)
    a[:3] = 0  # singular, as with few samples
    mean_a, mean_b = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    exact = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet_distance(mean_a, basis @ a.diag() @ basis.T, mean_b, basis @ b.diag() @ basis.T)
    assert float(got) == pytest.approx(float(exact), rel=1e-10)
    zero = torch.zeros(12, 12, dtype=torch.float64)
    assert float(frechet_distance(mean_a, zero, mean_a, b.diag())) == pytest.approx(float(b.sum()), rel=1e-12)


@pytest.mark.parametrize("samples", [200, 20])  # 20: fewer than features
def test_distance_equals_scipy_and_is_symmetric(samples):
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 40, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(40, 40, generator=generator, dtype=torch.float64) + 1
    means, covariances = (x.mean(0), y.mean(0)), (x.T.cov(), y.T.cov())
    root = torch.from_numpy(linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    theirs = (means[0] - means[1]).square().sum() + (covariances[0] + covariances[1] - 2 * root).trace()
    ours = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    # scipy's root of a singular matrix is only accurate to about the root of machine precision
    assert float(ours) == pytest.approx(float(theirs), rel=1e-9 if samples > 40 else 1e-5)
    swapped = frechet_distance(means[1], covariances[1], means[0], covariances[0])
    assert float(swapped) == pytest.approx(float(ours), rel=1e-9)
    assert float(frechet_distance(means[0], covariances[0], means[0], covariances[0])) == pytest.approx(0, abs=1e-6)


# --- the metric -------------------------------------------------------------------------------------------------------


def test_metric_is_the_distance_of_all_features_at_once_and_orders_damage():
    net, target, lengths = Quadrants(), videos(9), torch.tensor([4, 3, 2, 4, 1, 4, 4, 3, 2])
    value = {}
    for name, recon in (("same", target), ("blur", blurred(target)), ("noise", noisy(target))):
        metric = FrechetDistance(net)
        metric.update(recon, target, lengths)
        value[name] = float(metric.compute())
        x, y = (torch.cat(net.features(each, lengths)).double() for each in (recon, target))
        assert value[name] == pytest.approx(
            float(frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())), abs=1e-6
        )
        assert int(metric.samples) == 27
    assert value["same"] < 1e-6 < value["blur"] < value["noise"]


def test_batches_and_merged_halves_equal_the_whole():
    net, target = Quadrants(), videos(8)
    recon = noisy(target)
    whole, first, second = FrechetDistance(net), FrechetDistance(net), FrechetDistance(net)
    whole.update(recon, target)
    for at in range(4):
        (first if at < 2 else second).update(recon[2 * at : 2 * at + 2], target[2 * at : 2 * at + 2])
    first.merge_state(second)
    assert int(first.samples) == int(whole.samples) == 32
    assert float(first.compute()) == pytest.approx(float(whole.compute()), rel=1e-9)
    whole.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert int(whole.samples) == 0 and whole.compute().isnan()
    whole.update(recon, target)  # usable again: the defaults were not written to
    assert float(first.compute()) == pytest.approx(float(whole.compute()), rel=1e-9)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    target = videos(7)
    mine = slice(0, 5) if rank == 0 else slice(5, 7)  # ranks need not have equal shares
    metric = FrechetDistance(Quadrants())
    metric.update(noisy(target)[mine], target[mine])
    if rank == 0:
        (Path(folder) / "value").write_text(f"{float(metric.compute())!r}")
    else:
        metric.compute()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    alone, target = FrechetDistance(Quadrants()), videos(7)
    alone.update(noisy(target), target)
    assert float((tmp_path / "value").read_text()) == pytest.approx(float(alone.compute()), rel=1e-9)


def test_cache_gives_the_same_number_and_sees_originals_once():
    target = videos(4)
    plain, values = FrechetDistance(Quadrants()), []
    plain.update(noisy(target), target)
    for limit in (2**20, 5 * 4 * 6, 0):  # all, some, none of the originals are kept
        net = Quadrants()
        cache = FeatureCache(net, limit=limit)
        for _ in range(3):
            metric = FrechetDistance(net, cache=cache)
            metric.update(noisy(target), target)
            values.append(float(metric.compute()))
        assert cache.size <= limit
        assert net.seen == 3 * 16 + {2**20: 16, 120: 16 + 2 * 12, 0: 3 * 16}[limit]
    assert values == pytest.approx([float(plain.compute())] * 9)
    # padding is no part of a clip, its length is
    lengths = torch.tensor([4, 2, 4, 4])
    assert [len(x) for x in cache.features(target, lengths)] == [4, 2, 4, 4]


def test_too_few_samples_and_wrong_videos_are_told():
    metric, target = FrechetDistance(ShortRefusing()), videos(1)
    assert "there are 0" in str(metric.remark())
    metric.update(target, target, torch.tensor([2]))
    assert metric.compute().isnan() and "clips of 3 frames or more; there are 0" in str(metric.remark())
    metric.update(target, target)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-6) and "of 4 frames, biased upward" in str(
        metric.remark()
    )
    metric.update(videos(2), videos(2))
    assert metric.remark() is None  # 12 is more than twice 5
    with pytest.raises(ValueError, match="RGB"):
        metric.update(target[:, :1], target[:, :1])


# --- networks and weights ---------------------------------------------------------------------------------------------


def test_i3d_has_the_published_size_and_the_smallest_clip(weights):
    net = load_i3d(weights["i3d"], sha(weights["i3d"]).upper())
    counts = {name.partition(".")[0]: 0 for name, _ in net.named_parameters()}
    for name, parameter in net.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    assert counts["logits"] == 400 * 1024 + 400 and sum(counts.values()) - counts["logits"] == 12_287_264
    assert net.sha256 == sha(weights["i3d"]) and not net.training and not net.train().training
    assert "Mixed_4f.b1b.bn.running_var" in net.state_dict()
    lengths = torch.tensor([8, 9])
    short, enough = net.features(videos(2, frames=9, size=20), lengths)
    assert short.shape == (0, 400) and enough.shape == (1, 400) and enough.std() > 0
    with pytest.raises(ValueError, match="data.num_frames"):
        net(torch.zeros(1, 3, 8, 224, 224))


def test_inception_equals_torchvisions_with_the_graphs_pooling(weights, monkeypatch):
    vision = pytest.importorskip("torchvision").models
    theirs = vision.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).eval()
    state = torch.load(weights["inception"], weights_only=True)
    theirs.load_state_dict(state)  # the same names
    theirs.fc = nn.Identity()
    average = F.avg_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda *a, **k: average(*a, **{**k, "count_include_pad": False}))
    last = theirs.Mixed_7c.forward

    def with_maximum(x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "avg_pool2d", lambda x, **k: F.max_pool2d(x, **k))
            return last(x)

    theirs.Mixed_7c.forward = with_maximum
    ours = load_inception(weights["inception"])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_resize_is_tensorflows():
    # 2 -> 4 pixels: output i lies at i / 2 of the input, and the last value repeats
    row = torch.tensor([10.0, 30.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_tf1(row, 4)[0, 0, 0].tolist() == [10.0, 20.0, 30.0, 30.0]
    image = torch.randint(0, 256, (1, 3, 7, 9), dtype=torch.uint8)
    assert resize_tf1(image, 5).shape == (1, 3, 5, 5)
    torch.testing.assert_close(resize_tf1(image[..., :7], 7), image[..., :7].float())


def test_other_weights_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="eval.fvd_weights"):
        load_i3d(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=f"eval.fid_weights.*{sha(weights['inception'])}.*would not\n? ?compare"):
        load_inception(weights["inception"], "0" * 64)
    state = torch.load(weights["i3d"], weights_only=True)
    del state["Mixed_5c.b0.bn.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"I3D: it lacks Mixed_5c\.b0\.bn\.bias \(1 names\)"):
        load_i3d(tmp_path / "cut.pt")
    torch.save({**state, "Mixed_5c.b0.bn.bias": torch.zeros(384), "more": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="holds what is not in it: more"):
        load_i3d(tmp_path / "more.pt")
    torch.save({**state, "Mixed_5c.b0.bn.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match="size mismatch"):
        load_i3d(tmp_path / "shape.pt")
    with pytest.raises(ValueError, match="Inception: it lacks"):
        load_inception(weights["i3d"])


def test_files_that_are_programs_are_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="TorchScript archive.*docs/formats.md"):
        load_i3d(tmp_path / "script.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # a pickled object: loading it would import and run its class
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        load_i3d(tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_inception(tmp_path / "checkpoint.pt")


def test_files_of_old_pytorch_and_safetensors_are_read(weights, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(weights["i3d"], weights_only=True)
    bare = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(bare, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(bare, tmp_path / "new.safetensors")
    for name in ("old.pt", "new.safetensors"):
        net = load_i3d(tmp_path / name)
        assert torch.equal(net.state_dict()["logits.conv3d.weight"], state["logits.conv3d.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i3d", "inception"])
def test_networks_order_damage(weights, kind):
    net = load_i3d(weights["i3d"]) if kind == "i3d" else load_inception(weights["inception"])
    target, value = videos(2, frames=9 if kind == "i3d" else 3, size=32), {}
    cache = FeatureCache(net)
    for name, recon in (("same", target), ("blur", blurred(target)), ("noise", noisy(target))):
        metric = FrechetDistance(net, cache=cache)
        metric.update(recon, target)
        value[name] = float(metric.compute())
    assert int(metric.samples) == {"i3d": 2, "inception": 6}[kind]
    assert value["same"] < 1e-4 * value["blur"] and value["blur"] < value["noise"]


class _Detector(nn.Module):
    """A network behind the signature of StyleGAN-V's detector, whose logits come first in the state dict."""

    def __init__(self, logits: nn.Module, net: nn.Module) -> None:
        super().__init__()
        self.logits, self.net = logits, net

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        return self.logits(self.net(x)[:, :, None, None, None]).flatten(1)  # after the mean: the same, it is linear


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_documented_conversion_of_torchscript(weights, tmp_path, monkeypatch):
    code = re.search(
        r"```python\n(import torch\nfrom vtok\.metrics.*?)```", (ROOT / "docs/formats.md").read_text(), re.S
    )
    assert code
    net, body = load_i3d(weights["i3d"]), load_i3d(weights["i3d"])
    body.logits = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        traced = torch.jit.trace(body, torch.zeros(1, 3, 16, 224, 224))
    detector = _Detector(torch.jit.script(net.logits), traced)
    torch.jit.script(detector).save(str(tmp_path / "i3d_torchscript.pt"))
    monkeypatch.chdir(tmp_path)
    exec(code[1], {})
    converted = load_i3d("i3d.pt")
    for name, value in net.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)


# --- the table --------------------------------------------------------------------------------------------------------


def tiny(frames: int = 4) -> Model:
    torch.manual_seed(0)
    sizes = dict(num_frames=frames, size=[16, 16], patch=[frames, 8, 8], width=16, encoder_depth=1, decoder_depth=1)
    return Model(Config(**sizes, num_heads=2, num_tokens=8)).eval()  # type: ignore[arg-type]


def batches(count: int, *, seed: int) -> list[Clip]:
    return [Clip(keys=[f"{seed}-{at}"], video=videos(1, seed=100 * seed + at)) for at in range(count)]


def test_every_row_has_both_or_says_why(tmp_path):
    val, train = batches(3, seed=1), batches(8, seed=0)
    settings = dict(budgets=[1, 4], codecs=["x264"], processes=0, codec_clips=2, progress=False)
    result = Evaluator(tiny(), val=val, train=train, fvd=ShortRefusing(), fid=Quadrants(), **settings).run()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["weights"]["rfid"] == {"sha256": "", "features": "quadrants"} and len(result["rows"]) == 10
    for row in result["rows"]:
        clips = 2 if row["method"] == "x264" else 3
        assert row["rfid_frames"] == row["rfvd_clips"] == 4 * clips and row["rfid"] > 0
        assert ("rfid: of 8 frames, biased" in row["note"]) == (clips == 2)
        assert "no weights were given (eval.lpips_weights)" in row["note"] and "eval.fid" not in row["note"]
    # by hand
    model, metric = tiny(), FrechetDistance(Quadrants())
    from vtok.types import to_uint8

    for clip in val:
        with torch.inference_mode():
            metric.update(to_uint8(model.decode(model.encode(clip.as_float(), budget=4), size=(16, 16))), clip.video)
    assert result["rows"][1]["rfid"] == pytest.approx(float(metric.compute()), rel=1e-6)
    page = write_report(result, [], tmp_path / "report.html").read_text()
    for heading in ("rFVD", "rFVD clips", "rFID", "rFID frames"):
        assert f">{heading}</button>" in page
    without = Evaluator(tiny(), val=val, budgets=[4], controls=[], progress=False).run()
    (row,) = without["rows"]
    assert row["rfvd"] is row["rfvd_clips"] is row["rfid"] is row["rfid_frames"] is None and without["weights"] == {}
    assert "rfvd: no weights were given (eval.fvd_weights)" in row["note"] and "rfid: no weights" in row["note"]
    page = write_report(without, [], tmp_path / "report.html").read_text()
    assert ">rFVD</button>" not in page


def test_table_keeps_to_80_columns(capsys):
    from rich.console import Console

    row = {key: 12345.678 for key in ("bits_mean", "entropy_bits_mean", "rfvd", "rfid", "psnr_db", "tdiff_psnr_db")}
    row |= {"method": "mean_colour", "budget": 4096, "bits_per_pixel": 0.12345, "ssim": 0.9, "lpips": 0.1}
    result = {"model": "m", "clips": 3, "shards": "s", "rows": [{**row, "worse_share": 0.5}]}
    print_table(result, Console(width=80))
    text = capsys.readouterr().out
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "rFVD" in text and "rFID" in text and "LPIPS" in text and "PSNR" in text and "worse" not in text
    assert print_table({**result, "rows": [{**row, "rfvd": None, "rfid": None}]}, Console(width=80)) is None
    assert "tdiff" in capsys.readouterr().out


def test_tables_of_other_weights_do_not_compare():
    one = {"model": "a", "weights": {"rfvd": {"sha256": "1" * 64}, "rfid": {"sha256": "2" * 64}}}
    check_same_weights(one, {"model": "b", "weights": {"rfid": {"sha256": "2" * 64}}}, {"model": "old"})
    with pytest.raises(ValueError, match="rfvd of a was measured with weights of sha256 1111.*of b with 3333"):
        check_same_weights(one, {"model": "b", "weights": {"rfvd": {"sha256": "3" * 64}}})


@pytest.mark.long
@pytest.mark.slow
def test_vtok_eval_end_to_end(weights, tmp_path, capsys):
    synthetic.write_corpus(
        tmp_path / "corpus", clips=8, seconds=2, size=(32, 32), fps=8, complexity=(0, 1), workers=1, progress=False
    )
    shards.main([str(tmp_path / "corpus"), "--out", str(tmp_path / "shards")])
    model = tiny(9)
    config = vtok_config.loads(
        {
            "model": {"name": "flexible", "num_frames": 9, "size": [16, 16], "patch": [9, 8, 8], "width": 16}
            | {"encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_tokens": 8},
            "data": {"num_frames": 9, "size": [16, 16], "val_batch_size": 2, "num_workers": 0},
            "eval": {"fvd_weights": str(weights["i3d"]), "fvd_sha256": sha(weights["i3d"]), "codecs": []}
            | {"controls": ["mean_colour"], "budgets": [8]},
        }
    )
    (tmp_path / "export").mkdir()
    write_export(model, config, tmp_path / "export")
    asked = [str(tmp_path / "export"), "--shards", str(tmp_path / "shards" / "train"), "--clips", "2", "--no-progress"]
    asked += ["--out", str(tmp_path / "eval"), "--fid", str(weights["inception"])]
    assert evaluate.main(asked) == 0
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["flexible", "mean_colour"]
    for row in result["rows"]:
        assert row["rfvd_clips"] == 2 and row["rfid_frames"] == 18 and row["rfvd"] > 0 and row["rfid"] > 0
        assert "rfvd: of 2 clips, biased upward below about 800" in row["note"]
    assert result["weights"]["rfvd"]["sha256"] == sha(weights["i3d"])
    assert result["weights"]["rfid"]["sha256"] == sha(weights["inception"])  # recorded though none was asked for
    page = (tmp_path / "eval" / "report.html").read_text()
    assert ">rFVD</button>" in page and ">rFID frames</button>" in page and sha(weights["inception"]) in page
    assert "rFVD" in capsys.readouterr().out
    # another file: refused against the run's hash, and against the table that stands there
    state = torch.load(weights["i3d"], weights_only=True)
    state["logits.conv3d.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="eval.fvd_weights.*expected"):
        evaluate.main([*asked, "--fvd", str(tmp_path / "other.pt")])
    with pytest.raises(ValueError, match="rfvd of .*eval.json .*--out"):
        evaluate.main([*asked, "--fvd", str(tmp_path / "other.pt"), "--fvd-sha256", sha(tmp_path / "other.pt")])
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == result
