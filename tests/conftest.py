"""The order of the tests when several processes share them (`make test` runs three, a file to each in turn)."""

from __future__ import annotations

import random

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no process ends long after the others."""
    slow: dict[object, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws the same random numbers whatever ran before it, in whichever process."""
    random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter) -> None:
    """Tables that tests have recorded: what a process of several prints, nobody sees."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    if name == "table":
                        terminalreporter.write_sep("-", report.nodeid)
                        terminalreporter.write_line(str(value))
