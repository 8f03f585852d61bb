"""Texts of a sample that its window of frames can bear out."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def visible_questions(qa: list[Any] | None, times: Tensor) -> list[Any] | None:
    """The questions whose answers can be seen in a window: those with a span only where all of it is inside.

    A window of an instant every `step` seconds reaches from one step before its first frame (none was picked in
    between) to one after its last. Questions without a span stay, as `vtok shards` keeps them with every clip.

    Args:
        qa: entries with `start_s` and `end_s` in seconds of the clip, or without. times: [T] seconds of its frames.
    """
    if not qa or not len(times):
        return qa
    first, last = float(times[0]), float(times[-1])
    step = float(times.diff().max()) if len(times) > 1 else 0.0

    def inside(entry: Any) -> bool:
        span = (entry.get("start_s"), entry.get("end_s")) if isinstance(entry, dict) else (None, None)
        if not all(type(second) in (int, float) for second in span):
            return True
        start, end = (float(second) for second in span)  # pyright: ignore[reportArgumentType]
        return start > first - step - 1e-3 and end < last + step + 1e-3

    return [entry for entry in qa if inside(entry)]
