"""Losses as plain functions. Videos are [B, C, T, H, W] in [-1, 1]; results are scalars unless stated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """[B, T] bool: True on real frames."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def reconstruction(recon: Tensor, target: Tensor, *, kind: str, mask: Tensor | None = None) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error over the real frames (mask [B, T] bool, None = all)."""
    error = (recon - target).abs() if kind == "l1" else (recon - target).square()
    if mask is None:
        return error.mean()
    per_frame = error.mean((1, 3, 4))  # [B, T]
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
    """LeCam regulariser (Tseng et al. 2021, https://arxiv.org/abs/2104.03310, eq. 7): real logits are held near the
    running average of fake ones and the other way round. The averages are buffers of the caller."""
    return (real - fake_average).square().mean() + (fake - real_average).square().mean()


def adaptive_weight(loss: Tensor, adversarial: Tensor, wrt: Tensor, *, limit: float = 1e4) -> Tensor:
    """||d loss / d wrt|| / ||d adversarial / d wrt||, detached and at most `limit` (VQGAN, Esser et al. 2021,
    https://arxiv.org/abs/2012.09841, eq. 7). `wrt` is the last decoder weight, or the reconstruction itself."""
    of_loss = torch.autograd.grad(loss, wrt, retain_graph=True)[0]
    of_adversarial = torch.autograd.grad(adversarial, wrt, retain_graph=True)[0]
    return (of_loss.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, limit).detach()
