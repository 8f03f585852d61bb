"""ConvNeXt-Small, a classifier whose logits serve as a perceptual distance: its architecture, not its weights.

Liu et al. 2022, A ConvNet for the 2020s, https://arxiv.org/abs/2201.03545. Parameters are named as in torchvision's
`convnext_small`, so that a state dict of the one loads into the other.

Letters: N images, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = ((96, 3), (192, 3), (384, 27), (768, 3))  # (channels, blocks) of ConvNeXt-S, each at half the size before
_CLASSES = 1000
SIDE = 224  # pixels, what the classifier was trained on
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]
SMALLEST = 32  # pixels a side, of which five halvings leave one feature


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)  # [N, H, W, C]


class _Block(nn.Module):
    """x + scale * (7x7 depthwise convolution, norm, two pointwise layers); stochastic depth is for training it only."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            _ToLast(),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """[N, 3, H, W], normalised by ImageNet's statistics -> logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        width = _STAGES[0][0]
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, width, 4, stride=4), _ChannelNorm(width, eps=1e-6))]
        for channels, depth in _STAGES:
            if channels != width:
                layers.append(nn.Sequential(_ChannelNorm(width, eps=1e-6), nn.Conv2d(width, channels, 2, stride=2)))
            layers.append(nn.Sequential(*(_Block(channels) for _ in range(depth))))
            width = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(_ChannelNorm(width, eps=1e-6), nn.Flatten(1), nn.Linear(width, _CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


class ConvNeXtDistance(nn.Module):
    """Mean squared difference of two images' ImageNet logits, frozen and always in eval mode.

    What TiTok's second stage takes as its perceptual loss (Yu et al. 2024, https://arxiv.org/abs/2406.07550): both
    images are resized to 224 x 224 (bilinear, antialiased) first.

    Args:
        net: the network, with its weights.
        side: pixels a side that images are resized to; the cost of a distance grows with its square.
    Raises: ValueError for a side the network has nothing left of.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: ConvNeXt, *, side: int = SIDE) -> None:
        super().__init__()
        if side < SMALLEST:
            raise ValueError(f"side={side}: ConvNeXt-S halves images five times and needs {SMALLEST} pixels a side")
        self.side = side
        self.net = net
        # the normalisation of [0, 1], moved to inputs in [-1, 1]: (x - shift) / scale
        self.register_buffer("shift", 2 * torch.tensor(_MEAN).view(1, 3, 1, 1) - 1, persistent=False)
        self.register_buffer("scale", 2 * torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ConvNeXtDistance:
        return super().train(False)

    def logits(self, image: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] -> [N, 1000]."""
        x = F.interpolate(image, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.net((x - self.shift) / self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N] distances, 0 is equal. x, y: [N, 3, H, W] in [-1, 1]; gradients flow to both.

        Raises: ValueError for another shape.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"ConvNeXt-S compares two [N, 3, H, W] images, got {list(x.shape)} and {list(y.shape)}")
        return (self.logits(x).float() - self.logits(y).float()).square().mean(1)
