"""Validations and sample videos of a run: the same clips every time, measured by all ranks in step.

loader of each rank --_in_step--> measure, batch by batch --> means over the clips of all ranks --> metrics.jsonl
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config import RunConfig
from vtok.training import strategy
from vtok.training.boundary import all_max
from vtok.training.curves import Bar, Curves
from vtok.training.lit import LitCompressor, codebook_use
from vtok.training.signals import Told
from vtok.training.watchdog import Watchdog
from vtok.types import Clip

log = logging.getLogger(__name__)

SAMPLE_CLIPS = 4
TELL_S = 3.0  # between two signs of progress


class ToldToStop(Exception):
    """A signal came in the middle of a validation, which is left: all ranks raise this together.

    number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Validation:
    """Of one run and rank; every rank holds one and calls it. best: the highest quality so far."""

    def __init__(self, config: RunConfig, curves: Curves, watchdog: Watchdog, told: Told) -> None:
        self.config, self.curves, self.watchdog, self.told = config, curves, watchdog, told
        self.best: float | None = None
        self.bar: Bar | None = None
        self.shown: Clip | None = None  # the clips whose pictures are saved

    @torch.no_grad()
    def measure(self, trainer: Any, lit: LitCompressor) -> bool:
        """Writes a line of validation metrics; True when this is the best so far. Nothing without data.val_shards.

        Raises: ToldToStop; ValueError where there are too few clips.
        """
        if not self.config.data.val_shards:
            return False
        began = told = time.perf_counter()
        self.watchdog.moved("validation, batch 0")
        means: dict[str, list[float]] = {}
        ids: list[Tensor] = []
        top, batch, index, settled = "", None, 0, False
        with Evaluating(lit), lit.averaged():
            for new in self._in_step(trainer, lit, trainer.datamodule.val_dataloader()):
                if not settled:
                    lit.settle(None if new is None else new.to(lit.device))
                    settled = True
                batch = new if new is not None else batch
                self.shown = self.shown or (batch and batch.rows(slice(SAMPLE_CLIPS)))
                if batch is None:
                    continue
                found = strategy.call(trainer, "measure", batch.to(lit.device), index)
                index += 1
                self.watchdog.moved(f"validation, batch {index}")
                if new is not None:  # a rank that ran out keeps step with the others and does not count
                    for name, values in found["mean"].items():
                        means.setdefault(name, []).extend(values)
                    ids += [found["ids"]] if found["ids"] is not None else []
                    top = max(top, found.get("top", ""), key=_tokens_of)
                if self.bar is not None and time.perf_counter() - told > TELL_S:
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
        return self._judge(lit, means, ids, top, began=began)

    def _judge(
        self, lit: LitCompressor, means: dict[str, list[float]], ids: list[Tensor], top: str, *, began: float
    ) -> bool:
        """The line of these measurements, of all ranks; whether they are the best so far."""
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

        Raises: on every rank, ToldToStop once a signal has come to any, as little time may be left; ValueError where
            one that is needed has no clip at all.
        """
        for number, batch in enumerate(itertools.chain(self._until_told(loader), itertools.repeat(None))):
            going, stop, none = batch is not None, self.told.number, batch is None and not number
            if trainer.world_size > 1:
                going, stop, none = all_max([going, stop, none], lit.device)
            if stop:
                left = ToldToStop(int(stop))
                if self.bar is not None:
                    self.bar.say(f"{left} during the validation, which is left for the next start")
                raise left
            if not going:
                return
            if none:
                self._check_needed(trainer)
            yield batch

    def _check_needed(self, trainer: Any) -> None:
        """Raises ValueError where parameters are sharded: a rank without a clip has nothing to run on, and the others
        would wait for it for ever."""
        if strategy.in_step(trainer.strategy):
            raise ValueError(
                f"data.val_shards={self.config.data.val_shards!r} has no clip for some of {trainer.world_size} "
                f"processes, and trainer.strategy={self.config.trainer.strategy} needs them all: use fewer processes, "
                "or more clips"
            )

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
    def samples(self, trainer: Any, lit: LitCompressor) -> None:
        """Saves pictures, and answers, of a few validation clips."""
        if not self.config.data.val_shards:
            return
        if self.shown is None:
            batch = next(self._until_told(trainer.datamodule.val_dataloader()), None)
            self.shown = batch and batch.rows(slice(SAMPLE_CLIPS))
        if trainer.world_size > 1 and all_max([self.shown is None], lit.device)[0]:
            self._check_needed(trainer)
        lit.settle(None if self.shown is None else self.shown.to(lit.device))
        if self.shown is None:
            return
        self.watchdog.moved("sample videos")
        clip = self.shown
        with Evaluating(lit), lit.averaged():
            found = strategy.call(trainer, "pictures", clip.to(lit.device))
            texts = strategy.call(trainer, "answers", clip.to(lit.device))
        if found is not None:
            self.curves.samples(lit.steps_done, *found, fps=self.config.data.fps or 8.0)
        if texts:
            self.curves.texts(lit.steps_done, texts)


class Evaluating:
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
