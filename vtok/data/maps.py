"""Dense maps: `<key>.npy` beside or in place of a video, such as pose heat maps, depth, flow or latents.

A map is an array [T, H, W, C] in C order: uint8 (0 to 255, as pixels), or float16 or float32 in [-1, 1]. Frame k goes
with frame k of the clip's video; without one it is on show from k / fps on, with the `fps` of `<key>.json`.

The header is parsed here and the rest is plain numbers: nothing is ever unpickled, nothing is allocated that the file
does not hold, and only the frames of a window are read.

Legend: T frames, H height, W width, C channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtok.data.strict import DecodeError

MAX_HEADER = 10_000  # bytes of text: numpy's own limit
HEAD_BYTES = MAX_HEADER + 12
DTYPES = ("uint8", "float16", "float32")
CHECKED_AT_ONCE = 1 << 24  # values
EPSILON_S = 1e-6  # a wanted time this close before a frame's own shows that frame


class MapError(DecodeError):
    """The bytes are not a dense map as it must be; the message says why."""


@dataclass(frozen=True)
class MapHeader:
    """What a .npy file says of itself. shape: (T, H, W, C). offset: bytes before the first frame."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    offset: int

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(head: bytes, num_bytes: int) -> MapHeader:
    """The checked header of a .npy file of `num_bytes`, given its first `HEAD_BYTES` (or all). Raises MapError."""
    if len(head) < 10 or head[:6] != b"\x93NUMPY":
        raise MapError("not a .npy file" if head else "0 bytes")
    version = (head[6], head[7])
    if version not in ((1, 0), (2, 0)):
        raise MapError(f".npy of version {version[0]}.{version[1]}; write it with numpy.save")
    file = io.BytesIO(head[8:])
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = parse(file, max_header_size=MAX_HEADER)
    except (Exception, RecursionError) as error:  # numpy's parser lets out whatever the text provokes
        raise MapError(f"its .npy header cannot be read: {str(error)[:200]}") from error
    if dtype.hasobject or dtype.kind not in "uf" or dtype.newbyteorder("=").name not in DTYPES:
        raise MapError(f"its dtype is {dtype}; a map is uint8, or float16 or float32 in [-1, 1]")
    if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise MapError(f"its shape is {list(shape)[:8]}; a map is [T, H, W, C], none of them 0")
    if fortran:
        raise MapError("it is stored in Fortran order; save numpy.ascontiguousarray of it")
    header = MapHeader(shape, dtype, 8 + file.tell())
    wanted = header.offset + shape[0] * header.frame_bytes
    if num_bytes != wanted:
        kind = "cut short" if num_bytes < wanted else "too long"
        raise MapError(f"{kind}: {num_bytes} bytes, a map of shape {list(shape)} has {wanted}")
    return header


def check_values(frames: np.ndarray) -> None:
    """Raises MapError where floats are not finite or lie outside [-1, 1]; uint8 is always right."""
    if frames.dtype.kind != "f":
        return
    step = max(1, CHECKED_AT_ONCE // max(1, math.prod(frames.shape[1:])))
    for first in range(0, len(frames), step):
        part = frames[first : first + step]
        low, high = float(part.min()), float(part.max())  # NaN anywhere makes both NaN
        if not (low >= -1.0 and high <= 1.0):
            what = "values that are not finite" if not math.isfinite(low + high) else f"values in [{low:g}, {high:g}]"
            raise MapError(f"{what}; a float map must lie in [-1, 1]")


def window_of_map(
    read: Callable[[int, int], bytes],
    header: MapHeader,
    *,
    start_s: float,
    num_frames: int,
    source_fps: float,
    fps: float | None,
) -> tuple[Tensor, Tensor]:
    """The frames on show at start_s + i / fps, as `vtok.data.decode.decode_window` picks them.

    Args:
        read: (offset, bytes) of the file. source_fps: frames per second of the map. fps: None takes successive frames.
    Returns: uint8 or float32 [T, H, W, C]; times float64 [T]. T is smaller than asked where the map ends first.
    Raises: MapError for float values that are not in [-1, 1].
    """
    total = header.shape[0]
    if fps is None:
        first = int((start_s + EPSILON_S) * source_fps)
        picks = list(range(first, min(first + num_frames, total)))
        times = [pick / source_fps for pick in picks]
    else:
        times = [start_s + i / fps for i in range(num_frames)]
        times = [t for t in times if t < total / source_fps - EPSILON_S]
        picks = [min(int((t + EPSILON_S) * source_fps), total - 1) for t in times]
    low, high = picks[0], picks[-1] + 1
    data = read(header.offset + low * header.frame_bytes, (high - low) * header.frame_bytes)
    frames = np.frombuffer(data, header.dtype).reshape(high - low, *header.shape[1:])
    frames = frames[[pick - low for pick in picks]]
    frames = frames if frames.dtype == np.uint8 else frames.astype(np.float32)
    check_values(frames)  # numpy compares float16 one value at a time: after the cast it costs a third
    return torch.from_numpy(frames), torch.tensor(times, dtype=torch.float64)


def open_map(path: Path) -> np.ndarray:
    """The map in a file, [T, H, W, C], mapped into memory; its values are not checked. Raises MapError."""
    try:
        with open(path, "rb") as file:
            header = read_header(file.read(HEAD_BYTES), path.stat().st_size)
        return np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=header.shape)
    except OSError as error:
        raise MapError(f"cannot read: {error.strerror or error}") from error


def parse_map(data: bytes) -> np.ndarray:
    """The map in the bytes of a .npy file, [T, H, W, C], checked. Raises MapError."""
    header = read_header(data[:HEAD_BYTES], len(data))
    frames = np.frombuffer(data, header.dtype, offset=header.offset).reshape(header.shape)
    check_values(frames)
    return frames


def map_bytes(frames: np.ndarray) -> bytes:
    """A .npy file of [T, H, W, C]."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(frames), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def cut_map(frames: np.ndarray, *, times: Sequence[float], shown: Sequence[float]) -> bytes:
    """A .npy file of the map's frames that go with a cut of its video.

    Args:
        times: seconds of every frame of the video. shown: of those that the cut holds, in order, repeats included.
    Raises: MapError where the map has another number of frames, or values it may not hold.
    """
    check_count(len(frames), len(times))
    known = np.asarray(times)
    after = np.searchsorted(known, shown).clip(1, max(1, len(known) - 1))
    before = after - 1
    after = np.minimum(after, len(known) - 1)
    seconds = np.asarray(shown)
    picks = np.where(np.abs(known[before] - seconds) <= np.abs(known[after] - seconds), before, after)
    kept = np.asarray(frames[picks])
    check_values(kept)
    return map_bytes(kept)


def check_count(map_frames: int, video_frames: int) -> None:
    """Raises MapError where map and video have different numbers of frames."""
    if map_frames != video_frames:
        raise MapError(f"the map has {map_frames} frames, the video {video_frames}; frame k must go with frame k")
