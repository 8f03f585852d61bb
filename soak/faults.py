"""A full disk, a folder that cannot be written, a clock that jumps, two runs in one place, another number of processes.

What must come of each: one clear line and an exit status, no file that is not whole under its final name, and after the
cause is gone the same command goes on to the very end it would have had.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak import kills, launch
from soak.corpus import Corpus
from soak.crashes import writes
from soak.jobs import Count, Job, jobs, train_arguments


@dataclass
class Outcome:
    """name: what was done. how: by which means, and how often. faults: what was wrong."""

    name: str
    how: str
    faults: list[str]


def clear(command: launch.Command, since: int = 0) -> str:
    """What is wrong with how a command failed; "" where it said why in words and gave an exit status."""
    text = command.output()[since:]
    if command.code is None or command.code <= 0:
        return f"it ended with {command.code}, no error status"
    if "Traceback (most recent call last)" in text:
        return f"it ended with a traceback: {' | '.join(text.splitlines()[-2:])}"
    return "" if text.strip() else "it said nothing"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes at `folder`; False where none can be mounted here."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True, timeout=30)


def _mount(*arguments: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], check=False, capture_output=True, timeout=30).returncode == 0


def limited(largest: int, arguments: list[str]) -> int:
    """`vtok ARGUMENTS` in a process that may write no file of more than so many bytes."""
    from vtok.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead: "File too large"
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    return main(arguments)


def full_disk(corpus: Corpus, job: Job) -> Outcome:
    """A disk that is full before the job is done; then it has room, and the same command ends as always."""
    right, _ = kills.whole(job, corpus)
    needed = _size(corpus.root / "scratch" / f"{job.name}-whole")
    log, count, faults = corpus.log(f"{job.name}-full"), Count(), []
    out = corpus.scratch(f"{job.name}-full")
    with small_disk(out, max(8192, needed // 2)) as mounted:
        since = log.stat().st_size if log.exists() else 0
        if mounted:
            how = "a tmpfs of half of what is needed"
            command = launch.run(job.arguments(out), log)
        else:
            how = "RLIMIT_FSIZE at half of the largest file"
            largest = max(path.stat().st_size for path in (out.parent / f"{job.name}-whole").rglob("*.*"))
            command = launch.start_function(limited, (largest // 2, job.arguments(out)), log)
            command.wait()
        if wrong := clear(command, since):
            faults.append(wrong)
        count.look(out)
        if mounted:
            _mount("-o", f"remount,size={8 * needed + (1 << 20)}", str(out))
        again = launch.run(job.arguments(out), log)
        if again.code != 0:
            faults.append(f"with room it ended with {again.code}: {again.tail()}")
        else:
            count.compare(job.ended(out), right)
    return Outcome(f"full disk, {job.name}", how, faults + count.faults + _lost(count))


def read_only(corpus: Corpus, job: Job) -> Outcome:
    """A folder that cannot be written: every command says so at once."""
    out, log = corpus.scratch(f"{job.name}-readonly"), corpus.log(f"{job.name}-readonly")
    faults = []
    with small_disk(out, 1 << 20) as mounted:
        if mounted:
            how = "a tmpfs mounted read-only"
            _mount("-o", "remount,ro", str(out))
        else:
            how = "a folder without the right to write"
            out.chmod(0o555)
        try:
            command = launch.run(job.arguments(out), log)
        finally:
            if not mounted:
                out.chmod(0o755)
        wrong = clear(command)
        if wrong:
            faults.append(wrong)
        elif str(out) not in command.output():
            faults.append(f"it does not say which folder: {command.tail(2)}")
    return Outcome(f"read-only folder, {job.name}", how, faults)


def shifted(seconds: float, arguments: list[str]) -> int:
    """`vtok ARGUMENTS` where the clock says another time."""
    from vtok.cli import main

    real = time.time
    time.time = lambda: real() + seconds
    return main(arguments)


def clock_moved(corpus: Corpus, job: Job, draw: random.Random) -> Outcome:
    """Killed, and gone on with a day earlier, then two days later, every file's time moved too: the end is the same."""
    right, seconds = kills.whole(job, corpus)
    out, log, count = corpus.scratch("clock"), corpus.log("clock"), Count()
    for moved in (0.0, -86400.0, 86400.0):
        command = launch.start_function(shifted, (moved, job.arguments(out)), log)
        command.process.join(draw.uniform(0.5, 0.9) * seconds)
        count.times += command.kill()
        count.look(out)
        for path in out.rglob("*"):
            if path.is_file():
                when = time.time() - 2 * moved
                os.utime(path, (when, when))
    command = launch.start_function(shifted, (-86400.0, job.arguments(out)), log)
    if command.wait() != 0:
        return Outcome("clock moved", "", [f"it ended with {command.code}: {command.tail()}"])
    count.compare(job.ended(out), right)
    how = f"{count.times} kills, the clock and the times of files a day back and forth"
    return Outcome("clock moved", how, count.faults + _lost(count))


def held(marks: str, name: str, arguments: list[str]) -> int:
    """`vtok ARGUMENTS`, which stands before the first file it writes with `name` in its path, until it may go on."""
    from vtok.cli import main

    here, on = Path(marks) / "here", Path(marks) / "on"

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and writes(values) and name in os.path.abspath(values[0]) and not here.exists():
            here.touch()
            while not on.exists():
                time.sleep(0.005)

    sys.addaudithook(watch)
    return main(arguments)


def two_at_once(corpus: Corpus, job: Job, name: str) -> Outcome:
    """A second start in the place of a running one is refused, and the first ends as if there had been none.

    name: in the path of a file that the first begins to write when the second comes.
    """
    right, _ = kills.whole(job, corpus)
    out, log, second_log = corpus.scratch("two"), corpus.log(f"{job.name}-first"), corpus.log(f"{job.name}-second")
    faults, count, marks = [], Count(), corpus.scratch("marks")
    first = launch.start_function(held, (str(marks), name, job.arguments(out)), log)
    with launch.ended(first):
        if not launch.wait_until((marks / "here").exists, first):
            return Outcome(f"two at once, {job.name}", "", ["the first had ended before the second began"])
        second = launch.run(job.arguments(out), second_log)
        (marks / "on").touch()
        if wrong := clear(second):
            faults.append(f"the second: {wrong}")
        if first.wait() != 0:
            faults.append(f"the first ended with {first.code}: {first.tail()}")
        else:
            count.look(out)
            count.compare(job.ended(out), right)
    return Outcome(f"two at once, {job.name}", "the first waits meanwhile", faults + count.faults + _lost(count))


def wrong_world(corpus: Corpus) -> Outcome:
    """A run of one process cannot go on with three: which numbers would do is said before any process starts."""
    out, log = corpus.scratch("world"), corpus.log("world")
    shutil.copytree(corpus.run, out / "run", symlinks=True)
    text = (out / "run" / "config.yaml").read_text()
    (out / "run" / "config.yaml").write_text(text.replace("name: first", "name: run"))
    arguments = [*train_arguments(corpus, out, steps=50), "trainer.devices=3"]
    command = launch.run(arguments, log)
    wrong = clear(command)
    said = command.output()
    both = "1 process(es)" in said and "3" in said  # the number that there was, and the number that there would be
    faults = [wrong] if wrong else [] if both else [f"it says: {command.tail(2)}"]
    return Outcome("another number of processes on resume", "3 for a run of 1", faults)


def every_fault(corpus: Corpus, draw: random.Random, *, short: bool = False) -> Iterator[Outcome]:
    """All of them; the short form leaves out what repeats the same check for another kind of work."""
    work = jobs(corpus, workers=0, steps=30)
    training, tokenizing = work["training"], work["tokenizing"]
    for name in ("tokenizing",) if short else work:
        yield full_disk(corpus, work[name])
        yield read_only(corpus, work[name])
    yield wrong_world(corpus)
    if not short:
        yield clock_moved(corpus, training, draw)
    yield two_at_once(corpus, training, "/checkpoints/")
    if not short:
        yield two_at_once(corpus, tokenizing, ".tar.")


def _lost(count: Count) -> list[str]:
    return [f"{count.lost} samples lost, {count.repeated} repeated"] if count.lost or count.repeated else []


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
