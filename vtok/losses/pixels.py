"""How far a reconstruction is from its video. Letters: B clips, C channels, T frames, H height, W width, N images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """[B, T] bool: True on real frames."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def draw_frames(like: Tensor, *, count: int = 0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(clip [N], frame [N]) int64: `count` different random real frames of each clip of `like` [B, C, T, H, W].

    count: fewer where a clip has fewer, 0 = all of them in order. mask: [B, T] bool, real frames; None = all.
    Drawn on the CPU: the same frames on every device.
    """
    batch, frames = like.shape[0], like.shape[2]
    count = min(count or frames, frames)
    rows = torch.arange(batch, device=like.device)[:, None].expand(batch, count)
    if count == frames:
        chosen = torch.arange(frames, device=like.device).expand(batch, frames)
    else:
        order = torch.rand(batch, frames).to(like.device)
        order = order if mask is None else order.masked_fill(~mask, -1.0)
        chosen = order.topk(count, dim=1).indices.sort(dim=1).values
    if mask is None:
        return rows.flatten(), chosen.flatten()
    real = mask.gather(1, chosen)
    return rows[real], chosen[real]


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


def perceptual(net: nn.Module, recon: Tensor, target: Tensor, *, mask: Tensor | None = None, frames: int = 0) -> Tensor:
    """Mean over real frames of a per-frame perceptual distance.

    Args:
        net: takes two [N, 3, H, W] and returns [N].
        mask: [B, T] bool, real frames; None = all.
        frames: random frames of each clip to look at, drawn anew at each call (OmniTokenizer, Wang et al. 2024,
            https://arxiv.org/abs/2406.09399, looks at one); 0 looks at all. The expectation is the same for clips of
            equal length; of unequal ones each clip counts the same.
    """
    clip, frame = draw_frames(recon, count=frames, mask=mask)
    return net(recon[clip, :, frame], target[clip, :, frame]).mean()


def gram(net: nn.Module, recon: Tensor, target: Tensor, *, mask: Tensor | None = None, frames: int = 0) -> Tensor:
    """Mean over real frames of the weighted mean absolute differences of Gram matrices: products of features, averaged
    over places, which tell the texture of a frame and not where it is (Gatys et al. 2015,
    https://arxiv.org/abs/1508.06576; Cosmos, Agarwal et al. 2025, https://arxiv.org/abs/2501.03575, trains with it. Its
    post-training code squares the differences, and takes the products over all frames of a clip).

    Args:
        net: has `taps`, which takes [N, 3, H, W] to a list of features [N, C, h, w], and `tap_weights`, one a feature.
        mask, frames: as `perceptual`.
    """
    clip, frame = draw_frames(recon, count=frames, mask=mask)
    with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
        wanted = [_products(x) for x in net.taps(target[clip, :, frame])]  # pyright: ignore[reportCallIssue]
    found = [_products(x) for x in net.taps(recon[clip, :, frame])]  # pyright: ignore[reportCallIssue]
    weights: tuple[float, ...] = net.tap_weights  # pyright: ignore[reportAssignmentType]
    return torch.stack([w * (a - b).abs().mean() for w, a, b in zip(weights, found, wanted)]).sum()


def _products(features: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, C], float32 whatever autocast says."""
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().flatten(2)
        return flat @ flat.mT / flat.shape[2]


def flow_distance(
    net: nn.Module, recon: Tensor, target: Tensor, *, mask: Tensor | None = None, pairs: int = 0
) -> Tensor:
    """Mean absolute difference, in pixels, of the optical flows inside both videos, from each frame to the next and
    back (Cosmos, Agarwal et al. 2025, https://arxiv.org/abs/2501.03575).

    Args:
        net: takes two [N, 3, H, W] to the flow [N, 2, h, w] from the first to the second.
        mask: [B, T] bool, real frames (the first ones); None = all.
        pairs: random pairs of neighbouring frames of each clip to look at, drawn anew at each call; 0 looks at all.
    Returns: a scalar, 0 where there is no pair: images do not move.
    """
    later = None if mask is None else mask[:, 1:]
    clip, frame = draw_frames(recon[:, :, 1:], count=pairs, mask=later)
    if not len(clip):
        return recon.new_zeros(())

    def flows(video: Tensor) -> Tensor:
        first, second = video[clip, :, frame], video[clip, :, frame + 1]
        return net(torch.cat([first, second]), torch.cat([second, first]))

    with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
        wanted = flows(target)
    return (flows(recon) - wanted).abs().mean()


def video_perceptual(net: nn.Module, recon: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean over clips of a perceptual distance of whole clips (C-ViViT, Villegas et al. 2022,
    https://arxiv.org/abs/2210.02399).

    Args:
        net: takes two [N, 3, T, H, W] and returns [N].
        mask: [B, T] bool, real frames (the first ones); None = all. Clips are cut to them, length by length.
    Returns: a scalar, 0 where no clip has two frames: images are left to `perceptual`.
    """
    if mask is None:
        return net(recon, target).mean() if recon.shape[2] > 1 else recon.new_zeros(())
    found, lengths = [], mask.sum(1)
    for length in sorted(set(lengths.tolist()) - {0, 1}):
        rows = lengths == length
        found.append(net(recon[rows, :, :length], target[rows, :, :length]))
    return torch.cat(found).mean() if found else recon.new_zeros(())


class LogVariance(nn.Module):
    """A learned variance of the reconstruction error: distance / exp(s) + s, whose minimum over s is log(distance) + 1.

    The error's weight against the other terms thus follows 1 / error by itself (Kendall et al. 2017,
    https://arxiv.org/abs/1705.07115; one scalar for all values, as VQGAN's and VidTok's code).

    Args:
        start: s before the first step.
        values: how many values the distance is a mean over, for the sum-reduced form: C * T * H * W of a clip, as
            VidTok has it (the other terms then weigh less by that factor); 1 keeps the mean.
    The parameter is not decayed; `optim.lr_multipliers` reaches it by its name in the objective.
    """

    def __init__(self, *, start: float = 0.0, values: int = 1) -> None:
        super().__init__()
        if values < 1:
            raise ValueError(f"values={values} must be 1 (mean) or the number of values of a clip (sum)")
        self.values = values
        self.logvar = nn.Parameter(torch.tensor([start]))

    def forward(self, distance: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """distance: scalar, 0 or more. Returns the loss and {"logvar"} for the report."""
        logvar = self.logvar.to(distance.dtype).sum()
        loss = distance * torch.exp(-logvar) + logvar
        return self.values * loss, {"logvar": logvar.detach()}
