"""Dense maps of procedural scenes, as pose estimators give them: one Gaussian heat map per shape, frame by frame.

[T, H, W, MAP_CHANNELS]: channel i is the i-th shape of the shot, where it is on screen; zero everywhere before it
appears, in shots with fewer shapes and while a needle hides the scene. T frames, H height, W width.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vtok.data.maps import DTYPES, map_bytes
from vtok.data.synthetic_scenes import LEVELS, Scene

MAP_CHANNELS = max(level.shapes for level in LEVELS)
SPREAD = 0.5  # standard deviation of a heat map, as a share of its shape's radius


def check_map_settings(size: tuple[int, int] | None, dtype: str) -> None:
    """Raises ValueError naming the argument."""
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"map_size={size} must be (height, width) in pixels, 1 or more each, or None for no maps")
    if dtype not in DTYPES:
        raise ValueError(f"map_dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def render_map(scene: Scene, *, size: tuple[int, int] | None = None, dtype: str = "uint8") -> np.ndarray:
    """[T, H, W, MAP_CHANNELS]: 0 to 255 as uint8, or -1 to 1 as float16 or float32; a shape's centre is the peak.

    size: (H, W), None for the scene's own.
    """
    height, width = size or scene.size
    check_map_settings((height, width), dtype)
    across, down = width / scene.size[1], height / scene.size[0]
    x, y = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    hidden = {needle.frame + k for needle in scene.needles for k in range(needle.frames)}
    out = np.zeros((scene.frames, height, width, MAP_CHANNELS), np.float32)
    for shot in scene.shots:
        for t in range(shot.start, shot.stop):
            progress = (t - shot.start) / max(shot.stop - shot.start - 1, 1)
            for channel, thing in enumerate(shot.things):
                if t in hidden or t - shot.start < thing.appears:
                    continue
                centre, spread = thing.at(progress), SPREAD * thing.radius
                row = np.exp(-0.5 * ((x - centre[0] * across) / (spread * across)) ** 2)
                column = np.exp(-0.5 * ((y - centre[1] * down) / (spread * down)) ** 2)
                out[t, :, :, channel] = column[:, None] * row
    if dtype == "uint8":
        return (255.0 * out).round().astype(np.uint8)
    return (2.0 * out - 1.0).astype(dtype)


def write_map(scene: Scene, path: Path, *, size: tuple[int, int] | None = None, dtype: str = "uint8") -> None:
    """`render_map` as a .npy file: written aside, then renamed."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(map_bytes(render_map(scene, size=size, dtype=dtype)))
    os.replace(aside, path)
