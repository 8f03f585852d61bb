"""Waiting in tests for what must happen: a busy machine may take minutes for it, and a quick one waits no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 600.0  # for a process to start, to get somewhere, or to end


def until(condition: Callable[[], object], what: str = "it", *, every_s: float = 0.02) -> None:
    """Waits for the condition. Raises: AssertionError, once nobody would wait any longer."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, f"waited {PATIENCE_S:.0f} s for: {what}"
        time.sleep(every_s)


def nobody_runs(group: int) -> bool:
    """Whether all processes of a group have ended; one that nobody has asked how it ended is no more than a number."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(its) == group and state not in "ZX":
            return False
    return True
