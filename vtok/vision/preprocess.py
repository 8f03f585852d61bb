"""What a tower does to 8-bit frames before its first layer, read off its own configuration.

Letters: M frames, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by Pillow's number
_TV_FILTERS = {"nearest": "nearest-exact", "nearest-exact": "nearest-exact", "bilinear": "bilinear"}
# image processors that override a step of the usual chain, in a way that `from_processor` follows
_KNOWN_STEPS = ("ConvNext", "DINOv3ViT", "VideoMAE", "Vivit", "Beit")
# of VLMs, whose frames are resized and normed as usual, and cut into rows of patches or views afterwards
_KNOWN_STEPS += ("Llava", "VideoLlava", "InternVL", "GotOcr2", "Qwen2VL", "Qwen3VL")


@dataclass(frozen=True)
class Preprocess:
    """What a tower does to 8-bit frames, in the order of the fields; plain values, so that they can be hashed.

    resize: (height, width), None leaves frames as they are. fit: "exact" changes the aspect; "shortest" makes the short
    edge resize[0], the long one truncated; "cover" and "contain" keep the aspect, so that the frame fills the box or
    fits in it, rounded. interpolation: antialiased when it shrinks. rounding: to 8 bits after "each" direction, width
    first, as Pillow resizes (recent ones may take a tall frame's height first: a level's difference in a tenth of the
    pixels); "once" after both, as torchvision does; "never". crop: (height, width) of the centre, filled up with
    `fill` levels; crop_rounding: "down" or "even" where the margin is odd. mean, std: of pixels in [0, 1].
    """

    resize: tuple[int, int] | None
    fit: str = "exact"
    interpolation: str = "bicubic"
    rounding: str = "each"
    crop: tuple[int, int] | None = None
    crop_rounding: str = "down"
    fill: tuple[int, ...] = (0, 0, 0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing a frame of that size."""
        if self.resize is None:
            return height, width
        if self.fit == "exact":
            return self.resize
        if self.fit == "shortest":
            edge = self.resize[0]
            return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return round(height / ratio), round(width / ratio)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that the tower sees of a frame of that size."""
        return self.crop or self.resized(height, width)

    def keeps(self, height: int, width: int) -> bool:
        """Whether the tower sees the whole of a frame of that size, with nothing beside it."""
        return self.crop is None or self.crop == self.resized(height, width)

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [M, 3, H, W] -> float32 [M, 3, h, w], normalised."""
        x = self._resize(frames, self.resized(*frames.shape[-2:])).float()
        if self.crop is not None:
            x = self._crop(x, self.crop)
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) * 255 for v in (self.mean, self.std))
        return (x - mean) / std

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if size == tuple(x.shape[-2:]):
            return x
        nearest = self.interpolation.startswith("nearest")
        how: dict[str, Any] = dict(
            mode=self.interpolation, antialias=not nearest, align_corners=None if nearest else False
        )
        if self.rounding == "once" and x.device.type == "cpu":  # torch has an 8-bit resize of its own here
            return F.interpolate(x, size=size, **how)
        x = x.float()
        steps = [(x.shape[-2], size[1]), size] if self.rounding == "each" else [size]
        for step in steps:
            x = F.interpolate(x, size=step, **how)
            x = x if self.rounding == "never" else (x + 0.5).floor().clamp(0, 255)
        return x

    def _crop(self, x: Tensor, crop: tuple[int, int]) -> Tensor:
        short = [max(0, want - have) for want, have in zip(crop, x.shape[-2:])]
        if any(short):
            fill = torch.tensor(self.fill, device=x.device, dtype=x.dtype).view(-1, 1, 1)
            pad = (short[1] // 2, (short[1] + 1) // 2, short[0] // 2, (short[0] + 1) // 2)
            x = F.pad(x - fill, pad) + fill
        margins = [(have - want) / 2 for want, have in zip(crop, x.shape[-2:])]
        top, left = (int(m) if self.crop_rounding == "down" else round(m) for m in margins)
        return x[..., top : top + crop[0], left : left + crop[1]]


def from_timm(model: Any, size: tuple[int, int] | None) -> Preprocess:
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    facts = resolve_model_data_config(model)
    filters = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
    if facts["interpolation"] not in filters:
        raise ValueError(f"interpolation {facts['interpolation']!r} of this tower is not one of {', '.join(filters)}")
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    shared: dict[str, Any] = dict(interpolation=filters[facts["interpolation"]], mean=mean, std=std)
    if size:
        return Preprocess(size, **shared)
    box = (int(facts["input_size"][1]), int(facts["input_size"][2]))
    scaled = (math.floor(box[0] / facts["crop_pct"]), math.floor(box[1] / facts["crop_pct"]))
    fits = {"squash": "exact", "border": "contain", "center": "shortest" if scaled[0] == scaled[1] else "cover"}
    fill = tuple(round(255 * value) for value in mean) if facts["crop_mode"] == "border" else (0,) * len(mean)
    fit = fits.get(facts["crop_mode"], fits["center"])
    return Preprocess(scaled, fit=fit, crop=box, crop_rounding="even", fill=fill, **shared)


def from_processor(processor: Any, size: tuple[int, int] | None, where: str) -> Preprocess:
    name = type(processor).__name__
    steps = {"resize", "_preprocess", "center_crop", "rescale", "normalize", "rescale_and_normalize"}
    for kind in type(processor).__mro__:
        if kind.__name__ in ("TorchvisionBackend", "PilBackend", "BaseImageProcessor", "BaseVideoProcessor"):
            break
        if steps & vars(kind).keys() and not name.startswith(_KNOWN_STEPS):
            raise ValueError(f"{where}: {name} preprocesses in a way of its own, which vtok does not follow")
    if getattr(processor, "do_pad", None) and not size:
        raise ValueError(f"{where}: {name} pads frames; set tower.size to the (height, width) it should see")
    resample = getattr(processor.resample, "value", processor.resample)
    mode = _FILTERS.get(resample) if isinstance(resample, int) else {**_TV_FILTERS, "bicubic": "bicubic"}.get(resample)
    if mode is None:
        raise ValueError(
            f"{where}: the resampling filter {processor.resample!r} is not one of {list(_FILTERS.values())}"
        )
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    shift = (
        1.0 if getattr(processor, "offset", name.startswith("Vivit")) else 0.0
    )  # Vivit's: [-1, 1] before its mean and std
    mean = list(processor.image_mean) if processor.do_normalize else [0.0] * 3
    std = list(processor.image_std) if processor.do_normalize else [1.0] * 3
    shared: dict[str, Any] = dict(
        interpolation=mode,
        rounding="never" if name.startswith("DINOv3ViT") else "each" if name.endswith("Pil") else "once",
        mean=tuple((m + shift) / (255 * factor) for m in mean),
        std=tuple(s / (255 * factor) for s in std),
    )
    if size:
        return Preprocess(size, **shared)
    asked = {k: v for k, v in dict(processor.size or {}).items() if v}
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    box = (int(crop["height"]), int(crop["width"])) if crop else None
    if not processor.do_resize:
        return Preprocess(None, crop=box, **shared)
    if name.startswith("ConvNext"):
        edge = int(asked["shortest_edge"])
        if edge >= 384:
            return Preprocess((edge, edge), **shared)
        scaled = int(edge / processor.crop_pct)
        return Preprocess((scaled, scaled), fit="shortest", crop=(edge, edge), **shared)
    if asked.keys() == {"shortest_edge"}:
        edge = int(asked["shortest_edge"])
        return Preprocess((edge, edge), fit="shortest", crop=box, **shared)
    if asked.keys() >= {"height", "width"}:
        return Preprocess((int(asked["height"]), int(asked["width"])), crop=box, **shared)
    raise ValueError(f"{where}: cannot resize to {asked}; set tower.size to the (height, width) it should see")
