"""Inline SVG line and bar charts, drawn in Python: no plotting library, no script, readable in light and dark.

Colours come from the page's style sheet (classes s0 to s9); each has a marker of its own, filled or hollow, so that
colour is never the only sign and a page may be printed in black. Hover texts are SVG titles.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NUM_COLOURS = 10  # .s0 to .s9 in assets/report.css


@dataclass(frozen=True)
class Series:
    """A line of a chart: points (x, y, hover text), whiskers (x, low, high), a label written at its end."""

    name: str
    points: list[tuple[float, float, str]]
    colour: int
    ours: bool = False
    dashed: bool = False
    marks: bool = True
    label: str = ""
    whiskers: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Level:
    """A value that does not depend on x: a line across the chart with its name, in a band from low to high."""

    name: str
    value: float
    colour: int
    text: str = ""  # on hover
    band: tuple[float, float] | None = None


def _css(s: Series) -> str:
    return f"series s{s.colour % NUM_COLOURS}" + (" ours" if s.ours else "")


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round values that lie in [low, high]."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 8) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them (or every n-th power) so that about `count` remain."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(ticks) <= count:
            break
    ticks = ticks[:: math.ceil(len(ticks) / count)] if ticks else []
    return ticks if len(ticks) >= 2 else [low, high]


def tick_text(value: float) -> str:
    """A tick's label: 0.001, 25, 10k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    if abs(value) >= 1000:
        return f"{value:.4g}"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def _mark(colour: int, x: float, y: float, size: float) -> str:
    """A marker whose shape goes with its colour, so that colour is never the only sign; five shapes, then hollow."""
    kind = "mark hollow" if colour % NUM_COLOURS >= 5 else "mark"
    if colour % 5 == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    s = size
    corners = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.25 * s), (1.15 * s, s), (-1.15 * s, s)],
        3: [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        4: [(0, 1.25 * s), (1.15 * s, -s), (-1.15 * s, -s)],
    }[colour % 5]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{points}"/>'


def chart(
    series: list[Series],
    *,
    x_title: str,
    y_title: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: list[float] | None = None,
    levels: Sequence[Level] = (),
) -> str:
    """An inline SVG line chart with hover texts; points a logarithmic axis cannot show are left out."""

    def usable(x: float, y: float) -> bool:
        return not (log_x and x <= 0) and not (log_y and y <= 0)

    shown = [(s, [p for p in s.points if usable(p[0], p[1])]) for s in series]
    shown = [(s, points) for s, points in shown if points]
    if not shown:
        return ""
    width, height, left, top, bottom = 560.0, 340.0, 52.0, 10.0, 44.0
    right = 40.0 if any(s.label for s, _ in shown) else 14.0
    xs = [x for _, points in shown for x, _, _ in points]
    ys = [y for _, points in shown for _, y, _ in points]
    ys += [edge for s, _ in shown for _, *edges in s.whiskers for edge in edges if not log_y or edge > 0]
    ys += [y for level in levels for y in (level.value, *(level.band or ())) if not log_y or y > 0]
    place_x, low_x, high_x = _axis(xs, log_x, left, width - right)
    place_y, low_y, high_y = _axis(ys, log_y, height - bottom, top)
    parts = []
    for tick in log_ticks(low_y, high_y) if log_y else linear_ticks(low_y, high_y):
        y = place_y(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        )
    ticks = x_ticks or (log_ticks(low_x, high_x) if log_x else linear_ticks(low_x, high_x))
    last = -math.inf
    for tick in ticks:
        x = place_x(tick)
        if x - last < 26:  # too close to read
            continue
        last = x
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
            f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick_text(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(x_title)}</text>'
    )
    for at, level in enumerate(levels):
        parts.append(_level(level, place_y, left, width - right, name_left=at % 2 == 1))
    for s, points in sorted(shown, key=lambda item: item[0].ours):  # ours is drawn last, on top
        places = [(place_x(x), place_y(y), text) for x, y, text in points]
        parts.append(f'<g class="{_css(s)}" data-series="{html.escape(s.name)}">')
        if len(places) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
            parts.append(f'<polyline class="line{" dashed" if s.dashed else ""}" points="{line}"/>')
        for x, low, high in s.whiskers:
            if usable(x, low):
                at = f"{place_x(x):.1f}"
                parts.append(
                    f'<line class="whisker" x1="{at}" x2="{at}" y1="{place_y(low):.1f}" y2="{place_y(high):.1f}"/>'
                )
        if s.marks or len(places) == 1:
            for x, y, text in places:
                mark = _mark(s.colour, x, y, 5.0 if s.ours else 4.0)
                parts.append(f"<g>{mark}<title>{html.escape(text)}</title></g>")
        if s.label:
            x, y, _ = places[-1]
            parts.append(f'<text class="end" x="{x + 8:.1f}" y="{y + 4:.1f}">{html.escape(s.label)}</text>')
        parts.append("</g>")
    label = f"{y_title} against {x_title}: " + ", ".join([s.name for s, _ in shown] + [each.name for each in levels])
    return _svg(width, height, label, parts)


def _level(level: Level, place: Callable[[float], float], left: float, right: float, *, name_left: bool) -> str:
    y, name = place(level.value), html.escape(level.name)
    css = f'class="series level s{level.colour % NUM_COLOURS}" data-series="{name}"'
    band = ""
    if level.band is not None:
        low, high = (place(edge) for edge in level.band)
        band = (
            f'<rect class="band" x="{left}" width="{right - left}" y="{min(low, high):.1f}" '
            f'height="{abs(low - high):.1f}"/>'
        )
    return (
        f'<g {css}>{band}<line class="line" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="end" x="{left + 4 if name_left else right - 4}" y="{y - 5:.1f}" '
        f'text-anchor="{"start" if name_left else "end"}">{name}</text>'
        f"<title>{html.escape(level.text or level.name)}</title></g>"
    )


def _svg(width: float, height: float, label: str, parts: list[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _axis(
    values: list[float], log_scale: bool, start: float, end: float
) -> tuple[Callable[[float], float], float, float]:
    """(value -> pixel, lowest, highest) with a margin of 4 % on both sides."""
    scale = math.log10 if log_scale else float
    low, high = scale(min(values)), scale(max(values))
    if high - low < 1e-12:
        pad = 0.5 if log_scale else max(abs(low) * 0.05, 0.5)
    else:
        pad = 0.04 * (high - low)
    low, high = low - pad, high + pad
    back = (lambda v: 10.0**v) if log_scale else float
    return lambda value: start + (scale(value) - low) / (high - low) * (end - start), back(low), back(high)


def legend(series: Iterable[Series]) -> str:
    """Buttons that name the series; the page's script makes them hide and show."""
    items = []
    for s in series:
        line = f'<line class="line{" dashed" if s.dashed else ""}" x1="1" x2="29" y1="7" y2="7"/>'
        items.append(
            f'<button type="button" aria-pressed="true" data-series="{html.escape(s.name)}">'
            f'<svg viewBox="0 0 30 14" aria-hidden="true"><g class="{_css(s)}">'
            f"{line}{_mark(s.colour, 15, 7, 4.0)}</g></svg>{html.escape(s.name)}</button>"
        )
    return f'<div class="legend" role="group" aria-label="Show or hide a method">{"".join(items)}</div>'


def bars(values: list[float], *, title: str) -> str:
    """An inline SVG bar chart over positions 0, 1, ...; NaN leaves a gap."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    width, height, left, bottom = 560.0, 220.0, 52.0, 36.0
    top_value = max(max(finite), 0.0) or 1.0
    step = (width - left - 14) / len(values)
    parts = []
    for tick in linear_ticks(0.0, top_value, 4):
        y = height - bottom - tick / top_value * (height - bottom - 12)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    for i, value in enumerate(values):
        if math.isfinite(value):
            tall = max(value / top_value * (height - bottom - 12), 0.0)
            parts.append(
                f'<rect class="bar" x="{left + i * step:.2f}" y="{height - bottom - tall:.2f}" '
                f'width="{max(step * 0.86, 0.5):.2f}" height="{tall:.2f}">'
                f"<title>position {i}: {value:.4g}</title></rect>"
            )
    for tick in linear_ticks(0.0, float(len(values) - 1), 8) if len(values) > 1 else [0.0]:
        if tick == int(tick):
            x, y = left + (tick + 0.43) * step, height - bottom + 17
            parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + width - 14) / 2}" y="{height - 4}" text-anchor="middle">position</text>')
    return _svg(width, height, f"{title} of {len(values)} positions", parts)


def thin(points: list[tuple[float, float, str]], most: int = 400) -> list[tuple[float, float, str]]:
    """At most about `most` points: every n-th, the last one kept."""
    every = max(1, math.ceil(len(points) / most))
    return points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
