"""I3D on Kinetics-400: the network of rFVD and of a perceptual loss on clips. The architecture, not the weights.

Carreira and Zisserman 2017, Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset,
https://arxiv.org/abs/1705.07750: Inception-v1 with 3D kernels, TensorFlow's "SAME" padding, batch normalisation.

Letters: N clips, C channels, T frames, H height, W width, t, h, w those of a feature.

A weight file holds the names of the pytorch-i3d release (`rgb_imagenet.pt`):
    Conv3d_1a_7x7.conv3d.weight, Conv3d_1a_7x7.bn.{weight,bias,running_mean,running_var}, Mixed_3b.b0..., ...
    logits.conv3d.{weight,bias}
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.weights import Beside, fill_weights, read_weights

CLASSES = 400
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


class I3DNet(nn.Module):
    """The layers, frozen and in eval mode. Their weights are random until `load_state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        channels = 192
        for name, widths in _MIXED.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = _Logits(channels, CLASSES)
        self.requires_grad_(False).eval()

    def layers(self, x: Tensor) -> dict[str, Tensor]:
        """What each layer in front of the logits makes of [N, 3, T, H, W] in [-1, 1], in order."""
        out = {}
        for name, layer in self.named_children():
            if name == "logits":
                break
            if name in _POOLS:
                x = _max_pool(x, *_POOLS[name])
            x = out[name] = layer(x)
        return out

    def top(self, x: Tensor) -> Tensor:
        """[N, 3, T, H, W] in [-1, 1], T at least 9, H and W at least 193 -> [N, 400, t, h, w] logits."""
        return self.logits(F.avg_pool3d(list(self.layers(x).values())[-1], (2, 7, 7), 1))


TAPS = ("Conv3d_1a_7x7", "Conv3d_2c_3x3", "Mixed_3c", "Mixed_4f", "Mixed_5c")  # the last layer at each size


class I3DDistance(nn.Module):
    """Perceptual distance of clips: I3D's features at five depths, compared as LPIPS compares an image classifier's.

    Features are unit-normalised over channels, their squared difference summed over channels, averaged over places and
    depths: in [0, 4]. Clips are seen at their own size. C-ViViT (Villegas et al. 2022,
    https://arxiv.org/abs/2210.02399) has a loss on I3D features and does not say which; these are ours.

    I3D runs in float32 whatever autocast says, and is in no checkpoint.
    """

    def __init__(self, net: I3DNet) -> None:
        super().__init__()
        self._i3d = Beside(net)

    def _unit_features(self, clip: Tensor) -> list[Tensor]:
        net = self._i3d.on(clip.device)
        layers = net.layers(clip.float())  # pyright: ignore[reportCallIssue]
        return [x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-20) for x in (layers[tap] for tap in TAPS)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N] distances, 0 is equal. x, y: [N, 3, T, H, W] in [-1, 1]; gradients flow to both.

        Raises: ValueError for another shape.
        """
        if x.shape != y.shape or x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"I3D compares two [N, 3, T, H, W] clips, got {list(x.shape)} and {list(y.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self._unit_features(x), self._unit_features(y))
            return torch.stack([(a - b).square().sum(1).mean((1, 2, 3)) for a, b in pairs]).mean(0)


def load_i3d_distance(path: str | Path, sha256: str = "") -> I3DDistance:
    """`I3DDistance` with the weights of a file (its names are in the head of this module).

    Args:
        path: safetensors, or a torch.save'd state dict. sha256: expected hash of the file; "" skips the comparison.
    Raises: FileNotFoundError; ValueError on another hash, missing or superfluous names.
    """
    net = I3DNet()
    # counters that files older than PyTorch 0.4.1 lack, and that a frozen network never reads
    counters = {k: v for k, v in net.state_dict().items() if k.endswith(".num_batches_tracked")}
    fill_weights(net, counters | read_weights(path, sha256, "I3D"), path, "I3D")
    return I3DDistance(net)
