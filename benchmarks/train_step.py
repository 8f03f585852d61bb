"""What a training step of vtok costs over a bare PyTorch loop with the same model and batch.

    python benchmarks/train_step.py [--repeats 5] [--steps 40] [--config PRESET.yaml [key=value ...]]

One real run (`vtok.train.train`: logging, TensorBoard and a live progress bar on, validation and checkpoints outside
the measured steps). Its data stream makes one bare step, with a copy of model and objective, each time a batch is asked
for; so the two loops alternate step by step, and whatever else the machine does hits both. CPU time of this process,
all its threads; loading is the same for both (clips in memory). A ratio is ours / bare of one pair of neighbouring
steps: the median over the pairs of a repeat, and over repeats. `all` is that of the sums over all steps: the steps in
which operations are counted (1, 2, 4, 8, 16 ... of a run) and lines are written are in it, and every hiccup of the
machine. Memory that is freed stays with the process (glibc): given back to the system and asked for again, it costs
whichever of two equal loops meets the pages first, 2,000 of them or none a step, 1.3 % of it. Losses that look through
a network whose weights are not named look through one with random weights: the same work.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ["FORCE_COLOR"] = "1"  # a live bar, as on a terminal

import lightning.pytorch as pl
import torch
from memory import Endless, Memory
from torch.utils.data import DataLoader
from twins import loss_networks

from vtok.config import RunConfig, load
from vtok.train import build, train
from vtok.training.optim import parameter_groups
from vtok.types import Clip

ROOT = Path(__file__).resolve().parent.parent
WARM = 10


class Bare:
    """The loop one would write by hand: forward, backward, clipping, AdamW."""

    def __init__(self, module: pl.LightningModule, config: RunConfig) -> None:
        trainer, module._trainer = module._trainer, None
        twin = copy.deepcopy(module)
        module._trainer = trainer
        self.model, self.objective, self.limit = twin.model, twin.objective, config.optim.clip_grad_norm
        self.optimizer = torch.optim.AdamW(parameter_groups(twin, config.optim), lr=config.optim.lr, fused=True)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step = 0

    def __call__(self, clip: Clip) -> None:
        self.optimizer.zero_grad()
        loss = self.objective(self.model, clip.as_float(), self.step)
        loss.total.backward()
        if self.limit:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.optimizer.step()
        self.step += 1


class Alternating(Memory):
    """Clips from memory; a bare step before each batch. `marks`: CPU time at each of our steps, and of bare so far."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.bare, self.bare_s = None, 0.0
        self.marks: list[tuple[float, float]] = []

    def advance(self, clip: Clip) -> None:
        self.marks.append((time.process_time(), self.bare_s))

    def train_dataloader(self) -> DataLoader:
        outer = self

        class Stream(Endless):
            def __iter__(self):
                for clip in super().__iter__():
                    module = outer.trainer.lightning_module
                    if outer.trainer.training and getattr(outer.trainer, "optimizers", None):
                        outer.bare = outer.bare or Bare(module, outer.config)
                        began = time.process_time()
                        outer.bare(clip)
                        outer.bare_s += time.process_time() - began
                    yield clip

        return DataLoader(Stream(self.stream.batches), batch_size=None)


@dataclass
class Measured:
    bare_ms: float  # median step
    ours_ms: float
    ratios: list[float]  # the median pair's ours / bare of each repeat
    all: float  # ours / bare of all steps


def measure(config: RunConfig, *, repeats: int, steps: int) -> Measured:
    """Both loops over `repeats` times `steps` steps of one configuration."""
    config.data.shards, config.data.val_shards = "memory", ""
    config.trainer.max_steps = WARM + repeats * steps + 1
    config.trainer.val_every = config.trainer.sample_every = config.trainer.checkpoint_every = 0
    config.trainer.max_minutes, config.trainer.checkpoint_minutes = None, 1e6
    config.trainer.statistics_clips = min(config.trainer.statistics_clips, 64)
    config.trainer.accelerator = "cpu"
    data = Alternating(config)
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        config.out = out
        for given in loss_networks(config.objective, Path(out)):
            key, path = given.removeprefix("objective.").split("=")
            if not getattr(config.objective, key):
                setattr(config.objective, key, path)
        train(config, data=data)
    marks = data.marks[WARM : WARM + repeats * steps + 1]
    bare = [1e3 * (b - a) for (_, a), (_, b) in zip(marks, marks[1:])]
    ours = [1e3 * (b - a) - own for (a, _), (b, _), own in zip(marks, marks[1:], bare)]
    parts = [slice(i * steps, (i + 1) * steps) for i in range(repeats)]
    ratios = [statistics.median(o / b for o, b in zip(ours[part], bare[part])) for part in parts]
    return Measured(statistics.median(bare), statistics.median(ours), ratios, sum(ours) / sum(bare))


def batch_of(config: RunConfig, *, ms: float) -> int:
    """Clips a batch whose bare step takes about `ms` of CPU time on this machine, now."""
    times = []
    for count in (4, 16):
        config.data.batch_size = count
        clips, bare = Alternating(config).clips, Bare(build(config), config)
        bare(clips[0])
        began = time.process_time()
        for i in range(10):
            bare(clips[i % len(clips)])
        times.append(1e2 * (time.process_time() - began))
    slope = max((times[1] - times[0]) / 12, 1e-3)
    return max(1, round(4 + (ms - times[0]) / slope))


def keep_freed_memory() -> None:
    """No page faults in either loop for what the other has freed. Nothing where the allocator is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps of a repeat")
    parser.add_argument("--config", type=Path, help="one preset at its own batch, instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of that preset")
    asked = parser.parse_args()
    if asked.overrides and not asked.config:
        raise SystemExit(f"error: {' '.join(asked.overrides)} change a preset: name it with --config")
    if asked.repeats < 5 or asked.steps < 10:
        raise SystemExit(f"error: --repeats {asked.repeats} --steps {asked.steps}: at least 5 and 10")
    torch.set_num_threads(1)
    keep_freed_memory()
    configs = ROOT / "configs" / "flexible"
    debug = configs / "debug.yaml"
    if asked.config:
        rows = [(asked.config.stem, [asked.config, *asked.overrides])]
    else:
        batch = f"data.batch_size={batch_of(load(debug), ms=25)}"
        rows = [
            ("a step of about 25 ms", [debug, batch]),
            ("the same, averaged weights", [debug, batch, "optim.ema_decay=0.99"]),
            ("demo preset", [configs / "demo.yaml"]),
        ]
    print(f"{'':32}{'bare ms':>10}{'ours ms':>10}{'ratio':>8}{'all':>8}   spread of the {asked.repeats} repeats")
    for name, (path, *overrides) in rows:
        found = measure(load(path, overrides), repeats=asked.repeats, steps=asked.steps)
        middle, spread = statistics.median(found.ratios), f"{min(found.ratios):.3f} to {max(found.ratios):.3f}"
        print(
            f"{name:32}{found.bare_ms:10.2f}{found.ours_ms:10.2f}{middle:8.3f}{found.all:8.3f}   {spread}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
