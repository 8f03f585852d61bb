"""Causality in time: convolutions that never see later frames, and what every causal module keeps for a stream.

    cache None    a whole video at once
    cache {}      the beginning of a stream: the same result, and what the next frames need is left in it
    cache filled  the stream goes on, module by module where it stopped: any cuts give the whole's result

Tensors are [B, C, T, H, W]. Most are laid out channels last in memory, where a norm over channels and tokens for
attention are views: norms, activations and convolutions together then took 2/3 of the time on a CPU (32 and 64
channels). That is no part of any contract here.

Letters: B clips, C channels, T frames, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = dict[nn.Module, Any]  # what each causal module keeps of the past, by the module itself
Axes = tuple[int, int, int]  # time, height, width


def begins(module: nn.Module, cache: Cache | None) -> bool:
    """Whether this call holds the video's first frame; marks `module` in the cache as begun."""
    if cache is None:
        return True
    begun = module in cache
    cache.setdefault(module, True)
    return not begun


def check_padding(padding: str) -> None:
    if padding not in ("replicate", "zero"):
        raise ValueError(f"model.conv.temporal_padding={padding!r} is unknown; choose replicate or zero")


class CausalConv3d(nn.Conv3d):
    """A convolution over time and space that looks at the present and the past: [B, C, 1 + st n, H, W] -> 1 + n frames.

    Before the first frame stand copies of it (padding "replicate") or zeros ("zero"); a stream keeps the last
    kernel - stride frames. Space is padded with zeros by (kernel - 1) / 2 on both sides.

    skip adds the mean of a window of the input to the output, as one convolution with another kernel, so it costs
    nothing: "add" (y = conv(x) + mean(x)), "blend" (y = a mean(x) + (1 - a) conv(x), a learned, 1/2 at first) and
    "none". The window is, on each axis, the last `stride` places of the kernel if stride > 1, else the present place;
    "blend" averages all of a strided kernel's places in time. The bias stands outside of the blend.
    grown: what `inflate_2d` does with channels that an image model lacks: "repeat", "bands" (zeros) or "" (an error).
    groups: of channels that do not see each other, without a skip.
    Raises: ValueError for kernels smaller than strides in time, even spatial kernels, and unknown choices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Axes = (3, 3, 3),
        *,
        stride: Axes = (1, 1, 1),
        padding: str = "replicate",
        skip: str = "none",
        grown: str = "",
        groups: int = 1,
    ):
        check_padding(padding)
        if kernel[0] < stride[0]:
            raise ValueError(f"kernel={kernel[0]} frames is less than stride={stride[0]}: frames would be skipped")
        if not kernel[1] % 2 or not kernel[2] % 2:
            raise ValueError(f"kernel={kernel} is even in space; choose odd sizes, so that the grid keeps its place")
        if skip not in ("none", "add", "blend"):
            raise ValueError(f"skip={skip!r} is unknown; choose none, add or blend")
        if skip != "none" and in_channels != out_channels:
            raise ValueError(f"skip={skip!r} needs equal channels, not {in_channels} and {out_channels}")
        if skip != "none" and groups != 1:
            raise ValueError(f"skip={skip!r} is a kernel over all channels, which groups={groups} do not have")
        space = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, stride=stride, padding=space, groups=groups)
        self.temporal_padding, self.skip = padding, skip
        self.kernel, self.strides, self.space = kernel, stride, space
        self.mix = nn.Parameter(torch.zeros(1)) if skip == "blend" else None
        self.grown = grown
        in_time = kernel[0] > 1 and (kernel[1:] == (1, 1) or stride[0] > 1)
        self.temporal_only = in_time and stride[1:] == (1, 1)

    def window(self) -> tuple[slice, slice, slice]:
        """Places of the kernel that the skip averages."""
        t, h, w = self.kernel
        frames = slice(0 if self.skip == "blend" and self.strides[0] > 1 else t - self.strides[0], t)
        rows, columns = ((slice(n // 2, n // 2 + s)) for n, s in zip((h, w), self.strides[1:]))
        return frames, rows, columns

    def effective_weight(self) -> Tensor:
        """The kernel with the skip in it: [out, in, kt, kh, kw]."""
        if self.skip == "none":
            return self.weight
        share: Tensor | float = 1.0 if self.mix is None else self.mix.sigmoid()
        weight = self.weight.clone() if self.mix is None else self.weight * (1 - share)
        places = weight.diagonal()[self.window()]  # [kt, kh, kw, C], a view
        places += share / math.prod(places.shape[:3])
        return weight

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Give back the present frame (channels repeated, where there are more of them out than in)."""
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()
        if self.skip != "add":
            for first in range(0, self.out_channels, self.in_channels):
                part = self.weight[first : first + self.in_channels]
                part.diagonal()[-1, self.kernel[1] // 2, self.kernel[2] // 2] = 1

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # type: ignore[override]
        weight, kernel = self.effective_weight(), self.kernel[0]
        if kernel == 1:
            return self.convolve(x, weight)
        past = None if cache is None else cache.get(self)
        keep = kernel - self.strides[0]
        if past is None and x.shape[2] == 1:
            # One frame, an image: the kernel's slices all meet the same frame, or zeros, and one slice does.
            if cache is not None:
                cache[self] = self.before(x, keep - 1, x) if keep else x[:, :, :0].detach()
            weight = weight.sum(2, keepdim=True) if self.temporal_padding == "replicate" else weight[:, :, -1:]
            return self.convolve(x, weight)
        x = torch.cat([self.before(x, kernel - 1) if past is None else past, x], 2)
        if cache is not None:
            cache[self] = x[:, :, x.shape[2] - keep :].detach().clone()
        return self.convolve(x, weight)

    def before(self, x: Tensor, frames: int, *then: Tensor) -> Tensor:
        """What stands before the first frame of x: [B, C, frames, H, W], and `then` behind it, as a cache keeps it."""
        first = x[:, :, :1].expand(-1, -1, frames, -1, -1)
        if self.temporal_padding == "zero":
            first = torch.zeros_like(first)
        return torch.cat([first, *then], 2).detach() if then else first

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution without padding in time; two-dimensional where the kernel is, which is faster."""
        (st, sh, sw), (_, ph, pw), kernel = self.strides, self.space, weight.shape[2:]
        if kernel[0] == 1:
            flat = x.transpose(1, 2).flatten(0, 1)  # [B T, C, H, W], a view where channels are last in memory
            flat = F.conv2d(flat, weight[:, :, 0], self.bias, (sh, sw), (ph, pw), groups=self.groups)
            return flat.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        if kernel[1:] == (1, 1) and (sh, sw) == (1, 1):
            flat = F.conv2d(x.flatten(3), weight[..., 0], self.bias, (st, 1), groups=self.groups)  # [B, C, T, H W]
            return flat.unflatten(3, x.shape[3:])
        return F.conv3d(x, weight, self.bias, self.strides, self.space, groups=self.groups)


def inflate_2d(state: Mapping[str, Tensor], module: nn.Module, *, mode: str = "last") -> list[str]:
    """Load the weights of an image model into the video model of the same architecture; returns the keys it lacked.

    A kernel [O, I, kh, kw] (or [O, I, 1, kh, kw]) becomes [O, I, kt, kh, kw]: mode "last" puts it at the present frame
    and zeros elsewhere (as Open-MAGVIT2 does, Luo et al. 2024, https://arxiv.org/abs/2409.04410), "mean" spreads it
    evenly (Carreira and Zisserman 2017, https://arxiv.org/abs/1705.07750). Modules that act in time only, which an
    image model lacks, become the identity. So one frame, or a still video, gives exactly the image model's result (in
    mode "mean" and with blends or averages in time, only under padding "replicate").
    Raises: ValueError for keys that the module lacks, keys missing of what acts in space, and shapes that do not fit;
        nothing is loaded then.
    """
    if mode not in ("last", "mean"):
        raise ValueError(f"mode={mode!r} is unknown; choose last or mean")
    target = module.state_dict()
    unknown = sorted(set(state) - set(target))
    if unknown:
        raise ValueError(f"{len(unknown)} keys of the image model are not in the video model, such as {unknown[0]}")
    missing = [key for key in target if key not in state]
    begun: dict[str, Any] = {}
    for key in missing:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            owner = module.get_submodule(name)
            if getattr(owner, "temporal_only", False) and not any(k.startswith(name + ".") for k in state):
                begun[name] = owner
                break
        else:
            raise ValueError(f"{key} is missing from the image model, and acts in space: is it the same architecture?")
    filled = {}
    for key, value in state.items():
        owner = module.get_submodule(key.rpartition(".")[0])
        filled[key] = _inflate(key, value, target[key], getattr(owner, "grown", ""), mode)
    for owner in begun.values():
        owner.begin_as_identity()
    module.load_state_dict({**module.state_dict(), **filled})
    return missing


def _inflate(key: str, value: Tensor, target: Tensor, grown: str, mode: str) -> Tensor:
    """One tensor of `inflate_2d`. grown: "repeat" (channels out are copies), "bands" (new channels are zero) or ""."""
    given = tuple(value.shape)
    if target.ndim == 5:
        value = value[:, :, None] if value.ndim == 4 else value
        if value.ndim == 5 and value.shape[2] == 1 and target.shape[2] > 1:
            frames = target.shape[2]
            value = (
                value.repeat(1, 1, frames, 1, 1) / frames
                if mode == "mean"
                else F.pad(value, (0,) * 4 + (frames - 1, 0))
            )
    if value.ndim == target.ndim > 0 and value.shape != target.shape:
        if grown == "repeat" and target.shape[0] % value.shape[0] == 0:
            value = value.repeat(target.shape[0] // value.shape[0], *[1] * (value.ndim - 1))
        elif grown == "bands" and all(v <= t for v, t in zip(value.shape[:2], target.shape[:2])):
            lacking = [t - v for v, t in zip(value.shape[:2], target.shape[:2])]
            value = F.pad(value, [0, 0] * (value.ndim - len(lacking)) + [n for m in reversed(lacking) for n in (0, m)])
    if value.shape != target.shape:
        raise ValueError(f"{key} is {given} in the image model and does not inflate to {tuple(target.shape)}")
    return value.to(target)
