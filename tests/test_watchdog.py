"""A run that stands still tells where: in one process here; two ranks that wait for each other (slow)."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import test_train
from torch.utils.data import DataLoader, IterableDataset

from vtok import train as training
from vtok.training.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
FAST = 0.01  # minutes


def wait_for(condition, *, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def planted_hang(release: threading.Event) -> None:
    release.wait(60)


class Stuck(IterableDataset):
    """A worker that stands still in its second batch for as long as a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __iter__(self):
        yield 0
        self.stands_here()
        yield 1

    def stands_here(self) -> None:
        while self.gate.exists():
            time.sleep(0.02)


def test_a_stall_writes_threads_and_workers_and_the_run_goes_on(tmp_path, caplog):
    release, gate = threading.Event(), tmp_path / "gate"
    gate.touch()
    dog = Watchdog(tmp_path / "stacks", minutes=FAST)
    batches = iter(DataLoader(Stuck(gate), batch_size=None, num_workers=1, prefetch_factor=2))
    assert next(batches) == 0
    threading.Thread(target=planted_hang, args=(release,), name="uploader", daemon=True).start()
    helper = subprocess.Popen(["sleep", "60"])  # a child that the signal would end
    try:
        with caplog.at_level(logging.WARNING, "vtok.training.watchdog"):
            dog.start(rank=3, step=41)
            dog.moved("the wait for the next batch", step=42)
            path = tmp_path / "stacks" / "rank-3-1.txt"
            wait_for(lambda: any("nothing has ended" in r.message for r in caplog.records))
            text = path.read_text()
            gate.unlink()
            assert next(batches) == 1  # the worker lived on
            dog.moved("a training step", step=43)
            wait_for(lambda: "goes on" in caplog.records[-1].message)
        assert helper.poll() is None
    finally:
        release.set()
        dog.stop()
        helper.kill()
        helper.wait()
    assert "rank 3" in text and "after step 42, in the wait for the next batch" in text
    assert "planted_hang" in text and "uploader" in text and "wait_for" in text
    worker = text.partition("worker process")[2]
    assert "stands_here" in worker and "_worker_loop" in worker
    line = next(r.message for r in caplog.records if "nothing has ended" in r.message)
    assert f"process {os.getpid()}" in line and "trainer.stall_minutes=0.01" in line and str(path) in line


def test_progress_of_any_kind_keeps_it_quiet_and_a_stall_is_written_three_times_at_most(tmp_path):
    dog = Watchdog(tmp_path, minutes=FAST)
    dog.start(rank=0, step=0)
    try:
        for i in range(30):
            dog.moved(f"validation, batch {i}")
            time.sleep(0.04)
        assert not list(tmp_path.iterdir())
        wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
        time.sleep(1.5)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-0-1.txt", "rank-0-2.txt", "rank-0-3.txt"]
    finally:
        dog.stop()


def test_minutes_0_watches_nothing_and_a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    threads = threading.active_count()
    off = Watchdog(tmp_path / "stacks", minutes=0)
    off.start(rank=0, step=0)
    assert threading.active_count() == threads
    off.stop()
    (tmp_path / "file").touch()
    dog = Watchdog(tmp_path / "file", minutes=0.002)
    with caplog.at_level(logging.ERROR, "vtok.training.watchdog"):
        dog.start(rank=0, step=7)
        wait_for(lambda: any("stands still at step 7; its stacks:" in r.message for r in caplog.records))
    dog.stop()


class Slow(test_train.Data):
    """The batch after the third is late."""

    def train_dataloader(self):
        class Late(test_train.Stream):
            def __iter__(self):
                for i, clip in enumerate(super().__iter__()):
                    if i == 3:
                        time.sleep(4.2)  # once past the limit, not twice, and no other step of a busy machine is
                    yield clip

        return DataLoader(Late(self.done), batch_size=None)


def test_a_run_names_what_it_waits_for(tmp_path):
    run = training.train(test_train.settings(tmp_path, trainer={"stall_minutes": 0.05}), data=Slow())  # 3 s
    (text,) = [p.read_text() for p in (run / "stacks").iterdir()]
    assert "after step 3, in the wait for the next batch" in text and "Late" not in text and "__iter__" in text
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch.utils.data import DataLoader
import test_train
from vtok.train import train

class Part(test_train.Stream):
    def __init__(self, first, rank, world):
        super().__init__(first)
        self.rank, self.world = rank, world
    def planted_hang(self):
        time.sleep(8)
    def __iter__(self):
        for i in range(self.first * self.world + self.rank, 1 << 40, self.world):
            if i == 2 * 4 + 1:  # the fifth batch of rank 1
                self.planted_hang()
            yield next(iter(test_train.Stream(i, 1)))

class Mine(test_train.Data):
    def advance(self, clip):
        self.done += 1
    def train_dataloader(self):
        stream = Part(self.done, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(stream, batch_size=None, num_workers=1)
    def val_dataloader(self):
        return DataLoader(test_train.Stream(10**6, 1), batch_size=None)

trainer = {{"devices": 2, "strategy": "ddp", "max_steps": 6, "stall_minutes": 0.05}}
train(test_train.settings(Path(sys.argv[1]), trainer=trainer), data=Mine())
"""


@pytest.mark.slow
def test_both_ranks_write_their_stacks_where_one_worker_hangs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    stacks = tmp_path / "run" / "stacks"
    first, second = ((stacks / f"rank-{rank}-1.txt").read_text() for rank in (0, 1))
    # rank 0 ran ahead and waits in a collective of its step; rank 1 waits for its worker, which says why
    assert "in a training step" in first and "in the wait for the next batch" in second
    assert "planted_hang" not in first and first.count("worker process") == 1  # its own, not the other rank
    assert "planted_hang" in second.partition("worker process")[2]
    for rank in (0, 1):
        assert f"rank {rank} (process" in done.stderr
    assert test_train.metrics(tmp_path / "run")[-1]["step"] == 6  # and the run went on
