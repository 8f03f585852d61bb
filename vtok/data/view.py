"""What the model sees of a clip: `View`, the window that is decoded, and its crop, resize and flip on uint8.

Legend: T frames, H height, W width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from vtok.data.decode import DecodeError, PastEnd, VideoReader


@dataclass(frozen=True)
class View:
    """What the model sees of a clip. num_frames frames at `fps` (None: the source's own), (height, width) pixels.

    crop: random | center | none (whole frame, aspect not kept). scale: (low, high), side of a random crop as a share of
    the largest box of the wanted aspect. hflip: probability. max_pixels: frames x height x width a clip may decode to.
    """

    num_frames: int = 16
    size: tuple[int, int] = (64, 64)
    fps: float | None = 8.0
    crop: str = "random"
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    max_pixels: int = 1 << 31

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"data.num_frames={self.num_frames} must be 1 or more")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"data.size={list(self.size)} must be [height, width] in pixels, 1 or more each")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"data.fps={self.fps} must be above 0, or null to keep the source's")
        if self.crop not in ("random", "center", "none"):
            raise ValueError(f"data.crop={self.crop!r} is not one of random, center, none")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale={list(self.scale)} must be [low, high] with 0 < low <= high <= 1")
        if self.crop != "random" and tuple(self.scale) != (1.0, 1.0):
            raise ValueError(
                f"data.scale={list(self.scale)} is for data.crop=random; with {self.crop} it must be [1, 1]"
            )
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels={self.max_pixels} must be 1 or more (frames x height x width of a clip)")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"data.hflip={self.hflip} is a probability, 0 to 1")


class ViewSettings(Protocol):
    """The keys of the `data:` node that a `View` is made of."""

    num_frames: int
    size: list[int]
    fps: float | None
    crop: str
    scale: list[float]
    hflip: float
    max_pixels: int


def view_of(settings: ViewSettings) -> View:
    """The part of the `data:` node that says what the model sees of a clip. Raises ValueError for bad values."""
    if len(settings.size) != 2 or len(settings.scale) != 2:
        raise ValueError(f"data.size={settings.size} and data.scale={settings.scale} must have two entries each")
    return View(
        num_frames=settings.num_frames,
        size=(settings.size[0], settings.size[1]),
        fps=settings.fps,
        crop=settings.crop,
        scale=(settings.scale[0], settings.scale[1]),
        hflip=settings.hflip,
        max_pixels=settings.max_pixels,
    )


def decode_view(media: bytes, view: View, rng: random.Random | None) -> tuple[Tensor, Tensor]:
    """Frames of the window uint8 [T, H, W, 3] at their native size, and times float64 [T] in the clip.

    rng: draws the start; None takes the middle. Raises DecodeError.
    """
    with VideoReader(media) as reader:
        height, width = reader.stored_size
        frames = 1 if reader.is_image else view.num_frames
        if frames * height * width > view.max_pixels:
            raise DecodeError(f"{frames}x{height}x{width} pixels are above data.max_pixels={view.max_pixels}")
        span = frames / (view.fps or reader.fps or 1.0)
        slack = max(0.0, (reader.duration_s or 0.0) - span)
        start = slack * (0.5 if rng is None else rng.random())
        try:
            return reader.window(start_s=start, num_frames=frames, fps=None if reader.is_image else view.fps)
        except PastEnd:  # the container's duration was that of a longer sound track
            return reader.window(start_s=0.0, num_frames=frames, fps=view.fps)


def fit(frames: Tensor, view: View, rng: random.Random | None) -> Tensor:
    """Cropped, resized and flipped: uint8 [T, H, W, 3] -> uint8 [3, T, *view.size].

    Bilinear with antialiasing, as one kernel on uint8 in channels-last memory (measured 7 times faster than through
    float, and equal to it within one level). rng: draws crop and flip; None takes the centre and no flip.
    """
    height, width = frames.shape[1:3]
    out_height, out_width = view.size
    box_height, box_width, top, left = height, width, 0, 0
    if view.crop != "none":
        largest = min(height / out_height, width / out_width)
        share = 1.0
        if rng is not None and view.crop == "random":
            share = rng.uniform(*view.scale)
        box_height = min(height, max(1, round(out_height * largest * share)))
        box_width = min(width, max(1, round(out_width * largest * share)))
        top, left = (height - box_height) // 2, (width - box_width) // 2
        if rng is not None and view.crop == "random":
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
    video = frames[:, top : top + box_height, left : left + box_width].permute(0, 3, 1, 2)  # [T, 3, H, W], a view
    if (box_height, box_width) != (out_height, out_width):
        video = F.interpolate(video, size=(out_height, out_width), mode="bilinear", antialias=True)
    if rng is not None and rng.random() < view.hflip:
        video = video.flip(3)
    return video.permute(1, 0, 2, 3)
