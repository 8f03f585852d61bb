"""What only the flexible family has; the laws it shares with every family are in test_contract.py."""

from __future__ import annotations

import pytest
import torch
from test_contract import FAMILIES, build_model, clip, video
from torch import nn

from vtok import losses
from vtok.budget import nested_keep
from vtok.families.flexible import Config, Model, Objective, ObjectiveConfig
from vtok.layers.perceptual import file_sha256, load_perceptual
from vtok.quantize import QuantizerConfig

SMALL, FORMS = FAMILIES["flexible"]


def build(form: str) -> Model:
    model, _ = build_model("flexible", form)
    return model


@torch.no_grad()
def test_causal_last_registers_do_not_see_later_ones():
    model = build("causal_last")
    tokens = model.encode(clip(video(1, 8)))
    model.registers[5:] += 1.0
    other = model.encode(clip(video(1, 8)))
    assert torch.equal(tokens.embeddings[:, :5], other.embeddings[:, :5])
    assert not torch.equal(tokens.embeddings[:, 5:], other.embeddings[:, 5:])


@pytest.mark.parametrize("form", sorted(FORMS))
@torch.no_grad()
def test_dropped_tokens_do_not_reach_the_pixels(form):
    model = build(form)
    tokens = model.encode(clip(video(1, 8)))
    short = tokens.truncate(model.config.blocks * 2)
    poisoned = tokens.embeddings.clone()
    poisoned[tokens.rank >= 2] = 7.0
    other = type(tokens)(**{**vars(tokens), "embeddings": poisoned}).truncate(model.config.blocks * 2)
    assert torch.equal(model.decode(short, size=(16, 16)), model.decode(other, size=(16, 16)))


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


def test_log_l2_follows_the_mean_of_per_clip_psnr_and_unknown_losses_are_named():
    a, b = video(3, 4, seed=1), video(3, 4, seed=2)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    found = losses.reconstruction(a, b, kind="log_l2", mask=mask)
    lengths = mask.sum(1).tolist()
    by_hand = [(a[i, :, :n] - b[i, :, :n]).square().mean().log() for i, n in enumerate(lengths)]
    assert torch.allclose(found, torch.stack(by_hand).mean())
    with pytest.raises(ValueError, match="l1, l2 or log_l2"):
        losses.reconstruction(a, b, kind="L1")


def test_convnext_distance_equals_torchvisions(tmp_path):
    """The same state dict gives the logits of torchvision's model; their squared difference is the distance."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    with torch.device("meta"):
        reference = models.convnext_small().eval()
    reference.to_empty(device="cpu")
    with torch.no_grad():  # fresh blocks hardly count (layer_scale 1e-6): these do
        for parameter in reference.parameters():
            parameter.uniform_(-1, 1).mul_((3 / parameter[0].numel()) ** 0.5 if parameter.ndim in (2, 4) else 1)
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    net = load_perceptual("convnext_s", tmp_path / "w.pth", sha256=file_sha256(tmp_path / "w.pth"), side=64)
    assert not any(p.requires_grad for p in net.parameters()) and not net.train().training
    x, y = (torch.rand(2, 3, 48, 40) * 2 - 1 for _ in range(2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def logits(image):
        image = nn.functional.interpolate((image + 1) / 2, size=(64, 64), mode="bilinear", antialias=True)
        return reference((image - mean) / std)

    with torch.no_grad():
        wanted = (logits(x) - logits(y)).square().mean(1)
    x.requires_grad_(True)
    got = net(x, y)
    assert got.shape == (2,) and wanted.min() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0)
    got.sum().backward()
    assert x.grad.abs().sum() > 0 and float(net(y, y).max()) == 0


def test_perceptual_weights_that_do_not_fit(tmp_path):
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit torchvision's convnext_small"):
        load_perceptual("convnext_s", tmp_path / "w.pth")
    with pytest.raises(ValueError, match="these are other weights"):
        load_perceptual("convnext_s", tmp_path / "w.pth", sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="no ConvNeXt-S weights"):
        load_perceptual("convnext_s", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="perceptual_net='vgg' is unknown; choose lpips or convnext_s"):
        load_perceptual("vgg", tmp_path / "w.pth")
    with pytest.raises(ValueError, match="side=16"):
        load_perceptual("convnext_s", tmp_path / "w.pth", side=16)
    with pytest.raises(ValueError, match="a file of convnext_s weights"):
        Objective(ObjectiveConfig(perceptual=0.1, perceptual_net="convnext_s"), Config(**SMALL, **FORMS["full"]))
