"""A run that stands still tells where: in one process here; two ranks that wait for each other (slow)."""

import copy
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_train
from torch.utils.data import DataLoader, IterableDataset
from waiting import PATIENCE_S, until

from vtok import train as training
from vtok.training import watchdog
from vtok.training.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
FAST = 0.01  # minutes; it looks every tenth of that
LIMIT_S = 60 * FAST


class Clock(SimpleNamespace):
    """What the watchdog takes for `time`: moved by hand alone, so that a busy machine is no stall.

    An answer may take as long as it takes, and has ended once nothing more of it came for a whole second.
    """

    now, looks = 0.0, 0

    def monotonic(self) -> float:
        now = self.now
        self.looks += threading.current_thread().name == "watchdog"
        return now

    def sleep(self, seconds: float) -> None:
        time.sleep(20 * seconds)

    def strftime(self, form: str) -> str:
        return time.strftime(form)

    def seen(self) -> None:
        """Waits until the watchdog has looked at it once more, from beginning to end."""
        looks = self.looks
        until(lambda: self.looks >= looks + 2)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watchdog, "time", made)
    return made


def planted_hang(release: threading.Event) -> None:
    release.wait(PATIENCE_S)


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


def test_a_stall_writes_threads_and_workers_and_the_run_goes_on(tmp_path, caplog, clock):
    def stands() -> bool:
        clock.now = 1.1 * LIMIT_S
        return any("nothing has ended" in record.message for record in caplog.records)

    release, gate = threading.Event(), tmp_path / "gate"
    gate.touch()
    dog = Watchdog(tmp_path / "stacks", minutes=FAST)
    batches = iter(DataLoader(Stuck(gate), batch_size=None, num_workers=1, prefetch_factor=2))
    assert next(batches) == 0
    threading.Thread(target=planted_hang, args=(release,), name="uploader", daemon=True).start()
    helper = subprocess.Popen(["sleep", str(PATIENCE_S)])  # a child that the signal would end
    try:
        with caplog.at_level(logging.WARNING, "vtok.training.watchdog"):
            dog.start(rank=3, step=41)
            dog.moved("the wait for the next batch", step=42)
            path = tmp_path / "stacks" / "rank-3-1.txt"
            until(stands)
            text = path.read_text()
            gate.unlink()
            assert next(batches) == 1  # the worker lived on
            dog.moved("a training step", step=43)
            until(lambda: "goes on" in caplog.records[-1].message)
        assert helper.poll() is None
    finally:
        release.set()
        dog.stop()
        helper.kill()
        helper.wait()
    assert "rank 3" in text and "after step 42, in the wait for the next batch" in text
    assert "planted_hang" in text and "uploader" in text and "until" in text
    worker = text.partition("worker process")[2]
    assert "stands_here" in worker and "_worker_loop" in worker
    line = next(r.message for r in caplog.records if "nothing has ended" in r.message)
    assert f"process {os.getpid()}" in line and "trainer.stall_minutes=0.01" in line and str(path) in line


def test_progress_of_any_kind_keeps_it_quiet_and_a_stall_is_written_three_times_at_most(tmp_path, clock):
    dog = Watchdog(tmp_path, minutes=FAST)
    dog.start(rank=0, step=0)
    try:
        for i in range(10):
            dog.moved(f"validation, batch {i}")
            clock.seen()
            clock.now += 0.9 * LIMIT_S
            clock.seen()
        assert not list(tmp_path.iterdir())
        clock.now += 10 * LIMIT_S
        until(lambda: len(list(tmp_path.iterdir())) == 3)
        for _ in range(5):
            clock.now += 10 * LIMIT_S
            clock.seen()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-0-1.txt", "rank-0-2.txt", "rank-0-3.txt"]
    finally:
        dog.stop()


def test_minutes_0_watches_nothing_and_a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    threads = threading.enumerate()
    off = Watchdog(tmp_path / "stacks", minutes=0)
    off.start(rank=0, step=0)
    assert set(threading.enumerate()) <= set(threads)
    off.stop()
    (tmp_path / "file").touch()
    dog = Watchdog(tmp_path / "file", minutes=0.002)
    with caplog.at_level(logging.ERROR, "vtok.training.watchdog"):
        dog.start(rank=0, step=7)
        until(lambda: any("stands still at step 7; its stacks:" in r.message for r in caplog.records))
    dog.stop()


def test_a_run_names_what_it_waits_for(tmp_path, caplog, clock):
    def told() -> bool:
        return any("nothing has ended" in record.message for record in caplog.records)

    class Late(test_train.Stream):
        def __iter__(self):
            for i, clip in enumerate(super().__iter__()):
                if i == data.done == 3:  # once past the limit, not twice
                    clock.now += 1.4 * LIMIT_S
                    until(told)
                yield clip

    class Slow(test_train.Data):
        """The batch after the third is late."""

        def train_dataloader(self):
            return DataLoader(Late(self.done), batch_size=None)

    data = Slow()
    run = training.train(test_train.settings(tmp_path, trainer={"stall_minutes": FAST}), data=data)
    (text,) = [p.read_text() for p in (run / "stacks").iterdir()]
    assert "after step 3, in the wait for the next batch" in text and "Late" not in text and "__iter__" in text
    assert not [t for t in threading.enumerate() if t.name == "watchdog"]


@pytest.mark.parametrize("where", ["setup", "loader"])
def test_a_start_that_stands_still_is_told_of(tmp_path, caplog, clock, where):
    def stands() -> None:
        clock.now += 1.4 * LIMIT_S
        until(lambda: any("nothing has ended" in record.message for record in caplog.records))

    class Stands(test_train.Data):
        def setup(self, stage):
            if where == "setup":
                stands()

        def train_dataloader(self):
            if where == "loader":
                stands()
            return super().train_dataloader()

    config = test_train.settings(tmp_path, trainer={"stall_minutes": FAST, "max_steps": 1, "statistics_clips": 0})
    run = training.train(config, data=Stands())
    (text,) = [p.read_text() for p in (run / "stacks").iterdir()]
    what = {"setup": "the meeting of the processes", "loader": "the checkpoint to go on from, the loader"}[where]
    assert "after step 0, in " in text and what in text and "stands" in text


def test_a_watched_module_can_be_copied(tmp_path):
    """As benchmarks/train_step.py does, in the middle of a run."""
    copies = []

    class Copies(test_train.Data):
        def advance(self, clip):
            super().advance(clip)
            module = self.trainer.lightning_module
            trainer, module._trainer = module._trainer, None
            copies.append(copy.deepcopy(module))
            module._trainer = trainer

    config = test_train.settings(tmp_path, trainer={"stall_minutes": 8, "max_steps": 1, "statistics_clips": 0})
    training.train(config, data=Copies())
    assert len(copies) == 1


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch.utils.data import DataLoader
import test_train, test_watchdog
from vtok.train import train
from vtok.training import loop, watchdog
from waiting import until

out = Path(sys.argv[1])
hangs, told = out / "hangs", [out / "told-0", out / "told-1"]

class Clock(test_watchdog.Clock):
    # stands still until this rank is where it will stand, and the worker that all wait for hangs
    stands = False
    def monotonic(self):
        return 1.4 * test_watchdog.LIMIT_S if self.stands and hangs.exists() else 0.0

class Dog(watchdog.Watchdog):
    def moved(self, doing, *, step=None):
        clock.stands = False
        super().moved(doing, step=step)
        clock.stands = self.step == 4 and doing == ("a training step", "the wait for the next batch")[self.rank]
    def _dump(self, still_s):
        path = super()._dump(still_s)
        told[self.rank].touch()
        return path

watchdog.time = clock = Clock()
loop.Watchdog = Dog

class Part(test_train.Stream):
    def __init__(self, first, rank, world):
        super().__init__(first)
        self.rank, self.world = rank, world
    def planted_hang(self):
        hangs.touch()
        until(lambda: all(path.exists() for path in told), "the stacks of both ranks")
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

trainer = {{"devices": 2, "strategy": "ddp", "max_steps": 6, "stall_minutes": test_watchdog.FAST}}
train(test_train.settings(out, trainer=trainer), data=Mine())
"""


@pytest.mark.slow
def test_both_ranks_write_their_stacks_where_one_worker_hangs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
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
