"""What happens between the steps of a run, at step boundaries that all ranks agree on.

    after each step:  metrics line? -> alarm? -> validation? -> sample videos? -> checkpoint? -> stop?

Signals only set a flag. With several ranks the flag, the clock and the time for a checkpoint are agreed about twice a
second: whoever was told, all save the same step and stop together.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from vtok.config import RunConfig
from vtok.progress import duration
from vtok.training import strategy
from vtok.training.alarms import AlarmError, Alarms, codebook_line
from vtok.training.background import Saver
from vtok.training.boundary import Due, Heard, Meeting, all_max, due, is_done
from vtok.training.curves import Bar, Curves
from vtok.training.lit import LitCompressor
from vtok.training.lock import touch
from vtok.training.signals import Told
from vtok.training.telemetry import Telemetry, kind_of
from vtok.training.validation import ToldToStop, Validation
from vtok.training.watchdog import Watchdog
from vtok.types import Clip

log = logging.getLogger(__name__)


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
        self.elapsed_before = 0.0
        self.clips = 0
        self.waited = 0.0
        self.text = ""
        self.bar: Bar | None = None
        self.watchdog = Watchdog(config.run_dir / "stacks", minutes=config.trainer.stall_minutes)
        self.telemetry: Telemetry | None = None
        self.saver = Saver()
        self.told = Told()
        self.validation = Validation(config, curves, self.watchdog, self.told)

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
        self.validation.best = state.get("best")
        self.elapsed_before = state.get("elapsed_s", 0.0)
        self.owed = [False, False]
        self.meeting = Meeting(step=lit.steps_done, last=self.config.trainer.max_steps)
        self.seconds_per_step = math.inf
        lit.clock = self._clock(self.elapsed_before)
        assert lit.steps_done == trainer.global_step
        self.told.listen()
        self.bar = Bar("train", enabled=self.config.trainer.progress and trainer.is_global_zero)
        self.bar.start()
        self.validation.bar = self.bar
        self.telemetry = self._telemetry(trainer, lit)
        self.telemetry.flops.restore(state.get("flops", {}))
        self.watchdog.moved("the first step", step=lit.steps_done)
        now = time.perf_counter()
        self.began = self.boundary = self.line_began = self.saved_at = now
        self.line_step = lit.steps_done
        self.excluded = 0.0
        look, show = state.get("owed", self.owed)
        if look and self.validation.measure(trainer, lit) and trainer.is_global_zero:
            strategy.mark_best(self.config.run_dir / "checkpoints" / "last.ckpt")  # same step, same weights
        if show:
            self.validation.samples(trainer, lit)
        done = is_done(self.config.trainer, step=lit.steps_done, clock=lit.clock)
        if (look or show) and done:  # nothing else was left
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
        lit = pl_module
        self.clips += len(batch)
        self.watchdog.moved("the wait for the next batch", step=lit.steps_done)
        if lit.micro_done % self.config.trainer.accumulate == 0:
            self._take_reports(lit)
            if lit.steps_done % self.config.trainer.log_every == 0:
                self._line(trainer, lit)
            asked = self._decide(trainer, lit)
            if asked:
                self._carry_out(trainer, lit, asked)
            if not trainer.should_stop and self.bar is not None and self.bar.due():
                self._show(lit)
        self.boundary = time.perf_counter()

    def _take_reports(self, lit: Any) -> None:
        """Adds what the step that just ended reports to the line to come."""
        reports = lit.take_reports()
        if reports:
            parts = {f"grad_norm_{name}": norm for name, norm in lit.part_norms.items()}
            reports[-1] = {**reports[-1], "grad_norm": lit.grad_norm, **parts}
            for report in reports:
                self._count(report.pop("codebook_counts", None))
            self.pending += reports

    # step boundaries: what is due, then doing it

    def _decide(self, trainer: Any, lit: LitCompressor) -> Due:
        """What this boundary asks for: the same on every rank."""
        run, step, now = self.config.trainer, lit.steps_done, time.perf_counter()
        own = Heard(self.told.number, now - self.saved_at > 60 * run.checkpoint_minutes, self._elapsed())
        heard = self.meeting.agree(trainer, own, step=step, spent_s=now - self.began, device=lit.device)
        if heard is not None:
            lit.clock = self._clock(heard.elapsed_s)
        return due(run, step=step, clock=lit.clock, heard=heard, alarm=bool(self.alarm))

    def _carry_out(self, trainer: Any, lit: LitCompressor, asked: Due) -> None:
        """Validation, samples, checkpoint and end, as far as `asked`.

        Raises: AlarmError, once the step is saved; ToldToStop where a signal comes in the last validation, before which
            the step was saved with what it owes; whatever the validation or the samples raise, the step saved first.
        """
        paused, names, stop, owed = time.perf_counter(), ["last.ckpt"], asked.stop, [asked.look, asked.show]
        if asked.keep:
            names.append(strategy.KEPT.format(lit.steps_done))
        if asked.hurried:  # little time is left: the next start begins with what is owed
            self.owed = owed
        else:
            if asked.done and self.config.data.val_shards:  # however long that takes, the steps are safe
                self.owed = owed
                self._save(trainer, lit, names, wait=True)
                self.owed = [False, False]
            try:
                if asked.look:
                    names += ["best.ckpt"] if self.validation.measure(trainer, lit) else []
                    owed = [False, asked.show]
                if asked.show:
                    self.validation.samples(trainer, lit)
            except ToldToStop as left:
                if asked.done:  # saved with what is owed
                    raise
                stop, self.owed = left.number, owed
            except Exception as error:
                self._rescue(trainer, lit, names, owed, error)
                raise
        if asked.save or asked.ends or stop or "best.ckpt" in names:
            self._save(trainer, lit, names, wait=bool(asked.ends or stop))
        if asked.halt:
            last = self.config.run_dir / "checkpoints" / "last.ckpt"
            raise AlarmError(f"stopped at step {lit.steps_done}, saved as {last}: {self.alarm}")
        if stop or asked.done:
            self._end(trainer, lit, 0 if asked.done else stop)
        self.excluded += time.perf_counter() - paused

    def _end(self, trainer: Any, lit: LitCompressor, interrupted: int) -> None:
        """The run ends here: done, or interrupted by a signal of this number."""
        trainer.should_stop = True
        self.interrupted = interrupted
        if self.bar is not None:
            self._show(lit)
            step = lit.steps_done
            self.bar.say(
                f"stopped by {signal.Signals(interrupted).name} at step {step}; the same command goes on from there"
                if interrupted
                else f"trained {step} steps in {duration(self._elapsed())}: {self.config.run_dir}"
            )

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
            if all_max([bool(ends)], lit.device)[0] and not ends:
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

    # checkpoints

    def _rescue(self, trainer: Any, lit: LitCompressor, names: list[str], owed: list[bool], error: Exception) -> None:
        """The steps trained so far are saved when what comes after them fails; of several ranks one may fail alone, and
        writing takes them all: those have their last checkpoint."""
        if trainer.world_size > 1:
            return
        self.owed = owed
        self._save(trainer, lit, names, wait=True)
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
            "best": self.validation.best,
            "owed": self.owed,
            "flops": self.telemetry.flops.state() if self.telemetry is not None else {},
        }
        inside = ("window", "codebook_counts", "alarms", "flops")
        about = {k: v for k, v in lit.extra_state.items() if k not in inside}
        keep, after = self.config.trainer.keep_last, lambda: touch(self.config.run_dir)
        self.saver.save(trainer, folder, names, about=about, keep=keep, after=after, wait=wait)
        self.saved_at = time.perf_counter()


def _lit(module: Any) -> LitCompressor:
    assert isinstance(module, LitCompressor)
    return module
