"""Checkpoints written while training goes on (`trainer.async_checkpoint`), by a thread of the first rank.

    step boundary:  copy of the state in host memory --> thread: .writing -> flushed -> published
    next save:      waits for the one before it; what went wrong there is told then, on every rank

A reader still sees the old checkpoint or the new one, whole: names change in `publish` alone, after the flush. A kill
during the write costs the steps since the checkpoint before. Host memory holds the state twice meanwhile.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.training import strategy
from vtok.training.zero_shards import CheckpointError


class BackgroundCheckpointIO(strategy.AtomicCheckpointIO):
    """Keeps what Lightning asks it to write, as a copy, for `Saver` to write."""

    kept: dict[str, Any] | None = None
    deferred = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if self.deferred:
            self.kept = on_host(checkpoint)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)


class Saver:
    """Writes and publishes checkpoints: at once, or in a thread where the run's IO is a `BackgroundCheckpointIO`.

    Every rank holds one and calls it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem = ""

    def save(
        self,
        trainer: Any,
        folder: Path,
        names: list[str],
        *,
        about: dict[str, Any],
        keep: int,
        after: Callable[[], None],
        wait: bool = False,
    ) -> None:
        """In a thread: copies the state now, and returns; the file and its names come later.

        Args:
            names, about, keep: as `checkpoints.publish`.
            after: called on the first rank once the checkpoint has its names. wait: until then.
        Raises: CheckpointError, on every rank, where this checkpoint, or one before it in a thread, was not written.
        """
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, BackgroundCheckpointIO):
            strategy.save(trainer, folder, names, about=about, keep=keep)
            if trainer.is_global_zero:
                after()
            return
        self._finish(trainer)
        written = folder / ".writing"
        if trainer.is_global_zero:
            folder.mkdir(exist_ok=True)
            strategy.discard(written)
        io.deferred = True
        try:
            trainer.save_checkpoint(written)
        finally:
            io.deferred = False
        state, io.kept = io.kept, None
        if state is not None:  # the first rank
            work = (io, state, written, list(names), dict(about), keep, after)
            self._thread = threading.Thread(target=self._write, args=work, name="checkpoint")
            self._thread.start()
        if wait:
            self._finish(trainer)

    def _write(
        self,
        io: BackgroundCheckpointIO,
        state: dict[str, Any],
        written: Path,
        names: list[str],
        about: dict[str, Any],
        keep: int,
        after: Callable[[], None],
    ) -> None:
        try:
            strategy.AtomicCheckpointIO.save_checkpoint(io, state, written)
            failure, io.failure = io.failure, None
            if failure is not None:
                raise OSError(str(failure)) from failure
            strategy.publish(written, names, about=about, keep=keep)
            after()
        except Exception as error:  # told where all ranks meet
            self._problem = f"the checkpoint of step {about.get('step')} could not be written: {error}"

    def wait(self) -> str:
        """Until nothing is being written here; what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, ""
        return problem

    def _finish(self, trainer: Any) -> None:
        """`wait` on the first rank; every rank raises CheckpointError with what went wrong."""
        problem = trainer.strategy.broadcast(self.wait())
        if problem:
            raise CheckpointError(
                f"{problem}; those of before are as they were. Make room, and give the same command again"
            )


def on_host(value: Any) -> Any:
    """A copy in host memory that later steps do not touch; tensors that were one stay one."""
    seen: dict[tuple[Any, ...], Tensor] = {}

    def walk(each: Any) -> Any:
        if isinstance(each, Tensor):
            place = (each.device, each.dtype, each.data_ptr(), each.shape, each.stride())
            if each.numel() == 0 or place not in seen:
                seen[place] = torch.empty_like(each, device="cpu", requires_grad=False).copy_(each.detach())
            return seen[place]
        if isinstance(each, dict):
            out = copy.copy(each)  # an OrderedDict with the versions of its modules stays one
            out.update({key: walk(item) for key, item in each.items()})
            return out
        if isinstance(each, list):
            return [walk(item) for item in each]
        if type(each) is tuple:
            return tuple(walk(item) for item in each)
        return each

    return walk(value)
