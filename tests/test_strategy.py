"""Strategies and checkpoints: the pure parts here; DDP and DeepSpeed with two processes, in two launches (slow)."""

import json
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import launching
import pytest
import torch
from launching import ROOT
from torch import nn

from vtok import train as training
from vtok.config import loads
from vtok.training import checkpoints, strategy


def config(**trainer):
    return loads({"model": {"name": "outside.tiny"}, "trainer": trainer})


def test_stages_are_read_from_the_name():
    assert [strategy.stage_of(n) for n in strategy.STRATEGIES] == [0, 0, 0, 1, 2, 3, 2, 3]
    with pytest.raises(ValueError, match="trainer.strategy='zero'.*auto, ddp, fsdp, deepspeed_1"):
        strategy.stage_of("zero")


def test_one_process_needs_no_strategy_and_several_get_ddp():
    assert strategy.build(config(), frozen_model=False) == "auto"
    ddp = strategy.build(config(devices=2, find_unused_parameters=False), frozen_model=False)
    assert type(ddp).__name__ == "DDPStrategy" and ddp._ddp_kwargs == {"find_unused_parameters": False}


def test_deepspeed_settings_reach_the_engine():
    asked = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    built = strategy.build(config(strategy="deepspeed_2", devices=2, deepspeed=asked), frozen_model=True)
    assert strategy.is_deepspeed(built) and not strategy.is_deepspeed("auto")
    assert built.config["zero_optimization"]["stage"] == 2
    assert built.config["zero_optimization"]["reduce_bucket_size"] == 7 and built.config["wall_clock_breakdown"]
    assert built.config["gradient_clipping"] == 1.0 and built.exclude_frozen_parameters is False


def test_offload_puts_the_optimizer_into_host_memory_and_at_stage_3_the_parameters_too():
    zero = [
        strategy.build(config(strategy=f"deepspeed_{n}_offload"), frozen_model=False).config["zero_optimization"]
        for n in (2, 3)
    ]
    assert [z["stage"] for z in zero] == [2, 3] and all(z["offload_optimizer"]["device"] == "cpu" for z in zero)
    assert "offload_param" not in zero[0] and zero[1]["offload_param"]["device"] == "cpu"


def test_the_global_batch_is_told_and_has_one_truth():
    asked = config(devices=4, num_nodes=2, accumulate=3)
    asked.data.batch_size = 5
    assert strategy.batch_line(asked).startswith(
        "a step learns from 120 clips: 5 (data.batch_size) x 8 process(es) x 3"
    )
    asked.data.part_batch_sizes = [5, 1]
    assert strategy.batch_line(asked).startswith("a step learns from 120 or 24 clips: 5 or 1 (data.part_batch_sizes)")


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        ({"train_batch_size": 7}, "train_batch_size=7: set data.batch_size and"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps=7: set trainer.accumulate"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5: set optim.clip_grad_norm"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3: set trainer.strategy"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer={'type': 'Lamb'}: set optim.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler={'type': 'WarmupLR'}: set optim.schedule"),
    ],
)
def test_what_has_a_key_is_said_there_alone(deepspeed, said):
    with pytest.raises(ValueError, match="^" + re.escape(f"trainer.deepspeed.{said}")):
        training.check(config(strategy="deepspeed_2", deepspeed=deepspeed))


@pytest.mark.parametrize(
    ("then", "now", "fix"),
    [  # (batch size or those of parts, processes, accumulate)
        ((4, 2, 1), (4, 1, 2), None),
        ((4, 2, 1), (4, 1, 1), "Set trainer.accumulate=2"),
        ((4, 2, 1), (3, 1, 1), "Set data.batch_size=8"),
        ((4, 2, 1), (3, 3, 1), "a number of processes that divides 8"),
        (([2, 5], 2, 1), ([2, 5], 1, 2), None),
        (([2, 5], 2, 1), ([4, 10], 1, 1), None),
        (([2, 5], 2, 1), ([2, 5], 1, 1), r"learn from 2 or 5 clips .* learned from 4 or 10. Set trainer.accumulate=2"),
        (([2, 6], 2, 1), ([2, 5], 1, 2), r"Set data.part_batch_sizes=\[2, 6\]"),
        (([2, 5], 2, 1), (4, 1, 1), r"Set data.part_batch_sizes=\[4, 10\]"),
    ],
)
def test_another_number_of_processes_goes_on_with_the_same_clips_a_step(then, now, fix):
    def made(size, devices, accumulate):
        run = config(devices=devices, accumulate=accumulate)
        run.data.batch_size, run.data.part_batch_sizes = (16, size) if isinstance(size, list) else (size, None)
        return run

    with nullcontext() if fix is None else pytest.raises(ValueError, match=fix):
        training.check_unchanged(made(*then), made(*now))


def test_a_batch_size_that_nothing_reads_makes_up_for_no_process():
    then, now = config(devices=2), config(devices=1)
    then.data.part_batch_sizes = now.data.part_batch_sizes = [2, 5]
    now.data.batch_size = 2 * then.data.batch_size
    with pytest.raises(ValueError, match="learn from 2 or 5 clips"):
        training.check_unchanged(then, now)


def test_float_buffers_survive_a_cast():
    module = nn.BatchNorm1d(3)
    module.running_mean += 0.001
    kept = strategy.float_buffers(module)
    module.bfloat16()
    strategy.restore_buffers(module, kept)
    assert module.running_mean.dtype == torch.float32 and module.running_mean[0] == torch.tensor(0.001)
    assert module.weight.dtype == torch.bfloat16 and module.num_batches_tracked.dtype == torch.int64


def test_a_published_file_replaces_the_old_one_whole(tmp_path):
    io = strategy.AtomicCheckpointIO()
    for step in (1, 2):
        content = {
            "state_dict": {"model.w": torch.full((2,), float(step), dtype=torch.bfloat16)},
            "vtok": {"step": step},
        }
        io.save_checkpoint(content, tmp_path / ".writing")
        names = ["last.ckpt", "best.ckpt"] if step == 1 else ["last.ckpt"]
        strategy.publish(tmp_path / ".writing", names, about={"step": step})
    names = ["best.ckpt", "last.ckpt", "previous.ckpt", "sha256.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [strategy.describe(tmp_path / n)["step"] for n in ("best.ckpt", "last.ckpt")] == [1, 2]
    weights = strategy.model_weights(tmp_path / "last.ckpt")
    assert weights["w"].dtype == torch.float32 and weights["w"].tolist() == [2, 2]


def test_a_published_folder_replaces_the_old_one_whole(tmp_path):
    for step in (1, 2, 3, 3):
        written = tmp_path / ".writing"
        (written / strategy.TAG).mkdir(parents=True)
        (written / strategy.TAG / "shard.pt").write_text(str(step))
        names = ["last.ckpt", "best.ckpt"] if step == 2 else ["last.ckpt"]
        strategy.publish(written, names, about={"step": step})
        assert strategy.describe(tmp_path / "last.ckpt")["step"] == step
    assert strategy.describe(tmp_path / "best.ckpt")["step"] == 2
    assert len([p for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink()]) == 2


def test_what_is_not_a_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        strategy.describe(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="b.ckpt is not a checkpoint of vtok"):
        strategy.describe(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="it has no vtok.json"):
        strategy.describe(tmp_path)


def test_deepspeed_goes_on_by_itself_only_where_it_wrote_the_shards():
    about = {"world_size": 2, "strategy": "deepspeed_2"}
    assert strategy.goes_on(about, config(strategy="deepspeed_2", devices=2))
    assert not strategy.goes_on(about, config(strategy="deepspeed_2_offload", devices=2))
    assert not strategy.goes_on(about, config(strategy="deepspeed_2", devices=2, num_nodes=2))


# two processes

SCRIPT = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch.utils.data import DataLoader
import test_train
from vtok.train import train

class Mine(test_train.Data):
    """Every rank its own batches: rank r of w sees r, r + w, ..."""
    def advance(self, clip):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        assert clip.keys[0] == f"{{self.done * world + rank}}/0"
        self.done += 1
        if rank in self.signal_at and self.done == 3:
            os.kill(os.getpid(), self.signal_at[rank])  # one rank alone is told
    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        class Part(test_train.Stream):
            def __iter__(self):
                for i in range(self.first * world + rank, 1 << 40, world):
                    yield next(iter(test_train.Stream(i, 1)))
        return DataLoader(Part(self.done), batch_size=None)
    def val_dataloader(self):  # unequal: rank 0 has two batches, rank 1 one
        return DataLoader(test_train.Stream(10**6, 2 - self.trainer.global_rank), batch_size=None)

for asked in sys.argv[2:]:
    chosen, precision, kind = asked.split(",")
    trainer = {{"devices": 2, "strategy": chosen, "precision": precision, "max_steps": 6, "val_every": 3}}
    trainer |= {{"log_every": 2, "ledger": True, "accumulate": 2 if kind == "accumulate" else 1}}
    if chosen == "deepspeed_3":  # below these sizes parameters stay whole, and nothing of ZeRO-3 would be tested
        whole = {{"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}}
        trainer["deepspeed"] = {{"zero_optimization": whole}}
    objective = {{"start": 0}}
    if kind == "bad":
        objective |= {{"not_finite_at": [2], "not_finite_rank": 1}}
    if kind == "stop":
        objective |= {{"slow_s": 0.26}}  # ranks ask each other twice a second: here, at every step
    optim = {{"weight_decay": 0.1, "clip_grad_norm": 0.05}}
    name = f"{{chosen}}-{{precision}}-{{kind}}"
    config = test_train.settings(Path(sys.argv[1]), name=name, objective=objective, trainer=trainer, optim=optim)
    code = 0
    try:
        train(config, data=Mine(signal_at={{1: signal.SIGUSR1}} if kind == "stop" else None))
    except SystemExit as stopped:
        code = stopped.code
    if os.environ.get("LOCAL_RANK", "0") == "0":  # to a file: lines that two processes print run into each other
        with open(sys.argv[1] + "/ended.txt", "a") as ended:
            print(asked, code, file=ended)
'''
PLAIN = "32-true"
STAGES = ("deepspeed_1", "deepspeed_2", "deepspeed_3")


def launch(out: Path, *runs: str) -> dict[str, int]:
    return launching.launch(out, SCRIPT.format(tests=str(ROOT / "tests")), *runs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of every run, two launches: the second, in new processes, goes on where a signal stopped the first."""
    out = tmp_path_factory.mktemp("strategies")
    stopped = [f"{stage},{PLAIN},stop" for stage in STAGES]
    others = [f"ddp,{PLAIN},whole", f"ddp,{PLAIN},accumulate", f"deepspeed_2,{PLAIN},accumulate"]
    codes = launch(out, *others, *stopped, "deepspeed_3,bf16-mixed,bad")
    assert {run for run, code in codes.items() if code == 128 + signal.SIGUSR1} == set(stopped)
    for stage in STAGES:  # told to rank 1 alone, at step 3
        about = strategy.describe(out / f"{stage}-{PLAIN}-stop" / "checkpoints" / "last.ckpt")
        assert 3 <= about["step"] < 6 and about["world_size"] == 2
    assert set(launch(out, *stopped).values()) == {0}
    return out


def ledger(run: Path, rank: int) -> list[tuple[int, str, float]]:
    """(step, keys, loss) per batch; a step written again replaces the first."""
    found = {}
    for line in (run / f"ledger-{rank}.txt").read_text().splitlines():
        step, micro, loss, keys = line.split(" ")
        found[int(micro)] = (int(step), keys, float.fromhex(loss))
    return [found[m] for m in sorted(found)]


def values(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", STAGES)
def test_deepspeed_equals_ddp_stops_and_goes_on(runs, chosen):
    reference, run = runs / f"ddp-{PLAIN}-whole", runs / f"{chosen}-{PLAIN}-stop"
    last = run / "checkpoints" / "last.ckpt"
    assert strategy.describe(last)["step"] == 6
    checkpoints.verify(last)
    written = json.loads((run / "deepspeed.json").read_text())
    assert written["zero_optimization"]["stage"] == strategy.stage_of(chosen)
    assert written["train_micro_batch_size_per_gpu"] == 4 and written["gradient_accumulation_steps"] == 1
    for rank in (0, 1):
        ours, theirs = ledger(run, rank), ledger(reference, rank)
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=2e-5)
    whole, other = strategy.consolidate(reference / "checkpoints" / "last.ckpt"), strategy.consolidate(last)
    assert whole.keys() == other.keys()
    for name in whole:
        assert torch.allclose(whole[name], other[name], atol=2e-5), name
    norms = [[r["train/grad_norm"] for r in values(r_) if "train/grad_norm" in r] for r_ in (reference, run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    scores = [[r["val/psnr_db_4"] for r in values(r_) if "val/psnr_db_4" in r] for r_ in (reference, run)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-2)
    assert [r["val/clips"] for r in values(run) if "val/clips" in r][-1] == 12  # 8 of rank 0, 4 of rank 1


@pytest.mark.slow
def test_deepspeed_skips_what_is_not_finite_and_keeps_float_buffers_in_bf16(runs):
    run = runs / "deepspeed_3-bf16-mixed-bad"
    lines = sorted(map(json.loads, (run / "bad_batches.jsonl").read_text().splitlines()), key=lambda r: r["rank"])
    assert [(r["rank"], r["step"], r["loss"][0] == "nan") for r in lines] == [(0, 3, False), (1, 3, True)]
    state = strategy.consolidate(run / "checkpoints" / "last.ckpt")
    assert state["model.seen"][0].item() == pytest.approx(1.006, abs=1e-6)
    assert all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.slow
def test_accumulation_means_the_same_under_ddp_and_deepspeed(runs):
    one, two = (ledger(runs / f"{c}-{PLAIN}-accumulate", 0) for c in ("ddp", "deepspeed_2"))
    assert len(one) == 12 and [r[:2] for r in one] == [r[:2] for r in two]
    assert [r[2] for r in one] == pytest.approx([r[2] for r in two], abs=2e-5)


FULL = """
import os, resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_train
from vtok.train import train
from vtok.training import strategy

out, asked = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("LOCAL_RANK", "0"))

class Mine(test_train.Data):
    def advance(self, clip):
        self.done += 1

def begin(steps):
    trainer = {{"devices": 2, "strategy": asked, "max_steps": steps, "statistics_clips": 4}}
    config = test_train.settings(out, name=asked, trainer=trainer)
    config.data.val_shards = ""
    train(config, data=Mine())

begin(2)
save = strategy.save
def limited(*args, **keywords):  # the disk of one rank's node, in a manner of speaking
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == int(os.environ["FULL_AT"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        save(*args, **keywords)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
strategy.save = limited
try:
    begin(4)
except Exception as error:
    (out / f"told-{{rank}}.txt").write_text(f"{{type(error).__name__}}: {{error}}")
if rank == 0:
    with open(out / "ended.txt", "a") as ended:
        print(asked, 0, file=ended)
"""


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_shard_is_told_by_every_rank(tmp_path, monkeypatch, full):
    monkeypatch.setenv("FULL_AT", str(full))
    launching.launch(tmp_path, FULL.format(tests=str(ROOT / "tests")), "deepspeed_2")
    for rank in (0, 1):
        told = (tmp_path / f"told-{rank}.txt").read_text()
        assert told.startswith("CheckpointError: the checkpoint of step 4 could not be written: "), told
        assert "last.ckpt (step 2) is as it was" in told
    folder = tmp_path / "deepspeed_2" / "checkpoints"
    assert not (folder / ".writing").exists() and strategy.describe(folder / "last.ckpt")["step"] == 2
    checkpoints.verify(folder / "last.ckpt")


NO_CLIP = '''
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch.utils.data import DataLoader
import test_train
from vtok.train import train

class Mine(test_train.Data):
    """The second rank has no clip to validate on."""
    def advance(self, clip):
        self.done += 1
    def train_dataloader(self):
        return DataLoader(test_train.Stream(self.done), batch_size=None)
    def val_dataloader(self):
        return DataLoader(test_train.Stream(10**6, 1 - self.trainer.global_rank), batch_size=None)

for chosen in sys.argv[2:]:
    trainer = {{"devices": 2, "strategy": chosen, "max_steps": 2}}
    told = "0"
    try:
        train(test_train.settings(Path(sys.argv[1]), name=chosen, trainer=trainer), data=Mine())
    except ValueError as error:
        told = "1"
        Path(sys.argv[1], f"{{chosen}}-{{os.environ.get('LOCAL_RANK', '0')}}.txt").write_text(str(error))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with open(sys.argv[1] + "/ended.txt", "a") as ended:
            print(chosen, told, file=ended)
'''


@pytest.mark.slow
def test_a_rank_without_a_validation_clip_is_told_where_all_are_needed(tmp_path):
    """Under fsdp the others would wait for it for ever; under ddp they measure without it."""
    codes = launching.launch(tmp_path, NO_CLIP.format(tests=str(ROOT / "tests")), "ddp", "fsdp")
    assert codes == {"ddp": 0, "fsdp": 1}
    (row,) = [row for row in values(tmp_path / "ddp") if "val/loss" in row]
    assert row["val/clips"] == 4 and list((tmp_path / "ddp" / "samples").glob("step-*"))
    for rank in range(2):
        said = (tmp_path / f"fsdp-{rank}.txt").read_text()
        assert "has no clip for some of 2 processes, and trainer.strategy=fsdp needs them all" in said
