"""What is true of a procedural clip: shots, shapes, motion, needle frames, and the texts that follow. No pixels.

Answers are balanced: over consecutive indices each answer of a question type comes equally often, whatever the text
of the question, so guessing without the video stays at chance (CLEVR's argument, Johnson et al. 2017,
https://arxiv.org/abs/1612.06890, and CATER's for video, Girdhar & Ramanan 2020, https://arxiv.org/abs/1910.04744).
Lengths are pixels and times are frames, unless the name says otherwise. H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from vtok.data.synthetic_names import COLOURS, COUNTS, DIRECTIONS, PALETTES, SHAPES, TEXTURES, balanced
from vtok.data.synthetic_names import GROUNDS as GROUNDS
from vtok.data.synthetic_needles import Needle, plant, plant_series

MOST_TOLD = 8  # shots that a clip's one caption tells; the timed captions tell all
QUESTION_TYPES = ("colour", "shape", "count", "direction", "order", "needle")


@dataclass(frozen=True)
class Level:
    """What one complexity level means. Speeds are short sides per second, sizes fractions of the short side.

    shapes: in every shot. moving: share of the shapes that move. shot_s: typical seconds between cuts.
    exponent: the background's amplitude spectrum is 1 / f ** exponent (1 is rough, 2 is smooth).
    """

    shapes: int
    radius: float
    moving: float
    speed: float
    pan: float
    shot_s: float
    exponent: float
    backgrounds: tuple[str, ...]
    grain: float
    spin: float


LEVELS = (
    Level(1, 0.24, 0.0, 0.00, 0.00, 8.0, 2.0, ("smooth",), 0.0, 0.0),  # a still
    Level(2, 0.19, 0.5, 0.09, 0.00, 8.0, 1.8, ("smooth", "cloudy"), 0.0, 0.0),
    Level(4, 0.145, 0.5, 0.11, 0.04, 8.0, 1.6, ("cloudy", "striped"), 1.0, 0.2),
    Level(5, 0.13, 0.6, 0.14, 0.08, 4.0, 1.4, ("cloudy", "striped", "tiled", "rocky"), 2.0, 0.4),
    Level(6, 0.12, 0.8, 0.18, 0.14, 2.0, 1.2, ("cloudy", "striped", "tiled", "rocky", "rippling"), 3.0, 0.8),
    Level(7, 0.11, 1.0, 0.24, 0.22, 1.35, 1.0, ("tiled", "rocky", "rippling", "snowy"), 5.0, 1.5),
)


@dataclass(frozen=True)
class Thing:
    """A shape in a shot: where it is at the shot's first and last frame (x, y in pixels), and when it appears."""

    colour: str
    shape: str
    texture: str
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]
    direction: str | None  # on screen; None: still
    appears: int  # frame in the shot
    angle: float
    spin: float  # radians over the shot
    seed: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def at(self, progress: float) -> tuple[float, float]:
        """(x, y) in pixels at `progress` in [0, 1] of the shot."""
        (x0, y0), (x1, y1) = self.start, self.end
        return x0 + (x1 - x0) * progress, y0 + (y1 - y0) * progress


@dataclass(frozen=True)
class Shot:
    """Frames [start, stop) under one background; `pan` is how far (x, y, pixels) the view travels over the ground."""

    start: int
    stop: int
    background: str
    palette: str
    pan: tuple[float, float]
    things: tuple[Thing, ...]
    count_colour: str | None  # the colour that 1 to 3 of the things have
    order: tuple[int, int] | None  # things that appear late, the earlier first
    seed: int


@dataclass(frozen=True)
class Scene:
    """All that is true of a clip. `render` makes its pixels."""

    seed: int
    index: int
    level: int
    size: tuple[int, int]
    fps: Fraction
    frames: int
    shots: tuple[Shot, ...]
    needles: tuple[Needle, ...]
    questions_per_type: int = 1

    def seconds(self, frame: int) -> float:
        return round(float(frame / self.fps), 4)

    @property
    def cuts(self) -> list[int]:
        """First frame of every shot but the first."""
        return [shot.start for shot in self.shots[1:]]

    @cached_property
    def captions(self) -> list[dict[str, Any]]:
        """A timed caption per shot: [{start_s, end_s, text}]."""
        out = []
        for shot in self.shots:
            inside = [n for n in self.needles if shot.start <= n.frame < shot.stop]
            text = " ".join([_describe(shot), *(n.description for n in inside)])
            out.append({"start_s": self.seconds(shot.start), "end_s": self.seconds(shot.stop), "text": text})
        return out

    @property
    def caption(self) -> str:
        """The captions of all shots in one, of the first and the last shot where there are more than `MOST_TOLD`.

        Its length grows with the level, by construction.
        """
        texts = [c["text"] for c in self.captions]
        if len(texts) == 1:
            return texts[0]
        told = range(len(texts)) if len(texts) <= MOST_TOLD else (0, len(texts) - 1)
        opening = [] if len(texts) <= MOST_TOLD else [f"{len(texts)} scenes."]
        return " ".join(opening + [f"Scene {i + 1}: {texts[i]}" for i in told])

    @cached_property
    def questions(self) -> list[dict[str, Any]]:
        """[{id, type, question, answer, choices, start_s, end_s}]; the span is where the answer can be seen."""
        rng = np.random.default_rng([self.seed, self.index, 3])
        out: list[dict[str, Any]] = []

        def add(kind: str, text: str, answer: str, choices: list[str], start: int, stop: int) -> None:
            span = {"start_s": self.seconds(start), "end_s": self.seconds(stop)}
            name = f"{self.seed}-{self.index}-{len(out)}"
            out.append({"id": name, "type": kind, "question": text, "answer": answer, "choices": choices, **span})

        for kind in QUESTION_TYPES[:-1]:
            able = [i for i, shot in enumerate(self.shots) if _can_ask(kind, shot)]
            for i in rng.permutation(able).tolist()[: self.questions_per_type]:
                shot = self.shots[int(i)]
                where = f"In scene {i + 1}, " if len(self.shots) > 1 else ""
                text, answer, choices = _ask(kind, shot, swap=bool(rng.integers(2)))
                add(kind, where + text if where else text[0].upper() + text[1:], answer, choices, shot.start, shot.stop)
        for needle in self.needles:
            for text, answer, start, stop in needle.questions(self.questions_per_type):
                add("needle", text, answer, list(COLOURS), start, stop)
        return out

    def row(self, file: str, *, split: str | None = None) -> dict[str, Any]:
        """The manifest line of this clip, JSON-ready."""
        height, width = self.size
        needles = [{**vars(n), "start_s": self.seconds(n.frame)} for n in self.needles]
        return {
            "file": file,
            "caption": self.caption,
            "label": self.shots[0].things[0].shape,
            **({"split": split} if split else {}),
            "source": f"synthetic-{self.seed}-{self.index}",
            "qa": self.questions,
            "captions": self.captions,
            "complexity": self.level,
            "seed": self.seed,
            "index": self.index,
            "duration": self.seconds(self.frames),
            "width": width,
            "height": height,
            "fps": float(self.fps),
            "frames": self.frames,
            "cuts_s": [self.seconds(cut) for cut in self.cuts],
            "needles": needles,
        }


def _can_ask(kind: str, shot: Shot) -> bool:
    able = {
        "direction": shot.things[0].direction is not None,
        "count": shot.count_colour is not None,
        "order": shot.order is not None,
    }
    return able.get(kind, True)


def _ask(kind: str, shot: Shot, *, swap: bool) -> tuple[str, str, list[str]]:
    """(question, answer, choices) about a shot; its first thing has a colour and a shape of its own."""
    focus = shot.things[0]
    if kind == "colour":
        return f"what colour is the {focus.shape}?", focus.colour, list(COLOURS)
    if kind == "shape":
        return f"what shape is the {focus.colour} object?", focus.shape, list(SHAPES)
    if kind == "direction":
        assert focus.direction is not None
        return f"which way does the {focus.name} move?", focus.direction, list(DIRECTIONS)
    if kind == "count":
        count = sum(thing.colour == shot.count_colour for thing in shot.things)
        return f"how many {shot.count_colour} objects are there?", str(count), list(COUNTS)
    assert kind == "order" and shot.order is not None
    names = [shot.things[i].name for i in shot.order]
    shown = names[::-1] if swap else names
    return f"which appears first, the {shown[0]} or the {shown[1]}?", names[0], shown


def _describe(shot: Shot) -> str:
    article = {True: "an", False: "a"}
    late = [shot.things[i] for i in shot.order] if shot.order else []
    parts = []
    for thing in shot.things:
        words = f"{thing.colour} {thing.texture} {thing.shape}"
        verb = f"moves {thing.direction}" if thing.direction else "stays still"
        parts.append(f"{article[words[0] in 'aeiou']} {words} {verb}")
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    text = f"{listed[0].upper()}{listed[1:]} over a {shot.palette} {shot.background} background."
    if late:
        text += f" The {late[0].name} appears first, then the {late[1].name}."
    if any(shot.pan):
        axis = 0 if abs(shot.pan[0]) > abs(shot.pan[1]) else 1
        way = (("left", "right"), ("up", "down"))[axis][shot.pan[axis] > 0]
        text += f" The camera pans {way}."
    return text


def scene(
    seed: int,
    index: int,
    *,
    level: int | None = None,
    seconds: float = 4.0,
    size: tuple[int, int] = (128, 128),
    fps: float | Fraction = 12,
    shots: int | None = None,
    needles: int | None = None,
    needle_shapes: int = 1,
    questions_per_type: int = 1,
) -> Scene:
    """The truth of clip `index` of the corpus `seed`.

    Args:
        level: 0 (a still) to 5 (seven moving shapes, pans, cuts, grain), see `LEVELS`; None: index modulo 6.
        seconds: length; at least one frame is made.
        size: (H, W) in pixels, even, at least 32.
        shots: how many, equally long within a fifth; None: by level and length.
        needles: how many needle inserts of 1 to 3 frames, uniform in time; None: 0 or 1, equally often.
        needle_shapes: shapes of every needle. 2 and more: one a frame, all on a ground that no other needle has, inside
            one shot; the shots that hold one are drawn evenly.
        questions_per_type: at most, for colour, shape, count, direction and order; needles get one each, those of
            several shapes one for as many of their shapes, one at least.
    Raises: ValueError naming the argument, its value and what is allowed.
    """
    height, width = size
    rate = Fraction(fps).limit_denominator(1001)
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, index={index}: both must be 0 or more")
    level = index % len(LEVELS) if level is None else level
    if not 0 <= level < len(LEVELS):
        raise ValueError(f"level={level} does not exist; choose 0 to {len(LEVELS) - 1}")
    if height % 2 or width % 2 or min(size) < 32:
        raise ValueError(f"size={size} cannot be encoded as 4:2:0 video here; use even numbers of at least 32 pixels")
    if rate <= 0 or not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds={seconds}, fps={fps}: fps must be above 0, seconds finite and not negative")
    frames = max(1, round(seconds * rate))
    rng = np.random.default_rng([seed, index, 1])
    spec = LEVELS[level]
    if shots is None:
        shots = min(max(1, round(float(frames / rate) / spec.shot_s)), max(1, frames // 6))
    if not 1 <= shots <= frames:
        raise ValueError(f"shots={shots} does not fit a clip of {frames} frames; ask for 1 to {frames}")
    jitter = rng.uniform(-0.1, 0.1, shots - 1) if frames >= 10 * shots else np.zeros(shots - 1)
    edges = [0, *((np.arange(1, shots) + jitter) * frames / shots).round().astype(int).tolist(), frames]

    made: list[Shot] = []
    palette = int(rng.integers(len(PALETTES)))
    for number, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        palette = (palette + 1 + int(rng.integers(len(PALETTES) - 1))) % len(PALETTES)  # a cut is always visible
        made.append(_shot(seed, index, number, start, stop, level, list(PALETTES)[palette], size, rate))
    if needles is None:
        needles = balanced(seed, "needles", index, 2) if frames >= 12 else 0
    if needle_shapes == 1:
        planted = plant(seed, index, needles, frames)
    else:
        spans = [(shot.start, shot.stop) for shot in made]
        planted = plant_series(seed, index, needles, spans, shapes=needle_shapes)
    return Scene(seed, index, level, (height, width), rate, frames, tuple(made), planted, questions_per_type)


def scene_of(row: dict[str, Any]) -> Scene:
    """The scene that a manifest line was made of (`Scene.row`), for the truth that a row does not tell.

    Raises: ValueError where the line says otherwise, as one of another version of this file does.
    """
    made = scene(
        row["seed"],
        row["index"],
        level=row["complexity"],
        seconds=row["duration"],
        size=(row["height"], row["width"]),
        fps=row["fps"],
        shots=len(row["cuts_s"]) + 1,
        needles=len(row["needles"]),
        needle_shapes=max([len(needle.get("pictures", "1")) for needle in row["needles"]], default=1),
    )
    if (made.caption, made.frames) != (row["caption"], row["frames"]):
        raise ValueError(
            f"{row['file']} shows {row['caption']!r}, which clip {row['index']} of seed {row['seed']} no longer does: "
            "write the corpus again"
        )
    return made


def _shot(
    seed: int,
    index: int,
    number: int,
    start: int,
    stop: int,
    level: int,
    palette: str,
    size: tuple[int, int],
    fps: Fraction,
) -> Shot:
    spec, frames = LEVELS[level], stop - start
    rng = np.random.default_rng([seed, index, 0, number])

    def pick(name: str, choices: Any) -> Any:
        return list(choices)[balanced(seed, f"{name}{number}", index, len(choices))]

    short, duration = min(size), float(frames / fps)
    # The first thing is what colour, shape and direction questions ask about: its colour and shape are its own.
    colour, shape = pick("colour", COLOURS), pick("shape", SHAPES)
    rest_colours = [str(c) for c in rng.permutation([c for c in COLOURS if c != colour])]
    rest_shapes = [str(s) for s in rng.permutation([s for s in SHAPES if s != shape])]
    others = spec.shapes - 1
    countable = others >= len(COUNTS)
    count = int(pick("count", COUNTS)) if countable else 0
    colours = [rest_colours[0]] * count
    while len(colours) < others:  # colours other than the counted one, in turn
        colours.append(rest_colours[1:][len(colours) % (len(rest_colours) - 1)])
    pairs = [(colour, shape)]
    for i in range(others):
        free = [s for s in rest_shapes if (colours[i], s) not in pairs]
        unused = [s for s in free if all(s != used for _, used in pairs)]
        pairs.append((colours[i], (unused or free)[0]))

    appears = [0] * spec.shapes
    order = None
    if spec.shapes > 1 and frames >= 8 and rng.random() < 0.5:
        second = int(rng.integers(1, spec.shapes))
        order = (0, second) if pick("order", (True, False)) else (second, 0)
        appears[order[0]] = round(frames * rng.uniform(0.15, 0.3))
        appears[order[1]] = round(frames * rng.uniform(0.45, 0.6))

    moves = [spec.moving > 0 and frames > 1 and (i == 0 or rng.random() < spec.moving) for i in range(spec.shapes)]
    ways = [pick("direction", DIRECTIONS) if i == 0 else list(DIRECTIONS)[rng.integers(4)] for i in range(spec.shapes)]
    ways = [way if move else None for way, move in zip(ways, moves)]
    travel = min(max(spec.speed * duration, 0.25), 0.5)
    paths = _paths(rng, ways, travel=travel, radius=spec.radius * short, size=size)
    things = []
    for (thing_colour, thing_shape), way, late, (radius, begin, end) in zip(pairs, ways, appears, paths):
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        angle, spin = rng.uniform(-0.3, 0.3), rng.uniform(-1, 1) * spec.spin * min(duration, 4.0)
        key = int(rng.integers(2**31))
        things.append(Thing(thing_colour, thing_shape, texture, radius, begin, end, way, late, angle, spin, key))

    pan = (0.0, 0.0)
    if spec.pan and frames > 1:
        distance = min(spec.pan * duration, 1.0) * short * rng.uniform(0.7, 1.0)
        main, slant = distance * (1 if rng.integers(2) else -1), distance * rng.uniform(-0.3, 0.3)
        pan = (main, slant) if rng.integers(2) else (slant, main)
    background = spec.backgrounds[rng.integers(len(spec.backgrounds))]
    counted = rest_colours[0] if countable else None
    return Shot(start, stop, background, palette, pan, tuple(things), counted, order, int(rng.integers(2**31)))


Path2 = tuple[float, tuple[float, float], tuple[float, float]]  # radius, start, end


def _paths(
    rng: np.random.Generator, ways: list[str | None], *, travel: float, radius: float, size: tuple[int, int]
) -> list[Path2]:
    """Straight paths inside the frame that do not touch. Directions are given, so that placing never skews them."""
    height, width = size
    progress = np.linspace(0, 1, 9)[:, None]
    placed: list[tuple[float, np.ndarray]] = []
    for way in ways:
        step = np.array(DIRECTIONS[way] if way else (0, 0), float) * travel * np.array([width, height])
        r = radius * rng.uniform(0.88, 1.12)
        while True:
            low = np.maximum(-step, 0) + r + 1
            high = np.array([width, height]) - np.maximum(step, 0) - r - 1
            starts = rng.uniform(np.minimum(low, high), np.maximum(low, high), (96, 2))
            tracks = starts[:, None] + step * progress  # [candidates, times, xy]
            gap = np.full(len(starts), np.inf)
            for other, known in placed:
                gap = np.minimum(gap, np.linalg.norm(tracks - known, axis=-1).min(1) - 1.05 * (r + other))
            best = int(np.argmax(gap >= 0)) if (gap >= 0).any() else int(np.argmax(gap))
            if gap[best] >= 0 or r < 0.45 * radius:
                placed.append((r, tracks[best]))
                break
            r *= 0.9
    return [(float(r), _xy(path[0]), _xy(path[-1])) for r, path in placed]


def _xy(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])
