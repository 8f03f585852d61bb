"""Commands of vtok in processes of their own, forked from one that has imported everything: a start takes no seconds.

Each command leads a process group, so that a signal can reach it and its loader workers at once, as a scheduler's does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
PATIENCE_S = 900.0  # for a command that must end, or get somewhere, on a machine that has other things to do
PRELOAD = ["vtok.cli", "vtok.train", "vtok.coding.tokenize", "vtok.export", "vtok.data.shards", "soak.launch"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class Command:
    """A running `vtok ARGUMENTS`, or a function, whose output goes to the end of a file."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def code(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Sends a signal to the command and all processes it started."""
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def kill(self) -> bool:
        """Ends all of its processes at once; whether the command was still running."""
        running = self.code is None
        self.signal(signal.SIGKILL)
        self.process.join(PATIENCE_S)
        return running and self.code == -signal.SIGKILL

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Its exit status. Raises TimeoutError, after ending it."""
        self.process.join(seconds)
        if self.code is None:
            self.kill()
            raise TimeoutError(f"a command did not end in {seconds:.0f} s; its log ends: {self.tail()}")
        self.signal(signal.SIGKILL)  # a child that outlives its parent would write where the next start works
        return self.code

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 8) -> str:
        return " | ".join(self.output().splitlines()[-lines:])


def start(arguments: list[str], log: Path) -> Command:
    """`vtok ARGUMENTS`, begun."""
    return start_function(_vtok, (arguments,), log)


def start_function(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> Command:
    """A module's function in a process of its own, begun; what it returns is the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    receive, send = _context.Pipe(duplex=False)
    process = _context.Process(target=_lead, args=(function, arguments, str(log), send))
    process.start()
    send.close()
    try:
        receive.recv()  # it leads its group now: a signal to the group cannot miss
    except EOFError:
        pass
    receive.close()
    return Command(process, log)


def run(arguments: list[str], log: Path) -> Command:
    """`vtok ARGUMENTS`, ended."""
    command = start(arguments, log)
    command.wait()
    return command


def must(arguments: list[str], log: Path) -> Command:
    """As `run`. Raises RuntimeError where it fails: nothing that follows would mean anything."""
    command = run(arguments, log)
    if command.code != 0:
        raise RuntimeError(f"vtok {' '.join(arguments)} ended with {command.code}: {command.tail()}")
    return command


def wait_until(condition: Callable[[], bool], command: Command) -> bool:
    """Whether the condition held before the command ended. Raises TimeoutError."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        if command.code is not None:
            return condition()
        if time.monotonic() > ends:
            command.kill()
            raise TimeoutError(f"a command does not get on; its log ends: {command.tail()}")
        time.sleep(0.005)
    return True


def _vtok(arguments: list[str]) -> int:
    from vtok.cli import main

    return main(arguments)


def _lead(function: Callable[..., Any], arguments: tuple[Any, ...], log: str, ready: Any) -> None:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(handle, stream.fileno())
    os.close(handle)
    sys.argv = ["vtok", *(arguments[0] if function is _vtok else [function.__name__])]
    ready.send(os.getpid())
    ready.close()
    sys.exit(int(function(*arguments) or 0))


@contextmanager
def ended(*commands: Command) -> Any:
    """Inside, commands may run; whatever happens, none of them does afterwards."""
    try:
        yield
    finally:
        for command in commands:
            command.kill()
