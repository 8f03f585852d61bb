"""What came of a changed input: reading it may raise, hang, crash or ask for all memory, so a child does it."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import vtok
from soak.damage import DIFFER, EQUAL, REJECT, Case
from vtok.cli import EXPECTED

SECONDS = 30.0  # one input may take so long: a loop without end is a failure as much as a crash
MEMORY = 6 << 30  # bytes of address space above what the process has
PACKAGE = Path(vtok.__file__).parent
REFUSED, SAME, OTHER, UNCAUGHT = "refused", "read the same", "read differently", "uncaught"
Read = Callable[[Path], str]


@dataclass(frozen=True)
class Verdict:
    """outcome: REFUSED, SAME, OTHER or UNCAUGHT. text: the error's. fault: what is wrong with that, "" if nothing."""

    case: Case
    outcome: str
    text: str
    fault: str


@dataclass(frozen=True)
class Tally:
    """Of many verdicts. silent: damage that was accepted. refused_well: sound inputs that were refused."""

    inputs: int
    by_kind: dict[str, int]
    uncaught: int
    silent: int
    refused_well: int
    faults: list[Verdict]


def fault_of(rule: str, outcome: str) -> str:
    """What is wrong with an outcome under a rule; "" if nothing."""
    if outcome == UNCAUGHT:
        return "uncaught"
    if rule == REJECT and outcome != REFUSED or rule == DIFFER and outcome == SAME:
        return "silent"
    if rule == EQUAL and outcome != SAME:
        return "refused well"
    return ""


def tally(verdicts: Iterable[Verdict]) -> Tally:
    every = list(verdicts)
    faults = [verdict for verdict in every if verdict.fault]
    count = Counter(verdict.fault for verdict in faults)
    return Tally(
        inputs=len(every),
        by_kind=dict(Counter(verdict.case.kind for verdict in every)),
        uncaught=count["uncaught"],
        silent=count["silent"],
        refused_well=count["refused well"],
        faults=faults,
    )


def read_once(read: Read, path: Path) -> tuple[str, str]:
    """("refused", the words), ("uncaught", what happened) or ("read", the fingerprint)."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return "read", read(path)
    except TimeoutError as error:
        return UNCAUGHT, str(error)
    except EXPECTED as error:
        if _in_own_words(error):
            return REFUSED, str(error)
        return UNCAUGHT, _story(error)
    except (Exception, SystemExit) as error:
        return UNCAUGHT, _story(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_own_words(error: BaseException) -> bool:
    """Whether the message is vtok's own: a library's, without its traceback, tells a user nothing."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    own = raised.is_relative_to(PACKAGE) or raised.parent == Path(__file__).parent
    return bool(str(error).strip()) and (own or isinstance(error, OSError) and error.filename is not None)


def _story(error: BaseException) -> str:
    where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
    return f"{type(error).__name__}: {str(error)[:300]} ({' > '.join(where)})"


def judge(
    cases: Iterable[Case], readers: dict[str, Read], sound: dict[str, Path], *, child: bool = True
) -> list[Verdict]:
    """A verdict on each case.

    Args:
        readers: by kind; each gives a fingerprint of what it read, or raises. sound: what the cases are copies of, by
            kind; where several things are changed, a case's own name tells which (`original`).
        child: read in a forked process that is replaced when it dies; False reads here.
    """
    todo = list(cases)
    right: dict[Path, str] = {}
    out: list[Verdict] = []
    for number, (how, text) in _outcomes(todo, readers, child=child):
        case = todo[number]
        if how == "read":
            path = original(case, sound)
            if path not in right:
                found, right[path] = read_once(readers[case.kind], path)
                assert found == "read", f"the sound {path} cannot be read: {right[path]}"
            how = SAME if text == right[path] else OTHER
        out.append(Verdict(case, how, text, fault_of(case.rule, how)))
    return out


def original(case: Case, sound: dict[str, Path]) -> Path:
    """The sound input that a case is a changed copy of: by kind and the file's name, or by kind alone."""
    name = case.change.partition(":")[0]
    return sound.get(f"{case.kind}/{name}") or sound[case.kind]


def _outcomes(cases: list[Case], readers: dict[str, Read], *, child: bool) -> Iterator[tuple[int, tuple[str, str]]]:
    if not child:
        for number, case in enumerate(cases):
            yield number, _outcome(case, readers)
        return
    context = multiprocessing.get_context("fork")
    number = 0
    while number < len(cases):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(cases, number, readers, theirs))
        process.start()
        theirs.close()
        while True:
            try:
                found = mine.recv() if mine.poll(2 * SECONDS) else None
            except EOFError:
                break
            if found is None:  # stuck in a call that no signal reaches
                process.kill()
                break
            yield number, found
            number += 1
        process.join(10)
        if number < len(cases):
            yield number, (UNCAUGHT, f"the process ended with {process.exitcode}")
            number += 1


def _serve(cases: list[Case], first: int, readers: dict[str, Read], pipe: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases[first:]:
        pipe.send(_outcome(case, readers))
    pipe.close()


def _outcome(case: Case, readers: dict[str, Read]) -> tuple[str, str]:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        return read_once(readers[case.kind], case.make(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return function(), time.monotonic() - began
