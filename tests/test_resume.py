"""Exact resume of whole processes: killed at random moments, or told to stop, a run ends as if nothing had happened."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from waiting import PATHS, PATIENCE_S, until

from vtok.data.encode import write_video
from vtok.training import strategy

ROOT = Path(__file__).parent.parent
SHARDS, SAMPLES = 5, 8


def make_shards(folder: Path) -> Path:
    """Real mp4 files of moving gradients in real tars with an index."""
    folder.mkdir(parents=True)
    entries = []
    for s in range(SHARDS):
        path = folder / f"clips-{s:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(SAMPLES):
                generator = torch.Generator().manual_seed(100 * s + i)
                first, second = torch.randint(0, 256, (2, 1, 1, 3), generator=generator).float()
                across = torch.linspace(0, 1, 24).reshape(1, 24, 1)
                frames = [
                    (first + (second - first) * (across * t / 9)).expand(24, 24, 3).round().to(torch.uint8).contiguous()
                    for t in range(10)
                ]
                media = io.BytesIO()
                write_video(media, frames, fps=8)
                for name, content in ((f"{s}-{i}.json", b"{}"), (f"{s}-{i}.mp4", media.getvalue())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"name": path.name, "samples": SAMPLES, "bytes": len(content), "sha256": digest})
    (folder / "index.json").write_text(json.dumps({"shards": entries}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("corpus") / "shards")


GAME = {  # a discriminator with averages of its logits against a codebook of moving averages
    "model": {
        "name": "discrete",
        "num_frames": 5,
        "size": [16, 16],
        "stride": [2, 4, 4],
        "latent_channels": 6,
        "conv": {"width": 8, "mult": [1, 2, 2], "num_res_blocks": 1, "mid_blocks": 1, "num_heads": 2},
        "quantizer": {"name": "vq", "codebook_size": 32, "dim": 4, "ema_decay": 0.9, "dead_code_threshold": 1},
    },
    "objective": {
        "log_variance": "mean",
        "adversarial": {
            "weight": 0.5,
            "discriminator": "both",
            "frames": 2,
            "width": 8,
            "depth": 1,
            "start": 8,
            "warmup": 3,
            "every": 2,
            "adaptive": True,
            "lecam": 0.01,
            "lecam_decay": 0.9,
        },
    },
    "optim": {
        "warmup_steps": 24,
        "schedule": "constant",
        "ema_decay": 0.9,
        "lr_multipliers": {"objective.adversarial": 2.0},
    },
}


def write_config(folder: Path, shards: Path, *, processes: int, steps: int, slow_s: float = 0.04, **parts) -> Path:
    values = {
        "out": str(folder),
        "model": {"name": "outside.tiny"},
        "objective": {"slow_s": slow_s},
        "data": {
            "shards": str(shards),
            "val_shards": str(shards),
            "num_frames": 4,
            "size": [16, 16],
            "batch_size": 4,
            "val_batch_size": 8,
            "val_clips": 12,
            "num_workers": 2 if processes == 1 else 1,
            "shuffle_buffer": 8,
            "hflip": 0.5,
        },
        "optim": {"warmup_steps": 5, "ema_decay": 0.9},
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "max_steps": steps,
            "log_every": 5,
            "val_every": 16,
            "checkpoint_every": 6,
            "statistics_clips": 16,
            "ledger": True,
        },
    }
    for part, changes in parts.items():
        known = values.get(part, {})
        values[part] = {**known, **changes} if part in ("data", "trainer") else changes
    path = folder / f"config-{processes}.yaml"
    path.write_text(json.dumps(values))  # json is yaml
    return path


KILLED = """
import os, sys, time
from vtok.train import main
from vtok.training.loop import Conductor
from waiting import PATIENCE_S

def begin(self, trainer, lit, *rest, real=Conductor.on_train_batch_start):
    if lit.steps_done == int(os.environ["LAST"]):
        time.sleep(PATIENCE_S)
    real(self, trainer, lit, *rest)

Conductor.on_train_batch_start = begin
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def start(config: Path, name: str, *, last: int | None = None) -> subprocess.Popen:
    """Begins a run; one that is to be killed makes `last` steps at most, however late the kill is."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "LAST": str(last)}
    script = ROOT / "train.py"
    if last is not None:
        script = config.parent / "killed.py"
        script.write_text(KILLED)
    command = [sys.executable, str(script), str(config), f"name={name}"]
    log = open(config.parent / f"{name}.log", "a")
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
    )


def finish(process: subprocess.Popen, config: Path, name: str) -> None:
    try:
        code = process.wait(timeout=PATIENCE_S)
    finally:
        _kill(process)
    assert code == 0, (config.parent / f"{name}.log").read_text()[-4000:]


def _kill(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the launched ranks and the loader workers too
    except ProcessLookupError:
        pass
    process.wait(timeout=PATIENCE_S)


def lines_of(run: Path, rank: int = 0) -> int:
    path = run / f"ledger-{rank}.txt"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(process: subprocess.Popen, run: Path, lines: int) -> None:
    until(lambda: lines_of(run) >= lines or process.poll() is not None, f"{lines} lines of {run}")


def ledger(run: Path, rank: int, *, after: int = 0) -> dict[int, str]:
    """Each batch's step, exact loss and keys; what a later start wrote again replaces what an earlier one wrote.

    `after`: lines to pass over, of earlier starts: a killed rank may have been a step ahead of the others.
    """
    found = {}
    for line in (run / f"ledger-{rank}.txt").read_text().splitlines()[after:]:
        if len(line.split(" ")) == 4 and line.count(",") == 3:  # not one cut short by the kill
            found[int(line.split(" ")[1])] = line
    return found


def curves(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("per_s", "wait", "time_s", "seconds", "memory")
    return [{k: v for k, v in row.items() if not any(c in k for c in clocks)} for row in rows]


def assert_same_end(one: Path, other: Path, *, processes: int) -> None:
    for rank in range(processes):
        assert ledger(one, rank) == ledger(other, rank)
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        assert a["global_step"] == b["global_step"] and a["vtok"]["alarms"] == b["vtok"]["alarms"]
        for part in ("state_dict", "ema"):
            assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert curves(one) == curves(other)


def kill_at_random(
    config: Path, name: str, run: Path, moments: random.Random, *, last: int, saved: bool = False
) -> None:
    """Starts the run and kills all of its processes some batches later, in the middle of whatever they are at; saved:
    once there is a checkpoint to go on from."""
    lines, process = lines_of(run) + moments.randint(3, 14), start(config, name, last=last)
    checkpoint = run / "checkpoints" / "last.ckpt"
    until(lambda: not saved or checkpoint.exists() or process.poll() is not None, f"a checkpoint of {run}")
    kill_after(process, run, lines, moments)


def kill_after(process: subprocess.Popen, run: Path, lines: int, moments: random.Random) -> None:
    """Kills all processes of a run some time after its ledger has so many lines."""
    wait_for(process, run, lines)
    time.sleep(moments.uniform(0, 0.2))
    _kill(process)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bitwise_the_same(tmp_path, shards):
    config = write_config(tmp_path, shards, processes=1, steps=40)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uncut = start(config, "whole")  # meanwhile, in another directory
    try:
        moments = random.Random(time.time_ns())
        for last, saved in ((20, False), (36, True)):  # the third start has something to resume, whatever was drawn
            kill_at_random(config, "cut", cut, moments, last=last, saved=saved)
        finish(start(config, "cut"), config, "cut")
    finally:
        finish(uncut, config, "whole")
    keys = [line.split(" ")[3] for line in ledger(whole, 0).values()]
    assert len(keys) == 40 and len(set(keys)) == 40  # a batch never comes twice
    assert_same_end(whole, cut, processes=1)
    log = (tmp_path / "cut.log").read_text()
    assert log.count("taking over") == 2 and "resuming" in log and "not resumable" not in log


@pytest.mark.slow
def test_killed_in_the_middle_of_the_game_it_ends_bitwise_the_same(tmp_path, shards):
    """Codebook from k-means, its averages and re-seeding, LeCam's averages, averaged weights, the discriminator's
    moments and rests, the warm-up of the rate, windows of counted ids and what the alarms remember: all go on."""
    trainer = {"log_every": 4, "alarms": {"warmup_steps": 0, "lines": 2, "codebook_share": 0.05, "low_share": 0.999}}
    parts = {**GAME, "trainer": trainer, "data": {"num_frames": 5}}
    config = write_config(tmp_path, shards, processes=1, steps=28, **parts)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uncut = start(config, "whole")  # meanwhile, in another directory
    try:
        moments = random.Random(time.time_ns())
        kill_after(start(config, "cut", last=24), cut, moments.randint(13, 18), moments)
        step = strategy.describe(cut / "checkpoints" / "last.ckpt")["step"]
        finish(start(config, "cut"), config, "cut")
    finally:
        finish(uncut, config, "whole")
    assert_same_end(whole, cut, processes=1)
    rows = curves(whole)
    train = [row for row in rows if "train/loss" in row]
    assert 12 <= step < 28 and len(ledger(whole, 0)) == 28
    assert len(train) == 7 and {"train/adversarial", "train/lecam", "train/adversarial_weight"} <= train[-1].keys()
    rates = [row["train/lr"] for row in train]
    assert rates[:6] == sorted(set(rates[:6])) and "train/adversarial" not in train[1]
    assert all(row["train/codebook_tokens"] == 4 * 4 * 3 * 4 * 4 for row in train)  # steps x clips x t x h x w
    assert [row for row in rows if "alarm" in row], "an alarm that both runs tell of, at the same step"
    state = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"]["model.quantizer.layer._codebook.initted"]
    assert state["state_dict"]["objective.adversarial.real_average"].abs().min() > 0
    log = (tmp_path / "cut.log").read_text()
    assert log.count("taking over") == 1 and "resuming" in log and "not resumable" not in log


@pytest.mark.slow
@pytest.mark.long  # two ranks that lose a node and are told to stop: test_slurm_cluster.py
def test_two_processes_killed_then_told_to_stop_end_bitwise_the_same(tmp_path, shards):
    steps = 40
    config = write_config(tmp_path, shards, processes=2, steps=steps, **{**GAME, "data": {"num_frames": 5}})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill_at_random(config, "cut", cut, random.Random(time.time_ns()), last=20)
    before = [lines_of(cut, rank) for rank in (0, 1)]
    process = start(config, "cut")
    try:
        wait_for(process, cut, before[0] + 3)
        process.send_signal(signal.SIGTERM)  # to the first process alone
        assert process.wait(timeout=PATIENCE_S) == 128 + signal.SIGTERM
    finally:
        _kill(process)
    step = strategy.describe(cut / "checkpoints" / "last.ckpt")["step"]
    assert 3 <= step < steps
    ends = [max(ledger(cut, rank, after=before[rank])) for rank in (0, 1)]
    assert ends == [step - 1, step - 1]  # saved at a step boundary, the same one
    assert f"stopped by SIGTERM at step {step}" in (tmp_path / "cut.log").read_text()
    finish(start(config, "cut"), config, "cut")
    finish(start(config, "whole"), config, "whole")
    keys = [line.split(" ")[3] for rank in (0, 1) for line in ledger(whole, rank).values()]
    assert len(keys) == 2 * steps and len(set(keys)) == len(keys)  # nor to two ranks
    assert_same_end(whole, cut, processes=2)
