"""Shards of a frozen tower's features, as `vtok features` writes them: the format, and windows of them as of videos.

    <key>.features.safetensors   what the tower made of the clip's frames (`Recording`)
    <key>.audio.safetensors      what an audio tower made of its sound, where it has one: a row for every step of time
    <key>.json                   the clip's own json, unchanged
    index.json                   shards, the tower's identity, what it saw: `vtok.data.feature_index`

    seconds      F64 [T]        of each frame the tower saw, in the clip
    crc32        I64 [S]        of each feature frame: header, seconds, then its row of every tensor below, in order
    patches      [S, N, D]      and frame [S, D'], keys [S, N, Dk] in the tower's dtype, attention.LAYER F32 [S, N]
    metadata     grid, stride, image, start_s, duration_s, end_s, fps, tolerance_s: json values

A window is picked by time as from a video whose frames these are, and only its rows are read. So features recorded at
the source's own frames, or at the rate of the source, give the very windows that training on pixels draws. What is
heard during its frames is averaged from the rows of that time.

Letters: B clips, T frames, S feature frames, N patches of a frame, A audio tokens of a frame, D width.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.data.feature_index import AGAIN, FeatureShardError
from vtok.data.sources import MAX_MEDIA_BYTES, BrokenSample
from vtok.data.view import Cached, Hearing, View
from vtok.types import Features, means_over

MAX_HEADER_BYTES = 1 << 20
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_FACTS = ("grid", "stride", "image", "start_s", "duration_s", "end_s", "fps", "tolerance_s")

Read = Callable[[int, int], bytes]  # (offset, bytes) of a member


@dataclass(frozen=True)
class Recording:
    """What is stored of a clip.

    features: of one clip [1, S, ...], without times. seconds: float64 [T], of the frames the tower saw. stride: frames
    behind a feature frame. start_s, duration_s: where windows may lie; end_s: until when the last frame is on show.
    fps: of the source, 0 for an image. tolerance_s: how much earlier than its time a frame may be asked for.
    """

    features: Features
    seconds: Tensor
    stride: int
    image: bool
    start_s: float
    duration_s: float
    end_s: float
    fps: float
    tolerance_s: float

    def to_bytes(self) -> bytes:
        """A safetensors file; written here, since the library orders its metadata differently from run to run."""
        found = self.features
        rows = {"patches": found.patches, "frame": found.frame, "keys": found.keys}
        rows |= {f"attention.{layer}": value for layer, value in (found.attention or {}).items()}
        kept = {name: value[0].contiguous() for name, value in rows.items() if value is not None}
        count = len(kept["patches"])
        tensors = {"seconds": self.seconds.double(), "crc32": torch.zeros(count, dtype=torch.int64), **kept}
        listed: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in self._facts().items()}}
        at = 0
        for name, value in tensors.items():
            size = value.numel() * value.element_size()
            listed[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(listed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        data = {name: _raw(value) for name, value in tensors.items()}
        base = zlib.crc32(data["seconds"], zlib.crc32(header))
        sums = _checksums([data[name] for name in kept], count, base)
        data["crc32"] = _raw(torch.tensor(sums, dtype=torch.int64))
        return b"".join((header, *data.values()))

    def _facts(self) -> dict[str, Any]:
        return {name: self.features.grid if name == "grid" else getattr(self, name) for name in _FACTS}


def _raw(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _checksums(tensors: Sequence[bytes], count: int, base: int) -> list[int]:
    """The CRC-32 of each of `count` rows over all tensors."""
    sums = [base] * count
    for data in tensors:
        view, size = memoryview(data), len(data) // count
        sums = [zlib.crc32(view[row * size : (row + 1) * size], value) for row, value in enumerate(sums)]
    return sums


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _File:
    """One features file behind `read`. Raises BrokenSample where it is not what `Recording` writes."""

    def __init__(self, read: Read, num_bytes: int) -> None:
        self._read = read
        try:
            size = int.from_bytes(read(0, 8), "little")
            if not 2 <= size <= min(MAX_HEADER_BYTES, num_bytes - 8):
                raise ValueError(f"a header of {size} bytes")
            self.header = read(0, 8 + size)
            listed = json.loads(self.header[8:])
            facts = {name: json.loads(listed["__metadata__"][name]) for name in _FACTS}
            self.entries = {
                name: _Entry(_TYPES[each["dtype"]], tuple(each["shape"]), 8 + size + each["data_offsets"][0])
                for name, each in listed.items()
                if name != "__metadata__"
            }
            end = 8 + size
            for name, entry in self.entries.items():
                if min(entry.shape) < 1 or entry.offset != end:
                    raise ValueError(f"{name} of shape {list(entry.shape)} at byte {entry.offset}")
                end += entry.num_bytes
            (self.total,), (self.count,) = self.entries["seconds"].shape, self.entries["crc32"].shape
            self.rows = {name: e for name, e in self.entries.items() if name not in ("seconds", "crc32")}
            self.grid: tuple[int, int] = (int(facts["grid"][0]), int(facts["grid"][1]))
            self.stride, self.image = int(facts["stride"]), bool(facts["image"])
            self.fps, self.tolerance_s = float(facts["fps"]), float(facts["tolerance_s"])
            self.start_s, self.duration_s = float(facts["start_s"]), float(facts["duration_s"])
            self.end_s = float(facts["end_s"])
            wrong = [name for name, entry in self.rows.items() if entry.shape[0] != self.count]
            if end != num_bytes or wrong or self.count != -(-self.total // self.stride) or "patches" not in self.rows:
                raise ValueError(f"{num_bytes} bytes, {self.count} feature frames of {self.total} frames, {wrong}")
        except BrokenSample:
            raise
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            ZeroDivisionError,
            RecursionError,
        ) as error:
            raise BrokenSample(f"the features are damaged: {error!r}; {AGAIN}") from error
        self._seconds = self._bytes(self.entries["seconds"])
        self.seconds = torch.frombuffer(bytearray(self._seconds), dtype=torch.float64)

    def _bytes(self, entry: _Entry, first: int = 0, stop: int | None = None) -> bytes:
        """Rows first to stop."""
        row = entry.num_bytes // entry.shape[0]
        stop = entry.shape[0] if stop is None else stop
        data = self._read(entry.offset + first * row, (stop - first) * row)
        if len(data) != (stop - first) * row:
            raise BrokenSample(f"the features are cut short; {AGAIN}")
        return data

    def features(self, wanted: Sequence[int]) -> Features:
        """The feature frames of these numbers (not decreasing) as [1, len(wanted), ...]. Raises BrokenSample."""
        sums = torch.frombuffer(bytearray(self._bytes(self.entries["crc32"])), dtype=torch.int64)
        base = zlib.crc32(self._seconds, zlib.crc32(self.header))
        parts: dict[str, list[Tensor]] = {name: [] for name in self.rows}
        distinct = sorted(set(wanted))
        for first, stop in _runs(distinct):
            data = {name: self._bytes(entry, first, stop) for name, entry in self.rows.items()}
            if _checksums(list(data.values()), stop - first, base) != sums[first:stop].tolist():
                raise BrokenSample(f"the features of frames {first} to {stop - 1} are damaged (checksum); {AGAIN}")
            for name, entry in self.rows.items():
                values = torch.frombuffer(bytearray(data[name]), dtype=entry.dtype)
                parts[name].append(values.view(stop - first, *entry.shape[1:]))
        found = {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in parts.items()}
        if len(distinct) != len(wanted):
            place = torch.searchsorted(torch.tensor(distinct), torch.tensor(wanted))
            found = {name: value[place] for name, value in found.items()}
        attention = {int(n.partition(".")[2]): v[None] for n, v in found.items() if n.startswith("attention.")}
        frame, keys = (found[name][None] if name in found else None for name in ("frame", "keys"))
        return Features(found["patches"][None], self.grid, frame=frame, attention=attention or None, keys=keys)


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of each stretch without gaps."""
    first = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[at - 1] + 1:
            yield rows[first], rows[at - 1] + 1
            first = at


class Window(NamedTuple):
    """A window of a clip. features: [1, S, ...] with times. times: float64 [T], of the frames behind them."""

    tower: str
    stride: int
    features: Features
    times: Tensor


def window_of_features(read: Read, num_bytes: int, view: View, rng: random.Random | None) -> Window:
    """The window that `vtok.data.view.decode_view` would take of the frames.

    Args:
        read: (offset, bytes) of a file of `num_bytes`. rng: draws the start; None takes the middle.
    Raises: BrokenSample; FeatureShardError for a window that a video tower did not see by itself.
    """
    assert view.cached is not None
    file = _File(read, num_bytes)
    index, times = _pick(file, view, view.cached, rng)
    if not index:  # a header whose times cannot be; its checksum is that of the rows
        raise BrokenSample(f"the features are damaged: no frame is on show from {file.start_s} s on; {AGAIN}")
    stride = file.stride
    rows = sorted({i // stride for i in index}) if stride > 1 else index
    found = file.features(rows)
    seconds = times.float()
    if stride > 1:
        seconds = torch.stack([group.sum() / len(group) for group in seconds.split(stride)])
    found = replace(found, times=seconds[None], attention_from=view.cached.attention_from)
    return Window(view.cached.name, stride, found, times)


def _pick(file: _File, view: View, cached: Cached, rng: random.Random | None) -> tuple[list[int], Tensor]:
    """Numbers of the frames of a window, and their times."""
    if file.image:
        return [0], file.seconds[:1]
    slack = max(0.0, file.duration_s - view.num_frames / (view.fps or file.fps or 1.0))
    start = file.start_s + slack * (0.5 if rng is None else rng.random())
    if start >= file.end_s - file.tolerance_s:  # the container's duration was that of a longer sound track
        start = file.start_s
    if cached.window > 1 or view.fps is None:
        first = _on_show(file, torch.tensor([start], dtype=torch.float64))[0]
        first = first // cached.window * cached.window
        stop = min(first + view.num_frames, file.total)
        if stop < file.total and (stop - first) % cached.window:
            raise FeatureShardError(
                f"data.num_frames={view.num_frames} is no multiple of the {cached.window} frames that {cached.name} "
                f"sees at once, and a clip has {file.total}: features of a part of such a window were not recorded. "
                f"Set data.num_frames to a multiple of {cached.window}"
            )
        return list(range(first, stop)), file.seconds[first:stop]
    wanted = [start + i / view.fps for i in range(view.num_frames)]
    times = torch.tensor([t for t in wanted if t < file.end_s - file.tolerance_s], dtype=torch.float64)
    return _on_show(file, times), times


def _on_show(file: _File, times: Tensor) -> list[int]:
    """Numbers of the frames on show at `times`."""
    after = torch.searchsorted(file.seconds, times + file.tolerance_s, right=True)
    return (after - 1).clamp(min=0).tolist()


def recorded_sound(vectors: Tensor, hearing: Hearing, *, first: int) -> Recording:
    """The recording of a sound. vectors: [S, D], one for each `hearing.step` samples; first: the first one's number."""
    numbers = torch.arange(first, first + len(vectors) + 1, dtype=torch.float64)
    seconds = numbers * hearing.step / hearing.rate
    begin, end = float(seconds[0]), float(seconds[-1])
    facts: dict[str, Any] = {"image": False, "fps": hearing.rate / hearing.step, "tolerance_s": 0.0}
    span: dict[str, Any] = {"start_s": begin, "duration_s": end - begin, "end_s": end}
    return Recording(Features(vectors[None, :, None], (1, 1)), seconds[:-1], stride=1, **facts, **span)


def heard_in_window(read: Read | None, num_bytes: int, hearing: Hearing, times: Tensor, spans: Tensor) -> Window:
    """What an audio tower made of the sound during some frames.

    Args:
        read: (offset, bytes) of the file of a clip's sound, of `num_bytes`; None: it has none.
        times: float64 [T]. spans: int64 [T, 2], samples between which each frame is on show.
    Returns: features [1, T, A, D] as `vtok.vision.AudioTower` gives them. Raises: BrokenSample.
    """
    first, vectors = 0, torch.zeros(0, hearing.width, dtype=getattr(torch, hearing.dtype))
    if read is not None:
        file = _File(read, num_bytes)
        patches, begin = file.entries["patches"], round(file.start_s * hearing.rate / hearing.step)
        if (patches.dtype, patches.shape[1:]) != (vectors.dtype, (1, hearing.width)):
            raise BrokenSample(f"the sound's features are {patches.dtype} of shape {list(patches.shape)}; {AGAIN}")
        first = max(begin, int(spans.min()) // hearing.step)
        stop = min(begin + file.count, -(-int(spans.max()) // hearing.step))
        if first < stop:
            vectors = file.features(range(first - begin, stop - begin)).patches[0, :, 0]
    means, share = means_over(vectors, (spans.double() / hearing.step) - first, hearing.tokens)
    found = Features(means[None], (1, hearing.tokens), times=times.float()[None], frame=share[None, :, None])
    return Window(hearing.name, 1, found, times)


def collate_features(windows: Sequence[Window], frames: int) -> Features:
    """The features of several clips as one batch, padded with zeros (times: the last one) to `frames` frames."""
    steps = -(-frames // windows[0].stride)
    each = [window.features for window in windows]
    shapes = {(f.grid, f.patches.shape[2:], f.patches.dtype, tuple(f.attention or ())) for f in each}
    if len(shapes) > 1:
        raise ValueError(f"data.shards holds features of different shapes: {sorted(map(str, shapes))}")
    counts = torch.tensor([f.patches.shape[1] for f in each])

    def padded(values: Sequence[Tensor | None]) -> Tensor | None:
        first = values[0]
        if first is None:
            return None
        out = first.new_zeros((len(values), steps, *first.shape[2:]))
        for row, value in enumerate(values):
            assert value is not None
            out[row, : value.shape[1]] = value[0]
        return out

    times = torch.empty(len(each), steps)
    for row, f in enumerate(each):
        assert f.times is not None
        times[row, : f.times.shape[1]] = f.times[0]
        times[row, f.times.shape[1] :] = windows[row].times[-1]
    patches = padded([f.patches for f in each])
    assert patches is not None
    full = all(len(window.times) == frames for window in windows)
    attention = {n: padded([(f.attention or {})[n] for f in each]) for n in each[0].attention or {}}
    return Features(
        patches,
        each[0].grid,
        times=times,
        frame=padded([f.frame for f in each]),
        attention={n: value for n, value in attention.items() if value is not None} or None,
        keys=padded([f.keys for f in each]),
        lengths=None if full else counts,
        attention_from=each[0].attention_from,
    )


def check_size(num_bytes: int) -> None:
    """Raises BrokenSample for a clip whose features no reader would take."""
    if num_bytes > MAX_MEDIA_BYTES - MAX_HEADER_BYTES:
        raise BrokenSample(
            f"its features take more than {MAX_MEDIA_BYTES >> 30} GiB; cut clips with `vtok shards --clip-seconds`, or "
            "record fewer frames (--fps, --frames)"
        )
