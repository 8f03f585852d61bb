"""One shard of a packing: decode and check its clips, re-encode where asked, write a tar that a kill cannot leave half.

    Item --make_sample--> {extension: bytes or file} --write_shard--> .train-000000.tar.<pid>.tmp --fsync, rename--> tar

A shard is a pure function of its items and the settings: one thread, fixed tar headers, no clock, no host name. What a
finished shard holds stands in a record, `.shards/<name>.json`, which is written before the tar gets its final name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.functional import interpolate

from vtok.data.audio import read_audio
from vtok.data.decode import VideoInfo, iter_frames, probe
from vtok.data.encode import write_video
from vtok.data.inputs import VIDEO_SUFFIXES, Reject
from vtok.data.maps import check_count, check_values, cut_map, open_map
from vtok.data.sources import MEDIA
from vtok.data.strict import DecodeError

Frame = TypeVar("Frame")

RECORDS = ".shards"  # folder of records in the output folder
MAGIC = (
    (b"\x1a\x45\xdf\xa3", "mkv"),
    (b"GIF8", "gif"),
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"OggS", "ogv"),
)
ALIASES = {
    "mts": "ts",
    "m2ts": "ts",
    "m2v": "mpg",
    "vob": "mpg",
    "asf": "wmv",
    "3gp": "mp4",
    "3g2": "mp4",
    "ogg": "ogv",
}
GROUP_OF_PICTURES = 32  # frames between keyframes of a re-encoded clip: a random window decodes at most this many more


class PackingError(RuntimeError):
    """A packing cannot go on (not the fault of one input); the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """How clips are cut, encoded, split and sharded: everything but the inputs that the result depends on.

    clip_seconds: cut what is longer into clips of this length; None = one clip per source (or manifest row).
    stride_seconds: from one clip's start to the next; None = clip_seconds. The rest at the end becomes a clip of its
        own if it is at least half of clip_seconds, and is left out otherwise.
    fps, short_side: upper limits, frames per second and pixels (even); what is below them is not enlarged.
    crf: x264 quality of re-encoded clips, 0 (lossless) to 51; 18 is visually transparent.
    audio, audio_rate: add `<key>.wav`, mono 16 bit at this rate in Hz.
    val_fraction: share of the sources without a split of their own that becomes validation. split: puts all in one.
    shard_samples, shard_mib: a shard ends at whichever comes first (MiB estimated from the sources' sizes).
    """

    clip_seconds: float | None = None
    stride_seconds: float | None = None
    fps: float | None = None
    short_side: int | None = None
    crf: int = 18
    audio: bool = False
    audio_rate: int = 16000
    val_fraction: float = 0.1
    split: str | None = None
    shard_samples: int = 64
    shard_mib: float = 256.0

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "stride_seconds", "fps", "shard_mib"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be above 0")
        if self.stride_seconds is not None and self.clip_seconds is None:
            raise ValueError(f"stride_seconds={self.stride_seconds} needs clip_seconds: how long a clip is")
        if self.short_side is not None and (self.short_side < 2 or self.short_side % 2):
            raise ValueError(f"short_side={self.short_side} must be even and at least 2 (H.264 stores 4:2:0)")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf={self.crf} must lie in 0 (lossless) to 51")
        if self.audio_rate < 1000:
            raise ValueError(f"audio_rate={self.audio_rate} is in Hz: at least 1000, 16000 for most audio towers")
        if not 0.0 <= self.val_fraction <= 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in [0, 1]")
        if self.split not in (None, "train", "val", "test"):
            raise ValueError(f"split={self.split!r} is unknown; choose train, val or test")
        if self.shard_samples < 1:
            raise ValueError(f"shard_samples={self.shard_samples} must be 1 or more")


@dataclass(frozen=True)
class Item:
    """One planned clip. end_s: None = to the end. whole: not cut. size, map_size: bytes of the source and its map."""

    key: str
    path: Path
    source: str
    start_s: float
    end_s: float | None
    whole: bool
    size: int
    caption: str
    captions: tuple[dict[str, Any], ...]
    label: str | int | None
    qa: tuple[dict[str, Any], ...]
    map: Path | None = None
    map_size: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """The item as plain values, without where its files lie on this machine."""
        elsewhere = ("path", "map") if self.map is not None else ("path", "map", "map_size")
        return {key: value for key, value in asdict(self).items() if key not in elsewhere}


@dataclass(frozen=True)
class Shard:
    """name: `train-000000`; its tar is `<split>/<name>.tar`."""

    name: str
    split: str
    items: tuple[Item, ...]

    def tar(self, out: Path) -> Path:
        return out / self.split / f"{self.name}.tar"

    def record(self, out: Path) -> Path:
        return out / RECORDS / f"{self.name}.json"


def finished(shard: Shard, out: Path) -> dict[str, Any] | None:
    """The record of a shard that is packed already (its tar is there, or it has no usable clip), else None."""
    try:
        record = json.loads(shard.record(out).read_bytes())
        size = shard.tar(out).stat().st_size if record["samples"] else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if size == record["bytes"] else None


def write_shard(
    shard: Shard,
    out: Path,
    settings: Any,
    lost: dict[str, str],
    notify: Callable[[str], None],
    *,
    make: Callable[[Any, Any], dict[str, bytes | Path]] | None = None,
) -> None:
    """Pack one shard. Clips that cannot be used are listed in the record, with the reason.

    Args:
        lost: {key: reason} of clips not to touch again. notify: called with each clip's key before it is touched.
        make: (item, settings) -> members of its sample by extension; None: `make_sample`.
    Raises: PackingError when an input changed since it was planned. OSError for a full disk.
    """
    tar = shard.tar(out)
    temporary = tar.with_name(f".{tar.name}.{os.getpid()}.tmp")
    rejected: list[dict[str, Any]] = []
    samples = 0
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashing(file)
            with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.GNU_FORMAT) as archive:  # type: ignore[arg-type]
                for item in shard.items:
                    notify(item.key)
                    try:
                        if item.key in lost:
                            raise DecodeError(lost[item.key])
                        members = (make or make_sample)(item, settings)
                    except DecodeError as error:
                        reject = Reject(item.source, str(error), "", item.key, item.start_s, item.end_s)
                        rejected.append(asdict(reject))
                    else:
                        for extension, content in members.items():
                            _add(archive, f"{item.key}.{extension}", content)
                        samples += 1
            file.flush()
            os.fsync(file.fileno())
        size = temporary.stat().st_size if samples else 0
        record = {
            "name": tar.name,
            "samples": samples,
            "bytes": size,
            "sha256": hashed.sha256.hexdigest() if samples else None,
            "rejected": rejected,
        }
        write_atomically(shard.record(out), record)
        if samples:
            os.replace(temporary, tar)
            _sync_folder(tar.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def make_sample(item: Item, settings: Settings) -> dict[str, bytes | Path]:
    """The members of one sample by extension: the video (or image) first, then json, then map and wav where asked.

    The video is the source's own bytes where nothing is to change, else H.264 in mp4; raw streams and containers that
    the loader does not name (y4m, h264, mxf ...) are re-encoded too. Either way every frame of it was decoded without
    an error. Raises DecodeError with the reason.
    """
    for path, planned in ((item.path, item.size), (item.map, item.map_size)):
        size = planned if path is None else path.stat().st_size
        if size != planned:
            raise PackingError(f"{path} changed while packing ({planned} -> {size} bytes); pack into an empty folder")
    info = probe(item.path)
    members: dict[str, bytes | Path] = {}
    dense: bytes | Path | None = None
    extension = _extension(item.path)
    if extension is None and info.is_image:
        raise DecodeError("a still image whose format shards do not hold; use png, jpg or webp")
    if extension is None or needs_encoding(item, info, settings):
        video, shown, fps, (width, height) = _encode(item, info, settings)
        members["mp4"] = video
        duration_s = len(shown) / fps
        if item.map is not None:
            dense = cut_map(open_map(item.map), times=[seconds for _, seconds in iter_frames(item.path)], shown=shown)
    else:
        members[extension] = item.path
        width, height, fps = info.width, info.height, info.fps
        duration_s, frames = _check(item, info)
        if item.map is not None:
            dense = item.map
            check_count(len(whole := open_map(item.map)), frames)
            check_values(whole)
    captions = _captions_of(item, duration_s)
    longest = max(captions, key=lambda c: c["end_s"] - c["start_s"], default={"text": ""})
    members["json"] = _json_bytes(
        {
            "caption": item.caption or longest["text"],
            "captions": captions,
            "label": item.label,
            "qa": _questions_of(item, duration_s, fps),
            "source": item.source,
            "start_s": round(item.start_s, 6),
            "duration_s": round(duration_s, 6),
            "fps": None if info.is_image else round(fps, 6),
            "width": width,
            "height": height,
        }
    )
    if dense is not None:
        members["npy"] = dense
    if settings.audio and info.has_audio:
        members["wav"] = read_audio(item.path, start_s=item.start_s, duration_s=duration_s, rate=settings.audio_rate)
    return members


def needs_encoding(item: Item, info: VideoInfo, settings: Settings) -> bool:
    """Whether the clip is cut, above the limits of size or rate. Images are packed as they are."""
    if info.is_image:
        return False
    too_large = settings.short_side is not None and min(info.width, info.height) > settings.short_side
    too_fast = settings.fps is not None and info.fps > settings.fps * 1.001
    return not item.whole or too_large or too_fast


def constant_rate(
    frames: Iterable[tuple[Frame, float]], *, fps: float, last_s: float, start_s: float = 0.0, end_s: float
) -> Iterator[Frame]:
    """The frames on show in the middle of each tick: tick k covers [start_s + k / fps, start_s + (k + 1) / fps).

    A source of constant rate gives each of its frames once at its own rate; a variable one becomes constant.

    Args:
        frames: (pixels or whatever stands for them, seconds), in order. last_s: how long the last frame is shown.
        end_s: no tick's middle lies past it.
    """
    tick = 0
    shown: tuple[Frame, float] | None = None

    def middle() -> float:
        return start_s + (tick + 0.5) / fps

    for frame, seconds in frames:
        while shown is not None and middle() < min(seconds, end_s):
            yield shown[0]
            tick += 1
        # Nothing is on show before the first frame: ticks there are skipped, not filled.
        while shown is None and middle() < min(seconds, end_s):
            tick += 1
        shown = (frame, seconds)
    while shown is not None and middle() < min(shown[1] + last_s, end_s):
        yield shown[0]
        tick += 1


def _encode(item: Item, info: VideoInfo, settings: Settings) -> tuple[bytes, list[float], float, tuple[int, int]]:
    """(mp4 bytes, the source's seconds of each frame, frames per second, (width, height)) of the item's window."""
    fps = min(settings.fps or math.inf, info.fps)
    size = _encoded_size(info, settings.short_side)
    end_s = math.inf if item.end_s is None else item.end_s
    frames = _steady(iter_frames(item.path, start_s=item.start_s, end_s=item.end_s))
    timed = (((pixels, seconds), seconds) for pixels, seconds in frames)
    kept = constant_rate(timed, fps=fps, last_s=1.0 / info.fps, start_s=item.start_s, end_s=end_s)
    first = next(kept, None)
    if first is None:
        raise DecodeError(f"no frame is on show from {item.start_s:.3f} s on: the video ends before its header says")
    shown: list[float] = []

    def resized() -> Iterator[np.ndarray]:
        last, out = None, None
        for frame, seconds in itertools.chain([first], kept):
            if frame is not last or out is None:
                last, out = frame, _resize(frame, size)
            shown.append(seconds)
            yield out

    file = io.BytesIO()
    options = {"threads": "1", "preset": "medium", "g": str(GROUP_OF_PICTURES)}
    try:
        write_video(file, resized(), fps=fps, codec="libx264", crf=settings.crf, options=options)
    except DecodeError:
        raise
    except ValueError as error:  # an encoder that refuses the size
        raise DecodeError(f"cannot be re-encoded: {error}") from error
    return file.getvalue(), shown, fps, size


def _steady(frames: Iterable[tuple[np.ndarray, float]]) -> Iterator[tuple[np.ndarray, float]]:
    """The same frames; DecodeError when their size changes on the way."""
    size = None
    for frame, seconds in frames:
        if size is not None and frame.shape != size:
            raise DecodeError(f"the frame size changes from {size[1]}x{size[0]} to {frame.shape[1]}x{frame.shape[0]}")
        size = frame.shape
        yield frame, seconds


def _check(item: Item, info: VideoInfo) -> tuple[float, int]:
    """(seconds, frames) of a source that decodes from end to end without an error; its last frame counts 1 / fps, an
    image's 0."""
    last_s, count = 0.0, 0
    for _, seconds in _steady(iter_frames(item.path)):
        last_s, count = seconds, count + 1
    if count == 0:
        raise DecodeError("0 frames")
    return last_s + (1.0 / info.fps if info.fps else 0.0), count


def _encoded_size(info: VideoInfo, short_side: int | None) -> tuple[int, int]:
    """(width, height): unchanged within the limit (an odd edge is then stored as 4:4:4), else both even, for 4:2:0."""
    if short_side is None or min(info.width, info.height) <= short_side:
        return info.width, info.height
    shrink = short_side / min(info.width, info.height)
    return max(2, 2 * round(info.width * shrink / 2)), max(2, 2 * round(info.height * shrink / 2))


def _resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at (width, height), antialiased bilinear."""
    width, height = size
    if frame.shape[:2] == (height, width):
        return frame
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[
        None
    ]  # [1, 3, H, W], a channels-last view: the fast uint8 path
    out = interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def _captions_of(item: Item, duration_s: float) -> list[dict[str, Any]]:
    """The captions on show in the clip, in seconds of the clip."""
    out = []
    for caption in item.captions:
        first = max(0.0, caption["start_s"] - item.start_s)
        last = duration_s if caption["end_s"] is None else min(duration_s, caption["end_s"] - item.start_s)
        if first < last or duration_s == 0.0:
            out.append({"start_s": round(first, 6), "end_s": round(max(first, last), 6), "text": caption["text"]})
    return out


def _questions_of(item: Item, duration_s: float, fps: float) -> list[dict[str, Any]]:
    """The questions that the clip can answer, their spans in seconds of the clip.

    A question with a span needs all of it (half a frame less at most; of one without an end, the beginning): cut in
    two, the answer may be another. One without a span is about the row, and stays with each clip that is cut from it.
    """
    out = []
    for question in item.qa:
        if "start_s" in question:
            first = question["start_s"] - item.start_s
            last = duration_s if question["end_s"] is None else question["end_s"] - item.start_s
            outside = max(-first, last - duration_s)
            if duration_s and (outside > 0.5 / fps and not item.whole or first >= duration_s or last <= 0):
                continue
            span = {"start_s": max(0.0, first), "end_s": min(last, duration_s)}
            question = {**question, **{key: round(seconds, 6) for key, seconds in span.items()}}
        out.append(question)
    return out


def _extension(path: Path) -> str | None:
    """The member extension of a file that is kept: its own, else by its first bytes; None where shards have none."""
    suffix = path.suffix.lower()[1:]
    suffix = ALIASES.get(suffix, suffix)
    if suffix in MEDIA:
        return suffix
    if f".{suffix}" in VIDEO_SUFFIXES:
        return None
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF":
        return "webp" if head[8:] == b"WEBP" else "avi"
    if head[4:8] == b"ftyp":
        return "mp4"
    return next((name for magic, name in MAGIC if head.startswith(magic)), None)


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _add(archive: tarfile.TarFile, name: str, content: bytes | Path) -> None:
    member = tarfile.TarInfo(name)  # a plain file: mode 644, time 0, owner 0 without a name
    if isinstance(content, bytes):
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    else:
        with open(content, "rb") as file:
            member.size = os.fstat(file.fileno()).st_size
            archive.addfile(member, file)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def write_atomically(path: Path, value: Any) -> None:
    """Write bytes (anything else as JSON) so that `path` is never seen half-written, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = value if isinstance(value, bytes) else (json.dumps(value, indent=1) + "\n").encode()
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def write_shared(path: Path, value: Any) -> None:
    """`write_atomically` where several processes may write the same bytes; leaves nothing of those that were killed."""
    try:
        write_atomically(path, value)
    except FileNotFoundError:  # swept below by another one, which has written the same
        if not path.exists():
            raise
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
