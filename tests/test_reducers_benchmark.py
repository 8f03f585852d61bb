"""benchmarks/reducers.py at a size of seconds: every reducer has its row, and a broken one is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vtok.reducers import REDUCERS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import reducers as benchmark  # noqa: E402

TINY = ["reducers.py", "--frames", "2", "--grid", "2", "3", "--dim", "8", "--budget", "5", "--repeats", "1"]


def test_every_reducer_keeps_its_contract_and_has_a_time(monkeypatch, capsys):
    names = ["random", "pooling", "visionzip", "hiprune"]
    monkeypatch.setattr(sys, "argv", [*TINY, "--only", *names])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code is None
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "1 x [2, 6, 8], 5 of 12 tokens, CPU"
    rows = {line.split()[0]: line.split()[1:] for line in out[3:]}
    assert rows.keys() == set(names)
    for marks in rows.values():
        assert marks[:6] == ["yes"] * 6 and float(marks[6]) >= 0 and float(marks[7]) >= 1
    assert min(float(marks[7]) for marks in rows.values()) == 1


def test_a_reducer_that_breaks_its_contract_is_named(monkeypatch, capsys):
    build = benchmark.build

    def broken(name, **options):
        reduce = build(name, **options)
        return (
            (lambda features, *, budget: reduce(features, budget=budget - (budget == 50)))
            if name == "uniform"
            else reduce
        )

    monkeypatch.setattr(benchmark, "build", broken)
    monkeypatch.setattr(sys, "argv", [*TINY, "--only", "uniform", "pooling"])
    with pytest.raises(SystemExit, match="broken: uniform"):
        benchmark.main()
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize("name", REDUCERS)
def test_a_tiny_clip_is_timed(name):
    features = benchmark.make_features([2], (2, 3), 8)
    assert 0 <= benchmark.seconds(benchmark.build(name), features, 5, 1) < 60
