"""Draws repeating.svg: python docs/pictures/repeating.py eval.json, of `vtok eval` of a compressor of texts.

F1 of what is said again by words a token, with 95 % intervals over texts: the compressor, its controls, every word.
"""

import argparse
import json
from pathlib import Path

from training_curves import picture

from vtok.evaluation.charts import Level, Series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    found = json.loads(parser.parse_args().table.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["method"] not in ("blind", "words")]
    shown = []
    for at, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["ratio"])
        marks = [(row["ratio"], 100 * row["token_f1"], "") for row in own]
        bars = tuple((row["ratio"], 100 * row["token_f1_ci"][0], 100 * row["token_f1_ci"][1]) for row in own)
        name = "C3" if method == found["family"] else method
        shown.append(Series(name, marks, (1, 0, 2)[at], dashed=at > 0, whiskers=bars))
    whole = next(row for row in found["rows"] if row["method"] == "words")
    picture(
        "repeating.svg",
        f"Words said again, {found['clips']} held-out texts of {found['words_mean']:.0f} words",
        shown,
        x_title="words a token (log)",
        y_title="F1, %",
        log_x=True,
        x_ticks=sorted({row["ratio"] for row in rows}),
        levels=[Level("every word", 100 * whole["token_f1"], 6)],
    )


if __name__ == "__main__":
    main()
