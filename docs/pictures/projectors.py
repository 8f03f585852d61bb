"""Draws projectors.svg: python docs/pictures/projectors.py eval-0/eval.json eval-1/eval.json ... [--beside eval.json]

The tables are those of several seeds of one compressor, and beside them of others, as benchmarks/seeds.py takes them.
Accuracy by tokens, means over the seeds, with 95 % intervals over videos: the compressor, the other methods that come
closest, and the language model blind and with all tokens.
"""

import argparse
import json
import sys
from pathlib import Path

from training_curves import picture

from vtok.evaluation.answer_rows import interval, mean
from vtok.evaluation.charts import Level, Series

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from seeds import merge  # noqa: E402

SHOWN = 5  # reducers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--beside", nargs="+", type=Path, default=[])
    options = parser.parse_args()
    tables, beside = (
        [json.loads(path.read_text(encoding="utf-8")) for path in paths] for paths in (options.tables, options.beside)
    )
    family, found = tables[0]["family"], merge(tables, beside)
    keys = tables[0]["per_question"]["keys"]
    budgets = [budget for method, budget in found if method == family]
    right = {each: [mean(answers) for answers in zip(*runs)] for each, runs in found.items()}
    others = {m for m, b in found if b in budgets and m != family and all((m, b) in found for b in budgets)}
    near = sorted(others, key=lambda m: -sum(mean(right[m, b]) for b in budgets))[:SHOWN]
    shown = []
    for at, method in enumerate([family, *near]):
        apart = 1.035 ** (at - SHOWN / 2)  # intervals at one number of tokens stand beside one another
        marks = [(int(b) * apart, 100 * mean(right[method, b]), "") for b in budgets]
        bounds = [interval(right[method, b], keys, seed=0) or (0.0, 0.0) for b in budgets]
        bars = tuple((x, 100 * low, 100 * high) for (x, _, _), (low, high) in zip(marks, bounds))
        shown.append(Series(method, marks, (1, 0, 2, 3, 4, 5)[at], dashed=at > 0, whiskers=bars))
    ends = {"full": "all tokens", "blind": "blind"}
    levels = [
        Level(ends[method], 100 * mean(right[method, budget]), 6 + (method == "blind"))
        for method, budget in found
        if method in ends
    ]
    picture(
        "projectors.svg",
        f"Right answers by tokens, {len(tables)} seed{'s' * (len(tables) > 1)}, {len(set(keys))} held-out videos",
        shown,
        x_title="tokens per clip (log)",
        y_title="accuracy, %",
        log_x=True,
        x_ticks=[float(b) for b in budgets],
        levels=levels,
    )


if __name__ == "__main__":
    main()
