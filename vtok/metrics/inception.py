"""Inception-v3 as FID uses it. The architecture is here, the weights are not.

Szegedy et al. 2015, Rethinking the Inception Architecture for Computer Vision, https://arxiv.org/abs/1512.00567, in the
variant of TensorFlow's graph of 2015-12-05 that Heusel et al. 2017 (https://arxiv.org/abs/1706.08500) measure with. Its
average pooling does not count padding, its last block pools by maximum. The features are the 2048 of the last pooling,
of frames resized to 299 x 299 as TensorFlow 1 does (bilinear, pixel i of the output at i * size / 299 of the input, no
antialiasing), levels mapped by (x - 128) / 128.

Letters: N frames, H height, W width.

A weight file holds the names of pytorch-fid and torch-fidelity (`pt_inception-2015-12-05-*.pth`,
`weights-inception-2015-12-05-*.pth`), which are torchvision's:
    Conv2d_1a_3x3.conv.weight, Conv2d_1a_3x3.bn.{weight,bias,running_mean,running_var}, Mixed_5b.branch1x1..., ...
`fc.*`, the classifier behind the features, is passed over.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.metrics.frechet import FeatureNet, load_net

SIDE = 299
_FRAMES_AT_ONCE = 32
Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel]  # name, output channels, kernel
Fork = tuple[Layer, Layer]  # both see the same input, and are concatenated


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches of convolutions beside a pooled branch, concatenated.

    Args:
        branches: each a chain of layers; the last may be a fork.
        pool: "average" or "max" keep the size and are followed by a 1 x 1 convolution to `pooled` channels; "stride"
            halves the size, and so does the last layer of each branch.
    """

    def __init__(self, channels: int, branches: list[list[Layer | Fork]], *, pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool, self.chains = pool, []
        for branch in branches:
            width, chain = channels, []
            for at, step in enumerate(branch):
                halves = pool == "stride" and at == len(branch) - 1
                layers: list[Layer] = [step] if isinstance(step[0], str) else list(step)  # type: ignore[list-item]
                for name, out, kernel in layers:
                    height, breadth = (kernel, kernel) if isinstance(kernel, int) else kernel
                    padding = (0, 0) if halves else (height // 2, breadth // 2)
                    self.add_module(name, _Conv(width, out, (height, breadth), 2 if halves else 1, padding))
                chain.append([name for name, _, _ in layers])
                width = sum(out for _, out, _ in layers)
            self.chains.append(chain)
        if pooled:
            self.branch_pool = _Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            out.append(y)
        if self.pool == "stride":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "max":
            y = F.max_pool2d(x, 3, 1, padding=1)
        else:
            y = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        return torch.cat([*out, self.branch_pool(y)], 1)


def _at_35(channels: int, pooled: int) -> _Block:
    triple: list[Layer | Fork] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    double: list[Layer | Fork] = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return _Block(channels, [[("branch1x1", 64, 1)], double, triple], pool="average", pooled=pooled)


def _at_17(width: int) -> _Block:
    wide, tall = (1, 7), (7, 1)
    double: list[Layer | Fork] = [("branch7x7_1", width, 1), ("branch7x7_2", width, wide), ("branch7x7_3", 192, tall)]
    twice: list[Layer | Fork] = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, tall)]
    twice += [("branch7x7dbl_3", width, wide), ("branch7x7dbl_4", width, tall), ("branch7x7dbl_5", 192, wide)]
    return _Block(768, [[("branch1x1", 192, 1)], double, twice], pool="average", pooled=192)


def _at_8(channels: int, pool: str) -> _Block:
    def fork(one: str, other: str) -> Fork:
        return (one, 384, (1, 3)), (other, 384, (3, 1))

    double: list[Layer | Fork] = [("branch3x3_1", 384, 1), fork("branch3x3_2a", "branch3x3_2b")]
    triple: list[Layer | Fork] = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    triple += [fork("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return _Block(channels, [[("branch1x1", 320, 1)], double, triple], pool=pool, pooled=192)


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """float32 [N, C, side, side] of images [N, C, H, W]: bilinear as TensorFlow 1 resizes, corners not aligned.

    Pixel i of the output lies at i * size / side of the input, not at (i + 1/2) * size / side - 1/2.
    """

    def weights(size: int) -> Tensor:  # [side, size]
        at = torch.arange(side, device=images.device, dtype=torch.float32) * (size / side)
        low = at.long().clamp(max=size - 1)
        high, part = (low + 1).clamp(max=size - 1), at - low
        matrix = torch.zeros(side, size, device=images.device)
        rows = torch.arange(side, device=images.device)
        matrix.index_put_((rows, low), 1 - part, accumulate=True)
        return matrix.index_put_((rows, high), part, accumulate=True)

    rows, columns = weights(images.shape[2]), weights(images.shape[3])
    return rows @ (images.float() @ columns.T)


class Inception(FeatureNet):
    """[N, 2048] features of frames, frozen and always in eval mode. Its weights are random until `load_inception`."""

    dim, unit, min_frames = 2048, "frames", 1
    about = f"Inception-v3 of 2015-12-05, pooled features; every frame to {SIDE} x {SIDE}, bilinear as TensorFlow 1"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _at_35(192, 32)
        self.Mixed_5c = _at_35(256, 64)
        self.Mixed_5d = _at_35(288, 64)
        triple: list[Layer | Fork] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
        self.Mixed_6a = _Block(288, [[("branch3x3", 384, 3)], triple], pool="stride")
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            self.add_module(name, _at_17(width))
        double: list[Layer | Fork] = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
        chain: list[Layer | Fork] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7))]
        chain += [("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3)]
        self.Mixed_7a = _Block(768, [double, chain], pool="stride")
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "max")  # in that graph, unlike the paper and torchvision
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2048]. x: [N, 3, 299, 299] in [-1, 1]. Raises ValueError for another shape."""
        if x.ndim != 4 or x.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"Inception sees [N, 3, {SIDE}, {SIDE}], got {list(x.shape)}")
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean(dim=(2, 3))

    @torch.no_grad()
    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        device = self.Conv2d_1a_3x3.conv.weight.device
        real = torch.arange(video.shape[2], device=video.device) < lengths.to(video.device)[:, None]
        frames = video.transpose(1, 2)[real]  # [N, 3, H, W]
        out = []
        # float32 throughout: neither autocast nor TensorFloat-32 may change a number that tables compare
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            for part in frames.split(_FRAMES_AT_ONCE):
                out.append(self((resize_tf1(part.to(device), SIDE) - 128.0) / 128.0))
        return list(torch.cat(out).split(lengths.tolist()))


def load_inception(path: str | Path, sha256: str = "") -> Inception:
    """Inception-v3 with the weights of a file (its names are in the head of this module).

    Args:
        path: safetensors, or a torch.save'd state dict.
        sha256: expected hash of the file; "" skips the comparison. The hash found is `net.sha256`.
    Raises: FileNotFoundError; ValueError on another hash, a TorchScript archive, missing or superfluous names.
    """
    return load_net(Inception, path, sha256, key="eval.fid_weights", passed_over="fc.")
