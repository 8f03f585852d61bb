"""The tiny twins of a family's presets side by side: quality at equal bits, time of a step, memory, parameters.

    python benchmarks/families.py --family discrete [--only NAME] [--shards DIR] [--out DIR]
    python benchmarks/families.py --family all [--only NAME] [--steps N] [--out DIR]     one table over all families:
                                                                                         every_family.py

Each preset is trained by `vtok train` in a process of its own (one thread), stages after those they begin with, and
measured by `vtok.evaluation.evaluator` on held-out clips beside both controls at the same bits. Without --shards it
writes the procedural corpus of tests/test_tiny.py, with dense maps. A run that is there (--out) is measured only.

    tokens, bits/px   at all tokens; a token of several ids counts once
    PSNR              of the twin, dB; continuous latents and dense maps have no controls
    dct, down         of the controls at the twin's bits (vtok.metrics.controls)
    step              ms of wall time: median of all steps but the first five, loading and logging included
    CPU               ms of CPU time of forward, backward and update with all losses on: median of five training batches
    memory            largest resident set of the training process, MiB
    parameters        of the twin, thousands; of the preset, millions
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from every_family import every_family
from twins import CONFIGS, loss_networks, step_ms, train

from vtok.config import RunConfig, load
from vtok.data import synthetic
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import ValidationSet, make_loader
from vtok.data.sources import every_shard
from vtok.data.view import view_of
from vtok.evaluation.evaluator import Evaluator
from vtok.loading import load_run
from vtok.train import build
from vtok.training.optim import parameter_groups

# the preset whose export a later stage begins with
BEGINS_WITH = {
    "vidtok_fsq_488_stage2": "vidtok_fsq_488",
    "magvit2_lfq": "magvit2_lfq_image",
    "cosmos_fsq_488_stage2": "cosmos_fsq_488",
    "omnitokenizer_vq": "omnitokenizer_vq_image",
    "onevae_fsq": "onevae_kl",
    "onevae_fsq_81616": "onevae_kl_81616",
}
GOES_ON = {"vidtok_fsq_488_stage2"}  # the losses too: discriminator, learned variance
HEAD = f"{'preset':24}{'steps':>6}{'tokens':>8}{'bits/px':>9}" + "".join(
    f"{heading:>{width}}"
    for heading, width in (
        ("PSNR", 7),
        ("dct", 7),
        ("down", 7),
        ("step", 7),
        ("CPU", 7),
        ("memory", 8),
        ("twin k", 8),
        ("full M", 8),
    )
)


@dataclass
class Row:
    name: str
    steps: int
    tokens: float
    bits_per_pixel: float | None
    psnr: dict[str, float | None]  # of the twin and of each control
    step_ms: float | None
    cpu_ms: float
    memory_mib: float | None
    twin: int
    full: float  # millions

    def __str__(self) -> str:
        cells = [
            (self.bits_per_pixel, 9, 4),
            (self.psnr["twin"], 7, 2),
            (self.psnr["dct"], 7, 2),
            (self.psnr["downsample"], 7, 2),
            (self.step_ms, 7, 0),
            (self.cpu_ms, 7, 0),
            (self.memory_mib, 8, 0),
            (self.twin / 1e3, 8, 0),
            (self.full, 8, 1),
        ]
        numbers = "".join(f"{'-' if v is None else format(v, f'.{d}f'):>{w}}" for v, w, d in cells)
        return f"{self.name:24}{self.steps:6d}{self.tokens:8.0f}{numbers}"


def presets(family: str, only: list[str]) -> list[str]:
    """Presets of a family with a twin, each after the one it begins with; with `only` those and what they need."""
    found = sorted(path.stem.removesuffix("_tiny") for path in (CONFIGS / family).glob("*_tiny.yaml"))
    if not found:
        raise SystemExit(f"error: --family {family}: no *_tiny.yaml in {CONFIGS / family}")
    unknown = sorted(set(only) - set(found))
    if unknown:
        raise SystemExit(f"error: --only {','.join(unknown)}: no such twin; choose from {', '.join(found)}")
    out: list[str] = []

    def add(name: str) -> None:
        if name in BEGINS_WITH:
            add(BEGINS_WITH[name])
        if name not in out:
            out.append(name)

    for name in only or found:
        add(name)
    return out


def prepare(root: Path, shards: str) -> Path:
    """The folder with train/ and val/ shards, made under `root` where it is not there."""
    if shards:
        return Path(shards)
    if not (root / "shards" / "val" / "index.json").is_file():
        manifest = synthetic.write_corpus(
            root / "corpus", clips=240, seconds=2, size=(32, 32), fps=8, complexity=(0, 1), map_size=(32, 32),
            workers=1, progress=False,
        )  # fmt: skip
        command = [sys.executable, "-m", "vtok.cli", "shards", str(manifest), "--out", str(root / "shards"), "--quiet"]
        subprocess.run(command, check=True)
    return root / "shards"


def settings(name: str, *, family: str, shards: Path, out: Path) -> tuple[RunConfig, list[str]]:
    """The configuration of a twin's run, and the overrides of its yaml that make it."""
    path = CONFIGS / family / f"{name}_tiny.yaml"
    plain = load(path)
    parts = len(plain.data.part_frames or [0])
    given = [
        f"out={out}",
        f"name={name}",
        f"data.shards={'::'.join([str(shards / 'train')] * parts)}",
        f"data.val_shards={shards / 'val'}",
        "data.num_workers=0",
        "trainer.progress=false",
        "trainer.tensorboard=false",
        "trainer.log_every=1",
        "trainer.accelerator=cpu",
    ]
    given += loss_networks(plain.objective, out)
    if name in BEGINS_WITH:
        given.append(f"init_from={out / f'{BEGINS_WITH[name]}-export'}")
    if name in GOES_ON:
        given.append(f"objective.init_from={out / BEGINS_WITH[name]}")
    return load(path, given), given


def cpu_ms(config: RunConfig, *, steps: int = 5) -> float:
    """CPU time of a step as a run ends with it: what other work on the machine disturbs least."""
    lit, times = build(config, fresh=False).train(), []
    optimizer = torch.optim.AdamW(parameter_groups(lit, config.optim), lr=config.optim.lr)
    for clip in islice(ClipDataModule(config.data).train_dataloader(), steps + 1):
        began = time.process_time()
        optimizer.zero_grad()
        lit.objective(lit.model, clip.as_float(), config.trainer.max_steps).total.backward()
        optimizer.step()
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times[1:])


def measure(name: str, config: RunConfig, *, memory: float | None, family: str) -> Row:
    """A finished run beside its controls, at all its tokens."""
    model, _ = load_run(str(config.run_dir))
    val = list(ClipDataModule(config.data).val_dataloader())
    shards = every_shard(config.data.shards.split("::")[0], setting="data.shards")
    held = ValidationSet(
        shards, view=view_of(config.data), batch_size=config.data.val_batch_size, val_clips=None,
        setting="data.shards",
    )  # fmt: skip
    coloured = val[0].video is not None and val[0].video.shape[1] == 3
    controls = ["dct", "downsample"] if coloured and model.codebook_sizes else []
    clips = list(make_loader(held, num_workers=0)) if controls else None
    evaluator = Evaluator(model, val=val, train=clips, controls=controls, progress=False, fps=config.data.fps)
    most = evaluator.budgets[-1]
    evaluator.budgets = [most]
    rows = {row["method"]: row for row in evaluator.run(model=name, shards=config.data.val_shards)["rows"]}
    own = rows[evaluator.family]
    stated = re.search(r"^# Parameters: ([\d.]+) M", (CONFIGS / family / f"{name}.yaml").read_text(), re.M)
    assert stated, f"{name}.yaml states no parameter count"
    return Row(
        name=name,
        steps=config.trainer.max_steps,
        tokens=own["tokens_mean"],
        bits_per_pixel=own["bits_per_pixel"] if model.codebook_sizes else None,
        psnr={"twin": own["psnr_db"], **{c: rows.get(c, {}).get("psnr_db") for c in ("dct", "downsample")}},
        step_ms=step_ms(config.run_dir),
        cpu_ms=cpu_ms(config),
        memory_mib=memory,
        twin=sum(p.numel() for p in model.parameters()),
        full=float(stated[1]),
    )


def run(asked: argparse.Namespace, root: Path) -> Iterator[Row]:
    shards = prepare(root, asked.shards)
    for name in presets(asked.family, asked.only.split(",") if asked.only else []):
        config, given = settings(name, family=asked.family, shards=shards, out=root)
        memory = train(name, twin=CONFIGS / asked.family / f"{name}_tiny.yaml", out=root, given=given)
        yield measure(name, config, memory=memory, family=asked.family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="discrete", choices=["discrete", "all"], help="folder of configs/, or all")
    parser.add_argument("--only", default="", help="comma-separated presets, without _tiny; and what they begin with")
    parser.add_argument("--shards", default="", help="folder with train/ and val/; the procedural corpus when left out")
    parser.add_argument("--out", help="where runs go and are found again; a temporary folder when left out")
    parser.add_argument("--steps", type=int, help="of --family all: steps of a twin at most (default: its own)")
    asked = parser.parse_args()
    if asked.family == "all" and asked.shards:
        parser.error(f"--shards {asked.shards} is for one family; --family all makes the corpora that its twins need")
    if asked.family != "all" and asked.steps is not None:
        parser.error(f"--steps {asked.steps} is for --family all")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as aside:
        root = Path(asked.out or aside)
        root.mkdir(parents=True, exist_ok=True)
        if asked.family == "all":
            return every_family(root, only=asked.only.split(",") if asked.only else [], steps=asked.steps)
        print(HEAD, flush=True)
        for row in run(asked, root):
            print(row, flush=True)


if __name__ == "__main__":
    main()
