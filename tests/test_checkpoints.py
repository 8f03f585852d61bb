"""Checkpoints on disk: whole or not there, checked by hash, going on where others stopped. Without processes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import test_train
import torch
from waiting import PATIENCE_S

from vtok import train as training
from vtok.export import ExportError
from vtok.loading import load_run
from vtok.training import checkpoints, strategy
from vtok.training.checkpoints import CheckpointError
from vtok.training.curves import Curves, keep_until
from vtok.training.zero_shards import TAG, check_shards, load_shard, read_shards

NAMES = ("last.ckpt", "previous.ckpt", "best.ckpt")


def write(
    folder: Path, step: int, *, sharded: bool = False, names: tuple[str, ...] = ("last.ckpt",), keep: int = 2
) -> None:
    """Publishes a small checkpoint of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / ".writing"
    checkpoints.discard(written)
    if sharded:
        (written / TAG).mkdir(parents=True)
        for rank in range(2):
            torch.save({"step": step, "x": torch.full((64,), float(rank))}, written / TAG / f"shard_{rank}.pt")
    else:
        weights = {"model.w": torch.full((64,), float(step))}
        strategy.AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "vtok": {"step": step}}, written)
    about = {"step": step, "world_size": 2, "strategy": "deepspeed_2"}
    checkpoints.publish(written, list(names), about=about, keep=keep)


def step_of(path: Path) -> int:
    checkpoints.verify(path)
    return checkpoints.describe(path)["step"]


def flip(path: Path, at: float = 0.5) -> None:
    """Changes one bit of a file in place: hard links to it see it too."""
    with open(path, "r+b") as file:
        file.seek(int(path.stat().st_size * at))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


class Cut(BaseException):
    """The power goes."""


OPERATIONS = [(os, "replace"), (os, "link"), (os, "fsync"), (Path, "rename"), (Path, "symlink_to"), (Path, "unlink"),
              (shutil, "rmtree")]  # fmt: skip


def cut_short(monkeypatch, moment: int, act: Callable[[], None]) -> bool:
    """Acts until the power goes, before a change to the disk that follows `moment` others; whether it came to that."""
    left = [moment]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            act()
        except Cut:
            return True
    return False


MIXED = [pytest.param(kinds, marks=pytest.mark.slow) for kinds in ((False, True), (True, False))]


@pytest.mark.parametrize("kinds", [(False, False), (True, True), *MIXED])
def test_a_cut_at_any_moment_of_publishing_loses_nothing_older(tmp_path, monkeypatch, kinds):
    """Before each single change to the disk, in turn: the newest name is whole, of the step before or of this one."""
    before, after = kinds
    moment = cuts = 0
    while True:
        folder = tmp_path / str(moment)
        write(folder, 1, sharded=before, names=("last.ckpt", "best.ckpt"))
        write(folder, 2, sharded=before)
        act = partial(write, folder, 3, sharded=after, names=("last.ckpt", "best.ckpt"))
        if not cut_short(monkeypatch, moment, act):
            break
        cuts += 1
        newest = step_of(folder / "last.ckpt")
        assert newest in (2, 3) and step_of(folder / "best.ckpt") in (1, 3)
        assert step_of(folder / "previous.ckpt") in ((1, 2) if newest == 2 else (2,))
        write(folder, 4, sharded=after)  # the next start saves as if nothing had happened
        assert [step_of(folder / name) for name in ("last.ckpt", "previous.ckpt")] == [4, newest]
        moment += 1
    assert cuts >= 8 and [step_of(folder / name) for name in NAMES] == [3, 2, 3]
    leftovers = {p.name for p in folder.iterdir()} - {*NAMES, "sha256.jsonl"}
    assert all(name.startswith("step-") for name in leftovers) and len(leftovers) == before + after


@pytest.mark.parametrize("sharded", [False, True])
def test_a_flipped_bit_is_an_error_that_names_the_file_and_the_way_back(tmp_path, sharded):
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        write(folder, step, sharded=sharded)
    damaged = folder / "last.ckpt"
    if sharded:
        damaged = damaged / TAG / "shard_1.pt"
    flip(damaged)
    told = rf"{damaged} is damaged: .*previous.ckpt \(step 1\) is whole: .*python -m vtok.training.checkpoints "
    told += ".*--use previous"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.verify(folder / "last.ckpt")
    flip(damaged)
    checkpoints.verify(folder / "last.ckpt")
    if sharded:
        flip(folder / "last.ckpt" / "vtok.json")
        with pytest.raises(CheckpointError, match=r"last.ckpt/vtok.json is damaged: its sha256"):
            checkpoints.verify(folder / "last.ckpt")
        flip(folder / "last.ckpt" / "vtok.json")
        (folder / "last.ckpt" / TAG / "shard_0.pt").unlink()
        with pytest.raises(CheckpointError, match=rf"not whole: {TAG}/shard_0.pt is missing"):
            checkpoints.verify(folder / "last.ckpt")


def test_a_damaged_checkpoint_does_not_become_the_previous_one(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").write_bytes(b"nothing that could be read")
    write(tmp_path, 3)
    assert [step_of(tmp_path / name) for name in NAMES[:2]] == [3, 1]
    with pytest.raises(CheckpointError, match="No other whole checkpoint is there"):
        (tmp_path / "previous.ckpt").unlink()
        flip(tmp_path / "last.ckpt")
        checkpoints.verify(tmp_path / "last.ckpt")


def test_the_same_step_saved_again_keeps_an_older_previous_one(tmp_path):
    for step in (1, 2, 2):
        write(tmp_path, step)
    assert [step_of(tmp_path / name) for name in NAMES[:2]] == [2, 1]


def test_a_checkpoint_from_before_hashes_is_read_and_says_so(tmp_path, caplog):
    write(tmp_path, 1)
    (tmp_path / "sha256.jsonl").unlink()
    checkpoints.verify(tmp_path / "last.ckpt")
    assert "no hashes were recorded" in caplog.text


def test_a_shard_that_would_run_code_is_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    write(tmp_path, 1, sharded=True)
    shard = tmp_path / "last.ckpt" / TAG / "shard_0.pt"
    assert load_shard(shard)["step"] == 1
    check_shards(tmp_path / "last.ckpt")
    torch.save({"x": Bomb()}, shard)
    for read in (lambda: load_shard(shard), lambda: check_shards(tmp_path / "last.ckpt")):
        with pytest.raises(CheckpointError, match=r"shard_0.pt (is not a file of|would run \['posix.mkdir'\])"):
            read()
    with pytest.raises(CheckpointError, match="is not a whole DeepSpeed checkpoint: no .*model_states.pt"):
        read_shards(tmp_path / "last.ckpt")
    assert not (tmp_path / "exploded").exists()


# whole runs


def test_a_full_disk_ends_the_run_with_one_line_and_the_older_checkpoint_goes_on(tmp_path):
    """A limit on the size of files, which the system holds as it holds the end of a disk."""
    run = training.train(test_train.settings(tmp_path, trainer={"max_steps": 3}), data=test_train.Data())
    last = run / "checkpoints" / "last.ckpt"
    digest = checkpoints.sha256(last)
    longer = test_train.settings(tmp_path, trainer={"max_steps": 6, "val_every": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 6 could not be written: .*last.ckpt \(step 3\) is as it was"):
            training.train(longer, data=test_train.Data())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.sha256(last) == digest and not (run / "checkpoints" / ".writing").exists()
    training.train(longer, data=test_train.Data())
    assert [step_of(run / "checkpoints" / name) for name in NAMES[:2]] == [6, 3]


def test_a_full_disk_is_told_with_the_name_of_the_curves_file(tmp_path):
    curves = Curves(tmp_path, tensorboard=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        curves.write(1, {"train/loss": 0.5})
        with pytest.raises(OSError, match=f"{tmp_path}/metrics.jsonl"):
            curves.write(2, {"train/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    curves.close()  # says nothing again
    keep_until(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 0.5}\n'


@pytest.mark.slow
def test_a_damaged_run_says_so_goes_back_and_ends_as_it_would_have(tmp_path):
    def config(name: str, steps: int):
        trainer = {"max_steps": steps, "checkpoint_every": 2}
        return test_train.settings(tmp_path, name=name, trainer=trainer, optim={"schedule": "constant"})

    whole = training.train(config("whole", 6), data=test_train.Data())
    run = training.train(config("run", 4), data=test_train.Data())
    (run / "checkpoints" / "best.ckpt").unlink()  # another name of last.ckpt, damaged with it
    flip(run / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged: .*previous.ckpt \(step 2\) is whole"):
        training.train(config("run", 6), data=test_train.Data())
    with pytest.raises(ExportError, match="last.ckpt is damaged"):
        load_run(run)
    command = [sys.executable, "-m", "vtok.training.checkpoints", str(run)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert told.returncode == 1 and "last.ckpt      DAMAGED" in told.stdout and "whole, step 2" in told.stdout
    checkpoints.main([str(run), "--use", "previous"])
    training.train(config("run", 6), data=test_train.Data())
    ends = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, whole)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_moments_follow_names_and_settings_that_changed_take_effect(tmp_path):
    """Another group for one part of the model: the optimizer's own order of parameters is then another one."""
    first = test_train.settings(tmp_path, trainer={"max_steps": 2}, optim={"weight_decay": 0.1})
    run = training.train(first, data=test_train.Data())
    before = checkpoints.moments_of(checkpoints.read(run / "checkpoints" / "last.ckpt"))
    now = {"weight_decay": 0.3, "lr_multipliers": {"model.outward": 0.5}}
    lit = training.build(test_train.settings(tmp_path, optim=now), fresh=False)
    checkpoint = checkpoints.read(run / "checkpoints" / "last.ckpt")
    groups = lit.configure_optimizers().state_dict()["param_groups"]
    checkpoints.adapt(checkpoint, names=lit._group_names(), groups=groups, accumulate=3)
    optimizer = lit.configure_optimizers()
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    names = {id(p): name for name, p in lit.named_parameters()}
    after = {names[id(p)]: state for p, state in optimizer.state.items()}
    assert after.keys() == before.keys() and "model.outward.weight" in after
    for name, state in after.items():
        assert torch.equal(state["exp_avg"], before[name]["exp_avg"]) and state["step"] == before[name]["step"]
    assert checkpoint["vtok"]["micro"] == 6
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["ready"] == 6 and progress["completed"] in (5, 6)
    checkpoint["moments"] = {"model.gone": {}}
    with pytest.raises(CheckpointError, match=r"state of \['model.gone'\], which are not trained here"):
        checkpoints.adapt(checkpoint, names=lit._group_names(), groups=groups, accumulate=1)
