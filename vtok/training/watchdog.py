"""What hangs in a run that does not move: after `trainer.stall_minutes` without progress each rank writes its stacks.

    no micro-batch, validation batch, checkpoint or part of the start (the processes meet, statistics, weights, the
    checkpoint to go on from, the loader) ended for M minutes
        --> <run>/stacks/rank-<R>-<n>.txt   all threads of the rank, then its loader workers
        --> one line of the log              and the run goes on waiting: who stops it is the collective's own
                                             time-out (10 minutes with NCCL), SLURM, or the user

Each rank watches itself, in a thread: where ranks wait for each other all of them stand still, and the file of the one
that does not wait names the cause. A rank that never gives the interpreter back (a hang inside an extension that holds
its lock) writes nothing; the files of the others tell by its absence.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DUMPS = 3  # of one stall: whether anything moves shows in the difference
ASK = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None  # no one else's; None: workers are only listed
ANSWER_S = 1.0  # a worker has this long to write its stacks


class Watchdog:
    """Watches one rank of a run. `minutes=0` does nothing at all.

    Made before the loader starts its workers: forked ones inherit the signal that asks for their stacks.
    """

    def __init__(self, folder: Path, *, minutes: float) -> None:
        self.folder, self.limit_s = folder, 60 * minutes
        self.rank, self.step = 0, 0
        self.doing = "the start"
        self.last = time.monotonic()
        self._dumps = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._answers: Any = None
        if minutes:
            self._answers = tempfile.TemporaryFile()  # shared with forked workers
            if ASK is not None:
                faulthandler.register(ASK, file=self._answers, all_threads=True)

    def start(self, *, rank: int, step: int) -> None:
        """Begins to watch."""
        self.rank, self.step, self.last = rank, step, time.monotonic()
        if self.limit_s and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def moved(self, doing: str, *, step: int | None = None) -> None:
        """Something ended; what comes next is `doing`."""
        self.last, self.doing = time.monotonic(), doing
        self.step = self.step if step is None else step

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None
        if self._answers is not None:
            if ASK is not None:
                faulthandler.unregister(ASK)
            self._answers.close()
            self._answers = None

    def _watch(self) -> None:
        while not self._ended.wait(min(self.limit_s / 10, 30.0)):
            last = self.last
            still_s = time.monotonic() - last
            if self._dumps and still_s < self.limit_s:
                log.warning("rank %d goes on after its stall, at step %d", self.rank, self.step)
                self._dumps = 0
            if self._dumps < DUMPS and still_s > self.limit_s * (self._dumps + 1):
                self._dumps += 1
                try:
                    path = self._dump(still_s)
                except OSError as error:  # a full disk must not end the watch, still less the run
                    log.error("rank %d stands still at step %d; its stacks: %s", self.rank, self.step, error)
                    continue
                log.error(
                    "rank %d (process %d on %s): nothing has ended for %.3g minutes (trainer.stall_minutes=%.3g) after "
                    "step %d, in %s; where its threads are: %s. The run goes on waiting",
                    self.rank, os.getpid(), socket.gethostname(), still_s / 60, self.limit_s / 60, self.step,
                    self.doing, path,
                )  # fmt: skip

    def _dump(self, still_s: float) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + len(list(self.folder.glob(f"rank-{self.rank}-*.txt")))
        path = self.folder / f"rank-{self.rank}-{number}.txt"
        names = "\n".join(f"  0x{t.ident or 0:016x} {t.name}" for t in threading.enumerate())
        with path.open("w") as file:
            file.write(
                f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {self.rank}, process {os.getpid()} on "
                f"{socket.gethostname()}\nnothing has ended for {still_s:.0f} s after step {self.step}, in {self.doing}"
                f"\n\nthreads\n{names}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            for pid in _workers():
                file.write(f"\nworker process {pid}, {_state(pid)}\n{self._ask(pid)}")
        return path

    def _ask(self, pid: int) -> str:
        """Stacks of a forked worker, which it writes itself; why there are none otherwise."""
        if ASK is None or not _listens(pid, ASK):
            return "  does not tell its stacks: it was not forked from this process\n"
        before = os.fstat(self._answers.fileno()).st_size
        try:
            os.kill(pid, ASK)
        except OSError as error:
            return f"  {error}\n"
        size, until = before, time.monotonic() + ANSWER_S
        while time.monotonic() < until:
            time.sleep(0.05)
            now = os.fstat(self._answers.fileno()).st_size
            if now == size > before:
                break
            size = now
        text = os.pread(self._answers.fileno(), size - before, before).decode(errors="replace")
        return text or f"  did not answer within {ANSWER_S:g} s\n"


def _workers() -> list[int]:
    """Processes that this one forked, in the order of their numbers; [] where there is no /proc.

    Their environment is this process's own: other ranks that it started have another, and watch themselves.
    """
    mine, found = os.getpid(), []
    try:
        environment = Path(f"/proc/{mine}/environ").read_bytes()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == mine and (entry / "environ").read_bytes() == environment:
                    found.append(int(entry.name))
            except (OSError, ValueError):  # gone meanwhile, or another user's
                continue
    except OSError:
        return []
    return sorted(found)


def _listens(pid: int, number: int) -> bool:
    """Whether a process catches a signal, which would end it otherwise."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass
    return False


def _state(pid: int) -> str:
    """What the kernel says of a process: its state, and the call it waits in where that is told."""
    state = waits = ""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        state = next((line.partition(":")[2].strip() for line in lines if line.startswith("State:")), "")
        waits = Path(f"/proc/{pid}/wchan").read_text().strip("0\n ")
    except OSError:
        pass
    return " in ".join(text for text in (state or "state unknown", waits) if text)
