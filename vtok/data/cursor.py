"""The place in the training data, for another number of processes or workers than those that came to it.

The order of samples is a function of the streams: one for each worker of each process, numbered through
(`vtok.data.order`). Process r with W workers takes its batches from streams r W, r W + 1, ... in turn. So as many
streams as before, shared out anew, give the same clips as before, each once: two processes of one worker go on as one
process of two workers, and with twice the accumulation each step learns from the same clips. That holds at places where
every stream has given as much as the others, and where a batch depends on nothing but its stream.
"""

from __future__ import annotations

import hashlib
from typing import Any

MOVED = ("world", "num_workers", "batch_size")  # what may be others than before where `carry_over` can go on


def streams(world: int, num_workers: int) -> int:
    """Streams of samples: one a worker; a process without workers reads one itself."""
    return world * max(num_workers, 1)


def carry_over(state: dict[str, Any], now: dict[str, Any], *, exact: bool) -> int:
    """How many batches each process has had, counted for the processes and workers that go on: no clip is lost or
    repeated.

    Args:
        state: as saved: "batches" of a process, "world", "num_workers", "batch_size".
        now: those of the run that goes on.
        exact: batches depend on their stream alone, not on their number (no parts, no data.size_scales).
    Raises: ValueError saying which numbers would fit.
    """
    otherwise = ", set data.reorder=true (a pass then begins in a new order)"
    workers, size = max(state["num_workers"], 1), state["batch_size"]
    old, new = (streams(s["world"], s["num_workers"]) for s in (state, now))
    if not exact:
        raise ValueError(
            "Batches of several parts or sizes (data.part_frames, data.part_batch_sizes, data.size_scales) follow "
            f"their number in a process: keep processes and workers{otherwise}"
        )
    if old != new:
        each, rest = divmod(old, now["world"])
        fix = f"choose a number of processes that divides {old}" if rest else f"set data.num_workers={each}"
        raise ValueError(f"To keep the order of the clips, {fix}{otherwise}")
    turns, rest = divmod(state["batches"], workers)
    if rest:
        raise ValueError(
            f"After {state['batches']} batches of a process its workers have not given equally many: go on as before "
            f"to a step where they have (a multiple of {workers} batches){otherwise}"
        )
    given, rest = divmod(turns * size, now["batch_size"])
    if rest:
        raise ValueError(
            f"Each worker has given {turns * size} clips, which data.batch_size={now['batch_size']} does not divide: "
            f"keep data.batch_size={size} and set trainer.accumulate{otherwise}"
        )
    return given * max(now["num_workers"], 1)


def another_order(seed: int, order: int) -> int:
    """The seed of the order-th order of a run: `seed` itself for the first one."""
    if not order:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{order}".encode(), digest_size=4).digest(), "big") >> 1
