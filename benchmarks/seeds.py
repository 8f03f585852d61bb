"""Several trainings of one compressor as one table: python benchmarks/seeds.py eval-0/eval.json eval-1/eval.json ...

Each eval.json is of `vtok eval` on the same questions: of runs that differ in their seed, beside reducers (on
projectors of as many seeds, where `--tuned` was given). Of every method and budget it prints the mean over the runs of
what was right, and each run's own; of every budget the compressor's lead over each other method, paired question by
question, the runs' answers to a question averaged first. Intervals are 95 % bootstrap intervals over videos: they say
how far the lead would move with other videos; how far with other seeds, the single runs say.

Where all reducers stand on one projector, whatever the compressor's seed, one table with them is enough: the others may
be made without (no --full), and `--beside eval.json ...` takes rows from tables of other compressors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtok.evaluation.answer_rows import interval, mean

ENDS = ("blind", "full")


def merge(
    tables: list[dict[str, Any]], beside: Sequence[dict[str, Any]] = ()
) -> dict[tuple[str, str], list[list[float]]]:
    """{(method, budget): answers of each run, question after question}; budget "0": none, "-": all tokens.

    The family's budgets are those that every run measured. Other methods have as many runs as measured them, in
    `beside` too; rows that none could measure (downsampling, where shards hold features) are left out.
    Raises: ValueError where the tables are not of one family (those beside it: of others) and the same questions, or
        the runs have no budget in common.
    """
    first, every = tables[0], [*tables, *beside]
    family = first["family"]
    for table in every:
        if "videos" not in table["per_question"]:
            raise ValueError(
                f"{table['model']} does not say which video each clip is from: measure it again (vtok eval)"
            )
    for other in every[1:]:
        if (other["family"] == family) != any(other is table for table in tables):
            raise ValueError(
                f"{other['model']} is of family {other['family']}, {first['model']} of {family}: runs are of one "
                "family, tables --beside them of others"
            )
        for part in ("keys", "ids", "videos"):
            if other["per_question"][part] != first["per_question"][part]:
                raise ValueError(f"{other['model']} and {first['model']} were not asked the same questions ({part})")
    found: dict[tuple[str, str], list[list[float]]] = {}
    for table in every:
        for method, budgets in table["per_question"]["right"].items():
            for budget, answers in budgets.items():
                if None not in answers:
                    found.setdefault((method, budget), []).append([float(x) for x in answers])
                elif any(x is not None for x in answers):
                    raise ValueError(f"{method} was not asked every question at {budget} tokens")
    found = {(m, b): runs for (m, b), runs in found.items() if m != family or len(runs) == len(tables)}
    if not any(method == family for method, _ in found):
        raise ValueError(f"the runs of {family} have no number of tokens in common")
    return found


def leads(
    found: dict[tuple[str, str], list[list[float]]], family: str, videos: list[str], *, seed: int = 0
) -> list[dict[str, Any]]:
    """At every budget the family against each other method measured there, least lead first."""
    out = []
    for budget in dict.fromkeys(b for m, b in found if m == family):
        ours = [mean(each) for each in zip(*found[family, budget])]
        against = []
        for method in dict.fromkeys(m for m, b in found if b == budget and m not in (family, *ENDS)):
            theirs = [mean(each) for each in zip(*found[method, budget])]
            gap = [a - b for a, b in zip(ours, theirs)]
            bounds = interval(gap, videos, seed=seed)
            against.append({"budget": budget, "against": method, "difference": mean(gap), "difference_ci": bounds})
        out += sorted(against, key=lambda each: each["difference"])
    return out


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f}"


def report(tables: list[dict[str, Any]], beside: Sequence[dict[str, Any]] = (), *, seed: int = 0) -> str:
    """The rows and the leads as Markdown."""
    family, found = tables[0]["family"], merge(tables, beside)
    keys, videos = (tables[0]["per_question"][part] for part in ("keys", "videos"))
    lines = [f"{len(tables)} runs of {family}, {len(keys)} questions of {len(set(keys))} clips, per cent right", ""]
    lines += ["| method | tokens | mean | 95 % | runs |", "|---|---|---|---|---|"]
    order = sorted(found, key=lambda x: (int(x[1]) if x[1].isdigit() else 10**9, -mean(list(map(mean, found[x])))))
    for method, budget in order:
        runs = found[method, budget]
        bounds = interval([mean(each) for each in zip(*runs)], videos, seed=seed)
        shown = f"{_per_cent(bounds[0])} to {_per_cent(bounds[1])}" if bounds else ""
        own = ", ".join(_per_cent(mean(run)) for run in runs)
        name = f"**{method}**" if method == family else method
        lines.append(f"| {name} | {budget} | {_per_cent(mean(list(map(mean, runs))))} | {shown} | {own} |")
    lines += ["", f"| tokens | {family} against | lead, points | 95 % | |", "|---|---|---|---|---|"]
    for each in leads(found, family, videos, seed=seed):
        low, high = each["difference_ci"] or (float("nan"), float("nan"))
        verdict = "leads" if low > 0 else "trails" if high < 0 else "even"
        shown = f"{100 * low:+.1f} to {100 * high:+.1f}"
        lines.append(
            f"| {each['budget']} | {each['against']} | {100 * each['difference']:+.1f} | {shown} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path, metavar="eval.json")
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="eval.json", help="of other compressors")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options = parser.parse_args()
    try:
        runs, others = (
            [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            for paths in (options.tables, options.beside)
        )
        print(report(runs, others, seed=options.seed))
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
