"""VGG-19, the layers of it that serve as a perceptual distance: its architecture, not its weights.

Simonyan and Zisserman 2014, Very Deep Convolutional Networks for Large-Scale Image Recognition,
https://arxiv.org/abs/1409.1556. Parameters are named as in torchvision's `vgg19` (`features.{i}.weight` and `.bias`).

Letters: N images, C channels, H height, W width, h, w those of a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = (2, 2, 4, 4, 2)  # of each stage; the last one has two more that no tap reads
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]
# Chen and Koltun 2017, https://arxiv.org/abs/1707.09405: so that the layers weigh about the same; the last ten times
TAP_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
SMALLEST = 16  # pixels a side, of which four poolings leave one feature


class VGG19Distance(nn.Module):
    """Weighted sum over five layers of the mean absolute difference of VGG-19's features, frozen and in eval mode.

    The layers are the second of each stage, after their ReLU, with the weights of Chen and Koltun 2017
    (https://arxiv.org/abs/1707.09405). Cosmos (Agarwal et al. 2025, https://arxiv.org/abs/2501.03575) trains with an L1
    distance of VGG-19 features; its public post-training code has these weights on VGG-16.

    Args:
        widths: channels of the five stages. Its weights are random until `load_state_dict`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._taps: list[int] = []
        previous = 3
        for stage, (width, convolutions) in enumerate(zip(widths, _CONVOLUTIONS)):
            layers += [nn.MaxPool2d(2, 2)] if stage else []
            for at in range(convolutions):
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
                previous = width
                if at == 1:
                    self._taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.tap_weights = TAP_WEIGHTS
        self.register_buffer("shift", 2 * torch.tensor(_MEAN).view(1, 3, 1, 1) - 1, persistent=False)
        self.register_buffer("scale", 2 * torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VGG19Distance:
        return super().train(False)

    def taps(self, image: Tensor) -> list[Tensor]:
        """The five features [N, C, h, w], float32, of images [N, 3, H, W] in [-1, 1]."""
        out = []
        x = (image - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self._taps:
                out.append(x.float())
        return out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N] distances, 0 is equal. x, y: [N, 3, H, W] in [-1, 1]; gradients flow to both.

        Raises: ValueError for another shape, or for images too small.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"VGG-19 compares two [N, 3, H, W] images, got {list(x.shape)} and {list(y.shape)}")
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]} are too small for VGG-19, which needs {SMALLEST} pixels a side"
            )
        total = x.new_zeros(x.shape[0], dtype=torch.float32)
        for weight, a, b in zip(self.tap_weights, self.taps(x), self.taps(y)):
            total = total + weight * (a - b).abs().mean((1, 2, 3))
        return total


def of_state(state: dict[str, Tensor]) -> tuple[VGG19Distance, dict[str, Tensor]] | None:
    """A network as wide as `state` is, and what of `state` it takes; None where that is no VGG-19.

    The classifier and the convolutions behind the last tap are passed over.
    """
    firsts = [0]  # index of each stage's first convolution: two a convolution, one a pooling
    for convolutions in (2, 2, 4, 4):
        firsts.append(firsts[-1] + 2 * convolutions + 1)
    found = [state.get(f"features.{i}.weight") for i in firsts]
    if any(weight is None or weight.ndim != 4 for weight in found) or "features.34.weight" not in state:
        return None
    net = VGG19Distance(tuple(len(weight) for weight in found if weight is not None))
    behind = len(net.features)
    mine = {k: v for k, v in state.items() if k.startswith("features.") and int(k.split(".")[1]) < behind}
    return net, mine
