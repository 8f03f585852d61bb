"""A self-contained report.html of an evaluation: plots, table, training curves, and a player of real frames.

    eval.json rows --chart()--> inline SVG ---+
    metrics.jsonl  --chart()--> inline SVG ---+--> report.html (no network, no other file)
    clips [T, H, W, 3] --sprite()--> images --+

Frames travel as lossless WebP sprites that a script plays on canvases: every pixel shown is the pixel measured, all
versions follow one clock (so switching the token count keeps the time), and no video codec of the browser is involved.
Letters: T frames, H height, W width.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import math
import re
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import av
import numpy as np

from vtok.charts import Series, bars, chart, legend, thin

log = logging.getLogger(__name__)

SHEET_WIDTH = 4096  # pixels: a sprite wider than this is folded into rows; WebP and most GPUs end at 16383
WEBP_MAX = 16383
CODECS = ("x264", "x265", "av1")

# (key, heading, how it is shown); a row's other numbers follow in their own order
COLUMNS: list[tuple[str, str, str]] = [
    ("method", "method", "s"),
    ("budget", "budget", "g"),
    ("tokens_mean", "tokens", ",.5g"),
    ("bits_mean", "bits", ",.0f"),
    ("entropy_bits_mean", "entropy-coded bits", ",.0f"),
    ("ar_bits_mean", "bits under the prior", ",.0f"),
    ("signalling_bits_mean", "bits of lengths", ",.0f"),
    ("bits_per_pixel", "bits per pixel", ".5f"),
    ("bits_per_second", "bits per second", ",.0f"),
    ("psnr_db", "PSNR dB", ".2f"),
    ("psnr_db_ci", "PSNR interval", ".2f"),
    ("ssim", "SSIM", ".4f"),
    ("tdiff_psnr_db", "temporal diff. PSNR dB", ".2f"),
    ("lpips", "LPIPS", ".4f"),
    ("rfvd", "rFVD", ",.2f"),
    ("rfvd_clips", "rFVD clips", ",.0f"),
    ("rfid", "rFID", ",.2f"),
    ("rfid_frames", "rFID frames", ",.0f"),
    ("accuracy", "accuracy", ".3f"),
    ("loss", "loss", ".4f"),
    ("worse_share", "worse with more tokens", ".1%"),
    ("below_floor", "clips below the codec's floor", ".0%"),
]
# what is drawn where rows define it: (key, axis title)
QUALITIES = [("psnr_db", "PSNR, dB"), ("ssim", "SSIM"), ("accuracy", "accuracy"), ("loss", "loss")]
RATES = [("bits_per_pixel", "bits per pixel"), ("tokens_mean", "tokens per clip")]


def write_report(
    evaluation: dict[str, Any],
    clips: list[dict[str, Any]],
    path: str | Path,
    *,
    title: str | None = None,
    history: list[dict[str, Any]] | None = None,
    samples: list[dict[int, Any]] | None = None,
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
        max_bytes: above this size the frames are stored again as lossy WebP, and the page says so.
    Raises: ValueError when a clip's arrays are not uint8 [T, H, W, 3] of one shape, or its fps is not positive.
    """
    path = Path(path)
    title = title or f"{evaluation.get('model') or 'vtok'}: evaluation"
    rows = [dict(row) for row in evaluation.get("rows") or []]
    entries = [_check_clip(clip) for clip in clips]
    stored = [_clip_payload(clip, lossless=True) for clip in entries]
    exact = _size(stored) <= max_bytes
    if not exact:
        lossy = [_clip_payload(clip, lossless=False) for clip in entries]
        exact = _size(lossy) >= _size(stored)  # flat graphics can be smaller without loss
        stored = stored if exact else lossy
    family = str(evaluation.get("family") or (rows[0].get("method") if rows else "") or "")
    sections = [
        _player_section(stored, exact),
        _gallery_section(stored),
        _rate_section(rows, family),
        _codecs_section(evaluation),
        _samples_section(samples or []),
        _usage_section(evaluation, rows, family),
        _table_section(rows, family),
        _history_section(history or []),
        _environment_section(evaluation),
    ]
    script = _asset("report.js")
    page = _fill(
        _asset("report.html"),
        title=html.escape(title),
        css=_asset("report.css"),
        first="player" if stored else "rates",
        lede=_lede(evaluation, rows, family),
        tiles=_tiles(rows, family),
        sections="\n".join(section for section in sections if section),
        footer="Written by vtok. Undefined values are shown as a dash; the table's notes say why.",
        clips=_script_json(stored),
        js=script,
        js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    size = len(page.encode())
    if size > max_bytes:
        log.warning("%s takes %.1f MB, more than max_bytes=%d: pass fewer clips or frames", path, size / 1e6, max_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return resources.files("vtok").joinpath("assets", name).read_text(encoding="utf-8")


def _fill(template: str, **slots: str) -> str:
    # one pass, so that a {{slot}} written inside a caption stays text
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def _script_json(value: Any) -> str:
    """JSON that cannot end its <script> element, whatever a caption says."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: Any) -> float | None:
    """The value as a finite float, or None where it is undefined."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return None
    return float(value) if math.isfinite(value) else None


def _tokens_text(count: float) -> str:
    return f"{count:g} token" + ("" if count == 1 else "s")


# --- frames -----------------------------------------------------------------------------------------------------------


def _frames(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected uint8 [T, H, W, 3]")
    return array


def _check_clip(clip: dict[str, Any]) -> dict[str, Any]:
    name = f"clip {clip.get('key')!r}"
    original = _frames(clip["original"], f"{name} original")
    versions = {str(label): _frames(v, f"{name} {label}") for label, v in (clip.get("reconstructions") or {}).items()}
    for label, array in versions.items():
        if array.shape != original.shape:
            raise ValueError(f"{name} {label} is {list(array.shape)}, the original is {list(original.shape)}")
    fps = _number(clip.get("fps"))
    if fps is None or fps <= 0:
        raise ValueError(f"{name} fps={clip.get('fps')!r} is not a positive number of frames per second")
    scores = {str(label): _number(value) for label, value in (clip.get("psnr_db") or {}).items()}
    return {**clip, "original": original, "reconstructions": versions, "psnr_db": scores, "fps": fps}


def sprite(frames: np.ndarray, *, lossless: bool = True) -> bytes:
    """A WebP image of frames [T, H, W, 3] uint8 laid out in rows of at most 4096 pixels; `sprite_columns` a row.

    Raises ValueError when the image would exceed what WebP holds (16383 pixels a side).
    """
    count, height, width, _ = frames.shape
    columns = sprite_columns(count, width)
    rows = math.ceil(count / columns)
    if max(rows * height, columns * width) > WEBP_MAX:
        raise ValueError(
            f"{count} frames of {width}x{height} make a {columns * width}x{rows * height} sprite, WebP ends at "
            f"{WEBP_MAX}: pass fewer or smaller frames"
        )
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(rows * columns, height, width, 3)[:count] = frames
    image = np.ascontiguousarray(sheet.transpose(0, 2, 1, 3, 4)).reshape(rows * height, columns * width, 3)
    encoder: Any = av.CodecContext.create("libwebp", "w")  # Any: PyAV's stubs give the base class
    encoder.width, encoder.height = image.shape[1], image.shape[0]
    encoder.pix_fmt, encoder.time_base = "bgra" if lossless else "yuv420p", Fraction(1, 25)
    # level 1 takes a quarter of the time of the default 4 for 2 % more bytes
    encoder.options = {"lossless": "1", "compression_level": "1"} if lossless else {"quality": "90"}
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=encoder.pix_fmt)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def sprite_columns(count: int, width: int) -> int:
    """Frames in one row of a sprite of `count` frames."""
    return max(1, min(count, SHEET_WIDTH // width))


def _token_count(label: str) -> int | None:
    return int(label) if label.isascii() and label.isdigit() else None


def _clip_payload(clip: dict[str, Any], *, lossless: bool) -> dict[str, Any]:
    """What the page's script reads of a clip."""

    def source(frames: np.ndarray) -> str:
        return "data:image/webp;base64," + base64.b64encode(sprite(frames, lossless=lossless)).decode()

    count, height, width, _ = clip["original"].shape
    labels = sorted(clip["reconstructions"], key=lambda x: (_token_count(x) is None, _token_count(x) or 0))
    return {
        "key": str(clip.get("key") or ""),
        "caption": str(clip.get("caption") or ""),
        "tags": [str(tag) for tag in clip.get("tags") or []],
        "fps": round(clip["fps"], 4),
        "frames": count,
        "width": width,
        "height": height,
        "columns": sprite_columns(count, width),
        "original": source(clip["original"]),
        "versions": [
            {
                "label": label if _token_count(label) is None else str(_token_count(label)),
                "tokens": _token_count(label),
                "psnr": clip["psnr_db"].get(label),
                "source": source(clip["reconstructions"][label]),
            }
            for label in labels
        ],
    }


def _size(stored: list[dict[str, Any]]) -> int:
    return sum(len(clip["original"]) + sum(len(v["source"]) for v in clip["versions"]) for clip in stored)


def _player_section(stored: list[dict[str, Any]], exact: bool) -> str:
    if not stored:
        return ""
    how = (
        "Every pixel is exact: frames are stored losslessly."
        if exact
        else "Frames are stored as lossy WebP (quality 90) to keep the file small; "
        "the numbers were measured on the exact frames."
    )
    return _fill(_asset("player.html"), how=how)


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


def _samples_section(samples: list[dict[int, Any]]) -> str:
    """A row a draw of the prior, a column a number of tokens kept."""
    if not samples:
        return ""
    heads = "".join(f'<th scope="col">{_tokens_text(float(budget))}</th>' for budget in samples[0])
    lines = []
    for number, sample in enumerate(samples):
        cells = ""
        for budget, value in sample.items():
            frames = _frames(value, f"sample {number}")
            middle = frames[len(frames) // 2][None]
            image = base64.b64encode(sprite(middle)).decode()
            said = f"sample {number + 1} with {_tokens_text(float(budget))} a group"
            cells += f'<td><img src="data:image/webp;base64,{image}" alt="{said}"></td>'
        lines.append(f"<tr>{cells}</tr>")
    return f"""<section aria-labelledby="samples-title"><h2 id="samples-title">Samples of the prior</h2>
<p class="note">Each row is one draw of token ids; each column keeps so many tokens of every group. Middle frames.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="samples-title">
<table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></section>"""


# --- charts -----------------------------------------------------------------------------------------------------------


def _methods(rows: list[dict[str, Any]], family: str) -> list[str]:
    names = list(dict.fromkeys(str(row.get("method")) for row in rows))
    return sorted(names, key=lambda name: (name != family, name in CODECS))  # stable: ours, controls, codecs


def _interval(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    """The confidence interval stored as `<key>_ci`: (low, high), or half a width around the value."""
    stored, value = row.get(f"{key}_ci"), _number(row.get(key))
    if isinstance(stored, (list, tuple)) and len(stored) == 2:
        low, high = _number(stored[0]), _number(stored[1])
        return (low, high) if low is not None and high is not None else None
    half = _number(stored)
    return (value - half, value + half) if value is not None and half is not None else None


def _rate_series(rows: list[dict[str, Any]], family: str, x_key: str, y_key: str) -> list[Series]:
    out = []
    for colour, name in enumerate(_methods(rows, family)):
        points, whiskers = [], []
        for row in rows:
            x, y = _number(row.get(x_key)), _number(row.get(y_key))
            if str(row.get("method")) != name or x is None or y is None:
                continue
            tokens, rate = _number(row.get("tokens_mean")), _number(row.get("bits_per_pixel"))
            text = [f"{name}: {y:.4g} {dict(QUALITIES)[y_key]}"]
            text += [_tokens_text(tokens)] if tokens is not None else []
            text += [f"{rate:.4g} bits per pixel"] if rate is not None else []
            text += [str(row["note"])] if row.get("note") else []
            points.append((x, y, "\n".join(text)))
            if interval := _interval(row, y_key):
                whiskers.append((x, *interval))
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
    counted = {key: heading for key, heading, _ in COLUMNS}
    budgets = [point["budget"] for point in entries[0]["matched"]]
    heads = ["codec", "our bits", "BD-rate", "PSNR in common", *(_tokens_text(budget) for budget in budgets)]
    lines = []
    for entry in entries:
        delta, overlap = _number(entry["bd_rate_percent"]), entry["overlap_psnr_db"]
        cells = [html.escape(entry["codec"]), html.escape(counted.get(entry["rate"]) or entry["rate"])]
        cells.append("none in common" if delta is None else f"{delta:+.1f} %".replace("-", "\N{MINUS SIGN}"))
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
    theirs, ours = _number(point["codec_bits"]), _number(point["bits"])
    if theirs is None or not ours:
        return "not reached"
    return ("floor: " if point["where"] == "floor" else "") + f"{theirs:,.0f} bits, {theirs / ours:.3g}x"


def _usage_section(evaluation: dict[str, Any], rows: list[dict[str, Any]], family: str) -> str:
    """Bars for every list named *_per_position, of the largest budget that has one."""
    found: dict[str, tuple[list[float], str]] = {}
    ours = sorted((r for r in rows if str(r.get("method")) == family), key=lambda r: _number(r.get("budget")) or 0.0)
    for where, holder in [("", evaluation), *((f" at {row.get('budget')} tokens", row) for row in ours)]:
        for key, value in holder.items():
            if key.endswith("_per_position") and isinstance(value, (list, tuple)) and value:
                numbers = [_number(v) for v in value]
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


def _history_section(history: list[dict[str, Any]]) -> str:
    """Training curves: keys that share the part after their slash (train/l1, val/l1) share a chart.

    So do keys that differ only in a budget at their end (val/psnr_db_1, val/psnr_db_16): one line a budget.
    """
    charts: dict[str, dict[str, list[tuple[float, float, str]]]] = {}
    for index, line in enumerate(history):
        step = _number(line.get("step"))
        at = float(index) if step is None else step
        for key, value in line.items():
            number = _number(value)
            if number is not None and key not in ("step", "epoch", "time", "wall_s", "elapsed_s"):
                group, _, name = key.partition("/") if "/" in key else ("train", "", key)
                if budget := re.fullmatch(r"(psnr_db|ssim|l1|mse)_(\d+)", name):
                    name, group = f"{budget[1]} by budget, {group}", budget[2]
                charts.setdefault(name, {}).setdefault(group, []).append(
                    (at, number, f"{key} {number:.5g} at step {at:g}")
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


# --- words and tables -------------------------------------------------------------------------------------------------


def _cell(value: Any, how: str) -> tuple[str, str]:
    """(text, sort value) of a table cell."""
    if how == "s":
        return (html.escape(str(value)), html.escape(str(value))) if value is not None else ("", "")
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_number(v) is not None for v in value):
        return f"{value[0]:{how}} to {value[1]:{how}}", repr(float(value[0]))
    number = _number(value)
    if number is None:
        return '<span class="none" title="undefined">&ndash;</span>', ""
    return f"{number:{how}}", repr(number)


def _table_section(rows: list[dict[str, Any]], family: str) -> str:
    if not rows:
        return ""

    def shows(key: str) -> bool:
        return any(row.get(key) is not None for row in rows)

    columns = [column for column in COLUMNS if shows(column[0])]
    known = {key for key, _, _ in COLUMNS} | {"note"}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in known and any(_number(row.get(key)) is not None for row in rows):
            columns.append((key, key.replace("_", " "), ".4g"))
        elif key not in known and any(isinstance(row.get(key), str) for row in rows):
            columns.append((key, key.replace("_", " "), "s"))
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(title)}</button></th>' for _, title, _ in columns
    )
    heads += '<th class="note" scope="col">note</th>' if shows("note") else ""
    lines = []
    for row in rows:
        cells = ""
        for key, _, how in columns:
            value = row.get(key)
            text, sort_value = _cell(value, how if how == "s" or not isinstance(value, str) else "s")
            cells += f'<td data-value="{sort_value}">{text}</td>'
        cells += f'<td class="note">{html.escape(str(row.get("note") or ""))}</td>' if shows("note") else ""
        lines.append(f"<tr{' class=ours' if str(row.get('method')) == family else ''}>{cells}</tr>")
    return f"""<section aria-labelledby="table-title"><h2 id="table-title">Every row</h2>
<p class="note">Choose a heading to sort.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="table-title">
<table class="sortable"><thead><tr>{heads}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div></section>"""


def _lede(evaluation: dict[str, Any], rows: list[dict[str, Any]], family: str) -> str:
    clips, shards = evaluation.get("clips"), evaluation.get("shards")
    words = [f"{clips:,} clips" if isinstance(clips, int) else "", f"from {shards}" if shards else ""]
    others = [name for name in _methods(rows, family) if name != family]
    against = f"; compared on the same windows with {', '.join(others)}" if others else ""
    text = f"The {family} family measured on {' '.join(w for w in words if w) or 'its clips'}{against}."
    return html.escape(text)


def _margin(row: dict[str, Any], rows: list[dict[str, Any]], key: str, unit: str) -> str:
    """How far a row lies from the strongest control of the same budget; nothing where no control has that budget."""
    sign = -1 if key == "loss" else 1
    rivals = {
        str(other.get("method")): sign * score
        for other in rows
        if other.get("budget") == row.get("budget") is not None
        and other.get("method") not in (row.get("method"), *CODECS)
        and (score := _number(other.get(key))) is not None
    }
    value = _number(row.get(key))
    if not rivals or value is None:
        return ""
    best = max(rivals, key=lambda name: rivals[name])
    gap = f"{value - sign * rivals[best]:+.2f} {unit}".replace("-", "\N{MINUS SIGN}")
    return f'<span class="rate"><b>{gap}</b> against {html.escape(best)}</span>'


def _tiles(rows: list[dict[str, Any]], family: str) -> str:
    """One tile a budget of our method: its score, its rate."""
    key = next((k for k, _ in QUALITIES if any(_number(r.get(k)) is not None for r in rows)), None)
    if key is None:
        return ""
    unit = {"psnr_db": "dB"}.get(key, key)
    tiles = []
    for row in rows:
        value, tokens = _number(row.get(key)), _number(row.get("budget"))
        tokens = _number(row.get("tokens_mean")) if tokens is None else tokens
        if str(row.get("method")) != family or value is None or tokens is None:
            continue
        rate = _number(row.get("bits_per_pixel"))
        below = f'<span class="rate">{rate:.4f} bits per pixel</span>' if rate is not None else ""
        below += _margin(row, rows, key, unit)
        digits = ".1f" if key == "psnr_db" else ".3f"
        tiles.append(
            f'<li><span class="tokens">{_tokens_text(tokens)}</span>'
            f'<span class="value">{value:{digits}} <small>{unit}</small></span>{below}</li>'
        )
    return f'<ul class="tiles" aria-label="Quality of each budget">{"".join(tiles)}</ul>' if tiles else ""


def _environment_section(evaluation: dict[str, Any]) -> str:
    long = ("rows", "environment", "per_clip", "against_codecs")  # eval.json holds them
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
