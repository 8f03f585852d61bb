"""A reference to a sample into tensors and texts (`load_sample`), and several of those into a `Clip` (`collate`).

Legend: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.data.sources import MEDIA, BrokenSample, Sample, ShardReader
from vtok.data.view import View, decode_view, fit
from vtok.types import Clip


class Item(NamedTuple):
    key: str
    video: Tensor  # uint8 [3, T, H, W]
    times: Tensor  # [T]
    text: str | None
    qa: list[Any] | None


def load_sample(reader: ShardReader, sample: Sample, view: View, *, rng: random.Random | None, key: str) -> Item:
    """One decoded sample. Raises DecodeError, BrokenSample or OSError."""
    facts: Any = {}
    if "json" in sample.members:
        try:
            facts = json.loads(reader.read(sample, "json"))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, BrokenSample) else BrokenSample(f".json is not json: {error}") from error
        if not isinstance(facts, dict):
            raise BrokenSample(f".json holds a {type(facts).__name__}, not an object")
    caption, qa = facts.get("caption"), facts.get("qa")
    if "txt" in sample.members:
        caption = reader.read(sample, "txt").decode("utf-8", errors="replace")
    if caption is not None and not isinstance(caption, str):
        raise BrokenSample(f"caption is a {type(caption).__name__}, not a string")
    if qa is not None and not isinstance(qa, list):
        raise BrokenSample(f"qa is a {type(qa).__name__}, not a list")
    suffix = next(suffix for suffix in MEDIA if suffix in sample.members)
    frames, times = decode_view(reader.read(sample, suffix), view, rng)
    return Item(key, fit(frames, view, rng), times.float(), caption, qa)


def collate(items: Sequence[Item], *, frames: int | None = None) -> Clip:
    """Items as one batch, padded with repeats of the last frame (and its time) to `frames`; None: to the longest."""
    counts = [item.video.shape[1] for item in items]
    most = frames or max(counts)
    first = items[0].video
    video = torch.empty((len(items), 3, most, *first.shape[2:]), dtype=torch.uint8)
    times = torch.empty((len(items), most))
    for row, item in enumerate(items):
        video[row, :, : counts[row]] = item.video
        video[row, :, counts[row] :] = item.video[:, -1:]
        times[row, : counts[row]] = item.times
        times[row, counts[row] :] = item.times[-1]
    return Clip(
        keys=[item.key for item in items],
        video=video,
        lengths=None if min(counts) == most else torch.tensor(counts),
        times=times,
        text=[item.text or "" for item in items] if any(item.text for item in items) else None,
        qa=[item.qa or [] for item in items] if any(item.qa for item in items) else None,
    )
