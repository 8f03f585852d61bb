"""Distances between a clip and its reconstruction, each averaged per clip first and then over clips.

Letters: B clips, C channels, T frames, H height, W width. Videos are uint8 [B, C, T, H, W]; `lengths` [B] counts real
frames, the others are padding and never count. Functions return one float64 per clip, NaN where the
quantity is undefined; the classes are torchmetrics, so they add up over batches and over ranks, and leave NaN out.

    psnr_db         mean squared error of the whole clip over RGB levels, in dB, peak 255. Higher is better
    tdiff_psnr_db   the same on differences of neighbouring frames: flicker and wrong motion. Undefined for one frame
    ssim            Gaussian 11 x 11, sigma 1.5, each channel by itself, mean over the valid region, channels, frames
    lpips           needs weights (vtok.layers.perceptual); mean over frames. Lower is better
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vtok.layers.perceptual import LPIPS

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_FRAMES_AT_ONCE = 64  # frames a perceptual network or a filter sees in one call, to bound memory


def check_pair(recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Real frames of each clip [B] int64, once both videos are known to be uint8 [B, C, T, H, W] of one shape.

    Raises: ValueError naming the shapes and types otherwise.
    """
    if recon.shape != target.shape or target.ndim != 5:
        raise ValueError(
            f"reconstruction {list(recon.shape)} and original {list(target.shape)} must have one shape [B, C, T, H, W]"
        )
    if recon.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(
            f"distortion is measured on uint8 levels, got {recon.dtype} and {target.dtype}; use types.to_uint8"
        )
    batch, frames = target.shape[0], target.shape[2]
    if lengths is None:
        return torch.full((batch,), frames, dtype=torch.int64, device=target.device)
    if lengths.shape != (batch,) or (batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= frames):
        raise ValueError(f"lengths={lengths.tolist()} must be {batch} numbers in [1, {frames}]")
    return lengths.to(target.device, torch.int64)


def _db(squared_error: Tensor, values: Tensor) -> Tensor:
    # An exact copy has no finite PSNR. It is given the PSNR of the least error uint8 can have, one value off by one:
    # finite, never below that of a worse copy, and 101 dB for 16 x 64 x 64.
    mse = squared_error.clamp(min=1.0) / values
    return 10.0 * torch.log10(PEAK**2 / mse)


def clip_psnr(recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B] dB: PSNR of the clip's mean squared error over all channels, frames and pixels.

    An exact copy counts as one value off by one level (`10 log10(255^2 * C T H W)`), not as infinity.
    """
    lengths = check_pair(recon, target, lengths)
    error = _frame_errors(recon.float() - target.float())  # [B, T]
    real = torch.arange(error.shape[1], device=error.device) < lengths[:, None]
    per_frame = target.shape[1] * target.shape[3] * target.shape[4]
    return _db((error * real).sum(1), (lengths * per_frame).double())


def clip_tdiff_psnr(recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B] dB: PSNR (peak 255) of frame t minus frame t-1; NaN for a clip of one real frame.

    A still reconstruction of a moving clip keeps its PSNR but not this; an exact copy is treated as in `clip_psnr`.
    """
    lengths = check_pair(recon, target, lengths)
    error = _frame_errors((recon.float() - target.float()).diff(dim=2))  # [B, T-1]
    pairs = lengths - 1
    real = torch.arange(error.shape[1], device=error.device) < pairs[:, None]
    per_frame = target.shape[1] * target.shape[3] * target.shape[4]
    value = _db((error * real).sum(1), (pairs * per_frame).clamp(min=1).double())
    return value.masked_fill(pairs < 1, torch.nan)


def _frame_errors(difference: Tensor) -> Tensor:
    # Squares of whole numbers below 2^18: float32 sums of one frame's would already round, hence float64.
    return difference.square().sum(dim=(1, 3, 4), dtype=torch.float64)


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    # [size, size - 10]: column i holds the window that starts at sample i. A product with it is 5 to 10 times faster on
    # a CPU than a convolution of single planes.
    x = torch.arange(SSIM_WINDOW, dtype=torch.float32, device=device) - (SSIM_WINDOW - 1) / 2
    kernel = torch.exp(-0.5 * (x / SSIM_SIGMA) ** 2)
    band = torch.zeros(size, size - SSIM_WINDOW + 1, device=device)
    for offset, weight in enumerate((kernel / kernel.sum()).tolist()):
        band.diagonal(-offset).fill_(weight)
    return band


def _frame_ssim(x: Tensor, y: Tensor) -> Tensor:
    # x, y: [N, C, H, W] uint8 -> [N]
    rows, columns = _gaussian_band(x.shape[2], x.device), _gaussian_band(x.shape[3], x.device)
    # Variances do not change when both images are shifted; centred levels keep float32 from cancelling.
    a, b = x.flatten(0, 1).float() - 127.5, y.flatten(0, 1).float() - 127.5
    stack = torch.cat([a, b, a * a, b * b, a * b])
    stack = rows.T @ (stack @ columns)
    mean_a, mean_b, aa, bb, ab = stack.chunk(5)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    var_a, var_b, cov = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + 127.5, mean_b + 127.5
    light = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (light * structure).double().reshape(x.shape[0], -1).mean(1)


def _per_clip(recon: Tensor, target: Tensor, lengths: Tensor, frame_fn: Any) -> Tensor:
    """Mean over each clip's real frames of frame_fn(x, y) -> [N], called on bounded pieces."""
    batch, _, frames = target.shape[:3]
    real = torch.arange(frames, device=target.device) < lengths[:, None]  # [B, T]
    x, y = recon.transpose(1, 2)[real], target.transpose(1, 2)[real]  # [N, C, H, W]
    values = [frame_fn(a, b) for a, b in zip(x.split(_FRAMES_AT_ONCE), y.split(_FRAMES_AT_ONCE))]
    per_frame = torch.zeros(batch, frames, dtype=torch.float64, device=target.device)
    per_frame[real] = torch.cat(values).double()
    return per_frame.sum(1) / lengths


def clip_ssim(recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B] in [-1, 1], 1 is best: structural similarity per frame, then per clip (Wang et al. 2004, IEEE TIP 13(4)).

    Data range 255, K1 = 0.01, K2 = 0.03, windows that lie inside the frame only, as in the paper; torchmetrics also
    averages over windows that reach into a reflected border. NaN when a frame is smaller than the window.
    """
    lengths = check_pair(recon, target, lengths)
    if min(target.shape[3:]) < SSIM_WINDOW:
        return torch.full((len(lengths),), torch.nan, dtype=torch.float64, device=target.device)
    return _per_clip(recon, target, lengths, _frame_ssim)


@torch.no_grad()
def clip_lpips(net: LPIPS, recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[B], 0 is best: LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) per frame, then per clip.

    Levels are mapped to [-1, 1] and frames keep their size. Raises ValueError for videos that are not RGB.
    """
    lengths = check_pair(recon, target, lengths)
    if target.shape[1] != 3:
        raise ValueError(f"LPIPS compares RGB frames, the video has {target.shape[1]} channels")

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return net(x.float() / 127.5 - 1.0, y.float() / 127.5 - 1.0)

    return _per_clip(recon, target, lengths, distance)


class ClipMean(Metric):
    """Mean over clips of one of the functions above; clips where it is undefined (NaN) are left out.

    update(recon, target, lengths=None) takes uint8 [B, C, T, H, W]; compute() is a float64 scalar, NaN without clips.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    total: Tensor
    clips: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("clips", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def per_clip(self, recon: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        raise NotImplementedError

    def update(self, recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> None:
        values = self.per_clip(recon, target, lengths)
        defined = ~values.isnan()
        self.total += values[defined].sum()
        self.clips += defined.sum()

    def compute(self) -> Tensor:
        return torch.where(self.clips > 0, self.total / self.clips.clamp(min=1), torch.nan)


class PSNR(ClipMean):
    """`psnr_db`: per-clip MSE over RGB uint8, in dB, then mean over clips. Higher is better; see `clip_psnr`."""

    def per_clip(self, recon: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        return clip_psnr(recon, target, lengths)


class TemporalDifferencePSNR(ClipMean):
    """`tdiff_psnr_db`: PSNR of frame differences, mean over clips of two frames or more. Higher is better."""

    def per_clip(self, recon: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        return clip_tdiff_psnr(recon, target, lengths)


class SSIM(ClipMean):
    """`ssim`: per frame, per clip, then mean over clips. Higher is better, at most 1; see `clip_ssim`."""

    def per_clip(self, recon: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        return clip_ssim(recon, target, lengths)


class PerceptualDistance(ClipMean):
    """`lpips`: with weights from `vtok.layers.perceptual.load_lpips`. Lower is better; see `clip_lpips`."""

    higher_is_better = False

    def __init__(self, net: LPIPS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net

    def per_clip(self, recon: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
        return clip_lpips(self.net, recon, target, lengths)
