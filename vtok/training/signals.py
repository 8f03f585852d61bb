"""The signals that end a run: SIGUSR1 (the time limit comes near), SIGTERM (the node is wanted back), Ctrl-C.

    process start --watch()--> nothing to save yet: ends at once --Told.listen()--> a number, for step boundaries to ask

Under slurm/job.sh the file VTOK_STOPPED asks for another turn. The first rank writes it once a checkpoint is there;
before there is anything to save, any rank that SIGUSR1 reaches does: srun ends the others by SIGTERM then, and its own
status does not tell which came first. Imported before torch, and without it.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

MARK = "VTOK_STOPPED"
ENDS = (signal.SIGTERM, signal.SIGUSR1)


def watch() -> None:
    """In a job of slurm/job.sh, until a run listens: SIGUSR1 asks for another turn and ends the process with 138,
    SIGTERM ends it with 143. Call it first of all; elsewhere both signals do what they always do."""
    if MARK not in os.environ:
        return
    for number in ENDS:
        signal.signal(number, _leave)
    # Python runs handlers between two of its own instructions alone: a process that waits for others to meet, inside
    # torch, would hear nothing for half an hour. A byte comes at once, and a thread reads it.
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(ear,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_in_child)


def stop_mark(number: int) -> bool:
    """Asks slurm/job.sh for another turn; False where nobody reads it, or the user wanted an end (Ctrl-C)."""
    if MARK not in os.environ or number not in ENDS:
        return False
    Path(os.environ[MARK]).write_text(f"{128 + number}\n")
    return True


def _leave(number: int, _: Any) -> None:
    if number == signal.SIGUSR1:
        stop_mark(number)
    os._exit(128 + number)  # nothing is to be saved; what an end in good order waits for may never come


def _hear(ear: int) -> None:
    while heard := os.read(ear, 1):
        if heard[0] in ENDS and signal.getsignal(heard[0]) is _leave:
            _leave(heard[0], None)


def _in_child() -> None:
    """A forked worker is no rank: its signals are not the run's."""
    signal.set_wakeup_fd(-1)
    for number, instead in zip(ENDS, (signal.SIG_DFL, signal.SIG_IGN)):
        if signal.getsignal(number) is _leave:
            signal.signal(number, instead)


class Told:
    """Remembers the last signal as `number`, from `listen` to `close`; 0 before one came.

    A second Ctrl-C is a KeyboardInterrupt. Outside the main thread, which may not listen, it stays 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (*ENDS, signal.SIGINT):
                if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # in the background of a shell
                self._before[number] = signal.signal(number, self._hear)

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self.number == number:
                raise KeyboardInterrupt
            # not `print`, which a signal may have interrupted
            os.write(2, b"\nCtrl-C: the run saves after this step, and ends; once more ends it without saving\n")
        self.number = number  # and nothing else: saving here would interrupt a collective half-way


def silence(trainer: Any) -> None:
    """Keeps Lightning from signals: its SIGTERM ends a run with status 0 and nothing saved, and every batch of several
    ranks begins with a broadcast and a wait for the device, to tell of one."""
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    for owner, name in ((connector, "register_signal_handlers"), (loop, "_broadcast_sigterm_tensor")):
        if hasattr(owner, name):  # Lightning before 2.6 broadcasts nothing
            setattr(owner, name, lambda: None)
