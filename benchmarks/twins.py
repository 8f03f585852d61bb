"""A preset's tiny twin as the benchmarks train it: by `vtok train`, in a process of its own, once."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vtok.layers.i3d import I3DNet
from vtok.layers.perceptual import LPIPS
from vtok.layers.vgg import WIDTHS, VGG19Distance

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def run(*words: object, log: Path) -> float:
    """A command of one thread, what it says appended to `log`; MiB of its largest resident set.

    Raises: SystemExit where it fails.
    """
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=file, stderr=file, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"error: {' '.join(map(str, words))} ended with status {status}; see {log}")
    return usage.ru_maxrss / (1 << 10 if sys.platform != "darwin" else 1 << 20)


def train(name: str, *, twin: Path, out: Path, given: list[str]) -> float | None:
    """Trains `twin` as out/NAME and exports it as out/NAME-export, where that is not there; MiB of the training's
    largest resident set, kept for the next call."""
    export, kept = out / f"{name}-export", out / f"{name}.memory_mib"
    if export.is_dir():
        return float(kept.read_text()) if kept.is_file() else None
    log = out / f"{name}.log"
    memory = run("-m", "vtok.cli", "train", twin, *given, log=log)
    kept.write_text(str(memory))
    run("-m", "vtok.cli", "export", out / name, "--out", export, "--no-entropy", "--which", "last", log=log)
    return memory


def step_ms(run: Path) -> float | None:
    """Median wall time between the lines of steps, after the first five."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines if "train/loss" in line and "time_s" in line]
    steps = [1e3 * (b - a) for a, b in zip(times[5:], times[6:])]
    return statistics.median(steps) if steps else None


def random_vgg19() -> dict[str, torch.Tensor]:
    """A state dict as torchvision's `vgg19` has it, an eighth as wide; what no loss reads is zero."""
    width = WIDTHS[-1] // 8
    unread = {f"features.{i}.{k}": torch.zeros(width) for i in (32, 34) for k in ("weight", "bias")}
    return VGG19Distance(tuple(w // 8 for w in WIDTHS)).state_dict() | unread


def random_raft() -> dict[str, torch.Tensor]:
    from torchvision.models.optical_flow import raft_small

    return raft_small().state_dict()


NETWORKS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "lpips": lambda: LPIPS("alex").state_dict(),
    "vgg19": random_vgg19,
    "i3d": lambda: I3DNet().state_dict(),
    "raft": random_raft,
}


def network(root: Path, name: str) -> Path:
    """Random weights of a network that losses look through, made under `root` where they are not there."""
    path = root / f"{name}.pt"
    if not path.is_file():
        torch.manual_seed(0)
        torch.save(NETWORKS[name](), path)
    return path


def loss_networks(objective: Any, root: Path) -> list[str]:
    """Overrides that name random weights, made under `root`, for what the losses of a preset look through."""
    given = []
    perceptual, net = ("perceptual", "gram", "scorer"), getattr(objective, "perceptual_net", "")
    if any(getattr(objective, key, 0) for key in perceptual) and net in NETWORKS:
        given.append(f"objective.perceptual_weights={network(root, net)}")
    for key, net in (("video_perceptual", "i3d"), ("flow", "raft")):
        if getattr(objective, key, 0) and hasattr(objective, f"{key}_weights"):
            given.append(f"objective.{key}_weights={network(root, net)}")
    return given
