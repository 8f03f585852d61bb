"""The words of the procedural corpus and what they look like; answers that come equally often."""

from __future__ import annotations

import zlib

import numpy as np

COLOURS = {
    "red": (226, 38, 40),
    "yellow": (242, 212, 40),
    "green": (46, 186, 70),
    "cyan": (38, 206, 216),
    "blue": (52, 84, 228),
    "purple": (188, 58, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNTS = ("1", "2", "3")
TEXTURES = ("smooth", "striped", "checked", "dotted", "mottled")
GROUNDS = {"black": 18, "grey": 122, "white": 238}
# Dark, middle and light colour of a background; saturation stays below 0.35, which no shape's does.
PALETTES = {
    "grey": ((58, 58, 60), (120, 120, 122), (186, 186, 184)),
    "sandy": ((104, 90, 74), (160, 144, 122), (214, 202, 182)),
    "slate": ((50, 58, 68), (98, 110, 124), (168, 180, 192)),
    "mossy": ((56, 62, 46), (108, 116, 92), (172, 178, 152)),
    "brown": ((60, 48, 42), (112, 94, 84), (172, 154, 142)),
    "pale": ((150, 150, 156), (192, 190, 190), (226, 224, 218)),
}


def balanced(seed: int, name: str, index: int, choices: int) -> int:
    """A number in [0, choices): random, but each one exactly once in every aligned block of `choices` indices."""
    block, place = divmod(index, choices)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), block])
    return int(rng.permutation(choices)[place])
