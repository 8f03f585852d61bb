"""Perceptual distances as losses and metrics, their weights from files: LPIPS, and what `vtok.layers.vgg` and
`vtok.layers.convnext` hold.

Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric,
https://arxiv.org/abs/1801.03924. An ImageNet classifier's features at five depths, unit-normalised over channels; the
squared difference is weighted per channel by a learned non-negative head, averaged over space, summed over depths.

Letters: N images, H height, W width.

A file of LPIPS weights holds, under one set of names,
    features.{i}.weight, features.{i}.bias    the convolutions of torchvision's `alexnet` or `vgg16`
    lin{k}.model.1.weight                     the five heads, k = 0..4, [1, channels, 1, 1]
as safetensors, or as a `torch.save`d state dict (read with weights_only=True). The state dict of the `lpips` package
(`net.slice{s}.{i}.*`, which keeps torchvision's numbering) is read too; a classifier's `classifier.*` is passed over.
A file of VGG-19 or ConvNeXt-S weights is the state dict of torchvision's `vgg19` or `convnext_small`, saved either way.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from vtok.layers.convnext import SIDE, ConvNeXt, ConvNeXtDistance
from vtok.layers.vgg import VGG19Distance, of_state
from vtok.layers.weights import file_sha256, fill_weights, read_weights

__all__ = ["LPIPS", "PERCEPTUAL_NETS", "file_sha256", "load_lpips", "load_perceptual"]

PERCEPTUAL_NETS = ("lpips", "convnext_s", "vgg19")

# (features up to and with this ReLU feed head k, its channels), by torchvision's numbering
_TAPS = {
    "alex": ((1, 64), (4, 192), (7, 384), (9, 256), (11, 256)),
    "vgg": ((3, 64), (8, 128), (15, 256), (22, 512), (29, 512)),
}
_SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side, below which a pooling layer has nothing left
# ImageNet statistics, moved to inputs in [-1, 1]: (x - shift) / scale
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _alexnet() -> nn.Sequential:
    def conv(i: int, o: int, k: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, k, stride, padding), nn.ReLU()]

    pool = nn.MaxPool2d(3, 2)
    body = [*conv(3, 64, 11, 4, 2), pool, *conv(64, 192, 5, 1, 2), pool]
    return nn.Sequential(*body, *conv(192, 384, 3), *conv(384, 256, 3), *conv(256, 256, 3))


def _vgg16() -> nn.Sequential:
    body: list[nn.Module] = []
    previous = 3
    for stage, (channels, convolutions) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        body += [nn.MaxPool2d(2, 2)] if stage else []
        for _ in range(convolutions):
            body += [nn.Conv2d(previous, channels, 3, padding=1), nn.ReLU()]
            previous = channels
    return nn.Sequential(*body)


class _Head(nn.Module):
    """One non-negative weight per channel, under the released files' name (`lin{k}.model.1.weight`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))  # Identity: their dropout

    def forward(self, difference: Tensor) -> Tensor:
        return self.model(difference).mean(dim=(1, 2, 3))


class LPIPS(nn.Module):
    """Perceptual distance between images, frozen and always in eval mode.

    Args:
        net: "alex" (the usual metric) or "vgg" (the usual loss). Its weights are random until `load_state_dict`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "alex") -> None:
        super().__init__()
        if net not in _TAPS:
            raise ValueError(f"net={net!r} is not an LPIPS backbone; choose one of {sorted(_TAPS)}")
        self.net = net
        self.tap_weights = (1 / len(_TAPS[net]),) * len(_TAPS[net])  # of Gram matrices
        self.features = _alexnet() if net == "alex" else _vgg16()
        for k, (_, channels) in enumerate(_TAPS[net]):
            self.add_module(f"lin{k}", _Head(channels))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        for k in range(len(_TAPS[net])):  # a distance is never negative, also before weights are loaded
            self.get_submodule(f"lin{k}.model.1").weight.data.abs_()  # type: ignore[union-attr]
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        return super().train(False)

    def taps(self, image: Tensor) -> list[Tensor]:
        """The five features [N, C, h, w] that are compared, float32, of images [N, 3, H, W] in [-1, 1]."""
        out, taps = [], dict(_TAPS[self.net])
        x = (image - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in taps:
                out.append(x.float())
        return out

    def _unit_features(self, image: Tensor) -> list[Tensor]:
        # The epsilon is under the root, unlike the released code's: its gradient is NaN where all channels are 0. The
        # value differs by less than float32 resolves.
        return [x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-20) for x in self.taps(image)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N] distances, 0 is equal. x, y: [N, 3, H, W] in [-1, 1]; gradients flow to both.

        Raises: ValueError for another shape, or for images too small for the backbone.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"LPIPS compares two [N, 3, H, W] images, got {list(x.shape)} and {list(y.shape)}")
        if min(x.shape[2:]) < _SMALLEST[self.net]:
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]} are too small for LPIPS with net={self.net!r}, "
                f"which needs {_SMALLEST[self.net]} pixels a side"
            )
        total = x.new_zeros(x.shape[0], dtype=torch.float32)
        for k, (a, b) in enumerate(zip(self._unit_features(x), self._unit_features(y))):
            total = total + self.get_submodule(f"lin{k}")((a - b).square()).float()
        return total


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if re.match(r"(classifier|scaling_layer|lins)\.", name):  # `lins` repeats lin0..lin4
            continue
        out[re.sub(r"^net\.slice\d+\.", "features.", name)] = value
    return out


def load_lpips(path: str | Path, sha256: str = "") -> LPIPS:
    """LPIPS with the weights of a file (its names are in the head of this module); the backbone is read off them.

    Args:
        path: safetensors, or a torch.save'd state dict.
        sha256: expected hash of the file; "" skips the comparison.
    Raises: FileNotFoundError; ValueError on another hash, an unknown backbone, missing or superfluous names.
    """
    state = _plain_names(read_weights(path, sha256, "LPIPS"))
    first = state.get("features.0.weight")
    by_kernel = {11: "alex", 3: "vgg"}
    if first is None or first.ndim != 4 or first.shape[-1] not in by_kernel:
        raise ValueError(
            f"{path} is not LPIPS weights: expected features.0.weight of torchvision's alexnet or vgg16 and "
            f"lin0.model.1.weight ... lin4.model.1.weight; it holds {', '.join(sorted(state)[:5]) or 'nothing'} ..."
        )
    net = LPIPS(by_kernel[int(first.shape[-1])])
    fill_weights(net, state, path, f"LPIPS with net={net.net!r}")
    return net


def load_perceptual(
    net: str, path: str | Path, *, sha256: str = "", side: int = SIDE
) -> LPIPS | VGG19Distance | ConvNeXtDistance:
    """The distance `net` names, frozen, with the weights of a file: both take two [N, 3, H, W] in [-1, 1] to [N].

    Args:
        net: "lpips", "convnext_s" or "vgg19" (as wide as the file's).
        sha256: expected hash of the file; "" skips the comparison.
        side: convnext_s alone: pixels a side at which it sees both images.
    Raises: FileNotFoundError; ValueError on an unknown net, another hash, missing or superfluous names.
    """
    if net not in PERCEPTUAL_NETS:
        raise ValueError(f"objective.perceptual_net={net!r} is unknown; choose {' or '.join(PERCEPTUAL_NETS)}")
    if net == "lpips":
        return load_lpips(path, sha256)
    if net == "vgg19":
        state = read_weights(path, sha256, "VGG-19")
        found = of_state(state)
        if found is None:
            raise ValueError(
                f"{path} is not the state dict of torchvision's vgg19 (features.0.weight ... features.34.bias); it "
                f"holds {', '.join(sorted(state)[:5]) or 'nothing'} ..."
            )
        fill_weights(*found, path, "torchvision's vgg19")
        return found[0]
    with torch.device("meta"):  # fifty million random numbers would take seconds
        network = ConvNeXt()
    distance = ConvNeXtDistance(network, side=side)
    state = {name: value.float() for name, value in read_weights(path, sha256, "ConvNeXt-S").items()}
    fill_weights(network, state, path, "torchvision's convnext_small", assign=True)
    return distance.requires_grad_(False)
