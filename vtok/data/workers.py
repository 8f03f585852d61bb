"""Tasks over worker processes that may die: the task a dead worker was at is known, tried again, then given up alone.

`concurrent.futures` breaks as a whole when one worker is killed (a decoder's segmentation fault, the kernel's memory
killer) and its workers outlive a killed parent; here every worker hangs on a pipe of its own, so both are plain events.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

STRIKES = 2  # deaths of a worker at one place before it is given up

Notify = Callable[[str], None]


def cores() -> int:
    """Cores that this process may run on: a job's share of a machine, not the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


class WorkerError(RuntimeError):
    """A task raised; the message is its error's."""


class _Rate(ProgressColumn):
    """Steps per second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: int | None = None
        self.place = ""

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


class Workers:
    """`count` processes (0: the tasks run in this one), started when first needed; a context manager."""

    def __init__(self, count: int, *, progress: bool = True) -> None:
        self.count, self.progress = count, progress
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def run(self, function: Callable[..., Any], tasks: list[tuple[Any, ...]], *, title: str, total: int) -> list[Any]:
        """[function(*task, lost, notify) for task in tasks], in the tasks' order, with a progress bar.

        Args:
            function: a module's function. It calls notify(place) before each of its `total` steps. lost is {place:
                reason}: places where a worker died twice, which it must leave out.
        Raises: WorkerError with the first error a task raised.
        """
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (BarColumn(), MofNCompleteColumn(), _Rate(), *times)
        bar = Progress(
            TextColumn("{task.description}"), *columns, console=Console(stderr=True), disable=not self.progress
        )
        with bar:
            row = bar.add_task(title, total=total)
            if self.count == 0:
                return [function(*task, {}, lambda place: bar.advance(row)) for task in tasks]
            return self._run(function, tasks, lambda steps: bar.advance(row, steps))

    def _run(
        self, function: Callable[..., Any], tasks: list[tuple[Any, ...]], advance: Callable[[int], None]
    ) -> list[Any]:
        results: list[Any] = [None] * len(tasks)
        waiting, left = deque(range(len(tasks))), len(tasks)
        strikes: Counter[tuple[int, str]] = Counter()
        lost: list[dict[str, str]] = [{} for _ in tasks]
        steps = [0] * len(tasks)
        while left:
            while len(self._workers) < min(self.count, left):
                self._workers.append(_Worker())
            for worker in self._workers:
                if worker.task is None and waiting:
                    worker.task, worker.place = waiting.popleft(), ""
                    try:
                        worker.pipe.send((function, (*tasks[worker.task], lost[worker.task])))
                    except OSError:
                        pass  # it died meanwhile: seen below
            ready = set(wait([w.pipe for w in self._workers] + [w.process.sentinel for w in self._workers]))
            for worker in list(self._workers):
                died = worker.process.sentinel in ready
                for kind, value in _messages(worker.pipe):
                    assert worker.task is not None
                    if kind == "at":
                        worker.place = value
                        steps[worker.task] += 1
                        advance(1)
                    elif kind == "error":
                        raise WorkerError(value)
                    else:
                        results[worker.task], worker.task, left = value, None, left - 1
                if died:
                    self._workers.remove(worker)
                    worker.stop()
                    if worker.task is None:
                        continue
                    at = (worker.task, worker.place)
                    strikes[at] += 1
                    if strikes[at] >= STRIKES:
                        how = _death(worker.process.exitcode)
                        if not worker.place:
                            raise WorkerError(f"a worker process {how} at the start of its task, {STRIKES} times")
                        lost[worker.task][worker.place] = f"the process that decoded it {how}, {STRIKES} times"
                    advance(-steps[worker.task])
                    steps[worker.task] = 0
                    waiting.append(worker.task)
        return results


def _messages(pipe: Connection) -> list[tuple[str, Any]]:
    out = []
    try:
        while pipe.poll():
            out.append(pipe.recv())
    except (EOFError, OSError):
        pass
    return out


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with status {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _serve(pipe: Connection) -> None:
    """A worker's life: tasks from the pipe until it closes, which it also does when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    torch.set_num_threads(1)

    def notify(place: str) -> None:
        pipe.send(("at", place))

    try:
        while True:
            function, arguments = pipe.recv()
            try:
                message = ("done", function(*arguments, notify))
            except BrokenPipeError:
                raise
            except Exception as error:
                message = ("error", f"{type(error).__name__}: {error}")
            pipe.send(message)
    except (EOFError, OSError):  # the parent is gone: nobody is left to report to
        os._exit(1)
