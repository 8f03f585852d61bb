"""How many segments and windows a clip has, as far as its length says: what `vtok.layers.segments` will cut.

With segments.name=fixed, or one segment at most, the length says all; else the numbers are the fewest and the most
that any clip of that length is cut into.
"""

from __future__ import annotations

from vtok.layers.segments import SegmentConfig


def cut_by_length(cuts: SegmentConfig, *, most_frames: int) -> bool:
    """Whether the cuts of every clip of up to so many frames lie where its length says."""
    return cuts.name == "fixed" or cuts.most == 1 or (cuts.name == "topk" and cuts.most >= most_frames)


def fixed_sizes(frames: int, cuts: SegmentConfig) -> list[int]:
    """Frames of each segment, segments.name=fixed."""
    count = min(-(-frames // cuts.length), cuts.most)
    return [cuts.length] * (count - 1) + [frames - cuts.length * (count - 1)]


def segments_between(frames: int, cuts: SegmentConfig) -> tuple[int, int]:
    """Segments, at least and at most."""
    if cuts.name == "fixed":
        count = len(fixed_sizes(frames, cuts))
        return count, count
    most = min(cuts.most, frames)
    return most if cuts.name == "topk" else 1, most


def windows_between(frames: int, cuts: SegmentConfig, *, length: int) -> tuple[int, int]:
    """Windows of `length` frames, none across a cut: at least and at most.

    A window ends where `length` frames are full or its segment does. The fewest are those of segments that fill their
    windows; the most come of single frames beside one long segment.
    """
    if cuts.name == "fixed":
        count = sum(-(-size // length) for size in fixed_sizes(frames, cuts))
        return count, count
    few, many = segments_between(frames, cuts)
    return max(few, -(-frames // length)), many + (frames - many) // length
