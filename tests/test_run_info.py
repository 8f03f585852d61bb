"""`vtok info RUN`: what a run directory tells, of runs that are under way, over, killed, hung."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time

import pytest
import test_train

import vtok
from vtok import train as training
from vtok.cli import main
from vtok.config import to_yaml
from vtok.info.run_info import summary, text
from vtok.training.lock import process_started


def test_the_package_runs_as_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vtok", "--version"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module("vtok", run_name="__main__")
    assert capsys.readouterr().out == f"{vtok.__version__}\n"


class Asking(test_train.Data):
    """Asks about the run while it trains, after its sixth batch."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run, self.found = run, None

    def advance(self, clip) -> None:
        super().advance(clip)
        if self.done == 6:
            self.found = summary(self.run)


def write(run, *, rows=(), lock=None, starts=(), **trainer):
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(test_train.settings(run.parent, name=run.name, trainer=trainer)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "environment.json").write_text(json.dumps({"starts": list(starts)}))
    if lock is not None:
        (run / "lock").write_text(json.dumps(lock))


def mine() -> dict:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": process_started(os.getpid())}


def line(step: int, seconds: float, **values: float) -> dict:
    return {"step": step, "train/loss": 1.0, "time_s": seconds, **values}


def test_a_run_is_told_of_while_it_trains_and_after(tmp_path, capsys):
    trainer = {"max_steps": 8, "log_every": 2, "val_every": 4, "checkpoint_every": 4, "peak_tflops": 0.01}
    data = Asking(tmp_path / "run")
    run = training.train(test_train.settings(tmp_path, trainer=trainer), data=data)
    found = data.found
    assert found is not None and (found["state"], found["pid"]) == ("running", os.getpid())
    assert (found["step"], found["max_steps"]) == (4, 8) and found["left_s"] == pytest.approx(4 / found["steps_per_s"])
    assert [row["step"] for row in found["validations"]] == [4] and found["train"]["train/mfu"] > 0
    assert {c["name"]: c["step"] for c in found["checkpoints"]} == {"best.ckpt": 4, "last.ckpt": 4}
    assert all(c["bytes"] == (run / "checkpoints" / c["name"]).stat().st_size for c in summary(run)["checkpoints"])
    assert "running on" in text(found) and " left" in text(found)
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    for words in ("complete", "8 of 8, 100.0 %", "best.ckpt, step", "TFLOP/s", "MFU", "GiB host", "0.20 M parameters"):
        assert words in said, said
    assert "validation    step 8: loss" in said and "resumed 0 times" in said and " left" not in said
    assert main(["info", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["state"] == "complete" and values["left_s"] is None and values["environment"]["max_tokens"] == 8
    assert main(["info", str(run), "data.seed=1"]) == 1 and "is no config" in capsys.readouterr().err


def test_rate_and_time_left_are_those_of_the_last_lines_and_a_half_written_one_is_left_out(tmp_path):
    rows = [line(10, 1000.0), *(line(10 * i, 1000.0 + 5 * (i - 1)) for i in range(2, 30))]
    write(tmp_path / "run", rows=rows, lock=mine(), max_steps=1000)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "train/lo')
    found = summary(tmp_path / "run")
    assert found["step"] == 290 and found["steps_per_s"] == pytest.approx(2.0)
    assert found["left_s"] == pytest.approx(710 / 2) and found["line_interval_s"] == pytest.approx(5.0)
    write(tmp_path / "run", rows=rows, lock=mine(), max_steps=1000, max_minutes=20.0)
    assert summary(tmp_path / "run")["left_s"] == pytest.approx(1200 - 1140)  # the clock ends it before


def test_a_run_that_is_silent_for_several_lines_is_stalled(tmp_path):
    write(tmp_path / "run", rows=[line(10 * i, 60.0 * i) for i in range(1, 5)], lock=mine(), max_steps=1000)
    stacks = tmp_path / "run" / "stacks"
    stacks.mkdir()
    (stacks / "rank-0-1.txt").touch()
    written = time.time()
    for path in (tmp_path / "run" / "metrics.jsonl", stacks / "rank-0-1.txt"):
        os.utime(path, (written, written))
    later = written + 290
    assert summary(tmp_path / "run", now=later)["state"] == "running"  # five lines are not missing yet
    found = summary(tmp_path / "run", now=later + 20)
    assert found["state"] == "stalled" and "no line for 5:1" in found["note"] and "every 1:00" in found["note"]
    assert "1 file(s) of stacks, stacks/rank-0-1.txt 5:" in text(found)


def test_killed_lost_stopped_and_alarmed_runs_are_told_apart(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    rows = [line(10, 1.0), line(20, 2.0)]
    lock = {"pid": gone.pid, "host": socket.gethostname(), "started": "1"}
    write(tmp_path / "killed", rows=rows, lock=lock, max_steps=100)
    assert summary(tmp_path / "killed")["state"] == "killed"
    write(tmp_path / "far", rows=rows, lock={"pid": 1, "host": "elsewhere", "started": "1"}, max_steps=100)
    assert summary(tmp_path / "far")["state"] == "running" and "on elsewhere, process 1" in text(
        summary(tmp_path / "far")
    )
    found = summary(tmp_path / "far", now=time.time() + 3600)
    assert found["state"] == "lost" and "gone" in found["note"]
    write(tmp_path / "stopped", rows=rows, max_steps=100, starts=[{"host": "a"}, {"host": "b", "slurm_job": "7"}])
    found = summary(tmp_path / "stopped")
    assert found["state"] == "stopped" and found["left_s"] is None
    assert "resumed 1 times" in text(found) and "SLURM job 7" in text(found)
    alarm = {"step": 20, "alarm": "divergence", "action": "stop", "text": "the loss grew"}
    write(tmp_path / "alarm", rows=[*rows, alarm], max_steps=100)
    found = summary(tmp_path / "alarm")
    assert found["state"] == "alarm" and "alarm         step 20: the loss grew" in text(found)
    write(tmp_path / "new", max_steps=100)
    assert summary(tmp_path / "new")["state"] == "new" and "none yet" in text(summary(tmp_path / "new"))


def test_a_checkpoint_that_cannot_be_read_is_named_and_ends_nothing(tmp_path):
    write(tmp_path / "run", rows=[line(10, 1.0)], lock=mine(), max_steps=100)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"half of it")
    (each,) = summary(tmp_path / "run")["checkpoints"]
    assert each["step"] is None and each["bytes"] == 10
    assert "last.ckpt, cannot be read:" in text(summary(tmp_path / "run"))
