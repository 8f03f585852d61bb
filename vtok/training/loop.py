"""What happens between the steps of a run, at step boundaries that all ranks agree on.

    after each step:  metrics line? -> alarm? -> validation? -> sample videos? -> checkpoint? -> stop?

Signals only set a flag. With several ranks the flag, the clock and the time for a checkpoint are agreed about twice a
second: whoever was told, all save the same step and stop together.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from vtok.config import RunConfig
from vtok.progress import duration
from vtok.training import strategy
from vtok.training.alarms import AlarmError, Alarms, codebook_line
from vtok.training.background import Saver
from vtok.training.curves import Bar, Curves
from vtok.training.lit import LitCompressor, codebook_use
from vtok.training.lock import touch
from vtok.training.signals import Told
from vtok.training.telemetry import Telemetry, kind_of
from vtok.training.watchdog import Watchdog
from vtok.types import Clip

log = logging.getLogger(__name__)

SAMPLE_CLIPS = 4


class ToldToStop(Exception):
    """A signal came in the middle of a validation, which is left: all ranks raise this together."""


class Conductor(pl.Callback):
    """Everything that happens between steps. One callback: each hook of each callback costs every step."""

    def __init__(self, config: RunConfig, curves: Curves) -> None:
        self.config, self.curves = config, curves
        self.interrupted = 0  # number of the signal that stopped the run
        self.pending: list[dict[str, Any]] = []  # reports of steps, still on the device
        self.window: dict[str, list[float]] = {}  # numbers of the steps since the last line, mean over ranks
        self.counts: list[Tensor | None] = [None, None]  # ids of the window: of all ranks, and here since the last fold
        self.alarms = Alarms(config.trainer.alarms)
        self.alarm = ""  # why the run is to end
        self.best: float | None = None
        self.elapsed_before = 0.0
        self.clips = 0
        self.waited = 0.0
        self.text = ""
        self.bar: Bar | None = None
        self.watchdog = Watchdog(config.run_dir / "stacks", minutes=config.trainer.stall_minutes)
        self.telemetry: Telemetry | None = None
        self.shown: Clip | None = None  # the validation clips whose pictures are saved
        self.saver = Saver()
        self.told = Told()

    # life cycle

    def begin(self, *, rank: int, step: int) -> None:
        """From here on a start that stands still is told of as well."""
        self.watchdog.start(rank=rank, step=step)
        self.watchdog.moved("the meeting of the processes")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watchdog.moved("the set-up: statistics, weights, what shards them")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watchdog.moved("the set-up: the checkpoint to go on from, the loader")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lit = _lit(pl_module)
        state = lit.extra_state
        self.window = {k: list(v) for k, v in state.get("window", {}).items()}
        counts = state.get("codebook_counts")
        self.counts = [counts.to(lit.device) if counts is not None else None, None]
        self.counted_before = self._counted(lit)
        self.alarms.restore(state.get("alarms", {}))
        self.best = state.get("best")
        self.elapsed_before = state.get("elapsed_s", 0.0)
        self.owed = [False, False]
        self.first_step, self.poll_at = lit.steps_done, lit.steps_done + 1
        self.seconds_per_step = math.inf
        lit.clock = self._clock(self.elapsed_before)
        assert lit.steps_done == trainer.global_step
        self.told.listen()
        self.bar = Bar("train", enabled=self.config.trainer.progress and trainer.is_global_zero)
        self.bar.start()
        self.telemetry = self._telemetry(trainer, lit)
        self.telemetry.flops.restore(state.get("flops", {}))
        self.watchdog.moved("the first step", step=lit.steps_done)
        now = time.perf_counter()
        self.began = self.boundary = self.line_began = self.saved_at = now
        self.line_step = lit.steps_done
        self.excluded = 0.0
        look, show = state.get("owed", self.owed)
        if look and self._validate(trainer, lit) and trainer.is_global_zero:
            strategy.mark_best(self.config.run_dir / "checkpoints" / "last.ckpt")  # same step, same weights
        if show:
            self._samples(trainer, lit)
        if (look or show) and self._done(lit):  # nothing else was left
            self._save(trainer, lit, ["last.ckpt"], wait=True)
            trainer.should_stop = True
        self.boundary = self.line_began = time.perf_counter()

    def _telemetry(self, trainer: Any, lit: LitCompressor) -> Telemetry:
        run = self.config.trainer
        # on every rank: a counted pass may round differently, and ranks should differ by their clips alone
        return Telemetry(lit.model, lit.device, precision=run.precision, peak=run.peak_tflops, enabled=run.count_flops)

    def close(self) -> None:
        """Gives signals and terminal back, and flushes the curves; also after an error."""
        self.told.close()
        self.watchdog.stop()
        if problem := self.saver.wait():
            log.error("%s", problem)
        if self.telemetry is not None:
            self.telemetry.flops.close()
        if self.bar is not None:
            self.bar.stop()
        self.curves.close()

    # each step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.boundary
        self.watchdog.moved("a training step")
        if self.telemetry is not None:
            self.telemetry.flops.begin(kind_of(batch, pl_module.idle()))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self.telemetry is not None:
            self.telemetry.flops.before_backward()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.telemetry is not None:
            self.telemetry.batch_ended()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Clip, batch_idx: int) -> None:
        lit, run = pl_module, self.config.trainer
        self.clips += len(batch)
        self.watchdog.moved("the wait for the next batch", step=lit.steps_done)
        if lit.micro_done % run.accumulate:
            self.boundary = time.perf_counter()
            return
        reports = lit.take_reports()
        if reports:
            parts = {f"grad_norm_{name}": norm for name, norm in lit.part_norms.items()}
            reports[-1] = {**reports[-1], "grad_norm": lit.grad_norm, **parts}
            for report in reports:
                self._count(report.pop("codebook_counts", None))
            self.pending += reports
        step = lit.steps_done
        if step % run.log_every == 0:
            self._line(trainer, lit)
        save, stop = self._agree(trainer, lit)
        done = self._done(lit)
        halt = bool(self.alarm) and not done
        if not (save or halt or stop or done or run.val_every or run.sample_every):
            if self.bar is not None and self.bar.due():
                self._show(lit)
            self.boundary = time.perf_counter()
            return
        paused = time.perf_counter()
        names = ["last.ckpt"]
        look = done or bool(run.val_every and step % run.val_every == 0)
        show = look if done or not run.sample_every else step % run.sample_every == 0
        if (stop or halt) and not done:  # little time is left: the next start begins with what is owed
            self.owed = [look, show]
        else:
            if done and self.config.data.val_shards:  # however long that takes, the steps are safe
                self.owed = [look, show]
                self._save(trainer, lit, names, wait=True)
                self.owed = [False, False]
            try:
                names += ["best.ckpt"] if look and self._validate(trainer, lit) else []
                if show:
                    self._samples(trainer, lit)
            except ToldToStop:
                if done:  # saved with what is owed
                    raise
                stop, self.owed = self.interrupted, [look, show]
            except Exception as error:
                self._rescue(trainer, lit, [look, show], error)
                raise
        if save or stop or halt or done or len(names) > 1:
            self._save(trainer, lit, names, wait=bool(stop or halt or done))
        if halt:
            last = self.config.run_dir / "checkpoints" / "last.ckpt"
            raise AlarmError(f"stopped at step {step}, saved as {last}: {self.alarm}")
        if stop or done:
            trainer.should_stop = True
            self.interrupted = 0 if done else stop
            if self.bar is not None:
                self._show(lit)
                self.bar.say(
                    f"stopped by {signal.Signals(stop).name} at step {step}; the same command goes on from there"
                    if self.interrupted
                    else f"trained {step} steps in {duration(self._elapsed())}: {self.config.run_dir}"
                )
        elif self.bar is not None and self.bar.due():
            self._show(lit)
        self.boundary = time.perf_counter()
        self.excluded += self.boundary - paused

    def _done(self, lit: LitCompressor) -> bool:
        return lit.steps_done >= self.config.trainer.max_steps or lit.clock >= 1

    def _agree(self, trainer: Any, lit: LitCompressor) -> tuple[bool, int]:
        """(save now, number of the signal to stop for): the same on every rank.

        With several ranks they meet about twice a second, not every step.
        """
        run, step = self.config.trainer, lit.steps_done
        regular = bool(run.checkpoint_every and step % run.checkpoint_every == 0)
        due = time.perf_counter() - self.saved_at > 60 * run.checkpoint_minutes
        elapsed, stop = self._elapsed(), self.told.number
        if trainer.world_size > 1:
            if step < self.poll_at and step < run.max_steps:
                return regular, 0
            first = trainer.is_global_zero
            per_step = (time.perf_counter() - self.began) / max(step - self.first_step, 1)
            every = min(100, max(1, int(0.5 / max(per_step, 1e-4))))
            told = [stop, first and due, elapsed if first else 0.0, every if first else 0]
            stop, due, elapsed, every = _all_max(told, lit.device)
            stop, due, self.poll_at = int(stop), bool(due), step + int(every)
        lit.clock = self._clock(elapsed)
        return regular or due, stop

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began

    def _clock(self, elapsed_s: float) -> float:
        minutes = self.config.trainer.max_minutes
        return elapsed_s / (60 * minutes) if minutes else 0.0

    # curves

    def _fold(self, trainer: Any, lit: LitCompressor) -> None:
        """Moves the pending reports into the window, averaged step by step over the ranks that have a number.

        Per step, not per line, so that a checkpoint in the middle of a line does not change its numbers.
        """
        if not self.pending:
            return
        values = [torch.as_tensor(v, device=lit.device) for report in self.pending for v in report.values()]
        flat = iter(torch.stack([v.detach().to(torch.float32).mean() for v in values]).tolist())
        steps = [{name: next(flat) for name in report} for report in self.pending]
        parts: list[Any] = [steps]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, steps)
        for of_ranks in zip(*parts, strict=True):
            # what a clip has to bring to be counted, those of some ranks may bring and those of others not
            for name in dict.fromkeys(name for report in of_ranks for name in report):
                found = [report[name] for report in of_ranks if name in report]
                self.window.setdefault(name, []).append(sum(found) / len(found))
        self.pending = []
        whole, new = self.counts
        if new is not None:
            if trainer.world_size > 1:
                torch.distributed.all_reduce(new)
            self.counts = [new if whole is None else whole + new, None]

    def _counted(self, lit: LitCompressor) -> float:
        """Tokens of all ranks whose ids are in the window: every codebook counts each once."""
        counts = self.counts[0]
        return 0.0 if counts is None else float(counts.sum()) / max(len(getattr(lit.model, "codebook_sizes", ())), 1)

    def _count(self, counts: Tensor | None) -> None:
        if counts is not None:
            self.counts[1] = counts if self.counts[1] is None else self.counts[1].add_(counts)

    def _sound(self, trainer: Any, lit: LitCompressor, line: dict[str, float]) -> None:
        """Tells what the alarms make of a line; all ranks end the run if one is to."""
        alarms = self.alarms.look(lit.steps_done, line)
        for alarm in alarms:
            self.curves.write(lit.steps_done, {"alarm": alarm.rule, "action": alarm.action, "text": alarm.text})
            if self.bar is not None and trainer.is_global_zero:
                self.bar.say(f"{'ALARM' if alarm.action == 'stop' else 'warning'}: {alarm.text}")
        ends = [alarm.text for alarm in alarms if alarm.action == "stop"]
        if trainer.world_size > 1 and self.config.trainer.alarms.enabled:
            # the lines are equal on all ranks; should one ever see another number, the others must not wait for it
            if _all_max([bool(ends)], lit.device)[0] and not ends:
                ends = ["another rank saw an alarm; its metrics.jsonl tells which"]
        self.alarm = "; ".join(ends)

    def _line(self, trainer: Any, lit: LitCompressor) -> None:
        self._fold(trainer, lit)
        now = time.perf_counter()
        spent = max(now - self.line_began - self.excluded, 1e-9)
        means = {f"train/{k}": sum(v) / len(v) for k, v in self.window.items()}
        clips_per_s = self.clips * trainer.world_size / spent
        # what its objective reports of a clip; else the ids that were counted since this process began the line, as an
        # image has fewer than a video; else the model's maximum
        tokens_per_s = clips_per_s * means.get("train/tokens", float(getattr(lit.model, "max_tokens", math.nan)))
        if "train/tokens" not in means and (counted := self._counted(lit)):
            tokens_per_s = (counted - self.counted_before) / spent
        steps = max(lit.steps_done - self.line_step, 1)
        self.seconds_per_step = spent / steps
        means |= {
            "train/lr": lit.lr,
            "train/clips_per_s": clips_per_s,
            "train/tokens_per_s": tokens_per_s,
            "train/data_wait_share": min(self.waited / spent, 1.0),
            "train/bad_steps": float(lit.bad_steps),
            "time_s": self._elapsed(),
        }
        means |= {f"train/lr_{name}": lit.lr * by for name, by in self.config.optim.lr_multipliers.items()}
        assert self.telemetry is not None
        means |= self.telemetry.line(spent)
        if self.counts[0] is not None:
            means |= codebook_line(self.counts[0], tuple(getattr(lit.model, "codebook_sizes", ())))
        self.curves.write(lit.steps_done, means)
        self._sound(trainer, lit, means)
        loss = means.get("train/loss", math.nan)
        self.text = (
            f"loss {loss:.4f} | {clips_per_s:.1f} clips/s {means['train/tokens_per_s']:.0f} tokens/s | "
            f"data wait {100 * means['train/data_wait_share']:.0f} %"
        )
        self.counts = [None, None]
        self.counted_before = 0.0
        self.window, self.clips, self.waited, self.excluded = {}, 0, 0.0, 0.0
        self.line_began, self.line_step = now, lit.steps_done

    def _show(self, lit: LitCompressor) -> None:
        assert self.bar is not None
        run = self.config.trainer
        left = (run.max_steps - lit.steps_done) * self.seconds_per_step
        if run.max_minutes:
            left = min(left, max(60 * run.max_minutes - self._elapsed(), 0.0))
        text = f"step {lit.steps_done}/{run.max_steps} | {self.text} | left {duration(left)}"
        self.bar.show(min(lit.progress(), 1.0), text)

    # validation

    @torch.no_grad()
    def _validate(self, trainer: Any, lit: LitCompressor) -> bool:
        """Writes a line of validation metrics; True when this is the best so far."""
        if not self.config.data.val_shards:
            return False
        began = told = time.perf_counter()
        self.watchdog.moved("validation, batch 0")
        means: dict[str, list[float]] = {}
        ids: list[Tensor] = []
        top, batch, index, settled = "", None, 0, False
        with _Evaluating(lit), lit.averaged():
            for new in self._in_step(trainer, lit, trainer.datamodule.val_dataloader()):
                if not settled:
                    lit.settle(None if new is None else new.to(lit.device))
                    settled = True
                batch = new if new is not None else batch
                self.shown = self.shown or (batch and batch.rows(slice(SAMPLE_CLIPS)))
                if batch is None and not strategy.is_deepspeed(trainer.strategy):
                    continue
                if batch is None:  # sharded models run in step: this rank has nothing to run on
                    raise ValueError(
                        f"data.val_shards={self.config.data.val_shards!r} gives rank {trainer.global_rank} no clip: "
                        "use fewer processes or more validation clips"
                    )
                found = strategy.call(trainer, "measure", batch.to(lit.device), index)
                index += 1
                self.watchdog.moved(f"validation, batch {index}")
                if new is not None:  # a rank that ran out keeps step with the others and does not count
                    for name, values in found["mean"].items():
                        means.setdefault(name, []).extend(values)
                    ids += [found["ids"]] if found["ids"] is not None else []
                    top = max(top, found.get("top", ""), key=_tokens_of)
                if self.bar is not None and time.perf_counter() - told > 3:
                    told = time.perf_counter()
                    self.bar.show(min(lit.progress(), 1.0), f"step {lit.steps_done} | validating, batch {index}")
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (means, ids, top))
            names = sorted({name for part, _, _ in parts for name in part})
            means = {name: [v for part, _, _ in parts for v in part.get(name, [])] for name in names}
            ids, top = [i for _, part, _ in parts for i in part], max((t for _, _, t in parts), key=_tokens_of)
        if not means:
            raise ValueError(f"data.val_shards={self.config.data.val_shards!r} gave no clip to validate on")
        scores: dict[str, Any] = {f"val/{k}": sum(v) / len(v) for k, v in means.items()}
        measure = top.rpartition("_")[0]  # psnr_db of psnr_db_256
        by_budget = {k: v for k, v in scores.items() if measure and k.startswith(f"val/{measure}_")}
        if by_budget:
            scores[f"val/{measure}"] = scores[f"val/{top}"]
            scores[f"val/{measure}_mean"] = sum(by_budget.values()) / len(by_budget)
        sizes = tuple(getattr(lit.model, "codebook_sizes", ()) or ())
        scores |= {f"val/{k}": v for k, v in codebook_use(ids, sizes).items()} if ids else {}
        scores["val/clips"] = len(means["loss"])
        scores["val/seconds"] = time.perf_counter() - began
        self.curves.write(lit.steps_done, scores)
        quality = scores.get(f"val/{measure}_mean", -scores["val/loss"])
        if self.bar is not None:
            shown = {"val/loss": scores["val/loss"], **by_budget}
            self.bar.say(f"step {lit.steps_done}: " + ", ".join(f"{k[4:]} {v:.3f}" for k, v in shown.items()))
            for text in lit.told(scores):
                self.bar.say(text)
        better = math.isfinite(quality) and (self.best is None or quality > self.best)
        self.best = quality if better else self.best
        return better

    def _in_step(self, trainer: Any, lit: LitCompressor, loader: Any) -> Iterator[Any]:
        """Batches of this rank, and None once it has run out, until every rank has: sharded models run in step.

        Raises: ToldToStop, on every rank, once a signal has come to any: little time may be left.
        """
        for batch in itertools.chain(self._until_told(loader), itertools.repeat(None)):
            going, stop = float(batch is not None), float(self.told.number)
            if trainer.world_size > 1:
                going, stop = _all_max([going, stop], lit.device)
            if stop:
                self.interrupted = int(stop)
                if self.bar is not None:
                    name = signal.Signals(int(stop)).name
                    self.bar.say(f"{name} during the validation, which is left for the next start")
                raise ToldToStop
            if not going:
                return
            yield batch

    def _until_told(self, loader: Any) -> Iterator[Any]:
        """The loader's batches. Once a signal has come, a failure ends them: SLURM signals every process of a step, and
        a loader worker that is only starting, or the process that starts them, ends of it."""
        try:
            yield from loader
        except (RuntimeError, OSError, EOFError) as error:
            if not self.told.number:
                raise
            log.info("the loader ended with the signal: %s", error)

    @torch.no_grad()
    def _samples(self, trainer: Any, lit: LitCompressor) -> None:
        if not self.config.data.val_shards:
            return
        if self.shown is None:
            batch = next(self._until_told(trainer.datamodule.val_dataloader()), None)
            self.shown = batch and batch.rows(slice(SAMPLE_CLIPS))
        lit.settle(None if self.shown is None else self.shown.to(lit.device))
        if self.shown is None:
            return
        self.watchdog.moved("sample videos")
        clip = self.shown
        with _Evaluating(lit), lit.averaged():
            found = strategy.call(trainer, "pictures", clip.to(lit.device))
            texts = strategy.call(trainer, "answers", clip.to(lit.device))
        if found is not None:
            self.curves.samples(lit.steps_done, *found, fps=self.config.data.fps or 8.0)
        if texts:
            self.curves.texts(lit.steps_done, texts)

    # checkpoints

    def _rescue(self, trainer: Any, lit: LitCompressor, owed: list[bool], error: Exception) -> None:
        """The steps trained so far are saved when what comes after them fails; of several ranks one may fail alone, and
        writing takes them all: those have their last checkpoint."""
        if trainer.world_size > 1:
            return
        self.owed = owed
        self._save(trainer, lit, ["last.ckpt"], wait=True)
        error.add_note(
            f"after step {lit.steps_done}, which is saved: {self.config.run_dir / 'checkpoints' / 'last.ckpt'}"
        )

    def _save(self, trainer: Any, lit: LitCompressor, names: list[str], *, wait: bool = False) -> None:
        self.watchdog.moved("the writing of a checkpoint")
        self._fold(trainer, lit)
        self.curves.flush()
        folder = self.config.run_dir / "checkpoints"
        lit.extra_state = {
            "schema": 1,
            "step": lit.steps_done,
            "elapsed_s": self._elapsed(),
            "world_size": trainer.world_size,
            "strategy": self.config.trainer.strategy,
            "window": self.window,
            "codebook_counts": self.counts[0].cpu() if self.counts[0] is not None else None,
            "alarms": self.alarms.state(),
            "best": self.best,
            "owed": self.owed,
            "flops": self.telemetry.flops.state() if self.telemetry is not None else {},
        }
        inside = ("window", "codebook_counts", "alarms", "flops")
        about = {k: v for k, v in lit.extra_state.items() if k not in inside}
        self.saver.save(trainer, folder, names, about=about, after=lambda: touch(self.config.run_dir), wait=wait)
        self.saved_at = time.perf_counter()


class _Evaluating:
    """Evaluation mode inside, every module's own mode again after (a frozen net stays in evaluation mode)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.training = [m for m in self.module.modules() if m.training]
        self.module.eval()

    def __exit__(self, *_: Any) -> None:
        for module in self.training:
            module.training = True


def _tokens_of(name: str) -> float:
    """256 of psnr_db_256, infinite of accuracy_all; "" comes before every name."""
    budget = name.rpartition("_")[2]
    return (math.inf if budget == "all" else int(budget)) if name else -1


def _all_max(values: list[Any], device: torch.device) -> list[float]:
    shared = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return shared.tolist()


def _lit(module: Any) -> LitCompressor:
    assert isinstance(module, LitCompressor)
    return module
