"""Frames to encoded bytes, with PyAV: `write_video`.

YUV is written as BT.709 and tagged so; with one thread the bytes of a file do not depend on the machine.

Legend: T frames, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import av.error
import av.logging
import numpy as np
from av.video.frame import VideoFrame
from torch import Tensor

av.logging.set_level(None)  # libav prints to stderr otherwise

# x265 and SVT-AV1 write to stderr past libav's logging. x264's macroblock tree, with B-frames, reads memory beyond
# small frames (64 pixels a side and less): the same frames came out in up to seven ways, whatever the threads.
_DEFAULTS = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"mbtree": "0"}}
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
