"""What objectives of families that return to pixels share: the distance of a reconstruction, and its opponent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from vtok.layers.i3d import load_i3d_distance
from vtok.layers.optical_flow import load_flow
from vtok.layers.perceptual import load_perceptual
from vtok.losses.adversarial import Adversarial, AdversarialConfig
from vtok.losses.adversarial import check as check_adversarial
from vtok.losses.pixels import LogVariance, flow_distance, gram, perceptual, reconstruction, video_perceptual


@dataclass(kw_only=True)
class PixelConfig:
    l1: float = 1.0
    l2: float = 0.0
    log_l2: float = 0.0  # mean over clips of log(mean squared error): PSNR's own average
    perceptual: float = 0.0  # weight of a perceptual distance per frame
    perceptual_net: str = "lpips"  # lpips | convnext_s (logits of a classifier; TiTok) | vgg19 (L1 of features; Cosmos)
    perceptual_weights: str = ""  # path of that network's weights
    perceptual_sha256: str = ""
    perceptual_side: int = 224  # convnext_s: pixels a side at which it sees frames
    perceptual_frames: int = 0  # random frames of each clip and step that it sees; 0 = all
    gram: float = 0.0  # weight of a distance of Gram matrices of that network's features (lpips, vgg19; Cosmos)
    video_perceptual: float = 0.0  # weight of a distance of I3D's features of whole clips (C-ViViT); images have none
    video_perceptual_weights: str = ""  # path of I3D's weights
    video_perceptual_sha256: str = ""
    flow: float = 0.0  # weight of the difference of optical flows, in pixels (Cosmos); images have none
    flow_weights: str = ""  # path of RAFT's weights (torchvision's raft_large or raft_small)
    flow_sha256: str = ""
    flow_scale: float = 1.0  # RAFT sees frames at 1 / scale of their sides, but at 128 pixels at least
    flow_updates: int = 12  # of RAFT's recurrent unit: cost grows with it, as does how far flow may reach
    flow_pairs: int = 0  # random pairs of neighbouring frames of each clip and step that it sees; 0 = all
    log_variance: str = "none"  # none | mean | sum (over a clip's values, VidTok): learned, divides the distances above
    quantizer: float = 1.0  # weight of the quantizer's own loss: commitment, entropy, KL
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    # run (its last checkpoint) or checkpoint whose parts of these losses a new run begins with; "" = all begin anew
    init_from: str = ""
    init_without: list[str] = field(default_factory=list)  # those that do all the same: adversarial, log_variance


PARTS = ("adversarial", "log_variance")  # what learns beside the model


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
        self.perceptual = self.video_perceptual = self.flow = self.log_variance = self.adversarial = None
        weights = ("l1", "l2", "log_l2", "perceptual", "gram", "video_perceptual", "flow", "quantizer")
        for key in (*weights, "perceptual_frames", "flow_pairs"):
            if getattr(c, key) < 0:
                raise ValueError(f"objective.{key}={getattr(c, key)} must be 0 or above")
        if c.gram and c.perceptual_net not in ("lpips", "vgg19"):
            raise ValueError(
                f"objective.gram={c.gram} reads features of perceptual_net=lpips or vgg19, not {c.perceptual_net}"
            )
        for key, weight, path in (
            ("video_perceptual", c.video_perceptual, c.video_perceptual_weights),
            ("flow", c.flow, c.flow_weights),
        ):
            if not weight:
                continue
            if not path:
                network = "I3D" if key == "video_perceptual" else "RAFT"
                raise ValueError(
                    f"objective.{key}={weight} needs objective.{key}_weights, a file of {network} weights "
                    f"(docs/formats.md says how to make one); objective.{key}=0 trains without"
                )
            if channels != 3:
                raise ValueError(
                    f"objective.{key}={weight} sees RGB frames: set it to 0 where model.channels={channels}"
                )
            if frames < 2:
                raise ValueError(
                    f"objective.{key}={weight} compares videos: set it to 0 where data.num_frames={frames}"
                )
        if c.video_perceptual:
            self.video_perceptual = load_i3d_distance(c.video_perceptual_weights, c.video_perceptual_sha256)
        if c.flow:
            self.flow = load_flow(c.flow_weights, c.flow_sha256, scale=c.flow_scale, updates=c.flow_updates)
        if c.perceptual or c.gram or distances:
            if not c.perceptual_weights:
                asking = [f"objective.{key}=0" for key in ("perceptual", "gram") if getattr(c, key)]
                asking += ["objective.scorer_metric=mse"] * distances
                raise ValueError(
                    f"objective.perceptual={c.perceptual}, gram={c.gram}{', scorer_metric=lpips' * distances}: needs "
                    f"objective.perceptual_weights, a file of {c.perceptual_net} weights (docs/formats.md says how to "
                    f"make one); {' '.join(asking)} trains without"
                )
            if channels != 3:
                raise ValueError(
                    f"objective.perceptual={c.perceptual}, gram={c.gram} compare RGB frames: set both to 0 where "
                    f"model.channels={channels}"
                )
            self.perceptual = load_perceptual(
                c.perceptual_net, c.perceptual_weights, sha256=c.perceptual_sha256, side=c.perceptual_side
            )
        check_adversarial(c.adversarial)  # without one too: a typing error shows now, not when a later stage has one
        if c.log_variance not in ("none", "mean", "sum"):
            raise ValueError(f"objective.log_variance={c.log_variance!r} is unknown; choose none, mean or sum")
        if c.log_variance != "none":
            values = channels * frames * size[0] * size[1]
            self.log_variance = LogVariance(values=values if c.log_variance == "sum" else 1)
        if c.adversarial.weight:
            self.adversarial = Adversarial(c.adversarial, channels=channels, frames=frames, size=size)
        unknown = sorted(set(c.init_without) - set(PARTS))
        if unknown or (c.init_without and not c.init_from):
            why = f"choose from {', '.join(PARTS)}" if unknown else "has no effect without objective.init_from"
            raise ValueError(f"objective.init_without={list(c.init_without)}: {why}")

    def begin(self, load: Callable[[str], dict[str, Tensor]]) -> None:
        """Take over what the losses of `init_from` have learned: the discriminator with LeCam's averages, the learned
        variance. Moments of the optimizer begin anew. (`init_from` of the run is about the model alone: exports hold no
        losses.) For a run that begins: one that goes on has all of it in its own checkpoint.

        Args:
            load: run or checkpoint -> its whole state dict, with `objective.*`; not called without `init_from`.
        Raises: what `load` raises; ValueError for parts that are missing or of another shape there.
        """
        c = self.config
        if not c.init_from:
            return
        try:
            state = load(c.init_from)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"objective.init_from={c.init_from!r}: {error}") from error
        for part in PARTS:
            module = getattr(self, part)
            if module is None or part in c.init_without:
                continue
            prefix = f"objective.{part}."
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(found, strict=True)
            except RuntimeError as error:
                raise ValueError(
                    f"objective.init_from={c.init_from!r} does not fit objective.{part}: {error}. Give both runs the "
                    f"same settings, or let it begin anew with objective.init_without=[{part}]"
                ) from error

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
        of_clips = {
            "video_perceptual": (self.video_perceptual, video_perceptual, {}),
            "flow": (self.flow, flow_distance, {"pairs": c.flow_pairs}),
        }
        for name, (net, distance, settings) in of_clips.items():
            if net is not None:  # reported of images too, as 0: ranks report the same names
                terms[name] = distance(net, recon, video, mask=mask, **settings)
                total = total + getattr(c, name) * terms[name]
        if self.log_variance is not None:
            total, told = self.log_variance(total)
            terms |= told
        if self.adversarial is not None:
            term, told = self.adversarial(recon, video, total, step=step, last=last, mask=mask)
            total = total + term
            terms |= told
        return total, {name: term.detach() for name, term in terms.items()}
