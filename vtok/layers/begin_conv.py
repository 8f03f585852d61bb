"""How a convolutional tokenizer begins: what lies at a place stays there, and its output is the mean video.

Only initial values: nothing here adds a parameter or an operation.

Letters: B clips, O channels out, T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vtok.layers.causal import CausalConv3d
from vtok.layers.conv_blocks import ResBlock, Upsample

_GRAIN = 0.8  # of a sampling kernel's variance is its square: what tells edges and textures from their mean


@torch.no_grad()
def keep_places(backbone: nn.Module, *, besides: Iterable[nn.Module] = ()) -> None:
    """Initial values, in place, of the convolutions on the straight way of a backbone, those outside of residual
    branches: each turns the channels at a place (delta-orthogonal, Xiao et al. 2018, https://arxiv.org/abs/1806.05393),
    strided ones those of the mean of their stride, and a little of everything else.

    Random kernels mix each place with all of its neighbours, with random signs, and no later layer can tell them
    apart again. Of the variance of the mean colours of cells of 4 x 8 x 8 pixels, latents of a random encoder (width
    8, procedural clips, two seeds) tell 52 % and 18 % and a random decoder's last features 22 % and 11 %.
    besides: parts that stay as they are.
    """
    left = {id(part) for module in besides for part in module.modules()}
    unfolds = {id(up.conv): math.prod(up.factor) for up in backbone.modules() if isinstance(up, Upsample) and up.unfold}
    for block in backbone.modules():
        if isinstance(block, ResBlock):
            left |= {id(part) for branch in (block.conv1, block.conv2) for part in branch.modules()}
    for conv in backbone.modules():
        if isinstance(conv, CausalConv3d) and id(conv) not in left:
            _turn(conv, copies=unfolds.get(id(conv), 1))


def _turn(conv: CausalConv3d, *, copies: int) -> None:
    """copies: how many times the channels are given out (those that become places begin alike, so that no grid shows:
    Aitken et al. 2017, https://arxiv.org/abs/1707.02937)."""
    out, channels, (st, sh, sw) = conv.out_channels // copies, conv.in_channels, conv.strides
    kt, row, column = conv.kernel[0], conv.kernel[1] // 2, conv.kernel[2] // 2
    stride = st * sh * sw
    place = torch.zeros(conv.kernel)
    place[kt - st :, row : row + sh, column : column + sw] = 1 / stride
    turn = nn.init.orthogonal_(torch.empty(max(out, channels), max(out, channels)))[:out, :channels]
    weight = turn[:, :, None, None, None] * place
    if conv.skip == "add":  # which gives the mean of the same places already
        weight = torch.zeros_like(weight)
    if stride > 1:
        grain = torch.randn_like(weight) / conv.weight[0].numel() ** 0.5
        weight = (1 - _GRAIN**2) ** 0.5 * weight + _GRAIN * grain
    conv.weight.copy_(weight.repeat(copies, 1, 1, 1, 1))


@torch.no_grad()
def begin_with_mean(conv: CausalConv3d, wanted: Sequence[Tensor]) -> None:
    """The bias, in place, of an output layer of zeros: the mean of what it should give, each [B, O, T, H, W]. A dense
    map is nearly everywhere at one end of its range, and a bias that moves by the learning rate would take hundreds of
    steps to it."""
    assert conv.bias is not None
    total = torch.stack([each.sum((0, 2, 3, 4), dtype=torch.float64) for each in wanted]).sum(0)
    conv.bias.copy_(total / sum(each[:, 0].numel() for each in wanted))
