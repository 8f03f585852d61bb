"""A projector before a frozen LLM, at every budget, beside the training-free reducers, on the same clips and questions.

    1. the LLM blind, and with every token of the stage-0 projector: the two ends that everything else lies between
    2. the projector at each budget; each reducer at the same budgets on the tokens of the stage-0 projector
    3. accuracy of the likeliest choice, over all questions and by their kind; what the tokens cost the LLM

Intervals are 95 % percentile intervals of a bootstrap over videos, each with all its questions. What is undefined is
null, and the row's `note` says why. `random` is run with several seeds, whose answers are pooled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from vtok.families import reducer as reducing
from vtok.llm import Answered, FrozenLLM, ask
from vtok.metrics.cost import shape_of
from vtok.metrics.language import by_kind, chance, exact_match, retained, token_f1
from vtok.reducers import REDUCERS
from vtok.rows import SCHEMA, bootstrap, environment, without_nan
from vtok.types import Budget, Clip, Features, Tokens

ALWAYS = ("random", "uniform", "pooling", "downsample")  # controls of every table


@dataclass
class AnswerRow:
    """Every answer of one (method, budget); seconds and operations of making its tokens, per clip."""

    method: str
    budget: int | None
    answers: list[Answered] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    compress_flops: float = math.nan
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def video_of(key: str) -> str:
    """The video a clip was cut from, by its key (docs/formats.md: STEM or STEM__0001)."""
    return key.partition("__")[0]


class AnsweringEvaluator:
    """Measures one projector; `run()` gives the content of eval.json.

    Args:
        model: a `Projector` in eval mode. llm: the frozen language model it was trained for.
        val: batches of clips with `qa`, read once; a list or a loader.
        template: the prompt of a question, with "<video>" and "{question}". timestamps: as in training.
        budgets: tokens per clip; [] = 1, 4, 16 ... and all.
        full: the stage-0 model, all of whose tokens are the full-token row, and whose projector the reducers stand on;
            None leaves both out, and says so.
        reducers: their names beside `ALWAYS`. seeds: of those that draw.
        max_new_tokens: of the LLM's own answers, for exact match and F1; 0 = likelihoods of the choices alone.
    """

    def __init__(
        self,
        model: Any,
        llm: FrozenLLM,
        *,
        val: Iterable[Clip],
        template: str,
        timestamps: bool = False,
        budgets: Sequence[int] = (),
        full: Any = None,
        reducers: Sequence[str] = (),
        seeds: int = 5,
        max_new_tokens: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        unknown = [name for name in reducers if name not in (*REDUCERS, *ALWAYS)]
        if unknown:
            raise ValueError(f"eval.controls={unknown} unknown; choose reducers from {', '.join(REDUCERS)}")
        if any(budget < 1 for budget in budgets):
            raise ValueError(f"eval.budgets={list(budgets)}: a budget is at least one token")
        if full is not None and full.embedding_dim != llm.embedding_dim:
            raise ValueError(
                f"the full-token model's tokens are {full.embedding_dim} wide, the words of {llm.name} "
                f"{llm.embedding_dim}: it was trained for another LLM"
            )
        self.device = torch.device(device)
        self.model, self.llm = model.to(self.device).eval(), llm
        self.full = full.to(self.device).eval() if full is not None else None
        self.family = str(model.config.name).rpartition(".")[2]
        self.val, self.template, self.timestamps = val, template, timestamps
        self.budgets = sorted(set(budgets))
        self.names = list(dict.fromkeys([*ALWAYS, *reducers])) if full is not None else []
        self.seeds, self.seed, self.max_new_tokens = seeds, seed, max_new_tokens
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not progress,
        )

    def run(self, *, model: str = "", shards: str = "") -> dict[str, Any]:
        """Every row of every method. model, shards: what the table says they are."""
        rows: dict[tuple[str, int | None], AnswerRow] = {}
        clips = 0
        with self.bar, torch.inference_mode():
            total = len(self.val) if hasattr(self.val, "__len__") else None  # type: ignore[arg-type]
            task = self.bar.add_task("questions", total=total)
            for batch in self.val:
                clips += len(batch)
                self._batch(
                    batch.to(self.device).as_float() if batch.video is not None else batch.to(self.device), rows
                )
                self.bar.advance(task)
        if not any(row.answers for row in rows.values()):
            raise ValueError("no clip has a question with an answer (`qa` in its json): there is nothing to measure")
        finished = self._finish(list(rows.values()))
        return without_nan(
            {
                "schema": SCHEMA,
                "model": model,
                "family": self.family,
                "shards": shards,
                "clips": clips,
                "llm": self.llm.identity(),
                "environment": environment(self.device, seed=self.seed),
                "rows": finished,
            }
        )

    # one batch, every method

    def _batch(self, clip: Clip, rows: dict[tuple[str, int | None], AnswerRow]) -> None:
        def row(method: str, budget: int | None) -> AnswerRow:
            return rows.setdefault((method, budget), AnswerRow(method, budget))

        self._ask(row("blind", 0), clip, None, None)
        seen, features = self._seen(clip, self.model)
        for budget in self._menu(self.model, features):
            self._ask(row(self.family, budget), seen, self.model, budget)
        if self.full is None:
            return
        if self.full.config.tower != self.model.config.tower:
            seen, features = self._seen(clip, self.full)
        self._ask(row("full", None), seen, self.full, None)
        for name in self.names:
            for seed in range(self.seeds if _draws(name) else 1):
                reduced = reduced_model(self.full, name, seed=self.seed + seed)
                for budget in self._menu(reduced, features):
                    if name == "downsample" and clip.video is None:
                        row(name, budget).note("the shards hold features: frames cannot be made smaller")
                        continue
                    self._ask(row(name, budget), clip if name == "downsample" else seen, reduced, budget)

    def _menu(self, model: Any, features: Features) -> list[int | None]:
        """The budgets of every row, settled by the first clips; all tokens for a model that takes no budget."""
        if not model.any_budget:
            return [None]
        self.budgets = self.budgets or [budget for budget in model.budgets(features) if budget is not None]
        return list(self.budgets)

    def _seen(self, clip: Clip, model: Any) -> tuple[Clip, Features]:
        """The clip with the features of the model's tower, and these, made once for all rows that read them: with
        attention and keys where the reducers need these."""
        asked: dict[str, Any] = {}
        if self.full is not None and self.full.config.tower == model.config.tower:
            methods = [REDUCERS[name] for name in self.names if name in REDUCERS]
            layers = {each for m in methods if m.layers for each in attention_layers(self.full, m.layers)}
            if layers:
                asked["attention"] = sorted(layers)
            if any(method.keys for method in methods):
                asked["keys"] = True
        features = model.features(clip, **asked)
        return replace(clip, features={**(clip.features or {}), model.config.tower.name: features}), features

    def _ask(self, row: AnswerRow, clip: Clip, model: Any, budget: int | None) -> None:
        timed = _Timed(model, self._sync) if model is not None else None
        if timed is not None and math.isnan(row.compress_flops):
            with FlopCounterMode(display=False) as counter:
                timed.model.encode(replace(clip, prompt=[""] * len(clip)), budget=budget)
            row.compress_flops = counter.get_total_flops() / len(clip)
        found = ask(
            self.llm,
            clip,
            timed,
            template=self.template,
            budget=budget,
            timestamps=self.timestamps and timed is not None,
            max_new_tokens=self.max_new_tokens,
        )
        row.answers += found
        if budget is not None and any(each.tokens < budget for each in found):
            row.note(f"clips that have fewer than {budget} tokens are given all of theirs")
        if timed is not None:
            row.compress_s += [timed.seconds / len(clip)] * len(clip)

    def _sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # the table

    def _finish(self, rows: list[AnswerRow]) -> list[dict[str, Any]]:
        order = {"blind": 0, "full": 1, self.family: 2}
        rows.sort(key=lambda row: (order.get(row.method, 3), row.method, row.budget or 0))
        full = next((_accuracy(row.answers) for row in rows if row.method == "full"), math.nan)
        shape = shape_of(self.llm.model, self.llm.model.config.get_text_config())
        out = []
        for row in rows:
            chosen = [each for each in row.answers if each.right is not None]
            right = torch.tensor([float(bool(each.right)) for each in chosen], dtype=torch.float64)
            names = {name: at for at, name in enumerate(sorted({video_of(each.key) for each in chosen}))}
            clusters = torch.tensor([names[video_of(each.key)] for each in chosen], dtype=torch.int64)
            guess = chance([{"choices": each.choices} for each in chosen])
            accuracy = _accuracy(row.answers)
            positions = _mean([float(each.positions) for each in row.answers])
            texts = [(each.text, each.answer) for each in row.answers if each.text is not None]
            notes = list(row.notes)
            if not self.max_new_tokens:
                notes.append("exact_match, f1: no answers were generated (--answers)")
            if self.full is None:
                notes.append("retained: there is no full-token row (--full)")
            if _draws(row.method):
                notes.append(f"{self.seeds} seeds, their answers pooled")
            tokens = _mean([float(each.tokens) for each in row.answers])
            out.append(
                {
                    "method": row.method,
                    "budget": row.budget,
                    "questions": len(row.answers),
                    "tokens_mean": tokens,
                    "positions_mean": positions,
                    "accuracy": accuracy,
                    "accuracy_ci": bootstrap(right, seed=self.seed, clusters=clusters) if len(right) else None,
                    "chance": guess,
                    "retained": retained(accuracy, full=full, chance=guess) if self.full is not None else math.nan,
                    "by_type": by_kind(right.tolist(), [each.type or "other" for each in chosen]),
                    "loss": _mean([-each.likelihoods[each.choices.index(each.answer)] for each in chosen
                                   if each.answer in each.choices]),
                    "exact_match": _mean([exact_match(a, b) for a, b in texts]),
                    "f1": _mean([token_f1(a, b) for a, b in texts]),
                    "prefill_flops": shape.prefill_flops(round(positions)),
                    "kv_bytes": shape.kv_bytes(round(positions)),
                    "compress_flops": row.compress_flops,
                    "compress_seconds_per_clip": _mean(row.compress_s),
                    "note": "; ".join(notes) or None,
                }
            )  # fmt: skip
        return out


class _Timed:
    """A projector whose seconds of compressing are counted."""

    def __init__(self, model: Any, clock: Callable[[], float]):
        self.model, self.clock, self.seconds = model, clock, 0.0
        self.reads_prompt = getattr(model, "reads_prompt", False)

    def features(self, clip: Clip) -> Features:
        return self.model.features(clip)

    def compress(self, features: Features, **asked: Any) -> Tokens:
        start = self.clock()
        tokens = self.model.compress(features, **asked)
        self.seconds += self.clock() - start
        return tokens

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        start = self.clock()
        tokens = self.model.encode(clip, budget=budget)
        self.seconds += self.clock() - start
        return tokens


def attention_layers(model: Any, count: int) -> list[int]:
    """Blocks of the model's tower whose attention reducers follow, where its configuration names none: the last but
    one; of two, the middle one and the last."""
    named = list(getattr(model.config, "attention_layers", []))
    if len(named) >= count:
        return named
    depth = model.tower.depth
    return [max(depth - 2, 0)] if count == 1 else [depth // 2, depth - 1]


def _draws(name: str) -> bool:
    return name in REDUCERS and REDUCERS[name].random


def reduced_model(full: Any, name: str, *, seed: int = 0) -> Any:
    """A training-free reducer on the projector of the stage-0 model: it shares the weights."""
    layers = attention_layers(full, REDUCERS[name].layers) if name in REDUCERS and REDUCERS[name].layers else []
    options: dict[str, Any] = {"seed": seed} if _draws(name) else {}
    options |= dict(zip(("layer",) if len(layers) == 1 else ("object_layer", "last_layer"), layers))
    made = reducing.Model(replace(full.config, method=name, options=options, attention_layers=layers))
    made.projector, made._tower = full.projector, full._tower
    return made.to(next(full.parameters()).device).eval()


def print_answers(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows for a terminal: methods by accuracy at each budget, then by kind of question."""
    kinds = sorted({kind for row in result["rows"] for kind in row["by_type"]})
    table = Table(
        title=f"{result['model']}: {result['clips']} clips of {result['shards'] or 'the given set'}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for heading in ("tokens", "accuracy", "95 %", "kept", *kinds):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(result["rows"], key=lambda row: (row["budget"] is None, row["budget"] or 0)):
        interval = "-".join(f"{100 * bound:.0f}" for bound in row["accuracy_ci"] or ())
        table.add_row(
            row["method"],
            f"{row['tokens_mean']:.0f}",
            _per_cent(row["accuracy"]),
            interval or "-",
            _per_cent(row["retained"]),
            *(_per_cent(row["by_type"].get(kind)) for kind in kinds),
        )
    out = console or Console()
    out.print(table)
    guess = next((row["chance"] for row in result["rows"] if row["chance"] is not None), None)
    out.print(f"per cent of questions; chance {_per_cent(guess)}; kept: of what all tokens gain over it", style="dim")


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _accuracy(answers: Sequence[Answered]) -> float:
    return _mean([float(each.right) for each in answers if each.right is not None])
