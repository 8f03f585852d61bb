"""`vtok compare BEFORE AFTER`: two models on the same held-out windows, and what the second forgot of an older corpus.

    own corpus (what AFTER was fine-tuned on)  --same windows--> BEFORE, AFTER --> a row for each number of tokens
    old corpus (what BEFORE was trained on)    --same windows--> BEFORE, AFTER --> the same: forgetting

Tokenizers are compared by PSNR, clip by clip; projectors before their language model by accuracy, question by question.
Differences are paired; intervals are 95 % percentile intervals of a bootstrap over videos. Windows, rate and size are
AFTER's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vtok.config import DataConfig
from vtok.evaluate import device_of, load_model, reader_of, results_folder, window_loader
from vtok.evaluation.answer_rows import interval, mean
from vtok.evaluation.evaluator import Evaluator
from vtok.evaluation.rows import SCHEMA, environment, without_nan
from vtok.loading import identify

OWN, OLD = "own", "old"


def compare(
    before: str,
    after: str,
    *,
    own: str = "",
    old: str = "",
    budgets: list[int] | None = None,
    clips: int | None = None,
    llm: str = "",
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """What compare.json holds.

    Args:
        before, after: run directories, exports or Hub repositories of one kind: tokenizers, or projectors of videos.
        own: held-out shards; "": the validation shards of `after`. old: those of the corpus from before; "": none.
        budgets: tokens; None: those of `after`'s eval.budgets, or 1, 4, 16 ... as far as both models go.
        clips: at most this many of each corpus. llm: of projectors; "": each model's own.
    Raises: ValueError for models of different kinds, compressors of texts, and where there is nothing to measure on.
    """
    made = [load_model(path) for path in (before, after)]
    models: list[Any] = [model for model, _, _ in made]
    _, data, settings = made[1]
    kinds = [_kind(model, path) for model, path in zip(models, (before, after))]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{before} is a {kinds[0]}, {after} a {kinds[1]}: two of one kind are compared")
    corpora = {OWN: own or data.val_shards, OLD: old}
    if not corpora[OWN]:
        raise ValueError(f"{after} says no validation shards: name them, --shards DIR")
    asked = list(budgets or settings.budgets) or None
    out = []
    for name, shards in corpora.items():
        if not shards:
            continue
        setting = "--shards" if name == OWN else "--old"
        scores: list[_Scores] = []
        for model, path in reversed(list(zip(models, (before, after)))):  # AFTER first: its budgets are asked of BEFORE
            val = _loader(data, shards, model, kinds[1], clips=clips, setting=setting)
            if kinds[1] == "tokenizer":
                menu = asked if not scores else [b for b in scores[0].values if b <= model.max_tokens]
                scores.append(
                    _of_tokenizer(model, val, menu, fps=data.fps, device=device, seed=seed, progress=progress)
                )
            else:
                menu = asked if not scores else [b for b in scores[0].values if b and b <= model.max_tokens]
                scores.append(_of_projector(model, path, val, menu, llm, device=device, seed=seed, progress=progress))
        out.append({"corpus": name, "shards": shards, "clips": scores[0].clips,
                    "rows": _rows(scores[1], scores[0], seed=seed)})  # fmt: skip
    return without_nan(
        {
            "schema": SCHEMA,
            "kind": kinds[1],
            "measure": "psnr_db" if kinds[1] == "tokenizer" else "accuracy",
            "before": {"name": before, "model_id": identify(models[0]).model_id},
            "after": {"name": after, "model_id": identify(models[1]).model_id},
            "environment": environment(torch.device(device), seed=seed),
            "corpora": out,
        }
    )


def _kind(model: Any, path: str) -> str:
    if getattr(model.config, "source", "") == "text":
        raise ValueError(f"{path} compresses texts: measure both with `vtok eval` on the same shards")
    return "tokenizer" if hasattr(model, "decode") else "projector"


def _loader(data: DataConfig, shards: str, model: Any, kind: str, *, clips: int | None, setting: str) -> Any:
    tower = (lambda: model.tower) if kind == "projector" else None
    ears = getattr(model, "ears", None)
    return window_loader(data, shards, clips=clips, setting=setting, tower=tower, audio=lambda: ears)


@dataclass
class _Scores:
    """Of one model on one corpus. values: budget -> {what was measured, its clip first: score}. rows: budget -> the
    model's row of eval.json. videos: of each clip."""

    clips: int
    values: dict[Any, dict[tuple[str, ...], float]]
    rows: dict[Any, dict[str, Any]]
    videos: dict[str, str]


def _of_tokenizer(model: Any, val: Any, budgets: list[int] | None, **how: Any) -> _Scores:
    evaluator = Evaluator(model, val=val, budgets=budgets or (), controls=(), **how)
    result = evaluator.run()
    keys, found = result["per_clip"]["keys"], result["per_clip"]["psnr_db"][evaluator.family]
    values = {int(name): {(key,): score for key, score in zip(keys, column) if score is not None}
              for name, column in found.items()}  # fmt: skip
    rows, videos = {row["budget"]: row for row in result["rows"]}, dict(zip(keys, result["per_clip"]["videos"]))
    return _Scores(result["clips"], values, rows, videos)


def _of_projector(model: Any, path: str, val: Any, budgets: list[int] | None, llm: str, **how: Any) -> _Scores:
    from vtok.evaluation.answering import AnsweringEvaluator
    from vtok.llm.tasks import first_prompt

    objective, reader = reader_of(path, llm=llm)
    evaluator = AnsweringEvaluator(
        model,
        reader,
        val=val,
        template=first_prompt(objective.tasks, "qa"),
        timestamps=objective.timestamps,
        budgets=budgets or (),
        **how,
    )
    result = evaluator.run()
    found = result["per_question"]
    asked = _numbered(zip(found["keys"], found["ids"]))
    values = {
        None if name == "-" else int(name): {
            question: right for question, right in zip(asked, column) if right is not None
        }
        for name, column in found["right"][evaluator.family].items()
    }
    rows = {row["budget"]: row for row in result["rows"] if row["method"] == evaluator.family}
    return _Scores(result["clips"], values, rows, dict(zip(found["keys"], found["videos"])))


def _numbered(questions: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """(clip, id, which of the clip's questions of that id): questions need no id, nor one of their own."""
    seen = Counter[tuple[str, str]]()
    out = []
    for question in questions:
        out.append((*question, str(seen[question])))
        seen[question] += 1
    return out


def _rows(before: _Scores, after: _Scores, *, seed: int) -> list[dict[str, Any]]:
    """A row for each budget of both. difference: after minus before, over what both were measured on."""
    out = []
    for budget in [budget for budget in after.values if budget in before.values]:
        old, new = before.values[budget], after.values[budget]
        both = [each for each in new if each in old]
        differences = [new[each] - old[each] for each in both]
        row = {
            "budget": budget,
            "tokens_mean": after.rows[budget]["tokens_mean"],
            "before": mean([old[each] for each in both]),
            "after": mean([new[each] for each in both]),
            "difference": mean(differences),
            "difference_ci": interval(differences, [after.videos[each[0]] for each in both], seed=seed),
            "measured": len(both),
        }
        for key in ("ssim", "bits_mean"):
            if key in after.rows[budget]:
                row |= {f"{key}_before": before.rows[budget][key], f"{key}_after": after.rows[budget][key]}
        out.append(row)
    return out


def print_comparison(result: dict[str, Any], console: Console | None = None) -> None:
    """One table: each corpus, each number of tokens, before and after."""
    scale, unit, places = (1.0, "PSNR in dB", 2) if result["measure"] == "psnr_db" else (100.0, "per cent right", 1)
    table = Table(
        title=f"{result['before']['name']} -> {result['after']['name']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    with_ssim = any("ssim_after" in row for each in result["corpora"] for row in each["rows"])
    for heading in ("corpus", "tokens", "before", "after", "difference", "95 %", *(["SSIM"] * with_ssim)):
        table.add_column(heading, justify="left" if heading == "corpus" else "right", no_wrap=True)

    def number(value: float | None, *, sign: str = "") -> str:
        return "-" if value is None else f"{scale * value:{sign}.{places}f}"

    for each in result["corpora"]:
        for row in each["rows"]:
            bounds = " to ".join(number(bound, sign="+") for bound in row["difference_ci"] or ()) or "-"
            cells = [each["corpus"], f"{row['tokens_mean']:.0f}", number(row["before"]), number(row["after"])]
            cells += [number(row["difference"], sign="+"), bounds]
            if with_ssim:
                both = [row.get(key) for key in ("ssim_before", "ssim_after")]
                cells.append(" -> ".join("-" if value is None else f"{value:.3f}" for value in both))
            table.add_row(*cells)
        table.add_section()
    out = console or Console()
    out.print(table)
    told = "; ".join(f"{each['corpus']}: {each['clips']} clips of {each['shards']}" for each in result["corpora"])
    out.print(f"{unit}; {told}", style="dim", highlight=False)
    if all(each["corpus"] != OLD for each in result["corpora"]):
        out.print("forgetting was not measured: name the corpus from before, --old DIR", style="dim")


def main(argv: list[str] | None = None) -> int:
    """`vtok compare BEFORE AFTER [options]`: writes compare.json, prints the table."""
    parser = argparse.ArgumentParser(
        prog="vtok compare",
        description="Two models on the same held-out windows, such as before and after fine-tuning.",
    )
    parser.add_argument("before", help="run directory, export folder or Hub repository")
    parser.add_argument("after", help="the same, which learned more")
    parser.add_argument("--shards", default="", help="held-out shards; default: validation shards of AFTER")
    parser.add_argument("--old", default="", help="held-out shards of the corpus from before: what was forgotten")
    parser.add_argument("--budgets", help="tokens, e.g. 1,4,16; default: those of AFTER")
    parser.add_argument("--clips", type=int, help="at most this many clips of each corpus")
    parser.add_argument("--llm", default="", help="projectors: frozen language model; default: the one of each model")
    parser.add_argument(
        "--out", type=Path, help="where to write; default: AFTER/eval of a run; of an export ./eval/NAME"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(argv)
    result = compare(
        options.before,
        options.after,
        own=options.shards,
        old=options.old,
        budgets=[int(part) for part in options.budgets.split(",")] if options.budgets else None,
        clips=options.clips,
        llm=options.llm,
        device=device_of(options.device),
        seed=options.seed,
        progress=not options.no_progress,
    )
    out = results_folder(options.out, Path(options.after))
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print_comparison(result)
    print(f"table   {out / 'compare.json'}")
    return 0
