"""Training in one process: the step, its state, the run directory. Launches and kills are in test_resume.py."""

import io
import itertools
import json
import math
import os
import re
import signal
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import av
import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from vtok import train as training
from vtok.config import OptimConfig, load, loads
from vtok.metrics.distortion import clip_psnr
from vtok.progress import duration
from vtok.training import curves, lit, loop, strategy, validation
from vtok.training import lock as lock_room
from vtok.training import optim as optim_room
from vtok.training.curves import contact_sheet, keep_until
from vtok.types import Clip, to_uint8

BATCH = 4


class Stream(IterableDataset):
    """Batches that are a pure function of their number: a smooth ramp of random colours."""

    def __init__(self, first: int, length: int = 1 << 40) -> None:
        self.first, self.length = first, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        for i in range(self.first, self.first + self.length):
            generator = torch.Generator().manual_seed(i)
            ends = torch.randint(0, 256, (2, BATCH, 3, 1, 1, 1), generator=generator).float()
            ramp = torch.linspace(0, 1, 4).reshape(1, 1, 4, 1, 1)
            video = (ends[0] + (ends[1] - ends[0]) * ramp).expand(BATCH, 3, 4, 16, 16)
            yield Clip(keys=[f"{i}/{j}" for j in range(BATCH)], video=video.round().to(torch.uint8))


class Data(pl.LightningDataModule):
    """The interface of ClipDataModule; sends itself `signal_at` (batch number: signal) as a cluster would. torn: its
    validation batches are of a kind that nothing can be made of."""

    def __init__(self, *, signal_at: dict[int, int] | None = None, torn: bool = False) -> None:
        super().__init__()
        self.torn = torn
        self.done, self.signal_at = 0, signal_at or {}

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]

    def advance(self, clip: Clip) -> None:
        assert clip.keys[0] == f"{self.done}/0"  # no batch lost or repeated, ever
        self.done += 1
        if self.done in self.signal_at:
            os.kill(os.getpid(), self.signal_at[self.done])

    def train_dataloader(self):
        return DataLoader(Stream(self.done), batch_size=None)

    def val_dataloader(self):
        if self.torn:
            return [Clip(keys=["a"], video=torch.zeros(1, 5, 4, 16, 16, dtype=torch.uint8))]
        return DataLoader(Stream(10**6, 2), batch_size=None)


def settings(out: Path, *, name: str = "run", **parts):
    trainer = {"accelerator": "cpu", "max_steps": 8, "log_every": 4, "progress": False, "tensorboard": False}
    values = {
        "name": name,
        "out": str(out),
        "model": parts.pop("model", {"name": "outside.tiny"}),
        "objective": parts.pop("objective", {}),
        "data": {"shards": "stream", "val_shards": "stream", "batch_size": BATCH},
        "optim": {"warmup_steps": 2, **parts.pop("optim", {})},
        "trainer": {**trainer, **parts.pop("trainer", {})},
        **parts,
    }
    return loads(values)


def checkpoint(run: Path, name: str = "last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def metrics(run: Path, *, timeless: bool = False) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("per_s", "wait", "time_s", "seconds", "memory")
    return [{k: v for k, v in row.items() if not (timeless and any(c in k for c in clocks))} for row in rows]


# pure parts


def test_rate_warms_up_and_reaches_its_minimum():
    cosine = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    assert optim_room.rate(cosine, 0, 0.0) == pytest.approx(0.1)
    assert optim_room.rate(cosine, 50, 0.5) == pytest.approx(0.55)
    assert optim_room.rate(cosine, 100, 1.0) == pytest.approx(0.1)
    flat = OptimConfig(warmup_steps=0, schedule="constant")
    assert {optim_room.rate(flat, s, s / 10) for s in range(11)} == {1.0}
    wsd = OptimConfig(warmup_steps=0, schedule="wsd", min_lr_ratio=0.2)
    assert [optim_room.rate(wsd, 1, p) for p in (0.0, 0.79, 0.9, 1.0)] == pytest.approx([1, 1, 0.6, 0.2])


def test_step_seeds_are_distinct_over_seed_step_and_rank():
    seeds = {lit.step_seed(a, b, c) for a in range(4) for b in range(-3, 200) for c in range(4)}
    assert len(seeds) == 4 * 203 * 4 and all(0 <= s < 1 << 63 for s in seeds)


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(tmp_path):
    module = training.build(settings(tmp_path))
    optim = OptimConfig(weight_decay=0.3, lr_multipliers={"model": 0.5, "model.inward": 0.1})
    groups = optim_room.parameter_groups(module, optim)
    names = {id(p): n for n, p in module.named_parameters()}
    seen = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(n for n, p in module.named_parameters() if p.requires_grad)
    of = {names[id(p)]: g for g in groups for p in g["params"]}
    assert {n for n, g in of.items() if g["weight_decay"]} == {
        "model.inward.weight",
        "model.outward.weight",
        "objective.discriminator.0.weight",
        "objective.discriminator.2.weight",
    }
    assert of["model.inward.weight"]["factor"] == 0.1 and of["model.registers"]["factor"] == 0.5
    assert of["objective.discriminator.0.bias"]["part"] == "objective.discriminator"
    with pytest.raises(ValueError, match="lr_multipliers: 'encoder'.*model.inward"):
        optim_room.parameter_groups(module, OptimConfig(lr_multipliers={"encoder": 1.0}))


def test_codebook_use_counts_real_tokens_only():
    ids = torch.tensor([[[0, 3], [1, 3]], [[2, 3], [-1, -1]]])
    found = lit.codebook_use([ids, ids[:, :1]], (4, 8))
    assert found["codebook_usage"] == pytest.approx((3 / 4 + 1 / 8) / 2)
    assert found["tokens_seen"] == 5
    assert found["perplexity_per_position"] == pytest.approx([(2 + 1) / 2, 1.0])
    assert lit.codebook_use([], (4,)) == {}


@pytest.mark.slow  # importing the compiler takes seconds
def test_compile_parts_reaches_into_lists_and_keeps_names():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.head = nn.Linear(2, 2)
    before = list(model.state_dict())
    lit.compile_parts(model)
    compiled = [m for m in (model.blocks[0], model.blocks[1], model.head) if m._compiled_call_impl is not None]
    assert len(compiled) == 3 and list(model.state_dict()) == before


def test_contact_sheet_places_clips_in_rows_and_budgets_in_columns():
    first = torch.full((2, 3, 5, 4, 6), 10, dtype=torch.uint8)
    second = torch.full((2, 1, 5, 4, 6), 20, dtype=torch.uint8)
    sheet = contact_sheet([first, second], gap=2)
    assert sheet.shape == (5, 2 * 6, 2 * 8, 3)
    assert (sheet[:, :4, :6] == 10).all() and (sheet[:, 6:10, 8:14] == 20).all() and (sheet[:, 4:6] == 255).all()


def test_keep_until_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 5, "a": 1}\n{"step": 6}\n{"step": 5, "b')
    keep_until(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 5, "a": 1}\n'
    path.write_text('{"step": 5, "a": 1}\n{"step": 5, "val/loss": 2}\n')
    keep_until(path, 5, owed=True)
    assert path.read_text() == '{"step": 5, "a": 1}\n'


def test_durations_read_like_clocks():
    assert [duration(s) for s in (5, 125, 3725, math.inf)] == ["0:05", "2:05", "1:02:05", "?"]


# whole runs


def test_a_run_learns_and_leaves_everything_it_promises(tmp_path):
    config = settings(
        tmp_path,
        objective={"start": 1000},
        optim={"lr": 3e-3},
        trainer={"max_steps": 40, "val_every": 20, "log_every": 10, "tensorboard": True},
    )
    run = training.train(config, data=Data())
    assert load(run / "config.yaml") == config
    start = json.loads((run / "environment.json").read_text())["starts"][0]
    assert start["packages"]["torch"] == torch.__version__ and start["world_size"] == 1
    rows = metrics(run)
    train = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in train] == [10, 20, 30, 40]
    assert train[-1]["train/l1"] < 0.8 * train[0]["train/l1"]
    expected = {"train/grad_norm", "train/lr", "train/clips_per_s", "train/tokens_per_s", "train/data_wait_share"}
    expected |= {"train/tflops_per_s", "train/mfu", "train/host_memory_gib", "train/device_memory_gib"}
    assert expected <= set(train[0]) and train[0]["train/tokens_per_s"] > train[0]["train/clips_per_s"]
    val = [r for r in rows if "val/loss" in r]
    assert [r["step"] for r in val] == [20, 40]
    assert {"val/psnr_db_1", "val/psnr_db_4", "val/psnr_db_8", "val/codebook_usage"} <= set(val[0])
    assert len(val[0]["val/perplexity_per_position"]) == 8 and val[0]["val/clips"] == 2 * BATCH
    with av.open(str(run / "samples" / "step-00000040.mp4")) as video:
        frames = [f for f in video.decode(video=0)]
    assert len(frames) == 4 and (frames[0].width, frames[0].height) == (4 * 18, 4 * 18)
    assert (run / "samples" / "columns.txt").read_text().split("\n")[:2] == ["original", "1 tokens"]
    assert list((run / "tensorboard").glob("events*"))
    best = max(val, key=lambda r: r["val/psnr_db_mean"])["step"]
    assert strategy.describe(run / "checkpoints" / "best.ckpt")["step"] == best
    assert not (run / "lock").exists()
    assert not [n for n in checkpoint(run)["state_dict"] if n.startswith("objective.frozen")]


class Uneven(Data):
    """Validation batches of 9 and 9 frames, of 9 and 5, and of 5 and 5; training clips of 4."""

    def val_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = []
        for lengths in ([9, 9], [9, 5], [5, 5]):
            video = torch.randint(0, 256, (2, 3, max(lengths), 16, 16), generator=generator).to(torch.uint8)
            batches.append(Clip(keys=["a", "b"], video=video, lengths=torch.tensor(lengths)))
        return DataLoader(batches, batch_size=None)


def test_clips_of_several_lengths_are_validated_with_all_their_tokens(tmp_path):
    """A short clip beside a long one gives their batch no name of its own, and the last batch is not the measure."""
    model = {"name": "discrete", "num_frames": 9, "size": [16, 16], "stride": [4, 8, 8], "latent_channels": 4}
    model["conv"] = {"width": 8, "mult": [1, 1, 1, 1], "num_res_blocks": 1, "mid_blocks": 1, "attention": "none"}
    run = training.train(settings(tmp_path, model=model, trainer={"max_steps": 1}), data=Uneven())
    (val,) = [row for row in metrics(run) if "val/loss" in row]
    scores = {name for name in val if name.startswith("val/psnr_db_")}
    assert scores == {"val/psnr_db_12", "val/psnr_db_8", "val/psnr_db_mean"}  # 3 x 2 x 2 tokens, and 2 x 2 x 2
    assert val["val/psnr_db"] == val["val/psnr_db_12"] != val["val/psnr_db_8"]


class Struck(Data):
    """Its validation loader ends with a signal, which reaches workers that are only starting too; or without one."""

    def __init__(self, number: int = 0):
        super().__init__()
        self.number = number

    def val_dataloader(self):
        yield from [next(iter(DataLoader(Stream(10**6, 2), batch_size=None)))]
        if self.number:
            os.kill(os.getpid(), self.number)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


def test_a_validation_whose_loader_a_signal_ends_is_left_for_the_next_start(tmp_path):
    config = settings(tmp_path, trainer={"max_steps": 3})
    with pytest.raises(SystemExit) as stopped:
        training.train(config, data=Struck(signal.SIGUSR1))
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert not any("val/loss" in row for row in metrics(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # without a signal it is a failure
        training.train(config, data=Struck())
    run = training.train(config, data=Data())
    assert sum("val/loss" in row for row in metrics(run)) == 1


def test_a_signal_saves_at_the_step_boundary_and_the_next_start_goes_on_bitwise(tmp_path, capsys):
    parts = {"optim": {"ema_decay": 0.9}, "trainer": {"val_every": 3, "accumulate": 2, "log_every": 4, "ledger": True}}
    whole = training.train(settings(tmp_path, name="whole", **parts), data=Data())
    config = settings(tmp_path, name="cut", **parts)
    before = signal.getsignal(signal.SIGTERM)
    for number, batch in ((signal.SIGTERM, 5), (signal.SIGUSR1, 11)):  # in the middle of an accumulated step
        with pytest.raises(SystemExit) as stopped:
            training.train(config, data=Data(signal_at={batch: number}))
        assert stopped.value.code == 128 + number
        assert strategy.describe(tmp_path / "cut" / "checkpoints" / "last.ckpt")["step"] == (batch + 1) // 2
    cut = training.train(config, data=Data())
    assert signal.getsignal(signal.SIGTERM) == before
    a, b = checkpoint(whole), checkpoint(cut)
    for part in ("state_dict", "ema"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert (whole / "ledger-0.txt").read_text() == (cut / "ledger-0.txt").read_text()
    assert metrics(whole, timeless=True) == metrics(cut, timeless=True)
    assert a["state_dict"]["model.fitted"] == b["state_dict"]["model.fitted"] == 256  # once, not at each start
    capsys.readouterr()
    training.train(config, data=Data())
    assert "is complete: 8 steps" in capsys.readouterr().out


def test_a_validation_that_fails_costs_no_step(tmp_path):
    parts = {"trainer": {"val_every": 3, "ledger": True}}
    whole = training.train(settings(tmp_path, name="whole", **parts), data=Data())
    config = settings(tmp_path, name="cut", **parts)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as failed:
        training.train(config, data=Data(torn=True))
    assert strategy.describe(last)["step"] == 3 and str(last) in failed.value.__notes__[0]
    cut = training.train(config, data=Data())
    a, b = checkpoint(whole), checkpoint(cut)
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert (whole / "ledger-0.txt").read_text() == (cut / "ledger-0.txt").read_text()
    assert metrics(whole, timeless=True) == metrics(cut, timeless=True)  # what was owed was validated


def test_a_non_finite_step_changes_nothing_and_names_its_clips(tmp_path):
    short = {"trainer": {"max_steps": 2}, "optim": {"schedule": "constant"}}
    two = checkpoint(training.train(settings(tmp_path, name="two", **short), data=Data()))
    bad = {"trainer": {"max_steps": 3, "checkpoint_every": 1}, "optim": {"schedule": "constant"}}
    config = settings(tmp_path, name="three", objective={"not_finite_at": [2]}, **bad)
    run = training.train(config, data=Data())
    three = checkpoint(run)
    for name in ("model.inward.weight", "model.outward.bias"):
        assert torch.equal(two["state_dict"][name], three["state_dict"][name])
    for old, new in zip(two["optimizer_states"][0]["state"].values(), three["optimizer_states"][0]["state"].values()):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert three["vtok"]["bad_steps"] == 1
    lines = [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "rank": 0, "keys": [f"2/{j}" for j in range(BATCH)], "loss": ["nan"]}]


def test_too_many_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    config = settings(tmp_path, objective={"not_finite_at": [1, 3, 4]}, trainer={"max_bad_steps": 2})
    with pytest.raises(lit.NonFiniteError, match="2 steps in a row .*max_bad_steps.*bad_batches.jsonl"):
        training.train(config, data=Data())
    assert len((tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "lock").exists()


def test_an_idle_part_does_not_move(tmp_path):
    config = settings(tmp_path, objective={"start": 4}, optim={"weight_decay": 0.5}, trainer={"max_steps": 6})
    first = {k: v.clone() for k, v in training.build(config).objective.discriminator.state_dict().items()}
    seen = []

    class Watch(Data):
        def advance(self, clip):
            super().advance(clip)
            now = self.trainer.lightning_module.objective.discriminator.state_dict()
            seen.append(all(torch.equal(first[k], now[k]) for k in first))

    training.train(config, data=Watch())
    assert seen == [True] * 5 + [False]  # looked at before each step; step 4 is the first that may move it


def test_averaged_weights_follow_their_definition_and_are_what_is_measured(tmp_path):
    config = settings(
        tmp_path, optim={"ema_decay": 0.5, "lr": 1e-2}, trainer={"max_steps": 3, "val_every": 1, "checkpoint_every": 1}
    )
    weights = []

    class Watch(Data):
        def advance(self, clip):
            super().advance(clip)
            weights.append(self.trainer.lightning_module.model.inward.weight.detach().clone())

    run = training.train(config, data=Watch())
    state = checkpoint(run)
    weights.append(state["state_dict"]["model.inward.weight"])
    average = weights[0]
    for step, new in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = average + (1 - decay) * (new - average)
    assert torch.allclose(average, state["ema"]["inward.weight"], atol=1e-6)
    assert not torch.allclose(average, weights[-1], atol=1e-6)
    assert torch.equal(
        strategy.model_weights(run / "checkpoints" / "last.ckpt")["inward.weight"], state["ema"]["inward.weight"]
    )
    module = training.build(config)
    module.model.load_state_dict(strategy.model_weights(run / "checkpoints" / "last.ckpt"))
    both = torch.cat(
        [
            clip_psnr(to_uint8(video), clip.video, clip.lengths)
            for clip in Data().val_dataloader()
            for video in [module.model.decode(module.model.encode(clip.as_float(), budget=4), size=(16, 16))]
        ]
    )
    assert metrics(run)[-1]["val/psnr_db_4"] == pytest.approx(both.mean().item(), abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_trains_and_leaves_float_buffers_alone(tmp_path, precision):
    config = settings(tmp_path, trainer={"precision": precision, "max_steps": 4, "checkpoint_every": 2})
    with pytest.raises(SystemExit):
        training.train(config, data=Data(signal_at={2: signal.SIGTERM}))
    state = checkpoint(training.train(config, data=Data()))["state_dict"]
    assert state["model.seen"].dtype == torch.float32
    assert state["model.seen"][0].item() == pytest.approx(1.004, abs=1e-6)
    assert state["model.inward.weight"].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_a_run_ends_with_its_minutes_and_stays_ended(tmp_path, capsys, monkeypatch):
    ticks = itertools.count(step=0.002)  # a clock of its own: each look at it takes 2 ms, on any machine
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    trainer = {"max_steps": 10**6, "max_minutes": 0.02, "log_every": 1}
    config = settings(tmp_path, trainer=trainer, optim={"warmup_steps": 0})
    run = training.train(config, data=Data())
    about = strategy.describe(run / "checkpoints" / "last.ckpt")
    assert 1.2 <= about["elapsed_s"] < 1.3 and 20 < about["step"] < 600
    rates = [r["train/lr"] for r in metrics(run) if "train/lr" in r]
    assert rates[-1] < 0.02 * rates[0]  # the cosine followed the clock
    training.train(config, data=Data())
    assert "is complete" in capsys.readouterr().out


def test_a_forward_pass_holds_no_gradients_of_the_step_before(tmp_path, monkeypatch):
    held, loss = [], lit.LitCompressor._loss

    def watched(module, *args):
        held.append(any(p.grad is not None for p in module.parameters()) if module.training else None)
        return loss(module, *args)

    monkeypatch.setattr(lit.LitCompressor, "_loss", watched)
    training.train(settings(tmp_path, trainer={"max_steps": 3, "accumulate": 2, "val_every": 0}), data=Data())
    assert held[:6] == [False, True] * 3  # but for those it adds to


# refusals


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"trainer": {"strategy": "horovod"}}, "trainer.strategy='horovod'.*deepspeed_3"),
        ({"trainer": {"precision": "8-bit"}}, "trainer.precision='8-bit'.*bf16-mixed"),
        ({"trainer": {"precision": "16-mixed"}}, "16-mixed needs a GPU"),
        ({"trainer": {"max_minutes": -1.0}}, "trainer.max_minutes=-1.0"),
        ({"trainer": {"accumulate": 0}}, "trainer.accumulate=0"),
        ({"trainer": {"val_every": -1}}, "trainer.val_every=-1"),
        ({"trainer": {"accelerator": "abacus"}}, "trainer.accelerator='abacus'.*cpu, gpu"),
        ({"trainer": {"accelerator": "cuda", "devices": 99}}, "trainer.devices=99, but this machine has"),
        ({"trainer": {"sample_every": 2}, "data": {"shards": "x"}}, "sample_every=2.*data.val_shards"),
        ({"eval": {"budgets": [0, 4]}}, "eval.budgets=0"),
        ({"optim": {"schedule": "linear"}}, "optim.schedule='linear'.*cosine"),
        ({"optim": {"ema_decay": 1.0}}, "optim.ema_decay=1.0"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
        ({"optim": {"ema_decay": 0.9}, "trainer": {"strategy": "deepspeed_3"}}, "ema_decay=0.9.*deepspeed_2"),
        ({"trainer": {"compile": True, "strategy": "deepspeed_2"}}, "trainer.compile"),
        ({"trainer": {"deepspeed": {"a": 1}}}, "trainer.deepspeed is set.*'auto'"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, parts, words):
    with pytest.raises(ValueError, match=words):
        training.train(settings(tmp_path, **parts), data=Data())


def test_a_resumed_run_keeps_its_model_and_data(tmp_path):
    config = settings(tmp_path, trainer={"max_steps": 2})
    training.train(config, data=Data())
    other = settings(tmp_path, objective={"start": 7}, seed=5, trainer={"max_steps": 4})
    with pytest.raises(ValueError, match="objective.start was 4 and is now 7; seed was 0 and is now 5"):
        training.train(other, data=Data())
    with pytest.raises(ValueError, match=r"from 8 clips \(4 x 2 x .*learned from 4. Set data.batch_size=2, or start"):
        training.train(settings(tmp_path, trainer={"max_steps": 4, "devices": 2}), data=Data())
    longer = settings(tmp_path, trainer={"max_steps": 4}, optim={"lr": 1e-4})
    run = training.train(longer, data=Data())
    assert strategy.describe(run / "checkpoints" / "last.ckpt")["step"] == 4 and load(run / "config.yaml") == longer


def test_two_processes_do_not_share_a_run_directory(tmp_path):
    config = settings(tmp_path, trainer={"max_steps": 1})
    lock = config.run_dir / "lock"
    with training.Lock(_made(config.run_dir)):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
            training.train(config, data=Data())
        assert lock.exists()
    held = {"pid": os.getpid(), "host": socket.gethostname(), "started": "0", "slurm_job": None}
    lock.write_text(json.dumps(held))  # the number is in use again, by another process than the one that took the lock
    training.train(config, data=Data())
    lock.write_text(json.dumps({**held, "host": "elsewhere"}))
    with pytest.raises(ValueError, match="on elsewhere"):
        training.train(config, data=Data())
    os.utime(lock, (1, 1))
    training.train(config, data=Data())
    assert not lock.exists()


def test_of_two_starts_that_find_one_stale_lock_the_later_gives_way(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    stale = {"pid": 1 << 30, "host": socket.gethostname(), "started": "0", "slurm_job": None}
    lock.write_text(json.dumps(stale))
    ours = {"pid": os.getpid(), "started": lock_room.process_started(os.getpid()), "slurm_job": "7"}
    other = json.dumps({**stale, **ours})
    renames = iter([lambda: lock.write_text(other)])  # the other start is quicker: its lock is there before we rename
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (next(renames, lambda: None)(), rename(a, b)))
    with pytest.raises(ValueError, match="in use by process"):
        training.Lock(tmp_path).__enter__()
    assert lock.read_text() == other and [path.name for path in tmp_path.iterdir()] == ["lock"]
    lock.write_text("")  # a power cut
    with training.Lock(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        lock.write_text(other)  # taken over meanwhile, by a machine that saw no sign of life
    assert lock.read_text() == other


@pytest.mark.parametrize(
    ("squeue", "taken"),
    [
        ("echo TIMEOUT", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo COMPLETING", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_lock_of_a_slurm_job_that_has_ended_is_taken_over_at_once(tmp_path, monkeypatch, squeue, taken):
    """Killed outright on another node, it left the lock a moment ago."""
    (tmp_path / "squeue").write_text(f'#!/bin/sh\n[ "$2" = --jobs=41 ] || exit 9\n{squeue}\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "42"), ("CLUSTER_NAME", "here")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = _made(tmp_path / "run")
    held = {"pid": 1, "host": "elsewhere", "started": "0", "slurm_job": "41", "slurm_cluster": "here"}

    def refused() -> bool:
        try:
            with lock_room.Lock(run):
                return False
        except ValueError as error:
            assert "in use by process 1 on elsewhere" in str(error)
            return True

    (run / "lock").write_text(json.dumps(held))
    assert refused() != taken
    (run / "lock").write_text(json.dumps({**held, "slurm_cluster": "there"}))
    assert refused(), "its numbers are those of other jobs"
    (run / "lock").write_text(json.dumps({**held, "slurm_job": "42"}))
    assert not refused(), "an earlier start of this job"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_main_prints_a_users_error_without_a_traceback(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: outside.tiny}\ndata: {shards: x}\noptim: {schedule: linear}\n")
    with pytest.raises(SystemExit, match="error: optim.schedule='linear'"):
        training.main([str(path), f"out={tmp_path}"])
    with pytest.raises(SystemExit, match="error: no such config"):
        training.main([str(tmp_path / "b.yaml")])


def test_evaluating_gives_every_module_its_own_mode_back():
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    with validation.Evaluating(module):
        assert not module.training
    assert module.training and module[0].training and not module[1].training


def test_statistics_are_fitted_behind_a_bar_on_a_terminal_and_in_few_lines_elsewhere(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(curves.time, "monotonic", lambda: clock[0])

    def shown(terminal: bool) -> str:
        clock[0] = 0.0
        bar = curves.Bar("statistics", delay_s=3.0)
        bar.console, bar.live = Console(file=io.StringIO(), force_terminal=terminal, width=100), terminal
        bar.every = 0.5 if terminal else 15.0
        moves: list[str] = []
        for clip in lit._videos(DataLoader(Stream(0, 20), batch_size=None), 78, bar, moves.append):
            assert len(clip) in (BATCH, 2)
            clock[0] += 2.0  # a batch takes two seconds
        bar.stop()
        assert len(moves) == 20 and moves[-1] == "the statistics, after 78 clips"  # that the watchdog is told of
        return bar.console.file.getvalue() + capsys.readouterr().out

    live, log = shown(True), shown(False)
    assert "statistics" in live and "78 of 78 clips" in live and "\r" in live
    assert [line[:16] for line in log.splitlines()] == ["statistics  41.0", "statistics  82.1"]


def test_a_factor_of_0_rests_a_part_and_the_line_still_tells_the_rate(tmp_path):
    optim = {"lr": 0.01, "lr_multipliers": {"model": 0.0}, "schedule": "constant", "warmup_steps": 0}
    config = settings(tmp_path, optim=optim, trainer={"max_steps": 2, "log_every": 1, "val_every": 0})
    before = training.build(config).model.inward.weight.clone()
    run = training.train(config, data=Data())
    assert torch.equal(checkpoint(run)["state_dict"]["model.inward.weight"], before)
    assert [r["train/lr"] for r in metrics(run) if "train/lr" in r] == [0.01, 0.01]


def test_a_run_that_begins_anew_forgets_what_an_unsaved_start_left(tmp_path, capsys):
    config = settings(tmp_path, trainer={"max_steps": 1}, data={"shards": "stream"})
    (_made(config.run_dir) / "quarantine.jsonl").write_text('{"seed": 0, "epoch": 0, "shard": "a", "key": "b"}\n')
    run = training.train(config, data=Data())
    assert not (run / "quarantine.jsonl").exists()
    assert "data.val_shards is empty: no validation" in capsys.readouterr().out


def test_too_many_broken_samples_are_told_in_one_line_even_by_a_worker(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(30):
            entry = tarfile.TarInfo(f"{i}.mp4")
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"nope"))
    path = tmp_path / "a.yaml"
    data = f"{{shards: {tmp_path}, num_workers: 1, num_frames: 4, size: [16, 16]}}"
    path.write_text(
        f"model: {{name: outside.tiny}}\ndata: {data}\ntrainer: {{accelerator: cpu, statistics_clips: 0}}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        training.main([str(path), f"out={tmp_path}", "trainer.tensorboard=false"])
    assert re.match(r"error: \d+ of \d+ samples seen are broken .*data.max_bad_fraction=0.01", stopped.value.code)
    assert "Traceback" not in stopped.value.code and len(stopped.value.code.splitlines()) == 1
