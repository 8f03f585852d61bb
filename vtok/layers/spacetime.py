"""Space-time transformer backbone: attention inside each frame, then causal attention along time at each position.

    video -- patches --> spatial blocks --> temporal blocks --> latents     (encoder)
    latents --> temporal blocks --> spatial blocks -- patches --> video     (decoder)

The first frame has an embedding and a head of its own (a patch of one frame), every later latent frame those of a patch
of `st` frames: an image is a video of one frame. Two published tokenizers are settings of these classes: OmniTokenizer
(Wang et al. 2024, https://arxiv.org/abs/2406.09399), with windows in some spatial blocks, and Phenaki's C-ViViT
(Villegas et al. 2022, https://arxiv.org/abs/2210.02399), with whole frames in all of them. A patch may be smaller than
the stride: patches are then merged between spatial blocks, which a wide stride needs (8 x 16 x 16 pixels of 3 channels
are 6144 values, and a width of 512 keeps no more than 512 of them).

Temporal attention looks back over a bounded window and knows differences of times only. So any length works, and a
stream carries the keys and values of the last `temporal_window - 1` latent frames of each temporal block, with `peg`
the last two frames that each of its convolutions saw, and nothing else. Spatial attention never leaves a frame. Norms
see one position at a time.

Letters: B clips, C channels, T frames, H height, W width in pixels; t, h, w latent grid; F frames (B x t); N sequences;
L queries, S keys; D width. In dense attention code H is the number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.causal import Cache, CausalConv3d
from vtok.layers.patch_embed import PatchEmbed, PatchHead
from vtok.layers.positions import Positions
from vtok.layers.rotary import Rotation, rotate, rotation_2d
from vtok.layers.temporal import TemporalAttention, rotations_of_times
from vtok.layers.transformer import MLP, Attention, make_norm
from vtok.layers.windows import attend, window_attend

Axes = tuple[int, int, int]  # time, height, width


@dataclass
class SpaceTimeConfig:
    width: int = 512
    num_heads: int = 8
    patch: list[int] | None = None  # (frames, height, width); None: the stride. Smaller ones are merged at an "m"
    # a letter a block: t = the whole frame, w = windows, s = windows shifted by half. m is no block: here patches are
    # merged to the stride, in the decoder split again, so that the blocks before (there: after) have a finer grid
    encoder_spatial: str = "ttww"
    encoder_temporal: int = 4  # blocks of causal attention along time
    decoder_temporal: int = 4
    decoder_spatial: str = "tttt"
    window: list[int] = field(default_factory=lambda: [8, 8])  # (height, width) of a window in patches
    temporal_window: int | None = None  # latent frames that a frame sees, itself included; None: of a trained clip
    spatial_positions: str = "rotary"  # rotary | learned (a table of `grid`, interpolated for other sizes)
    temporal_positions: str = "rotary"  # rotary | alibi
    # a depthwise convolution in front of t and temporal blocks (the frame and the two before), beside either of these
    peg: bool = False
    rotary_base: float = 100.0  # longest wavelength is about 2 pi x this, in patches or latent frames
    grid: list[int] | None = None  # (h, w) patches of a trained frame: for spatial_positions=learned only
    mlp: str = "gelu"  # gelu | swiglu
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    norm: str = "rms"  # rms | layer
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.window = list(self.window)
        self.patch = None if self.patch is None else list(self.patch)
        self.grid = None if self.grid is None else list(self.grid)
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"model.transformer.width={self.width} is not a multiple of model.transformer.num_heads="
                f"{self.num_heads}; choose widths such as {64 * max(self.num_heads, 1)}"
            )
        self._check_spatial()
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

    def _check_spatial(self) -> None:
        if self.patch is not None and (len(self.patch) != 3 or min(self.patch) < 1):
            raise ValueError(
                f"model.transformer.patch={self.patch} must be (frames, height, width), such as [4, 8, 8], or null"
            )
        for key, letters in (("encoder_spatial", self.encoder_spatial), ("decoder_spatial", self.decoder_spatial)):
            if not set(letters) <= set("twsm"):
                raise ValueError(
                    f"model.transformer.{key}={letters!r} has an unknown letter; write one letter a block: "
                    "t (whole frame), w (windows), s (shifted windows), such as ttww, and m where patches are merged"
                )
            if letters.count("m") != (self.patch is not None):
                raise ValueError(
                    f"model.transformer.{key}={letters!r} and model.transformer.patch={self.patch} do not fit: a patch "
                    "smaller than the stride needs one m in both encoder_spatial and decoder_spatial, patch=null none"
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


# -- blocks ----------------------------------------------------------------------------------------------------------


class SpaceTimeBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `attention` is a SpatialAttention or a TemporalAttention.

    peg: `place` adds what neighbours say of a place, a position encoding generator (Chu et al. 2021, CPVT,
    https://arxiv.org/abs/2102.10882), here over time as well and never ahead. It begins as nothing: images train only
    the present slice of its kernels, and a video model that goes on from them begins as that image model in each frame.
    """

    def __init__(self, attention: Attention, config: SpaceTimeConfig, *, peg: bool = False):
        super().__init__()
        self.peg = None
        if peg:
            self.peg = CausalConv3d(config.width, config.width, padding="zero", groups=config.width)
            for parameter in self.peg.parameters():
                nn.init.zeros_(parameter)
        self.norm1 = make_norm(config.norm, config.width)
        self.attention = attention
        self.norm2 = make_norm(config.norm, config.width)
        self.mlp = MLP(config.width, ratio=config.mlp_ratio, kind=config.mlp)

    def place(self, x: Tensor, cache: Cache | None) -> Tensor:
        """[B, t, h, w, D] -> the same shape."""
        return x if self.peg is None else x + self.peg(x.movedim(-1, 1), cache).movedim(1, -1)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


class SpaceTimeBlocks(nn.Module):
    """Spatial blocks then temporal ones (`decoder`: the other way round) and a norm, on [B, t, h, w, D].

    Where `spatial` has an m, `merge` patches become one (in a decoder, one becomes `merge`); temporal blocks are always
    on the merged side. Initialised as vtok.layers.transformer.Transformer is.
    """

    def __init__(
        self,
        config: SpaceTimeConfig,
        spatial: str,
        temporal: int,
        *,
        window: int,
        merge: Axes,
        decoder: bool,
    ):
        super().__init__()
        width, heads, qk_norm = config.width, config.num_heads, config.qk_norm
        high, wide = config.window
        self.spatial, self.temporal = nn.ModuleList(), nn.ModuleList()
        for letter in spatial:
            if letter == "m":
                split = PatchHead(width, width, stride=merge, std=width**-0.5)
                self.spatial.append(split if decoder else PatchEmbed(width, width, stride=merge))
                continue
            area = None if letter == "t" else (high, wide)
            attention = SpatialAttention(width, heads, window=area, shifted=letter == "s", qk_norm=qk_norm)
            self.spatial.append(SpaceTimeBlock(attention, config, peg=config.peg and letter == "t"))
        for _ in range(temporal):
            alibi = config.temporal_positions == "alibi"
            attention = TemporalAttention(width, heads, window=window, alibi=alibi, qk_norm=qk_norm)
            self.temporal.append(SpaceTimeBlock(attention, config, peg=config.peg))
        self.norm = make_norm(config.norm, width)
        self.places = Positions(width, (1, config.grid[0], config.grid[1])) if config.grid else None
        self.rotary_space = config.spatial_positions == "rotary"
        self.rotary_time = config.temporal_positions == "rotary"
        self.base, self.head, self.window = config.rotary_base, width // heads, window
        self.decoder, self.checkpoint = decoder, config.checkpoint
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        blocks = [block for block in [*self.spatial, *self.temporal] if isinstance(block, SpaceTimeBlock)]
        for block in blocks:
            for out in (block.attention.out, block.mlp.down):
                out.weight.data.div_((2 * len(blocks)) ** 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None, *, first: bool = True) -> Tensor:
        """first: x begins with a video's first frame."""
        if self.places is not None:
            height, width = x.shape[2:4]
            x = x + self.places((1, height, width)).view(height, width, -1).to(x.dtype)
        if self.decoder:
            return self.norm(self._space(self._time(x, cache), cache, first=first))
        return self.norm(self._time(self._space(x, cache, first=first), cache))

    def _space(self, x: Tensor, cache: Cache | None, *, first: bool) -> Tensor:
        turns = self._turns(x)
        for block in self.spatial:
            if isinstance(block, PatchEmbed):
                x = block(rearrange(x, "B t h w D -> B D t h w"), first=first)
                turns = self._turns(x)
            elif isinstance(block, PatchHead):
                x = rearrange(block(x, first=first), "B D t h w -> B t h w D")
                turns = self._turns(x)
            else:
                assert isinstance(block, SpaceTimeBlock)
                x = block.place(x, cache)
                x = self._run(block, x.flatten(0, 1), turns).unflatten(0, x.shape[:2])
        return x

    def _turns(self, x: Tensor) -> Rotation | None:
        """Rotations of the patches of a frame of x [B, t, h, w, D]."""
        if not self.rotary_space:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotation_2d((x.shape[2], x.shape[3]), self.head, base=self.base, device=x.device, dtype=wide)

    def _time(self, x: Tensor, cache: Cache | None) -> Tensor:
        batch, frames, height, width, _ = x.shape
        turns = None
        if self.rotary_time:
            turns = rotations_of_times(frames, self.window, self.head, like=x, base=self.base)
        tokens = x.permute(0, 2, 3, 1, 4)  # [B, h, w, t, D]
        for block in self.temporal:
            assert isinstance(block, SpaceTimeBlock)
            if block.peg is not None:
                tokens = block.place(tokens.permute(0, 3, 1, 2, 4), cache).permute(0, 2, 3, 1, 4)
            flat = tokens.flatten(0, 2)
            flat = self._run(block, flat, turns) if cache is None else block(flat, turns, cache)
            tokens = flat.view(batch, height, width, frames, -1)
        return tokens.permute(0, 3, 1, 2, 4)

    def _run(self, block: nn.Module, x: Tensor, turns: Rotation | None) -> Tensor:
        if self.checkpoint and self.training:
            out = torch.utils.checkpoint.checkpoint(block, x, turns, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return block(x, turns)


def trained_window(config: SpaceTimeConfig, *, num_frames: int, stride: Axes) -> int:
    """Latent frames that temporal attention sees: `temporal_window`, or those of a trained clip of `num_frames`."""
    if config.temporal_window is not None:
        return config.temporal_window
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1, or set model.transformer.temporal_window")
    return 1 + -(-(num_frames - 1) // stride[0])


def patch_and_merge(config: SpaceTimeConfig, *, stride: Axes) -> tuple[Axes, Axes]:
    """(frames, height, width) of a patch, and how many patches are merged along each: their products are the stride."""
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride={stride} must be (frames, height, width), each at least 1, such as (4, 8, 8)")
    patch = config.patch or stride
    if any(whole % part for whole, part in zip(stride, patch)):
        raise ValueError(
            f"model.transformer.patch={config.patch} does not divide the compression {tuple(stride)}; choose divisors, "
            "or null for patches of that size"
        )
    merge = [whole // part for whole, part in zip(stride, patch)]
    return (patch[0], patch[1], patch[2]), (merge[0], merge[1], merge[2])


# -- backbones -------------------------------------------------------------------------------------------------------


class SpaceTimeEncoder(nn.Module):
    """Video [B, C, T, H, W] in [-1, 1] -> latents [B, latent_channels, t, h, w].

    Args:
        channels: C. stride: (st, sh, sw), the whole compression. latent_channels: channels of a latent.
        num_frames: T of a trained clip; sets the temporal window where the config leaves it open.
    """

    def __init__(
        self,
        config: SpaceTimeConfig,
        *,
        latent_channels: int,
        stride: Axes,
        channels: int = 3,
        num_frames: int = 17,
    ):
        super().__init__()
        patch, merge = patch_and_merge(config, stride=stride)
        self.stride, self.channels, self.latent_channels = stride, channels, latent_channels
        window = trained_window(config, num_frames=num_frames, stride=stride)
        self.embed = PatchEmbed(channels, config.width, stride=patch)
        self.blocks = SpaceTimeBlocks(
            config, config.encoder_spatial, config.encoder_temporal, window=window, merge=merge, decoder=False
        )
        self.latent = nn.Linear(config.width, latent_channels)

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
        out = self.blocks(self.embed(x, first=first), cache, first=first)
        return rearrange(self.latent(out), "B t h w Z -> B Z t h w")

    def inflate(self) -> None:
        """Later frames get the first frame's weights (PatchEmbed.inflate): from a model of images to one of videos."""
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                module.inflate()


class SpaceTimeDecoder(nn.Module):
    """Latents [B, latent_channels, t, h, w] -> video [B, C, T, H, W], not clamped. Arguments as SpaceTimeEncoder's."""

    def __init__(
        self,
        config: SpaceTimeConfig,
        *,
        latent_channels: int,
        stride: Axes,
        channels: int = 3,
        num_frames: int = 17,
    ):
        super().__init__()
        patch, merge = patch_and_merge(config, stride=stride)
        self.stride, self.channels, self.latent_channels = stride, channels, latent_channels
        window = trained_window(config, num_frames=num_frames, stride=stride)
        self.latent = nn.Linear(latent_channels, config.width)
        self.blocks = SpaceTimeBlocks(
            config, config.decoder_spatial, config.decoder_temporal, window=window, merge=merge, decoder=True
        )
        self.head = PatchHead(config.width, channels, stride=patch)

    @property
    def last(self) -> nn.Parameter:
        """Weight of the output layer, of both branches: an image gives it a gradient as a video does."""
        return self.head.weight

    def forward(self, z: Tensor, cache: Cache | None = None) -> Tensor:
        """Pixels of a whole video: 1 + st (t - 1) frames; st t where a stream goes on. `cache` as the encoder's."""
        first = cache is None or self not in cache
        if z.ndim != 5 or z.shape[1] != self.latent_channels or not z.numel():
            raise ValueError(f"latents have shape {list(z.shape)}, expected [B, {self.latent_channels}, t >= 1, h, w]")
        _begin(self, cache, (z.shape[0], z.shape[3], z.shape[4]))
        x = self.blocks(self.latent(rearrange(z, "B D t h w -> B t h w D")), cache, first=first)
        return self.head(x, first=first)

    def inflate(self) -> None:
        """Later frames get the first frame's weights (PatchHead.inflate): from a model of images to one of videos."""
        for module in self.modules():
            if isinstance(module, PatchHead):
                module.inflate()


def _begin(module: nn.Module, cache: Cache | None, shape: tuple[int, int, int]) -> None:
    """Note in the cache that a stream of clips and latent grid (B, h, w) has begun, or check that it still is one."""
    if cache is not None and cache.setdefault(module, shape) != shape:
        raise ValueError(
            f"the stream began with (clips, h, w) = {cache[module]} and goes on with {shape}; begin another with {{}}"
        )
