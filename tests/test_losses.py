"""Losses: their values, the frames they look at, and both players of the adversarial game in one backward."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_train
import torch
from torch import nn
from waiting import PATIENCE_S

from vtok import losses
from vtok.layers.discriminator import PatchDiscriminator2d, PatchDiscriminator3d, TransformerDiscriminator
from vtok.layers.stylegan import StyleGANDiscriminator
from vtok.losses import Adversarial, AdversarialConfig, LogVariance, codebook_report
from vtok.losses.codebook import MOST_BINS, bins_of
from vtok.losses.pixels import draw_frames
from vtok.training import strategy

ROOT = Path(__file__).parent.parent
SIZE = (32, 32)
KINDS = ("conv3d", "conv2d", "both", "stylegan", "transformer")


def adversary(discriminator: str = "conv3d", *, size: tuple[int, int] = SIZE, **settings) -> Adversarial:
    torch.manual_seed(0)
    extra = {"patch": [2, 8, 8], "num_heads": 1, "width": 16} if discriminator == "transformer" else {"width": 8}
    if discriminator != "stylegan":
        extra["depth"] = 2
    config = AdversarialConfig(weight=0.3, discriminator=discriminator, **{**extra, **settings})
    return Adversarial(config, channels=3, frames=5, size=size).double()


class Generator(nn.Module):
    """Two layers: enough for an adaptive weight at the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 1)

    def forward(self, video):
        return self.last(torch.tanh(self.first(video)))


def clips(batch: int = 2, frames: int = 5, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, *SIZE, generator=generator, dtype=torch.float64) * 2 - 1


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def nets(adversarial: Adversarial) -> list[nn.Module]:
    inner = adversarial.discriminator
    return list(inner.values()) if isinstance(inner, nn.ModuleDict) else [inner]


def seen(net: nn.Module, video: torch.Tensor) -> torch.Tensor:
    return (
        video.transpose(1, 2).flatten(0, 1) if isinstance(net, PatchDiscriminator2d | StyleGANDiscriminator) else video
    )


# both players


@pytest.mark.parametrize("discriminator", KINDS)
@pytest.mark.parametrize("kind, generator", [("hinge", ""), ("hinge", "nonsaturating"), ("nonsaturating", "")])
@pytest.mark.parametrize("frames", [1, 5])
def test_one_backward_equals_two_passes(discriminator, kind, generator, frames):
    """A discriminator of its own, frozen by hand for the generator's pass: the same gradients, in float64."""
    settings = dict(kind=kind, generator=generator, lecam=0.05, feature_matching=2.0, lecam_decay=0.9)
    adversarial = adversary(discriminator, **settings).train()
    model, video = Generator().double(), clips(frames=frames)
    recon = model(video)
    rest = (recon - video).abs().mean()
    total, report = adversarial(recon, video, rest, step=0, last=model.last.weight)
    (rest + total).backward()
    one = gradients(model), gradients(adversarial)
    averages = adversarial.real_average.reshape(-1).clone(), adversarial.fake_average.reshape(-1).clone()

    model.zero_grad(), adversarial.zero_grad()
    recon = model(video)
    terms, matching = [], []
    for net in nets(adversarial):
        *fake, logits = net.features(seen(net, recon))
        *real, _ = net.features(seen(net, video))
        linear = kind == "hinge" and not generator
        terms.append(-logits.mean() if linear else nn.functional.softplus(-logits).mean())
        matching.append(4 * sum((f - r.detach()).abs().mean() for f, r in zip(fake, real)) / len(fake))
    first = (recon - video).abs().mean() + 0.3 * sum(terms) / len(terms) + 2.0 * sum(matching) / len(matching)
    first.backward()
    generators = gradients(model)

    adversarial.zero_grad()
    own = []
    for i, net in enumerate(nets(adversarial)):
        real, fake = net(seen(net, video)), net(seen(net, recon.detach()))
        if kind == "hinge":
            game = (nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean()) / 2
        else:
            game = (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()) / 2
        assert averages[0][i].item() == pytest.approx(0.1 * real.mean().item())
        assert averages[1][i].item() == pytest.approx(0.1 * fake.mean().item())
        own.append(game + 0.05 * ((real - averages[1][i]).square().mean() + (fake - averages[0][i]).square().mean()))
    second = sum(own) / len(own)
    second.backward()
    theirs = gradients(adversarial)
    assert one[0].keys() == generators.keys() and one[1].keys() == theirs.keys() and theirs
    for name, gradient in generators.items():
        assert torch.allclose(one[0][name], gradient, rtol=1e-12, atol=1e-15), name
    for name, gradient in theirs.items():
        assert torch.allclose(one[1][name], gradient, rtol=1e-12, atol=1e-15), name
    assert (total + rest).item() == pytest.approx((first + second).item(), rel=1e-12)
    assert {"adversarial", "discriminator", "logits_real", "logits_fake", "lecam", "feature_matching"} <= report.keys()


@pytest.mark.parametrize("discriminator", KINDS)
def test_images_and_videos_of_other_lengths_and_sizes_go_through(discriminator):
    adversarial = adversary(discriminator)
    for shape in ((1, 32, 32), (2, 32, 32), (5, 32, 32), (3, 40, 48)):
        video = torch.rand(2, 3, *shape, dtype=torch.float64)
        total, report = adversarial(video * 0.5, video, video.mean(), step=0, last=video)
        assert torch.isfinite(total) and 0 < report["discriminator"] < 2


def test_a_frame_discriminator_judges_each_frame_alone_and_the_frames_asked_for():
    net = PatchDiscriminator2d(width=8, num_layers=2, size=SIZE).double()
    video = clips()
    whole, alone = net(video[0].transpose(0, 1)), net(video[0, :, 3][None])
    assert torch.allclose(whole[3], alone[0], atol=1e-12)
    adversarial = adversary("conv2d", frames=2)
    (_, real, fake) = adversarial.players(video, -video, None)[0]
    assert real.shape == (4, 3, *SIZE) and torch.equal(real, -fake)  # the same frames of both
    assert net(torch.zeros(1, 3, *SIZE).double()).shape[-1] == PatchDiscriminator2d.side(32, 2)


def test_padding_does_not_tell_the_reconstruction_from_the_video():
    mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
    for discriminator in KINDS:
        adversarial = adversary(discriminator).train()
        video, recon = clips(), clips(seed=2)
        other = torch.where(mask[:, None, :, None, None], recon, 7.0)
        a = adversarial(recon, video, video.mean(), step=0, last=recon, mask=mask)[0]
        b = adversarial(other, video, video.mean(), step=0, last=recon, mask=mask)[0]
        assert torch.equal(a, b)


def test_start_warmup_and_every():
    adversarial = adversary(start=3, warmup=4, every=2)
    video = clips()
    reports = [adversarial(video * 0.9, video, video.mean(), step=s, last=video)[1] for s in range(12)]
    assert [s for s, r in enumerate(reports) if "discriminator" in r] == [3, 5, 7, 9, 11]
    assert [s for s, r in enumerate(reports) if "adversarial" in r] == list(range(7, 12))
    assert adversarial(video, video, video.mean(), step=2, last=video) == (0, {})


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    adversarial, model, video = adversary(adaptive=True), Generator().double(), clips()
    recon = model(video)
    rest = 3 * (recon - video).square().mean()
    _, report = adversarial(recon, video, rest, step=0, last=model.last.weight)
    of_rest = torch.autograd.grad(rest, model.last.weight, retain_graph=True)[0].norm()
    game = -adversarial.discriminator(recon).mean()
    of_game = torch.autograd.grad(game, model.last.weight)[0].norm()
    assert report["adversarial_weight"].item() == pytest.approx(0.3 * (of_rest / (of_game + 1e-4)).item(), rel=1e-5)
    with torch.no_grad():  # validation: nothing to differentiate
        _, report = adversarial(model(video), video, rest, step=0, last=model.last.weight)
    assert report["adversarial_weight"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("discriminator", KINDS)
def test_the_gradient_penalty_is_its_definition_and_can_be_learned_from(discriminator):
    adversarial = adversary(discriminator, r1=2.0, r1_every=4, lecam=0.0)
    video, step = clips(), 1e-5
    penalty = 0.0
    for net in nets(adversarial):  # by finite differences along the gradient
        real = seen(net, video).clone().requires_grad_(True)
        score = net(real).flatten(1).mean(1).sum()
        direction = torch.autograd.grad(score, real)[0].detach()
        norm = direction.norm()
        with torch.no_grad():
            ahead, back = (net(real + s * direction / norm).flatten(1).mean(1).sum() for s in (step, -step))
        assert ((ahead - back) / (2 * step)).item() == pytest.approx(norm.item(), rel=1e-4)
        penalty += (norm.square() / len(real)).item() / len(nets(adversarial))
    with_penalty, report = adversarial(video, video, video.mean(), step=4, last=video)
    without, other = adversarial(video, video, video.mean(), step=5, last=video)
    assert report["r1"].item() == pytest.approx(penalty, rel=1e-5) and "r1" not in other
    assert (with_penalty - without).item() == pytest.approx(0.5 * 2.0 * 4 * penalty, rel=1e-5)
    (with_penalty - without).backward()
    assert any(g.abs().sum() > 0 for g in gradients(adversarial).values())


def test_wasserstein_needs_a_bound_and_then_plays():
    adversarial = adversary(kind="wgan", r1=1.0)
    video = clips()
    _, report = adversarial(video * 0.5, video, video.mean(), step=1, last=video)
    assert report["discriminator"].item() == pytest.approx((report["logits_fake"] - report["logits_real"]).item())


def test_averages_are_float32_buffers_that_move_under_bfloat16():
    adversarial = adversary(lecam=0.1).float().train()
    adversarial.discriminator.bfloat16()
    video = clips().bfloat16()
    before = []
    for step in range(3):
        adversarial(video * 0.5, video, video.float().mean(), step=step, last=video)
        before.append(adversarial.real_average.item())
    assert adversarial.real_average.dtype == torch.float32 and len(set(before)) == 3
    assert "real_average" in adversarial.state_dict() and adversary("both").real_average.shape == (2,)
    adversarial.eval()
    adversarial(video * 0.5, video, video.float().mean(), step=3, last=video)
    assert adversarial.real_average.item() == before[-1]  # validation moves nothing


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(kind="hinges"), "objective.adversarial.kind='hinges'.*hinge, nonsaturating, wgan"),
        (dict(discriminator="conv4d"), "discriminator='conv4d'.*conv3d, conv2d, both, stylegan, transformer"),
        (dict(generator="hinge"), "generator='hinge'.*linear or nonsaturating"),
        (dict(kind="wgan"), "kind=wgan has no bound.*r1 or lecam"),
        (dict(smoothing=0.1), "smoothing=0.1 has no effect without kind=nonsaturating"),
        (dict(lecam_decay=0.9), "lecam_decay=0.9 has no effect without lecam above 0"),
        (dict(r1_every=1), "r1_every=1 has no effect without r1"),
        (dict(frames=1), "frames=1 has no effect without discriminator=conv2d or both or stylegan"),
        (dict(discriminator="stylegan", depth=2), "depth=2 has no effect without another discriminator than stylegan"),
        (dict(patch=[1, 8, 8]), "patch=.*without discriminator=transformer"),
        (dict(discriminator="transformer", patch=[8, 8]), "three sizes"),
        (dict(every=0), "every=0 must be 1"),
        (dict(lecam=-1.0), "lecam=-1.0 must be 0"),
        (dict(discriminator="conv2d", depth=4), "depth=4.*32x32; choose at most 3"),
        (dict(discriminator="transformer", patch=[4, 64, 64]), "patch=.*does not fit"),
    ],
)
def test_adversarial_settings_that_cannot_be_honoured_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Adversarial(AdversarialConfig(weight=1.0, width=8, **settings), channels=3, frames=5, size=SIZE)


def test_images_too_small_for_frames_name_another_discriminator():
    with pytest.raises(ValueError, match="4x4; choose discriminator=conv3d"):
        adversary("conv2d", size=(4, 4), depth=1)
    with pytest.raises(ValueError, match="frames of 7x32 are too small; choose discriminator=conv3d"):
        adversary("stylegan", size=(7, 32))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import outside.tiny, test_train, torch
from pathlib import Path
from torch import nn
from vtok.losses import Adversarial, AdversarialConfig
from vtok.train import train
from vtok.types import Loss
torch.set_num_threads(1)
game = dict(weight=0.5, discriminator="both", lecam=0.01, feature_matching=1.0, width=8, depth=1, adaptive=True)

class Objective(nn.Module):
    Config = outside.tiny.Objective.Config
    def __init__(self, config, model_config, *, load=None):
        super().__init__()
        self.adversarial = Adversarial(AdversarialConfig(**game), channels=3, frames=4, size=(16, 16))
    def idle(self, step):
        return () if self.adversarial.discriminates(step) else ("adversarial",)
    def forward(self, model, clip, step):
        video = model.expand(model.quantize(clip))
        rest = (video - clip.video).abs().mean()
        term, report = self.adversarial(video, clip.video, rest, step=step, last=model.outward.weight)
        return Loss(rest + term, report)

outside.tiny.Objective = Objective
for chosen in ("auto", "deepspeed_3", "r1"):
    trainer = {{"strategy": "auto" if chosen == "auto" else "deepspeed_3", "max_steps": 4, "log_every": 1}}
    if chosen == "r1":
        game["r1"] = 1.0
    if chosen != "auto":  # below these sizes parameters stay whole, and nothing of ZeRO-3 would be tested
        whole = {{"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
        trainer["deepspeed"] = {{"zero_optimization": whole}}
    train(test_train.settings(Path(sys.argv[1]), name=chosen, trainer=trainer), data=test_train.Data())
"""


@pytest.mark.slow
def test_zero_3_plays_the_same_game_and_refuses_a_gradient_penalty(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path)
    assert re.search("r1=1.0 needs whole parameters.*deepspeed_2 or ddp", done.stderr), done.stderr[-3000:]
    rows = [test_train.metrics(tmp_path / name) for name in ("auto", "deepspeed_3")]
    for key in ("loss", "adversarial_weight", "lecam", "feature_matching", "logits_real", "grad_norm"):
        values = [[row[f"train/{key}"] for row in lines if f"train/{key}" in row] for lines in rows]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), key
    states = [strategy.consolidate(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("auto", "deepspeed_3")]
    average = "objective.adversarial.real_average"
    assert states[1][average].shape == (2,) and states[1][average].abs().sum() > 0
    assert torch.allclose(states[0][average], states[1][average], atol=1e-5)


def test_features_end_in_the_logits():
    video = clips().float()
    frames = video.transpose(1, 2).flatten(0, 1)
    of_frames = StyleGANDiscriminator(width=8, size=SIZE)
    assert torch.equal(of_frames.features(frames)[-1], of_frames(frames)) and len(of_frames.features(frames)) == 4
    nets = PatchDiscriminator3d(width=8), TransformerDiscriminator(channels=3, frames=5, size=SIZE, width=16, depth=2)
    for net in nets:
        features = net.features(video)
        assert torch.equal(features[-1], net(video)) and len(features) == {True: 5, False: 3}[net is nets[0]]


# pixels


def test_drawn_frames_are_real_different_and_anew():
    like = torch.empty(3, 1, 6, 1, 1)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4], [1]])
    torch.manual_seed(0)
    draws = {}
    for _ in range(200):
        clip, frame = draw_frames(like, count=2, mask=mask)
        assert clip.tolist() == [0, 0, 1, 1, 2] and mask[clip, frame].all()
        assert len(set(zip(clip.tolist(), frame.tolist()))) == 5
        for place in zip(clip.tolist(), frame.tolist()):
            draws[place] = draws.get(place, 0) + 1
    assert set(draws) == set(itertools.product([0], range(6))) | set(itertools.product([1], range(4))) | {(2, 0)}
    assert min(draws.values()) > 30
    clip, frame = draw_frames(like, mask=mask)
    assert torch.equal(torch.stack([clip, frame], 1), mask.nonzero())
    assert draw_frames(like, count=9)[0].shape == (18,)


def test_perceptual_distance_of_random_frames_has_the_mean_of_all():
    class Net(nn.Module):
        seen: list[int] = []

        def forward(self, x, y):
            self.seen.append(len(x))
            return (x - y).abs().mean((1, 2, 3))

    net, a, b = Net(), clips(frames=5), clips(frames=5, seed=3)
    torch.manual_seed(0)
    whole = losses.perceptual(net, a, b)
    some = torch.stack([losses.perceptual(net, a, b, frames=1) for _ in range(400)]).mean()
    assert whole.item() == pytest.approx((a - b).abs().mean().item()) and set(net.seen) == {10, 2}
    assert some.item() == pytest.approx(whole.item(), rel=2e-3)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    b[1, :, 2:] = torch.nan
    assert torch.isfinite(losses.perceptual(net, a, b, mask=mask, frames=3))


def test_a_learned_variance_settles_at_the_logarithm_of_the_error():
    for values in (1, 100):
        module = LogVariance(values=values)
        optimizer = torch.optim.SGD(module.parameters(), 0.5 / values)
        distance = torch.tensor(0.03)
        for _ in range(200):
            loss, report = module(distance)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert report["logvar"].item() == pytest.approx(math.log(0.03), abs=1e-3)
        assert loss.item() == pytest.approx(values * (1 + math.log(0.03)), rel=1e-3)
    start, _ = LogVariance()(torch.tensor(0.7, dtype=torch.float64))
    assert start.item() == pytest.approx(0.7) and start.dtype == torch.float64
    with pytest.raises(ValueError, match="values=0"):
        LogVariance(values=0)


# ids


def test_counts_of_ids_add_up_codebook_after_codebook():
    ids = torch.tensor([[[0, 3], [1, 3]], [[2, 3], [2, 0]]])
    counts = codebook_report(ids, (4, 8))["codebook_counts"]
    assert counts.tolist() == [1, 1, 2, 0, 1, 0, 0, 3, 0, 0, 0, 0]
    mask = torch.tensor([[True, True], [True, False]])
    assert codebook_report(ids, (4, 8), mask=mask)["codebook_counts"].tolist() == [1, 1, 1, 0, 0, 0, 0, 3, 0, 0, 0, 0]
    assert codebook_report(None, ()) == {}


def test_codebooks_beyond_the_bins_share_them():
    assert bins_of((1 << 18, 1 << 18)) == (1 << 18, 1 << 18)
    sizes = (1 << 24, 1 << 10)
    assert bins_of(sizes) == (MOST_BINS // 2, 1 << 10)
    ids = torch.tensor([[(1 << 24) - 1, 5], [MOST_BINS // 2 + 7, 5], [7, 6]])
    counts = codebook_report(ids, sizes)["codebook_counts"]
    assert len(counts) == MOST_BINS // 2 + 1024 and counts[7] == 2 and counts[MOST_BINS // 2 + 5] == 2
    assert counts.sum() == 6
