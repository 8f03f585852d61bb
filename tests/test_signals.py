"""Signals before a run can save: who ends how, and whether slurm/job.sh is asked for another turn."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import test_train
import torch
from test_resume import make_shards, write_config
from waiting import PATHS, PATIENCE_S, until

from vtok import train as training
from vtok.training import signals, strategy

BEGINS = """
import os, sys, time
from pathlib import Path
from vtok import cli
from vtok.training import signals
here, stands_in = Path(__file__).parent, os.environ["STANDS_IN"]

def stand():
    (here / f"up-{os.environ.get('LOCAL_RANK', 0)}").touch()
    time.sleep(900)

def patched(module, owner, name):
    real = getattr(getattr(module, owner) if owner else module, name)
    def instead(*args, **kwargs):
        stand()
        return real(*args, **kwargs)
    setattr(getattr(module, owner) if owner else module, name, instead)

if stands_in == "import":  # a module that takes long to import, before torch
    class Finder:
        def find_spec(self, name, *rest):
            if name == "vtok.train":
                assert "torch" not in sys.modules
                stand()
    sys.meta_path.insert(0, Finder())
elif stands_in == "model":
    import vtok.train
    patched(vtok.train, "", "build")
elif stands_in == "loader":
    import vtok.data.module
    patched(vtok.data.module, "ClipDataModule", "train_dataloader")
if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begins")
    (folder / "begins.py").write_text(BEGINS)
    trainer = {"statistics_clips": 0, "stall_minutes": 0}
    return write_config(folder, make_shards(folder / "shards"), processes=1, steps=4, slow_s=0.0, trainer=trainer)


def begin(config: Path, name: str, stands_in: str, *words: str, **environment: str) -> subprocess.Popen:
    around = {k: v for k, v in os.environ.items() if k != signals.MARK} | environment
    around |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "STANDS_IN": stands_in}
    log = open(config.parent / f"{name}.log", "a")
    command = [sys.executable, str(config.parent / "begins.py"), str(config), f"name={name}", *words]
    return subprocess.Popen(command, env=around, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stands(process: subprocess.Popen, config: Path, rank: int = 0) -> None:
    up = config.parent / f"up-{rank}"
    until(lambda: up.exists() or process.poll() is not None, "where it stands")
    assert process.poll() is None
    up.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("stands_in", ["import", "model", "loader"])
def test_before_there_is_anything_to_save_a_signal_ends_at_once(config, stands_in):
    mark = config.parent / "stopped"
    for number, asks in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        process = begin(config, f"run-{stands_in}", stands_in, VTOK_STOPPED=str(mark))
        try:
            stands(process, config)
            process.send_signal(number)
            assert process.wait(timeout=PATIENCE_S) == 128 + number
        finally:
            process.kill()
        assert mark.exists() == asks
        if asks:
            assert mark.read_text() == f"{128 + number}\n"
            mark.unlink()


@pytest.mark.slow
def test_without_a_job_around_it_sigterm_while_the_loader_is_made_is_no_success(config):
    process = begin(config, "alone", "loader")
    try:
        stands(process, config)
        process.terminate()
        assert process.wait(timeout=PATIENCE_S) == -signal.SIGTERM
    finally:
        process.kill()
    finish = begin(config, "alone", "nowhere")  # nothing is left in its way
    assert finish.wait(timeout=PATIENCE_S) == 0
    assert strategy.describe(config.parent / "alone" / "checkpoints" / "last.ckpt")["step"] == 4


@pytest.mark.slow
def test_of_two_ranks_the_one_that_is_not_ready_asks_for_another_turn(config):
    """Its exit is what srun ends the other by, with SIGTERM, whose status alone would fail the job."""
    mark = config.parent / "stopped-two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), signals.MARK: str(mark)}
    ranks = []
    try:
        for rank, stands_in in enumerate(("nowhere", "loader")):
            ranks.append(
                begin(config, "two", stands_in, "trainer.devices=2", LOCAL_RANK=str(rank), NODE_RANK="0", **meet)
            )
        stands(ranks[1], config, 1)
        ranks[1].send_signal(signal.SIGUSR1)
        assert ranks[1].wait(timeout=PATIENCE_S) == 138
        ranks[0].terminate()
        assert ranks[0].wait(timeout=PATIENCE_S) != 0
    finally:
        for process in ranks:
            process.kill()
    assert mark.read_text() == "138\n"


WAITS = """
import sys
from vtok.training import signals
signals.watch()
import torch
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
open(sys.argv[1], "w").close()
store.wait(["what nobody sets"])  # inside torch: Python runs no handler before it returns
"""


@pytest.mark.slow
def test_a_rank_that_waits_for_others_hears_it_at_once(tmp_path):
    mark, up = tmp_path / "stopped", tmp_path / "up"
    around = {**os.environ, "PYTHONPATH": PATHS, signals.MARK: str(mark), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", WAITS, str(up)], env=around)
    try:
        until(up.exists, "its wait")
        time.sleep(1)  # it surely waits; sooner, it would hear by Python's own means
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 138  # the store gives up after 300 s
    finally:
        process.kill()
    assert mark.read_text() == "138\n"


def test_forked_workers_ask_for_no_turn(tmp_path):
    code = (
        "import os, signal, time\nfrom vtok.training import signals\nsignals.watch()\npid = os.fork()\n"
        "if pid == 0:\n time.sleep(900)\ntime.sleep(0.2)\nos.kill(pid, signal.SIGUSR1)\nos.kill(pid, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    around = {**os.environ, "PYTHONPATH": PATHS, signals.MARK: str(tmp_path / "stopped")}
    done = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout.strip()) == (0, str(-signal.SIGTERM)), done.stderr
    assert not (tmp_path / "stopped").exists()


def test_lightning_neither_hears_signals_nor_tells_of_them(monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop, before = trainer.fit_loop.epoch_loop, signal.getsignal(signal.SIGTERM)
    told: list[object] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: told.append(1))
    loop._broadcast_sigterm_tensor()
    trainer._signal_connector.register_signal_handlers()
    assert told and signal.getsignal(signal.SIGTERM) != before, "Lightning has changed: see signals.silence"
    trainer._signal_connector.teardown()
    told.clear()
    signals.silence(trainer)
    loop._broadcast_sigterm_tensor()
    trainer._signal_connector.register_signal_handlers()
    assert not told and signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path, capfd, request):
    config = test_train.settings(tmp_path)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, heard))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        training.train(config, data=test_train.Data(signal_at={3: signal.SIGINT}))
    assert stopped.value.code == 128 + signal.SIGINT and "the run saves after this step" in capfd.readouterr().err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert strategy.describe(last)["step"] == 3

    class Twice(test_train.Data):
        def advance(self, clip):
            super().advance(clip)
            if self.done == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(config, data=Twice())
    assert strategy.describe(last)["step"] == 3 and not (tmp_path / "run" / "lock").exists()
    assert signal.getsignal(signal.SIGINT) == before
    training.train(config, data=test_train.Data())
    assert strategy.describe(last)["step"] == 8
