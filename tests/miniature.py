"""Miniature corpora: shards of 24-frame videos at 12 fps whose grey level says the clip and the frame, so that a wrong
window shows, and short cuts to the streams over them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from vtok.config import DataConfig
from vtok.data.encode import write_video
from vtok.data.pipeline import TrainingStream
from vtok.data.sources import open_sources
from vtok.data.view import View

torch.set_num_threads(1)
SMALL = View(num_frames=4, size=(16, 16), fps=6.0, scale=(0.5, 1.0), hflip=0.5)


@functools.cache
def movie(level: int = 0, frames: int = 24, height: int = 18, width: int = 24, container: str = "mov") -> bytes:
    """Frame k: left half grey 4 k, right half grey `level`, a gradient below, so crops and flips show."""
    file = io.BytesIO()
    picture = np.zeros((frames, height, width, 3), np.uint8)
    picture[:, :, : width // 2] = 4 * np.arange(frames, dtype=np.uint8)[:, None, None, None]
    picture[:, :, width // 2 :] = level
    picture[:, height // 2 :] += np.arange(width, dtype=np.uint8)[None, None, :, None]
    codec = "ffv1" if container == "matroska" else "png"
    write_video(file, torch.from_numpy(picture), fps=12, codec=codec, container=container)  # mov: exact ticks: 1/12 s
    return file.getvalue()


@functools.cache
def photo(level: int = 0, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture = np.full((1, 20, 30, 3), level, np.uint8)
    write_video(file, torch.from_numpy(picture), fps=1, codec={"jpg": "mjpeg"}.get(kind, kind), container="image2pipe")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def clip(key: str, media: bytes | None = None, suffix: str = "mov", **facts) -> list[tuple[str, bytes]]:
    level = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 200
    return [(f"{key}.{suffix}", media or movie(level % 8 * 20)), (f"{key}.json", json.dumps(facts).encode())]


def write_index(folder: Path, counts: dict[str, int]) -> None:
    shards = [
        {"name": name, "samples": n, "bytes": (folder / name).stat().st_size, "sha256": ""}
        for name, n in counts.items()
    ]
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def make_shards(folder: Path, shards: int, samples: int, *, prefix: str = "c") -> Path:
    counts = {}
    for s in range(shards):
        members = [m for i in range(samples) for m in clip(f"{prefix}{s}_{i:02d}", caption=f"clip {s} {i}")]
        counts[write_tar(folder / f"{prefix}-{s:03d}.tar", members).name] = samples
    write_index(folder, counts)
    return folder


def stream(where, **keywords) -> TrainingStream:
    settings = {"view": SMALL, "batch_size": 3, "seed": 7, "shuffle_buffer": 4}
    weights = keywords.get("weights")
    return TrainingStream(open_sources(str(where), weights=weights), **(settings | keywords))


def take(loader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def fingerprint(batches) -> list[tuple[tuple[str, ...], str]]:
    return [(tuple(b.keys), hashlib.sha256(b.video.numpy().tobytes()).hexdigest()) for b in batches]


def config(corpus: Path, **changes) -> DataConfig:
    settings = dict(shards=str(corpus), val_shards=str(corpus), num_frames=4, size=[16, 16], fps=6.0, batch_size=3)
    return DataConfig(**(settings | dict(num_workers=0, shuffle_buffer=4, seed=7) | changes))
