"""`python -m soak`: the table of `make soak`.

Everything is drawn from --seed and happens in a temporary folder with a corpus made for it. Exit status 1 when any line
of the table is not what it must be.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from soak import corpus as corpora
from soak import crashes, faults, inputs, judge, kills, launch
from soak.corpus import Corpus
from soak.damage import REJECT
from soak.jobs import Count, jobs
from vtok.commit import commit_of
from vtok.data.workers import cores

TURN = ("training", "packing", "tokenizing", "exporting", "training")  # of kills


@dataclass(frozen=True)
class Row:
    """A line of the table. count: what was really done. faults: one line each; none: it is as it must be."""

    what: str
    count: str
    found: str
    faults: list[str]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = _parser(short="--short" in argv).parse_args(argv)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: sys.exit(128 + n))  # so that what was started is ended
    root = Path(tempfile.mkdtemp(prefix="vtok-soak-", dir=options.folder))
    began, rows = time.monotonic(), []
    try:
        corpus = corpora.at(options.corpus) if options.corpus else corpora.build(root)
        for row in measure(corpus, options, began):
            rows.append(row)
            print(f"[{time.monotonic() - began:5.0f} s] {_line(row)}", file=sys.stderr, flush=True)
            for fault in row.faults[:20]:
                print(f"        {fault[:400]}", file=sys.stderr, flush=True)
    finally:
        if options.keep:
            print(f"kept: {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)
    text = table(rows, seconds=time.monotonic() - began, seed=options.seed)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if any(row.faults for row in rows) else 0


def measure(corpus: Corpus, options: argparse.Namespace, began: float) -> Iterator[Row]:
    """The rows, as they come; those that the time does not allow any more are left out, and named so."""
    draw = random.Random(options.seed)
    late = began + 60 * options.minutes

    def in_time() -> bool:
        return time.monotonic() < late

    yield from damaged(corpus, options.mutations, options.seed)
    work = jobs(corpus, workers=1 if options.short else 2)
    for name, times in dealt(options.kills).items():
        if times and in_time():
            yield _kills(f"SIGKILL while {name}", kills.killed(work[name], corpus, times, draw))
    if options.preemptions and in_time():
        steps = 20 + 6 * options.preemptions
        count = kills.preempted(jobs(corpus, steps=steps)["training"], corpus, options.preemptions, draw)
        yield _kills("SIGUSR1 while training, loader workers too", count, of=options.preemptions, word="survived")
    single = jobs(corpus, workers=0, steps=6)
    for name in ("exporting", "tokenizing", "packing", "training"):
        if options.operations and in_time():
            count = crashes.crashed(single[name], corpus, draw, most=options.operations)
            yield _kills(f"killed at an operation on files, {name}", count)
    if options.faults:
        for outcome in faults.every_fault(corpus, draw, short=options.short):
            yield Row(outcome.name, "1", outcome.how, outcome.faults)
            if not in_time():
                break


def damaged(corpus: Corpus, count: int, seed: int) -> Iterator[Row]:
    """Changed inputs, read in this program; one of each kind that must be refused by its command, too."""
    verdicts = inputs.judged(corpus, count, seed) if count else []
    for kind in Counter(verdict.case.kind for verdict in verdicts):
        found = judge.tally(verdict for verdict in verdicts if verdict.case.kind == kind)
        said = (
            f"{found.uncaught} uncaught, {found.silent} accepted in silence, {found.refused_well} refused though sound"
        )
        told = [f"{v.case.change} ({v.case.rule}): {v.outcome}: {v.text}" for v in found.faults]
        yield Row(f"changed: {kind}", str(found.inputs), said, told)
    if count:
        yield by_command(corpus, seed)


def by_command(corpus: Corpus, seed: int) -> Row:
    """The same as a user sees it: an exit status and words, no traceback."""
    model, run, video = str(corpus.export), "run", str(corpus.videos / "clip00.mp4")
    commands = {
        "vtok": lambda path: ["decode", model, str(path), "--out", str(path.with_suffix(".mkv"))],
        "shards, verified": lambda path: ["shards", "--verify", str(path), "--workers", "0", "--quiet"],
        "export": lambda path: ["encode", str(path), video, "--out", str(path.parent / "a.vtok")],
        "config": lambda path: ["train", str(path), f"name={run}", f"out={path.parent}"],
        "checkpoint": lambda path: ["export", str(path), "--which", "last", "--out", str(path.parent / "export")],
        "video": lambda path: ["encode", model, str(path), "--out", str(path.with_suffix(".vtok"))],
    }
    wrong, done = [], 0
    for kind, arguments in commands.items():
        case = next(case for case in inputs.cases(corpus, 400, seed + 1, kinds=(kind,)) if case.rule == REJECT)
        path = case.make(corpus.scratch("command"))
        command = launch.run(arguments(path), corpus.log(f"command-{kind}"))
        fault = faults.clear(command)
        done += 1
        wrong += [f"{kind}, {case.change}: {fault}"] if fault else []
    return Row("the same, by the command", str(done), "exit status and words, no traceback", wrong)


def dealt(times: int) -> dict[str, int]:
    """So many kills, dealt to the kinds of work in turn."""
    return {name: sum(TURN[n % len(TURN)] == name for n in range(times)) for name in dict.fromkeys(TURN)}


def _kills(what: str, count: Count, *, of: int = 0, word: str = "") -> Row:
    found = f"{count.lost} samples lost, {count.repeated} repeated, {count.corrupt} files not whole"
    number = f"{count.times} of {of} {word}" if of else str(count.times)
    told = list(count.faults)
    if count.lost or count.repeated or (of and count.times != of):
        told.append(f"{number}; {found}")
    return Row(what, number, found + ("; the end equal to the bit" if not told else ""), told)


def _line(row: Row) -> str:
    return f"{row.what}: {row.count}: {row.found}: {'FAILED' if row.faults else 'as it must be'}"


def table(rows: list[Row], *, seconds: float, seed: int) -> str:
    """Markdown: what was done, how often, what came of it; date, commit and machine below."""
    lines = ["| what | times | found | |", "|---|---|---|---|"]
    for row in rows:
        verdict = "ok" if not row.faults else f"**{len(row.faults)} wrong**"
        lines.append(f"| {row.what} | {row.count} | {row.found} | {verdict} |")
    commit = commit_of(Path(__file__).resolve().parent.parent, ("vtok", "soak")) or "unknown"
    made = f"{time.strftime('%Y-%m-%d')}, commit {commit}, seed {seed}, {seconds / 60:.1f} minutes"
    return "\n".join([*lines, "", f"{made} on {cores()} CPU cores."])


def _parser(*, short: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soak", description="Does vtok keep its word when things go wrong?")
    add = parser.add_argument
    add("--short", action="store_true", help="everything once or a few times: a minute of two quiet cores")
    add("--minutes", type=float, default=2 if short else 20, help="begin nothing new after so many")
    add("--kills", type=int, default=4 if short else 20)
    add("--preemptions", type=int, default=3 if short else 20)
    add("--mutations", type=int, default=100 if short else 1000, help="changed inputs")
    add("--operations", type=int, default=2 if short else 25, help="on files, of each kind of work, to be killed at")
    add("--no-faults", dest="faults", action="store_false", help="no full disk, read-only folder, clock, two at once")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE", help="write the table there, too")
    add("--folder", type=Path, help="where to work (default: the system's folder of temporary files)")
    add("--corpus", type=Path, metavar="DIR", help="take what an earlier call with --keep left, instead of making it")
    add("--keep", action="store_true", help="leave what was worked on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
