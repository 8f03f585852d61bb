"""What more processes cost: measured with two on this machine, and the bytes they exchange computed for many.

    python benchmarks/scaling.py [--config PRESET.yaml [key=value ...]] [--no-run] [--no-table] [--gbit 400]

Measured (`--no-table` for it alone): clips a second of real runs (`vtok.train`), clips in memory, in turns: one
process; two processes that know nothing of each other; two ranks of one run, for each strategy. Ranks over strangers is
what communication and waiting cost; strangers over one process is what the machine itself loses to two at once.

Calculated (`--no-run`): bytes that each rank sends in one optimizer step, from the parameters of the model as built and
the numbers' size in each strategy's collectives. With N ranks, G bytes of gradients of the trained parameters, P bytes
of those parameters, H bytes of all parameters the engine holds (frozen losses too), and `a` accumulated batches:

    ddp          2 (N-1)/N G            one ring all-reduce a step: a reduce-scatter and an all-gather of the gradients
    fsdp         (N-1)/N a (H + G)      weights gathered once a batch, gradients reduce-scattered
    deepspeed_1  (N-1)/N (G + P)        reduce-scatter of gradients, all-gather of updated weights
    deepspeed_2  (N-1)/N (a G + P)      the same; gradients are reduced in every batch, since no rank keeps them whole
    deepspeed_3  (N-1)/N a (2 H + G)    weights are gathered for the forward and again for the backward pass of every
                                        batch, gradients reduce-scattered: 3 (N-1)/N P without accumulation

A ring moves (N-1)/N of a buffer per rank in a reduce-scatter or an all-gather (Patarasuk and Yuan 2009, "Bandwidth
optimal all-reduce algorithms for clusters of workstations"); 2 P for data parallel training and for stages 1 and 2, 3 P
for stage 3 are the analysis of ZeRO (Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054). Offload adds what
crosses the host's bus: G/N down and P/N up a step; at stage 3 each rank's share of the weights too, H/N up for each
gather. Not counted: buffers, norms and other scalars, padding, parameters that stage 3 keeps whole
(stage3_param_persistence_threshold), and what a strategy hides behind computation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import Memory

from vtok.config import RunConfig, load, load_family
from vtok.info.dry_run import DryRun, Watch
from vtok.info.estimate import WEIGHTS
from vtok.info.skeletons import Skeletons
from vtok.train import build, train

ROOT = Path(__file__).resolve().parent.parent
RANKS = (8, 64, 512)
STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload", "deepspeed_3_offload")
MEASURED = ("ddp", "deepspeed_2", "deepspeed_3")


# calculated


def element_bytes(strategy: str, precision: str) -> int:
    """Of a weight or gradient in the strategy's collectives.

    PyTorch's own move parameters and gradients as they are: float32 but for bf16-true. DeepSpeed trains half-precision
    copies.
    """
    if strategy in ("ddp", "fsdp"):
        return 2 if precision == "bf16-true" else 4
    return 4 if precision == "32-true" else 2


def sent_bytes(strategy: str, *, trained: int, held: int, ranks: int, accumulate: int, precision: str) -> float:
    """Bytes that each rank sends to others in one optimizer step.

    Args:
        trained, held: parameters that learn, and all those of model and objective.
    """
    share, size = (ranks - 1) / ranks, element_bytes(strategy, precision)
    if strategy == "ddp":
        return 2 * share * size * trained
    if strategy == "fsdp":
        return share * size * accumulate * (held + trained)
    stage = int(strategy.split("_")[1])
    if stage == 3:
        return share * size * accumulate * (2 * held + trained)
    return share * size * trained * ((accumulate if stage == 2 else 1) + 1)


def host_bytes(strategy: str, *, trained: int, held: int, ranks: int, accumulate: int, precision: str) -> float:
    """Bytes of each rank that cross the bus between host and device in one optimizer step."""
    if not strategy.endswith("_offload"):
        return 0.0
    size = element_bytes(strategy, precision) / ranks
    return size * (2 * trained + (2 * accumulate * held if "_3" in strategy else 0))


def parameters(config: RunConfig) -> tuple[int, int]:
    """(that learn, of model and objective together), as training builds them, without weights."""
    for key in WEIGHTS:  # a path that is still to be filled in
        if hasattr(config.objective, key) and not getattr(config.objective, key):
            setattr(config.objective, key, "(none)")
    load_family(config.model.name)
    with DryRun() as run:
        parts = Skeletons(empty=run.empty_module, watch=Watch().of)
        with parts.in_place():
            lit = build(config)
            return sum(p.numel() for p in lit.parameters() if p.requires_grad), sum(p.numel() for p in lit.parameters())


def table(config: RunConfig, *, gbit: float | None = None) -> str:
    """Markdown: the calculation for a preset."""
    run: dict[str, Any] = dict(zip(("trained", "held"), parameters(config)))
    run |= {"accumulate": config.trainer.accumulate, "precision": config.trainer.precision}
    lines = [
        f"Calculated, not measured: {config.name}, {run['trained'] / 1e6:.2f} M parameters that learn of "
        f"{run['held'] / 1e6:.2f} M held, {run['precision']}, {run['accumulate']} batch(es) a step. MB that each rank "
        f"sends in a step{f' (ms at {gbit:g} Gbit/s)' if gbit else ''}:",
        "",
        f"| strategy | {' | '.join(f'{n} ranks' for n in RANKS)} | over the host's bus, {RANKS[0]} ranks |",
        "|---|" + "---:|" * (len(RANKS) + 1),
    ]
    for strategy in STRATEGIES:
        cells = []
        for ranks in RANKS:
            sent = sent_bytes(strategy, ranks=ranks, **run)
            cells.append(f"{sent / 1e6:.1f}" + (f" ({8e-6 * sent / gbit:.2f})" if gbit else ""))
        cells.append(f"{host_bytes(strategy, ranks=RANKS[0], **run) / 1e6:.1f}")
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


# measured


def worker(asked: list[str]) -> None:
    """OUT STEPS PROCESSES STRATEGY CONFIG [key=value ...]: one run."""
    out, steps, processes, strategy, preset, *overrides = asked
    torch.set_num_threads(1)
    config = load(preset, overrides)
    config.out, config.name = out, "run"
    config.data.shards, config.data.val_shards = "memory", ""
    run = config.trainer
    run.accelerator, run.devices, run.num_nodes, run.strategy = "cpu", int(processes), 1, strategy
    run.max_steps, run.log_every, run.max_minutes = 2 * int(steps), int(steps), None
    run.val_every = run.sample_every = run.checkpoint_every = run.statistics_clips = 0
    run.checkpoint_minutes, run.progress, run.tensorboard, run.compile = 1e6, False, False, False
    run.alarms.enabled = False
    if strategy == "deepspeed_3":
        config.optim.ema_decay = 0.0
        whole = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
        run.deepspeed = {"zero_optimization": whole}
    train(config, data=Memory(config))


def start(folder: Path, *, steps: int, processes: int, strategy: str, preset: list[str]) -> subprocess.Popen:
    folder.mkdir(parents=True)
    around = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--worker", str(folder), str(steps), str(processes), strategy, *preset]
    return subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=open(folder / "log.txt", "w"))


def clips_per_s(folder: Path, process: subprocess.Popen) -> float:
    """Of the second half of a run, over all its ranks: the first half holds what happens once."""
    if process.wait(timeout=900) not in (0, -6):
        raise SystemExit(f"error: a run failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["train/clips_per_s"] for row in rows if "train/clips_per_s" in row][-1]


def measure(preset: list[str], *, repeats: int, steps: int) -> list[tuple[str, float, list[float]]]:
    """(what, clips a second, ratios to two strangers of the same turn), medians over the turns."""
    kinds = [("1 process", 1, "auto"), ("2 strangers", 1, "auto"), *((f"2 ranks, {s}", 2, s) for s in MEASURED)]
    speeds: dict[str, list[float]] = {what: [] for what, _, _ in kinds}
    with tempfile.TemporaryDirectory() as out:
        for turn in range(repeats):
            for index, (what, processes, strategy) in enumerate(kinds):
                folders = [Path(out) / f"{turn}-{index}-{i}" for i in range(2 if "strangers" in what else 1)]
                asked = {"steps": steps, "processes": processes, "strategy": strategy, "preset": preset}
                running = [start(folder, **asked) for folder in folders]
                speeds[what].append(sum(clips_per_s(f, p) for f, p in zip(folders, running)))
    base = speeds["2 strangers"]
    return [(what, statistics.median(v), [a / b for a, b in zip(v, base)]) for what, v in speeds.items()]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a preset; without one: flexible/debug measured, its base computed")
    parser.add_argument("--no-run", action="store_true", help="the calculation alone")
    parser.add_argument("--no-table", action="store_true", help="the measurement alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="that are timed; as many come before")
    parser.add_argument("--gbit", type=float, help="bandwidth of each rank's link: adds milliseconds")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    if asked.repeats < 1 or asked.steps < 5 or (asked.gbit is not None and not asked.gbit > 0):
        raise SystemExit("error: --repeats at least 1, --steps at least 5, --gbit above 0")
    presets = ROOT / "configs" / "flexible"
    if not asked.no_run:
        chosen = [str(asked.config or presets / "debug.yaml"), *asked.overrides]
        print(f"Measured on {os.cpu_count()} CPU cores, one thread a process, {Path(chosen[0]).stem}:\n")
        print("| | clips/s | over two strangers (each turn) |\n|---|---:|---|")
        for what, speed, ratios in measure(chosen, repeats=asked.repeats, steps=asked.steps):
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {what} | {speed:.1f} | {statistics.median(ratios):.2f} ({each}) |", flush=True)
        print()
    if not asked.no_table:
        print(table(load(asked.config or presets / "base.yaml", asked.overrides), gbit=asked.gbit))


if __name__ == "__main__":
    main()
