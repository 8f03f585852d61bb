"""Real codecs as anchors: x264, x265 and SVT-AV1 through PyAV, on exactly the frames a tokenizer is scored on.

Letters: T frames, H height, W width. Clips are uint8 RGB [3, T, H, W] (any T, H and W).

    RGB -> 4:2:0 (BT.601, limited range) -> encoder, one closed GOP, one thread -> packets -> decoder -> RGB
    the same at 1/2 and 1/4 of the height and width, and at half the frames, then interpolated: the downscaled anchors

What is counted is the elementary stream: parameter sets and slices, no container. User-data SEI (x264 writes its whole
command line there) and AV1 temporal delimiters, which a decoder does not need, are taken out before counting and before
decoding. Quality is swept by CRF, never by target bitrate, which such short clips miss by far. For each rate the CRF is
searched per clip and per anchor for the largest stream that fits, and the anchor with the best PSNR is taken. Where
nothing fits the clip is shown at the smallest stream this codec can make of it: its floor, reported as such.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.metrics.distortion import clip_psnr

os.environ.setdefault("SVT_LOG", "1")  # errors only; read once, when its first encoder opens


@dataclass(frozen=True)
class Codec:
    """How one encoder is driven. `profiles`: options by profile; `{frames}` becomes the GOP's length."""

    name: str
    encoder: str
    worst_crf: int
    profiles: dict[str, dict[str, str]]


# x264's macroblock tree reads beyond small frames in its AVX-512 code: the same clip came out in several ways. Without
# that code the stream is the same every time, at the same speed. (Processors that are no x86 pass over the setting.)
_X264 = {"g": "{frames}", "sc_threshold": "0", "x264-params": "asm=SSE4.2"}
_X265 = "info=0:log-level=none:pools=none:frame-threads=1:keyint={frames}:min-keyint={frames}:scenecut=0:open-gop=0"
_SVT = "lp=1:keyint=-1:scd=0"
# low-delay: no frame knows of later ones. Trees of blocks (mbtree, cutree) plan 20 to 40 frames ahead, B-frames or not.
CODECS = {
    "x264": Codec(
        "x264",
        "libx264",
        51,
        {
            "offline": {**_X264, "preset": "slow", "flags": "+cgop"},
            "low-delay": {**_X264, "preset": "medium", "tune": "psnr", "bf": "0", "mbtree": "0"},
        },
    ),
    "x265": Codec(
        "x265",
        "libx265",
        51,
        {
            "offline": {"preset": "slow", "x265-params": _X265},
            "low-delay": {
                "preset": "medium",
                "tune": "psnr",
                "x265-params": _X265 + ":bframes=0:rc-lookahead=0:cutree=0",
            },
        },
    ),
    "av1": Codec(
        "av1",
        "libsvtav1",
        63,
        {
            "offline": {"preset": "4", "svtav1-params": _SVT},
            "low-delay": {"preset": "8", "svtav1-params": _SVT + ":pred-struct=1"},
        },
    ),
}
_DECODERS = {"x264": "h264", "x265": "hevc", "av1": "libdav1d"}


def _nal_units(stream: bytes) -> list[bytes]:
    # start codes are 00 00 01 with an optional leading zero; emulation prevention keeps them out of payloads
    starts = [m.start() for m in re.finditer(b"\x00?\x00\x00\x01", stream)]
    return [stream[a:b] for a, b in zip(starts, [*starts[1:], len(stream)])]


def _nal_type(unit: bytes, codec: str) -> int:
    header = unit[unit.index(b"\x01") + 1]
    return header & 0x1F if codec == "x264" else (header >> 1) & 0x3F


def _obus(stream: bytes) -> list[bytes]:
    out, at = [], 0
    while at < len(stream):
        head, start = stream[at], at
        at += 2 if head & 4 else 1
        if not head & 2:
            raise ValueError("an AV1 packet has an OBU without a size field")
        size = shift = 0
        while True:
            byte = stream[at]
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                break
        at += size
        out.append(stream[start:at])
    return out


def essential(packet: bytes, codec: str) -> bytes:
    """A packet without what a decoder has no use for: SEI user data, temporal delimiters."""
    if codec == "av1":
        return b"".join(unit for unit in _obus(packet) if (unit[0] >> 3) & 15 != 2)
    sei = {"x264": (6,), "x265": (39, 40)}[codec]
    return b"".join(unit for unit in _nal_units(packet) if _nal_type(unit, codec) not in sei)


@dataclass(frozen=True)
class Anchor:
    """What the encoder is given: every `step`-th frame, height and width divided by `scale`."""

    scale: int = 1
    step: int = 1

    def __str__(self) -> str:
        size = "full size" if self.scale == 1 else f"1/{self.scale} size"
        return size + (f", 1/{self.step} of the frames" if self.step > 1 else "")


ANCHORS = tuple(Anchor(scale, step) for scale in (1, 2, 4) for step in (1, 2))


@dataclass(frozen=True)
class Encoded:
    """One encode: its elementary-stream packets (as counted), and the size of the frames inside."""

    packets: tuple[bytes, ...]
    frames: int
    height: int
    width: int

    @property
    def bits(self) -> int:
        return 8 * sum(len(packet) for packet in self.packets)


# swscale's own conversion loses 1 to 6 dB of the PSNR that 4:2:0 allows on 64 x 64 clips, so it is done here: chroma is
# averaged over 2 x 2 pixels and interpolated back. Rows: Y, Cb, Cr of full-range RGB; then levels 16..235 and 16..240.
_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_RANGE = torch.tensor([219.0, 224.0, 224.0]) / 255.0
_OFFSET = torch.tensor([16.0, 128.0, 128.0])


def _padding(side: int, codec: str) -> int:
    # libx265 216 corrupts the heap on sides such as 48, below its 64-pixel coding tree and not a power of two
    if codec == "x265" and side < 64:
        return next(power for power in (16, 32, 64) if power >= side) - side
    return side % 2  # 4:2:0 needs even sides


def to_yuv420(video: Tensor) -> np.ndarray:
    """uint8 [T, 3H/2, W], Y over Cb over Cr as FFmpeg lays yuv420p out, of RGB levels [3, T, H, W] (even H, W)."""
    _, frames, height, width = video.shape
    planes = torch.einsum("i,ij,jthw->ithw", _RANGE, _YCC, video.float())
    chroma = F.avg_pool2d(planes[1:], 2)
    luma = (planes[0] + _OFFSET[0]).round().reshape(frames, -1)
    rest = (chroma + _OFFSET[1]).round().transpose(0, 1).reshape(frames, -1)
    out = torch.cat([luma, rest], 1).clamp(0, 255).to(torch.uint8)
    return out.reshape(frames, height * 3 // 2, width).numpy()


def from_yuv420(images: np.ndarray) -> Tensor:
    """uint8 RGB [3, T, H, W] of yuv420p images [T, 3H/2, W]."""
    frames, height, width = images.shape[0], images.shape[1] * 2 // 3, images.shape[2]
    flat = torch.from_numpy(images).reshape(frames, -1).float()
    luma = flat[:, : height * width].reshape(1, frames, height, width)
    chroma = flat[:, height * width :].reshape(frames, 2, height // 2, width // 2).transpose(0, 1)
    chroma = F.interpolate(chroma, size=(height, width), mode="bilinear", align_corners=False)
    planes = (torch.cat([luma, chroma]) - _OFFSET.view(3, 1, 1, 1)) / _RANGE.view(3, 1, 1, 1)
    rgb = torch.einsum("ij,jthw->ithw", torch.linalg.inv(_YCC), planes)
    return rgb.round().clamp(0, 255).to(torch.uint8)


def encode(clip: Tensor, *, codec: str, crf: int, fps: float = 8.0, profile: str = "offline") -> Encoded:
    """The elementary stream of a uint8 RGB clip [3, T, H, W] at one CRF.

    One thread, no rate control, one closed GOP: x264 and SVT-AV1 repeat themselves to the byte, libx265 nearly. Sides
    that the encoder cannot hold are padded by their edge.
    Raises: ValueError for an unknown codec, profile, or CRF.
    """
    spec = _spec(codec, profile)
    if not 0 <= crf <= spec.worst_crf:
        raise ValueError(f"crf={crf} is out of range: {codec} takes 0 to {spec.worst_crf}")
    _, frames, height, width = clip.shape
    pad = (0, _padding(width, codec), 0, _padding(height, codec))
    images = to_yuv420(F.pad(clip.float(), pad, mode="replicate"))
    rate = Fraction(fps).limit_denominator(1001)
    context = av.CodecContext.create(spec.encoder, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = width + pad[1], height + pad[3], "yuv420p"
    context.framerate, context.time_base, context.thread_count = rate, 1 / rate, 1
    options = {key: value.format(frames=frames) for key, value in spec.profiles[profile].items()}
    context.options = options | {"crf": str(crf)}
    packets = []
    for index, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
        frame.pts, frame.time_base = index, 1 / rate
        packets += [bytes(packet) for packet in context.encode(frame)]
    packets += [bytes(packet) for packet in context.encode(None)]
    kept = tuple(essential(packet, codec) for packet in packets)
    return Encoded(kept, frames, height, width)


def decode(encoded: Encoded, *, codec: str) -> Tensor:
    """uint8 RGB [3, T, H, W] of an elementary stream, in display order.

    Raises: RuntimeError when the decoder returns another number of frames than was encoded.
    """
    context = av.CodecContext.create(_DECODERS[codec], "r")
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count = 1
    frames = []
    for index, data in enumerate(encoded.packets):
        if data:
            packet = av.Packet(data)
            packet.pts = packet.dts = index
            frames += context.decode(packet)
    frames += context.decode(None)
    if len(frames) != encoded.frames:
        raise RuntimeError(f"{codec} decoded {len(frames)} of {encoded.frames} frames")
    out = from_yuv420(np.stack([frame.to_ndarray(format="yuv420p") for frame in frames]))
    return out[:, :, : encoded.height, : encoded.width].contiguous()


def _spec(codec: str, profile: str) -> Codec:
    if codec not in CODECS:
        raise ValueError(f"codecs: {codec!r} is unknown; choose from {', '.join(CODECS)}")
    if profile not in CODECS[codec].profiles:
        raise ValueError(f"profile={profile!r} is unknown; choose from {', '.join(CODECS[codec].profiles)}")
    return CODECS[codec]


def shrink(clip: Tensor, anchor: Anchor) -> Tensor | None:
    """The clip as an anchor encodes it, antialiased; None where it would be too small (16 pixels, one frame)."""
    _, frames, height, width = clip.shape
    rows, columns = height // anchor.scale, width // anchor.scale
    if anchor.scale > 1 and min(rows, columns) < 16 or anchor.step > 1 and frames < 2 * anchor.step:
        return None
    small = clip[:, :: anchor.step]
    if anchor.scale > 1:
        planes = small.transpose(0, 1).float()
        planes = F.interpolate(planes, size=(rows, columns), mode="bilinear", antialias=True, align_corners=False)
        small = planes.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)
    return small.contiguous()


def restore(small: Tensor, anchor: Anchor, size: Sequence[int]) -> Tensor:
    """`shrink` undone by bicubic and linear-in-time interpolation: uint8 [3, T, H, W] of `size` (T, H, W)."""
    frames, height, width = size
    x = small.float()
    if anchor.step > 1:  # frame i lay at time i * step; the last frames hold
        at = torch.arange(frames) / anchor.step
        low = at.floor().long().clamp(max=x.shape[1] - 1)
        high = (low + 1).clamp(max=x.shape[1] - 1)
        part = (at - low).clamp(max=1).view(1, -1, 1, 1)
        x = x[:, low] * (1 - part) + x[:, high] * part
    if anchor.scale > 1:
        planes = F.interpolate(x.transpose(0, 1), size=(height, width), mode="bicubic", align_corners=False)
        x = planes.transpose(0, 1)
    return x.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Point:
    """One clip at one rate: bits spent, the reconstruction [3, T, H, W] (empty where it was not kept), its PSNR, which
    anchor and CRF, within the rate?"""

    bits: int
    video: Tensor
    psnr_db: float
    anchor: Anchor
    crf: int
    fits: bool


@dataclass
class _Curve:
    """Encodes of one clip by one codec at one anchor, each made once."""

    clip: Tensor
    codec: str
    anchor: Anchor
    fps: float
    profile: str
    made: dict[int, Encoded] = field(default_factory=dict)
    scored: dict[int, tuple[float, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.small = shrink(self.clip, self.anchor)

    def at(self, crf: int) -> Encoded:
        if crf not in self.made:
            assert self.small is not None
            fps = self.fps / self.anchor.step
            self.made[crf] = encode(self.small, codec=self.codec, crf=crf, fps=fps, profile=self.profile)
        return self.made[crf]

    def best_crf(self, bits: float) -> int | None:
        """The smallest CRF whose stream fits, by bisection over what is nearly monotone; None below the floor."""
        low, high = 0, CODECS[self.codec].worst_crf
        if self.at(high).bits > bits:
            return None
        while low < high:
            middle = (low + high) // 2
            if self.at(middle).bits <= bits:
                high = middle
            else:
                low = middle + 1
        return high

    def score(self, crf: int) -> tuple[float, Tensor]:
        if crf not in self.scored:
            video = restore(decode(self.at(crf), codec=self.codec), self.anchor, self.clip.shape[1:])
            self.scored[crf] = float(clip_psnr(video[None], self.clip[None])), video
        return self.scored[crf]


def sweep(
    clip: Tensor, rates: Sequence[float], *, codec: str, fps: float = 8.0, profile: str = "offline"
) -> list[Point]:
    """One clip [3, T, H, W] (real frames only) at each rate in bits: the best point that fits, or the codec's floor."""
    spec = _spec(codec, profile)
    curves = [_Curve(clip, codec, anchor, fps, profile) for anchor in ANCHORS]
    curves = [curve for curve in curves if curve.small is not None]
    points = []
    for rate in rates:
        found = []
        for curve in curves:
            crf = curve.best_crf(rate)
            if crf is not None:
                psnr, video = curve.score(crf)
                found.append(Point(curve.at(crf).bits, video, psnr, curve.anchor, crf, True))
        if found:
            points.append(max(found, key=lambda point: point.psnr_db))
            continue
        floor = min(curves, key=lambda curve: curve.at(spec.worst_crf).bits)
        smallest = floor.at(spec.worst_crf).bits
        psnr, video = floor.score(spec.worst_crf)
        points.append(Point(smallest, video, psnr, floor.anchor, spec.worst_crf, False))
    return points


def _job(job: tuple[Tensor, list[float], int, str, float, str]) -> list[Point]:
    torch.set_num_threads(1)
    clip, rates, kept, codec, fps, profile = job
    points = sweep(clip, rates, codec=codec, fps=fps, profile=profile)
    none = torch.empty(0, dtype=torch.uint8)
    return [*points[:kept], *(replace(point, video=none) for point in points[kept:])]


class Workers:
    """Processes for work that may end its process, kept from one call to the next (each imports torch once).

    0 processes works here. Use as a context manager.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _submit(self, function: Callable[[Any], Any], job: Any) -> Future[Any]:
        if self._pool is None:
            # spawn: a forked child of a process that has used torch's or an encoder's threads may hang
            context = torch.multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context)
        return self._pool.submit(function, job)

    def map(
        self,
        function: Callable[[Any], Any],
        jobs: Sequence[Any],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Any | None]:
        """function(job) of every job, in order; None for a job that ends its process."""
        out: list[Any | None] = [None] * len(jobs)
        done = 0

        def collect(index: int, result: Any) -> None:
            nonlocal done
            out[index], done = result, done + 1
            if progress:
                progress(done, len(jobs))

        if self.processes < 1:
            for index, job in enumerate(jobs):
                collect(index, function(job))
            return out
        waiting: list[Future[Any] | None] = []
        for job in jobs:
            try:
                waiting.append(self._submit(function, job))
            except BrokenProcessPool:
                waiting.append(None)
        suspects = []
        for index, future in enumerate(waiting):
            try:
                if future is None:
                    raise BrokenProcessPool
                collect(index, future.result())
            except BrokenProcessPool:  # one job takes all unfinished ones with it
                suspects.append(index)
        if suspects:
            self._stop()
        for index in suspects:  # one at a time, so that a broken pool names its job
            try:
                collect(index, self._submit(function, jobs[index]).result())
            except BrokenProcessPool:
                self._stop()
                collect(index, None)
        return out


def sweep_clips(
    clips: Sequence[Tensor],
    rates: Sequence[float],
    *,
    codec: str,
    workers: Workers,
    more_rates: Sequence[float] = (),
    fps: float = 8.0,
    profile: str = "offline",
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Point] | None]:
    """`sweep` of many clips, [clip][rate]; progress is called with (done, total).

    more_rates: points that follow those of `rates`, without their frames.

    Encoders run in processes of their own: one that aborts (seen with libx265 216 at width 48, height 32: heap
    corruption) costs its clip, for which there is None, and not the evaluation.
    """
    _spec(codec, profile)
    every = [float(rate) for rate in (*rates, *more_rates)]
    jobs = [(clip, every, len(rates), codec, fps, profile) for clip in clips]
    return workers.map(_job, jobs, progress=progress)


def describe(points: Sequence[Point | None], rate: float, *, codec: str, profile: str) -> str:
    """What a row's note says of the clips at one rate; None is a clip whose encoder crashed."""
    crashed = sum(point is None for point in points)
    points = [point for point in points if point is not None]
    spec = CODECS[codec]
    below = sum(not point.fits for point in points)
    anchors = sorted({str(point.anchor) for point in points})
    text = f"{profile}: {spec.encoder}, preset {spec.profiles[profile]['preset']}, 4:2:0, {'; '.join(anchors)}"
    if below:
        text += (
            f"; below the codec's floor for {below} of {len(points)} clips at {rate:.0f} bits: shown there are the "
            f"minimum bits it can write (crf {spec.worst_crf}) and the quality it has at those"
        )
    if crashed:
        text += f"; {spec.encoder} ended its process on {crashed} clip(s), which are left out"
    return text


def encoder_versions() -> dict[str, str]:
    """Versions of PyAV, FFmpeg's libraries and, where the wheel's file names tell, of the encoders inside."""
    out = {"pyav": av.__version__}
    out |= {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    libraries = Path(av.__file__).parent.parent / "av.libs"
    for name, file in (
        ("libx264", "libx264-*.so.*"),
        ("libx265", "libx265-*.so.*"),
        ("libsvtav1", "libSvtAv1Enc-*.so.*"),
    ):
        for path in libraries.glob(file):
            out[name] = path.name.partition(".so.")[2]
    return out
