"""Encoded bytes to uint8 RGB frames and back, with PyAV.

Decoding is strict: libav's decoders conceal damage by default (twenty flipped bytes give a full set of wrong frames and
no error), so every decoder here runs with `err_detect=crccheck+explode`, corrupt packets and frames are refused, an end
before the stated duration is refused, and anything that goes wrong becomes a `DecodeError`. What a format cannot tell
(VP9 and WebP carry no redundancy: a flipped bit is another valid picture) is left to the checksums of the shards. Only
known media containers are opened, and never a playlist or a network address, so that bytes from an untrusted shard
cannot make the decoder read other files.

Time: seconds from the first displayed frame. A frame is shown from its own timestamp until the next one's, so picking
by time is right for variable frame rates too.

Orientation: rotation and mirroring in the container (or EXIF) are applied; sizes given are those of the upright frame.

Colour: swscale converts to full-range RGB by the matrix and range the stream declares (BT.601, BT.709, BT.2020 ...;
limited or full). Where it declares none, BT.601 limited is assumed, as the ffmpeg command line does. Transfer curves
stay as they are (HDR is not tone-mapped), alpha is dropped, the pixel aspect ratio is not applied.

Legend: T frames, H height, W width.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import av.container
import av.error
import av.logging
import numpy as np
import torch
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

av.logging.set_level(None)  # libav prints to stderr otherwise, a line for every damaged macroblock

Source = bytes | str | Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Demuxers that read one stream of bytes and nothing else: no playlists, no file lists, no devices.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,h264,hevc,m4v,ivf,obu,yuv4mpegpipe,mxf,nut,dv,rm,"
    "png_pipe,jpeg_pipe,webp_pipe,webp,webp_anim,bmp_pipe,tiff_pipe,mjpeg"
)
MAX_FRAME_PIXELS = 1 << 28  # 16384 x 16384: what one frame may allocate, whatever its header says


STRICT = "crccheck+explode"


class DecodeError(ValueError):
    """The bytes are not a video (or image) that decodes without damage; the message says why."""


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


class PastEnd(DecodeError):
    """The video ends before the first wanted time."""


class VideoReader:
    """One open video (or image): several windows of it cost one opening.

    Use as a context manager. Every method raises DecodeError for damage.
    """

    def __init__(self, source: Source, *, threads: int = 1, max_frame_pixels: int = MAX_FRAME_PIXELS) -> None:
        if isinstance(source, (str, Path)) and str(source).lower().endswith(IMAGE_SUFFIXES):
            try:  # libav would read the path as a pattern of numbered files
                source = Path(source).read_bytes()
            except OSError as error:
                raise DecodeError(f"cannot read: {error}") from error
        self._source = source
        self._threads = threads
        self._max_frame_pixels = max_frame_pixels
        self._reformatter = VideoReformatter()
        self._matrix: tuple[bool, bool, bool] | None = None  # transpose, then mirror horizontally, then vertically
        self._container: Any = None
        self._open()

    def _open(self) -> None:
        self.close()
        options = {"err_detect": STRICT, "protocol_whitelist": "file", "format_whitelist": FORMATS}
        codec_options = {"err_detect": STRICT, "max_pixels": str(self._max_frame_pixels)}
        file: Any = io.BytesIO(self._source) if isinstance(self._source, bytes) else f"file:{self._source}"
        if isinstance(self._source, bytes) and not self._source:
            raise DecodeError("0 bytes")
        try:
            self._container = av.open(file, options=options)
            streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise DecodeError("no video stream (audio only?)")
            stream = streams[0]
            context = stream.codec_context
            if context is None:
                raise DecodeError("the video stream's codec is unknown")
            context.options = codec_options
            context.thread_count = self._threads
            context.thread_type = "NONE" if self._threads == 1 else "FRAME"
        except Exception as error:
            self.close()
            raise _as_decode_error(error) from error
        self._stream = stream
        self._fresh = True
        # AVI stores no display times; those that the parser makes up for packed B-frames run backwards.
        self._decode_times = self._container.format.name == "avi"
        self._base = float(stream.time_base) if stream.time_base else 1.0
        self._origin = stream.start_time or 0
        # A container with millisecond ticks stores 1/30 s as 33 ms: half a tick belongs to the frame it rounds to.
        self._tolerance = min(0.5 * self._base, 1e-3) + 1e-6
        width, height = context.width, context.height
        if width * height > self._max_frame_pixels:
            self.close()
            raise DecodeError(f"a frame is {width}x{height}, above the limit of {self._max_frame_pixels} pixels")
        self.stored_size = (height, width)

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_image(self) -> bool:
        name = self._container.format.name
        return name in ("webp", "image2") or name.endswith("_pipe") and name != "yuv4mpegpipe"

    @property
    def fps(self) -> float:
        """Mean frames per second as the container says; 0.0 for an image."""
        rate = self._stream.average_rate or self._stream.guessed_rate or self._stream.base_rate
        return 0.0 if self.is_image or not rate else float(rate)

    @property
    def duration_s(self) -> float | None:
        """Seconds as the container says, without decoding; None when it does not say; 0.0 for an image."""
        if self.is_image:
            return 0.0
        if self._stream.duration:
            return self._stream.duration * self._base
        if self._container.duration:
            return self._container.duration / av.time_base - max(0.0, self._origin * self._base)
        return None

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

    def _shown_for(self, frame: VideoFrame) -> float:
        """Seconds a frame stays when no other follows."""
        if self.is_image:
            return 4 * self._tolerance
        if frame.duration and frame.duration > 0:
            return frame.duration * self._base
        return 1.0 / self.fps if self.fps else 0.04

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

    def _decode(self, start_s: float) -> Iterator[tuple[VideoFrame, float]]:
        """(frame, seconds) from the keyframe at or before start_s to the end; damage raises."""
        if not self._fresh and start_s <= 0:
            self._open()
        self._fresh = False
        previous: float | None = None
        step = 0.0
        try:
            if start_s > 0:
                tick = int((start_s + self._tolerance) / self._base) + self._origin
                self._container.seek(tick, stream=self._stream, backward=True)
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise DecodeError("a packet is damaged or cut short")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise DecodeError("a frame is damaged")
                    stamp = frame.dts if self._decode_times else frame.pts
                    if stamp is not None:
                        seconds = (stamp - self._origin) * self._base
                    elif previous is not None or start_s <= 0:
                        seconds = 0.0 if previous is None else previous + step
                    else:
                        raise DecodeError("frames carry no time after seeking")
                    seconds = seconds if previous is None else max(seconds, previous)
                    previous, step = seconds, self._shown_for(frame)
                    yield frame, seconds
        except Exception as error:
            raise _as_decode_error(error) from error
        stated = self._stated_duration()
        if previous is not None and stated is not None and previous + step < stated - max(0.5, 2 * step):
            raise DecodeError(f"cut short: the video ends at {previous + step:.3f} s of {stated:.3f} s")

    def _stated_duration(self) -> float | None:
        """Seconds of the video stream alone, where the container states them (not those of a longer sound track)."""
        stream = self._stream
        if self.is_image:
            return None
        if stream.duration:
            return stream.duration * self._base
        parts = stream.metadata.get("DURATION", "").split(":")  # Matroska: "00:00:01.333000000"
        if len(parts) == 3:
            try:
                return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2]) - self._origin * self._base
            except ValueError:
                return None
        return self.duration_s if len(self._container.streams) == 1 else None

    def _scan_duration(self) -> float:
        """Seconds from the packets' times: for containers that do not state a duration."""
        self._open()
        end = 0.0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:
                    end = max(end, (packet.pts - self._origin + (packet.duration or 0)) * self._base)
        except Exception as error:
            raise _as_decode_error(error) from error
        self._open()
        return end

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
            raise _as_decode_error(error) from error
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


def _as_decode_error(error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error
    text = getattr(error, "strerror", None) or str(error) or "unreadable"
    return DecodeError(f"{text} ({type(error).__name__})")


def _check_sizes(frames: Sequence[np.ndarray]) -> None:
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise DecodeError(f"the frame size changes: {sorted(sizes)}")


# x265 and SVT-AV1 write to stderr past libav's logging.
_DEFAULTS = {"libx265": {"x265-params": "log-level=none"}}
os.environ.setdefault("SVT_LOG", "1")


def write_video(
    path: str | Path | IO[bytes],
    frames: Iterable[np.ndarray | Tensor] | Tensor,
    *,
    fps: float | Fraction,
    codec: str = "libx264",
    crf: float | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str | None = None,
    container: str | None = None,
    times: Sequence[float] | None = None,
    threads: int = 1,
) -> int:
    """Encode frames; returns how many were written.

    Args:
        path: where to write; or a binary file, which needs to be seekable for mp4.
        frames: uint8 [H, W, 3] RGB each (an iterable is taken one at a time, so memory stays constant), or a tensor
            [T, H, W, 3].
        fps: frames per second.
        codec: libx264, libx265, libsvtav1, libvpx-vp9, mpeg4, ffv1 ...; ffv1 and png are lossless on RGB.
        crf: constant quality of the codecs that have it; None leaves the codec's own default.
        options: codec options, e.g. {"preset": "slow", "g": "32"}.
        pix_fmt: None takes a lossless RGB format for ffv1 and png, and for the others 4:2:0, or 4:4:4 where a side is
            odd (4:2:0 cannot hold it). YUV is written as BT.709, limited range (mjpeg: full), and tagged so.
        container: format name; None: from the path's suffix; for a file object mp4 (ffv1: matroska, png: mov).
        times: seconds at which each frame appears, increasing, for a variable frame rate; None: i / fps.
        threads: encoder threads; with 1 the bytes do not depend on the machine.
    Raises: ValueError for no frames, frames of unequal size or wrong dtype, an unknown codec or refused settings.
    """
    if not float(fps) > 0:
        raise ValueError(f"fps={fps} must be above 0")
    if container is None and not isinstance(path, (str, Path)):
        container = {"ffv1": "matroska", "png": "mov"}.get(codec, "mp4")
    target: Any = str(path) if isinstance(path, Path) else path
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1 << 16)
    settings = {**({} if crf is None else {"crf": str(crf)}), **_DEFAULTS.get(codec, {}), **(options or {})}
    count, size = 0, (0, 0)
    try:
        with av.open(target, "w", format=container) as output:
            stream: Any = None
            for count, item in enumerate(frames):
                pixels = np.ascontiguousarray(item.detach().cpu().numpy() if isinstance(item, Tensor) else item)
                if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
                    raise ValueError(f"frame {count} is {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3]")
                if stream is None:
                    size = pixels.shape[:2]
                    stream = _add_stream(output, codec, rate, size, pix_fmt, settings, threads, times is not None)
                if pixels.shape[:2] != size:
                    raise ValueError(f"frame {count} is {pixels.shape[:2]}, the first one was {size}")
                frame = VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = _to_codec(frame, stream.pix_fmt)
                ticks = Fraction(1, 90000) if times is not None else 1 / rate
                frame.time_base = ticks
                frame.pts = count if times is None else round(Fraction(times[count]) / ticks)
                output.mux(stream.encode(frame))
            if stream is None:
                raise ValueError("no frames to write")
            output.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"codec={codec!r} pix_fmt={pix_fmt!r} options={settings} at {size[1]}x{size[0]}: {error.strerror}"
        ) from error
    return count + 1


def _add_stream(
    output: Any,
    codec: str,
    rate: Fraction,
    size: tuple[int, int],
    pix_fmt: str | None,
    settings: dict[str, str],
    threads: int,
    variable: bool,
) -> Any:
    try:
        formats = [f.name for f in av.Codec(codec, "w").video_formats or []]
    except Exception as error:
        raise ValueError(f"codec={codec!r} is not an encoder of this PyAV; try libx264, libx265, ffv1") from error
    if pix_fmt is None:
        odd = size[0] % 2 or size[1] % 2
        wanted = ("bgr0", "rgb24") if codec in ("ffv1", "png") else ("yuv444p",) if odd else ("yuv420p",)
        wanted = ("yuvj444p",) if codec == "mjpeg" else wanted  # mjpeg refuses limited range
        pix_fmt = next((f for f in wanted if f in formats), formats[0] if formats else "yuv420p")
    elif formats and pix_fmt not in formats:
        raise ValueError(f"pix_fmt={pix_fmt!r} is not written by {codec}; choose one of {formats}")
    stream = output.add_stream(codec, rate=rate, options=settings)
    stream.height, stream.width = size
    stream.pix_fmt = pix_fmt
    stream.codec_context.thread_count = threads
    if variable:
        stream.codec_context.time_base = Fraction(1, 90000)
    if pix_fmt.startswith("yuv"):
        stream.codec_context.colorspace = 1  # BT.709
        stream.codec_context.color_range = 2 if pix_fmt.startswith("yuvj") else 1
        stream.codec_context.color_primaries = 1
        stream.codec_context.color_trc = 1
    elif pix_fmt.startswith("gray"):
        stream.codec_context.color_range = 2  # swscale writes full-range grey; untagged it would be read as limited
    return stream


def _to_codec(frame: VideoFrame, pix_fmt: str) -> VideoFrame:
    if not pix_fmt.startswith("yuv"):
        return frame.reformat(format=pix_fmt, threads=1)
    full = pix_fmt.startswith("yuvj")
    return frame.reformat(
        format=pix_fmt, dst_colorspace="ITU709", dst_color_range="JPEG" if full else "MPEG", threads=1
    )
