"""Needles: a few frames of a clip replaced by plain shapes on a flat ground, and what is asked about them.

    Needle  one shape, 1 to 3 frames, anywhere. Its shape and its ground name it, its colour is asked for
    Series  several shapes, one a frame, on a ground of their own, inside one shot. The ground says which needle is
            meant and the shape which of its frames: to answer, a compressor has to keep every frame of a needle that
            nobody has asked for yet, or know the question

Each answer comes equally often, whatever the text of the question. H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtok.data.synthetic_names import COLOURS, GROUNDS, PALETTES, SHAPES, balanced

# flat grounds of needles, RGB: greys, and the middle colours of backgrounds
PLAIN = {name: (level,) * 3 for name, level in GROUNDS.items()}
PLAIN |= {name: colours[1] for name, colours in PALETTES.items() if name not in GROUNDS}

Asked = tuple[str, str, int, int]  # question, answer, first frame that shows it, frame after the last


@dataclass(frozen=True)
class Needle:
    """`frames` frames from `frame` on, replaced by one plain shape on a flat ground."""

    frame: int
    frames: int
    colour: str
    shape: str
    ground: str

    def picture(self, frame: int) -> tuple[str, str]:
        """(colour, shape) that a frame of the clip shows."""
        return self.colour, self.shape

    @property
    def description(self) -> str:
        return f"For an instant a {self.colour} {self.shape} flashes on a plain {self.ground} ground."

    def questions(self, most: int) -> list[Asked]:
        """What is asked about it; most: questions at most, where there is more than one to ask."""
        text = f"What colour is the {self.shape} that flashes on a plain {self.ground} ground?"
        return [(text, self.colour, self.frame, self.frame + self.frames)]


@dataclass(frozen=True)
class Series(Needle):
    """A needle of several shapes, one a frame; `colour` and `shape` are those asked for first.

    pictures: (colour, shape) of each frame. asked: places of its shapes, in the order in which they are asked for.
    """

    pictures: tuple[tuple[str, str], ...]
    asked: tuple[int, ...]

    def picture(self, frame: int) -> tuple[str, str]:
        return self.pictures[frame - self.frame]

    @property
    def description(self) -> str:
        names = [f"a {colour} {shape}" for colour, shape in self.pictures]
        return f"For an instant {', '.join(names[:-1])} and {names[-1]} flash on a plain {self.ground} ground."

    def questions(self, most: int) -> list[Asked]:
        out = []
        for place in self.asked[: max(most, 1)]:
            colour, shape = self.pictures[place]
            text = f"What colour is the {shape} that flashes on a plain {self.ground} ground?"
            out.append((text, colour, self.frame + place, self.frame + place + 1))
        return out


def plant(seed: int, index: int, count: int, frames: int) -> tuple[Needle, ...]:
    """Needles of one shape, 1 to 3 frames long, uniform in time."""
    most = min(len(SHAPES) * len(GROUNDS), frames // 4)
    if not 0 <= count <= most:
        raise ValueError(f"needles={count} does not fit a clip of {frames} frames; ask for 0 to {most}")
    rng = np.random.default_rng([seed, index, 2])
    lengths = rng.integers(1, 4, count)
    # Uniform over all placements that keep a gap of one frame: draw in the line with the needles taken out.
    free = frames - int(lengths.sum()) - max(count - 1, 0)
    slots = np.sort(rng.integers(0, free + 1, count))
    names = rng.permutation(len(SHAPES) * len(GROUNDS))[:count]  # shape and ground name a needle: distinct
    out, before = [], 0
    for k in range(count):
        colour = list(COLOURS)[balanced(seed, f"needle{k}", index, len(COLOURS))]
        shape, ground = divmod(int(names[k]), len(GROUNDS))
        out.append(Needle(int(slots[k]) + before, int(lengths[k]), colour, SHAPES[shape], list(GROUNDS)[ground]))
        before += int(lengths[k]) + 1
    return tuple(out)


def plant_series(seed: int, index: int, count: int, shots: list[tuple[int, int]], *, shapes: int) -> tuple[Series, ...]:
    """Needles of `shapes` shapes each, in time order, each in a shot of its own; shots: (start, stop) in frames.

    Raises: ValueError for more shapes, needles or frames than there are.
    """
    if not 2 <= shapes <= len(SHAPES):
        raise ValueError(f"needle_shapes={shapes}: ask for 1 to {len(SHAPES)}")
    able = [(start, stop) for start, stop in shots if stop - start >= shapes]
    most = min(len(PLAIN), len(able))
    if not 0 <= count <= most:
        raise ValueError(
            f"needles={count} of {shapes} shapes do not fit: {len(able)} shots of the clip have {shapes} frames or "
            f"more, and there are {len(PLAIN)} grounds; ask for 0 to {most}, or for longer shots"
        )
    rng = np.random.default_rng([seed, index, 5])
    held = sorted(rng.permutation(len(able))[:count].tolist())
    grounds = rng.permutation(list(PLAIN))[:count]
    out = []
    for k, (start, stop) in enumerate(able[i] for i in held):
        kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:shapes]]
        asked = [int(place) for place in rng.permutation(shapes)]
        colours = [""] * shapes
        for turn, place in enumerate(asked):  # what is asked for first comes equally often, then what is second ...
            colours[place] = list(COLOURS)[balanced(seed, f"series{k}.{turn}", index, len(COLOURS))]
        pictures = tuple(zip(colours, kinds))
        colour, shape = pictures[asked[0]]
        frame = start + int(rng.integers(stop - start - shapes + 1))
        out.append(Series(frame, shapes, colour, shape, str(grounds[k]), pictures, tuple(asked)))
    return tuple(out)
