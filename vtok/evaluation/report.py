"""A self-contained report.html of a tokenizer's evaluation: plots, table, training curves, and a player of real frames.

    eval.json rows --chart()--> inline SVG ---+
    metrics.jsonl  --chart()--> inline SVG ---+--> report.html (no network, no other file)
    clips [T, H, W, 3] --sprite()--> images --+

The shell is page.py, the frames are sprites.py; the page of a projector is answer_report.py. Letters: T frames, H
height, W width.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok.evaluation.charts import Series, bars, chart, legend
from vtok.evaluation.page import (
    Column,
    asset,
    environment_section,
    fill,
    history_section,
    interval,
    number,
    scrolled,
    signed,
    table,
    tokens_text,
    write_page,
)
from vtok.evaluation.sprites import frames_of, sprite, stored
from vtok.evaluation.sprites import told as stored_how

CODECS = ("x264", "x265", "av1")

# (key, heading, how it is shown); a row's other numbers follow in their own order
COLUMNS = [
    Column("method", "method", "s"),
    Column("budget", "budget", "g"),
    Column("tokens_mean", "tokens", ",.5g"),
    Column("bits_mean", "bits", ",.0f"),
    Column("entropy_bits_mean", "entropy-coded bits", ",.0f"),
    Column("ar_bits_mean", "bits under the prior", ",.0f"),
    Column("signalling_bits_mean", "bits of lengths", ",.0f"),
    Column("bits_per_pixel", "bits per pixel", ".5f"),
    Column("bits_per_second", "bits per second", ",.0f"),
    Column("psnr_db", "PSNR dB", ".2f"),
    Column("psnr_db_ci", "PSNR interval", ".2f"),
    Column("ssim", "SSIM", ".4f"),
    Column("tdiff_psnr_db", "temporal diff. PSNR dB", ".2f"),
    Column("lpips", "LPIPS", ".4f"),
    Column("rfvd", "rFVD", ",.2f"),
    Column("rfvd_clips", "rFVD clips", ",.0f"),
    Column("rfid", "rFID", ",.2f"),
    Column("rfid_frames", "rFID frames", ",.0f"),
    Column("rfvd_proxy", "rFVD proxy, no weights", ",.2f"),
    Column("rfvd_proxy_clips", "rFVD proxy clips", ",.0f"),
    Column("worse_share", "worse with more tokens", ".1%"),
    Column("below_floor", "clips below the codec's floor", ".0%"),
]
# what is drawn where rows define it: (key, axis title)
QUALITIES = [
    ("psnr_db", "PSNR, dB"),
    ("ssim", "SSIM"),
    ("lpips", "LPIPS"),
    ("rfvd", "rFVD"),
    ("rfvd_proxy", "rFVD proxy (no weights)"),
]
RATES = [("bits_per_pixel", "bits per pixel"), ("tokens_mean", "tokens per clip")]


def write_report(
    evaluation: dict[str, Any],
    clips: list[dict[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    history: list[dict[str, Any]] | None = None,
    samples: list[dict[int, Any]] | None = None,
    told: Sequence[str] = (),
    max_bytes: int = 20_000_000,
) -> Path:
    """Write one html file that shows an evaluation; returns its path.

    Args:
        evaluation: the content of eval.json; any value may be null.
        clips: {"key", "caption", "original": uint8 [T, H, W, 3], "reconstructions": {label: uint8 [T, H, W, 3]},
            "psnr_db": {label: float}, "tags": ["worst" | "best" | ...], "fps"}. Arrays are numpy or torch; a label is a
            token count (a stop of the slider) or the name of a control (a button).
        title: heading; the model's name otherwise.
        history: the lines of metrics.jsonl, drawn as training curves.
        samples: draws of the prior, each {tokens kept of a group: uint8 [T, H, W, 3]}; their middle frames are shown.
        told: the label or caption that each of them was drawn for, "" for none.
        max_bytes: above this size the frames are stored again as lossy WebP, and the page says so.
    Raises: ValueError when a clip's arrays are not uint8 [T, H, W, 3] of one shape, or its fps is not positive.
    """
    title = title or f"{evaluation.get('model') or 'vtok'}: evaluation"
    rows = [dict(row) for row in evaluation.get("rows") or []]
    kept, exact = stored(clips, max_bytes=max_bytes)
    family = str(evaluation.get("family") or (rows[0].get("method") if rows else "") or "")
    return write_page(
        path,
        title=title,
        lede=_lede(evaluation, rows, family),
        tiles=_tiles(rows, family),
        first="player" if kept else "rates",
        sections=[
            fill(asset("player.html"), how=stored_how(exact)) if kept else "",
            _gallery_section(kept),
            _rate_section(rows, family),
            _codecs_section(evaluation),
            _samples_section(samples or [], told),
            _usage_section(evaluation, rows, family),
            _table_section(rows, family),
            history_section(history or []),
            environment_section(evaluation, without=("per_clip", "against_codecs")),  # eval.json holds them
        ],
        clips=kept,
        scripts=("frames.js", "player.js", "charts.js"),
        max_bytes=max_bytes,
    )


def _gallery_section(stored: list[dict[str, Any]]) -> str:
    if not stored:
        return ""
    groups: dict[str, list[int]] = {"worst": [], "best": [], "": []}
    for index, clip in enumerate(stored):
        groups[next((tag for tag in ("worst", "best") if tag in clip["tags"]), "")].append(index)
    titles = {
        "worst": "Worst clips",
        "best": "Best clips",
        "": "Other clips" if groups["worst"] or groups["best"] else "",
    }
    parts = []
    for tag, members in groups.items():
        cards = "".join(
            f'<button type="button" data-clip="{i}"><span class="pair"><canvas></canvas><canvas></canvas></span>'
            f'<span class="text">{html.escape(stored[i]["caption"] or stored[i]["key"])}</span>'
            '<span class="score"></span></button>'
            for i in members
        )
        if members:
            heading = f"<h3>{titles[tag]}</h3>" if titles[tag] else ""
            parts.append(f'{heading}<div class="gallery">{cards}</div>')
    return f"""<section aria-labelledby="gallery-title"><h2 id="gallery-title">Clips</h2>
<p class="note">Original on the left, the slider's version on the right. Choose one to open it in the player.</p>
{"".join(parts)}</section>"""


def _samples_section(samples: list[dict[int, Any]], told: Sequence[str]) -> str:
    """A row a draw of the prior, under what it was told, a column a number of tokens kept."""
    if not samples:
        return ""
    heads = '<th scope="col">drawn for</th>' * any(told)
    heads += "".join(f'<th scope="col">{tokens_text(float(budget))}</th>' for budget in samples[0])
    lines = []
    for row, sample in enumerate(samples):
        cells = f'<th scope="row">{html.escape(told[row]) or "nothing said"}</th>' if any(told) else ""
        for budget, value in sample.items():
            frames = frames_of(value, f"sample {row}")
            middle = frames[len(frames) // 2][None]
            image = base64.b64encode(sprite(middle)).decode()
            said = f"sample {row + 1} with {tokens_text(float(budget))} a group"
            cells += f'<td><img src="data:image/webp;base64,{image}" alt="{said}"></td>'
        lines.append(f"<tr>{cells}</tr>")
    return f"""<section aria-labelledby="samples-title"><h2 id="samples-title">Samples of the prior</h2>
<p class="note">Each row is one draw of token ids; each column keeps so many tokens of every group. Middle frames.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="samples-title">
<table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></section>"""


def _methods(rows: list[dict[str, Any]], family: str) -> list[str]:
    names = list(dict.fromkeys(str(row.get("method")) for row in rows))
    return sorted(names, key=lambda name: (name != family, name in CODECS))  # stable: ours, controls, codecs


def _rate_series(rows: list[dict[str, Any]], family: str, x_key: str, y_key: str) -> list[Series]:
    out = []
    for colour, name in enumerate(_methods(rows, family)):
        points, whiskers = [], []
        for row in rows:
            x, y = number(row.get(x_key)), number(row.get(y_key))
            if str(row.get("method")) != name or x is None or y is None:
                continue
            tokens, rate = number(row.get("tokens_mean")), number(row.get("bits_per_pixel"))
            text = [f"{name}: {y:.4g} {dict(QUALITIES)[y_key]}"]
            text += [tokens_text(tokens)] if tokens is not None else []
            text += [f"{rate:.4g} bits per pixel"] if rate is not None else []
            text += [str(row["note"])] if row.get("note") else []
            points.append((x, y, "\n".join(text)))
            if bounds := interval(row, y_key):
                whiskers.append((x, *bounds))
        points.sort(key=lambda point: point[0])
        ours = name == family
        out.append(
            Series(name, points, colour, ours=ours, dashed=name in CODECS, whiskers=tuple(whiskers) if ours else ())
        )
    return out


def _rate_section(rows: list[dict[str, Any]], family: str) -> str:
    figures = []
    for y_key, y_title in QUALITIES:
        for x_key, x_title in RATES:
            series = _rate_series(rows, family, x_key, y_key)
            counts = sorted({x for s in series for x, _, _ in s.points}) if x_key == "tokens_mean" else []
            drawn = chart(
                series,
                x_title=f"{x_title} (log)",
                y_title=y_title,
                log_x=True,
                x_ticks=counts if 0 < len(counts) < 12 else None,
            )
            if drawn:
                figures.append(f"<figure><figcaption>{y_title} against {x_title}</figcaption>{drawn}</figure>")
    if not figures:
        return ""
    return f"""<section id="rates" aria-labelledby="rates-title"><h2 id="rates-title">Rate and distortion</h2>
<p class="note">Each line is one method over its budgets, all measured on the same windows. Up and to the left is better
(for losses, down and to the left). Point at a mark for its numbers; choose a name to hide it.</p>
{legend(_rate_series(rows, family, "bits_per_pixel", "psnr_db"))}
<div class="charts">{"".join(figures)}</div></section>"""


def _codecs_section(evaluation: dict[str, Any]) -> str:
    """Bits at equal quality: a row for each codec and way to count ours, a column a budget."""
    entries = evaluation.get("against_codecs") or []
    if not entries:
        return ""
    counted = {column.key: column.heading for column in COLUMNS}
    budgets = [point["budget"] for point in entries[0]["matched"]]
    heads = ["codec", "our bits", "BD-rate", "PSNR in common", *(tokens_text(budget) for budget in budgets)]
    lines = []
    for entry in entries:
        delta, overlap = number(entry["bd_rate_percent"]), entry["overlap_psnr_db"]
        cells = [html.escape(entry["codec"]), html.escape(counted.get(entry["rate"]) or entry["rate"])]
        cells.append("none in common" if delta is None else f"{signed(delta, '.1f')} %")
        cells.append("" if overlap is None else f"{overlap[0]:.2f} to {overlap[1]:.2f} dB")
        cells += [_matched_text(point) for point in entry["matched"]]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"""<section aria-labelledby="codecs-title"><h2 id="codecs-title">Bits beside codecs</h2>
<p class="note">BD-rate: our bits against the codec's at equal PSNR, averaged over the range that both reach; below 0 we
need fewer. Under each budget: what the codec needs for our PSNR there, and how many times our bits that is. A floor is
the smallest stream the codec can write, which is better than ours already.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="codecs-title">
<table><thead><tr>{"".join(f'<th scope="col">{head}</th>' for head in heads)}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div></section>"""


def _matched_text(point: dict[str, Any]) -> str:
    theirs, ours = number(point["codec_bits"]), number(point["bits"])
    if theirs is None or not ours:
        return "not reached"
    return ("floor: " if point["where"] == "floor" else "") + f"{theirs:,.0f} bits, {theirs / ours:.3g}x"


def _usage_section(evaluation: dict[str, Any], rows: list[dict[str, Any]], family: str) -> str:
    """Bars for every list named *_per_position, of the largest budget that has one."""
    found: dict[str, tuple[list[float], str]] = {}
    ours = sorted((r for r in rows if str(r.get("method")) == family), key=lambda r: number(r.get("budget")) or 0.0)
    for where, holder in [("", evaluation), *((f" at {row.get('budget')} tokens", row) for row in ours)]:
        for key, value in holder.items():
            if key.endswith("_per_position") and isinstance(value, (list, tuple)) and value:
                numbers = [number(v) for v in value]
                found[key] = ([math.nan if n is None else n for n in numbers], where)
    figures = []
    for key, (values, where) in found.items():
        name = key.removesuffix("_per_position").replace("_", " ")
        figures.append(
            f"<figure><figcaption>{html.escape(name)} per position{where}</figcaption>"
            f"{bars(values, title=name)}</figure>"
        )
    if not figures:
        return ""
    return f"""<section aria-labelledby="usage-title"><h2 id="usage-title">Codebook use per position</h2>
<p class="note">Position 0 is the first token a budget keeps.
A position whose bar is near zero says the same thing for every clip.</p>
<div class="charts">{"".join(figures)}</div></section>"""


def _table_section(rows: list[dict[str, Any]], family: str) -> str:
    if not rows:
        return ""
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    known = {column.key for column in COLUMNS} | {"note"}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in known and any(number(row.get(key)) is not None for row in rows):
            columns.append(Column(key, key.replace("_", " "), ".4g"))
        elif key not in known and any(isinstance(row.get(key), str) for row in rows):
            columns.append(Column(key, key.replace("_", " "), "s"))
    return f"""<section aria-labelledby="table-title"><h2 id="table-title">Every row</h2>
<p class="note">Choose a heading to sort.</p>
{scrolled(table(rows, columns, ours=family), labelled_by="table-title")}</section>"""


def _lede(evaluation: dict[str, Any], rows: list[dict[str, Any]], family: str) -> str:
    clips, shards = evaluation.get("clips"), evaluation.get("shards")
    words = [f"{clips:,} clips" if isinstance(clips, int) else "", f"from {shards}" if shards else ""]
    others = [name for name in _methods(rows, family) if name != family]
    against = f"; compared on the same windows with {', '.join(others)}" if others else ""
    text = f"The {family} family measured on {' '.join(w for w in words if w) or 'its clips'}{against}."
    return html.escape(text)


def _margin(row: dict[str, Any], rows: list[dict[str, Any]], key: str, unit: str) -> str:
    """How far a row lies from the strongest control of the same budget; nothing where no control has that budget."""
    rivals = {
        str(other.get("method")): score
        for other in rows
        if other.get("budget") == row.get("budget") is not None
        and other.get("method") not in (row.get("method"), *CODECS)
        and (score := number(other.get(key))) is not None
    }
    value = number(row.get(key))
    if not rivals or value is None:
        return ""
    best = max(rivals, key=lambda name: rivals[name])
    return f'<span class="rate"><b>{signed(value - rivals[best], ".2f")} {unit}</b> against {html.escape(best)}</span>'


def _tiles(rows: list[dict[str, Any]], family: str) -> str:
    """One tile a budget of our method: its score, its rate."""
    key = next((k for k, _ in QUALITIES if any(number(r.get(k)) is not None for r in rows)), None)
    if key is None:
        return ""
    unit = {"psnr_db": "dB"}.get(key, key)
    tiles = []
    for row in rows:
        value, tokens = number(row.get(key)), number(row.get("budget"))
        tokens = number(row.get("tokens_mean")) if tokens is None else tokens
        if str(row.get("method")) != family or value is None or tokens is None:
            continue
        rate = number(row.get("bits_per_pixel"))
        below = f'<span class="rate">{rate:.4f} bits per pixel</span>' if rate is not None else ""
        below += _margin(row, rows, key, unit)
        digits = ".1f" if key == "psnr_db" else ".3f"
        tiles.append(
            f'<li><span class="tokens">{tokens_text(tokens)}</span>'
            f'<span class="value">{value:{digits}} <small>{unit}</small></span>{below}</li>'
        )
    return f'<ul class="tiles" aria-label="Quality of each budget">{"".join(tiles)}</ul>' if tiles else ""
