"""Encoded bytes to uint8 RGB frames, with PyAV: whole videos, windows by time, single images.

Decoding is strict (`vtok.data.strict`): damage is a `DecodeError`, never a wrong frame.

Time: seconds from the first displayed frame. A frame is shown from its own timestamp until the next one's, so picking
by time is right for variable frame rates too.

Orientation: rotation and mirroring in the container (or EXIF) are applied; sizes given are those of the upright frame.

Colour: swscale converts to full-range RGB by the matrix and range the stream declares (BT.601, BT.709, BT.2020 ...;
limited or full). Where it declares none, BT.601 limited is assumed, as the ffmpeg command line does. Transfer curves
stay as they are (HDR is not tone-mapped), alpha is dropped, the pixel aspect ratio is not applied.

Legend: T frames, H height, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from vtok.data.strict import MAX_FRAME_PIXELS, DecodeError, PastEnd, Source, StrictVideo, as_decode_error

__all__ = ["DecodeError", "PastEnd", "VideoInfo", "VideoReader", "decode_window", "iter_frames", "probe"]


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    width, height: pixels of the upright frame. fps: mean rate; 0.0 for a still image. frames: number of frames as the
    container counts them, None when it does not. duration_s: seconds; 0.0 for a still image. codec: libav's name.
    rotation: degrees counterclockwise (0, 90, 180, 270) applied to make the stored frame upright. pix_fmt: libav's name
    of the decoded format.
    """

    width: int
    height: int
    fps: float
    frames: int | None
    duration_s: float
    codec: str
    rotation: int
    pix_fmt: str
    has_audio: bool

    @property
    def is_image(self) -> bool:
        return self.fps == 0.0


def probe(source: Source) -> VideoInfo:
    """What `source` holds, after decoding its first frame. Raises DecodeError."""
    with VideoReader(source) as reader:
        return reader.info()


def iter_frames(
    source: Source, *, start_s: float = 0.0, end_s: float | None = None, threads: int = 1
) -> Iterator[tuple[np.ndarray, float]]:
    """Every frame shown in [start_s, end_s), in order, in constant memory.

    Yields (uint8 [H, W, 3] upright RGB, seconds at which it appears). The first is the frame on show at start_s, so its
    own time may lie before start_s. Raises DecodeError at the first damaged packet or frame.
    """
    with VideoReader(source, threads=threads) as reader:
        yield from reader.frames(start_s=start_s, end_s=end_s)


def decode_window(
    source: Source,
    *,
    times: Sequence[float] | None = None,
    start_s: float = 0.0,
    num_frames: int | None = None,
    fps: float | None = None,
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """The frames on show at the wanted times, decoding from the keyframe before the first.

    Args:
        source: bytes, or a path.
        times: wanted seconds, not decreasing. Instead of it: start_s, num_frames and fps give start_s + i / fps;
            with fps None, `num_frames` successive source frames from start_s on.
        threads: decoder threads (frame threading adds latency and memory; loader workers are the parallelism).
    Returns: frames uint8 [T, H, W, 3] upright RGB; times float64 [T], the wanted ones (the frames' own with fps None).
        T is smaller than asked when the video ends first, and at least 1.
    Raises: DecodeError for damage or when the video ends before the first wanted time. ValueError for a bad request.
    """
    with VideoReader(source, threads=threads) as reader:
        return reader.window(times=times, start_s=start_s, num_frames=num_frames, fps=fps)


class VideoReader(StrictVideo):
    """One open video (or image): several windows of it cost one opening.

    Use as a context manager. Every method raises DecodeError for damage.
    """

    def __init__(self, source: Source, *, threads: int = 1, max_frame_pixels: int = MAX_FRAME_PIXELS) -> None:
        self._reformatter = VideoReformatter()
        self._matrix: tuple[bool, bool, bool] | None = None  # transpose, then mirror horizontally, then vertically
        super().__init__(source, threads=threads, max_frame_pixels=max_frame_pixels)

    def info(self) -> VideoInfo:
        """Sizes after rotation come from the first frame, which is decoded for it."""
        frame, _ = next(self._decode(0.0), (None, 0.0))
        if frame is None:
            raise DecodeError("0 frames")
        transpose, mirror, flip = self._orientation(frame)
        height, width = (frame.width, frame.height) if transpose else (frame.height, frame.width)
        turns = {(False, False, False): 0, (True, False, True): 90, (False, True, True): 180, (True, True, False): 270}
        image = self.is_image
        duration = self.duration_s
        return VideoInfo(
            width=width,
            height=height,
            fps=self.fps,
            frames=1 if image else self._stream.frames or None,
            duration_s=self._scan_duration() if duration is None else duration,
            codec=self._stream.codec_context.name,
            rotation=turns.get((transpose, mirror, flip), 0),
            pix_fmt=frame.format.name,
            has_audio=any(s.type == "audio" for s in self._container.streams),
        )

    def frames(self, *, start_s: float = 0.0, end_s: float | None = None) -> Iterator[tuple[np.ndarray, float]]:
        """As `iter_frames`."""
        shown: VideoFrame | None = None
        since, until = 0.0, 0.0
        for frame, seconds in self._from(start_s):
            if seconds <= start_s + self._tolerance:
                shown, since, until = frame, seconds, seconds + self._shown_for(frame)
                continue
            if shown is not None:
                yield self._rgb(shown), since
                shown = None
            if end_s is not None and seconds >= end_s - self._tolerance:
                return
            yield self._rgb(frame), seconds
        if shown is not None and start_s < until - self._tolerance:
            yield self._rgb(shown), since

    def window(
        self,
        *,
        times: Sequence[float] | None = None,
        start_s: float = 0.0,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `decode_window`."""
        if times is None:
            if num_frames is None or num_frames < 1:
                raise ValueError(f"num_frames={num_frames} with times=None: ask for 1 or more frames, or give times")
            if fps is not None and not fps > 0:
                raise ValueError(f"fps={fps} must be above 0 (None keeps the source's frames)")
            if fps is None:
                return self._successive(start_s, num_frames)
            times = [start_s + i / fps for i in range(num_frames)]
        wanted = [float(t) for t in times]
        if not wanted or wanted[0] < 0 or any(b < a for a, b in zip(wanted, wanted[1:])):
            raise ValueError(f"times must be one or more seconds >= 0, not decreasing; got {wanted[:8]}")
        return self._pick(wanted)

    def _successive(self, start_s: float, num_frames: int) -> tuple[Tensor, Tensor]:
        frames, times = [], []
        for frame, seconds in self.frames(start_s=start_s):
            frames.append(frame)
            times.append(seconds)
            if len(frames) == num_frames:
                break
        if not frames:
            raise PastEnd(f"the video ends before {start_s:.3f} s")
        _check_sizes(frames)
        return torch.from_numpy(np.stack(frames)), torch.tensor(times, dtype=torch.float64)

    def _pick(self, wanted: list[float]) -> tuple[Tensor, Tensor]:
        out: Any = None
        written: VideoFrame | None = None
        done = 0

        def emit(frame: VideoFrame) -> None:
            nonlocal out, written, done
            if frame is written and out is not None:
                out[done] = out[done - 1]
            else:
                pixels = self._rgb(frame)
                if out is None:
                    out = np.empty((len(wanted), *pixels.shape), np.uint8)
                if pixels.shape != out.shape[1:]:
                    raise DecodeError(f"the frame size changes from {out.shape[1:3]} to {pixels.shape[:2]}")
                out[done] = pixels
                written = frame
            done += 1

        for frame in self._on_show(wanted):
            emit(frame)
        assert out is not None
        return torch.from_numpy(out[:done]), torch.tensor(wanted[:done], dtype=torch.float64)

    def at_rate(self, fps: float | Fraction) -> Iterator[np.ndarray]:
        """The whole video at `fps`, uint8 [H, W, 3] each: what `window` picks from 0 s on, in constant memory."""
        if not fps > 0:
            raise ValueError(f"fps={fps} must be above 0")
        picked: VideoFrame | None = None
        pixels: np.ndarray | None = None
        for frame in self._on_show(float(i / fps) for i in itertools.count()):
            if frame is not picked or pixels is None:
                picked, pixels = frame, self._rgb(frame)
            yield pixels

    def _on_show(self, wanted: Iterable[float]) -> Iterator[VideoFrame]:
        """The frame on show at each of the wanted seconds (not decreasing), until the video or the times end."""
        times = iter(wanted)
        first = want = next(times)
        shown: VideoFrame | None = None
        end, count = 0.0, 0
        for frame, seconds in self._from(want):
            # Before the first frame there is nothing on show: the first frame itself is taken.
            while want + self._tolerance < seconds:
                yield frame if shown is None else shown
                count += 1
                if (following := next(times, None)) is None:
                    return
                want = following
            shown, end = frame, seconds + self._shown_for(frame)
        if shown is None:
            raise DecodeError("0 frames")
        while want < end - self._tolerance:
            yield shown
            count += 1
            if (following := next(times, None)) is None:
                return
            want = following
        if not count:
            raise PastEnd(f"the video ends at {end:.3f} s, before {first:.3f} s")

    def _from(self, start_s: float) -> Iterator[tuple[VideoFrame, float]]:
        """Frames in order; the one on show at start_s and all later ones are among them, earlier ones may be.

        Seeking can fail where the stream itself is fine (no index, a wrong index, frames that refer to pictures before
        an open keyframe): then decoding from the beginning decides whether the file is damaged.
        """
        lead = self._seek(start_s) if start_s > 0 and not self.is_image else None
        if lead is None:
            yield from self._decode(0.0)
        else:
            yield from lead[0]
            yield from lead[1]

    def _seek(self, start_s: float) -> tuple[list[tuple[VideoFrame, float]], Iterator[tuple[VideoFrame, float]]] | None:
        """[the frame on show at start_s, the next] and an iterator over the rest; None where seeking did not work."""
        shown: tuple[VideoFrame, float] | None = None
        frames = self._decode(start_s)
        try:
            for item in frames:
                if item[1] > start_s + self._tolerance:
                    return None if shown is None else ([shown, item], frames)
                shown = item
        except DecodeError:
            return None
        return None if shown is None else ([shown], iter(()))

    def _orientation(self, frame: VideoFrame) -> tuple[bool, bool, bool]:
        """(transpose, then mirror horizontally, then flip vertically) from the display matrix, which maps pixels
        (x, y) to (a x + c y, b x + d y); turns that are no multiple of 90 degrees are rounded to one."""
        if self._matrix is None:
            side_data: Any = frame.side_data  # typed as a mapping, but it iterates over its values
            data = next((bytes(s) for s in side_data if s.type.name == "DISPLAYMATRIX"), None)
            if data is None or len(data) < 36:
                self._matrix = (False, False, False)
            else:
                a, b, _, c, d = (int(v) for v in np.frombuffer(data, np.int32, 5))
                transpose = abs(b) + abs(c) > abs(a) + abs(d)
                self._matrix = (True, c < 0, b < 0) if transpose else (False, a < 0, d < 0)
        return self._matrix

    def _rgb(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [H, W, 3], upright; a view where nothing has to move."""
        try:
            converted = self._reformatter.reformat(frame, format="rgb24", threads=1)
        except Exception as error:
            raise as_decode_error(error) from error
        plane: Any = converted.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        pixels = rows[:, : plane.width * 3].reshape(plane.height, plane.width, 3)
        transpose, mirror, flip = self._orientation(frame)
        if transpose:
            pixels = pixels.swapaxes(0, 1)
        if mirror:
            pixels = pixels[:, ::-1]
        if flip:
            pixels = pixels[::-1]
        return pixels


def _check_sizes(frames: Sequence[np.ndarray]) -> None:
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise DecodeError(f"the frame size changes: {sorted(sizes)}")
