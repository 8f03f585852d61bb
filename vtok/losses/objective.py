"""What objectives of families that return to pixels share: the distance of a reconstruction, and its opponent."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from vtok.layers.perceptual import load_perceptual
from vtok.losses.adversarial import Adversarial, AdversarialConfig
from vtok.losses.pixels import LogVariance, gram, perceptual, reconstruction


@dataclass(kw_only=True)
class PixelConfig:
    l1: float = 1.0
    l2: float = 0.0
    log_l2: float = 0.0  # mean over clips of log(mean squared error): PSNR's own average
    perceptual: float = 0.0  # weight of a perceptual distance per frame
    perceptual_net: str = "lpips"  # lpips | convnext_s (logits of a classifier; TiTok)
    perceptual_weights: str = ""  # path of that network's weights
    perceptual_sha256: str = ""
    perceptual_side: int = 224  # convnext_s: pixels a side at which it sees frames
    perceptual_frames: int = 0  # random frames of each clip and step that it sees; 0 = all
    gram: float = 0.0  # weight of a distance of Gram matrices of that network's features (lpips alone; Cosmos)
    log_variance: str = "none"  # none | mean | sum (over a clip's values, VidTok): learned, divides the distances above
    quantizer: float = 1.0  # weight of the quantizer's own loss: commitment, entropy, KL
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)


class PixelObjective(nn.Module):
    """Base of an objective: `distance` and `adversarial` of a reconstruction, in one backward.

    Args:
        channels, frames, size: of training clips. distances: a perceptual network is needed whatever the weight.
    Raises: ValueError for settings that are unknown or contradict each other.
    """

    def __init__(
        self, config: PixelConfig, *, channels: int, frames: int, size: tuple[int, int], distances: bool = False
    ):
        super().__init__()
        self.config = c = config
        self.perceptual = self.log_variance = self.adversarial = None
        for key, value in (("perceptual", c.perceptual), ("gram", c.gram)):
            if value < 0:
                raise ValueError(f"objective.{key}={value} must be 0 or above")
        if c.gram and c.perceptual_net != "lpips":
            raise ValueError(f"objective.gram={c.gram} reads features of perceptual_net=lpips, not {c.perceptual_net}")
        if c.perceptual or c.gram or distances:
            if not c.perceptual_weights:
                raise ValueError(
                    f"objective.perceptual={c.perceptual}, gram={c.gram}{', scorer_metric=lpips' * distances}: needs "
                    f"objective.perceptual_weights, a file of {c.perceptual_net} weights (see docs/formats.md)"
                )
            if channels != 3:
                raise ValueError(
                    f"objective.perceptual={c.perceptual}, gram={c.gram} compare RGB frames: set both to 0 where "
                    f"model.channels={channels}"
                )
            self.perceptual = load_perceptual(
                c.perceptual_net, c.perceptual_weights, sha256=c.perceptual_sha256, side=c.perceptual_side
            )
        if c.log_variance not in ("none", "mean", "sum"):
            raise ValueError(f"objective.log_variance={c.log_variance!r} is unknown; choose none, mean or sum")
        if c.log_variance != "none":
            values = channels * frames * size[0] * size[1]
            self.log_variance = LogVariance(values=values if c.log_variance == "sum" else 1)
        if c.adversarial.weight:
            self.adversarial = Adversarial(c.adversarial, channels=channels, frames=frames, size=size)

    def idle(self, step: int) -> tuple[str, ...]:
        """Parameter prefixes that rest at this step: learning rate 0, or weight decay would still move them."""
        resting = self.adversarial is not None and not self.adversarial.discriminates(step)
        return ("adversarial",) if resting else ()

    def pixels(
        self, recon: Tensor, video: Tensor, *, mask: Tensor | None, step: int, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted distances of [B, C, T, H, W] plus the adversarial terms, and what to log of them.

        mask: [B, T] bool, real frames; None = all. last: weight of the decoder's output layer.
        """
        c, recon = self.config, recon.float()
        terms = {kind: reconstruction(recon, video, kind=kind, mask=mask) for kind in ("l1", "l2", "log_l2")}
        total = c.l1 * terms["l1"] + c.l2 * terms["l2"] + c.log_l2 * terms["log_l2"]
        if self.perceptual is not None and c.perceptual:
            terms["perceptual"] = perceptual(self.perceptual, recon, video, mask=mask, frames=c.perceptual_frames)
            total = total + c.perceptual * terms["perceptual"]
        if self.perceptual is not None and c.gram:
            terms["gram"] = gram(self.perceptual, recon, video, mask=mask, frames=c.perceptual_frames)
            total = total + c.gram * terms["gram"]
        if self.log_variance is not None:
            total, told = self.log_variance(total)
            terms |= told
        if self.adversarial is not None:
            term, told = self.adversarial(recon, video, total, step=step, last=last, mask=mask)
            total = total + term
            terms |= told
        return total, {name: term.detach() for name, term in terms.items()}
