"""Which checkpoints of a run stay, and naming one of them: for going back, evaluation and export."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import test_train
import torch
from test_checkpoints import cut_short, step_of, write
from test_export import make_run, shards  # noqa: F401

from vtok import export as shipping
from vtok import train as training
from vtok.evaluate import main as evaluate
from vtok.loading import ExportError, load_run
from vtok.training import checkpoints
from vtok.training.checkpoints import CheckpointError


def steps(folder: Path) -> dict[str, list[int]]:
    """{"last" ...: steps} of the whole checkpoints of a folder, by the kind of their name."""
    found: dict[str, list[int]] = {}
    for name in checkpoints.available(folder):
        found.setdefault(name.partition(".")[0].partition("-")[0], []).append(step_of(folder / name))
    return found


@pytest.mark.parametrize("sharded", [False, True])
def test_the_newest_stay_and_those_kept_for_good(tmp_path, sharded):
    for step in range(1, 11):
        kept = (checkpoints.KEPT.format(step),) if step % 3 == 0 else ()
        write(tmp_path, step, sharded=sharded, names=("last.ckpt", *kept), keep=4)
    assert steps(tmp_path) == {"last": [10], "previous": [9], "recent": [7, 8], "step": [3, 6, 9]}
    assert sum(p.is_dir() and not p.is_symlink() for p in tmp_path.iterdir()) == (6 if sharded else 0)
    write(tmp_path, 11, sharded=sharded)  # trainer.keep_last is 2 now, trainer.keep_every 0
    assert steps(tmp_path) == {"last": [11], "previous": [10], "step": [3, 6, 9]}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_cut_at_any_moment_leaves_as_many_as_were_promised(tmp_path, monkeypatch, sharded):
    moment = cuts = 0
    kept = ("last.ckpt", checkpoints.KEPT.format(6))
    while True:
        folder = tmp_path / str(moment)
        write(folder, 1, sharded=sharded, names=("last.ckpt", checkpoints.KEPT.format(1)), keep=4)
        for step in range(2, 6):
            write(folder, step, sharded=sharded, keep=4)
        act = partial(write, folder, 6, sharded=sharded, names=kept, keep=4)
        if not cut_short(monkeypatch, moment, act):
            break
        cuts += 1
        found = steps(folder)
        every = {step for those in found.values() for step in those}
        assert found["last"][0] in (5, 6) and 1 in found["step"]
        assert every >= set(range(found["last"][0] - 3, found["last"][0] + 1))
        write(folder, 7, sharded=sharded, keep=4)  # the next start saves as if nothing had happened
        newest = [7, 6, 5, 4] if found["last"] == [6] else [7, 5, 4, 3]
        found = steps(folder)
        assert [*found["last"], *found["previous"], *reversed(found["recent"])] == newest
        shutil.rmtree(folder)
        moment += 1
    assert cuts > 10 and steps(folder) == {"last": [6], "previous": [5], "recent": [3, 4], "step": [1, 6]}


def test_after_going_back_newer_steps_are_the_first_to_go(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in range(1, 7):
        write(folder, step, keep=5)
    checkpoints.main([str(tmp_path / "run"), "--use", "3"])
    assert step_of(folder / "last.ckpt") == 3
    for step in (4, 5):
        write(folder, step, keep=5)
    found = steps(folder)
    assert found["last"] == [5] and found["previous"] == [4] and found["recent"] == [2, 3]


def test_a_damaged_checkpoint_is_told_the_way_back_by_its_step(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        write(folder, step, names=("last.ckpt", checkpoints.KEPT.format(step)))
    os.unlink(folder / "previous.ckpt")
    for name in ("last.ckpt", checkpoints.KEPT.format(20)):  # one file, of two names
        (folder / name).write_bytes(b"nothing that could be read")
    with pytest.raises(CheckpointError, match=r"step-00000010.ckpt \(step 10\) is whole: .* --use 10`"):
        checkpoints.verify(folder / "last.ckpt")


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="run has no checkpoint yet: .*last.ckpt does not exist; train it first"):
        checkpoints.find(folder, "best")
    for step in (1, 2, 3, 4):
        write(folder, step, names=("last.ckpt", *((checkpoints.KEPT.format(2),) if step == 2 else ())), keep=3)
    there = r"there are last \(step 4\), previous \(step 3\), step 2$"
    with pytest.raises(CheckpointError, match=r"run has no checkpoint of step 1; " + there):
        checkpoints.find(folder, 1)
    for word in ("worst", "-1", "1.5", ""):
        with pytest.raises(
            CheckpointError, match=f"which='{word}' is unknown; choose best, last, previous or a step; "
        ):
            checkpoints.find(folder, word)
    assert [checkpoints.find(folder, which).name for which in ("best", "previous", 4, "2", "0003")] == [
        "last.ckpt", "previous.ckpt", "last.ckpt", "step-00000002.ckpt", "previous.ckpt"
    ]  # fmt: skip


# whole runs


def test_a_run_keeps_what_its_keys_say_and_ends_as_one_that_did_not(tmp_path):
    def config(name: str, last: int = 8, **keys):
        trainer = {"max_steps": last, "val_every": 4, "checkpoint_every": 1, **keys}
        return test_train.settings(tmp_path, name=name, trainer=trainer, optim={"schedule": "constant"})

    plain = training.train(config("plain"), data=test_train.Data())
    run = training.train(config("run", keep_last=3, keep_every=3), data=test_train.Data())
    found = steps(run / "checkpoints")
    assert found == {"last": [8], "previous": [7], "best": found["best"], "recent": [6], "step": [3, 6]}
    assert steps(plain / "checkpoints").keys() == {"last", "previous", "best"}
    rare = training.train(config("rare", keep_every=5, checkpoint_every=0), data=test_train.Data())
    assert steps(rare / "checkpoints")["step"] == [5]  # written for its own sake
    checkpoints.main([str(run), "--use", "3"])
    training.train(config("run", keep_last=3), data=test_train.Data())
    ends = [test_train.checkpoint(each)["state_dict"] for each in (run, plain)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert test_train.metrics(run, timeless=True) == test_train.metrics(plain, timeless=True)
    assert steps(run / "checkpoints")["step"] == [3, 6]  # nobody asked for them to go


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"keep_last": 1}, "trainer.keep_last=1 must be 2 or above: last.ckpt, and previous.ckpt"),
        ({"keep_every": -1}, "trainer.keep_every=-1 must be 0 or above"),
    ],
)
def test_keys_that_cannot_be_kept_are_refused(tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        training.check(test_train.settings(tmp_path, trainer=keys))


@pytest.fixture
def run(tmp_path, request) -> Path:
    """Of two checkpoints: the last, of step 9, and the best, of step 4."""
    videos = request.getfixturevalue("shards")
    run, other = (make_run(tmp_path / name, seed=seed, shards=videos) for name, seed in (("run", 1), ("other", 2)))
    for source, name, step in ((run, "last.ckpt", 9), (other, checkpoints.KEPT.format(4), 4)):
        state = torch.load(source / "checkpoints" / "last.ckpt", weights_only=True)
        torch.save({**state, "vtok": {"step": step}}, run / "checkpoints" / name)
    (run / "metrics.jsonl").write_text('{"step": 4}\n{"step": 9, "val/loss": 1.0}\n{"step": 1')  # it is being written
    return run


def test_an_export_is_of_the_checkpoint_that_is_named(run, tmp_path):
    for which, step in (("best", 9), ("last", 9), ("4", 4)):
        shipping.main_export([str(run), "--out", str(tmp_path / "export"), "--which", which, "--no-entropy"])
        made = shipping.load(tmp_path / "export").state_dict()
        assert all(torch.equal(made[n], v) for n, v in load_run(run, which=step)[0].state_dict().items())
        card = (tmp_path / "export" / "README.md").read_text()
        assert (f"- {step} steps (of a run that went on to 9) of" if step == 4 else "- 9 steps of") in card
    with pytest.raises(ExportError, match=r"no checkpoint of step 5; there are last \(step 9\), step 4"):
        shipping.main_export([str(run), "--out", str(tmp_path / "export"), "--which", "5"])


def test_an_evaluation_is_of_the_checkpoint_that_is_named_and_the_card_shows_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos = json.loads(json.dumps(str(load_run(run)[1].data.shards)))
    asked = ["--shards", videos, "--clips", "2", "--codecs", "none", "--controls", "none", "--no-progress"]
    assert evaluate([str(run), *asked, "--budgets", "1"]) == 0
    assert evaluate([str(run), *asked, "--budgets", "1", "--which", "4", "--no-report"]) == 0
    usual, named = (json.loads((run / "eval" / at / "eval.json").read_text()) for at in ("", "4"))
    assert usual["checkpoint"] == {"which": "best", "step": 9} and named["checkpoint"] == {"which": "4", "step": 4}
    assert usual["model_id"] != named["model_id"] and usual["rows"] != named["rows"]
    with pytest.raises(ExportError, match="no checkpoint previous; there are last"):
        evaluate([str(run), *asked, "--which", "previous"])
    for which, shown in (("last", True), ("4", False)):
        out = shipping.export(run, tmp_path / which, which=which, entropy=False)
        assert ("controls and codecs on the same windows" in (out / "README.md").read_text()) == shown
    with pytest.raises(ValueError, match="--which last: .*4 is no run directory, and holds one set of weights"):
        evaluate([str(tmp_path / "4"), *asked, "--which", "last"])
