"""What each key of docs/performance.md gains: step time, memory and MFU, side by side.

    python benchmarks/performance.py [--config PRESET.yaml [key=value ...]] [--steps 20] [--repeats 3] [--only NAME,...]

Every row is a real run (`vtok.train.train`) in a process of its own, with clips from memory; rows take turns, `repeats`
times, and the median counts. The first line of each run (compiling, counting operations) is left out. On CUDA the time
is the clock's and the memory what tensors held at most; on a CPU the time is also given as CPU time of the process,
which other work on the machine changes less, and the memory is the process's resident peak. `gain` compares with the
row named after `over`: above 1 is faster. The last loss says that a key changed no numbers (bf16 does).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from memory import Memory
from torch.utils.data import DataLoader

from vtok.config import RunConfig, flatten, load
from vtok.data.prefetch import ahead_of
from vtok.train import train
from vtok.types import Clip

ROOT = Path(__file__).resolve().parent.parent
PLAIN = "as it is"
TO_DISK = "checkpoint every 5 steps"


class Loaded(Memory):
    """Clips from memory through loader workers, pinned and copied as the run's keys say; marks the time of each."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def advance(self, clip: Clip) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def train_dataloader(self) -> Any:
        data, device = self.config.data, self.trainer.strategy.root_device
        pin = device.type == "cuda" if data.pin_memory is None else data.pin_memory
        workers = data.num_workers if device.type == "cuda" else 0
        loader = DataLoader(self.stream, batch_size=None, num_workers=workers, pin_memory=pin)
        return ahead_of(loader, device, wanted=data.prefetch)


def rows_of(config: RunConfig, *, cuda: bool) -> dict[str, tuple[str, list[str]]]:
    """{name: (the row it is compared with, overrides)}."""
    on_disk = ["trainer.checkpoint_every=5"]
    rows = {
        PLAIN: (PLAIN, []),
        "optim.fused=false": (PLAIN, ["optim.fused=false"]),
        "trainer.compile": (PLAIN, ["trainer.compile=true"]),
        "trainer.channels_last": (PLAIN, ["trainer.channels_last=true"]),
        "bf16-mixed": (PLAIN, ["trainer.precision=bf16-mixed"]),
        TO_DISK: (PLAIN, on_disk),
        "trainer.async_checkpoint": (TO_DISK, [*on_disk, "trainer.async_checkpoint=true"]),
    }
    flags = [f"{key}=true" for key, value in flatten(config).items() if key.endswith(".checkpoint") and value is False]
    if flags:
        rows["activation checkpointing"] = (PLAIN, flags)
    if cuda:
        rows["data.pin_memory=false"] = (PLAIN, ["data.pin_memory=false"])
        rows["data.prefetch"] = (PLAIN, ["data.prefetch=true"])
        rows["bf16-mixed, trainer.compile"] = ("bf16-mixed", ["trainer.precision=bf16-mixed", "trainer.compile=true"])
    return rows


def child(path: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """One run: milliseconds a step (clock, CPU), GiB, MFU, TFLOP/s and the last loss."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = load(path, overrides)
    config.data.shards, config.data.val_shards = "memory", ""
    run = config.trainer
    run.max_steps, run.log_every, run.max_minutes = 2 * steps + 1, steps, None
    run.val_every = run.sample_every = 0
    run.checkpoint_minutes, run.progress, run.tensorboard, run.ledger = 1e6, False, False, True
    run.statistics_clips = min(run.statistics_clips, 64)
    data = Loaded(config)
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        config.out = out
        folder = train(config, data=data)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        loss = float.fromhex((folder / "ledger-0.txt").read_text().splitlines()[-1].split()[2])
    last = [line for line in lines if "train/loss" in line][-1]
    begin, end = steps * run.accumulate, 2 * steps * run.accumulate
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else _resident_peak_gib()
    return {
        "wall_ms": 1e3 * (data.wall[end] - data.wall[begin]) / steps,
        "cpu_ms": 1e3 * (data.cpu[end] - data.cpu[begin]) / steps,
        "gib": max(peak, last["train/device_memory_gib"] or 0.0) if cuda else peak,
        "mfu": last["train/mfu"],
        "tflops": last["train/tflops_per_s"],
        "loss": loss,
    }


def _resident_peak_gib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def launch(path: Path, overrides: list[str], steps: int, *, cuda: bool) -> dict[str, Any] | str:
    """What `child` gives in a process of its own; the last line of its error where it fails."""
    # a fork has everything imported; CUDA does not live through one
    context: Any = multiprocessing.get_context("spawn" if cuda else "fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, str(path), overrides, steps))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "it was killed, or its device ran out of memory"
    finally:
        process.join()


def _report(pipe: Any, path: str, overrides: list[str], steps: int) -> None:
    try:
        pipe.send(child(path, overrides, steps))
    except Exception as error:
        pipe.send((str(error).strip().splitlines() or [type(error).__name__])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "flexible" / "debug.yaml")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a run, and as many before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows by name, with commas; those they are compared with come too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the preset, for every row")
    asked = parser.parse_args()
    if asked.steps < 5 or asked.repeats < 1:
        raise SystemExit(f"error: --steps {asked.steps} --repeats {asked.repeats}: at least 5 and 1")
    cuda = torch.cuda.is_available()
    rows = rows_of(load(asked.config, asked.overrides), cuda=cuda)
    wanted = [name.strip() for name in asked.only.split(",") if name.strip()] or list(rows)
    if unknown := [name for name in wanted if name not in rows]:
        raise SystemExit(f"error: --only {unknown}: rows are {', '.join(rows)}")
    wanted = [name for name in rows if name == PLAIN or name in wanted or any(rows[w][0] == name for w in wanted)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    failed: dict[str, str] = {}
    for _ in range(asked.repeats):
        for name in wanted:
            if name not in failed:
                result = launch(asked.config, [*asked.overrides, *rows[name][1]], asked.steps, cuda=cuda)
                if isinstance(result, str):
                    failed[name] = result
                else:
                    found[name].append(result)
    device = torch.cuda.get_device_name() if cuda else f"CPU, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s)"
    print(f"{asked.config.stem} {' '.join(asked.overrides)}")
    print(f"on {device}, torch {torch.__version__}, {asked.repeats} repeats\n")
    print("| key | ms a step | CPU ms | gain | over | peak GiB | TFLOP/s | MFU | last loss |\n" + "|---" * 9 + "|")
    for name in wanted:
        print(_row(name, rows[name][0], found, failed, cuda=cuda))


def _row(name: str, over: str, found: dict[str, list[dict[str, Any]]], failed: dict[str, str], *, cuda: bool) -> str:
    if name in failed:
        return f"| {name} | not here: {failed[name]} |" + " |" * 7

    def middle(which: str, key: str) -> float | None:
        values = [each[key] for each in found[which] if each[key] is not None]
        return statistics.median(values) if values else None

    clock = "wall_ms" if cuda or "checkpoint" in over + name and "activation" not in name else "cpu_ms"
    base, mine = (middle(which, clock) for which in (over, name))
    gain = f"{base / mine:.2f}" if base and mine and name != over else ""
    cells = [_cell(middle(name, key), form) for key, form in (("wall_ms", ".1f"), ("cpu_ms", ".1f"))]
    rest = [_cell(middle(name, key), form) for key, form in (("gib", ".2f"), ("tflops", ".3g"), ("mfu", ".1%"))]
    loss = _cell(middle(name, "loss"), ".6f")
    return f"| {name} | {' | '.join(cells)} | {gain} | {over if name != over else ''} | {' | '.join(rest)} | {loss} |"


def _cell(value: float | None, form: str) -> str:
    return "null" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
