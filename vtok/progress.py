"""The progress of commands that go through clips or texts one after the other: a bar, or a line now and then in a log.

stdout is a terminal   a live bar there
it is not              a line every half minute on stderr: what is done, of how many, the time taken and left
"""

from __future__ import annotations

import math
import sys
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY_S = 30.0  # between lines


class CountingBar(Protocol):
    """What a command needs of its bar. A task is a number that `add_task` gives."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def add_task(self, description: str, *, total: float | None = None) -> int: ...

    def update(self, task: int, *, completed: float | None = None, total: float | None = None) -> None: ...

    def advance(self, task: int, advance: float = 1) -> None: ...


def counting_bar(*, show: bool, every_s: float = EVERY_S) -> CountingBar:
    """What is done, how many of how many, the time taken and the time left; with show=False nothing is printed."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, disable=not show)
    if show and not bar.console.is_terminal:
        return Lines(every_s=every_s)
    return bar  # pyright: ignore[reportReturnType]  # its methods take more


@dataclass
class _Task:
    name: str
    total: float | None
    done: float = 0.0
    began: float = 0.0
    ended: float | None = None


class Lines:
    """Lines on stderr every `every_s` seconds, from a thread: a batch that takes minutes is told of, too."""

    def __init__(self, *, every_s: float = EVERY_S) -> None:
        self.every_s = every_s
        self.tasks: list[_Task] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lines:
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def add_task(self, description: str, *, total: float | None = None) -> int:
        self.tasks.append(_Task(description, total, began=time.monotonic()))
        return len(self.tasks) - 1

    def update(self, task: int, *, completed: float | None = None, total: float | None = None) -> None:
        mine = self.tasks[task]
        mine.total = mine.total if total is None else total
        mine.done = mine.done if completed is None else completed
        if mine.total is not None and mine.done >= mine.total and mine.ended is None:
            mine.ended = time.monotonic()

    def advance(self, task: int, advance: float = 1) -> None:
        self.update(task, completed=self.tasks[task].done + advance)

    def _run(self) -> None:
        while not self._ended.wait(self.every_s):
            if self.tasks:
                print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The task that was begun last and is not done, or the last one; before it how many are."""
        tasks = list(self.tasks)
        task = next((t for t in reversed(tasks) if t.ended is None), tasks[-1])
        taken = (task.ended or time.monotonic()) - task.began
        text = f"{task.name}: {task.done:g}" + (f" of {task.total:g}" if task.total is not None else "")
        text += f", {duration(taken)} taken"
        if task.total and 0 < task.done < task.total:
            text += f", {duration(taken * (task.total - task.done) / task.done)} left"
        whole = sum(t.ended is not None for t in tasks)
        return text + (f" ({whole} of {len(tasks)} parts done)" if len(tasks) > 1 else "")


def duration(seconds: float) -> str:
    """1:02:03, 2:03, or "?" where unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
