"""Opening a container and decoding it without concealment: damage is a `DecodeError`.

libav's decoders conceal damage by default (twenty flipped bytes give a full set of wrong frames and no error), so every
decoder here runs with `err_detect=crccheck+explode`, corrupt packets and frames are refused, the checksums of FFV1 are
compared, an end more than half a second before the stated duration is refused, and anything that goes wrong becomes a
`DecodeError`. What a format cannot tell (VP9 and WebP carry no redundancy: a flipped bit is another valid picture) is
left to the checksums of the shards. Only known media containers are opened, and never a playlist or a network address,
so that bytes from an untrusted shard cannot make the decoder read other files.

Time: seconds from the first displayed frame.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import av
import av.container
import av.logging
from av.stream import Disposition
from av.video.frame import VideoFrame

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


class PastEnd(DecodeError):
    """The video ends before the first wanted time."""


class StrictVideo:
    """One open container: the frames of its first video stream, in order, each with its time; damage raises.

    threads: decoder threads. stored_size: (height, width) as stored, before any rotation.
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
            raise as_decode_error(error) from error
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

    def __enter__(self) -> Self:
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

    def _shown_for(self, frame: VideoFrame) -> float:
        """Seconds a frame stays when no other follows."""
        if self.is_image:
            return 4 * self._tolerance
        if frame.duration and frame.duration > 0:
            return frame.duration * self._base
        return 1.0 / self.fps if self.fps else 0.04

    def _decode(self, start_s: float) -> Iterator[tuple[VideoFrame, float]]:
        """(frame, seconds) from the keyframe at or before start_s to the end; damage raises."""
        if not self._fresh and start_s <= 0:
            self._open()
        self._fresh = False
        previous: float | None = None
        step = 0.0
        checked = self._stream.codec_context.name == "ffv1"
        try:
            if start_s > 0:
                tick = int((start_s + self._tolerance) / self._base) + self._origin
                self._container.seek(tick, stream=self._stream, backward=True)
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    raise DecodeError("a packet is damaged or cut short")
                if checked and not ffv1_sound(bytes(packet)):
                    raise DecodeError("a slice's checksum does not match")
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
            raise as_decode_error(error) from error
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
            raise as_decode_error(error) from error
        self._open()
        return end


def ffv1_sound(packet: bytes) -> bool:
    """Whether the checksums of an FFV1 frame's slices match, where it has any; libav only logs when they do not.

    With checksums (RFC 9043) every slice ends in 3 bytes of its size less 8, a byte of its state and a CRC-32 without
    reflection or inversion, which makes that of the whole slice 0. Frames without them do not add up to such a chain.
    """
    end, sound = len(packet), True
    while end >= 8:
        first = end - 8 - int.from_bytes(packet[end - 8 : end - 5], "big")
        if first < 0:
            return True  # no chain
        slice_ = packet[first:end].translate(_REVERSED)
        sound = sound and zlib.crc32(slice_, 0xFFFFFFFF) == 0xFFFFFFFF  # zlib inverts before and after
        end = first
    return sound or end > 0


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bits of each byte the other way round


def as_decode_error(error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error
    text = getattr(error, "strerror", None) or str(error) or "unreadable"
    return DecodeError(f"{text} ({type(error).__name__})")
