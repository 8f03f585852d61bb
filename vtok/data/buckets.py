"""Bucketed batches: every batch comes from one part of `data.shards`, all its clips of one length.

    part 0: videos, 17 frames, 4 clips  --\\
    part 1: images,  1 frame, 32 clips  ----> batch n is of part `Schedule.part(n)`, the same on every rank

Which part a batch comes from is a pure function of (seed, number of the batch, weights). Ranks that take a step
together thus run the same shapes together, and a resume counts how many batches of each part a stream has given.

With `data.size_scales` batch n is also of size `Sizes.at(n)`, likewise drawn, independently of the part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from vtok.data.sources import Shard
from vtok.data.view import View

DRAWS = 4096  # per block of the schedule


@dataclass(frozen=True)
class Bucket:
    """What the batches of some sources are made of.

    sources: numbers of the sources its samples come from. frames: length that every batch is padded to; None pads to
    the longest clip of a batch. weight: share of the batches, up to a common factor.
    """

    sources: tuple[int, ...]
    view: View
    batch_size: int
    frames: int | None = None
    weight: float = 1.0


def check_parts(
    parts: int, *, part_frames: Sequence[int] | None, part_batch_sizes: Sequence[int] | None, shards: object = None
) -> None:
    """Raises ValueError where the settings do not give one number of 1 or more for each part of data.shards."""
    for name, values, what in (
        ("part_frames", part_frames, "frames a clip, 1 for images"),
        ("part_batch_sizes", part_batch_sizes, "clips per rank and step"),
    ):
        if values is None:
            continue
        told = f" ({shards!r})" if shards else ""
        if len(values) != parts:
            raise ValueError(
                f"data.{name}={list(values)} has {len(values)} entries, but data.shards{told} has {parts} part(s) "
                f'joined by "::"; give one number for each part: {what}'
            )
        if min(values) < 1:
            raise ValueError(f"data.{name}={list(values)}: every entry must be 1 or more ({what})")


def make_buckets(
    sources: Sequence[Sequence[Shard]],
    *,
    view: View,
    batch_size: int,
    weights: Sequence[float] | None = None,
    part_frames: Sequence[int] | None = None,
    part_batch_sizes: Sequence[int] | None = None,
) -> list[Bucket]:
    """One bucket a source; a single bucket of all sources where neither part_frames nor part_batch_sizes is given.

    Args:
        weights: share of the batches that come from each source; None: as many as make every clip come equally often.
    Raises: ValueError for settings that do not fit the sources, or where weights are needed and not given.
    """
    if part_frames is None and part_batch_sizes is None:
        return [Bucket(tuple(range(len(sources))), view, batch_size)]
    check_parts(len(sources), part_frames=part_frames, part_batch_sizes=part_batch_sizes)
    frames = list(part_frames or [view.num_frames] * len(sources))
    sizes = list(part_batch_sizes or [batch_size] * len(sources))
    if weights is None and len(sources) == 1:
        weights = [1.0]
    elif weights is None:
        counts = [[shard.samples for shard in source] for source in sources]
        unknown = [number for number, known in enumerate(counts) if None in known]
        if unknown:
            first = sources[unknown[0]][0].url
            raise ValueError(
                "data.weights=null needs the number of clips of every part, and no index.json states it for part "
                f"{unknown[0]} of data.shards (e.g. {first}); set data.weights, the share of batches of each part"
            )
        weights = [sum(n or 0 for n in known) / size for known, size in zip(counts, sizes)]
    return [
        Bucket((number,), replace(view, num_frames=frames[number]), sizes[number], frames[number], float(weight))
        for number, weight in enumerate(weights)
    ]


class Schedule:
    """The bucket of every batch, by weight. purpose: schedules of different purposes draw independently."""

    def __init__(self, weights: Sequence[float], *, seed: int, purpose: str = "buckets") -> None:
        self.seed, self.purpose = seed, purpose
        edges = np.cumsum(np.asarray(weights, np.float64))
        self.edges = edges / edges[-1]

    def part(self, number: int) -> int:
        """Of batch `number` of a rank, counted from 0."""
        return int(self._block(number // DRAWS)[number % DRAWS])

    def counts(self, stop: int, *, turn: int = 0, step: int = 1) -> list[int]:
        """How many of the batches turn, turn + step, turn + 2 step ... below `stop` are of each bucket."""
        found = np.zeros(len(self.edges), np.int64)
        for block in range(-(-stop // DRAWS)):
            first = block * DRAWS
            parts = self._block(block)[: stop - first][(turn - first) % step :: step]
            found += np.bincount(parts, minlength=len(self.edges))
        return found.tolist()

    def _block(self, block: int) -> np.ndarray:
        draws = _draws(self.purpose, self.seed, block)
        return np.searchsorted(self.edges[:-1], draws, side="right")


class Sizes:
    """The (height, width) of every batch: `size`, or `size` times one of `scales`, drawn evenly.

    Raises: ValueError for scales that do not give whole pixels.
    """

    def __init__(self, size: tuple[int, int], scales: Sequence[float] | None, *, seed: int) -> None:
        self.sizes = scaled_sizes(size, scales)
        self.schedule = Schedule([1.0] * len(self.sizes), seed=seed, purpose="sizes")

    def at(self, number: int) -> tuple[int, int]:
        """Of batch `number` of a rank, counted from 0."""
        return self.sizes[self.schedule.part(number)] if len(self.sizes) > 1 else self.sizes[0]


def scaled_sizes(size: tuple[int, int], scales: Sequence[float] | None) -> list[tuple[int, int]]:
    """`size` times each of the scales (None: once), in their order."""
    if scales is None:
        return [size]
    if not scales:
        raise ValueError(
            "data.size_scales=[] is empty; give factors such as [0.5, 0.75, 1.0, 1.25], or null for one size"
        )
    out = []
    for scale in scales:
        height, width = round(size[0] * scale), round(size[1] * scale)
        whole = abs(height - size[0] * scale) < 1e-6 and abs(width - size[1] * scale) < 1e-6
        if not whole or min(height, width) < 1:
            raise ValueError(
                f"data.size_scales={list(scales)}: {scale} times data.size={list(size)} is "
                f"{size[0] * scale:g} x {size[1] * scale:g}, no whole pixels; choose factors that give these"
            )
        out.append((height, width))
    return out


@functools.lru_cache(maxsize=8)
def _draws(purpose: str, seed: int, block: int) -> np.ndarray:
    """[DRAWS] float64 uniform in [0, 1): from the raw output of Philox, which numpy keeps over its versions."""
    key = int.from_bytes(blake2b(f"{purpose}\0{seed}\0{block}".encode(), digest_size=16).digest(), "big")
    return (np.random.Philox(key=key).random_raw(DRAWS) >> np.uint64(11)).astype(np.float64) * 2.0**-53
