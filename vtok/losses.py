"""Losses as plain functions. Videos are [B, C, T, H, W] in [-1, 1]; results are scalars unless stated."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.discriminator import PatchDiscriminator3d, TransformerDiscriminator


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """[B, T] bool: True on real frames."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def reconstruction(recon: Tensor, target: Tensor, *, kind: str, mask: Tensor | None = None) -> Tensor:
    """Error over the real frames (mask [B, T] bool, None = all): mean absolute (`l1`), mean squared (`l2`), or the mean
    over clips of the logarithm of each clip's mean squared error (`log_l2`): what a mean of per-clip PSNR measures."""
    if kind not in ("l1", "l2", "log_l2"):
        raise ValueError(f"kind={kind!r} is no reconstruction loss; choose l1, l2 or log_l2")
    error = (recon - target).abs() if kind == "l1" else (recon - target).square()
    per_frame = error.mean((1, 3, 4))  # [B, T]
    if mask is None:
        mask = torch.ones_like(per_frame, dtype=torch.bool)
    if kind == "log_l2":
        per_clip = (per_frame * mask).sum(1) / mask.sum(1)
        return per_clip.clamp_min(1e-6).log().mean()
    return (per_frame * mask).sum() / mask.sum()


def perceptual(net: torch.nn.Module, recon: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean over real frames of a per-frame perceptual distance; net takes two [N, 3, H, W] and returns [N]."""
    x, y = (video.transpose(1, 2).flatten(0, 1) for video in (recon, target))
    if mask is not None:
        x, y = x[mask.flatten()], y[mask.flatten()]
    return net(x, y).mean()


def generator_adversarial(fake: Tensor) -> Tensor:
    """-E[D(fake)]: the generator's side of both the hinge and the linear non-saturating form."""
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


def lecam(real: Tensor, fake: Tensor, *, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, https://arxiv.org/abs/2104.03310): real logits are held near the
    running average of fake ones and the other way round. The averages are buffers of the caller."""
    return (real - fake_average).square().mean() + (fake - real_average).square().mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, wrt: Tensor, *, limit: float = 1e4) -> Tensor:
    """||d loss / d wrt|| / ||d adversarial / d wrt||, detached and at most `limit` (VQGAN, Esser et al. 2021,
    https://arxiv.org/abs/2012.09841, eq. 7). `wrt` is the last decoder weight, or the reconstruction itself."""
    of_loss = torch.autograd.grad(loss, wrt, retain_graph=True)[0]
    of_adversarial = torch.autograd.grad(adversarial, wrt, retain_graph=True)[0]
    return (of_loss.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, limit).detach()


@dataclass
class AdversarialConfig:
    weight: float = 0.0  # of the generator's term; 0 = no discriminator
    kind: str = "hinge"  # hinge | nonsaturating
    start: int = 0  # first step with the adversarial terms
    every: int = 1  # the discriminator learns on every n-th step only (LARP: 5)
    adaptive: bool = False  # scale the generator's term by the ratio of gradients at the decoder's output layer
    smoothing: float = 0.0  # nonsaturating: real labels are 1 - smoothing
    lecam: float = 0.0  # weight of the LeCam regulariser
    lecam_decay: float = 0.999  # of its averages
    discriminator: str = "conv3d"  # conv3d | transformer
    width: int = 64
    depth: int = 3
    num_heads: int = 8  # transformer only
    patch: list[int] = field(default_factory=lambda: [4, 8, 8])  # transformer only


class Adversarial(nn.Module):
    """Discriminator, its losses and LeCam averages: both players in ONE backward pass.

    The discriminator's parameters are switched off while the generator's term is computed and on again for its own term
    on the detached reconstruction, so that the gradients of the sum are those of two separate passes; one optimizer
    with a parameter group for each then does what two would (and DeepSpeed takes only one).
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(self, config: AdversarialConfig, *, channels: int, frames: int, size: tuple[int, int]):
        super().__init__()
        self.config = c = config
        if c.kind not in ("hinge", "nonsaturating"):
            raise ValueError(f"objective.adversarial.kind={c.kind!r} is unknown; choose hinge or nonsaturating")
        if c.discriminator == "conv3d":
            self.discriminator = PatchDiscriminator3d(channels=channels, width=c.width, num_layers=c.depth)
        elif c.discriminator == "transformer":
            self.discriminator = TransformerDiscriminator(
                channels=channels,
                frames=frames,
                size=size,
                patch=(c.patch[0], c.patch[1], c.patch[2]),
                width=c.width,
                depth=c.depth,
                num_heads=c.num_heads,
            )
        else:
            raise ValueError(f"objective.adversarial.discriminator={c.discriminator!r}; choose conv3d or transformer")
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def discriminates(self, step: int) -> bool:
        """Whether the discriminator learns at this step; its learning rate must be 0 otherwise."""
        return step >= self.config.start and (step - self.config.start) % self.config.every == 0

    def forward(
        self, recon: Tensor, video: Tensor, loss: Tensor, *, step: int, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted generator term plus the discriminator's own, and a report.

        loss: what the generator minimises otherwise, last: weight of its output layer (both for `adaptive`).
        """
        c, hinge = self.config, self.config.kind == "hinge"
        self.discriminator.requires_grad_(False)
        fake = self.discriminator(recon)
        adversarial = generator_adversarial(fake) if hinge else generator_nonsaturating(fake)
        self.discriminator.requires_grad_(True)
        weight = torch.as_tensor(c.weight, device=recon.device)
        if c.adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(loss, adversarial, last)
        report = {"adversarial": adversarial.detach(), "adversarial_weight": weight.detach()}
        if not self.discriminates(step):
            return weight * adversarial, report
        real_logits, fake_logits = self.discriminator(video), self.discriminator(recon.detach())
        if hinge:
            own = discriminator_hinge(real_logits, fake_logits)
        else:
            own = discriminator_nonsaturating(real_logits, fake_logits, smoothing=c.smoothing)
        report |= {
            "discriminator": own.detach(),
            "logits_real": real_logits.detach().mean(),
            "logits_fake": fake_logits.detach().mean(),
        }
        if c.lecam:
            if self.training:
                self.real_average.lerp_(report["logits_real"].float(), 1 - c.lecam_decay)
                self.fake_average.lerp_(report["logits_fake"].float(), 1 - c.lecam_decay)
            term = lecam(real_logits, fake_logits, real_average=self.real_average, fake_average=self.fake_average)
            own = own + c.lecam * term
            report["lecam"] = term.detach()
        return weight * adversarial + own, report
