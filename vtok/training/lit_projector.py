"""The LightningModule of projectors: the step is every compressor's, validation asks a frozen LLM at all budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from vtok.layers.projector import with_features
from vtok.metrics.cost import Timed, clock_of, compress_flops
from vtok.metrics.language import exact_match
from vtok.training import strategy
from vtok.training.lit import LitCompressor
from vtok.types import Clip


class LitProjector(LitCompressor):
    """A compressor that a frozen LLM reads: accuracy at several budgets, by kind of question; answers beside the truth.

    Its objective has `ask` and `generate`, as `vtok.llm.ProjectorObjective`.
    """

    menu: tuple[int | None, ...] = ()  # budgets of validation, settled by the first clips of all ranks

    def val_step(self, index: int) -> int:
        """Tasks, prompts and budgets are drawn by the step: every validation draws the same."""
        return -1 - index

    def _seen(self, clip: Clip) -> tuple[Clip, tuple[int | None, ...]]:
        """The clip with the tower's features, made once for all budgets; eval.budgets, or those of the model."""
        model: Any = self.model
        clip = self._prepare(clip)
        features = model.features(clip)
        self.menu = self.menu or self._menu(features)
        if features is None:  # texts
            return clip, self.menu
        return with_features(model, clip, features), self.menu

    def _menu(self, features: Any) -> tuple[int | None, ...]:
        model: Any = self.model
        asked = self.config.eval.budgets if model.any_budget else []
        return tuple(asked or model.budgets(features))

    @torch.no_grad()
    def settle(self, clip: Clip | None) -> None:
        """The budgets of validation: of the rank whose first clips have the most tokens. With menus of their own, ranks
        would measure other budgets than one another, each on its own clips."""
        if self.menu or self.trainer.world_size < 2:
            return
        model: Any = self.model
        menus: list[tuple[int | None, ...]] = [()] * self.trainer.world_size
        with strategy.autocast(self.trainer.strategy, self.config.trainer.precision):
            own = () if clip is None else self._menu(model.features(self._prepare(clip)))
        torch.distributed.all_gather_object(menus, own)
        self.menu = max(menus, key=lambda menu: [math.inf if budget is None else budget for budget in menu[-1:]])

    def measure(self, clip: Clip, index: int) -> dict[str, Any]:
        out, mean = super().measure(clip, index), {}
        objective: Any = self.objective
        with strategy.autocast(self.trainer.strategy, self.config.trainer.precision):
            ready, budgets = self._seen(clip)
            asked = [each for of_clip in clip.qa or [] for each in of_clip or [] if isinstance(each, dict)]
            open_ended = any(not each.get("choices") for each in asked)
            for budget in budgets:
                name = "all" if budget is None else str(budget)
                timed = Timed(self.model, clock_of(self.device))
                for each in self._asked(timed, ready, budget, 16 * open_ended):
                    for key, value in _scores(each).items():
                        mean.setdefault(f"{key}_{name}", []).append(value)
                mean[f"compress_ms_{name}"] = [1000 * timed.seconds / len(clip)] * len(clip)
                if not index:  # counting takes longer than compressing
                    mean[f"compress_flops_{name}"] = [compress_flops(self.model, ready, budget=budget)]
                if hasattr(objective, "measure"):
                    for key, values in objective.measure(self.model, ready, budget=budget).items():
                        mean[f"{key}_{name}"] = values
                top = [key for key in (f"repeated_accuracy_{name}", f"accuracy_{name}") if mean.get(key)]
                out["top"] = top[0] if top else out.get("top", "")
        out["mean"] |= mean
        return out

    def _asked(self, model: Any, clip: Clip, budget: int | None, max_new_tokens: int) -> list[Any]:
        """The questions of a batch, answered. Tokens are made of clips without questions too: where parameters are
        split over ranks (ZeRO-3), all ranks have to call the model, or none."""
        objective: Any = self.objective
        said = objective.ask(model, clip, budget=budget, max_new_tokens=max_new_tokens)
        if not said:
            model.encode(replace(clip, prompt=[""] * len(clip)), budget=budget)
        return said

    def told(self, scores: dict[str, Any]) -> list[str]:
        """A line for each budget: accuracy and exact match, by kind of question too, loss, tokens, costs."""
        lines = []
        for budget in self.menu:
            name = "all" if budget is None else str(budget)
            found = {
                k[4 : -len(name) - 1]: v for k, v in scores.items() if k.startswith("val/") and k.endswith(f"_{name}")
            }
            if "tokens" not in found:
                continue
            words = [f"{found['tokens']:.4g} tokens in prompts of {found['positions']:.4g} positions"]
            for measure, title in (("accuracy", "right"), ("exact_match", "exact match")):
                kinds = {k.removesuffix(f"_{measure}"): v for k, v in found.items() if k.endswith(f"_{measure}")}
                kinds.pop("repeated", None)  # how texts are said again is no kind of question
                if measure in found:
                    parts = ", ".join(f"{kind} {100 * v:.1f}" for kind, v in sorted(kinds.items()))
                    words.append(f"{title} {100 * found[measure]:.1f} %" + f" ({parts})" * bool(parts))
            words += [f"loss {found['loss']:.3f}"] if "loss" in found else []
            cost = f"compressor {found['compress_ms']:.3g} ms"
            if "compress_flops" in found:
                cost += f", {found['compress_flops'] / 1e9:.3g} GFLOP"
            lines.append("; ".join([*words, f"{cost} a clip"]))
        return lines

    def answers(self, clip: Clip) -> list[str]:
        objective: Any = self.objective
        with strategy.autocast(self.trainer.strategy, self.config.trainer.precision):
            ready, budgets = self._seen(clip)
            chosen = list(dict.fromkeys([budgets[0], budgets[-1]]))
            said = {b: self._asked(self.model, ready, b, 16) for b in chosen}
            told = {b: objective.generate(self.model, ready, budget=b) for b in chosen}
        heads = ["all tokens" if b is None else f"{b} tokens" for b in chosen]
        lines = [f"| clip | asked | truth | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
        for row, key in enumerate(clip.keys):
            truth = clip.text[row] if clip.text else ""
            lines.append(_cells(key, "description", truth, *(told[b][row] for b in chosen)))
        for at, each in enumerate(said[chosen[0]]):
            lines.append(_cells(each.key, each.question, each.answer, *(said[b][at].text or "" for b in chosen)))
        return lines


def _scores(each: Any) -> dict[str, float]:
    """What validation counts of one answered question (`vtok.llm.Answered`), by kind too."""
    out = {"positions": float(each.positions), "tokens": float(each.tokens)}
    kind = each.type or "other"
    if each.right is not None:
        out |= {"accuracy": float(each.right), f"{kind}_accuracy": float(each.right)}
        if each.loss is not None:
            out["loss"] = each.loss
    if each.text is not None:
        same = exact_match(each.text, each.answer)
        out |= {"exact_match": same, f"{kind}_exact_match": same}
    return out


def _cells(*texts: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(" ".join(text.split()).replace("|", "/") for text in texts) + " |"
