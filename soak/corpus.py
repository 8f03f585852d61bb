"""What is killed and damaged here: a small real corpus, a run trained on it, its export, a `.vtok` file.

videos --vtok shards--> shards --vtok train--> run --vtok export--> export --vtok encode--> packed and static .vtok
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soak import launch
from vtok.data.encode import write_video

SIZE, FPS = 16, 8
# A model and a training in which everything takes part that a checkpoint has to keep: nested dropout, quantized ids,
# averaged weights, a warm-up, validation, loader workers with a shuffle buffer and flips.
CONFIG = """\
# a model of a few thousand weights on clips of {size} x {size} pixels
name: first
out: {out}
seed: 1
model:
  name: flexible
  num_frames: 4
  size: [{size}, {size}]
  patch: [2, 8, 8]
  width: 16
  encoder_depth: 1
  decoder_depth: 1
  num_heads: 2
  num_tokens: 8
  mask: full
data:
  shards: {shards}/train
  val_shards: {shards}/val
  num_frames: 4
  size: [{size}, {size}]
  fps: 8.0
  batch_size: 4
  val_batch_size: 4
  num_workers: 2
  shuffle_buffer: 8
  hflip: 0.5
optim:
  lr: 0.0015
  warmup_steps: 5
  ema_decay: 0.9
trainer:
  accelerator: cpu
  max_steps: 12
  log_every: 5
  val_every: 20
  checkpoint_every: 5
  statistics_clips: 8
  tensorboard: false
  progress: false
  ledger: true
"""
PACK = ["--clip-seconds", "1", "--shard-samples", "4", "--val-fraction", "0.25", "--crf", "20", "--quiet"]


@dataclass(frozen=True)
class Corpus:
    """Where things are. videos: a folder. shards: a packing. config: of training. vtok: files by coding."""

    root: Path
    videos: Path
    shards: Path
    config: Path
    run: Path
    export: Path
    vtok: dict[str, Path]
    tokens: Path

    def scratch(self, name: str) -> Path:
        """An empty folder."""
        folder = self.root / "scratch" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"


def moving(seed: int, frames: int = 16, size: int = 24) -> np.ndarray:
    """uint8 [frames, size, size, 3]: a bright bar crosses a gradient."""
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, 200, (2, 3))
    across = np.linspace(0, 1, size)[None, :, None]
    still = np.broadcast_to(first + (second - first) * across, (size, size, 3))
    video = np.repeat(still[None], frames, 0).copy()
    for k in range(frames):
        video[k, :, (seed + k) % size] = 255
    return video.round().astype(np.uint8)


def write_videos(folder: Path, *, count: int, seconds: float = 2.0, size: int = 24, seed: int = 0) -> Path:
    """`count` different H.264 videos and one file that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        frames = moving(seed + number, round(FPS * seconds), size)
        write_video(folder / f"clip{number:02d}.mp4", frames, fps=FPS, crf=16, options={"preset": "ultrafast"})
    (folder / "broken.mp4").write_bytes(b"this is no video")
    return folder


def write_config(path: Path, *, shards: Path, out: Path) -> Path:
    path.write_text(CONFIG.format(size=SIZE, shards=shards, out=out))
    return path


def at(root: Path) -> Corpus:
    """Where everything of a corpus under `root` is."""
    return Corpus(
        root=root,
        videos=root / "videos",
        shards=root / "shards",
        config=root / "config.yaml",
        run=root / "runs" / "first",
        export=root / "export",
        vtok={coding: root / f"{coding}.vtok" for coding in ("packed", "static")},
        tokens=root / "tokens",
    )


def build(root: Path) -> Corpus:
    """All of it, under `root`, by the commands a user would type."""
    made = at(root)
    write_videos(made.videos, count=12)
    log = made.log("build")
    launch.must(["shards", str(made.videos), "--out", str(made.shards), "--workers", "0", *PACK], log)
    write_config(made.config, shards=made.shards, out=root / "runs")
    launch.must(["train", str(made.config)], log)
    launch.must(["export", str(made.run), "--out", str(made.export)], log)
    for coding, path in made.vtok.items():
        video = str(made.videos / "clip00.mp4")
        arguments = ["--out", str(path), "--coding", coding, "--size", "model", "--budget", "5"]
        launch.must(["encode", str(made.export), video, *arguments], log)
    tokens = ["--model", str(made.export), "--out", str(made.tokens), "--workers", "0", "--quiet"]
    launch.must(["tokenize", str(made.shards), *tokens], log)
    return made
