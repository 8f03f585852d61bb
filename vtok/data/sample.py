"""A reference to a sample into tensors and texts (`load_sample`), and several of those into a `Clip` (`collate`).

Legend: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.data.sources import BrokenSample, Sample, ShardReader
from vtok.data.view import View, decode_view, fit, map_view
from vtok.types import Clip


class Item(NamedTuple):
    key: str
    video: Tensor  # uint8 [3, T, H, W]; of a map uint8 or float32 [C, T, H, W]
    times: Tensor  # [T]
    text: str | None
    qa: list[Any] | None


def read_facts(reader: ShardReader, sample: Sample) -> dict[str, Any]:
    """The json of a sample, its txt as the caption where there is one. Raises BrokenSample, OSError."""
    facts: Any = {}
    if "json" in sample.members:
        try:
            facts = json.loads(reader.read(sample, "json"))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, BrokenSample) else BrokenSample(f".json is not json: {error}") from error
        if not isinstance(facts, dict):
            raise BrokenSample(f".json holds a {type(facts).__name__}, not an object")
    if "txt" in sample.members:
        facts["caption"] = reader.read(sample, "txt").decode("utf-8", errors="replace")
    return facts


def load_sample(reader: ShardReader, sample: Sample, view: View, *, rng: random.Random | None, key: str) -> Item:
    """One decoded sample. Raises DecodeError, BrokenSample or OSError."""
    facts = read_facts(reader, sample)
    caption, qa = facts.get("caption"), facts.get("qa")
    if caption is not None and not isinstance(caption, str):
        raise BrokenSample(f"caption is a {type(caption).__name__}, not a string")
    if qa is not None and not isinstance(qa, list):
        raise BrokenSample(f"qa is a {type(qa).__name__}, not a list")
    suffix = next(suffix for suffix in view.media if suffix in sample.members)
    if view.map:
        fps = facts.get("fps")
        if fps is not None and not (type(fps) in (int, float) and math.isfinite(fps) and fps > 0):
            raise BrokenSample(f"fps is {str(fps)[:40]!r}, not a number above 0")
        read = functools.partial(_read_part, reader, sample, suffix)
        frames, times = map_view(read, sample.members[suffix][1], view, rng, fps=fps)
    else:
        frames, times = decode_view(reader.read(sample, suffix), view, rng)
    return Item(key, fit(frames, view, rng), times.float(), caption, qa)


def _read_part(reader: ShardReader, sample: Sample, suffix: str, first: int, num_bytes: int) -> bytes:
    return reader.read(sample, suffix, first=first, num_bytes=num_bytes)


def collate(items: Sequence[Item], *, frames: int | None = None) -> Clip:
    """Items as one batch, padded with repeats of the last frame (and its time) to `frames`; None: to the longest.

    Where uint8 and float maps meet in a batch, all become float32 in [-1, 1]. Raises ValueError where clips have
    different numbers of channels.
    """
    channels = {item.video.shape[0]: item.key for item in items}
    if len(channels) > 1:
        told = ", ".join(f"{count} in {key!r}" for count, key in sorted(channels.items()))
        raise ValueError(f"the dense maps of data.shards have different numbers of channels: {told}; use one number")
    if len({item.video.dtype for item in items}) > 1:
        items = [item._replace(video=_as_float(item.video)) for item in items]
    counts = [item.video.shape[1] for item in items]
    most = frames or max(counts)
    first = items[0].video
    video = torch.empty((len(items), first.shape[0], most, *first.shape[2:]), dtype=items[0].video.dtype)
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


def _as_float(video: Tensor) -> Tensor:
    return video if video.is_floating_point() else video.float().div_(127.5).sub_(1.0)
