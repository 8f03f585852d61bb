"""Discriminators: videos [B, C, T, H, W] or images [N, C, H, W] in [-1, 1] to logits.

Each has `features(x)`: what its layers make of x, the logits last (feature matching compares the others). All of them
take videos of one frame: an image is a clip with T = 1. Letters: B clips, C channels, T frames, H height, W width,
N images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.positions import Positions
from vtok.layers.transformer import Transformer


def _stages(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The output of each activation of `net`, and its own output last."""
    out = []
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU):
            out.append(x)
    return [*out, x]


def _norm(width: int) -> nn.GroupNorm:
    """Not batch normalisation: its statistics would differ from rank to rank and between real and fake batches."""
    return nn.GroupNorm(min(8, width), width)


class PatchDiscriminator3d(nn.Module):
    """PatchGAN in three dimensions (Isola et al. 2017, https://arxiv.org/abs/1611.07004): [B, 1, t, h, w] logits.

    The first stage keeps time (a clip may have one frame), later stages halve it while more than one is left. Group
    normalisation is fine here: a discriminator need not be causal.
    """

    def __init__(self, *, channels: int = 3, width: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(channels, width, (3, 4, 4), (1, 2, 2), 1), nn.LeakyReLU(0.2)]
        have = width
        for layer in range(1, num_layers + 1):
            want = width * min(2**layer, 8)
            stride = (2, 2, 2) if layer < num_layers else (1, 1, 1)
            layers += [nn.Conv3d(have, want, 3, stride, 1, bias=False), _norm(want), nn.LeakyReLU(0.2)]
            have = want
        self.net = nn.Sequential(*layers, nn.Conv3d(have, 1, 3, 1, 1))

    def features(self, video: Tensor) -> list[Tensor]:
        return _stages(self.net, video)

    def forward(self, video: Tensor) -> Tensor:
        return self.net(video)


class PatchDiscriminator2d(nn.Module):
    """The PatchGAN of image tokenizers, one image at a time: [N, C, H, W] -> [N, 1, h, w] logits.

    `num_layers` halvings, then two layers of stride 1, kernels of 4 (Isola et al. 2017,
    https://arxiv.org/abs/1611.07004, as VQGAN, Esser et al. 2021, https://arxiv.org/abs/2012.09841, uses it); a logit
    sees 70 x 70 pixels at num_layers=3. Group instead of batch normalisation, so that a frame's logits do not depend on
    the other frames.

    Raises: ValueError when images of `size` leave no logit.
    """

    def __init__(self, *, channels: int = 3, width: int = 64, num_layers: int = 3, size: tuple[int, int] = (256, 256)):
        super().__init__()
        side, most = min(size), 0
        while self.side(side, most + 1) >= 1:
            most += 1
        if most < 1 or num_layers > most:
            fix = f"at most {most}" if most else "discriminator=conv3d"
            raise ValueError(
                f"objective.adversarial.depth={num_layers}: a conv2d discriminator leaves no logit of frames of "
                f"{size[0]}x{size[1]}; choose {fix}"
            )
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        have = width
        for layer in range(1, num_layers + 1):
            want = width * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [nn.Conv2d(have, want, 4, stride, 1, bias=False), _norm(want), nn.LeakyReLU(0.2)]
            have = want
        self.net = nn.Sequential(*layers, nn.Conv2d(have, 1, 4, 1, 1))

    @staticmethod
    def side(pixels: int, num_layers: int) -> int:
        """Logits along a side of so many pixels (0 or less: none are left)."""
        return pixels // 2**num_layers - 2

    def features(self, image: Tensor) -> list[Tensor]:
        return _stages(self.net, image)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


class TransformerDiscriminator(nn.Module):
    """A ViT over space-time patches with one logit a patch: [B, t * h * w] (LARP, Wang et al. 2024,
    https://arxiv.org/abs/2410.21264: a transformer where others use a convolutional PatchGAN).

    A clip is continued by its last frame up to whole patches, so that images go through too.
    """

    def __init__(
        self,
        *,
        channels: int,
        frames: int,
        size: tuple[int, int],
        patch: tuple[int, int, int] = (4, 8, 8),
        width: int = 512,
        depth: int = 12,
        num_heads: int = 8,
    ):
        super().__init__()
        grid = (-(-frames // patch[0]), size[0] // patch[1], size[1] // patch[2])
        if min(grid) < 1:
            raise ValueError(f"objective.adversarial.patch={list(patch)} does not fit clips of {frames} x {size}")
        self.patch = patch
        self.patchify = nn.Conv3d(channels, width, patch, patch)
        self.positions = Positions(width, grid, kind="sincos")
        self.transformer = Transformer(width, depth, num_heads)
        self.head = nn.Linear(width, 1)

    def features(self, video: Tensor) -> list[Tensor]:
        missing = -video.shape[2] % self.patch[0]
        if missing:
            video = F.pad(video, (0, 0, 0, 0, 0, missing), mode="replicate")
        x = self.patchify(video)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2) + self.positions(grid).to(x)
        out = []
        for block in self.transformer.blocks:
            x = block(x, None)
            out.append(x)
        return [*out, self.head(self.transformer.norm(x))[..., 0]]

    def forward(self, video: Tensor) -> Tensor:
        return self.features(video)[-1]
