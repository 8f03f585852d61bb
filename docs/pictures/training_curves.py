"""Draws the pictures of docs/training_curves.md: python docs/pictures/training_curves.py RUNS, the folder of its runs.

SVG files that stand alone (a page's style sheet does not reach a picture), about 10 KB each.
"""

import argparse
import html
import json
from pathlib import Path
from typing import Any

from vtok.evaluation.charts import Series, chart

HERE = Path(__file__).parent
COLOURS = {
    0: "#00815f",
    1: "#d55e00",
    2: "#0072b2",
    3: "#7a808c",
    4: "#6b3fa0",
    5: "#a8690a",
    6: "#b0307a",
    7: "#3d434d",
}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#3d434d}.grid{stroke:#e6e3dd}.axis{stroke:#8a8f98}"
    ".line{fill:none;stroke-width:2}.dashed{stroke-dasharray:5 4}.title{font-weight:600}"
    ".level .line{stroke-dasharray:2 3}.whisker{stroke:currentColor;opacity:.7}"
    + "".join(
        f".s{i}{{color:{c}}}.s{i} .line,.s{i}.line{{stroke:{c}}}.s{i} .mark,.s{i} text{{fill:{c}}}"
        for i, c in COLOURS.items()
    )
)


def lines(runs: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def series(runs: Path, run: str, key: str, name: str, colour: int, *, dashed: bool = False, first: int = 0) -> Series:
    rows = [row for row in lines(runs, run) if row["step"] >= first and row.get(key) is not None]
    points = [(row["step"], row[key], "") for row in rows]
    return Series(name, points, colour, marks=False, dashed=dashed)


def picture(
    file: str, title: str, shown: list[Series], *, y_title: str, x_title: str = "step", log_y: bool = False, **more: Any
) -> None:
    inner = chart(shown, x_title=x_title, y_title=y_title, log_y=log_y, **more)
    inner = inner.replace("<svg ", '<svg y="22" width="560" height="340" ', 1)
    legend, x = "", 52
    for s in shown:
        dashed = " dashed" if s.dashed else ""
        legend += (
            f'<line class="line s{s.colour}{dashed}" x1="{x}" x2="{x + 22}" y1="376" y2="376"/>'
            f'<text x="{x + 27}" y="380">{html.escape(s.name)}</text>'
        )
        x += 36 + round(6.2 * len(s.name))
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 392" width="560" height="392">'
        f'<style>{STYLE}</style><rect width="560" height="392" fill="#fff"/>'
        f'<text class="title" x="52" y="17">{html.escape(title)}</text>{inner}{legend}</svg>\n'
    )
    (HERE / file).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    error = "train/l1"
    picture(
        "curves_error.svg",
        "Reconstruction error (train/l1)",
        [
            series(runs, "healthy", error, "healthy", 0),
            series(runs, "late", error, "lr x 100 from step 475", 1, first=470),
            series(runs, "diverge", error, "lr x 100 from step 0", 2),
            series(runs, "collapse", error, "collapsed", 3, dashed=True),
        ],
        y_title="train/l1",
        log_y=True,
    )
    share = "train/codebook_perplexity_share"
    picture(
        "curves_codebook.svg",
        "Perplexity against even use (train/codebook_perplexity_share)",
        [
            series(runs, "healthy", share, "healthy", 0),
            series(runs, "late", share, "lr x 100 from step 475", 1, first=470),
            series(runs, "collapse", share, "collapsed", 3, dashed=True),
        ],
        y_title="share",
        log_y=True,
    )
    picture(
        "curves_game.svg",
        "The discriminator's logits",
        [
            series(runs, "healthy", "train/logits_real", "real", 0),
            series(runs, "healthy", "train/logits_fake", "fake", 2),
            series(runs, "no_warmup", "train/logits_real", "real, no warm-up", 0, dashed=True),
            series(runs, "no_warmup", "train/logits_fake", "fake, no warm-up", 2, dashed=True),
        ],
        y_title="mean logit",
    )
    picture(
        "curves_gradients.svg",
        "Norms of gradients, before clipping",
        [
            series(runs, "healthy", "train/grad_norm_model", "model", 0),
            series(runs, "healthy", "train/grad_norm_adversarial", "discriminator", 2),
            series(runs, "healthy", "train/grad_norm", "joint", 3, dashed=True),
        ],
        y_title="norm",
        log_y=True,
    )


if __name__ == "__main__":
    main()
