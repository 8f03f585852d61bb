"""LightningModules: one training step, the optimizer, the averaged weights, and validation.

    Clip (uint8) -> device -> [-1, 1] -> objective(model, clip, step) -> one backward -> joint norm -> AdamW -> EMA

Letters: B batch, C channels, T frames, H height, W width, K tokens per clip, Q ids per token.

Every random number of a step is a pure function of the seed and the batch's number among those of all ranks, so a
resumed run draws what the uninterrupted one would have drawn, on another number of ranks too where accumulation makes
up for them, and no generator state is saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from vtok.config import RunConfig
from vtok.metrics.distortion import clip_psnr
from vtok.training import checkpoints, strategy
from vtok.training.curves import Bar
from vtok.training.keys import channels_last, match_layout
from vtok.training.optim import freeze, parameter_groups, rate, total_norms
from vtok.types import Clip, to_uint8


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed, well mixed (splitmix64), for everything random in one step of one rank."""
    mask = (1 << 64) - 1
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + (rank + 1) * 0x8CB92BA72F3D8DD7) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return (value ^ (value >> 31)) >> 1


def reseed(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators of the CPU and of `device`.

    Not torch.manual_seed: where CUDA, XPU and MTIA are not in use it formats a stack trace for each of them and keeps
    it, 0.7 ms and a little memory a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def compile_parts(module: nn.Module) -> None:
    """torch.compile each outermost part of `module` that has a forward of its own, in place: names are unchanged.

    The parts, not the model: families are called through `encode` and `decode`, which `Module.compile` does not reach.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            compile_parts(child)
        elif any(True for _ in child.parameters()):
            child.compile()


class LitCompressor(pl.LightningModule):
    """Trains any compressor: `model` ships, `objective` stays in the lab.

    Args:
        config: the run's configuration.
        fresh: this run begins at step 0 (statistics are then fitted, if the model asks for them).
    Frozen parameters of the objective (perceptual nets, teachers) come from their own files, not from checkpoints.
    """

    def __init__(self, config: RunConfig, model: nn.Module, objective: nn.Module, *, fresh: bool = True) -> None:
        super().__init__()
        self.config, self.fresh = config, fresh
        self.model, self.objective = model, objective
        self.resting = freeze(self, config.optim)
        self.strict_loading = False  # load_state_dict below is stricter: only frozen parts of the objective may lack
        self.frozen_names = {f"objective.{n}" for n, p in objective.named_parameters() if not p.requires_grad}
        self.steps_done = 0  # optimizer steps, skipped ones included
        self.micro_done = 0  # batches
        self.lr = 0.0  # of the last step, before the factors of groups
        self.clock = 0.0  # share of trainer.max_minutes that has passed, agreed by all ranks
        self.bad_in_row = 0
        self.bad_steps = 0
        self.applied = True
        self.grad_norm: Tensor | float = 0.0
        self.part_norms: dict[str, float] = {}  # of the model and of each part of the objective, if there are several
        self.reports: list[dict[str, Tensor]] = []  # of the step's micro-batches
        self.keys: list[str] = []
        self.extra_state: dict[str, Any] = {}  # what the run keeps in the checkpoint beside the weights
        self.ema_state: dict[str, Tensor] | None = None
        self._ema: tuple[list[Tensor], list[Tensor]] | None = None
        self._ledger: Any = None
        self.moved: Callable[[str], Any] = lambda _: None  # told what comes next: the run's watchdog

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the hook it is in some twenty times a step, and Module looks for parameters in each of them
        if type(value) in (int, float, bool, str):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # set-up

    def train(self, mode: bool = True) -> LitCompressor:
        super().train(mode)
        for part in getattr(self, "resting", ()):
            part.train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        kept = strategy.float_buffers(self)  # every cast to bfloat16 and every move passes here
        result = super()._apply(fn, recurse)
        strategy.restore_buffers(self, kept)
        return result

    def setup(self, stage: str) -> None:
        fit = getattr(self.model, "fit_statistics", None)
        if stage == "fit" and self.fresh and fit is not None and self.config.trainer.statistics_clips:
            if self.global_rank == 0:
                run = self.config.trainer
                loader = self.trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
                torch.manual_seed(step_seed(self.config.seed, 1 << 62, 0))
                bar = Bar("statistics", enabled=run.progress, delay_s=3.0)
                with strategy.alone():
                    fit(_videos(loader, run.statistics_clips, bar, self.moved))
                bar.stop()
            state = self.trainer.strategy.broadcast({k: v.cpu() for k, v in self.model.state_dict().items()})
            self.model.load_state_dict(state)
            taken = getattr(self.model, "statistics_taken", None)
            if self.global_rank != 0 and taken is not None:
                taken()

    def on_fit_start(self) -> None:
        if self.config.trainer.channels_last:
            if not channels_last(self.model):
                raise ValueError(
                    f"trainer.channels_last=true: model.name={self.config.model.name} has no 3D convolutions here; "
                    "set trainer.channels_last=false"
                )
            channels_last(self.objective)
        if self.config.trainer.compile:
            compile_parts(self.model)

    def on_train_start(self) -> None:
        if not strategy.is_deepspeed(self.trainer.strategy):
            for optimizer in self.trainer.optimizers:
                match_layout(optimizer)  # of a checkpoint that was written with another one
        self._start_averages()
        if self.config.trainer.ledger:
            self._ledger = open(self.config.run_dir / f"ledger-{self.global_rank}.txt", "a", buffering=1)

    def _start_averages(self) -> None:
        """Pairs the averages, new or from a checkpoint, with their weights; not before an engine has moved those."""
        if self.config.optim.ema_decay and self._ema is None:
            names, live = zip(*[(n, p) for n, p in self.model.named_parameters() if p.requires_grad])
            kept = self.ema_state or {n: p.detach().float().clone() for n, p in zip(names, live)}
            self.ema_state = {n: kept[n].to(self.device) for n in names}
            self._ema = ([self.ema_state[n] for n in names], [p.data for p in live])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = parameter_groups(self, optim)
        low, high = optim.betas
        return strategy.RestingAdamW(groups, lr=optim.lr, betas=(low, high), fused=optim.fused, foreach=not optim.fused)

    # one step

    def transfer_batch_to_device(self, batch: Clip, device: torch.device, dataloader_idx: int) -> Clip:
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Clip, batch_idx: int) -> Tensor:
        # by the batch's number among those of all ranks: as many ranks as accumulated batches draw the same
        number = self.micro_done * self.trainer.world_size + self.global_rank
        reseed(step_seed(self.config.seed, number, 0), self.device)
        loss = self._loss(batch)
        # A non-finite loss makes every gradient NaN, so that the joint norm, which all ranks share, tells of it: one
        # check, no collective and no device synchronisation of its own.
        total = loss.total * torch.where(torch.isfinite(loss.total.detach()), 1.0, torch.nan)
        report = dict(loss.report)
        report["loss"] = loss.total.detach()
        self.reports.append(report)
        self.keys += batch.keys
        if self._ledger is not None:
            value = float(report["loss"]).hex()
            self._ledger.write(f"{self.steps_done} {self.micro_done} {value} {','.join(batch.keys)}\n")
        self.micro_done += 1
        # Here, not in a hook after the step: whoever saves a checkpoint must find the cursor already moved.
        self.trainer.datamodule.advance(batch)  # pyright: ignore[reportAttributeAccessIssue]
        return total

    def _loss(self, clip: Clip, step: int | None = None) -> Any:
        step = self.steps_done if step is None else step
        with strategy.autocast(self.trainer.strategy, self.config.trainer.precision):
            return self.objective(self.model, self._prepare(clip), step)

    def _prepare(self, clip: Clip) -> Clip:
        clip = clip.as_float()
        if self.config.trainer.precision == "bf16-true" and clip.video is not None:
            clip.video = clip.video.bfloat16()
        if self.config.trainer.channels_last and clip.video is not None:
            clip.video = clip.video.contiguous(memory_format=torch.channels_last_3d)
        return clip

    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]: of max_steps or of max_minutes, whichever is further."""
        return max(self.steps_done / self.config.trainer.max_steps, self.clock)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One AdamW step. With trainer.max_minutes the rate follows the clock: such a run is not bitwise repeatable."""
        idle = self.idle()
        self.lr = self.config.optim.lr * rate(self.config.optim, self.steps_done, self.progress())
        for group in optimizer.param_groups:
            group["idle"] = group["part"] in idle
            group["lr"] = 0.0 if group["idle"] else self.lr * group["factor"]
        optimizer.step(closure=optimizer_closure)
        if self.micro_done % self.config.trainer.accumulate:
            return
        if strategy.is_deepspeed(self.trainer.strategy):
            self.applied, self.grad_norm = strategy.step_outcome(self.trainer.strategy)
            strategy.forget_gradients(self.trainer.strategy)
        else:  # at once: the next forward pass does not hold them beside its activations
            optimizer.zero_grad()
        self.steps_done += 1
        if self.applied:
            self.bad_in_row = 0
            self._average()
        else:
            self._skipped()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: the step before has freed the gradients. DeepSpeed's engine frees its own."""

    def idle(self) -> set[str]:
        """Parts of the objective that rest in the coming step, by their names in the optimizer."""
        ask = getattr(self.objective, "idle", None)
        if ask is None:
            return set()
        parts = {f"objective.{name}" for name in ask(self.steps_done)}
        known = {f"objective.{name}" for name, _ in self.objective.named_children()}
        known |= {f"objective.{name}" for name, _ in self.objective.named_parameters(recurse=False)}
        if parts - known:
            raise ValueError(
                f"{type(self.objective).__qualname__}.idle named {sorted(parts - known)}; parts are {known}"
            )
        return parts

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Joint norm over every parameter, clipping, and the skip of a non-finite step (DeepSpeed does its own)."""
        if strategy.is_deepspeed(self.trainer.strategy):
            return
        groups = sorted(optimizer.param_groups, key=lambda group: group["part"])
        pairs = [(p, group["part"]) for group in groups for p in group["params"] if p.grad is not None]
        parameters = [p for p, _ in pairs]
        gradients = strategy.local([p.grad for p in parameters])
        norm, parts = total_norms(gradients, [part for _, part in pairs])
        norms = strategy.joint_norms(self.trainer.strategy, torch.stack([norm, *parts.values()]))
        value, *values = norms.tolist()  # the one synchronisation of a step
        self.applied, self.grad_norm = math.isfinite(value), value
        self.part_norms = dict(zip(parts, values))
        limit = self.config.optim.clip_grad_norm
        if not self.applied:
            for p in parameters:  # without gradients AdamW passes them by: weights, moments and counters all stay
                p.grad = None
        elif limit and value > limit:
            if isinstance(self.trainer.strategy, strategy.Sharded):  # this rank's parts, by the norm of the whole
                torch._foreach_mul_(gradients, limit / (value + 1e-6))  # pyright: ignore[reportPrivateImportUsage]
            else:
                nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)

    def _average(self) -> None:
        if self._ema is None:
            return
        # a short memory at first, or the random initial weights would weigh on short runs
        decay = min(self.config.optim.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        averages, live = self._ema
        live = live if live[0].dtype == torch.float32 else [p.float() for p in live]
        torch._foreach_lerp_(averages, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def _skipped(self) -> None:
        self.bad_in_row += 1
        self.bad_steps += 1
        line = {"step": self.steps_done, "rank": self.global_rank, "keys": self.keys, "loss": self._loss_values()}
        with open(self.config.run_dir / "bad_batches.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.bad_in_row >= self.config.trainer.max_bad_steps:
            raise NonFiniteError(
                f"the loss or its gradient was not finite in {self.bad_in_row} steps in a row (trainer.max_bad_steps), "
                f"the last one step {self.steps_done}; the keys of their clips are in "
                f"{self.config.run_dir / 'bad_batches.jsonl'}. Lower optim.lr, raise optim.warmup_steps, or use "
                "trainer.precision=32-true; no weight was changed by these steps"
            )

    def _loss_values(self) -> list[str]:
        return [str(float(report["loss"])) for report in self.reports]

    def take_reports(self) -> list[dict[str, Tensor]]:
        """The reports of the step that just ended ([] if it was skipped); forgets its keys."""
        reports, self.reports = self.reports, []
        self.keys = []
        return reports if self.applied else []

    # checkpoints

    def _group_names(self) -> list[list[str]]:
        """Names of the parameters of each optimizer group."""
        names = {id(p): name for name, p in self.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in parameter_groups(self, self.config.optim)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not strategy.is_deepspeed(self.trainer.strategy):  # whose shards tell the names themselves
            checkpoint["optimizer_names"] = self._group_names()
        for name in self.frozen_names:
            checkpoint["state_dict"].pop(name, None)
        if self.config.trainer.channels_last:  # files know no layout
            state = checkpoint["state_dict"]
            state.update({name: value.contiguous() for name, value in state.items()})
        if self.ema_state is not None:
            state = {n: v.detach().cpu() for n, v in self.ema_state.items()}
            checkpoint["ema"] = {n: v.clone(memory_format=torch.contiguous_format) for n, v in state.items()}
        checkpoint["vtok"] = dict(
            self.extra_state, step=self.steps_done, micro=self.micro_done, bad_in_row=self.bad_in_row,
            bad_steps=self.bad_steps,
        )  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        accumulate = self.config.trainer.accumulate
        if strategy.is_deepspeed(self.trainer.strategy):  # which has its optimizer's state already
            checkpoints.recount(checkpoint, accumulate)
        else:
            groups = self.configure_optimizers().state_dict()["param_groups"]
            checkpoints.adapt(checkpoint, names=self._group_names(), groups=groups, accumulate=accumulate)
        state = checkpoint["vtok"]
        self.steps_done, self.micro_done = state["step"], state["micro"]
        self.bad_in_row, self.bad_steps = state["bad_in_row"], state["bad_steps"]
        self.extra_state = dict(state)
        if self.config.optim.ema_decay:
            if "ema" not in checkpoint:
                raise ValueError(
                    "optim.ema_decay is set, but the checkpoint holds no averaged weights: set optim.ema_decay=0, or "
                    "start a new run with init_from"
                )
            self.ema_state = {n: v.float() for n, v in checkpoint["ema"].items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [n for n in result.missing_keys if n not in self.frozen_names]
        if missing or result.unexpected_keys:
            raise RuntimeError(
                f"the checkpoint does not fit the model: missing {missing[:8]}, unexpected {result.unexpected_keys[:8]}"
            )
        return result

    # validation

    def averaged(self) -> _Averaged:
        """Context in which the model carries its averaged weights (as it is where none are kept)."""
        self._start_averages()
        return _Averaged(self._ema)

    def val_loss(self, clip: Clip, index: int) -> dict[str, Any]:
        """The objective on held-out clips, with the same random numbers every time: {name: mean over the clips}."""
        reseed(step_seed(self.config.seed, -1 - index, self.global_rank), self.device)
        loss = self._loss(clip, self.val_step(index))
        report = {**loss.report, "loss": loss.total}
        report.pop("codebook_counts", None)  # every id of validation is counted, by `codebook_use`
        return {k: float(v.detach().float().mean()) for k, v in report.items()}

    def settle(self, clip: Clip | None) -> None:
        """What all ranks have to agree on before they measure, from the first clips of each; None: a rank has none."""

    def val_step(self, index: int) -> int:
        """What the objective is told as the step of a validation's batch: that of the weights, by which weights of its
        terms may be scheduled."""
        return self.steps_done

    def measure(self, clip: Clip, index: int) -> dict[str, Any]:
        """What validation wants to know of one batch: {"mean": {name: value per clip list}, ...}."""
        return {"mean": {k: [v] * len(clip) for k, v in self.val_loss(clip, index).items()}, "ids": None}

    def pictures(self, clip: Clip) -> tuple[list[str], list[Tensor]] | None:
        """(titles, uint8 videos [B, C, T, H, W]) to look at: none for a compressor that returns no pixels."""
        return None

    def told(self, scores: dict[str, Any]) -> list[str]:
        """Lines to print below those of a validation, given its scores: none beside loss and budgets."""
        return []

    def answers(self, clip: Clip) -> list[str]:
        """Lines of Markdown to read beside the pictures: none for a compressor that speaks to no LLM."""
        return []


class LitTokenizer(LitCompressor):
    """A compressor that returns to pixels: PSNR and pictures at several budgets, and the use of its codebook."""

    def budgets(self, most: int, clip: Clip) -> list[int]:
        """Tokens per clip to validate at: eval.budgets up to `most`, or 1, 4, 16, ... and `most` itself; of a model
        whose tokens are a grid, the counts there are."""
        if hasattr(self.model, "token_counts"):
            assert clip.video is not None
            shape, frames = clip.video.shape[3:], int(clip.frames().max())
            counts: Any = self.model.token_counts(frames, (shape[0], shape[1]))  # pyright: ignore[reportCallIssue]
            return [count for count in counts if count < most] + [most]
        asked = self.config.eval.budgets or [4**i for i in range(16)]
        return sorted({b for b in asked if b < most} | {most})

    def measure(self, clip: Clip, index: int) -> dict[str, Any]:
        out = super().measure(clip, index)
        assert clip.video is not None
        original = clip.video if not clip.video.is_floating_point() else to_uint8(clip.video)
        for budget, video, tokens in self.reconstructions(clip):
            out["mean"][f"psnr_db_{budget}"] = clip_psnr(video, original, clip.lengths).tolist()
            out["top"] = f"psnr_db_{budget}"  # the last one: every token
            if tokens.indices is not None:
                out["ids"] = tokens.indices.masked_fill(~tokens.mask[..., None], -1).cpu()
        return out

    def reconstructions(self, clip: Clip) -> Iterator[tuple[int, Tensor, Any]]:
        """(budget, uint8 video, tokens) for each budget that every clip can fill, then with all tokens of each clip.

        The longest clip names the last one: a single short clip would else give its batch a score of its own.
        """
        assert clip.video is not None
        size = (clip.video.shape[-2], clip.video.shape[-1])
        with strategy.autocast(self.trainer.strategy, self.config.trainer.precision):
            ready = self._prepare(clip)
            whole: Any = self.model.encode(ready)  # pyright: ignore[reportCallIssue]
            most = int(whole.lengths.min())
            for budget in self.budgets(most, clip):
                tokens: Any = whole
                if budget < most:
                    tokens = self.model.encode(ready, budget=budget)  # pyright: ignore[reportCallIssue]
                video: Any = self.model.decode(tokens, size=size)  # pyright: ignore[reportCallIssue]
                yield budget if budget < most else int(whole.lengths.max()), to_uint8(video), tokens

    def pictures(self, clip: Clip) -> tuple[list[str], list[Tensor]] | None:
        assert clip.video is not None
        titles, videos = ["original"], [clip.video]
        for budget, video, _ in self.reconstructions(clip):
            titles.append(f"{budget} tokens")
            videos.append(video)
        return titles, videos


class _Averaged:
    def __init__(self, ema: tuple[list[Tensor], list[Tensor]] | None) -> None:
        self.ema = ema

    def __enter__(self) -> None:
        if self.ema is not None:
            averages, live = self.ema
            self.kept = [p.clone() for p in live]
            for p, average in zip(live, averages):
                p.copy_(average)

    def __exit__(self, *_: Any) -> None:
        if self.ema is not None:
            for p, kept in zip(self.ema[1], self.kept):
                p.copy_(kept)
            del self.kept


def codebook_use(ids: Iterable[Tensor], sizes: tuple[int, ...]) -> dict[str, Any]:
    """How validation tokens use the codebook.

    Args:
        ids: [B, K, Q] int64 batches, -1 where there is no token. sizes: the Q codebook sizes.
    Returns: `usage` (share of entries used, mean over Q), `perplexity` (2 ** entropy of the ids, mean over Q) and
        `perplexity_per_position` [K]. All are bounded by the number of tokens seen: `tokens_seen`.
    """
    batches = [b for b in ids if b.numel()]
    if not batches or not sizes:
        return {}
    longest = max(b.shape[1] for b in batches)
    every = torch.cat([nn.functional.pad(b, (0, 0, 0, longest - b.shape[1]), value=-1) for b in batches])  # [N, K, Q]
    usage, overall, places = [], [], []
    for q, size in enumerate(sizes):
        column = every[..., q]
        counts = column[column >= 0].unique(return_counts=True)[1]
        usage.append(len(counts) / size)
        overall.append(_perplexity(counts))
        places.append([_perplexity(c[c >= 0].unique(return_counts=True)[1]) for c in column.unbind(1)])
    return {
        "codebook_usage": sum(usage) / len(usage),
        "codebook_perplexity": sum(overall) / len(overall),
        "perplexity_per_position": [sum(p) / len(p) for p in zip(*places)],
        "tokens_seen": int((every[..., 0] >= 0).sum()),
    }


def _perplexity(counts: Tensor) -> float:
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(-(share * share.log()).sum())) if len(counts) else 0.0


def _videos(loader: Iterable[Clip], clips: int, bar: Bar, moved: Callable[[str], Any]) -> Iterator[Tensor]:
    """Float videos of the first `clips` training clips, with progress."""
    seen = 0
    for clip in loader:
        video = clip.as_float().video
        assert video is not None
        yield video[: clips - seen]
        seen += len(clip)
        moved(f"the statistics, after {min(seen, clips)} clips")
        if bar.due():
            bar.show(min(seen / clips, 1.0), f"{min(seen, clips)} of {clips} clips")
        if seen >= clips:
            return
