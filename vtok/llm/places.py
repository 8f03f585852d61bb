"""Placeholders of a text, once it is known how many tokens stand for each: ids, labels and positions of every row.

    ids      5 8 V V V 4 | 7 2      V = a placeholder's id, one of them or as many as a processor wrote
    made     5 8 V V 4 7 2          as many as the video has tokens
    rows are padded on the left to generate

Letters: B rows, L positions, K tokens of one video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where tokens go: ids [start:stop] give way to `count` of them. item: whose tokens; first: the first of those."""

    start: int
    stop: int
    item: int
    first: int
    count: int


@dataclass
class Span:
    """Where the tokens of one item lie on the grid that its VLM counts in M-RoPE: extent (T, h, w), [K, 3] in [0, 1],
    step: units of time from frame to frame."""

    extent: tuple[int, int, int]
    positions: Tensor
    step: float = 1.0


def find_places(
    rows: Sequence[Sequence[int]], token: int, sizes: Sequence[Sequence[int]], kind: str
) -> list[list[Place]]:
    """The places of every row for items in the order of the text.

    An item has one id, or one unbroken run of them (what a processor wrote for the VLM's own number of tokens), or one
    run for each of its groups, text in between.

    Args:
        rows: ids of each row, without padding. token: the placeholder. sizes: tokens of each group of each item.
    Raises: ValueError where placeholders and items do not fit.
    """
    runs = [_runs(row, token) for row in rows]
    ids, spans, items = sum(b - a for row in runs for a, b in row), sum(map(len, runs)), len(sizes)
    groups = sum(map(len, sizes))
    if ids == items:
        runs = [[(at, at + 1) for a, b in row for at in range(a, b)] for row in runs]
    wanted: list[tuple[int, int, int]] = []
    if items in (ids, spans):
        wanted = [(item, 0, sum(size)) for item, size in enumerate(sizes)]
    elif spans == groups:
        wanted = [(i, sum(size[:g]), count) for i, size in enumerate(sizes) for g, count in enumerate(size)]
    every = iter(wanted)
    out = [[Place(a, b, *next(every)) for a, b in row] for row in runs] if wanted else []
    homes = [item for row in out for item in {place.item for place in row}]
    if len(homes) != len(set(homes)) or (not wanted and max(items, ids)):
        raise ValueError(
            f"{items} {kind}(s) were given, the texts have {ids} placeholder(s) {token} in {spans} run(s): write one "
            f"for each {kind} (tokenize the chat template's own text), or a run for each of its groups, {groups} in all"
        )
    return out or [[] for _ in rows]


def _runs(row: Sequence[int], token: int) -> list[tuple[int, int]]:
    """(first, end) of every unbroken run of `token`."""
    out: list[tuple[int, int]] = []
    for at, value in enumerate(row):
        if value == token:
            if out and out[-1][1] == at:
                out[-1] = (out[-1][0], at + 1)
            else:
                out.append((at, at + 1))
    return out


def expand(values: Sequence[int], places: Sequence[Place], fill: int | None = None) -> list[int]:
    """A row with as many entries for each place as it has tokens: the placeholder's own, or `fill`."""
    out, at = [], 0
    for place in places:
        out += values[at : place.start]
        out += [values[place.start] if fill is None else fill] * place.count
        at = place.stop
    return [*out, *values[at:]]


def grid_positions(length: int, places: Sequence[Place], where: Sequence[Span | None]) -> Tensor:
    """[3, L] int64 positions (time, row, column) of a row of `length` ids before expansion, as M-RoPE counts them.

    Text counts on along all three axes. Tokens that all have a place are put on their grid's cell, time counted from
    the first of the run; the text after begins where the longer side of the grid ends. Others count on like text.
    """
    parts: list[Tensor] = []
    at = now = 0

    def count(number: int) -> None:
        nonlocal now
        parts.append((torch.arange(number) + now).expand(3, -1))
        now += number

    for place in places:
        count(place.start - at)
        at = place.stop
        item = where[place.item]
        cells = None if item is None else item.positions[place.first : place.first + place.count].float().cpu()
        if item is None or cells is None or not len(cells) or bool(cells.isnan().any()):
            count(place.count)
            continue
        extent = torch.tensor(item.extent)
        # a cell's middle is (i + 0.5) / n: what lies on an edge belongs to the cell that it opens
        index = torch.minimum((cells * extent).floor().long().clamp(min=0), extent - 1)  # [K, 3]
        index[:, 0] = ((index[:, 0] - index[:, 0].min()) * item.step).long()
        parts.append(index.T + now)
        now += max(item.extent[1:])
    count(length - at)
    return torch.cat(parts, 1)


def pad_rows(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """[B, L] int64 and its mask: rows of different lengths, padded with `fill`."""
    most = max(map(len, rows))
    out = torch.full((len(rows), most), fill, dtype=torch.int64)
    mask = torch.zeros_like(out)
    for index, row in enumerate(rows):
        here = slice(most - len(row), most) if left else slice(0, len(row))
        out[index, here] = torch.tensor(list(row), dtype=torch.int64)
        mask[index, here] = 1
    return out, mask
