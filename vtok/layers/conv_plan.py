"""The settings of a causal convolutional backbone, and how they share out its stride over the levels.

Letters: (st, sh, sw) stride in frames, rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vtok.layers.causal import Axes, check_padding

CHOICES = {
    "conv": ("full", "factorised", "separate"),
    "sampling": ("separate", "joint"),
    "sampling_kernel": ("conv", "time"),
    "spatial_down": ("strided", "residual"),
    "temporal_down": ("strided", "blend", "residual"),
    "spatial_up": ("interpolate", "residual", "depth_to_space"),
    "temporal_up": ("interpolate", "blend", "residual", "depth_to_space"),
    "patch": ("none", "haar"),
    "attention": ("none", "spatial", "spatial_temporal"),
    "norm": ("layer", "rms"),
}
SKIPS = {"strided": "none", "interpolate": "none", "depth_to_space": "none", "blend": "blend", "residual": "add"}


@dataclass
class ConvConfig:
    """A causal convolutional backbone. The defaults are VidTok's."""

    width: int = 128  # channels of the first level
    mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # channels of each level, in widths
    num_res_blocks: int = 2  # of each encoder level
    decoder_res_blocks: int | None = None  # of each decoder level; empty: num_res_blocks + 1
    mid_blocks: int = 2  # residual blocks at the lowest resolution; attention stands behind the first of them
    conv: str = "separate"  # full (3x3x3) | factorised (1x3x3, then 3x1x1) | separate (a block of space, one of time)
    temporal_kernel: int = 3  # frames a convolution sees; 1: an image model, every frame for itself
    temporal_padding: str = "replicate"  # replicate | zero: what stands before the first frame
    sampling: str = "separate"  # separate (space, then time) | joint (one convolution for both)
    # of convolutions that halve or double time alone: conv (3x3x3, or 3x1x1 where conv is factorised) | time (3x1x1)
    sampling_kernel: str = "conv"
    spatial_down: str = "strided"  # strided | residual (plus average pooling)
    temporal_down: str = "blend"  # strided | blend (learned, of strided convolution and average) | residual
    spatial_up: str = (
        "interpolate"  # interpolate (nearest, then a convolution) | residual (plus nearest) | depth_to_space
    )
    halve_up: bool = False  # the convolution behind a doubling of space gives half the channels
    first_fine: bool = False  # the first frame has four times the places: the last halving leaves it out (OneVAE)
    temporal_up: str = "blend"  # interpolate | blend (learned, of convolution and nearest) | residual | depth_to_space
    temporal_levels: list[int] | None = None  # levels behind which time is halved; empty: the last ones possible
    decoder_temporal_levels: list[int] | None = None  # levels before which time is doubled; empty: temporal_levels
    patch: str = "none"  # none | haar (wavelet bands of blocks of patch_size in time, height and width)
    patch_size: int = 4
    attention: str = (
        "spatial"  # none | spatial (inside a frame) | spatial_temporal (and over past frames), in the middle
    )
    num_heads: int = 8
    qk_norm: bool = True  # queries and keys are RMS-normalised per head, which keeps bfloat16 stable
    temporal_window: int = 16  # latent frames that temporal attention sees, the present one included
    norm: str = "layer"  # layer | rms, both over channels at each position
    adaptive_norm: bool = False  # the decoder's levels are scaled and shifted by the code at each position
    dropout: float = 0.0
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.mult = list(self.mult)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"model.conv.{name}={value!r} is unknown; choose {', '.join(choices)}")
        check_padding(self.temporal_padding)
        counts = ("width", "num_res_blocks", "decoder_res_blocks", "mid_blocks", "temporal_kernel", "patch_size")
        for name in (*counts, "num_heads", "temporal_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.conv.{name}={value} must be at least 1")
        default = type(self)
        if self.patch == "none" and self.patch_size != default.patch_size:
            raise ValueError(f"model.conv.patch_size={self.patch_size} needs patch=haar: leave it out, or set that")
        if self.attention != "spatial_temporal" and self.temporal_window != default.temporal_window:
            raise ValueError(
                f"model.conv.temporal_window={self.temporal_window} needs attention=spatial_temporal, not "
                f"{self.attention}: leave it out, or set that"
            )
        if not self.mult or min(self.mult) < 1:
            raise ValueError(f"model.conv.mult={self.mult} must hold a positive number for each level")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.conv.dropout={self.dropout} must be in [0, 1)")
        if self.attention != "none" and self.width * self.mult[-1] % self.num_heads:
            raise ValueError(
                f"model.conv.num_heads={self.num_heads} does not divide width x mult[-1] = {self.width * self.mult[-1]}"
            )
        if self.sampling == "joint" and (self.halve_up or self.first_fine or self.sampling_kernel == "time"):
            raise ValueError(
                f"model.conv.halve_up={self.halve_up}, first_fine={self.first_fine}, sampling_kernel="
                f"{self.sampling_kernel} are for convolutions of space and time apart: set sampling=separate"
            )
        if self.halve_up and (self.spatial_up == "residual" or any(m * self.width % 2 for m in self.mult)):
            raise ValueError(
                f"model.conv.halve_up=true needs even channels and spatial_up=interpolate or depth_to_space, not "
                f"width={self.width}, mult={self.mult}, spatial_up={self.spatial_up}"
            )
        if self.first_fine and self.adaptive_norm:
            raise ValueError(
                "model.conv.first_fine=true has codes of two grids, which adaptive_norm=true cannot follow: set one"
            )
        pairs = (self.temporal_down, self.spatial_down), (self.temporal_up, self.spatial_up)
        if self.sampling == "joint" and any(time != space for time, space in pairs):
            raise ValueError(
                "model.conv.sampling=joint is one convolution over space and time: set temporal_down like "
                f"spatial_down={self.spatial_down} and temporal_up like spatial_up={self.spatial_up}"
            )


def sampling_plan(config: ConvConfig, stride: Axes) -> tuple[Axes, list[Axes], list[Axes]]:
    """How a total stride is shared out: (Haar block, factors behind each level, the same for the decoder).

    Space is halved behind the first levels, time behind the last ones or behind `temporal_levels`; entry i of the lists
    lies between levels i and i + 1.
    Raises: ValueError if strides are no powers of two or the levels are too few for them.
    """
    if len(stride) != 3 or any(n < 1 or n & (n - 1) for n in stride):
        raise ValueError(
            f"model.stride={list(stride)} must be three powers of two (frames, height, width), such as 4 x 8 x 8"
        )
    size = config.patch_size if config.patch == "haar" else 1
    patch: Axes = (min(size, stride[0]), min(size, stride[1]), min(size, stride[2]))
    times, rows, columns = ((n // p).bit_length() - 1 for n, p in zip(stride, patch))
    gaps = len(config.mult) - 1
    if max(times, rows, columns) > gaps:
        raise ValueError(
            f"model.stride={list(stride)} halves {max(times, rows, columns)} times after a patch of {patch}, but "
            f"model.conv.mult={config.mult} has room for {gaps}, between its levels; give mult more entries"
        )
    if times and config.temporal_kernel < 2:
        raise ValueError(
            f"model.conv.temporal_kernel=1 cannot halve time, which model.stride={list(stride)} asks for; choose 3"
        )

    def halving(levels: list[int] | None, name: str) -> set[int]:
        chosen = list(range(gaps - times, gaps)) if levels is None else list(levels)
        if len(chosen) != times or len(set(chosen)) != times or not set(chosen) <= set(range(gaps)):
            raise ValueError(
                f"model.conv.{name}={chosen} must be {times} different levels below {gaps}, one for each halving of "
                f"time that model.stride={list(stride)} needs after a patch of {patch}"
            )
        return set(chosen)

    if config.first_fine and (not gaps or min(rows, columns) < gaps):
        raise ValueError(
            f"model.conv.first_fine=true leaves the first frame out of the last halving of space, and "
            f"mult={config.mult} has none behind its last level but one at model.stride={list(stride)} after a patch "
            f"of {patch}: give mult fewer entries"
        )
    encoder = halving(config.temporal_levels, "temporal_levels")
    given = config.decoder_temporal_levels
    decoder = encoder if given is None else halving(given, "decoder_temporal_levels")
    factors = [
        [(1 + (i in levels), 1 + (i < rows), 1 + (i < columns)) for i in range(gaps)] for levels in (encoder, decoder)
    ]
    return patch, factors[0], factors[1]
