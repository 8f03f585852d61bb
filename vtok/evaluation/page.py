"""The shell of a report: one html file without network or other files, its tables, its training curves.

The pages are report.py (tokenizers) and answer_report.py (projectors); clips are drawn by sprites.py.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtok.evaluation.charts import Series, chart, legend, thin

log = logging.getLogger(__name__)

NONE = '<span class="none" title="undefined">&ndash;</span>'


def asset(name: str) -> str:
    return resources.files("vtok").joinpath("assets", name).read_text(encoding="utf-8")


def fill(template: str, **slots: str) -> str:
    """The template with its {{slots}} filled in one pass, so that a {{slot}} written inside a caption stays text."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def write_page(
    path: str | Path,
    *,
    title: str,
    lede: str,
    tiles: str,
    first: str,
    sections: Sequence[str],
    clips: Sequence[Mapping[str, Any]],
    scripts: Sequence[str],
    max_bytes: int,
) -> Path:
    """Write the page; returns its path.

    Args:
        title: plain text; all other texts are html. first: id of the section that the skip link leads to.
        clips: what the scripts read. scripts: names in assets/, run one after the other in one scope.
    """
    path = Path(path)
    script = '"use strict";\n(() => {\n' + "\n".join(asset(name) for name in scripts) + "})();\n"
    page = fill(
        asset("report.html"),
        title=html.escape(title),
        css=asset("report.css"),
        first=first,
        lede=lede,
        tiles=tiles,
        sections="\n".join(section for section in sections if section),
        footer="Written by vtok. Undefined values are shown as a dash; the table's notes say why.",
        clips=_script_json(clips),
        js=script,
        js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    size = len(page.encode())
    if size > max_bytes:
        log.warning("%s takes %.1f MB, more than max_bytes=%d: pass fewer clips or frames", path, size / 1e6, max_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _script_json(value: Any) -> str:
    """JSON that cannot end its <script> element, whatever a caption says."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: Any) -> float | None:
    """The value as a finite float, or None where it is undefined."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return None
    return float(value) if math.isfinite(value) else None


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The confidence interval stored as `<key>_ci`: (low, high), or half a width around the value."""
    stored, value = row.get(f"{key}_ci"), number(row.get(key))
    if isinstance(stored, (list, tuple)) and len(stored) == 2:
        low, high = number(stored[0]), number(stored[1])
        return (low, high) if low is not None and high is not None else None
    half = number(stored)
    return (value - half, value + half) if value is not None and half is not None else None


def per_cent(value: float) -> str:
    return f"{100 * value:.1f}"


def methods(rows: Sequence[Mapping[str, Any]], ours: str, *, without: Collection[str]) -> list[str]:
    """The methods that the rows are of, ours first, then in their order; without those named."""
    names = dict.fromkeys(str(row["method"]) for row in rows if row["method"] not in without)
    return sorted(names, key=lambda name: name != ours)


def tokens_text(count: float) -> str:
    """One decimal where it is a mean: 91.5 tokens."""
    return f"{count:.1f}".removesuffix(".0") + (" token" if count == 1 else " tokens")


def signed(value: float, how: str) -> str:
    """The number with its sign, a minus as long as a plus."""
    return f"{value:+{how}}".replace("-", "\N{MINUS SIGN}")


class Column(NamedTuple):
    """A column of a table. show: what a format of numbers says (".3f"; "s": a text), or value -> html. below: key of an
    interval that stands small below the value."""

    key: str
    heading: str
    show: str | Callable[[Any], str]
    below: str = ""


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, ours: str = "", notes: bool = True) -> str:
    """A table whose headings sort it. ours: the method whose rows are marked. notes: a column of the rows' `note`."""
    notes = notes and any(row.get("note") for row in rows)
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(column.heading)}</button></th>' for column in columns
    )
    heads += '<th class="note" scope="col">note</th>' if notes else ""
    lines = []
    for row in rows:
        cells = ""
        for column in columns:
            text, sort_value = _cell(row.get(column.key), column.show)
            if column.below and row.get(column.below):
                text += f"<small>{_cell(row.get(column.below), column.show)[0]}</small>"
            cells += f'<td data-value="{sort_value}">{text}</td>'
        cells += f'<td class="note">{html.escape(str(row.get("note") or ""))}</td>' if notes else ""
        lines.append(f"<tr{' class=ours' if ours and str(row.get('method')) == ours else ''}>{cells}</tr>")
    return (
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n<tbody>{"".join(lines)}</tbody></table>'
        if rows
        else ""
    )


def _cell(value: Any, how: str | Callable[[Any], str]) -> tuple[str, str]:
    """(html, sort value) of a table cell."""
    if isinstance(value, str) or how == "s":
        text = html.escape(str(value)) if value is not None else ""
        return text, text
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(number(v) is not None for v in value):
        low, high = (how(v) if callable(how) else f"{v:{how}}" for v in value)
        return f"{low} to {high}", repr(float(value[0]))
    found = number(value)
    if found is None:
        return NONE, ""
    return how(found) if callable(how) else f"{found:{how}}", repr(found)


def scrolled(content: str, *, labelled_by: str) -> str:
    """Content that scrolls sideways by itself where it is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{labelled_by}">\n{content}</div>'


def environment_section(evaluation: Mapping[str, Any], *, without: Sequence[str] = ()) -> str:
    """What the evaluation holds beside its rows, and where it was measured. without: keys that are shown elsewhere."""
    long = ("rows", "environment", *without)
    shown = {k: v for k, v in evaluation.items() if k not in long and not k.endswith("_per_position")}
    environment = evaluation.get("environment")
    shown |= environment if isinstance(environment, dict) else {"environment": environment}
    items = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(v if isinstance(v, str) else json.dumps(v, default=str))}</dd>"
        for k, v in shown.items()
        if v is not None
    )
    return (
        f"<section><details><summary>Where and how this was measured</summary><dl>{items}</dl></details></section>"
        if items
        else ""
    )


def history_section(history: Sequence[Mapping[str, Any]]) -> str:
    """Training curves of metrics.jsonl: keys that share the part after their slash (train/l1, val/l1) share a chart.

    So do keys that differ only in a budget at their end (val/psnr_db_1, val/psnr_db_16): one line a budget.
    """
    charts: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for index, line in enumerate(history):
        step = number(line.get("step"))
        at = float(index) if step is None else step
        for key, value in line.items():
            found = number(value)
            if found is not None and key not in ("step", "epoch", "time", "wall_s", "elapsed_s"):
                group, _, name = key.partition("/") if "/" in key else ("train", "", key)
                if budget := re.fullmatch(r"(psnr_db|ssim|l1|mse|(?:\w+_)?(?:accuracy|loss|exact_match))_(\d+)", name):
                    name, group = f"{budget[1]} by budget, {group}", budget[2]
                charts.setdefault(name, {}).setdefault(group, []).append(
                    (at, found, f"{key} {found:.5g} at step {at:g}")
                )
    charts = {name: groups for name, groups in charts.items() if any(len(p) > 1 for p in groups.values())}
    if not charts:
        return ""

    def rank(name: str) -> tuple[bool, ...]:
        values = {y for points in charts[name].values() for _, y, _ in points}
        told = re.search("loss|psnr|ssim|l1|accuracy", name) is not None
        return len(values) == 1, "by budget" not in name, "val" not in charts[name], not told

    order = sorted(charts, key=rank)  # stable: budgets, what was validated, losses, the rest, what never changes
    rest = "".join(_history_figure(name, charts[name]) for name in order[6:])
    more = f"<details><summary>More curves ({len(order) - 6})</summary><div class='charts'>{rest}</div></details>"
    key = legend([Series("val", [], 0, ours=True), Series("train", [], 1)])
    shown = "".join(_history_figure(name, charts[name]) for name in order[:6])
    return f"""<section aria-labelledby="history-title"><h2 id="history-title">Training</h2>{key}
<div class="charts">{shown}</div>{more if rest else ""}</section>"""


def _history_figure(name: str, groups: dict[str, list[tuple[float, float, str]]]) -> str:
    budgets = all(group.isdigit() for group in groups)
    names = sorted(groups, key=int) if budgets else list(groups)
    fixed = {} if budgets else {"val": 0, "train": 1}
    series = [
        Series(
            group,
            thin(sorted(groups[group])),
            fixed.get(group, colour if budgets else 2 + colour),
            ours=group == "val",
            marks=len(groups[group]) <= 30,
            label=group if budgets else "",
        )
        for colour, group in enumerate(names)
    ]
    values = [y for s in series for _, y, _ in s.points]
    wide = re.search("loss|l1|l2|mse|norm", name) is not None and min(values) > 0 and max(values) / min(values) > 30
    drawn = chart(series, x_title="step", y_title=name, log_y=wide)
    told = "" if budgets else f" ({html.escape(', '.join(names))})"
    return f"<figure><figcaption>{html.escape(name)}{told}</figcaption>{drawn}</figure>"
