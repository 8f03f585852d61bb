"""I3D on Kinetics-400, the network of rFVD. The architecture is here, the weights are not.

Carreira and Zisserman 2017, Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset,
https://arxiv.org/abs/1705.07750: Inception-v1 with 3D kernels, TensorFlow's "SAME" padding, batch normalisation.
The features are the 400 logits, averaged over time, of whole frames resized to 224 x 224 (bilinear, half-pixel
centres, no antialiasing), levels mapped to [-1, 1].

Letters: N clips, C channels, T frames, H height, W width.

A weight file holds the names of the pytorch-i3d release (`rgb_imagenet.pt`):
    Conv3d_1a_7x7.conv3d.weight, Conv3d_1a_7x7.bn.{weight,bias,running_mean,running_var}, Mixed_3b.b0..., ...
    logits.conv3d.{weight,bias}
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.metrics.frechet import FeatureNet, load_net

SIDE = 224
# the time stride is 8, rounded up, and the last pooling averages two frames of what is left
MIN_FRAMES = 9
_CLIPS_AT_ONCE = 4
_MIXED = {  # output channels: 1x1; 1x1 then 3x3; 1x1 then 3x3; pooled, then 1x1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# (kernel, stride) of the max pooling in front of a layer
_POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
Triple = tuple[int, int, int]


def _same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    # TensorFlow's "SAME": ceil(size / stride) outputs; of an odd number of zeros the larger half goes to the end
    pads: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad begins at the last axis
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _max_pool(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)  # zeros pad well: everything pooled is at least 0


class _Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.kernel: Triple = (kernel, kernel, kernel)
        self.stride: Triple = (stride, stride, stride)
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.kernel, self.stride))))


class _Mixed(nn.Module):
    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, widths[0])
        self.b1a, self.b1b = _Unit(channels, widths[1]), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(channels, widths[3]), _Unit(widths[3], widths[4], 3)
        self.b3b = _Unit(channels, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], 1)


class _Logits(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(FeatureNet):
    """[N, 400] logits of clips, frozen and always in eval mode. Its weights are random until `load_i3d`."""

    dim, unit, min_frames = 400, "clips", MIN_FRAMES
    about = f"I3D Kinetics-400 logits, mean over time; whole frames to {SIDE} x {SIDE}, bilinear; clips of 9 frames up"

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        channels = 192
        for name, widths in _MIXED.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Logits(channels, self.dim)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 400]. x: [N, 3, T, 224, 224] in [-1, 1], T at least 9. Raises ValueError for another shape."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] < MIN_FRAMES or x.shape[3:] != (SIDE, SIDE):
            raise ValueError(
                f"I3D sees [N, 3, T, {SIDE}, {SIDE}] with T at least {MIN_FRAMES}, got {list(x.shape)}: clips have to "
                f"hold {MIN_FRAMES} frames (data.num_frames)"
            )
        for name, layer in self.named_children():
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            if name == "logits":
                x = F.avg_pool3d(x, (2, 7, 7), 1)
            x = layer(x)
        return x.mean(dim=(2, 3, 4))

    @torch.no_grad()
    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        device = self.logits.conv3d.weight.device
        out = [torch.zeros(0, self.dim, device=device) for _ in range(len(video))]
        # float32 throughout: neither autocast nor TensorFloat-32 may change a number that tables compare
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            for frames in sorted(set(lengths.tolist())):
                if frames < MIN_FRAMES:
                    continue
                for rows in (lengths == frames).nonzero()[:, 0].split(_CLIPS_AT_ONCE):
                    x = video[rows.to(video.device), :, :frames].to(device).float().transpose(1, 2)  # [n, T, 3, H, W]
                    small = F.interpolate(x.flatten(0, 1), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
                    x = small.unflatten(0, (len(rows), frames)).transpose(1, 2) / 127.5 - 1.0
                    for row, feature in zip(rows.tolist(), self(x)):
                        out[row] = feature[None]
        return out


def load_i3d(path: str | Path, sha256: str = "") -> I3D:
    """I3D with the weights of a file (its names are in the head of this module).

    Args:
        path: safetensors, or a torch.save'd state dict.
        sha256: expected hash of the file; "" skips the comparison. The hash found is `net.sha256`.
    Raises: FileNotFoundError; ValueError on another hash, a TorchScript archive, missing or superfluous names.
    """
    return load_net(I3D, path, sha256, key="eval.fvd_weights")
