"""Inputs for packing, good ones and bad ones, and what a packing holds."""

import hashlib
import json
import random
import struct
import tarfile
from pathlib import Path

import av
import numpy as np

from vtok.data.encode import write_video
from vtok.data.pack import Settings
from vtok.data.shards import pack

FPS = 10


def moving(num_frames: int = 10, *, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """[T, H, W, 3] uint8: a bright square that moves right over a dim gradient; its place tells the frame's number."""
    level = np.linspace(20, 90, width)[None, :, None] + np.linspace(0, 30 + seed, height)[:, None, None]
    frames = np.repeat(np.broadcast_to(level, (height, width, 3))[None], num_frames, 0).astype(np.uint8)
    for t in range(num_frames):
        x = t * (width - 12) // max(num_frames - 1, 1)
        frames[t, 4:16, x : x + 12] = (250, 200 - seed, 40)
    return frames


def video(path: Path, *, frames: np.ndarray | None = None, fps: float = FPS, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving() if frames is None else frames, fps=fps, **{"crf": 10, **options})
    return path


def video_with_audio(path: Path, *, with_video: bool = True, seconds: float = 1.0, tone: float = 440.0) -> Path:
    """A tone from 0.5 s on, silence before."""
    with av.open(str(path), "w") as out:
        if with_video:
            stream = out.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=16000, layout="mono")
        if with_video:
            for image in moving(int(seconds * FPS)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode(None))
        at = np.arange(int(16000 * seconds)) / 16000
        wave_form = np.where(at < seconds / 2, 0.0, 0.5 * np.sin(2 * np.pi * tone * at)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave_form[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


def flipped(path: Path, *, count: int = 20) -> Path:
    """The file with bits flipped in the middle of its pictures: decoders conceal that."""
    data, draw = bytearray(path.read_bytes()), random.Random(1)
    begin = data.index(b"mdat") + 4
    end = begin + struct.unpack(">I", data[begin - 8 : begin - 4])[0] - 8
    for _ in range(count):
        data[draw.randrange(begin + (end - begin) // 3, end)] ^= 0xFF
    path.write_bytes(data)
    return path


def rotated(path: Path) -> Path:
    """The display matrix of the mp4's track header set to a quarter turn."""
    data = bytearray(video(path).read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def truncated(path: Path, *, share: float = 0.6, **options) -> Path:
    data = video(path, frames=moving(30), **options).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return path


def image(path: Path, codec: str) -> Path:
    with av.open(str(path), "w", format="image2") as out:
        stream = out.add_stream(codec, rate=1)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24", "libwebp": "bgra"}[codec]
        out.mux(stream.encode(av.VideoFrame.from_ndarray(moving(1)[0], format="rgb24").reformat(format=stream.pix_fmt)))
        out.mux(stream.encode(None))
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def samples(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted((out / split).glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                assert member.isreg() and member.mtime == 0 and member.uid == 0 and member.uname == ""
                key, extension = member.name.split(".")
                found.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return found


def meta(sample: dict[str, bytes]) -> dict:
    return json.loads(sample["json"])


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def hashes(out: Path) -> dict[str, str]:
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def packed(inputs, out: Path, **options):
    return pack(inputs, out, settings=Settings(**{"val_fraction": 0.0, **options}), workers=0, progress=False)


def write_manifest(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path
