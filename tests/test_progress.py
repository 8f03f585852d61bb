"""Progress where nobody looks at a terminal: lines now and then, on stderr alone."""

import threading
from types import SimpleNamespace

import pytest
from rich.progress import Progress
from waiting import until

from vtok import progress
from vtok.progress import Lines, counting_bar


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The one number is the time of the bars, whatever the machine's clock says."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_lines_on_stderr_while_a_task_is_slow(clock, capsys):
    bar = counting_bar(show=True, every_s=0.02)  # pytest's stdout is no terminal
    assert isinstance(bar, Lines)
    out, err = "", ""

    def told(words: str, times: int) -> bool:
        nonlocal out, err
        more = capsys.readouterr()
        out, err = out + more.out, err + more.err
        return err.count(words) >= times

    with bar:
        first = bar.add_task("rows", total=4)
        bar.advance(first)
        until(lambda: told("rows: 1 of 4", 4))  # and nothing happens
        bar.update(first, completed=4, total=4)
        bar.add_task("fit dct", total=None)
        until(lambda: told("fit dct", 1))
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    told("", 0)
    lines = err.splitlines()
    assert out == "" and len(lines) >= 5
    assert lines[0] == "rows: 1 of 4, 0:00 taken, 0:00 left"
    assert lines[-1] == "fit dct: 0, 0:00 taken (1 of 2 parts done)"


def test_short_commands_and_quiet_ones_print_nothing(capsys):
    with counting_bar(show=True) as _, counting_bar(show=False) as quiet:
        task = quiet.add_task("x", total=1)
        quiet.advance(task)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_that_of_the_task_alone(clock):
    bar = Lines()
    bar.add_task("before", total=1)
    clock[0] = 50.0
    bar.advance(0)
    bar.add_task("now", total=10)
    clock[0] = 150.0
    bar.update(1, completed=2)
    assert bar.line() == "now: 2 of 10, 1:40 taken, 6:40 left (1 of 2 parts done)"
    bar.update(1, completed=10)
    assert bar.line() == "now: 10 of 10, 1:40 taken (2 of 2 parts done)"


def test_a_terminal_gets_the_live_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(counting_bar(show=True), Progress)
