"""Adversarial training in one backward: losses of both players as plain functions, and the module that joins them.

    video --D--> real logits, features --------------+--> D's own loss (+ LeCam, R1)
    recon.detach() --D--> fake logits ---------------+
    recon --D at rest--> fake logits, features --> the generator's term (+ feature matching)

Letters: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtok.layers.discriminator import PatchDiscriminator2d, PatchDiscriminator3d, TransformerDiscriminator
from vtok.layers.stylegan import StyleGANDiscriminator
from vtok.losses.pixels import draw_frames


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def generator_adversarial(fake: Tensor) -> Tensor:
    """-E[D(fake)]: the generator's side of the hinge and the Wasserstein game (linear)."""
    return -fake.mean()


def generator_nonsaturating(fake: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of fake logits against "real" (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661, 3)."""
    return F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, 1 - smoothing))


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(E[relu(1 - D(real))] + E[relu(1 + D(fake))]) / 2 (Lim and Ye 2017, https://arxiv.org/abs/1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def discriminator_nonsaturating(real: Tensor, fake: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy, real labels lowered to 1 - smoothing (one-sided, Salimans et al. 2016,
    https://arxiv.org/abs/1606.03498, 3.4)."""
    ones = torch.full_like(real, 1 - smoothing)
    zeros = torch.zeros_like(fake)
    return 0.5 * (F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros))


def discriminator_wgan(real: Tensor, fake: Tensor) -> Tensor:
    """E[D(fake)] - E[D(real)] (Arjovsky et al. 2017, https://arxiv.org/abs/1701.07875). Without bound by itself: it
    wants a gradient penalty or LeCam beside it."""
    return fake.mean() - real.mean()


def lecam(real: Tensor, fake: Tensor, *, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, https://arxiv.org/abs/2104.03310): real logits are held near the
    running average of fake ones and the other way round. The averages are buffers of the caller."""
    return (real - fake_average).square().mean() + (fake - real_average).square().mean()


def feature_matching(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """4 times the mean over layers of the mean absolute difference of a discriminator's features.

    pix2pixHD (Wang et al. 2018, https://arxiv.org/abs/1711.11585) sums over layers; its code, and OmniTokenizer's after
    it, scales by 4 / number of layers. So here: published weights carry over. `real` gets no gradient.
    """
    return 4 * torch.stack([(_wide(a) - _wide(b.detach())).abs().mean() for a, b in zip(fake, real)]).mean()


def gradient_penalty(net: nn.Module, real: Tensor) -> Tensor:
    """R1: mean over samples of ||d D(x) / d x||^2 at real samples x, D(x) being the mean of a sample's logits
    (Mescheder et al. 2018, https://arxiv.org/abs/1801.04406). Costs a second backward, in memory and in time.
    """
    real = real.detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        scores = net(real).flatten(1).mean(1)
    gradient = torch.autograd.grad(scores.sum(), real, create_graph=True)[0]
    return _wide(gradient).square().flatten(1).sum(1).mean()


def over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, detached; itself where there is one."""
    value = value.detach()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def adaptive_weight(loss: Tensor, adversarial: Tensor, wrt: Tensor, *, limit: float = 1e4) -> Tensor:
    """||d loss / d wrt|| / ||d adversarial / d wrt||, detached and at most `limit` (VQGAN, Esser et al. 2021,
    https://arxiv.org/abs/2012.09841, eq. 7).

    wrt: the weight of the decoder's last layer, also one that ZeRO-3 shards (its gradient is whole). With several
    processes the gradients are averaged first: the weight is that of one process with the whole batch, and the same
    everywhere. All ranks must call it in the same steps.
    """
    gradients = [torch.autograd.grad(term, wrt, retain_graph=True)[0] for term in (loss, adversarial)]
    of_loss, of_adversarial = over_ranks(torch.stack([_wide(g.flatten()) for g in gradients])).norm(dim=1)
    return (of_loss / (of_adversarial + 1e-4)).clamp(0, limit).detach()


DISCRIMINATORS = ("conv3d", "conv2d", "both", "stylegan", "transformer")
OF_FRAMES = (PatchDiscriminator2d, StyleGANDiscriminator)  # see images, not videos
KINDS = ("hinge", "nonsaturating", "wgan")


@dataclass
class AdversarialConfig:
    weight: float = 0.0  # of the generator's term; 0 = no discriminator
    kind: str = "hinge"  # hinge | nonsaturating | wgan
    generator: str = ""  # linear | nonsaturating; "" = linear, or nonsaturating where the discriminator is
    start: int = 0  # first step with the adversarial terms
    warmup: int = 0  # steps from `start` in which the discriminator learns alone
    every: int = 1  # the discriminator learns on every n-th step only (LARP: 5)
    adaptive: bool = False  # scale the generator's term by the ratio of gradients at the decoder's output layer
    smoothing: float = 0.0  # nonsaturating: real labels are 1 - smoothing
    feature_matching: float = 0.0  # weight of the generator's feature matching (OmniTokenizer: 4)
    lecam: float = 0.0  # weight of the LeCam regulariser
    lecam_decay: float = 0.999  # of its averages
    r1: float = 0.0  # weight of the gradient penalty at real clips
    r1_every: int = 16  # steps between penalties, each of them so much heavier
    discriminator: str = (
        "conv3d"  # conv3d | conv2d, stylegan (StyleGAN2's; both a frame at a time) | both | transformer
    )
    frames: int = 0  # conv2d, both, stylegan: random frames of each clip and step that it sees; 0 = all
    width: int = 64
    depth: int = 3  # not of stylegan, which halves frames down to 4 x 4
    num_heads: int = 8  # transformer only
    patch: list[int] = field(default_factory=lambda: [4, 8, 8])  # transformer only


def check(config: AdversarialConfig) -> None:
    """Raises ValueError, naming key, value and fix, for settings that are unknown or would have no effect."""
    c, where = config, "objective.adversarial"
    for key, choices in (("kind", KINDS), ("discriminator", DISCRIMINATORS)):
        if getattr(c, key) not in choices:
            raise ValueError(f"{where}.{key}={getattr(c, key)!r} is unknown; choose one of {', '.join(choices)}")
    if c.generator not in ("", "linear", "nonsaturating"):
        raise ValueError(f"{where}.generator={c.generator!r} is unknown; choose linear or nonsaturating, or leave it")
    for key in ("weight", "start", "warmup", "feature_matching", "lecam", "r1", "frames"):
        if getattr(c, key) < 0:
            raise ValueError(f"{where}.{key}={getattr(c, key)} must be 0 or above")
    for key in ("every", "r1_every", "width", "depth"):
        if getattr(c, key) < 1:
            raise ValueError(f"{where}.{key}={getattr(c, key)} must be 1 or above")
    if not 0 <= c.smoothing < 1 or not 0 <= c.lecam_decay < 1:
        raise ValueError(f"{where}: smoothing={c.smoothing} and lecam_decay={c.lecam_decay} must lie in [0, 1)")
    if len(c.patch) != 3 or min(c.patch) < 1:
        raise ValueError(f"{where}.patch={c.patch} must be three sizes: frames, height, width")
    if c.kind == "wgan" and not (c.r1 or c.lecam):
        raise ValueError(f"{where}.kind=wgan has no bound of its own: set r1 or lecam above 0, or choose hinge")
    default = AdversarialConfig()
    idle = {
        "smoothing": (c.kind == "nonsaturating", "kind=nonsaturating"),
        "lecam_decay": (c.lecam > 0, "lecam above 0"),
        "r1_every": (c.r1 > 0, "r1 above 0"),
        "frames": (c.discriminator in ("conv2d", "both", "stylegan"), "discriminator=conv2d or both or stylegan"),
        "depth": (c.discriminator != "stylegan", "another discriminator than stylegan"),
        "patch": (c.discriminator == "transformer", "discriminator=transformer"),
    }
    for key, (used, need) in idle.items():
        if not used and getattr(c, key) != getattr(default, key):
            raise ValueError(
                f"{where}.{key}={getattr(c, key)} has no effect without {need}; remove the key or set that"
            )


class Adversarial(nn.Module):
    """Discriminator, its losses and LeCam averages: both players in ONE backward pass.

    The discriminator's parameters are switched off while the generator's term is computed and on again for its own term
    on the detached reconstruction, so that the gradients of the sum are those of two separate passes; one optimizer
    with a parameter group for each then does what two would (and DeepSpeed takes only one).

    With discriminator=both every term is the mean of the two discriminators', so that weights mean the same.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(self, config: AdversarialConfig, *, channels: int, frames: int, size: tuple[int, int]):
        super().__init__()
        check(config)
        self.config = c = config
        nets: dict[str, nn.Module] = {}
        if c.discriminator in ("conv3d", "both"):
            nets["conv3d"] = PatchDiscriminator3d(channels=channels, width=c.width, num_layers=c.depth)
        if c.discriminator in ("conv2d", "both"):
            nets["conv2d"] = PatchDiscriminator2d(channels=channels, width=c.width, num_layers=c.depth, size=size)
        if c.discriminator == "stylegan":
            nets["stylegan"] = StyleGANDiscriminator(channels=channels, width=c.width, size=size)
        if c.discriminator == "transformer":
            nets["transformer"] = TransformerDiscriminator(
                channels=channels,
                frames=frames,
                size=size,
                patch=(c.patch[0], c.patch[1], c.patch[2]),
                width=c.width,
                depth=c.depth,
                num_heads=c.num_heads,
            )
        self.discriminator = nn.ModuleDict(nets) if len(nets) > 1 else next(iter(nets.values()))
        shape = (len(nets),) if len(nets) > 1 else ()
        self.register_buffer("real_average", torch.zeros(shape))
        self.register_buffer("fake_average", torch.zeros(shape))

    def discriminates(self, step: int) -> bool:
        """Whether the discriminator learns at this step; its learning rate must be 0 otherwise.

        Raises: ValueError for r1 where parameters are sharded (ZeRO-3), at the first step and not once it is due: the
            second derivative needs them whole.
        """
        if self.config.r1 and hasattr(next(self.discriminator.parameters()), "ds_status"):
            raise ValueError(
                f"objective.adversarial.r1={self.config.r1} needs whole parameters, which trainer.strategy=deepspeed_3 "
                "does not keep; choose deepspeed_2 or ddp, or r1=0 with lecam"
            )
        return step >= self.config.start and (step - self.config.start) % self.config.every == 0

    def generates(self, step: int) -> bool:
        """Whether the generator has its adversarial term at this step."""
        return step >= self.config.start + self.config.warmup

    def players(self, video: Tensor, recon: Tensor, mask: Tensor | None) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """(discriminator, what it sees of the video, what of the reconstruction); images for those of frames."""
        nets = list(self.discriminator.values()) if isinstance(self.discriminator, nn.ModuleDict) else []
        out = []
        for net in nets or [self.discriminator]:
            if isinstance(net, OF_FRAMES):
                clip, frame = draw_frames(video, count=self.config.frames, mask=mask)
                out.append((net, video[clip, :, frame], recon[clip, :, frame]))
            elif mask is not None:  # padding must not tell the reconstruction from the video
                out.append((net, video, torch.where(mask[:, None, :, None, None], recon, video)))
            else:
                out.append((net, video, recon))
        return out

    def forward(
        self, recon: Tensor, video: Tensor, loss: Tensor, *, step: int, last: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted generator term plus the discriminator's own, and a report; nothing before `start`.

        Args:
            recon, video: [B, C, T, H, W] in [-1, 1], T = 1 for images.
            loss: what the generator minimises otherwise, last: weight of its output layer (both for `adaptive`).
            mask: [B, T] bool, real frames; None = all.
        """
        c = self.config
        zero, report = recon.new_zeros(()), {}
        if step < c.start:
            return zero, report
        players = self.players(video, recon, mask)
        learns, total = self.discriminates(step), zero
        # its own view of the real clips first: feature matching compares with it
        real = [_features(net, seen, learns) for net, seen, _ in players]
        if self.generates(step):
            total, report = self._generator(players, real, loss, last)
        if learns:
            own, terms = self._discriminator(players, real, step)
            total, report = total + own, report | terms
        return total, report

    def _generator(
        self, players: list[tuple[nn.Module, Tensor, Tensor]], real: list[list[Tensor]], loss: Tensor, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        linear = (c.generator or ("nonsaturating" if c.kind == "nonsaturating" else "linear")) == "linear"
        term = generator_adversarial if linear else generator_nonsaturating
        self.discriminator.requires_grad_(False)
        fake = [_features(net, seen, True) for net, _, seen in players]
        self.discriminator.requires_grad_(True)
        adversarial = torch.stack([term(logits) for *_, logits in fake]).mean()
        weight = torch.as_tensor(c.weight, device=loss.device, dtype=loss.dtype)
        if c.adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(loss, adversarial, last)
        total = weight * adversarial
        report = {"adversarial": adversarial.detach(), "adversarial_weight": weight.detach()}
        if c.feature_matching:
            matching = torch.stack([feature_matching(f[:-1], r[:-1]) for f, r in zip(fake, real)]).mean()
            total = total + c.feature_matching * matching
            report["feature_matching"] = matching.detach()
        return total, report

    def _discriminator(
        self, players: list[tuple[nn.Module, Tensor, Tensor]], real: list[list[Tensor]], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        real_logits = [features[-1] for features in real]
        fake_logits = [_features(net, seen.detach(), True)[-1] for net, _, seen in players]
        pairs = list(zip(real_logits, fake_logits))
        if c.kind == "hinge":
            losses = [discriminator_hinge(*pair) for pair in pairs]
        elif c.kind == "wgan":
            losses = [discriminator_wgan(*pair) for pair in pairs]
        else:
            losses = [discriminator_nonsaturating(*pair, smoothing=c.smoothing) for pair in pairs]
        own = torch.stack(losses).mean()
        means = torch.stack([torch.stack([r.detach().mean(), f.detach().mean()]) for r, f in pairs])  # [players, 2]
        report = {"discriminator": own.detach(), "logits_real": means[:, 0].mean(), "logits_fake": means[:, 1].mean()}
        if c.lecam:
            if self.training:  # averaged over ranks, or each would follow (and a checkpoint keep) its own
                seen = over_ranks(means).to(self.real_average.dtype)
                self.real_average.lerp_(seen[:, 0].reshape(self.real_average.shape), 1 - c.lecam_decay)
                self.fake_average.lerp_(seen[:, 1].reshape(self.fake_average.shape), 1 - c.lecam_decay)
            averages = zip(self.real_average.reshape(-1), self.fake_average.reshape(-1))
            terms = [lecam(*pair, real_average=r, fake_average=f) for pair, (r, f) in zip(pairs, averages)]
            term = torch.stack(terms).mean()
            own = own + c.lecam * term
            report["lecam"] = term.detach()
        if c.r1 and (step - c.start) % (c.r1_every * c.every) == 0 and torch.is_grad_enabled():
            penalty = torch.stack([gradient_penalty(net, seen) for net, seen, _ in players]).mean()
            own = own + 0.5 * c.r1 * c.r1_every * penalty
            report["r1"] = penalty.detach()
        return own, report


def _features(net: nn.Module, x: Tensor, learns: bool) -> list[Tensor]:
    """The features of a discriminator, logits last and at least in float32; without a graph unless it learns."""
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        *features, logits = net.features(x)  # pyright: ignore[reportCallIssue]
    return [*features, _wide(logits)]
