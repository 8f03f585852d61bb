"""What a step boundary asks for: agreed by all ranks, then decided from that and the configuration alone.

    each rank's own Heard --Meeting.agree--> one Heard for all --due--> Due, which the Conductor (loop.py) carries out

Several ranks meet about twice a second, not every step: where they do not, only what follows from the step is due.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vtok.config import TrainerConfig

BETWEEN_S = 0.5  # of two meetings; also the longest that a signal waits, where steps are shorter
MOST_STEPS = 100  # between two meetings


class Heard(NamedTuple):
    """What is known at a boundary beside the step. signal: number of the one that asks for an end, 0 for none. late:
    the newest checkpoint is older than trainer.checkpoint_minutes. elapsed_s: seconds of training, all starts."""

    signal: int
    late: bool
    elapsed_s: float


class Meeting:
    """Where the ranks tell one another what they have heard.

    Args:
        step: done when this start began. last: trainer.max_steps, where they always meet.
    """

    def __init__(self, *, step: int, last: int) -> None:
        self.first, self.next, self.last = step, step + 1, last

    def agree(self, trainer: Any, own: Heard, *, step: int, spent_s: float, device: torch.device) -> Heard | None:
        """The same on every rank: a signal that reached any of them, age and clock of the first; None where they do not
        meet at this step. spent_s: seconds since this start began, by which the next meeting is chosen."""
        if trainer.world_size == 1:
            return own
        if step < self.next and step < self.last:
            return None
        first = trainer.is_global_zero
        per_step = spent_s / max(step - self.first, 1)
        every = min(MOST_STEPS, max(1, int(BETWEEN_S / max(per_step, 1e-4))))
        told = [own.signal, first and own.late, own.elapsed_s if first else 0.0, every if first else 0]
        signal, late, elapsed_s, every = all_max(told, device)
        self.next = step + int(every)
        return Heard(int(signal), bool(late), elapsed_s)


@dataclass(frozen=True)
class Due:
    """What is to be done at a boundary, in this order; nothing where it is false."""

    look: bool = False  # a validation
    show: bool = False  # sample videos
    save: bool = False  # a checkpoint, whatever else is due
    keep: bool = False  # that checkpoint stays for good
    halt: bool = False  # an alarm ends the run
    stop: int = 0  # number of the signal that ends it
    done: bool = False  # its last step or minute

    def __bool__(self) -> bool:
        return self.look or self.show or self.save or self.ends

    @property
    def ends(self) -> bool:
        return self.halt or self.done or bool(self.stop)

    @property
    def hurried(self) -> bool:
        """It ends before its last step: what is due but a checkpoint, the next start owes."""
        return self.ends and not self.done


def due(run: TrainerConfig, *, step: int, clock: float, heard: Heard | None, alarm: bool) -> Due:
    """What the boundary after `step` asks for.

    Args:
        clock: share of trainer.max_minutes that has passed, agreed. heard: of all ranks; None: they did not meet.
        alarm: one ends the run. On the last step it comes too late.
    """
    done = is_done(run, step=step, clock=clock)
    look, keep = done or _every(run.val_every, step), _every(run.keep_every, step)
    return Due(
        look=look,
        show=look if done or not run.sample_every else _every(run.sample_every, step),
        save=keep or _every(run.checkpoint_every, step) or (heard is not None and heard.late),
        keep=keep,
        halt=alarm and not done,
        stop=heard.signal if heard is not None else 0,
        done=done,
    )


def is_done(run: TrainerConfig, *, step: int, clock: float) -> bool:
    return step >= run.max_steps or clock >= 1


def _every(steps: int, step: int) -> bool:
    return bool(steps) and step % steps == 0


def all_max(values: list[Any], device: torch.device) -> list[float]:
    """The largest of each value over the ranks, which all call this; exact for integers below 2 ** 53."""
    shared = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return shared.tolist()
