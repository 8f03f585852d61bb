"""A self-contained report.html of a projector's evaluation: who wins, accuracy by tokens, costs, answers beside frames.

    eval.json rows, versus, benchmark --> sentences, chart()s, tables ---+
    metrics.jsonl -------chart()--> training curves ---------------------+--> report.html (no network, no other file)
    clips [T, H, W, 3] with answers --sprite()--> playing frames --------+

The shell is page.py, the frames are sprites.py, what is told of the rows answer_rows.py.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.evaluation import allocations
from vtok.evaluation.answer_rows import ENDS, sentences
from vtok.evaluation.charts import Level, Series, chart, legend
from vtok.evaluation.page import (
    NONE,
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
    tokens_text,
    write_page,
)
from vtok.evaluation.sprites import stored, told

DODGE = 0.016  # decades between two methods at one budget, so that their intervals stand beside one another


def _si(value: float, unit: str = "") -> str:
    """3 digits with a prefix: 12.3 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


NAMED = [
    Column("method", "method", "s"),
    Column("budget", "budget", "g"),
    Column("tokens_mean", "tokens", ",.5g"),
]
SCORES = [
    Column("accuracy", "accuracy %", per_cent, "accuracy_ci"),
    Column("retained", "kept %", per_cent),
    Column("loss", "loss", ".3f"),
]
WORDS = [Column("exact_match", "exact match %", per_cent), Column("f1", "F1 %", per_cent)]
COSTS = [
    Column("positions_mean", "prompt positions", ",.1f"),
    Column("prefill_flops", "prefill FLOPs", _si),
    Column("kv_bytes", "KV cache", lambda value: _si(value, "B")),
    Column("ttft_ms", "first token ms", ",.3g"),
    Column("compress_flops", "compressor FLOPs", _si),
    Column("compress_seconds_per_clip", "compressor ms", lambda value: f"{1000 * value:,.3g}"),
    Column("parts_positions_mean", "positions of parts", ",.5g"),
    Column("parts_seconds_per_question", "parts ms", lambda value: f"{1000 * value:,.3g}"),
]


def write_answer_report(
    evaluation: Mapping[str, Any],
    clips: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    max_bytes: int = 20_000_000,
) -> Path:
    """Write one html file that shows the evaluation of a projector; returns its path.

    Args:
        evaluation: the content of eval.json, as `vtok.evaluation.answering.AnsweringEvaluator.run` gives it.
        clips: as its `show` gives them; "original" uint8 [T, H, W, 3] and "fps" where there are frames.
        title: heading; the model's name otherwise. history: the lines of metrics.jsonl, drawn as training curves.
        max_bytes: above this size the frames are stored as lossy WebP, and the page says so.
    Raises: ValueError when a clip's frames are not uint8 [T, H, W, 3], or its fps is not positive.
    """
    rows = [dict(row) for row in evaluation.get("rows") or []]
    family = str(evaluation.get("family") or "")
    kept, exact = stored([dict(clip) for clip in clips if "original" in clip], max_bytes=max_bytes)
    return write_page(
        path,
        title=title or f"{evaluation.get('model') or 'vtok'}: evaluation",
        lede=_lede(evaluation, rows, family),
        tiles=_tiles(evaluation, rows, family),
        first="says" if evaluation.get("benchmark") else "table",
        sections=[
            _says_section(evaluation),
            _plot_section(rows, family),
            _table_section(evaluation, rows, family),
            _answers_section(clips, kept, exact, family),
            history_section(history or []),
            environment_section(evaluation, without=("benchmark", "versus", "per_question")),  # eval.json holds them
        ],
        clips=kept,
        scripts=("frames.js", "answers.js", "charts.js"),
        max_bytes=max_bytes,
    )


def _name(method: str) -> str:
    return {"full": "all tokens"}.get(method, method)


def stands_on(evaluation: Mapping[str, Any]) -> str:
    """What the reducers of a table stand on, in words."""
    tuned = evaluation.get("tuned")
    return f"the projector of {tuned}, trained as long" if tuned else "the projector of all tokens"


def _lede(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], family: str) -> str:
    clips, shards = evaluation.get("clips"), evaluation.get("shards")
    asked = next((row["questions"] for row in rows if row["method"] == "blind"), None)
    words = [
        f"{asked:,} questions about" if asked else "",
        f"{clips:,} clips" if isinstance(clips, int) else "its clips",
    ]
    words += [f"from {shards}"] if shards else []
    llm = (evaluation.get("llm") or {}).get("name")
    text = f"The {family} projector measured on {' '.join(w for w in words if w)}"
    adapted = (evaluation.get("llm") or {}).get("adapters_sha256")
    text += f", read by {llm}, {'with the adapters that it learned' if adapted else 'which is frozen'}" if llm else ""
    others = [name for name in methods(rows, family, without=ENDS) if name != family]
    text += f"; beside it, on the same clips and {stands_on(evaluation)}: {', '.join(others)}." if others else "."
    parts = evaluation.get("parts")
    text += f" Every clip was asked in {parts['count']} parts first." if parts else ""
    return html.escape(text)


def _tiles(evaluation: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], family: str) -> str:
    """One tile a budget of the model: accuracy, what it keeps, its distance from the best reducer."""
    against = {entry["budget"]: entry for entry in evaluation.get("versus") or []}
    tiles = []
    for row in rows:
        accuracy = number(row.get("accuracy"))
        if row["method"] != family or accuracy is None:
            continue
        bounds, kept = interval(row, "accuracy"), number(row.get("retained"))
        below = f"{per_cent(bounds[0])} to {per_cent(bounds[1])}" if bounds else ""
        below += f"; keeps {100 * kept:.0f} %" if kept is not None else ""
        lines = [f'<span class="rate">{below}</span>'] if below else []
        if entry := against.get(row["budget"]):
            gap = f"<b>{signed(100 * entry['difference'], '.1f')}</b> against {html.escape(entry['reducer'])}"
            lines.append(f'<span class="rate">{gap}</span>')
        tokens = number(row.get("tokens_mean")) if row["budget"] is None else number(row["budget"])
        tiles.append(
            f'<li><span class="tokens">{tokens_text(tokens or 0.0)}</span>'
            f'<span class="value">{per_cent(accuracy)} <small>% right</small></span>{"".join(lines)}</li>'
        )
    return f'<ul class="tiles" aria-label="Accuracy of each budget">{"".join(tiles)}</ul>' if tiles else ""


def _says_section(evaluation: Mapping[str, Any]) -> str:
    """The sentences, and the model against the best reducer at each budget."""
    if not evaluation.get("benchmark"):
        return ""
    blunt = evaluation["benchmark"].get("tells_apart") is False
    items = "".join(
        f"<li{' class=warn' if blunt and at == 0 else ''}>{html.escape(sentence)}</li>"
        for at, sentence in enumerate([*sentences(evaluation), *allocations.told(evaluation)])
    )
    columns = [
        Column("budget", "tokens", "g"),
        Column("accuracy", f"{evaluation.get('family')} %", per_cent),
        Column("reducer", "best reducer", "s"),
        Column("reducer_accuracy", "its %", per_cent),
        Column("difference", "difference, points", lambda value: signed(100 * value, ".1f")),
        Column("difference_ci", "95 %", lambda value: signed(100 * value, ".1f")),
        Column("questions", "questions", ",.0f"),
        Column("videos", "videos", ",.0f"),
        Column("winner", "ahead", "s"),
    ]
    rows = [{**entry, "winner": entry["winner"] or "neither"} for entry in evaluation.get("versus") or []]
    shown = table(rows, columns)
    note = (
        """<p class="note">Differences are paired, question by question; their intervals are of a bootstrap over videos.
The reducer is the one that answers most of these very questions, which flatters it.</p>"""
        if shown
        else ""
    )
    return f"""<section id="says" aria-labelledby="says-title"><h2 id="says-title">What the table says</h2>
<ul class="says">{items}</ul>{scrolled(shown, labelled_by="says-title") if shown else ""}{note}</section>"""


def _series(rows: Sequence[Mapping[str, Any]], family: str, kind: str = "") -> list[Series]:
    """A line for each method over its tokens; kind: of the questions of one kind, without intervals."""
    out, names = [], methods(rows, family, without=ENDS)
    for at, name in enumerate(names):
        points, whiskers = [], []
        # of all questions, intervals would hide one another at one place
        beside = 1.0 if kind else 10 ** (DODGE * (at - (len(names) - 1) / 2))
        for row in rows:
            tokens = number(row.get("tokens_mean"))
            value = number(row["by_type"].get(kind)) if kind else number(row.get("accuracy"))
            if row["method"] != name or tokens is None or value is None or tokens <= 0:
                continue
            bounds = interval({"_": value, "__ci": (row["by_type_ci"].get(kind) if kind else row["accuracy_ci"])}, "_")
            text = f"{name}, {tokens_text(tokens)}: {per_cent(value)} %"
            text += f" (95 %: {per_cent(bounds[0])} to {per_cent(bounds[1])})" if bounds else ""
            points.append((tokens * beside, 100 * value, text))
            if bounds and not kind:
                whiskers.append((tokens * beside, 100 * bounds[0], 100 * bounds[1]))
        ours = name == family
        out.append(Series(name, sorted(points), at, ours=ours, dashed=at >= 10, whiskers=tuple(whiskers)))
    return out


def _levels(rows: Sequence[Mapping[str, Any]], count: int, kind: str = "") -> list[Level]:
    """Blind and all tokens as lines across the chart; chance."""
    out = []
    for at, method in enumerate(ENDS):
        row = next((row for row in rows if row["method"] == method), None)
        value = number(row["by_type"].get(kind) if kind else row.get("accuracy")) if row else None
        if row is None or value is None:
            continue
        bounds = None if kind else interval(row, "accuracy")
        text = f"{_name(method)}: {per_cent(value)} %"
        text += f" (95 %: {per_cent(bounds[0])} to {per_cent(bounds[1])})" if bounds else ""
        band = (100 * bounds[0], 100 * bounds[1]) if bounds else None
        out.append(Level(_name(method), 100 * value, count + at, text, band))
    return out


def _plot_section(rows: list[dict[str, Any]], family: str) -> str:
    series = _series(rows, family)
    if not any(s.points for s in series):
        return ""
    budgets = sorted({float(row["budget"]) for row in rows if row["method"] not in ENDS and row["budget"]})
    axes: dict[str, Any] = dict(
        x_title="tokens per clip (log)", y_title="accuracy, %", log_x=True,
        x_ticks=budgets if 0 < len(budgets) < 12 else None,
    )  # fmt: skip
    kinds = sorted({kind for row in rows for kind in row["by_type"]})
    drawn = chart(series, **axes, levels=_levels(rows, len(series)))
    figures = [f"<figure><figcaption>all questions</figcaption>{drawn}</figure>"]
    for kind in kinds if len(kinds) > 1 else []:
        drawn = chart(_series(rows, family, kind), **axes, levels=_levels(rows, len(series), kind))
        figures.append(f"<figure><figcaption>{html.escape(kind)}</figcaption>{drawn}</figure>")
    return f"""<section id="accuracy" aria-labelledby="accuracy-title"><h2 id="accuracy-title">Accuracy by tokens</h2>
<p class="note">Each line is one method over its budgets; dotted lines are the LLM blind and with all tokens. Bars and
bands are 95 % intervals, clustered by video; methods of one budget stand beside one another, so that their bars can be
told apart. Point at a mark for its numbers; choose a name to hide it.</p>
{legend(series)}
<div class="charts">{"".join(figures)}</div></section>"""


def _table_section(evaluation: Mapping[str, Any], rows: list[dict[str, Any]], family: str) -> str:
    """Every row twice: what was right, and what it costs."""
    if not rows:
        return ""
    kinds = sorted({kind for row in rows for kind in row["by_type"]})
    flat = [
        {**row, "method": _name(row["method"]), **{f"by_type.{kind}": row["by_type"].get(kind) for kind in kinds},
         **{f"by_type.{kind}_ci": row["by_type_ci"].get(kind) for kind in kinds}}
        for row in sorted(rows, key=lambda row: (row["budget"] is None, row["budget"] or 0))
    ]  # fmt: skip
    by_kind = [Column(f"by_type.{kind}", f"{kind} %", per_cent, f"by_type.{kind}_ci") for kind in kinds]

    def shown(columns: Sequence[Column]) -> list[Column]:
        return [each for each in columns if any(row.get(each.key) is not None for row in flat)]

    guess = next((row["chance"] for row in rows if number(row.get("chance")) is not None), None)
    guesses = next((row["chance_by_type"] for row in rows if row.get("chance_by_type")), {})
    chances = ["chance: unknown" if guess is None else f"chance {per_cent(guess)} %"]
    chances += [f"{kind} {per_cent(value)} %" for kind, value in guesses.items() if number(value) is not None]
    environment = evaluation.get("environment") or {}
    device = environment.get("cpu") if environment.get("device") == "cpu" else environment.get("device")
    where = html.escape(f", on {device}" if device else "")
    notes = [str(row.get("note") or "").split("; ") for row in flat]
    common = [note for note in notes[0] if note and all(note in each for each in notes)]
    flat = [{**row, "note": "; ".join(n for n in each if n not in common)} for row, each in zip(flat, notes)]
    said = html.escape(f" Of all rows: {'; '.join(common)}." if common else "")
    right = table(flat, [*NAMED, *shown([*SCORES, *by_kind, *WORDS])], ours=family, notes=False)
    costs = table(flat, [*NAMED, *shown(COSTS)], ours=family)
    return f"""<section id="table" aria-labelledby="table-title"><h2 id="table-title">Every row</h2>
<p class="note">Below each share its 95 % interval, clustered by video. By {html.escape(", ".join(chances))}. Kept: of
what all tokens gain over chance. Loss: of the right answer, in nats. Choose a heading to sort.</p>
{scrolled(right, labelled_by="table-title")}</section>
<section id="costs" aria-labelledby="costs-title"><h2 id="costs-title">What each row costs</h2>
<p class="note">FLOPs and cache of the LLM are those of its architecture at the row's mean prompt; the time to the first
token of such a prompt is measured, all rows in turns{where}. The compressor's are of one clip, without the
tower.{said}</p>
{scrolled(costs, labelled_by="costs-title")}</section>"""


def _answers_section(
    clips: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], exact: bool, family: str
) -> str:
    """Clips with a row for each reader and a column for each question."""
    if not clips:
        return ""
    place = {clip["key"]: at for at, clip in enumerate(kept)}
    parts = []
    for clip in clips:
        at = place.get(str(clip["key"]))
        frames = f'<canvas data-clip="{at}" role="img" aria-label="the clip"></canvas>' if at is not None else ""
        tags = ", ".join(str(tag) for tag in clip.get("tags") or [])
        told_of = f"<b>{html.escape(tags)}</b>{html.escape(str(clip.get('caption') or ''))}"
        told_of += f"<small> {html.escape(str(clip['key']))}</small>"
        parts.append(
            f'<div class="asked"><figure>{frames}<figcaption>{told_of}</figcaption></figure>'
            f"{scrolled(_answers_table(clip, family), labelled_by='answers-title')}</div>"
        )
    how = told(exact) if kept else "The shards hold features, so there are no frames to show."
    button = '<button type="button" id="play">Pause</button>' if kept else ""
    return f"""<section aria-labelledby="answers-title"><h2 id="answers-title">Answers beside the truth</h2>
<p class="note">Of each question the likeliest choice, and the LLM's own words where they differ. {how}</p>{button}
{"".join(parts)}</section>"""


def _answers_table(clip: Mapping[str, Any], family: str) -> str:
    heads = "".join(
        f'<th scope="col">{html.escape(str(each["question"]))}<small>{html.escape(str(each["type"]))}: '
        f"<b>{html.escape(str(each['answer']))}</b></small></th>"
        for each in clip["questions"]
    )
    order = {"blind": -1.0, "full": float("inf")}
    readers = sorted(
        enumerate(clip["readers"]),
        key=lambda item: (
            order.get(item[1]["method"], item[1]["budget"] or 0),
            item[1]["method"] != family,
        ),
    )
    lines = []
    for at, reader in readers:
        count = tokens_text(reader["budget"]) if reader["budget"] else ""
        name = ", ".join(part for part in (_name(reader["method"]), count) if part)
        cells = "".join(_answer_cell(each["said"][at]) for each in clip["questions"])
        ours = " class=ours" if reader["method"] == family else ""
        lines.append(f"<tr{ours}><td>{html.escape(name)}</td>{cells}</tr>")
    return f'<table><thead><tr><th scope="col">reader</th>{heads}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table>'


def _answer_cell(said: Mapping[str, Any]) -> str:
    chosen, text = said.get("chosen"), said.get("text")
    sign = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}.get(said.get("right"), "")  # type: ignore[arg-type]
    css = {True: "right", False: "wrong"}.get(said.get("right"), "")  # type: ignore[arg-type]
    shown = f"<b>{sign}</b> {html.escape(str(chosen))}" if chosen is not None else ""
    if text is not None and text != chosen:
        shown += f"<small>says: {html.escape(text) or NONE}</small>"
    if said.get("parts"):
        lines = "".join(f"<small>{html.escape(line)}</small>" for line in said["parts"])
        shown += f"<details><summary>parts</summary>{lines}</details>"
    return f'<td class="{css}">{shown}</td>'
