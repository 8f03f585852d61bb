"""A signal in the middle of a validation: it is left at once, and nothing of the run is lost or told twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from test_resume import assert_same_end, curves, make_shards, write_config

from vtok.config import load
from vtok.train import finished, train
from vtok.training import strategy
from vtok.training.lit import LitTokenizer


def signalled(patch: pytest.MonkeyPatch, number: int, *, step: int, batch: int) -> None:
    """Has the signal come while the run measures that batch of the validation after that step."""
    measure = LitTokenizer.measure

    def measured(self, clip, index):
        if (self.steps_done, index) == (step, batch):
            os.kill(os.getpid(), number)
        return measure(self, clip, index)

    patch.setattr(LitTokenizer, "measure", measured)


@pytest.mark.slow
def test_a_validation_is_left_and_made_by_the_next_start(tmp_path, monkeypatch):
    trainer = {"val_every": 8, "checkpoint_every": 5, "log_every": 4}
    data = {"num_workers": 0, "val_batch_size": 4}
    shards = make_shards(tmp_path / "shards")
    config = write_config(tmp_path, shards, processes=1, steps=12, slow_s=0.0, trainer=trainer, data=data)
    train(load(config, ["name=whole"]))
    run, last = tmp_path / "cut", tmp_path / "cut" / "checkpoints" / "last.ckpt"

    def start() -> Path:
        return train(load(config, ["name=cut"]))

    def validated() -> list[int]:
        return [row["step"] for row in curves(run) if "val/loss" in row]

    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGUSR1, step=8, batch=1)
        with pytest.raises(SystemExit) as stopped:  # in the validation after step 8
            start()
        assert stopped.value.code == 128 + signal.SIGUSR1
        assert strategy.describe(last)["step"] == 8 and strategy.describe(last)["owed"] == [True, True]
        assert validated() == []
    mark = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, step=8, batch=0)
        patch.setenv("VTOK_STOPPED", str(mark))  # as slurm/job.sh does
        assert start() == run  # in the one that was owed, before a step is done
        assert mark.read_text().strip() == str(128 + signal.SIGTERM)
        assert strategy.describe(last)["step"] == 8 and strategy.describe(last)["owed"] == [True, True]
        assert validated() == []
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGUSR1, step=12, batch=1)
        with pytest.raises(SystemExit):  # in the last: no step is trained again for it
            start()
        about = strategy.describe(last)
        assert about["step"] == 12 and about["owed"] == [True, True] and validated() == [8]
        assert not finished(about, load(config, ["name=cut"]))
    with monkeypatch.context() as patch:
        patch.setattr(LitTokenizer, "training_step", lambda *_: pytest.fail("a step after the last"))
        start()
    assert validated() == [8, 12] and finished(strategy.describe(last), load(config, ["name=cut"]))
    assert_same_end(tmp_path / "whole", run, processes=1)
    assert not (run / "lock").exists()
