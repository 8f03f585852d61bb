"""Space-time transformer backbone: attention inside each frame, then causal attention along time at each position.

    video -- patches --> spatial blocks --> temporal blocks --> latents     (encoder)
    latents --> temporal blocks --> spatial blocks -- patches --> video     (decoder)

The first frame has an embedding and a head of its own (a patch of one frame), every later latent frame those of a patch
of `st` frames: an image is a video of one frame. Both presets are settings of the same two classes: OmniTokenizer
(Wang et al. 2024, https://arxiv.org/abs/2406.09399), with windows in some spatial blocks, and Phenaki's C-ViViT
(Villegas et al. 2022, https://arxiv.org/abs/2210.02399), with whole frames in all of them.

Temporal attention looks back over a bounded window and knows differences of times only. So any length works, and a
stream carries the keys and values of the last `temporal_window - 1` latent frames of each temporal block and nothing
else. Spatial attention never leaves a frame. Norms see one position at a time.

Letters: B clips, C channels, T frames, H height, W width in pixels; t, h, w latent grid; F frames (B x t); N sequences;
L queries, S keys; D width. In dense attention code H is the number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.positions import Positions
from vtok.layers.rotary import Rotation, rotate, rotation, rotation_2d
from vtok.layers.transformer import MLP, Attention, make_norm
from vtok.layers.windows import alibi_slopes, attend, causal_window_attend, window_attend

Cache = dict[nn.Module, Any]  # what each causal module keeps of the past, keyed by the module itself


@dataclass
class SpaceTimeConfig:
    width: int = 512
    num_heads: int = 8
    encoder_spatial: str = "ttww"  # a letter a block: t = the whole frame, w = windows, s = windows shifted by half
    encoder_temporal: int = 4  # blocks of causal attention along time
    decoder_temporal: int = 4
    decoder_spatial: str = "tttt"
    window: list[int] = field(default_factory=lambda: [8, 8])  # (height, width) of a window in patches
    temporal_window: int | None = (
        None  # latent frames a frame looks at, itself included; None: as many as a trained clip
    )
    spatial_positions: str = "rotary"  # rotary | learned (a table of `grid`, interpolated for other sizes)
    temporal_positions: str = "rotary"  # rotary | alibi
    rotary_base: float = 100.0  # longest wavelength is about 2 pi x this, in patches or latent frames
    grid: list[int] | None = None  # (h, w) patches of a trained frame: for spatial_positions=learned only
    mlp: str = "gelu"  # gelu | swiglu
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    norm: str = "rms"  # rms | layer
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.window = list(self.window)
        self.grid = None if self.grid is None else list(self.grid)
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"model.transformer.width={self.width} is not a multiple of model.transformer.num_heads="
                f"{self.num_heads}; choose widths such as {64 * max(self.num_heads, 1)}"
            )
        for key, letters in (("encoder_spatial", self.encoder_spatial), ("decoder_spatial", self.decoder_spatial)):
            if not set(letters) <= set("tws"):
                raise ValueError(
                    f"model.transformer.{key}={letters!r} has an unknown letter; write one letter a block: "
                    "t (whole frame), w (windows), s (shifted windows), such as ttww"
                )
        for key, depth in (("encoder_temporal", self.encoder_temporal), ("decoder_temporal", self.decoder_temporal)):
            if depth < 0:
                raise ValueError(f"model.transformer.{key}={depth} must be 0 or more blocks")
        if len(self.window) != 2 or min(self.window) < 1:
            raise ValueError(
                f"model.transformer.window={self.window} must be (height, width) in patches, such as [8, 8]"
            )
        if self.temporal_window is not None and self.temporal_window < 1:
            raise ValueError(
                f"model.transformer.temporal_window={self.temporal_window} must be at least 1 latent frame (the frame "
                "itself), or null for as many as a trained clip has"
            )
        self._check_positions()
        if self.mlp not in ("gelu", "swiglu"):
            raise ValueError(f"model.transformer.mlp={self.mlp!r} is unknown; choose gelu or swiglu")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"model.transformer.norm={self.norm!r} is unknown; choose rms or layer")
        if int(self.width * self.mlp_ratio * 2 / 3) < 1:
            raise ValueError(
                f"model.transformer.mlp_ratio={self.mlp_ratio} leaves no hidden unit at width {self.width}; "
                "4.0 is usual"
            )

    def _check_positions(self) -> None:
        head = self.width // self.num_heads
        if self.spatial_positions not in ("rotary", "learned"):
            raise ValueError(
                f"model.transformer.spatial_positions={self.spatial_positions!r} is unknown; choose rotary or learned"
            )
        if self.temporal_positions not in ("rotary", "alibi"):
            raise ValueError(
                f"model.transformer.temporal_positions={self.temporal_positions!r} is unknown; choose rotary or alibi"
            )
        for key, kind, of in (
            ("spatial_positions", self.spatial_positions, 4),
            ("temporal_positions", self.temporal_positions, 2),
        ):
            if kind == "rotary" and head % of:
                raise ValueError(
                    f"model.transformer.{key}=rotary needs heads of a multiple of {of} channels, and width / num_heads "
                    f"= {self.width} / {self.num_heads} = {head}; change one of the three"
                )
        if self.rotary_base <= 1:
            raise ValueError(f"model.transformer.rotary_base={self.rotary_base} must be more than 1, such as 100")
        if (self.spatial_positions == "learned") != (self.grid is not None):
            raise ValueError(
                f"model.transformer.grid={self.grid} does not fit model.transformer.spatial_positions="
                f"{self.spatial_positions!r}: learned positions need grid = (h, w) patches of a trained frame, rotary "
                "ones take none"
            )
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"model.transformer.grid={self.grid} must be (h, w) in patches, such as [16, 16]")


# -- attention -------------------------------------------------------------------------------------------------------


class SpatialAttention(Attention):
    """Attention between the patches of a frame, all of them or those of a window: [F, h, w, D] -> [F, h, w, D]."""

    def __init__(
        self, width: int, num_heads: int, *, window: tuple[int, int] | None, shifted: bool = False, qk_norm: bool = True
    ):
        super().__init__(width, num_heads, qk_norm=qk_norm)
        self.window, self.shifted = window, shifted

    def forward(self, x: Tensor, places: Rotation | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grid = x.shape[1:3]
        q_FHND, k_FHND, v_FHND = rearrange(
            self.qkv(x), "F h w (three H D) -> three F H (h w) D", three=3, H=self.num_heads
        )
        q_FHND, k_FHND = self.q_norm(q_FHND), self.k_norm(k_FHND)
        if places is not None:
            q_FHND, k_FHND = rotate(q_FHND, places), rotate(k_FHND, places)
        q_FHND, k_FHND = q_FHND.to(v_FHND.dtype), k_FHND.to(v_FHND.dtype)
        if self.window is None:
            out = attend(q_FHND, k_FHND, v_FHND).unflatten(2, grid)
        else:
            parts = (part.unflatten(2, grid) for part in (q_FHND, k_FHND, v_FHND))
            out = window_attend(*parts, window=self.window, shifted=self.shifted)
        return self.out(rearrange(out, "F H h w D -> F h w (H D)"))


class TemporalAttention(Attention):
    """Causal attention along time at each position: [N, t, D] -> [N, t, D].

    Its cache holds the keys, not yet turned, and the values of the last window - 1 latent frames: [2, N, H, window - 1
    or fewer, D]. Keys are turned at every call by their distance from the newest frame: nothing counts up in a stream.
    """

    def __init__(self, width: int, num_heads: int, *, window: int, alibi: bool, qk_norm: bool = True):
        super().__init__(width, num_heads, qk_norm=qk_norm)
        self.window, self.alibi = window, alibi

    def forward(self, x: Tensor, times: Rotation | None, cache: Cache | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        new = x.shape[1]
        q_NHLD, k_NHSD, v_NHSD = rearrange(self.qkv(x), "N t (three H D) -> three N H t D", three=3, H=self.num_heads)
        q_NHLD, k_NHSD = self.q_norm(q_NHLD).to(v_NHSD.dtype), self.k_norm(k_NHSD).to(v_NHSD.dtype)
        if cache is not None:
            past = cache.get(self)
            if past is not None:
                k_NHSD, v_NHSD = torch.cat([past[0], k_NHSD], 2), torch.cat([past[1], v_NHSD], 2)
            kept = max(k_NHSD.shape[2] - self.window + 1, 0)
            cache[self] = torch.stack([k_NHSD[:, :, kept:], v_NHSD[:, :, kept:]])
        if times is not None:
            seen = k_NHSD.shape[2]
            k_NHSD = rotate(k_NHSD, (times[0][-seen:], times[1][-seen:])).to(v_NHSD.dtype)
            q_NHLD = rotate(q_NHLD, (times[0][-new:], times[1][-new:])).to(v_NHSD.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        slopes = alibi_slopes(self.num_heads, device=x.device, dtype=wide) if self.alibi else None
        out = causal_window_attend(q_NHLD, k_NHSD, v_NHSD, window=self.window, slopes=slopes)
        return self.out(rearrange(out, "N H t D -> N t (H D)"))


# -- blocks ----------------------------------------------------------------------------------------------------------


class SpaceTimeBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `attention` is a SpatialAttention or a TemporalAttention."""

    def __init__(self, attention: Attention, config: SpaceTimeConfig):
        super().__init__()
        self.norm1 = make_norm(config.norm, config.width)
        self.attention = attention
        self.norm2 = make_norm(config.norm, config.width)
        self.mlp = MLP(config.width, ratio=config.mlp_ratio, kind=config.mlp)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


class SpaceTimeBlocks(nn.Module):
    """Spatial blocks then temporal ones (`time_first`: the other way round) and a norm: [B, t, h, w, D], same shape.

    Initialised as vtok.layers.transformer.Transformer is.
    """

    def __init__(self, config: SpaceTimeConfig, *, spatial: str, temporal: int, window: int, time_first: bool):
        super().__init__()
        heads, qk_norm = config.num_heads, config.qk_norm
        high, wide = config.window
        self.spatial, self.temporal = nn.ModuleList(), nn.ModuleList()
        for letter in spatial:
            area = None if letter == "t" else (high, wide)
            attention = SpatialAttention(config.width, heads, window=area, shifted=letter == "s", qk_norm=qk_norm)
            self.spatial.append(SpaceTimeBlock(attention, config))
        for _ in range(temporal):
            alibi = config.temporal_positions == "alibi"
            attention = TemporalAttention(config.width, heads, window=window, alibi=alibi, qk_norm=qk_norm)
            self.temporal.append(SpaceTimeBlock(attention, config))
        self.norm = make_norm(config.norm, config.width)
        self.places = Positions(config.width, (1, config.grid[0], config.grid[1])) if config.grid else None
        self.rotary_space = config.spatial_positions == "rotary"
        self.rotary_time = config.temporal_positions == "rotary"
        self.base, self.head, self.window = config.rotary_base, config.width // heads, window
        self.time_first, self.checkpoint = time_first, config.checkpoint
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in [*self.spatial, *self.temporal]:
            assert isinstance(block, SpaceTimeBlock)
            for out in (block.attention.out, block.mlp.down):
                out.weight.data.div_((2 * max(len(spatial) + temporal, 1)) ** 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if self.places is not None:
            height, width = x.shape[2:4]
            x = x + self.places((1, height, width)).view(height, width, -1).to(x.dtype)
        if self.time_first:
            x = self._space(self._time(x, cache))
        else:
            x = self._time(self._space(x), cache)
        return self.norm(x)

    def _space(self, x: Tensor) -> Tensor:
        batch, frames, height, width, _ = x.shape
        turns = None
        if self.rotary_space:
            wide = torch.promote_types(x.dtype, torch.float32)
            turns = rotation_2d((height, width), self.head, base=self.base, device=x.device, dtype=wide)
        x = x.flatten(0, 1)
        for block in self.spatial:
            x = self._run(block, x, turns)
        return x.unflatten(0, (batch, frames))

    def _time(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, frames, height, width, _ = x.shape
        turns = None
        if self.rotary_time:
            wide = torch.promote_types(x.dtype, torch.float32)
            times = torch.arange(1 - self.window - frames, 0, device=x.device, dtype=wide) + 1  # the newest frame is 0
            turns = rotation(times, self.head, base=self.base)
        x = rearrange(x, "B t h w D -> (B h w) t D")
        for block in self.temporal:
            x = self._run(block, x, turns) if cache is None else block(x, turns, cache)
        return rearrange(x, "(B h w) t D -> B t h w D", B=batch, h=height, w=width)

    def _run(self, block: nn.Module, x: Tensor, turns: Rotation | None) -> Tensor:
        if self.checkpoint and self.training:
            out = torch.utils.checkpoint.checkpoint(block, x, turns, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return block(x, turns)


# -- patches ---------------------------------------------------------------------------------------------------------


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

    def __init__(self, width: int, channels: int, *, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        st, sh, sw = stride
        self.split = channels * sh * sw if st > 1 else 0  # rows of the first frame
        self.weight = nn.Parameter(torch.empty(self.split + channels * st * sh * sw, width))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        nn.init.trunc_normal_(self.weight, std=0.02)

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


def trained_window(config: SpaceTimeConfig, *, num_frames: int, stride: tuple[int, int, int]) -> int:
    """Latent frames that temporal attention sees: `temporal_window`, or those of a trained clip of `num_frames`."""
    if config.temporal_window is not None:
        return config.temporal_window
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1, or set model.transformer.temporal_window")
    return 1 + -(-(num_frames - 1) // stride[0])


def _check_stride(stride: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride={stride} must be (frames, height, width), each at least 1, such as (4, 8, 8)")
    return stride[0], stride[1], stride[2]


# -- backbones -------------------------------------------------------------------------------------------------------


class SpaceTimeEncoder(nn.Module):
    """Video [B, C, T, H, W] in [-1, 1] -> latents [B, latent_dim, t, h, w].

    Args:
        channels: C. stride: (st, sh, sw), the patch and so the whole compression. latent_dim: channels of a latent.
        num_frames: T of a trained clip; sets the temporal window where the config leaves it open.
    """

    def __init__(
        self,
        config: SpaceTimeConfig,
        *,
        latent_dim: int,
        stride: tuple[int, int, int],
        channels: int = 3,
        num_frames: int = 17,
    ):
        super().__init__()
        self.stride, self.channels, self.latent_dim = _check_stride(stride), channels, latent_dim
        window = trained_window(config, num_frames=num_frames, stride=self.stride)
        self.embed = PatchEmbed(channels, config.width, stride=self.stride)
        self.blocks = SpaceTimeBlocks(
            config, spatial=config.encoder_spatial, temporal=config.encoder_temporal, window=window, time_first=False
        )
        self.latent = nn.Linear(config.width, latent_dim)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Latents of a whole video (cache None), of its beginning ({}), or of what follows (the same cache again).

        Args:
            x: H, W multiples of (sh, sw); T = 1 + st n where a video begins, T = st n, n >= 1, where it goes on.
            cache: filled with what the next call needs; its size does not grow once temporal_window frames are seen.
        """
        first = cache is None or self not in cache
        st, sh, sw = self.stride
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f"video has shape {list(x.shape)}, expected [B, {self.channels}, T, H, W]")
        frames, height, width = x.shape[2:]
        if height % sh or width % sw or not height or not width:
            raise ValueError(f"a video of {height} x {width} pixels must be padded to multiples of {sh} x {sw}")
        if frames < 1 or (frames - first) % st:
            rule = f"1 + {st} n" if first else f"{st} n, n >= 1, where a stream goes on"
            raise ValueError(f"{frames} frames given, expected {rule}: pad by repeating the last frame")
        _begin(self, cache, (x.shape[0], height // sh, width // sw))
        out = self.blocks(self.embed(x, first=first), cache)
        return rearrange(self.latent(out), "B t h w Z -> B Z t h w")

    def inflate(self) -> None:
        """Later frames get the first frame's weights (PatchEmbed.inflate): from a model of images to one of videos."""
        self.embed.inflate()


class SpaceTimeDecoder(nn.Module):
    """Latents [B, latent_dim, t, h, w] -> video [B, C, T, H, W], not clamped. Arguments as SpaceTimeEncoder's."""

    def __init__(
        self,
        config: SpaceTimeConfig,
        *,
        latent_dim: int,
        stride: tuple[int, int, int],
        channels: int = 3,
        num_frames: int = 17,
    ):
        super().__init__()
        self.stride, self.channels, self.latent_dim = _check_stride(stride), channels, latent_dim
        window = trained_window(config, num_frames=num_frames, stride=self.stride)
        self.latent = nn.Linear(latent_dim, config.width)
        self.blocks = SpaceTimeBlocks(
            config, spatial=config.decoder_spatial, temporal=config.decoder_temporal, window=window, time_first=True
        )
        self.head = PatchHead(config.width, channels, stride=self.stride)

    @property
    def last(self) -> nn.Parameter:
        """Weight of the output layer, of both branches: an image gives it a gradient as a video does."""
        return self.head.weight

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels of a whole video: 1 + st (t - 1) frames; st t where a stream goes on. `cache` as the encoder's."""
        first = cache is None or self not in cache
        if z.ndim != 5 or z.shape[1] != self.latent_dim or not z.numel():
            raise ValueError(f"latents have shape {list(z.shape)}, expected [B, {self.latent_dim}, t >= 1, h, w]")
        _begin(self, cache, (z.shape[0], z.shape[3], z.shape[4]))
        x = self.blocks(self.latent(rearrange(z, "B D t h w -> B t h w D")), cache)
        return self.head(x, first=first)

    def inflate(self) -> None:
        """Later frames get the first frame's weights (PatchHead.inflate): from a model of images to one of videos."""
        self.head.inflate()


def _begin(module: nn.Module, cache: Cache | None, shape: tuple[int, int, int]) -> None:
    """Note in the cache that a stream of clips and latent grid (B, h, w) has begun, or check that it still is one."""
    if cache is not None and cache.setdefault(module, shape) != shape:
        raise ValueError(
            f"the stream began with (clips, h, w) = {cache[module]} and goes on with {shape}; begin another with {{}}"
        )
