"""Discriminators: videos [B, C, T, H, W] in [-1, 1] to logits."""

from __future__ import annotations

from torch import Tensor, nn

from vtok.layers.positions import Positions
from vtok.layers.transformer import Transformer


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
            layers += [
                nn.Conv3d(have, want, 3, stride, 1, bias=False),
                nn.GroupNorm(min(8, want), want),
                nn.LeakyReLU(0.2),
            ]
            have = want
        self.net = nn.Sequential(*layers, nn.Conv3d(have, 1, 3, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        return self.net(video)


class TransformerDiscriminator(nn.Module):
    """A ViT over space-time patches with one logit a patch: [B, t * h * w] (LARP, Wang et al. 2024,
    https://arxiv.org/abs/2410.21264: a transformer where others use a convolutional PatchGAN)."""

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
            raise ValueError(f"objective.discriminator_patch={list(patch)} does not fit clips of {frames} x {size}")
        self.patchify = nn.Conv3d(channels, width, patch, patch)
        self.positions = Positions(width, grid, kind="sincos")
        self.transformer = Transformer(width, depth, num_heads)
        self.head = nn.Linear(width, 1)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patchify(video)
        grid = (x.shape[2], x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2) + self.positions(grid).to(x)
        return self.head(self.transformer(x))[..., 0]
