"""What the model sees of a clip: `View`, the window that is decoded, and its crop, resize and flip.

Legend: T frames, H height, W width, C channels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from vtok.data.decode import DecodeError, PastEnd, VideoReader
from vtok.data.maps import HEAD_BYTES, MapError, read_header, window_of_map
from vtok.data.sources import MEDIA

FEATURES = "features.safetensors"  # member of a sample that holds a tower's features
HEARD = "audio.safetensors"  # member that holds an audio tower's, of clips with a sound
TEXT = "txt"  # member that holds a text


@dataclass(frozen=True)
class Cached:
    """That a tower's features are read in place of pixels.

    name: of the tower, the key in `Clip.features`. window: frames it sees at once. identity: what they depend on.
    attention_from: whose attention was recorded, where some was.
    """

    name: str
    window: int
    identity: tuple[Any, ...]
    attention_from: str = "all"


@dataclass(frozen=True)
class Hearing:
    """That what is heard during the frames is read too, for an audio tower, from <key>.wav or from its features.

    name: of the tower, the key in `Clip.features`. tokens: of a frame. rate: Hz. chunk: samples that it hears at once,
    counted from the clip's start. step: samples behind each of its vectors. width, dtype: of these. identity: what
    they depend on.
    """

    name: str
    tokens: int
    rate: int
    chunk: int
    step: int
    width: int
    dtype: str
    identity: tuple[Any, ...]


@dataclass(frozen=True)
class View:
    """What the model sees of a clip. num_frames frames at `fps` (None: the source's own), (height, width) pixels.

    crop: random | center | none (whole frame, aspect not kept). scale: (low, high), side of a random crop as a share of
    the largest box of the wanted aspect. hflip: probability. max_pixels: frames x height x width a clip may decode to.
    map: extension of the member that holds a dense map (`vtok.data.maps`); "" takes the video or image.
    texts: take the text alone, of any length, and no frames.
    cached: read features of the window instead (`vtok.data.feature_index.feature_view`).
    hearing: read what is heard as well: the sound of the window, or features of it where `cached` are read.
    """

    num_frames: int = 16
    size: tuple[int, int] = (64, 64)
    fps: float | None = 8.0
    crop: str = "random"
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    max_pixels: int = 1 << 31
    map: str = ""
    texts: bool = False
    cached: Cached | None = None
    hearing: Hearing | None = None

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
        if self.map and not re.fullmatch(r"([a-z0-9_-]+\.)*npy", self.map):
            raise ValueError(
                f"data.map={self.map!r} is not the extension of a dense map: npy for <key>.npy, pose.npy for "
                '<key>.pose.npy (lower case), or "" for the video'
            )
        if self.texts and self.map:
            raise ValueError(
                f"data.texts=true and data.map={self.map!r}: a sample is seen as one of them; leave one out"
            )

    @property
    def media(self) -> tuple[str, ...]:
        """Extensions of the members that it can be a view of."""
        if self.cached is not None:
            return (FEATURES,)
        if self.texts:
            return (TEXT,)
        return (self.map,) if self.map else MEDIA


class ViewSettings(Protocol):
    """The keys of the `data:` node that a `View` is made of."""

    num_frames: int
    size: list[int]
    fps: float | None
    crop: str
    scale: list[float]
    hflip: float
    max_pixels: int
    map: str
    texts: bool


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
        map=settings.map,
        texts=settings.texts,
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


def map_view(
    read: Callable[[int, int], bytes], num_bytes: int, view: View, rng: random.Random | None, *, fps: float | None
) -> tuple[Tensor, Tensor]:
    """The same of a dense map: uint8 or float32 [T, H, W, C], and times float64 [T].

    Args:
        read: (offset, bytes) of a .npy file of `num_bytes`. fps: frames per second of the map, None where not known.
    Raises: MapError.
    """
    header = read_header(read(0, HEAD_BYTES), num_bytes)
    total, height, width, channels = header.shape
    if total > 1 and fps is None:
        raise MapError(f"the map has {total} frames, and .json no `fps`: how many of them are a second")
    frames = 1 if total == 1 else view.num_frames
    if frames * height * width * channels > 3 * view.max_pixels:
        raise MapError(f"{frames}x{height}x{width} of {channels} channels are above data.max_pixels={view.max_pixels}")
    fps = fps or 1.0
    duration = total / fps if total > 1 else 0.0
    slack = max(0.0, duration - frames / (view.fps or fps))
    start = slack * (0.5 if rng is None else rng.random())
    rate = None if total == 1 else view.fps
    return window_of_map(read, header, start_s=start, num_frames=frames, source_fps=fps, fps=rate)


def fit(frames: Tensor, view: View, rng: random.Random | None) -> Tensor:
    """Cropped, resized and flipped: uint8 [T, H, W, 3] -> uint8 [3, T, *view.size]; float32 and any C likewise.

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
    video = frames[:, top : top + box_height, left : left + box_width].permute(0, 3, 1, 2)  # [T, C, H, W], a view
    if (box_height, box_width) != (out_height, out_width):
        video = F.interpolate(video, size=(out_height, out_width), mode="bilinear", antialias=True)
        video = video.clamp_(-1.0, 1.0) if video.is_floating_point() else video  # weights sum to 1 within rounding
    if rng is not None and rng.random() < view.hflip:
        video = video.flip(3)
    return video.permute(1, 0, 2, 3)
