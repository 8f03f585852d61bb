"""Each key of docs/performance.md: the same numbers with it as without, and an error where it cannot be used."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import test_contract
import test_train
import torch
from torch import nn
from torch.utils.data import DataLoader
from waiting import PATIENCE_S

from vtok import config
from vtok import train as training
from vtok.data.prefetch import DevicePrefetch, tensors
from vtok.training import keys, strategy, tracking
from vtok.training.background import BackgroundCheckpointIO, on_host
from vtok.training.checkpoints import CheckpointError
from vtok.types import Clip, Features

ROOT = Path(__file__).parent.parent
CONV = {
    "name": "discrete", "num_frames": 9, "size": [16, 16], "stride": [4, 8, 8], "latent_channels": 4,
    "conv": {"width": 8, "mult": [1, 1, 1, 1], "num_res_blocks": 1, "mid_blocks": 1, "attention": "none"},
}  # fmt: skip


def losses(run: Path) -> list[float]:
    return [float.fromhex(line.split()[2]) for line in (run / "ledger-0.txt").read_text().splitlines()]


def train(tmp_path: Path, name: str, *, data=None, **parts) -> Path:
    parts["trainer"] = {"ledger": True, **parts.get("trainer", {})}
    settings = test_train.settings(tmp_path, name=name, **parts)
    if not settings.trainer.val_every:
        settings.data.val_shards = ""  # validation would take longer than all steps
    return training.train(settings, data=data or test_train.Data())


# fused AdamW


def test_fused_and_foreach_adamw_train_alike_and_a_run_may_change_between_them(tmp_path):
    fused, apart = (train(tmp_path, str(f), optim={"fused": f, "weight_decay": 0.1}) for f in (True, False))
    assert losses(fused) == pytest.approx(losses(apart), rel=1e-5)
    for name in ("first", "again"):
        optim = {"fused": name == "first", "weight_decay": 0.1, "schedule": "constant"}
        data = test_train.Data(signal_at={4: signal.SIGTERM} if name == "first" else None)
        config = test_train.settings(tmp_path, name="both", optim=optim, trainer={"ledger": True})
        if name == "first":
            with pytest.raises(SystemExit):
                training.train(config, data=data)
        else:
            training.train(config, data=data)
    groups = test_train.checkpoint(tmp_path / "both")["optimizer_states"][0]["param_groups"]
    assert {group["fused"] for group in groups} == {False}


# channels last


@pytest.mark.slow  # convolutions
def test_channels_last_trains_alike_and_leaves_no_layout_in_files(tmp_path):
    run = {}
    for last in (False, True):
        trainer = {"channels_last": last, "max_steps": 3}
        run[last] = train(tmp_path, str(last), model=CONV, optim={"ema_decay": 0.9}, trainer=trainer)
    assert losses(run[True]) == pytest.approx(losses(run[False]), rel=1e-4)
    kept = test_train.checkpoint(run[True])
    assert all(value.is_contiguous() for part in ("state_dict", "ema") for value in kept[part].values())
    # a run that was begun without goes on with it, and learns what it would have learned
    whole = train(tmp_path, "whole", model=CONV, trainer={"max_steps": 4}, optim={"schedule": "constant"})
    for steps, last in ((2, False), (4, True)):
        trainer = {"max_steps": steps, "channels_last": last}
        cut = train(tmp_path, "cut", model=CONV, trainer=trainer, optim={"schedule": "constant"})
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-4)


def test_channels_last_lays_weights_and_moments_out_and_needs_3d_convolutions(tmp_path):
    layer = nn.Conv3d(3, 4, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(1, 3, 4, 4, 4)).sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    assert keys.channels_last(layer) == 1 and torch.equal(layer.weight, before)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)
    moments = optimizer.state[layer.weight]["exp_avg"].clone()
    keys.match_layout(optimizer)
    now = optimizer.state[layer.weight]["exp_avg"]
    assert now.stride() == layer.weight.stride() and torch.equal(now, moments)
    with pytest.raises(ValueError, match="trainer.channels_last=true: model.name=outside.tiny has no 3D convolutions"):
        train(tmp_path, "none", trainer={"channels_last": True})


# checkpoints in a thread


class SlowDisk:
    """torch.save that takes its time: until it is told to go on."""

    def __init__(self) -> None:
        self.go_on, self.write, self.threads = threading.Event(), torch.save, []

    def __call__(self, *args, **kwargs) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.go_on.wait(PATIENCE_S), "training waits for its checkpoint"
        self.write(*args, **kwargs)


def test_a_checkpoint_in_a_thread_is_the_same_and_training_goes_on_meanwhile(tmp_path, monkeypatch):
    trainer = {"checkpoint_every": 3, "max_steps": 8}
    optim = {"ema_decay": 0.9}
    plain = train(tmp_path, "plain", trainer=trainer, optim=optim)
    disk = SlowDisk()
    monkeypatch.setattr(torch, "save", disk)
    seen: list[tuple[int, bool]] = []

    class Watching(test_train.Data):
        def advance(self, clip: Clip) -> None:
            super().advance(clip)
            seen.append((self.done, any(t.name == "checkpoint" for t in threading.enumerate())))
            if self.done == 4:
                disk.go_on.set()

    run = train(tmp_path, "thread", trainer={**trainer, "async_checkpoint": True}, optim=optim, data=Watching())
    assert set(disk.threads) == {"checkpoint"} and len(disk.threads) == 3  # steps 3, 6, 8
    assert dict(seen)[4] and not dict(seen)[3]
    ours, theirs = test_train.checkpoint(run), test_train.checkpoint(plain)
    for part in ("state_dict", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][k], theirs[part][k]) for k in ours[part])
    assert losses(run) == losses(plain) and strategy.describe(run / "checkpoints" / "last.ckpt")["step"] == 8
    assert not [t for t in threading.enumerate() if t.name == "checkpoint"]


def test_a_checkpoint_that_failed_in_its_thread_ends_the_run_at_the_next_one(tmp_path, monkeypatch):
    write, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="checkpoint of step 4 could not be written.*No space left.*as they were"):
        train(tmp_path, "run", trainer={"async_checkpoint": True, "checkpoint_every": 2})
    assert strategy.describe(tmp_path / "run" / "checkpoints" / "last.ckpt")["step"] == 2
    run = train(tmp_path, "run", trainer={"async_checkpoint": True, "checkpoint_every": 2})
    assert strategy.describe(run / "checkpoints" / "last.ckpt")["step"] == 8


KILL = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_performance_keys as tests

write, calls = torch.save, []
def dies(state, file, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"half of a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(state, file, **kwargs)
if len(sys.argv) > 2:
    torch.save = dies
tests.train(Path(sys.argv[1]), "run", trainer={{"async_checkpoint": True, "checkpoint_every": 2}})
"""


@pytest.mark.slow
def test_a_kill_during_the_write_loses_nothing_older(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILL.format(tests=str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = tmp_path / "run"
    for extra, code, step in (["dies"], -signal.SIGKILL, 2), ([], 0, 8):
        command = [sys.executable, str(script), str(tmp_path), *extra]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == code, done.stderr
        assert strategy.describe(run / "checkpoints" / "last.ckpt")["step"] == step
    whole = train(tmp_path, "whole")
    ours, theirs = test_train.checkpoint(run)["state_dict"], test_train.checkpoint(whole)["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_copy_in_host_memory_stays_as_it_was(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = nn.Linear(2, 2).state_dict()
    kept = on_host({"a": weight, "b": [weight, (weight[:, 1:], 3)], "state": state, "none": torch.zeros(0)})
    weight += 1
    assert (
        kept["a"].sum() == 15
        and kept["b"][0] is kept["a"]
        and torch.equal(kept["b"][1][0], torch.tensor([[1.0, 2], [4, 5]]))
    )
    assert type(kept["state"]) is type(state) and kept["state"]._metadata == state._metadata
    io = BackgroundCheckpointIO()
    io.save_checkpoint({"a": weight}, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").exists() and io.kept is None


# copies to the device


def test_batches_one_ahead_are_the_same_batches(tmp_path):
    stream = test_train.Stream(0, 5)
    ahead = DevicePrefetch(DataLoader(stream, batch_size=None), torch.device("cpu"))
    assert len(ahead) == 5
    assert [clip.keys for clip in ahead] == [clip.keys for clip in stream]
    assert list(DevicePrefetch([], torch.device("cpu"))) == []

    class Ahead(test_train.Data):
        def train_dataloader(self):
            return DevicePrefetch(super().train_dataloader(), torch.device("cpu"))

    runs = [train(tmp_path, name, data=data) for name, data in (("a", test_train.Data()), ("b", Ahead()))]
    assert losses(runs[0]) == losses(runs[1])


def test_every_tensor_of_a_batch_is_found():
    video, patches = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 2, 4, 8)
    clip = Clip(keys=["a"], video=video, lengths=torch.tensor([2]), features={"t": Features(patches, (2, 2))}, qa=[[]])
    assert {id(t) for t in tensors(clip)} == {id(video), id(clip.lengths), id(patches)}


# compiled parts


def eagerly(monkeypatch) -> list[str]:
    """Parts are traced, differentiated and guarded as ever, but no kernels are made; their kinds, as they come."""
    compile_, seen = nn.Module.compile, []

    def traced(self) -> None:
        seen.append(type(self).__name__)
        compile_(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    return seen


@pytest.mark.slow  # importing the compiler takes seconds
def test_compiled_parts_train_alike(tmp_path, monkeypatch):
    seen = eagerly(monkeypatch)
    runs = [train(tmp_path, str(c), trainer={"compile": c, "max_steps": 4}) for c in (False, True)]
    assert seen == ["Linear", "LayerNorm", "Linear"]  # of the model; the objective is not compiled
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", ["flexible", "discrete", "flow"])
def test_parts_of_families_train_alike_compiled(tmp_path, monkeypatch, family):
    small, forms = test_contract.FAMILIES[family]
    form = {"flexible": "dct", "discrete": "lfq", "flow": "pixels"}[family]
    model = config.to_dict(test_contract.make_config(family, form)) | {"name": family}
    eagerly(monkeypatch)
    runs = [train(tmp_path, str(c), model=model, trainer={"compile": c, "max_steps": 2}) for c in (False, True)]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)


# refusals


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"data": {"pin_memory": True}}, "data.pin_memory=true copies to a CUDA device.*set data.pin_memory=false"),
        ({"data": {"prefetch": True}}, "data.prefetch=true copies to a CUDA device"),
        ({"trainer": {"async_checkpoint": True, "strategy": "deepspeed_2"}}, "trainer.async_checkpoint=true.*ddp"),
        ({"trainer": {"channels_last": True, "strategy": "deepspeed_1"}}, "trainer.channels_last=true.*flat buffers"),
        ({"trainer": {"compile": True}}, r"trainer.compile=true needs a C\+\+ compiler.*'no-such-compiler'"),
    ],
)
def test_keys_that_cannot_be_kept_are_refused(tmp_path, monkeypatch, parts, words):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = test_train.settings(tmp_path, trainer=parts.get("trainer", {}))
    for name, value in parts.get("data", {}).items():
        setattr(config.data, name, value)
    with pytest.raises(ValueError, match=words):
        training.check(config)


# Weights & Biases


def test_what_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch):
    find = tracking.importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ValueError, match=r"trainer.wandb='mine' needs .*pip install 'vtok\[wandb\]', or set"):
        training.check(test_train.settings(tmp_path, trainer={"wandb": "mine"}))
    training.check(test_train.settings(tmp_path))
