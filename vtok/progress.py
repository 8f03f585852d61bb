"""The bar of commands that go through clips or texts one after the other."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def counting_bar(*, show: bool) -> Progress:
    """What is done, how many of how many, the time taken and the time left; with show=False nothing is printed."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, disable=not show)
