"""A projector before a frozen LLM, at every budget, beside the training-free reducers, on the same clips and questions.

    1. the LLM blind, and with every token of the stage-0 projector: the two ends that everything else lies between
    2. the projector at each budget; each reducer at the same budgets on the tokens of the stage-0 projector
    3. the time to the first token of every row's prompt, in turns
    4. rows and who wins (vtok.evaluation.answer_rows); of some clips what was said, for the report

`random` is run with several seeds, whose answers are pooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vtok.evaluation.allocations import (
    SCORES,
    TRUTH,
    Noted,
    allocated,
    answer_tokens,
    can_allocate,
    margins,
    told,
    true_shares,
)
from vtok.evaluation.answer_rows import (
    AnswerRow,
    Costs,
    benchmark,
    finish,
    paired,
    per_question,
    sentences,
    versus,
)
from vtok.evaluation.free_lengths import Imposed, Observed, controlled, judged
from vtok.evaluation.rows import SCHEMA, environment, without_nan
from vtok.families import reducer as reducing
from vtok.layers.projector import share_tower, with_features
from vtok.llm import Answered, FrozenLLM, PartsConfig, ask
from vtok.llm.tasks import some_questions
from vtok.metrics.cost import Timed, clock_of, compress_flops, first_token_seconds, shape_of
from vtok.progress import counting_bar
from vtok.reducers import REDUCERS
from vtok.types import Budget, Clip, to_uint8

__all__ = ["ALWAYS", "AnsweringEvaluator", "attention_layers", "print_answers", "reduced_model"]

ALWAYS = ("random", "uniform", "pooling", "downsample")  # controls of every table
MAIN = ("accuracy", "95 %", "kept", "first token ms")  # of the terminal's table, beside kinds of questions


class AnsweringEvaluator:
    """Measures one projector; `run()` gives the content of eval.json.

    Args:
        model: a `Projector` in eval mode. llm: the frozen language model it was trained for.
        val: batches of clips with `qa`, read once; a list or a loader.
        template: the prompt of a question, with "<video>" and "{question}". timestamps: as in training.
        budgets: tokens per clip; [] = 1, 4, 16 ... and all.
        full: the stage-0 model, all of whose tokens are the full-token row, and whose projector the reducers stand on;
            None leaves both out, and says so.
        tuned: a model that has learned since, of the same tower: the reducers stand on its projector. For a comparison
            that gives the reducers as many steps as the compressor had.
        reducers: their names beside `ALWAYS`. seeds: of those that draw.
        max_new_tokens: of the LLM's own answers, for exact match and F1; 0 = likelihoods of the choices alone.
        parts: ask the parts of every clip before the whole, in all rows but the blind one (`vtok.llm.parts`).
        allocations: totals, and the fewest tokens of a segment at each: these are then the budgets, and `shares`, ways
            to share them over segments (`vtok.evaluation.allocations.SCORES`), rows beside the model's own.
        facts: complexity and duration of videos (`free_lengths.read_facts`), which free lengths are held against.
        questions: asked of a clip at most, drawn by its key and `seed`; None: all of them.
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
        tuned: Any = None,
        reducers: Sequence[str] = (),
        seeds: int = 5,
        max_new_tokens: int = 0,
        parts: PartsConfig | None = None,
        allocations: Mapping[int, int] | None = None,
        shares: Sequence[str] = tuple(SCORES),
        facts: Mapping[str, Mapping[str, float]] | None = None,
        questions: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        unknown = [name for name in reducers if name not in (*REDUCERS, *ALWAYS)]
        if unknown:
            raise ValueError(f"eval.controls={unknown} unknown; choose reducers from {', '.join(REDUCERS)}")
        if any(budget < 1 for budget in budgets):
            raise ValueError(f"eval.budgets={list(budgets)}: a budget is at least one token")
        if questions is not None and questions < 1:
            raise ValueError(f"questions={questions}: ask 1 or more of a clip")
        wrong = [name for name in shares if name not in SCORES]
        if wrong:
            raise ValueError(f"shares={wrong} unknown; choose ways to share a total from {', '.join(SCORES)}")
        if full is not None and full.embedding_dim != llm.embedding_dim:
            raise ValueError(
                f"the full-token model's tokens are {full.embedding_dim} wide, the words of {llm.name} "
                f"{llm.embedding_dim}: it was trained for another LLM"
            )
        self.device = torch.device(device)
        self.model, self.llm = model.to(self.device).eval(), llm
        self.full = full.to(self.device).eval() if full is not None else None
        self.one_tower = full is not None and share_tower(full, model)  # for both, and so its features
        if tuned is not None and (full is None or not share_tower(tuned, full)):
            raise ValueError("tuned: the reducers' projector goes with a full-token model (full) of the same tower")
        self.base = tuned.to(self.device).eval() if tuned is not None else self.full
        self.family = str(model.config.name).rpartition(".")[2]
        self.val, self.template, self.timestamps, self.questions = val, template, timestamps, questions
        self.budgets = sorted(set(allocations or budgets))
        if allocations and not can_allocate(model):
            raise ValueError("allocations are compared of models that share by scores: model.ata.score is none here")
        self.minima, self.shares = dict(allocations or {}), []
        if allocations:  # a way that is the model's own has no second row
            self.shares = [name for name in shares if not SCORES[name] or SCORES[name] != model.config.ata.score]
        self.names = list(dict.fromkeys([*ALWAYS, *reducers])) if full is not None else []
        self.seeds, self.seed, self.max_new_tokens = seeds, seed, max_new_tokens
        self.parts = parts if parts is not None and parts.count > 1 else None
        # a model whose lengths are free is asked at these too; for one that reads prompts they are each question's own
        free = getattr(model, "captioner", None) is not None and not model.reads_prompt
        self.observed, self.facts = Observed(self.model) if free else None, facts
        try:
            self.shape, self.no_shape = shape_of(llm.model, llm.model.config.get_text_config()), ""
        except ValueError as error:  # the answers are worth having without
            self.shape, self.no_shape = None, f"prefill_flops, kv_bytes: {error}"
        self.reduced: dict[tuple[str, int], Any] = {}
        self.bar = counting_bar(show=progress)

    def run(self, *, model: str = "", shards: str = "", tuned: str = "") -> dict[str, Any]:
        """Every row of every method. model, shards, tuned: what the table says they are."""
        rows: dict[tuple[str, int | None], AnswerRow] = {}
        clips = 0
        with self.bar, torch.inference_mode():
            total = len(self.val) if hasattr(self.val, "__len__") else None  # type: ignore[arg-type]
            task = self.bar.add_task("questions", total=total)
            for clip in self._clips():
                clips += len(clip)
                self._batch(clip, rows)
                self.bar.advance(task)
            lengths = self._lengths(rows) if self.observed is not None else None
        if not any(row.answers for row in rows.values()):
            raise ValueError("no clip has a question with an answer (`qa` in its json): there is nothing to measure")
        ordered = self._ordered(list(rows.values()))
        return without_nan(
            {
                "schema": SCHEMA,
                "model": model,
                "family": self.family,
                "shards": shards,
                "clips": clips,
                "llm": self.llm.identity(),
                "tower": self._tower("_tower"),
                "audio": self._tower("_ears"),
                "parts": asdict(self.parts) if self.parts else None,
                "tuned": tuned or None,
                "reads_prompt": bool(getattr(self.model, "reads_prompt", False)),
                "environment": environment(self.device, seed=self.seed),
                "benchmark": benchmark(ordered, seed=self.seed),
                "versus": versus(ordered, self.family, seed=self.seed, without=self.shares),
                **self._margins(ordered),
                "rows": self._finish(ordered),
                "lengths": lengths,
                "per_question": per_question(ordered),
            }
        )

    def _tower(self, which: str) -> dict[str, Any] | None:
        """Which tower made the features; None where none was loaded: of texts, and of features read from shards."""
        tower = getattr(self.model, which, None)
        return tower.identity() if tower is not None else None

    # one batch, every method

    def _clips(self) -> Iterator[Clip]:
        for batch in self.val:
            clip = batch.to(self.device).as_float() if batch.video is not None else batch.to(self.device)
            yield clip if self.questions is None else some_questions(clip, self.questions, seed=self.seed)

    def _batch(self, clip: Clip, rows: dict[tuple[str, int | None], AnswerRow]) -> None:
        def row(method: str, budget: int | None) -> AnswerRow:
            return rows.setdefault((method, budget), AnswerRow(method, budget))

        self._ask(row("blind", 0), clip, None, None)
        seen, features = self._seen(clip, self.model)
        for budget in self._menu(self.model, features):
            if budget not in self.minima:
                self._ask(row(self.family, budget), seen, self.model, budget)
                continue
            for method in ("", *self.shares):
                self._share(row(method or self.family, budget), seen, method, budget)
        if self.observed is not None:
            self._ask(row(self.family, None), seen, self.observed, None)
        if self.full is None:
            return
        if not self.one_tower:
            seen, features = self._seen(clip, self.full)
        self._ask(row("full", None), seen, self.full, None)
        for name in self.names:
            for seed in range(self.seeds if _draws(name) else 1):
                reduced = self._reduced(name, self.seed + seed)
                for budget in self._menu(reduced, features):
                    if name == "downsample":
                        self._downsample(row(name, budget), clip, reduced, budget)
                    else:
                        self._ask(row(name, budget), seen, reduced, budget)

    def _downsample(self, row: AnswerRow, clip: Clip, model: Any, budget: int | None) -> None:
        """Undefined, with the reason, where frames or the tower do not allow it."""
        if clip.video is None:
            row.note("the shards hold features: frames cannot be made smaller")
        elif why := model.cannot_downsample():
            row.note(why)
        else:
            self._ask(row, clip, model, budget)

    def _reduced(self, name: str, seed: int) -> Any:
        """A reducer, one for all batches: `downsample` loads its tower for each size, which is no part of its time."""
        if (name, seed) not in self.reduced:
            self.reduced[name, seed] = reduced_model(self.base, name, seed=seed)
        return self.reduced[name, seed]

    def _lengths(self, rows: dict[tuple[str, int | None], AnswerRow]) -> dict[str, Any] | None:
        """Rows of the same total elsewhere, after the free lengths of all clips are known; what is said of them."""
        assert self.observed is not None
        free, found, spent = self.observed.lengths, {}, {}
        if not free:
            return None
        for name, lengths in controlled(free, seed=self.seed).items():
            model, row = Imposed(self.model, lengths), AnswerRow(name, None)
            for clip in self._clips():
                self._ask(row, self._seen(clip, self.model)[0], model, None)
            rows[name, None] = row
            found[name], spent[name] = paired(rows[self.family, None], row, seed=self.seed), model.lengths
            lost = sum(map(sum, free.values())) - sum(map(sum, model.lengths.values()))
            if lost:
                row.note(f"not of the same total: model.max_tokens cut {lost} words of clips that were given more")
        return judged(free, found, self.facts, seed=self.seed, spent=spent)

    def _menu(self, model: Any, features: Any) -> list[int | None]:
        """The budgets of every row, settled by the first clips; all tokens for a model that takes no budget."""
        if not model.any_budget:
            return [None]
        self.budgets = self.budgets or [budget for budget in model.budgets(features) if budget is not None]
        return list(self.budgets)

    def _seen(self, clip: Clip, model: Any) -> tuple[Clip, Any]:
        """The clip with the features of the model's tower, and these, made once for all rows that read them: with
        attention and keys where the reducers need these."""
        asked: dict[str, Any] = {}
        if self.full is not None and (model is self.full or self.one_tower):
            methods = [REDUCERS[name] for name in self.names if name in REDUCERS]
            layers = {each for m in methods if m.layers for each in attention_layers(self.full, m.layers)}
            if layers:
                asked["attention"] = sorted(layers)
                asked["attention_from"] = getattr(self.full.config, "attention_from", "all")
            if any(method.keys for method in methods):
                asked["keys"] = True
        features = model.features(clip, **asked)
        if features is None:  # texts
            return clip, features
        return with_features(model, clip, features), features

    def _share(self, row: AnswerRow, clip: Clip, method: str, total: int) -> None:
        """A total of the model, shared over segments by one method."""
        least = self.minima[total]
        model = Noted(allocated(self.model, method, minimum=least))
        shares = true_shares(self.model, clip, total=total, minimum=least) if method == TRUTH else None
        self._ask(row, clip, model, total, shares=shares)
        row.spent += answer_tokens(clip, model, self.model.segments(clip))

    def _ask(
        self, row: AnswerRow, clip: Clip, model: Any, budget: int | None, *, shares: torch.Tensor | None = None
    ) -> None:
        timed = Timed(model, clock_of(self.device)) if model is not None else None
        if timed is not None and math.isnan(row.compress_flops):
            row.compress_flops = compress_flops(model.model if isinstance(model, Noted) else model, clip, budget=budget)
            if row.method == "downsample":
                row.note("compress_flops, compress_seconds_per_clip: with its tower, which other rows share")
        found = self._answers(clip, timed, budget if shares is None else shares, self.max_new_tokens)
        row.answers += found
        if budget is not None and any(each.tokens < budget for each in found):
            row.note(f"clips that have fewer than {budget} tokens are given all of theirs")
        if timed is not None and found:  # without questions nothing was made
            row.compress_s += [timed.seconds / len(clip)] * len(clip)

    def _answers(self, clip: Clip, model: Any, budget: Budget | None, max_new_tokens: int) -> list[Answered]:
        return ask(
            self.llm,
            clip,
            model,
            template=self.template,
            budget=budget,
            timestamps=self.timestamps and model is not None,
            max_new_tokens=max_new_tokens,
            parts=self.parts,
        )

    # the table

    def _margins(self, rows: list[AnswerRow]) -> dict[str, Any]:
        if not self.minima:
            return {}
        return {"allocations": margins(rows, self.family, self.shares, self.minima, seed=self.seed)}

    def _ordered(self, rows: list[AnswerRow]) -> list[AnswerRow]:
        order = {"blind": 0, "full": 1, self.family: 2}
        return sorted(rows, key=lambda row: (order.get(row.method, 3), row.method, row.budget or 0))

    def _finish(self, rows: list[AnswerRow]) -> list[dict[str, Any]]:
        prompts = [round(row.positions) for row in rows if row.answers]
        costs = Costs(self.shape, self.no_shape, first_token_seconds(self.llm, prompts))
        full = next((row.accuracy for row in rows if row.method == "full"), math.nan)
        missing = [] if self.max_new_tokens else ["exact_match, f1: no answers were generated (--answers)"]
        missing += ["retained: there is no full-token row (--full)"] if self.full is None else []
        missing += [f"the LLM has the adapters that it learned with {self.family}"] if self.llm.adapted else []
        pooled = [f"{self.seeds} seeds, their answers pooled"]
        return [
            finish(row, full=full, costs=costs, seed=self.seed, notes=missing + pooled * _draws(row.method))
            for row in rows
        ]

    # what was said

    def show(self, result: dict[str, Any], *, fps: float | None, each: int = 2, most: int = 32) -> list[dict[str, Any]]:
        """Clips for the report, after `run`: those where the model is furthest ahead of the best reducers over all
        budgets, furthest behind, and some drawn at random; `each` of every sort.

        With their frames, where the shards hold them, and what the ends, the model and the best reducers make of each
        question, the LLM's own answer of up to `most` ids included.
        """
        tags = self._chosen(result, each)
        out: dict[str, dict[str, Any]] = {}
        with torch.inference_mode():
            for batch in self.val:
                for index, key in enumerate(batch.keys):
                    if key in tags:
                        clip = batch.rows(slice(index, index + 1)).to(self.device)
                        out[key] = self._shown(clip, result, fps=fps, most=most) | {"tags": [tags[key]]}
        return [out[key] for key in tags if key in out]

    def _chosen(self, result: dict[str, Any], each: int) -> dict[str, str]:
        """{key of a clip: why it is shown}."""
        found = result["per_question"]
        lead = dict.fromkeys(found["keys"], 0.0)
        for entry in result["versus"]:
            ours, theirs = (found["right"][name][str(entry["budget"])] for name in (self.family, entry["reducer"]))
            for key, a, b in zip(found["keys"], ours, theirs):
                lead[key] += (a or 0.0) - (b or 0.0)
        order = sorted(lead, key=lambda key: -lead[key])
        tags = {key: "the model is ahead" for key in order[:each] if lead[key] > 0}
        tags |= {key: "a reducer is ahead" for key in order[-each:] if lead[key] < 0}
        rest = [key for key in sorted(lead) if key not in tags]
        draw = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed))[:each].tolist()
        return tags | {rest[at]: "drawn at random" for at in draw}

    def _shown(self, clip: Clip, result: dict[str, Any], *, fps: float | None, most: int) -> dict[str, Any]:
        seen = clip.as_float() if clip.video is not None else clip
        ready, features = self._seen(seen, self.model)
        readers: list[tuple[str, int | None, Clip, Any]] = [("blind", 0, seen, None)]
        readers += [(self.family, budget, ready, self.model) for budget in self._menu(self.model, features)]
        if self.full is not None:
            other = ready if self.one_tower else self._seen(seen, self.full)[0]
            for entry in result["versus"]:
                name = entry["reducer"]
                if name != "downsample" or clip.video is not None:
                    made = self._reduced(name, self.seed)
                    readers.append((name, entry["budget"], seen if name == "downsample" else other, made))
            readers.append(("full", None, other, self.full))
        said = [self._answers(its, model, budget or None, most) for _, budget, its, model in readers]
        out: dict[str, Any] = {
            "key": clip.keys[0],
            "caption": (clip.text or [""])[0],
            "readers": [{"method": method, "budget": budget} for method, budget, _, _ in readers],
            "questions": [
                {
                    "type": one.type or "other",
                    "question": one.question,
                    "answer": one.answer,
                    "choices": one.choices,
                    "said": [
                        {"chosen": each[at].chosen, "right": each[at].right, "text": each[at].text,
                         "parts": each[at].parts}
                        for each in said
                    ],
                }
                for at, one in enumerate(said[0])
            ],
        }  # fmt: skip
        if clip.video is not None and clip.video.shape[1] == 3:
            frames = int(clip.frames()[0])
            video = clip.video if not clip.video.is_floating_point() else to_uint8(clip.video)
            out["original"] = video[0, :, :frames].permute(1, 2, 3, 0).contiguous()
            span = float(clip.times[0, frames - 1] - clip.times[0, 0]) if clip.times is not None and frames > 1 else 0.0
            out["fps"] = (frames - 1) / span if span > 0 else fps or 8.0
        return out


def attention_layers(model: Any, count: int) -> list[int]:
    """Blocks of the model's tower whose attention reducers follow, where its configuration names none: the last but
    one; of two, the middle one and the last."""
    named = list(getattr(model.config, "attention_layers", []))
    if len(named) >= count:
        return [model.block(layer) for layer in named]
    depth = model.tower.depth
    return [max(depth - 2, 0)] if count == 1 else [depth // 2, depth - 1]


def _draws(name: str) -> bool:
    return name in REDUCERS and REDUCERS[name].random


def reduced_model(full: Any, name: str, *, seed: int = 0) -> Any:
    """A training-free reducer on the projector of a model of family `reducer`: it shares the weights."""
    layers = attention_layers(full, REDUCERS[name].layers) if name in REDUCERS and REDUCERS[name].layers else []
    options: dict[str, Any] = {"seed": seed} if _draws(name) else {}
    options |= dict(zip(("layer",) if len(layers) == 1 else ("object_layer", "last_layer"), layers))
    made = reducing.Model(replace(full.config, method=name, options=options, attention_layers=layers))
    made.projector, made._tower = full.projector, full._tower
    return made.to(next(full.parameters()).device).eval()


def print_answers(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows for a terminal: methods by accuracy at each budget, then by kind of question.

    In two tables where the terminal is too narrow for one.
    """
    out = console or Console()
    title = f"{result['model']}: {result['clips']} clips of {result['shards'] or 'the given set'}"
    kinds = sorted({kind for row in result["rows"] for kind in row["by_type"]})
    whole = _answers_table(result, [*MAIN, *kinds], title)
    if Console(width=1000).measure(whole).maximum <= out.width:
        out.print(whole)
    else:
        out.print(_answers_table(result, MAIN, title))
        out.print(_answers_table(result, kinds, "by kind of question"))
    guess = next((row["chance"] for row in result["rows"] if row["chance"] is not None), None)
    out.print(f"per cent of questions; chance {_per_cent(guess)}; kept: of what all tokens gain over it", style="dim")
    for sentence in [*sentences(result), *told(result)]:
        out.print(sentence, highlight=False)


def _answers_table(result: dict[str, Any], headings: Sequence[str], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("method", "tokens", *headings):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in sorted(result["rows"], key=lambda row: (row["budget"] is None, row["budget"] or 0)):
        cells = {
            "accuracy": _per_cent(row["accuracy"]),
            "95 %": "-".join(f"{100 * bound:.0f}" for bound in row["accuracy_ci"] or ()) or "-",
            "kept": _per_cent(row["retained"]),
            "first token ms": "-" if row["ttft_ms"] is None else f"{row['ttft_ms']:.3g}",
        }
        cells |= {kind: _per_cent(row["by_type"].get(kind)) for kind in headings if kind not in cells}
        tokens = "-" if row["tokens_mean"] is None else f"{row['tokens_mean']:.0f}"  # of what could not be measured
        table.add_row(row["method"], tokens, *(cells[heading] for heading in headings))
    return table


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
