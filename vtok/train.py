"""Runs a training: `train(config)` from Python, `python train.py CONFIG.yaml [key=value ...]` from a shell.

    1. check the configuration; refuse a run directory that another process holds
    2. build data, model and objective; go on from checkpoints/last.ckpt where there is one
    3. per step: LitCompressor (lit.py). At step boundaries: Conductor (loop.py)
    4. a last validation and a last checkpoint

The run directory: config.yaml, environment.json, checkpoints/, metrics.jsonl, tensorboard/, samples/.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

import vtok
from vtok import projecting
from vtok.config import RunConfig, flatten, load, load_family, to_dict
from vtok.data.health import TooManyBroken
from vtok.data.module import ClipDataModule
from vtok.layers.teacher import differences
from vtok.training import signals, step_size, strategy
from vtok.training.alarms import AlarmError
from vtok.training.background import BackgroundCheckpointIO
from vtok.training.curves import Curves
from vtok.training.init_from import begin_from, check_allowed
from vtok.training.keys import check_keys
from vtok.training.lit import LitCompressor, LitTokenizer, NonFiniteError
from vtok.training.lit_projector import LitProjector
from vtok.training.lock import Lock
from vtok.training.loop import Conductor
from vtok.training.optim import SCHEDULES
from vtok.training.run_files import environment, write_run_files
from vtok.training.validation import ToldToStop
from vtok.types import ShapeError

log = logging.getLogger(__name__)

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
# What a resumed run may change under `data.`: everything else there decides which samples come, and in what order.
FREE_DATA = (
    "val_shards", "val_batch_size", "val_clips", "root", "cache_dir", "max_bad_fraction", "max_pixels", "reorder",
    "pin_memory", "prefetch",
)  # fmt: skip
FIXED = ("model.", "objective.", "data.", "seed", "init_from", "init_allow", "trainer.accumulate", "trainer.precision",
         "trainer.statistics_clips")  # fmt: skip


def main(argv: list[str]) -> None:
    """`CONFIG.yaml [key=value ...]`: trains, or goes on with the run of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: train.py CONFIG.yaml [key=value ...]\n\nexample: train.py configs/flexible/debug.yaml name=first")
        raise SystemExit(0 if argv else 2)
    try:
        train(load(argv[0], argv[1:]))
    except (ValueError, FileNotFoundError, NonFiniteError, AlarmError) as error:
        if not _explains(error):
            raise
        notes = getattr(error, "__notes__", [])
        raise SystemExit("\n".join([f"error: {error}", *notes])) from None
    except TooManyBroken as error:
        raise SystemExit(f"error: {_own_words(error)}") from None


def _own_words(error: TooManyBroken) -> str:
    """The message of an error; one that comes from a loader's worker carries that worker's traceback before it."""
    return str(error).rpartition(f"{TooManyBroken.__name__}: ")[2].strip()


def _explains(error: Exception) -> bool:
    """Whether the message was written for the user by vtok itself: others are worth nothing without their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return raised_in.is_relative_to(Path(vtok.__file__).parent) and not isinstance(error, ShapeError)


def check(config: RunConfig) -> None:
    """Raises ValueError, naming key, value and fix, for settings that cannot work together or at all."""
    trainer, optim = config.trainer, config.optim
    stage = strategy.stage_of(trainer.strategy)
    strategy.check_deepspeed(config)
    positive = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.accumulate": trainer.accumulate,
        "trainer.devices": trainer.devices,
        "trainer.num_nodes": trainer.num_nodes,
        "trainer.log_every": trainer.log_every,
        "trainer.max_bad_steps": trainer.max_bad_steps,
        "trainer.checkpoint_minutes": trainer.checkpoint_minutes,
        "eval.budgets": min(config.eval.budgets, default=1),
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"{key}={value} must be above 0")
    not_negative = {
        "trainer.val_every": trainer.val_every,
        "trainer.sample_every": trainer.sample_every,
        "trainer.checkpoint_every": trainer.checkpoint_every,
        "trainer.keep_every": trainer.keep_every,
        "trainer.statistics_clips": trainer.statistics_clips,
        "trainer.stall_minutes": trainer.stall_minutes,
        "optim.lr": optim.lr,
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.clip_grad_norm": optim.clip_grad_norm,
        "data.text_words": config.data.text_words,
    }
    for key, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{key}={value} must be 0 or above")
    if config.data.text_words and not config.data.texts:
        raise ValueError(f"data.text_words={config.data.text_words} is of texts: set data.texts=true, or leave it out")
    if trainer.keep_last < 2:
        raise ValueError(
            f"trainer.keep_last={trainer.keep_last} must be 2 or above: last.ckpt, and previous.ckpt for the day a "
            "disk damages it"
        )
    if trainer.max_minutes is not None and not trainer.max_minutes > 0:
        raise ValueError(f"trainer.max_minutes={trainer.max_minutes} must be above 0, or null for no limit")
    if trainer.peak_tflops is not None and not trainer.peak_tflops > 0:
        raise ValueError(f"trainer.peak_tflops={trainer.peak_tflops} must be above 0, or null for the device's own")
    if trainer.precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if trainer.accelerator not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise ValueError(f"trainer.accelerator={trainer.accelerator!r} is unknown; choose one of {known}")
    if trainer.accelerator in ("gpu", "cuda", "auto") and (torch.cuda.is_available() or trainer.accelerator == "cuda"):
        there = torch.cuda.device_count()
        if trainer.devices > there:
            raise ValueError(
                f"trainer.devices={trainer.devices}, but this machine has {there} GPU(s): lower it, or choose "
                "trainer.accelerator=cpu"
            )
    if trainer.precision == "16-mixed" and (trainer.accelerator == "cpu" or not torch.cuda.is_available()):
        raise ValueError("trainer.precision=16-mixed needs a GPU; choose bf16-mixed or 32-true")
    check_allowed(config.init_from, config.init_allow)
    if optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={optim.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= optim.min_lr_ratio <= 1:
        raise ValueError(f"optim.min_lr_ratio={optim.min_lr_ratio} must lie in [0, 1]")
    if not 0 <= optim.ema_decay < 1:
        raise ValueError(f"optim.ema_decay={optim.ema_decay} must lie in [0, 1); 0 keeps no averaged weights")
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        raise ValueError(f"optim.betas={optim.betas} must be two numbers in [0, 1)")
    if (stage == 3 or trainer.strategy == "fsdp") and optim.ema_decay:
        raise ValueError(
            f"optim.ema_decay={optim.ema_decay}: averaged weights are not kept under trainer.strategy="
            f"{trainer.strategy}, where no rank holds whole weights; choose deepspeed_2, or optim.ema_decay=0"
        )
    if (stage or trainer.strategy == "fsdp") and trainer.compile:
        hooks = "DeepSpeed's hooks" if stage else "fsdp's hooks"
        raise ValueError(f"trainer.compile=true does not work with {hooks}; choose ddp, or compile=false")
    check_keys(config)
    if not config.data.shards:
        raise ValueError("data.shards is empty: name the folder that `vtok shards` wrote (it holds index.json)")
    if trainer.sample_every and not config.data.val_shards:
        raise ValueError(
            f"trainer.sample_every={trainer.sample_every}: sample videos are of validation clips; name data.val_shards"
        )


def train(config: RunConfig, *, data: pl.LightningDataModule | None = None) -> Path:
    """Trains to the end, or goes on with the run that is in the run directory.

    Args:
        data: clips from elsewhere than `config.data`: loaders that yield `Clip`, `advance(clip)`, and the place in the
            stream as its state. None takes `config.data`.
    Returns: the run directory.
    Raises: ValueError for settings; NonFiniteError; AlarmError; SystemExit with 128 + signal number after a SIGTERM,
        SIGUSR1 or SIGINT, once the checkpoint is written (under slurm/job.sh it goes to the file VTOK_STOPPED).
    """
    check(config)
    if not _first_rank():
        _train(config, data)
        return config.run_dir
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with Lock(config.run_dir):
        interrupted = _train(config, data)
    if interrupted and not signals.stop_mark(interrupted):
        raise SystemExit(128 + interrupted)
    return config.run_dir


def _train(config: RunConfig, data: pl.LightningDataModule | None) -> int:
    _quieten()
    first, run_dir = _first_rank(), config.run_dir
    last = run_dir / "checkpoints" / "last.ckpt"
    about = strategy.describe(last) if last.exists() else None
    if about is not None:
        before = load(run_dir / "config.yaml")
        changed = check_unchanged(before, config)  # on every rank, or the others would wait for the one that refuses
        config.model = before.model  # with what a family's `build` filled in when the run began
        if finished(about, config):
            if first:
                print(
                    f"{run_dir} is complete: {about['step']} steps. Raise trainer.max_steps (or max_minutes) to go on, "
                    "or choose another name"
                )
            return 0
    tower = (lambda: lit.model.tower) if projecting.is_projector(config) else None  # of shards of features
    audio = lambda: getattr(lit.model, "ears", None)  # noqa: E731
    data = ClipDataModule(config.data, tower=tower, audio=audio) if data is None else data
    lit = build(config, fresh=about is None)
    if first:
        write_run_files(config, lit)
        if about is not None:
            print(f"resuming {run_dir} at step {about['step']}" + (f"; changed: {changed}" if changed else ""))
            if not strategy.goes_on(about, config):
                print(
                    f"weights and AdamW's moments are taken over from {about['world_size']} process(es) under "
                    f"{about['strategy']}"
                )
        else:
            for name in ("bad_batches.jsonl", "quarantine.jsonl"):  # of a start that was killed before it saved
                (run_dir / name).unlink(missing_ok=True)
            if not config.data.val_shards:
                print("data.val_shards is empty: no validation, no sample videos, no best.ckpt")
    resumed = None if about is None else about["step"]
    owed = about is not None and about.get("owed", [False])[0]
    curves = Curves(run_dir if first else None, resumed=resumed, owed=owed, tensorboard=config.trainer.tensorboard)
    if first and config.trainer.wandb:
        facts = {name: value for name, value in environment(config).items() if name != "command"}
        curves.to_wandb(config.trainer.wandb, {**to_dict(config), "environment": facts})
    io = BackgroundCheckpointIO() if config.trainer.async_checkpoint else strategy.AtomicCheckpointIO()
    conductor = Conductor(config, curves)
    frozen_model = any(not p.requires_grad for p in lit.model.parameters())
    plugins: list[Any] = [io]
    if SLURMEnvironment.detect():
        # Lightning's own requeue saves inside the signal handler, which hangs, or saves a loader worker's step 0
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy.build(config, frozen_model=frozen_model),
        precision=config.trainer.precision,  # pyright: ignore[reportArgumentType]
        accumulate_grad_batches=config.trainer.accumulate,
        # where only what follows the last step is owed, Lightning has to begin: the conductor stops it before a step
        max_steps=about["step"] + 1 if about is not None and _trained(about, config) else config.trainer.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        plugins=plugins,
        callbacks=[conductor],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    signals.silence(trainer)
    lit.moved = lambda doing: conductor.watchdog.moved(doing)  # a method would be copied with its watchdog's locks
    conductor.begin(rank=trainer.global_rank, step=resumed or 0)
    try:
        trainer.fit(lit, datamodule=data, ckpt_path=str(last) if about is not None else None)
    except ToldToStop as left:  # in a validation that is made again: owed, or due after steps that are
        conductor.interrupted = left.number
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into an end without a word
            raise KeyboardInterrupt from None
        raise
    finally:
        conductor.close()
    return conductor.interrupted if first else 0


def build(config: RunConfig, *, fresh: bool = True) -> LitCompressor:
    """Model and objective of a run, from `seed` or from the weights of `init_from`, as a LightningModule."""
    family = load_family(config.model.name)
    pl.seed_everything(config.seed, workers=False, verbose=False)
    llm = projecting.complete(config) if projecting.is_projector(config) else None  # held until the objective has it
    if hasattr(family, "build"):  # a family whose fresh model needs more than its configuration
        model = family.build(config.model, load=vtok.load)
    else:
        model = family.Model(config.model)
    if config.init_from and fresh:
        begun = begin_from(model, config.init_from, allow=config.init_allow)
        if _first_rank():
            print("\n".join(begun.lines()))
    objective = family.Objective(config.objective, config.model, load=vtok.load)
    if fresh and hasattr(objective, "begin_model"):
        told = objective.begin_model(model)
        if told and _first_rank():
            print(told)
    if fresh and hasattr(objective, "begin"):  # losses that can go on with what another run's have learned
        objective.begin(_state_of)
    del llm
    kinds = {"decode": LitTokenizer, "compress": LitProjector}
    kind = next((kind for method, kind in kinds.items() if hasattr(model, method)), LitCompressor)
    return kind(config, model, objective, fresh=fresh)


def _state_of(source: str) -> dict[str, torch.Tensor]:
    """The whole state dict, model and objective, of a run's last checkpoint, or of a checkpoint; sharded ones too."""
    path = Path(source)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last.ckpt"
    strategy.describe(path)  # says what is missing; an export, say, is a folder as well
    return strategy.consolidate(path)


def finished(about: dict[str, Any], config: RunConfig) -> bool:
    """Whether a checkpoint is the end of the run that `config` describes, and what follows it was done."""
    return _trained(about, config) and not any(about.get("owed", ()))


def _trained(about: dict[str, Any], config: RunConfig) -> bool:
    minutes = config.trainer.max_minutes
    return about["step"] >= config.trainer.max_steps or (minutes is not None and about["elapsed_s"] >= 60 * minutes)


def check_unchanged(before: RunConfig, now: RunConfig) -> dict[str, Any]:
    """{key: (old, new)} of what a resumed run changes. Raises ValueError for a key that would change model or data."""
    old, new = flatten(before), flatten(now)
    if projecting.is_projector(now):
        new |= {k: old[k] for k in (f"model.{name}" for name in projecting.OPEN) if not new[k] and k in old}
    if hasattr(load_family(now.model.name), "build"):  # it fills in what was left open: not a change
        new |= {k: old[k] for k in new if k.startswith("model.") and k in old and _left_open(new[k], old[k])}
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    free = {f"data.{name}" for name in FREE_DATA}
    if step_size.processes(before) != step_size.processes(now):  # which these make up for
        step_size.check_same(before, now)
        free |= {"trainer.accumulate", "data.batch_size", "data.part_batch_sizes", "data.num_workers"}
    refused = [k for k in changed if k not in free and any(k == f or (f[-1] == "." and k.startswith(f)) for f in FIXED)]
    if refused:
        told = "; ".join(f"{k} was {changed[k][0]!r} and is now {changed[k][1]!r}" for k in refused)
        raise ValueError(
            f"{now.run_dir} cannot go on with another model or data stream: {told}. Put the old value back, or choose "
            "another name (init_from=EXPORT starts it from this run's weights)"
        )
    return changed


def _left_open(value: Any, filled: Any) -> bool:
    """Whether `filled` is what a family's `build` may have made of `value`: all of it, or the settings not named."""
    return value is None or (isinstance(value, dict) and isinstance(filled, dict) and not differences(value, filled))


def _first_rank() -> bool:
    """Whether this process is, or will be, global rank 0 (asked before the processes have met)."""
    return not (rank_zero_only.rank or int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) or 0))


def _quieten() -> None:
    """Lightning's notices about choices that are made here on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*`srun` command is available on your system.*",  # a machine may have SLURM and run this without it
        ".*Checkpoint directory.*",
        ".*handles gradient clipping internally.*",
        ".*find_unused_parameters=True was specified.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*have no `validation_step`.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*is deprecated. Please use `torch.distributed.*",
        ".*your dataloader is not resumable.*",  # it asks the loader alone; the cursor is in the data module's state
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts rest on purpose (optim.freeze)
    ):
        warnings.filterwarnings("ignore", text)


if __name__ == "__main__":
    main(sys.argv[1:])
