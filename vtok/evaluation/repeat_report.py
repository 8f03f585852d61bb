"""A self-contained report.html of a compressor of texts: curves by ratio, what was said again, every row.

    eval.json rows, versus --> sentences, chart()s, tables ---+--> report.html (no network, no other file)
    texts with what each method said again ---> tables -------+

The shell is page.py; texts come from `RepeatingEvaluator.examples`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from vtok.evaluation.answer_rows import points, range_of
from vtok.evaluation.charts import Level, Series, chart, legend
from vtok.evaluation.page import (
    Column,
    environment_section,
    history_section,
    interval,
    methods,
    number,
    per_cent,
    scrolled,
    signed,
    table,
    write_page,
)
from vtok.evaluation.repeating import missed

ENDS = {"blind": "blind", "words": "every word"}  # rows without a ratio of their own


def told(evaluation: Mapping[str, Any]) -> list[str]:
    """A sentence a ratio: whether the compressor leads what it is held against."""
    family, out = evaluation.get("family"), []
    reached = {row["ratio"]: row["words_per_token"] for row in evaluation.get("rows") or [] if row["method"] == family}
    by_ratio: dict[float, list[Mapping[str, Any]]] = {}
    for each in evaluation.get("versus") or []:
        by_ratio.setdefault(each["ratio"], []).append(each)
    for ratio, gaps in sorted(by_ratio.items()):
        beaten = [f"{points(x['difference'])}{range_of(x['difference_ci'])} against {x['against']}" for x in gaps]
        ahead = [x["winner"] for x in gaps]
        verdict = "leads" if all(x == family for x in ahead) else "does not lead everything"
        got = reached.get(ratio)
        came = f" (these texts came to {got:.1f})" if missed(ratio, got) else ""
        out.append(f"{ratio:g} words a token{came}, F1 of what is said again: {family} {verdict}: {', '.join(beaten)}.")
    return out


def write_repeat_report(
    evaluation: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write one html file that shows the evaluation of a compressor of texts; returns its path.

    Args:
        evaluation: the content of eval.json, as `vtok.evaluation.repeating.RepeatingEvaluator.run` gives it.
        examples: its `examples`. title: heading; the model's name otherwise. history: the lines of metrics.jsonl.
    """
    rows = [dict(row) for row in evaluation.get("rows") or []]
    family = str(evaluation.get("family") or "")
    return write_page(
        path,
        title=title or f"{evaluation.get('model') or 'vtok'}: evaluation",
        lede=_lede(evaluation, family),
        tiles=_tiles(evaluation, rows, family),
        first="says",
        sections=[
            _says_section(evaluation),
            _plot_section(rows, family),
            _places_section(rows, family),
            _table_section(rows, family),
            _examples_section(examples, family),
            history_section(history or []),
            environment_section(evaluation, without=("versus",)),
        ],
        clips=[],
        scripts=("charts.js",),
        max_bytes=20_000_000,
    )


def _lede(evaluation: Mapping[str, Any], family: str) -> str:
    llm = evaluation.get("llm") or {}
    count, words = evaluation.get("clips") or 0, evaluation.get("words_mean") or 0.0
    text = f"The {family} compressor on {count:,} texts of {words:.0f} words on average"
    text += f" from {evaluation['shards']}" if evaluation.get("shards") else ""
    text += f", read by {llm['name']}, which is frozen" if llm.get("name") else ""
    text += f" (sha256 {llm['sha256'][:12]})" if llm.get("sha256") else ""
    return html.escape(
        f"{text}. Truncation keeps a text's first words, mean_pool sums runs of its words: as many tokens."
    )


def _tiles(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """One tile a ratio: F1 of what is said again, and the distance from the better control."""
    tiles = []
    for row in sorted((r for r in rows if r["method"] == family), key=lambda r: r["ratio"]):
        bounds = interval(row, "token_f1")
        gaps = [x for x in evaluation.get("versus") or [] if x["ratio"] == row["ratio"]]
        lines = [f"{per_cent(bounds[0])} to {per_cent(bounds[1])}"] if bounds else []
        if gaps:
            least = min(gaps, key=lambda x: x["difference"])
            gap = signed(100 * least["difference"], ".1f")
            lines.append(f"<b>{gap}</b> against {html.escape(least['against'])}")
        below = "".join(f'<span class="rate">{line}</span>' for line in lines)
        tiles.append(
            f'<li><span class="tokens">{row["ratio"]:g} words a token</span>'
            f'<span class="value">{per_cent(row["token_f1"])} <small>F1</small></span>{below}</li>'
        )
    return f'<ul class="tiles" aria-label="F1 at each ratio">{"".join(tiles)}</ul>' if tiles else ""


def _says_section(evaluation: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in told(evaluation))
    return f"""<section id="says" aria-labelledby="says-title"><h2 id="says-title">What the table says</h2>
<ul class="says">{items}</ul><p class="note">Differences are paired, text by text; their 95 % intervals are of a
bootstrap over texts.</p></section>"""


def _series(rows: Sequence[Mapping[str, Any]], family: str, key: str) -> list[Series]:
    out = []
    for at, name in enumerate(methods(rows, family, without=ENDS)):
        marks, whiskers = [], []
        for row in rows:
            value = number(row.get(key))
            if row["method"] != name or value is None:
                continue
            bounds = interval(row, key)
            text = f"{name}, {row['ratio']:g} words a token ({_reached(row)}{row['tokens_mean']:.1f} tokens)"
            text += f": {per_cent(value)} %"
            text += f" (95 %: {per_cent(bounds[0])} to {per_cent(bounds[1])})" if bounds else ""
            marks.append((row["ratio"], 100 * value, text))
            whiskers += [(row["ratio"], 100 * bounds[0], 100 * bounds[1])] if bounds else []
        out.append(Series(name, sorted(marks), at, ours=name == family, whiskers=tuple(whiskers)))
    return out


def _reached(row: Mapping[str, Any]) -> str:
    got = number(row.get("words_per_token"))
    return "" if got is None else f"{got:.1f} reached, "


def _levels(rows: Sequence[Mapping[str, Any]], count: int, key: str) -> list[Level]:
    found = {row["method"]: number(row.get(key)) for row in rows}
    return [
        Level(name, 100 * value, count + at, f"{name}: {per_cent(value)} %")
        for at, (method, name) in enumerate(ENDS.items())
        if (value := found.get(method)) is not None
    ]


def _plot_section(rows: Sequence[Mapping[str, Any]], family: str) -> str:
    names = {
        "token_f1": "F1 of what is said again",
        "position_accuracy": "word after word, those before given",
        "correct_prefix": "said before the first error",
        "accuracy": "questions answered",
    }
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] and row["method"] == family})
    figures = []
    for key, name in names.items():
        series = _series(rows, family, key)
        if any(s.points for s in series):
            drawn = chart(
                series, x_title="words a token (log)", y_title="%", log_x=True, x_ticks=ratios,
                levels=_levels(rows, len(series), key),
            )  # fmt: skip
            figures.append(f"<figure><figcaption>{name}</figcaption>{drawn}</figure>")
    if not figures:
        return ""
    return f"""<section id="ratios" aria-labelledby="ratios-title"><h2 id="ratios-title">By compression ratio</h2>
<p class="note">A ratio is words of the language model for each token it reads in their place, as asked; the table has
what texts of their length came to. Dotted: the model blind,
and with every word. Bars are 95 % intervals over texts. Point at a mark for its numbers; choose a name to hide it.</p>
{legend(_series(rows, family, "token_f1"))}<div class="charts">{"".join(figures)}</div></section>"""


def _places_section(rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """Accuracy along the text, a chart a ratio."""
    names, figures = methods(rows, family, without=ENDS), []
    for ratio in sorted({row["ratio"] for row in rows if row["ratio"] and row["method"] == family}):
        series = []
        for at, name in enumerate(names):
            row = next((r for r in rows if r["method"] == name and r["ratio"] == ratio), None)
            places = [number(value) for value in (row or {}).get("accuracy_by_place") or []]
            marks = [
                (10.0 * (n + 1) - 5, 100 * value, f"{name}, tenth {n + 1}: {per_cent(value)} %")
                for n, value in enumerate(places)
                if value is not None
            ]
            series.append(Series(name, marks, at, ours=name == family))
        drawn = chart(series, x_title="place in the text, %", y_title="right words, %")
        figures.append(f"<figure><figcaption>{ratio:g} words a token</figcaption>{drawn}</figure>")
    if not figures:
        return ""
    return f"""<section id="places" aria-labelledby="places-title"><h2 id="places-title">Along the text</h2>
<p class="note">Word after word with those before given, by tenths of the text. Compressed texts are forgotten from
their end; truncation has nothing to say of it.</p>{legend(_series(rows, family, "token_f1"))}
<div class="charts">{"".join(figures)}</div></section>"""


def _table_section(rows: Sequence[Mapping[str, Any]], family: str) -> str:
    columns = [
        Column("method", "method", "s"),
        Column("ratio", "words a token", "g"),
        Column("words_per_token", "reached", ".1f"),
        Column("tokens_mean", "tokens", ".1f"),
        Column("token_f1", "F1 %", per_cent, "token_f1_ci"),
        Column("exact_match", "exact %", per_cent),
        Column("correct_prefix", "before the first error %", per_cent),
        Column("position_accuracy", "word by word %", per_cent, "position_accuracy_ci"),
        Column("loss", "loss, nats", ".3f"),
        Column("accuracy", "questions %", per_cent),
    ]
    order = sorted(rows, key=lambda row: (row["ratio"] is None, row["ratio"] or 0, row["method"] != family))
    shown = table(order, columns, ours=family)
    return f"""<section id="table" aria-labelledby="table-title"><h2 id="table-title">Every row</h2>
<p class="note">Below a share its 95 % interval over texts. Choose a heading to sort.</p>
{scrolled(shown, labelled_by="table-title")}</section>"""


def _examples_section(examples: Sequence[Mapping[str, Any]], family: str) -> str:
    if not examples:
        return ""
    shown = "".join(_example(each, family) for each in examples)
    return f"""<section id="texts" aria-labelledby="texts-title"><h2 id="texts-title">Said again</h2>
<p class="note">The first texts, greedy. Bold: words in the order of the text.</p>{shown}</section>"""


def _example(example: Mapping[str, Any], family: str) -> str:
    text = str(example["text"])
    lines = []
    for each in sorted(example["said"], key=lambda x: (x["ratio"] or 1e9, x["method"] != family)):
        ratio = "" if each["method"] in ENDS else f"{each['ratio']:g} words a token"
        name = ", ".join(part for part in (ENDS.get(each["method"], each["method"]), ratio) if part)
        ours = " class=ours" if each["method"] == family else ""
        lines.append(f"<tr{ours}><td>{html.escape(name)}</td><td>{_matched(text, str(each['text']))}</td></tr>")
    return f"""<div class="asked"><figure><figcaption><b>{html.escape(text)}</b>
<small>{html.escape(str(example["key"]))}</small></figcaption></figure>
<div class="scroll"><table><tbody>{"".join(lines)}</tbody></table></div></div>"""


def _matched(text: str, said: str) -> str:
    """What was said, its words that follow the text's order in bold."""
    words = said.split()
    blocks = SequenceMatcher(a=text.split(), b=words, autojunk=False).get_matching_blocks()
    kept = {block.b + n for block in blocks for n in range(block.size)}
    return " ".join(f"<b>{html.escape(w)}</b>" if at in kept else html.escape(w) for at, w in enumerate(words))
