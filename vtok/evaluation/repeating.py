"""A compressor of texts before a frozen LLM, by compression ratio, beside what costs nothing: truncation and pooling.

    text --r words a token--> tokens --LLM, "Repeat the text:"--> its words again; --LLM, "Question: ..."--> answers

    1. the LLM blind, and with every word of the text: the two ends that everything else lies between
    2. at each ratio the compressor, the text's first words, and means of runs of its words, all as many tokens
    3. how well the text is repeated (greedy, and word after word with those before given), and questions answered

A ratio is words of the LLM's own tokenizer for each token that it reads in their place: what was asked (`ratio`), and
what texts of their length came to (`words_per_token`), since a text has one token at least. Intervals are 95 %
percentile intervals of a bootstrap over texts. What is undefined is null, and the row's `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vtok.evaluation.rows import SCHEMA, bootstrap, environment, leader, without_nan
from vtok.llm import FrozenLLM, ask, generate, read
from vtok.llm.text_objective import tokens_at_ratio
from vtok.llm.words import count_words, first_words, mean_words, words_as_tokens
from vtok.metrics.text import by_place, correct_prefix, sequence_f1
from vtok.progress import counting_bar
from vtok.types import Budget, Clip, Tokens

RATIOS = (5.0, 10.0, 20.0, 40.0)
PLACES = 10  # stretches of a text, whose accuracies are told one by one
CONTROLS = ("truncation", "mean_pool")
NEAR = 0.1  # how far the words a token that texts come to may be from those asked before a row says so
EXAMPLES = 6  # texts that are shown with what was said again


@dataclass
class RepeatRow:
    """Every text of one (method, ratio), in order."""

    method: str
    ratio: float | None
    tokens: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    prefix: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    places: Tensor = field(default_factory=lambda: torch.zeros(2, PLACES, dtype=torch.float64))
    notes: list[str] = field(default_factory=list)


class _Made:
    """Tokens at hand, for whoever would make them."""

    reads_prompt = False

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        return self.tokens


class RepeatingEvaluator:
    """Measures one compressor of texts; `run()` gives the content of eval.json.

    Args:
        model: compresses `Clip.text`, in eval mode. llm: the frozen language model it was trained for.
        val: batches of texts, read once. repeat, question: the prompts, with "<video>" and "{question}".
        ratios: words a token. most_words: of what is said again; 0 = as many as the text has, and a few.
    Attributes:
        examples: of the last run, the first texts with what every method said again.
    """

    def __init__(
        self,
        model: Any,
        llm: FrozenLLM,
        *,
        val: Iterable[Clip],
        repeat: str,
        question: str = "",
        ratios: Sequence[float] = RATIOS,
        most_words: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not ratios or any(ratio < 1 for ratio in ratios):
            raise ValueError(f"ratios={list(ratios)}: words a token, 1 or more")
        self.device = torch.device(device)
        self.model, self.llm = model.to(self.device).eval(), llm.to(self.device)
        self.family = str(model.config.name).rpartition(".")[2]
        self.val, self.repeat, self.question = val, repeat, question
        self.ratios, self.most_words, self.seed = sorted(set(ratios)), most_words, seed
        self.bar = counting_bar(show=progress)
        self.examples: list[dict[str, Any]] = []

    def run(self, *, model: str = "", shards: str = "") -> dict[str, Any]:
        """Every row of every method. model, shards: what the table says they are."""
        rows: dict[tuple[str, float | None], RepeatRow] = {}
        texts, words, self.examples = 0, 0, []
        with self.bar, torch.inference_mode():
            total = len(self.val) if hasattr(self.val, "__len__") else None  # type: ignore[arg-type]
            task = self.bar.add_task("texts", total=total)
            for batch in self.val:
                if batch.text is None:
                    raise ValueError("the clips have no texts: data.texts=true, and shards of texts")
                texts, words = texts + len(batch), words + sum(count_words(self.llm, batch.text))
                self._batch(batch, rows)
                self.bar.advance(task)
        if not texts:
            raise ValueError("there is no text to measure on")
        return without_nan(
            {
                "schema": SCHEMA,
                "model": model,
                "family": self.family,
                "shards": shards,
                "clips": texts,
                "words_mean": words / texts,
                "llm": self.llm.identity(),
                "environment": environment(self.device, seed=self.seed),
                "rows": [self._finish(row, words=words / texts) for row in rows.values()],
                "versus": self._versus(rows),
            }
        )

    def _batch(self, clip: Clip, rows: dict[tuple[str, float | None], RepeatRow]) -> None:
        texts = clip.text or []
        room = EXAMPLES - len(self.examples)
        new = [{"key": key, "text": text, "said": []} for key, text in zip(clip.keys[:room], texts)]
        self.examples += new

        def add(method: str, ratio: float | None, tokens: Tokens | None) -> RepeatRow:
            row = rows.setdefault((method, ratio), RepeatRow(method, ratio))
            for example, said in zip(new, self._one(row, clip, tokens)):
                example["said"].append({"method": method, "ratio": ratio, "text": said})
            return row

        words = words_as_tokens(self.llm, texts)
        add("blind", None, None)
        add("words", 1.0, words)
        for ratio in self.ratios:
            asked = tokens_at_ratio(words.lengths.tolist(), ratio, most=self.model.max_tokens)
            tokens = self.model.encode(Clip(clip.keys, text=texts), budget=asked)
            counts = tokens.lengths.to(words.lengths.device)
            own = add(self.family, ratio, tokens)
            if bool((tokens.lengths.cpu() < asked).any()) and not own.notes:
                own.notes.append("some texts would have more tokens at this ratio than the model gives")
            add("truncation", ratio, first_words(words, counts))
            add("mean_pool", ratio, mean_words(words, counts))

    def _one(self, row: RepeatRow, clip: Clip, tokens: Tokens | None) -> list[str]:
        """Measures a batch; what was said again."""
        texts, prompts = clip.text or [], [self.repeat] * len(clip)
        row.tokens += tokens.lengths.tolist() if tokens is not None else [0.0] * len(clip)
        seen = read(self.llm, prompts, texts, tokens)
        hits = (seen.logits.argmax(-1) == seen.labels).double()
        row.nll += seen.means(seen.nll()).tolist()
        row.hits += seen.means(hits).tolist()
        row.places += by_place(hits, seen.row, parts=PLACES).cpu()
        most = [self.most_words or count + 8 for count in count_words(self.llm, texts)]
        said = generate(self.llm, prompts, tokens, max_new_tokens=most)
        for answer, text in zip(said, texts):
            one, other = (
                self.llm.tokenizer(part.strip(), add_special_tokens=False).input_ids for part in (answer, text)
            )
            row.f1.append(sequence_f1(one, other))
            row.exact.append(float(answer.strip() == text.strip()))
            row.prefix.append(correct_prefix(one, other))
        if self.question and clip.qa:
            made = _Made(tokens) if tokens is not None else None
            answered = ask(self.llm, Clip(clip.keys, qa=clip.qa), made, template=self.question)
            row.right += [float(each.right) for each in answered if each.right is not None]
        return said

    def _versus(self, rows: dict[tuple[str, float | None], RepeatRow]) -> list[dict[str, Any]]:
        """At each ratio, F1 of what is said again, the compressor's minus each control's, paired text by text."""
        out = []
        for ratio in self.ratios:
            ours = rows[self.family, ratio]
            for method in CONTROLS:
                other = rows[method, ratio]
                gap = torch.tensor(ours.f1, dtype=torch.float64) - torch.tensor(other.f1, dtype=torch.float64)
                bounds = bootstrap(gap, seed=self.seed)
                entry = {"ratio": ratio, "against": method, "difference": float(gap.mean()), "difference_ci": bounds}
                out.append({**entry, "texts": len(gap), "winner": leader(bounds, self.family, method)})
        return out

    def _finish(self, row: RepeatRow, *, words: float) -> dict[str, Any]:
        """words: of a text, on average."""
        places = (row.places[0] / row.places[1]).tolist()
        tokens = _mean(row.tokens)
        reached = words / tokens if tokens else math.nan
        notes = list(row.notes)
        if missed(row.ratio, reached):
            notes.append(f"{row.ratio:g} words a token were asked, these texts came to {reached:.1f}")
        notes += [] if row.right else ["accuracy: the texts have no questions with choices"]
        return {
            "method": row.method,
            "ratio": row.ratio,
            "budget": None,
            "texts": len(row.f1),
            "tokens_mean": tokens,
            "words_per_token": reached,
            "token_f1": _mean(row.f1),
            "token_f1_ci": bootstrap(torch.tensor(row.f1, dtype=torch.float64), seed=self.seed),
            "exact_match": _mean(row.exact),
            "correct_prefix": _mean(row.prefix),
            "position_accuracy": _mean(row.hits),
            "position_accuracy_ci": bootstrap(torch.tensor(row.hits, dtype=torch.float64), seed=self.seed),
            "accuracy_by_place": places,
            "loss": _mean(row.nll),
            "questions": len(row.right),
            "accuracy": _mean(row.right),
            "note": "; ".join(notes) or None,
        }


def missed(asked: float | None, reached: float | None) -> bool:
    """Whether words a token are not near those that were asked; not where either is unknown."""
    return asked is not None and reached is not None and abs(reached / asked - 1) > NEAR


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def print_repeats(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows for a terminal, ratio after ratio."""
    title = f"{result['model']}: {result['clips']} texts of {result['words_mean']:.0f} words on average"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    headings = ("ratio", "got", "tokens", "F1", "95 %", "exact", "prefix", "by word", "begin..end", "asked")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(result["rows"], key=lambda row: row["ratio"] or math.inf):
        interval = "-".join(f"{100 * bound:.0f}" for bound in row["token_f1_ci"] or ())
        places = row["accuracy_by_place"]
        table.add_row(
            row["method"],
            "-" if row["ratio"] is None else f"{row['ratio']:g}",
            "-" if row["words_per_token"] is None else f"{row['words_per_token']:.1f}",
            f"{row['tokens_mean']:.1f}",
            *(_per_cent(row["token_f1"]), interval or "-"),
            *(_per_cent(row[name]) for name in ("exact_match", "correct_prefix", "position_accuracy")),
            f"{_per_cent(places[0])}..{_per_cent(places[-1])}",
            _per_cent(row["accuracy"]),
        )
    out = console or Console()
    out.print(table)
    out.print(
        "per cent; ratio: words a token asked, got: reached; F1, exact, prefix (before an error): said again",
        style="dim",
    )
    out.print("by word: those before given; begin..end: the first and last tenth; asked: questions", style="dim")
    for row in result["rows"]:
        if row["method"] == result["family"] and missed(row["ratio"], row["words_per_token"]):
            out.print(
                f"note: {row['ratio']:g} words a token were asked, these texts came to {row['words_per_token']:.1f}"
            )


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
