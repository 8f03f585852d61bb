"""The frames of a procedural scene, one at a time.

Backgrounds are greyish, shapes are saturated: a colour mask finds a shape again, which is how the tests check truth.
H height, W width; images are [H, W, 3] RGB, float32 in 0..255 while being painted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from vtok.data.synthetic_names import COLOURS, PALETTES
from vtok.data.synthetic_needles import PLAIN, Needle
from vtok.data.synthetic_scenes import LEVELS, Scene, Shot, Thing


def render(scene: Scene, *, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Frames [start, stop) as uint8 [H, W, 3] RGB, one at a time; memory does not grow with the length."""
    stop = scene.frames if stop is None else min(stop, scene.frames)
    hidden = {n.frame + k: n for n in scene.needles for k in range(n.frames)}
    for shot in scene.shots:
        begin, end = max(start, shot.start), min(stop, shot.stop)
        if begin >= end:
            continue
        painter = _Painter(shot, scene)
        for t in range(begin, end):
            yield _needle_frame(hidden[t], t, scene.size) if t in hidden else painter.frame(t)


def _needle_frame(needle: Needle, t: int, size: tuple[int, int]) -> np.ndarray:
    frame = np.empty((*size, 3), np.float32)
    frame[:] = PLAIN[needle.ground]
    radius, (colour, shape) = 0.3 * min(size), needle.picture(t)
    _paint(frame, shape, COLOURS[colour], (size[1] / 2, size[0] / 2), radius, 0.0, None)
    return frame.round().astype(np.uint8)


class _Painter:
    """The frames of one shot: its background and textures are made once, each frame is a pure function of t."""

    def __init__(self, shot: Shot, scene: Scene) -> None:
        self.shot, self.scene, self.spec = shot, scene, LEVELS[scene.level]
        rng = np.random.default_rng(shot.seed)
        height, width = scene.size
        reach = [math.ceil(abs(p)) + 2 for p in shot.pan]
        self.ground = _background(rng, shot, (height + reach[1], width + reach[0]), min(scene.size), self.spec.exponent)
        self.drift = None
        if shot.background == "rippling":
            self.drift = _noise(rng, height, width, 1.4)[..., None] * np.float32(14)
        self.grain = None
        sigma = 26.0 if shot.background == "snowy" else self.spec.grain
        if sigma:
            self.grain = rng.standard_normal((height * 2, width * 2, 1), np.float32) * np.float32(sigma)
        self.tiles = [_tile(thing) for thing in shot.things]

    def frame(self, t: int) -> np.ndarray:
        shot, (height, width) = self.shot, self.scene.size
        local = t - shot.start
        progress = local / max(shot.stop - shot.start - 1, 1)
        # A pan to the right moves the window right over the ground, which then moves left on screen.
        x, y = (p * progress if p >= 0 else -p * (1 - progress) for p in shot.pan)
        frame = _window(self.ground, x, y, height, width)
        rng = np.random.default_rng([shot.seed, t])
        if self.drift is not None:
            seconds = local / float(self.scene.fps)
            shift = round(0.3 * seconds * width), round(0.2 * seconds * height)
            frame += np.roll(self.drift, shift, (1, 0)) + np.roll(self.drift, (-shift[1], shift[0]), (1, 0))
        if self.grain is not None:
            top, left = rng.integers(height), rng.integers(width)
            frame += self.grain[top : top + height, left : left + width]
        for thing, tile in zip(shot.things, self.tiles):
            if local < thing.appears:
                continue
            angle = thing.angle + thing.spin * progress
            _paint(frame, thing.shape, COLOURS[thing.colour], thing.at(progress), thing.radius, angle, tile)
        return frame.clip(0, 255).round().astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int, exponent: float) -> np.ndarray:
    """Periodic noise [height, width] with amplitude spectrum 1 / f ** exponent, mean 0, deviation 1."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    f = np.hypot(fy * height, fx * width)
    f[0, 0] = np.inf
    spectrum = (rng.standard_normal(f.shape) + 1j * rng.standard_normal(f.shape)) / f**exponent
    field = np.fft.irfft2(spectrum, s=(height, width))
    return ((field - field.mean()) / max(field.std(), 1e-9)).astype(np.float32)


def _background(rng: np.random.Generator, shot: Shot, size: tuple[int, int], short: int, exponent: float) -> np.ndarray:
    """[H, W, 3] float32 in 0..255: a palette's ramp over a field in [0, 1]."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32) / short
    turn = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    noise = _noise(rng, height, width, exponent)
    period = rng.uniform(0.12, 0.25)
    if shot.background == "smooth":
        field = (along - along.min()) / np.ptp(along) + 0.04 * noise
    elif shot.background == "striped":
        field = 0.5 + 0.28 * np.tanh(2.5 * np.sin(2 * np.pi * (along + 0.03 * noise) / period)) + 0.08 * noise
    elif shot.background == "tiled":
        cell = (np.floor(along / period) + np.floor(across / period)) % 2
        edge = np.minimum(along / period % 1, across / period % 1) < 0.07
        field = 0.34 + 0.3 * cell + 0.09 * noise - 0.3 * edge
    elif shot.background == "rocky":
        field = 0.85 - 0.5 * np.abs(noise) + 0.08 * _noise(rng, height, width, 0.9)
    else:
        field = 0.5 + 0.2 * noise
    ramp = np.asarray(PALETTES[shot.palette], np.float32)
    position = field.clip(0, 1) * 2
    return np.stack([np.interp(position, [0, 1, 2], ramp[:, c]) for c in range(3)], -1).astype(np.float32)


def _window(ground: np.ndarray, x: float, y: float, height: int, width: int) -> np.ndarray:
    """The [height, width, 3] view of `ground` at a fractional offset, bilinear; always a copy."""
    x0, y0 = int(x), int(y)
    fx, fy = np.float32(x - x0), np.float32(y - y0)
    view = ground[y0 : y0 + height + 1, x0 : x0 + width + 1]
    if not fx and not fy:
        return view[:height, :width].copy()
    rows = view[:-1] + (view[1:] - view[:-1]) * fy
    return rows[:, :-1] + (rows[:, 1:] - rows[:, :-1]) * fx


def _tile(thing: Thing) -> np.ndarray:
    """A shape's texture, [S, S] float32 brightness in [0.55, 1], covering [-1.2, 1.2] of its own axes."""
    rng = np.random.default_rng(thing.seed)
    side = min(max(64, int(5 * thing.radius)), 512)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    noise = _noise(rng, side, side, 1.6)
    if thing.texture == "striped":
        field = np.tanh(3 * np.sin(2 * np.pi * 5 * x + 0.15 * noise))
    elif thing.texture == "checked":
        field = np.tanh(9 * np.sin(2 * np.pi * 2.5 * x) * np.sin(2 * np.pi * 2.5 * y))
    elif thing.texture == "dotted":
        field = np.tanh(6 * (np.hypot((x * 5) % 1 - 0.5, (y * 5) % 1 - 0.5) - 0.28))
    elif thing.texture == "mottled":
        field = 0.7 * noise
    else:
        field = 1.4 * (1 - x - y) + 0.1 * noise
    return (0.78 + 0.2 * field).clip(0.55, 1.0).astype(np.float32)


def _paint(
    frame: np.ndarray,
    shape: str,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    radius: float,
    angle: float,
    tile: np.ndarray | None,
) -> None:
    """Paint an antialiased shape onto float32 `frame` [H, W, 3]; textured things get a soft shadow and a darker rim."""
    height, width = frame.shape[:2]
    pad = max(2, round(0.14 * radius)) if tile is not None else 1
    x0, x1 = max(0, int(centre[0] - radius) - pad), min(width, int(centre[0] + radius) + pad + 2)
    y0, y1 = max(0, int(centre[1] - radius) - pad), min(height, int(centre[1] + radius) + pad + 2)
    if x0 >= x1 or y0 >= y1:
        return
    dx = (np.arange(x0, x1, dtype=np.float32) + 0.5 - centre[0])[None] / radius
    dy = (np.arange(y0, y1, dtype=np.float32) + 0.5 - centre[1])[:, None] / radius
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    distance = _distance(shape, u, v) * radius  # pixels, negative inside
    alpha = (0.5 - distance).clip(0, 1)
    patch = frame[y0:y1, x0:x1]
    paint = np.asarray(colour, np.float32)
    if tile is None:
        patch += (paint - patch) * alpha[..., None]
        return
    shadow = np.zeros_like(alpha)
    shadow[pad:, pad:] = alpha[:-pad, :-pad]
    patch *= (1 - 0.4 * shadow)[..., None]
    side = len(tile)
    column = ((u + 1.2) * (side / 2.4)).astype(np.int32).clip(0, side - 1)
    row = ((v + 1.2) * (side / 2.4)).astype(np.int32).clip(0, side - 1)
    rim = 1 - 0.35 * (1 + distance / (0.09 * radius)).clip(0, 1)
    bright = tile[row, column] * rim
    patch += (bright[..., None] * paint - patch) * alpha[..., None]


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (approximate, negative inside) to a shape of radius about 1, at points (u, v)."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.7) - 0.27
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.52
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.95, b - 0.32), np.maximum(b - 0.95, a - 0.32))
    sector = math.pi / 5  # star: fold into half a point, then the distance to its one edge
    fold = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    r = np.hypot(u, v)
    px, py = r * np.cos(fold), r * np.sin(fold)
    bx, by = 0.44 * math.cos(sector) - 1, 0.44 * math.sin(sector)
    return ((px - 1) * by - py * bx) / math.hypot(bx, by)
