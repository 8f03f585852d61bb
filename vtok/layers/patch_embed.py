"""Space-time patches to vectors and back, the first frame's by weights of its own.

A patch covers (st, sh, sw) frames, rows and columns, that of the first frame (1, sh, sw). On pixels these are the two
ends of a transformer; on a grid of vectors (C = D) they merge neighbours and split them again.

Letters: B clips, C channels, T frames, H height, W width; t, h, w grid of patches; D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Patches to vectors, the first frame's by weights of its own: [B, C, T, H, W] -> [B, t, h, w, D].

    Both branches are columns of one matrix, those of the first frame ahead: every step gives the same parameters a
    gradient and calls the same modules, whether a rank holds images or videos. With st = 1 there is one branch.
    """

    def __init__(self, channels: int, width: int, *, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        st, sh, sw = stride
        self.split = channels * sh * sw if st > 1 else 0  # columns of the first frame
        self.weight = nn.Parameter(torch.empty(width, self.split + channels * st * sh * sw))
        self.bias = nn.Parameter(torch.zeros((2 if st > 1 else 1) * width))
        for part in self.weight.data.split([self.split, self.weight.shape[1] - self.split], 1):
            nn.init.normal_(part, std=max(part.shape[1], 1) ** -0.5)

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """first: x begins with the first frame of a video."""
        st, sh, sw = self.stride
        out = []
        cut = 1 if first and self.split else 0
        if cut:
            head = rearrange(x[:, :, :1], "B C t (h y) (w x) -> B t h w (C y x)", y=sh, x=sw)
            out.append(F.linear(head, self.weight[:, : self.split], self.bias[: len(self.weight)]))
        if x.shape[2] > cut:
            rest = rearrange(x[:, :, cut:], "B C (t s) (h y) (w x) -> B t h w (C s y x)", s=st, y=sh, x=sw)
            out.append(F.linear(rest, self.weight[:, self.split :], self.bias[-len(self.weight) :]))
        return torch.cat(out, 1) if len(out) > 1 else out[0]

    @torch.no_grad()
    def inflate(self) -> None:
        """Give later frames the first frame's weights, shared evenly over the frames of a patch.

        A patch of `st` equal frames then has the vector that one of them has as a first frame: what a model trained on
        images only goes on from when it first sees videos.
        """
        if self.split:
            st, sh, sw = self.stride
            one = self.weight[:, : self.split].unflatten(1, (-1, 1, sh, sw)) / st
            self.weight[:, self.split :] = one.expand(-1, -1, st, -1, -1).flatten(1)
            self.bias[len(self.weight) :] = self.bias[: len(self.weight)]


class PatchHead(nn.Module):
    """Vectors to patches of pixels, the first frame's by weights of its own: [B, t, h, w, D] -> [B, C, T, H, W].

    Both branches are rows of one matrix, as in PatchEmbed.
    """

    def __init__(self, width: int, channels: int, *, stride: tuple[int, int, int], std: float = 0.02):
        super().__init__()
        self.stride = stride
        st, sh, sw = stride
        self.split = channels * sh * sw if st > 1 else 0  # rows of the first frame
        self.weight = nn.Parameter(torch.empty(self.split + channels * st * sh * sw, width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """first: x begins with the first latent frame of a video."""
        st, sh, sw = self.stride
        out = []
        cut = 1 if first and self.split else 0
        if cut:
            head = F.linear(x[:, :1], self.weight[: self.split], self.bias[: self.split])
            out.append(rearrange(head, "B t h w (C y x) -> B C t (h y) (w x)", y=sh, x=sw))
        if x.shape[1] > cut:
            rest = F.linear(x[:, cut:], self.weight[self.split :], self.bias[self.split :])
            out.append(rearrange(rest, "B t h w (C s y x) -> B C (t s) (h y) (w x)", s=st, y=sh, x=sw))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

    @torch.no_grad()
    def inflate(self) -> None:
        """Give later frames the first frame's weights: every frame of a patch is then what a first frame would be."""
        if self.split:
            st, sh, sw = self.stride
            for part in (self.weight, self.bias):
                one = part[: self.split].unflatten(0, (-1, 1, sh, sw))
                part[self.split :] = one.expand(-1, st, *one.shape[2:]).flatten(0, 3)
