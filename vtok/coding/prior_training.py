"""The training of a prior over token ids: what chance of (seed, step) makes of a batch, and the loop.

A plain loop on one device: the network is small, the ids of a corpus fit on one machine, and `TokenLoader` already
knows its place, which is all that an exact resume needs. Every step's random choices are drawn from (seed, step), so a
run that was killed and goes on ends bitwise as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.coding.prior_data import Corpus, condition_of, prefix_of, row_of, stack, tokens_of_ids
from vtok.data.token_reader import TokenSample
from vtok.data.token_shards import ClipFacts, TokenLoader
from vtok.layers.token_prior import TokenPrior, TokenPriorConfig, TokenRows

log = logging.getLogger(__name__)
STATE = "state.pt"


@dataclass(frozen=True)
class Training:
    """How a prior is trained. length: tokens of a row, from where a group begins. drop: share of rows whose groups are
    cut to a random length, as files of a lower budget are; 0 for tokens on a grid. null: share of rows without their
    condition. base_lr: of the log-frequencies, which are right to begin with, against `lr`."""

    steps: int = 1000
    batch_size: int = 8
    length: int = 1024
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    drop: float = 0.5
    null: float = 0.1
    base_lr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or self.length < 2 or self.lr <= 0 or self.warmup < 0:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size} must be 1 or more, length={self.length} 2 or more, "
                f"lr={self.lr} above 0"
            )
        if not (0 <= self.drop <= 1 and 0 <= self.null <= 1 and self.weight_decay >= 0):
            raise ValueError(f"drop={self.drop}, null={self.null} are shares of rows, 0 to 1")

    def rate(self, step: int) -> float:
        """Share of `lr` at a step: linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def training_rows(batch: Any, config: TokenPriorConfig, how: Training, *, step: int, nested: bool) -> TokenRows:
    """A batch of clips as rows of at most `how.length` tokens, cut as chance of (seed, step) has it."""
    rng = np.random.default_rng([how.seed, step])
    rows, prefixes = [], []
    for n in range(len(batch)):
        mask = batch.mask[n].numpy()
        ids, group, rank = (value[n].numpy()[mask] for value in (batch.ids, batch.group, batch.rank))
        keep = np.ones(len(ids), bool)
        if nested and rng.random() < how.drop:
            most, groups = int(rank.max()) + 1, int(group.max()) + 1
            drawn = np.exp2(rng.uniform(0, math.log2(max(most, 1)), groups)).round().astype(np.int64)
            each = drawn if rng.random() < 0.5 else np.full(groups, drawn[0])
            keep = rank < each[group]
        ids, group, rank = ids[keep], group[keep], rank[keep]
        begins = np.flatnonzero(rank == 0)
        begins = begins[begins <= max(0, len(ids) - how.length)]
        start = int(rng.choice(begins)) if len(begins) else 0
        if rank[start : start + how.length].max() + 1 >= how.length:  # a group longer than a row: any part of it
            start = int(rng.integers(0, max(1, len(ids) - how.length + 1)))
        rows.append(row_of(ids, group, rank, config.index_factors, start=start, length=how.length))
        clip: ClipFacts = batch.clips[n][0]
        here = [] if rng.random() < how.null else condition_of(clip.facts, config.condition)
        prefixes.append(prefix_of(here, config))
    return stack(rows, prefixes)


class Trainer:
    """A prior in training. `run` goes on from where `folder` was left, and returns the best weights on held-out clips.

    Raises: ValueError where `folder` holds a run of other settings.
    """

    def __init__(
        self,
        config: TokenPriorConfig,
        how: Training,
        corpus: Corpus,
        loader: TokenLoader,
        held_out: Sequence[TokenSample],
        *,
        folder: Path,
        device: str = "cpu",
        save_seconds: float = 60.0,
        eval_every: int = 100,
    ) -> None:
        self.config, self.how, self.corpus, self.loader, self.folder = config, how, corpus, loader, folder
        self.held_out, self.device, self.save_seconds, self.eval_every = held_out, device, save_seconds, eval_every
        torch.manual_seed(how.seed)
        self.net = TokenPrior(config)
        ranks = torch.arange(config.max_rank).clamp(max=corpus.static.max_rank - 1)
        self.net.begin(corpus.static.frequencies[ranks])
        self.net.to(device)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=how.lr, betas=(0.9, 0.95))
        self.step, self.best, self.best_bits = 0, {}, math.inf
        self.asked = json.loads(json.dumps({"prior": asdict(config), "training": asdict(how)}))
        self.asked["frequencies"] = corpus.static.sha256.hex()
        self._resume()

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for n, p in self.net.named_parameters() if n.startswith(("blocks", "head_")) and p.ndim == 2]
        base = [p for n, p in self.net.named_parameters() if n == "base"]
        other = {*map(id, matrices), *map(id, base)}
        rest = [p for p in self.net.parameters() if id(p) not in other]
        return [
            {"params": matrices, "weight_decay": self.how.weight_decay, "scale": 1.0},
            {"params": rest, "weight_decay": 0.0, "scale": 1.0},
            {"params": base, "weight_decay": 0.0, "scale": self.how.base_lr},
        ]

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = [
            f"{name}.{key}={value!r} there, {self.asked[name].get(key)!r} now"
            for name in ("prior", "training")
            for key, value in state["asked"][name].items()
            if self.asked[name].get(key) != value
        ]
        if differ or state["asked"] != self.asked:
            raise ValueError(
                f"{self.folder} holds a run of other settings or shards: {'; '.join(differ)[:500] or 'other ids'}; "
                "remove it, or name another --run"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.best, self.best_bits = state["step"], state["best"], state["best_bits"]
        log.info("goes on at step %d of %d", self.step, self.how.steps)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{STATE}.{os.getpid()}"
        state = {
            "asked": self.asked,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_bits": self.best_bits,
        }
        torch.save(state, part)
        os.replace(part, self.folder / STATE)

    def run(self) -> dict[str, Tensor]:
        stopped: list[int] = []
        before = {
            s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._run(stopped)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.best

    def _run(self, stopped: list[int]) -> None:
        if not self.best:
            self._evaluate()
        saved = began = time.monotonic()
        batches = iter(self.loader) if self.step < self.how.steps else iter(())
        total, seen = 0.0, 0
        for batch in batches:
            bits = self._advance(batch)
            self.step += 1
            total, seen = total + bits, seen + 1
            last = self.step == self.how.steps
            if self.step % self.eval_every == 0 or last:
                held = self._evaluate()
                line = {"step": self.step, "train_bits": total / seen, "val_bits": held, "best": self.best_bits}
                self._log(line | {"seconds": round(time.monotonic() - began, 1)})
                total, seen = 0.0, 0
            if stopped or last or time.monotonic() - saved > self.save_seconds:
                self.save()
                saved = time.monotonic()
            if stopped:
                raise KeyboardInterrupt
            if last:
                return

    def _advance(self, batch: Any) -> float:
        torch.manual_seed(hash((self.how.seed, self.step)) & 0x7FFFFFFF)  # of dropout; ints hash alike everywhere
        rows = training_rows(batch, self.config, self.how, step=self.step, nested=self.corpus.nested).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.lr * self.how.rate(self.step) * group["scale"]
        self.net.train()
        loss = self.net.bits(rows).sum() / rows.mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Bits a token of the first `length` tokens of the held-out clips; the best weights are kept."""
        self.net.eval()
        bits = tokens = 0.0
        for first in range(0, len(self.held_out), self.how.batch_size):
            part = self.held_out[first : first + self.how.batch_size]
            rows = []
            for sample in part:
                flat = tokens_of_ids(sample.ids, sample.tokens.groups, sample.tokens.codebook_sizes)
                where = flat.group[0].numpy(), flat.rank[0].numpy()
                rows.append(row_of(sample.ids, *where, self.config.index_factors, start=0, length=self.how.length))
            batch = stack(rows, [prefix_of([], self.config)] * len(part)).to(self.device)
            bits += float(self.net.bits(batch).double().sum())
            tokens += int(batch.mask.sum())
        value = bits / tokens
        if not math.isfinite(value):
            raise ValueError(f"the loss on held-out clips is {value} at step {self.step}: lower --lr ({self.how.lr})")
        if value < self.best_bits:
            self.best_bits = value
            self.best = {name: t.detach().cpu().clone() for name, t in self.net.state_dict().items()}
        return value

    def _log(self, line: dict[str, Any]) -> None:
        log.info(
            "step %d: %.3f bits a token, held out %.3f (best %.3f)",
            line["step"], line["train_bits"], line["val_bits"], line["best"],
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
