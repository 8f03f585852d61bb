"""Losses that look through frozen networks (VGG-19, I3D, RAFT, with random weights here), StyleGAN2's discriminator,
and what one run's losses take over from another's."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg19
from torchvision.models.optical_flow import raft_large, raft_small

from vtok import losses
from vtok.layers.i3d import I3DDistance, I3DNet, load_i3d_distance
from vtok.layers.optical_flow import OpticalFlow, load_flow
from vtok.layers.perceptual import LPIPS, load_perceptual
from vtok.layers.stylegan import StyleGANDiscriminator, minibatch_spread
from vtok.layers.vgg import TAP_WEIGHTS, VGG19Distance
from vtok.losses import AdversarialConfig, PixelConfig, PixelObjective
from vtok.metrics.i3d import I3D

NARROW = (8, 8, 16, 16, 16)


def clips(batch: int = 2, frames: int = 4, side: int = 32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, side, side, generator=generator) * 2 - 1


def narrow_vgg() -> VGG19Distance:
    torch.manual_seed(0)
    return VGG19Distance(NARROW)


def torchvision_like(net: VGG19Distance) -> dict[str, torch.Tensor]:
    """As a file of torchvision's `vgg19` holds it, with the layers that nothing reads."""
    width = NARROW[-1]
    behind = {f"features.{i}.{k}": torch.zeros(width) for i in (32, 34) for k in ("weight", "bias")}
    return {**net.state_dict(), **behind, "classifier.0.weight": torch.zeros(2, 2)}


@cache
def small_raft() -> nn.Module:
    torch.manual_seed(0)
    return raft_small()


@cache
def i3d() -> I3DNet:
    torch.manual_seed(0)
    return I3DNet()


# VGG-19 and Gram matrices


def test_vgg19_has_the_layers_of_torchvision(tmp_path):
    with torch.device("meta"):
        theirs, mine = vgg19().features, VGG19Distance()
    for at, layer in enumerate(mine.features):
        assert type(layer) is type(theirs[at])
        assert [p.shape for p in layer.parameters()] == [p.shape for p in theirs[at].parameters()]
    assert [type(theirs[at - 1]) for at in mine._taps] == [nn.Conv2d] * 5 and mine._taps == [3, 8, 13, 22, 31]
    torch.save(torchvision_like(narrow_vgg()), tmp_path / "vgg19.pt")
    net = load_perceptual("vgg19", tmp_path / "vgg19.pt")
    assert isinstance(net, VGG19Distance) and all(not p.requires_grad for p in net.parameters())
    assert not net.train().training
    a, b = clips(frames=1)[:, :, 0], clips(frames=1, seed=2)[:, :, 0]
    assert torch.equal(net(a, b), narrow_vgg()(a, b))


def test_vgg19_distance_is_the_weighted_l1_of_its_features():
    net = narrow_vgg()
    a, b = clips(frames=1)[:, :, 0].requires_grad_(True), clips(frames=1, seed=2)[:, :, 0]
    x, y = ((v + 1) / 2 for v in (a, b))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x, y, found = (x - mean) / std, (y - mean) / std, 0.0
    for at, layer in enumerate(net.features):
        x, y = layer(x), layer(y)
        if at in net._taps:
            found = found + TAP_WEIGHTS[net._taps.index(at)] * (x - y).abs().mean((1, 2, 3))
    got = net(a, b)
    assert got.shape == (2,) and torch.allclose(got, found, rtol=1e-4) and float(net(b, b).max()) == 0
    got.sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


def test_vgg19_files_and_images_that_do_not_fit(tmp_path):
    torch.save(LPIPS("alex").state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not the state dict of torchvision's vgg19"):
        load_perceptual("vgg19", tmp_path / "other.pt")
    state = torchvision_like(narrow_vgg())
    del state["features.2.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"cut.pt does not fit torchvision's vgg19(.|\n)*features.2.bias"):
        load_perceptual("vgg19", tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="15x32 are too small for VGG-19, which needs 16"):
        narrow_vgg()(torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32))
    torch.save({"net": nn.Conv2d(1, 1, 1)}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        load_perceptual("vgg19", tmp_path / "pickled.pt")


class Taps(nn.Module):
    tap_weights = (1.0, 0.25)

    def taps(self, image):
        return [image, image[:, :2, ::2, ::2]]


def test_gram_is_its_definition_and_blind_to_places():
    a, b = clips(), clips(seed=2)
    wanted = 0.0
    for (x, y), weight in zip(((a, b), (a[:, :2, :, ::2, ::2], b[:, :2, :, ::2, ::2])), Taps.tap_weights):
        products = [torch.einsum("bcthw,bdthw->btcd", v, v) / (v.shape[3] * v.shape[4]) for v in (x, y)]
        wanted += weight * (products[0] - products[1]).abs().mean()
    assert losses.gram(Taps(), a, b).item() == pytest.approx(wanted.item(), rel=1e-4)
    moved = a.flatten(3)[..., torch.randperm(32 * 32)].unflatten(3, (32, 32))

    class Whole(Taps):
        tap_weights = (1.0,)

    assert losses.gram(Whole(), moved, a).item() < 1e-6 < losses.gram(Whole(), b, a).item()
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    spoilt = b.clone()
    spoilt[1, :, 1:] = torch.nan
    assert torch.isfinite(losses.gram(Taps(), a, spoilt, mask=mask))
    recon = a.clone().requires_grad_(True)
    losses.gram(narrow_vgg(), recon, b, frames=2).backward()
    assert recon.grad is not None and recon.grad.abs().sum() > 0


# optical flow


class Shift(nn.Module):
    """Flow of frames whose first channel is an x coordinate and whose second is a y coordinate."""

    def forward(self, first, second):
        return (second - first)[:, :2]


def test_flow_distance_compares_neighbours_in_both_directions():
    a, b = clips(frames=4), clips(frames=4, seed=2)
    steps = [v[:, :2, 1:] - v[:, :2, :-1] for v in (a, b)]
    whole = losses.flow_distance(Shift(), a, b)
    assert whole.item() == pytest.approx((steps[0] - steps[1]).abs().mean().item(), rel=1e-5)  # |-f - -g| = |f - g|
    torch.manual_seed(0)
    some = torch.stack([losses.flow_distance(Shift(), a, b, pairs=1) for _ in range(300)]).mean()
    assert some.item() == pytest.approx(whole.item(), rel=1e-2)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    spoilt = b.clone()
    spoilt[1, :, 2:] = torch.nan
    assert torch.isfinite(losses.flow_distance(Shift(), a, spoilt, mask=mask))
    image = a[:, :, :1].clone().requires_grad_(True)
    assert losses.flow_distance(Shift(), image, b[:, :, :1]).item() == 0  # images do not move
    only = torch.tensor([[True, False]] * 2)
    assert losses.flow_distance(Shift(), a[:, :, :2], b[:, :, :2], mask=only).item() == 0


def test_raft_sees_128_pixels_at_least_and_flows_are_in_pixels_of_the_frames():
    net = OpticalFlow(small_raft(), updates=1)
    assert net.sides((32, 200)) == (128, 200) and OpticalFlow(small_raft(), scale=2.0).sides((512, 300)) == (256, 152)
    torch.manual_seed(0)
    a, b = torch.rand(1, 3, 128, 128) * 2 - 1, torch.rand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        own = small_raft().eval()(a, b, num_flow_updates=1)[-1]
        assert torch.equal(net(a, b), own)
        small = [F.interpolate(v, (32, 64), mode="area") for v in (a, b)]
        large = [F.interpolate(v, (128, 128), mode="bilinear", antialias=True) for v in small]
        expected = small_raft()(*large, num_flow_updates=1)[-1] * torch.tensor([64 / 128, 32 / 128]).view(1, 2, 1, 1)
        assert torch.allclose(net(*small), expected, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # coordinates are counted in pixels
            assert torch.equal(net(a, b), own)
    recon = a.clone().requires_grad_(True)
    net(recon, b).sum().backward()
    assert recon.grad is not None and recon.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="flow_scale=0.5 must be 1"):
        OpticalFlow(small_raft(), scale=0.5)


def test_raft_weights_say_which_raft_they_are(tmp_path):
    torch.save(small_raft().state_dict(), tmp_path / "small.pt")
    net = load_flow(tmp_path / "small.pt", scale=2.0)
    assert net.scale == 2.0 and not list(net.parameters()) and not net.state_dict()  # beside the run, in no checkpoint
    inner = net._raft.net
    assert inner.mask_predictor is None and not inner.training and not any(p.requires_grad for p in inner.parameters())
    before = copy.deepcopy(inner.state_dict())
    net.bfloat16()  # a run in half precision
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    state = raft_large().state_dict()
    del state["feature_encoder.convnormrelu.0.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"does not fit torchvision's raft_large(.|\n)*convnormrelu.0.bias"):
        load_flow(tmp_path / "cut.pt")
    with pytest.raises(FileNotFoundError, match="no RAFT weights"):
        load_flow(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="these are other weights"):
        load_flow(tmp_path / "small.pt", "0" * 64)


# I3D


def test_i3d_distance_is_lpips_of_clips():
    net = I3DDistance(i3d())
    a, b = clips().requires_grad_(True), clips(seed=2)
    got = net(a, b)
    layers = [i3d().layers(v) for v in (a, b)]
    names = ["Conv3d_1a_7x7", "Conv3d_2c_3x3", "Mixed_3c", "Mixed_4f", "Mixed_5c"]
    pairs = [[F.normalize(v[name], dim=1) for v in layers] for name in names]
    wanted = sum((x - y).square().sum(1).flatten(1).mean(1) for x, y in pairs) / 5
    assert (
        torch.allclose(got, wanted, atol=1e-5) and 0 < float(got.detach().min()) < 4 and float(net(b, b).max()) < 1e-9
    )
    got.sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0
    assert not net.state_dict() and not list(net.parameters())
    with pytest.raises(ValueError, match=r"\[N, 3, T, H, W\]"):
        net(a[:, :, 0], b[:, :, 0])


def test_i3d_of_the_loss_and_of_rfvd_read_the_same_file(tmp_path):
    with torch.device("meta"):
        names = list(I3D().state_dict())
    assert names == list(i3d().state_dict())
    state = {k: v for k, v in i3d().state_dict().items() if not k.endswith(".num_batches_tracked")}
    torch.save(state, tmp_path / "i3d.pt")
    net = load_i3d_distance(tmp_path / "i3d.pt")
    mine = net._i3d.net.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in state.items())
    del state["logits.conv3d.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"does not fit I3D(.|\n)*logits.conv3d.bias"):
        load_i3d_distance(tmp_path / "cut.pt")


class Lengths(nn.Module):
    def forward(self, x, y):
        self.seen.append(x.shape[2])
        return (x - y).abs().mean((1, 2, 3, 4))


def test_video_perceptual_cuts_clips_to_their_real_frames():
    a, b = clips(batch=4, frames=5), clips(batch=4, frames=5, seed=2)
    lengths = torch.tensor([5, 1, 3, 5])
    mask = torch.arange(5)[None] < lengths[:, None]
    net, spoilt = Lengths(), torch.where(mask[:, None, :, None, None], b, torch.nan)
    net.seen = []
    found = losses.video_perceptual(net, a, spoilt, mask=mask)
    each = [(a[i, :, :n] - b[i, :, :n]).abs().mean() for i, n in enumerate(lengths.tolist()) if n > 1]
    assert net.seen == [3, 5] and found.item() == pytest.approx(float(sum(each) / 3), rel=1e-5)
    assert losses.video_perceptual(net, a, b).item() == pytest.approx((a - b).abs().mean().item(), rel=1e-5)
    assert losses.video_perceptual(net, a[:, :, :1], b[:, :, :1]).item() == 0
    assert losses.video_perceptual(net, a, b, mask=torch.arange(5)[None] < torch.ones(4, 1)).item() == 0


# StyleGAN2's discriminator


def test_stylegan_blurs_before_it_halves():
    net = StyleGANDiscriminator(width=8, size=(32, 32)).double()
    assert [f.shape[1:] for f in net.features(torch.zeros(2, 3, 32, 32).double())] == [
        (16, 16, 16), (32, 8, 8), (64, 4, 4), (1,),
    ]  # fmt: skip
    block = net.blocks[0]
    blurred = block.skip[0](torch.ones(1, 8, 32, 32).double())
    assert torch.allclose(blurred[:, :, 2:-2, 2:-2], torch.ones(1).double())  # the filter sums to 1
    fine = ((torch.arange(32) % 2) * 2.0 - 1).expand(1, 8, 32, 32).double()  # what halving would alias is gone
    assert block.skip[0](fine)[:, :, 2:-2, 2:-2].abs().max() < 1e-12
    assert len(StyleGANDiscriminator(width=128, size=(128, 128)).blocks) == 5


def test_minibatch_spread_compares_same_frames_of_different_clips():
    x = torch.randn(8, 3, 4, 4)  # two frames of four clips, frame after frame
    out = minibatch_spread(x)
    assert torch.equal(out[:, :3], x) and out.shape == (8, 4, 4, 4)
    for frame in (0, 1):
        wanted = x[frame::2].std(0, unbiased=False).mean()
        assert torch.allclose(out[frame::2, 3], wanted, atol=1e-4)
    assert torch.allclose(minibatch_spread(x[:1])[:, 3], torch.tensor(1e-4))  # one image does not vary
    assert minibatch_spread(x[:7]).shape == (7, 4, 4, 4) and minibatch_spread(x[:6])[0, 3, 0, 0] > 0.1


# objectives


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Settings of an objective that name its weight files."""
    root = tmp_path_factory.mktemp("networks")
    states = {
        "perceptual": torchvision_like(narrow_vgg()), "flow": small_raft().state_dict(),
        "video_perceptual": i3d().state_dict(),
    }  # fmt: skip
    for name, state in states.items():
        torch.save(state, root / f"{name}.pt")
    return {"perceptual_net": "vgg19"} | {f"{name}_weights": str(root / f"{name}.pt") for name in states}


def objective(files: dict[str, str], *, frames: int = 3, channels: int = 3, **settings) -> PixelObjective:
    return PixelObjective(PixelConfig(**{**files, **settings}), channels=channels, frames=frames, size=(32, 32))


def test_an_objective_adds_what_is_asked_for_and_reports_it_of_images_too(files):
    weights = {"perceptual": 0.1, "gram": 0.5, "flow": 0.01, "video_perceptual": 2.0}
    whole = objective(files, l1=0.5, flow_pairs=1, flow_updates=1, **weights)
    assert whole.flow.updates == 1
    last = torch.zeros(1)
    for frames in (3, 1):
        recon, video = clips(frames=frames).requires_grad_(True), clips(frames=frames, seed=2)
        total, report = whole.pixels(recon, video, mask=None, step=0, last=last)
        assert total.item() == pytest.approx(
            0.5 * report["l1"].item() + sum(w * report[k].item() for k, w in weights.items()), rel=1e-5
        )
        still = {"flow", "video_perceptual"} if frames == 1 else set()
        assert {k for k in weights if report[k] == 0} == still
        total.backward()
        assert torch.isfinite(recon.grad).all()
    assert not [n for n, p in whole.named_parameters() if p.requires_grad]
    assert all(name.startswith("perceptual.") for name in whole.state_dict())  # the others are in no checkpoint


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(flow=0.1, flow_weights=""), "objective.flow=0.1 needs objective.flow_weights, a file of RAFT"),
        (dict(video_perceptual=1.0, video_perceptual_weights=""), "needs objective.video_perceptual_weights.*I3D"),
        (dict(flow=0.1, frames=1), "objective.flow=0.1 compares videos.*num_frames=1"),
        (dict(flow=0.1, channels=4), "objective.flow=0.1 sees RGB frames.*model.channels=4"),
        (dict(flow_pairs=-1), "flow_pairs=-1 must be 0"),
        (dict(l1=-1.0), "objective.l1=-1.0 must be 0"),
        (dict(quantizer=-0.1), "objective.quantizer=-0.1 must be 0"),
        (dict(adversarial=AdversarialConfig(kind="hinges")), "objective.adversarial.kind='hinges' is unknown"),
        (dict(adversarial=AdversarialConfig(weight=-1.0)), "objective.adversarial.weight=-1.0 must be 0"),
        (dict(flow=0.1, flow_updates=0), "flow_updates=0 must be 1"),
        (dict(gram=1.0, perceptual_net="convnext_s"), "perceptual_net=lpips or vgg19, not convnext_s"),
        (dict(init_without=["adversarial"]), "no effect without objective.init_from"),
        (dict(init_from="x", init_without=["discriminator"]), "init_without.*choose from adversarial, log_variance"),
    ],
)
def test_settings_of_an_objective_that_cannot_be_honoured(files, settings, words):
    with pytest.raises(ValueError, match=words):
        objective(files, **settings)


GAME = AdversarialConfig(weight=0.2, width=8, discriminator="conv2d", lecam=0.01, depth=1)


def trained(files) -> PixelObjective:
    """An objective after two steps."""
    torch.manual_seed(1)
    first = objective(files, adversarial=GAME, log_variance="mean")
    optimizer = torch.optim.Adam([p for p in first.parameters() if p.requires_grad], 1e-2)
    for seed in range(2):
        recon = clips(frames=3, seed=seed + 5).requires_grad_(True)
        total, _ = first.pixels(recon, clips(frames=3, seed=seed), mask=None, step=0, last=recon)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return first


def begun(files, first: PixelObjective, **settings) -> PixelObjective:
    """A second objective from the same seed whatever its settings, begun with the losses of the first."""
    torch.manual_seed(2)
    second = objective(files, **settings)
    state = {f"objective.{k}": v for k, v in first.state_dict().items()} | {"model.weight": torch.zeros(1)}
    second.begin({"first": state}.__getitem__)
    return second


def test_losses_of_another_run_go_on_but_for_what_is_left_out(files):
    first = trained(files)
    settings = dict(adversarial=GAME, log_variance="mean")
    anew = begun(files, first, **settings)  # without init_from nothing is read
    second = begun(files, first, **settings, init_from="first")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert float(first.adversarial.real_average) != 0
    restarted = begun(files, first, **settings, init_from="first", init_without=["adversarial"])
    assert torch.equal(restarted.log_variance.logvar, first.log_variance.logvar)
    fresh, old = anew.adversarial.state_dict(), first.adversarial.state_dict()
    for name, value in restarted.adversarial.state_dict().items():
        assert torch.equal(value, fresh[name]), name
    assert any(not torch.equal(value, old[name]) for name, value in fresh.items())


def test_losses_of_another_run_that_do_not_fit(files):
    first = trained(files)
    other = AdversarialConfig(weight=0.2, width=8, discriminator="stylegan")
    with pytest.raises(ValueError, match=r"does not fit objective.adversarial(.|\n)*init_without=\[adversarial\]"):
        begun(files, first, adversarial=other, init_from="first")
    kept = begun(files, first, adversarial=other, init_from="first", init_without=["adversarial"])
    assert kept.adversarial is not None
