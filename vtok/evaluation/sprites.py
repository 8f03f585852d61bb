"""Clips of a report as sprites: every frame of a clip in one image, which a script plays on canvases.

    clips [T, H, W, 3] --sprite()--> WebP images, as data: addresses --assets/frames.js--> canvases

Lossless where the page's size allows it: every pixel shown is then the pixel measured, all versions follow one clock
(so switching keeps the time), and no video codec of the browser is involved. Letters: T frames, H height, W width.
"""

from __future__ import annotations

import base64
import math
from fractions import Fraction
from typing import Any

import av
import numpy as np

from vtok.evaluation.page import number

SHEET_WIDTH = 4096  # pixels: a sprite wider than this is folded into rows; WebP and most GPUs end at 16383
WEBP_MAX = 16383


def frames_of(value: Any, name: str) -> np.ndarray:
    """uint8 [T, H, W, 3]; name: what it is, for the ValueError."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected uint8 [T, H, W, 3]")
    return array


def check_clip(clip: dict[str, Any]) -> dict[str, Any]:
    """The clip with numpy frames.

    Raises: ValueError for frames that are not uint8 [T, H, W, 3] of one shape, and for an fps that is not positive.
    """
    name = f"clip {clip.get('key')!r}"
    original = frames_of(clip["original"], f"{name} original")
    versions = {str(label): frames_of(v, f"{name} {label}") for label, v in (clip.get("reconstructions") or {}).items()}
    for label, array in versions.items():
        if array.shape != original.shape:
            raise ValueError(f"{name} {label} is {list(array.shape)}, the original is {list(original.shape)}")
    fps = number(clip.get("fps"))
    if fps is None or fps <= 0:
        raise ValueError(f"{name} fps={clip.get('fps')!r} is not a positive number of frames per second")
    scores = {str(label): number(value) for label, value in (clip.get("psnr_db") or {}).items()}
    return {**clip, "original": original, "reconstructions": versions, "psnr_db": scores, "fps": fps}


def sprite(frames: np.ndarray, *, lossless: bool = True) -> bytes:
    """A WebP image of frames [T, H, W, 3] uint8 laid out in rows of at most 4096 pixels; `sprite_columns` a row.

    Raises ValueError when the image would exceed what WebP holds (16383 pixels a side).
    """
    count, height, width, _ = frames.shape
    columns = sprite_columns(count, width)
    rows = math.ceil(count / columns)
    if max(rows * height, columns * width) > WEBP_MAX:
        raise ValueError(
            f"{count} frames of {width}x{height} make a {columns * width}x{rows * height} sprite, WebP ends at "
            f"{WEBP_MAX}: pass fewer or smaller frames"
        )
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(rows * columns, height, width, 3)[:count] = frames
    image = np.ascontiguousarray(sheet.transpose(0, 2, 1, 3, 4)).reshape(rows * height, columns * width, 3)
    encoder: Any = av.CodecContext.create("libwebp", "w")  # Any: PyAV's stubs give the base class
    encoder.width, encoder.height = image.shape[1], image.shape[0]
    encoder.pix_fmt, encoder.time_base = "bgra" if lossless else "yuv420p", Fraction(1, 25)
    # level 1 takes a quarter of the time of the default 4 for 2 % more bytes
    encoder.options = {"lossless": "1", "compression_level": "1"} if lossless else {"quality": "90"}
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=encoder.pix_fmt)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def sprite_columns(count: int, width: int) -> int:
    """Frames in one row of a sprite of `count` frames."""
    return max(1, min(count, SHEET_WIDTH // width))


def _token_count(label: str) -> int | None:
    return int(label) if label.isascii() and label.isdigit() else None


def stored(clips: list[dict[str, Any]], *, max_bytes: int) -> tuple[list[dict[str, Any]], bool]:
    """(what the page's script reads of each clip, whether every pixel is exact).

    Frames are lossless unless they take more than max_bytes, and lossy WebP is smaller (flat graphics can be smaller
    without loss). clips: {"key", "caption", "original", "reconstructions": {label: frames}, "psnr_db": {label: float},
    "tags", "fps"}, frames uint8 [T, H, W, 3] of numpy or torch. Raises: ValueError as `check_clip`.
    """
    entries = [check_clip(clip) for clip in clips]
    kept = [_payload(clip, lossless=True) for clip in entries]
    if _size(kept) <= max_bytes:
        return kept, True
    lossy = [_payload(clip, lossless=False) for clip in entries]
    return (kept, True) if _size(lossy) >= _size(kept) else (lossy, False)


def told(exact: bool) -> str:
    """A sentence for the page: how the frames are stored."""
    if exact:
        return "Every pixel is exact: frames are stored losslessly."
    return (
        "Frames are stored as lossy WebP (quality 90) to keep the file small; "
        "the numbers were measured on the exact frames."
    )


def _payload(clip: dict[str, Any], *, lossless: bool) -> dict[str, Any]:
    """What the page's script reads of a clip."""

    def source(frames: np.ndarray) -> str:
        return "data:image/webp;base64," + base64.b64encode(sprite(frames, lossless=lossless)).decode()

    count, height, width, _ = clip["original"].shape
    labels = sorted(clip["reconstructions"], key=lambda x: (_token_count(x) is None, _token_count(x) or 0))
    return {
        "key": str(clip.get("key") or ""),
        "caption": str(clip.get("caption") or ""),
        "tags": [str(tag) for tag in clip.get("tags") or []],
        "fps": round(clip["fps"], 4),
        "frames": count,
        "width": width,
        "height": height,
        "columns": sprite_columns(count, width),
        "original": source(clip["original"]),
        "versions": [
            {
                "label": label if _token_count(label) is None else str(_token_count(label)),
                "tokens": _token_count(label),
                "psnr": clip["psnr_db"].get(label),
                "source": source(clip["reconstructions"][label]),
            }
            for label in labels
        ],
    }


def _size(stored: list[dict[str, Any]]) -> int:
    return sum(len(clip["original"]) + sum(len(v["source"]) for v in clip["versions"]) for clip in stored)
