"""Waiting in tests for what must happen: a busy machine may take minutes for it, and a quick one waits no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 900.0  # for a process to start, to get somewhere, or to end
PATHS = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))  # of processes that import tests


def until(condition: Callable[[], object], what: str = "it", *, every_s: float = 0.05) -> None:
    """Waits for the condition. Raises: AssertionError, once nobody would wait any longer."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, f"waited {PATIENCE_S:.0f} s for: {what}"
        time.sleep(every_s)


def kill_once(
    condition: Callable[[], object], process: subprocess.Popen, *, late_s: float = 0.0, all_of_it: bool = True
) -> None:
    """Kills a process that leads a group, and with it the group, so long after the condition came to hold.

    all_of_it: False leaves the others of its group, which must end by themselves.
    Raises: AssertionError where it ended by itself.
    """
    until(lambda: condition() or process.poll() is not None, "some progress", every_s=0.005)
    time.sleep(late_s)
    assert process.poll() is None, "it was over before it could be killed"
    (os.killpg if all_of_it else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: _nobody_runs(process.pid), "all of its processes to end")


def _nobody_runs(group: int) -> bool:
    """Whether all processes of a group have ended; one that nobody has asked how it ended is no more than a number."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(its) == group and state not in "ZX":
            return False
    return True


def never_named(name: str) -> None:
    """From now on no file of this process takes that name: whoever would give it stands still until it is killed, or
    its parent is. For a process that a test kills: however late the test is, the work is not done before."""
    rename, parent = os.replace, os.getppid()

    def replace(here: str | os.PathLike[str], there: str | os.PathLike[str]) -> None:
        ends = time.monotonic() + PATIENCE_S
        while Path(there).name == name and time.monotonic() < ends:
            time.sleep(0.01)
            if os.getppid() != parent:
                os._exit(1)
        rename(here, there)

    os.replace = replace
