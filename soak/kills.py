"""SIGKILL at random moments, and SIGUSR1 as a scheduler sends it before a time limit: the end must be that of an
unbroken run, to the bit.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from soak import launch
from soak.corpus import Corpus
from soak.jobs import Count, Ended, Job, ledger
from vtok.training import strategy

PREEMPTED = 128 + signal.SIGUSR1  # exit status of a run that saved and ended because it was told to


def whole(job: Job, corpus: Corpus) -> tuple[Ended, float]:
    """What stands at the end of an unbroken run, and how many seconds it took."""
    out, began = corpus.scratch(f"{job.name}-whole"), time.monotonic()
    launch.must(job.arguments(out), corpus.log(f"{job.name}-whole"))
    return job.ended(out), time.monotonic() - began


def killed(job: Job, corpus: Corpus, times: int, draw: random.Random) -> Count:
    """Kills the job and all its processes `times` times, each at a moment drawn from the length of an unbroken run.

    Each start goes on where the last one was killed; one that comes to its end is compared, and another life begins.
    """
    right, seconds = whole(job, corpus)
    out, log, count = corpus.scratch(f"{job.name}-killed"), corpus.log(f"{job.name}-killed"), Count()
    while count.times < times:
        command = launch.start(job.arguments(out), log)
        command.process.join(draw.uniform(0.02, 1.0) * seconds)
        count.starts += 1
        if command.kill():
            count.times += 1
            count.look(out)
        elif _ended_well(command, count):
            count.compare(job.ended(out), right)
            out = corpus.scratch(f"{job.name}-killed")
    _finish(job, out, corpus, count, right)
    return count


def preempted(job: Job, corpus: Corpus, times: int, draw: random.Random) -> Count:
    """Sends SIGUSR1 to a training and its loader workers, some steps after its start; the next start goes on.

    `times` counts those that were survived: the run ended with the signal's status, its checkpoint is that of the step
    it had just made, and says so.
    """
    right, _ = whole(job, corpus)
    steps = sum(name.startswith("step ") for name in right.exact)
    out, log, count = corpus.scratch("preempted"), corpus.log("preempted"), Count()
    while count.starts < times:
        before = max(ledger(out / "run"), default=-1)
        command = launch.start(job.arguments(out), log)
        with launch.ended(command):
            further = before + draw.randint(1, 3)
            _wait_for_step(out / "run", further, command)
            time.sleep(draw.uniform(0, 0.05))
            command.signal(signal.SIGUSR1)
            code = command.wait()
        leaving = code == -signal.SIGUSR1 and len(ledger(out / "run")) == steps  # it no longer listened
        if code == 0 or leaving:  # it was done before the signal came
            count.compare(job.ended(out), right)
            out = corpus.scratch("preempted")
            continue
        count.starts += 1
        count.look(out)
        last = out / "run" / "checkpoints" / "last.ckpt"
        step = strategy.describe(last)["step"] if last.exists() else None
        made = max(ledger(out / "run"), default=-1) + 1
        if code == PREEMPTED and step == made > before:
            count.times += 1
        else:
            count.faults.append(f"a preemption ended with {code}, step {step} saved of {made}: {command.tail()}")
    _finish(job, out, corpus, count, right)
    return count


def _wait_for_step(run: Path, step: int, command: launch.Command) -> None:
    launch.wait_until(lambda: max(ledger(run), default=-1) >= step, command)


def _ended_well(command: launch.Command, count: Count) -> bool:
    if command.code == 0:
        return True
    count.faults.append(f"a start ended with {command.code}: {command.tail()}")
    return False


def _finish(job: Job, out: Path, corpus: Corpus, count: Count, right: Ended) -> None:
    command = launch.run(job.arguments(out), corpus.log(f"{job.name}-finish"))
    if _ended_well(command, count):
        count.look(out)
        count.compare(job.ended(out), right)
        shutil.rmtree(out, ignore_errors=True)
