"""A kill at every single operation on files: before it is done, and in the middle of every write.

Random kills seldom meet the microseconds in which a file is half there. Here a job runs again and again, and dies at
its first operation under the output folder, then at its second, and so on.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from soak import launch
from soak.corpus import Corpus
from soak.jobs import Count, Job

EVENTS = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def writes(arguments: tuple[Any, ...]) -> bool:
    """Whether what an "open" event tells of may write a file with a path."""
    path, _, flags = arguments
    return isinstance(path, str | os.PathLike) and isinstance(flags, int) and bool(flags & WRITING)


class Operations:
    """Counts the operations on files under a folder; kills this process at number `last` (from 1; 0: never)."""

    def __init__(self, folder: Path, last: int) -> None:
        self.folder, self.last, self.count = str(folder), last, 0

    def next(self) -> bool:
        """Whether the process is to die in the operation that begins."""
        self.count += 1
        return self.count == self.last

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder + os.sep)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and writes(arguments)
        if (opened or event in EVENTS) and any(map(self.inside, arguments[:2])) and self.next():
            os.kill(os.getpid(), signal.SIGKILL)

    def opener(self, real: Any) -> Any:
        """`open` whose files die half-way through a write."""

        def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            stream = real(file, mode, *rest, **named)
            if set(mode) & set("wax+") and self.inside(file):
                write = stream.write

                def half(data: Any) -> Any:
                    if self.next():
                        write(data[: len(data) // 2])
                        stream.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    return write(data)

                stream.write = half
            return stream

        return opened


def dying(folder: str, last: int, counted: str, arguments: list[str]) -> int:
    """`vtok ARGUMENTS`, dying at an operation; the number of operations goes into the file `counted`."""
    from vtok.cli import main

    operations = Operations(Path(folder), last)
    sys.addaudithook(operations.watch)
    builtins.open = io.open = operations.opener(builtins.open)  # type: ignore[assignment]
    code = main(arguments)
    Path(counted).write_text(str(operations.count))
    return code


def crashed(job: Job, corpus: Corpus, draw: random.Random, *, most: int = 0, again: bool = True) -> Count:
    """Kills a job (of one process) at each of its operations, or at `most` of them; after each it must end as always.

    again: run it to its end after every kill, and compare; False only looks for files that are not whole.
    """
    log, counted = corpus.log(f"{job.name}-crashed"), corpus.scratch("operations") / "count"
    out, count = corpus.scratch(f"{job.name}-crashed"), Count()
    for _ in range(2):  # over what a first call leaves there, too: it is what users have
        _die(job, out, 0, counted, log)
    right, first = job.ended(out), out
    operations = int(counted.read_text())
    fresh = corpus.scratch(f"{job.name}-fresh")
    _die(job, fresh, 0, counted, log)
    operations = [(False, n + 1) for n in range(int(counted.read_text()))] + [(True, n + 1) for n in range(operations)]
    chosen = sorted(draw.sample(operations, min(most, len(operations)))) if most else operations
    for over, number in chosen:
        out = corpus.scratch(f"{job.name}-crashed")
        if over:
            _die(job, out, 0, counted, log)
        command = _die(job, out, number, counted, log)
        count.starts += 1
        if command.code != -signal.SIGKILL:
            continue  # fewer operations than before: it had ended
        count.times += 1
        count.look(out)
        if over and job.name == "exporting" and not (out / "export").exists():
            count.corrupt += 1
            count.faults.append(f"killed at operation {number}: the export that was there is gone")
        if again:
            if _die(job, out, 0, counted, log).code == 0:
                count.compare(job.ended(out), right)
            else:
                count.faults.append(f"after a kill at operation {number} it cannot end")
    assert first
    return count


def _die(job: Job, out: Path, number: int, counted: Path, log: Path) -> launch.Command:
    command = launch.start_function(dying, (str(out), number, str(counted), job.arguments(out)), log)
    command.wait()
    return command
