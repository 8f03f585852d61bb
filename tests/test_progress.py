"""Progress where nobody looks at a terminal: lines now and then, on stderr alone."""

import time

from rich.progress import Progress

from vtok.progress import Lines, counting_bar


def test_a_log_gets_lines_on_stderr_while_a_task_is_slow(capsys):
    bar = counting_bar(show=True, every_s=0.05)  # pytest's stdout is no terminal
    assert isinstance(bar, Lines)
    with bar:
        first = bar.add_task("rows", total=4)
        bar.advance(first)
        time.sleep(0.4)  # and nothing happens
        bar.update(first, completed=4, total=4)
        bar.add_task("fit dct", total=None)
        time.sleep(0.2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) >= 4
    assert lines[0].startswith("rows: 1 of 4, 0:00 taken, 0:0") and lines[0].endswith(" left")
    assert lines[-1] == "fit dct: 0, 0:00 taken (1 of 2 parts done)"
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # the thread has ended


def test_short_commands_and_quiet_ones_print_nothing(capsys):
    with counting_bar(show=True) as _, counting_bar(show=False) as quiet:
        task = quiet.add_task("x", total=1)
        quiet.advance(task)
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_that_of_the_task_alone():
    bar = Lines()
    bar.add_task("before", total=1)
    bar.advance(0)
    bar.add_task("now", total=10)
    bar.tasks[1].began -= 100
    bar.update(1, completed=2)
    assert bar.line() == "now: 2 of 10, 1:40 taken, 6:40 left (1 of 2 parts done)"
    bar.update(1, completed=10)
    assert bar.line() == "now: 10 of 10, 1:40 taken (2 of 2 parts done)"


def test_a_terminal_gets_the_live_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(counting_bar(show=True), Progress)
