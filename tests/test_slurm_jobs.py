"""Arrays on a real SLURM cluster of two nodes, and the script around every job (slurm/job.sh), with small commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_slurm import LOCAL, ROOT, Cluster, running
from test_resume import make_shards, write_config
from waiting import until

from vtok.config import load
from vtok.data.encode import write_video
from vtok.training import strategy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as made:
        yield made


def videos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        frames = torch.full((6, 32, 32, 3), 20 * number, dtype=torch.uint8)
        frames[:, :, : 4 + number] = 255 - 10 * number
        write_video(folder / f"{number}.mp4", list(frames), fps=8)
    return folder


def files(folder: Path, suffixes: tuple[str, ...] = (".tar", ".json", ".jsonl")) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in suffixes)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_array_packs_what_one_process_packs(cluster, tmp_path):
    clips = videos(tmp_path / "videos", 6)
    packed = ["videos", "--clip-seconds", "0.5", "--shard-samples", "2", "--val-fraction", "0.3", "--quiet"]
    sweep = tmp_path / "pack.yaml"
    sweep.write_text(json.dumps({"command": "shards", "arguments": [*packed, "--out", "many"], "parts": 3}))
    words = ("--array", sweep, "--gpus-per-node", "0", "--time", "10", "--partition", "main")
    job = cluster.submit(*words, cwd=tmp_path)
    cluster.call(sys.executable, "-m", "vtok.cli", "shards", *packed, "--out", "one", cwd=tmp_path)
    until(lambda: cluster.ended(job), "the array's end")
    logs = "\n".join(path.read_text() for path in (tmp_path / "runs" / "pack" / "slurm").rglob("*.out"))
    states = cluster.call("scontrol", "show", "job", job, "--oneliner")
    assert states.count("JobState=COMPLETED") == 3, logs
    one, many = files(tmp_path / "one"), files(tmp_path / "many")
    assert sum(name.endswith(".tar") for name in one) > 3 and clips.is_dir()
    assert one.keys() == many.keys()
    assert not [name for name in one if one[name] != many[name]]


def train_a_sweep(cluster: Cluster, folder: Path) -> list[Path]:
    """Two trainings of an array, each of two ranks; their run directories."""
    trainer = {"val_every": 0, "checkpoint_every": 0}
    config = write_config(folder, make_shards(folder / "shards"), processes=2, steps=4, slow_s=0.0, trainer=trainer)
    sweep = folder / "sweep.yaml"
    sweep.write_text(json.dumps({"grid": {"optim.lr": [0.001, 0.002]}, "name": "{name}-lr{optim.lr}"}))
    words = ("name=some", "--array", sweep, "--gpus-per-node", "0", "--time", "20", "--partition", "main")
    job = cluster.submit(config, *words, cwd=folder)
    until(lambda: cluster.ended(job), "the sweep's end")
    logs = "\n".join(path.read_text()[-2000:] for path in (folder / "some" / "slurm").rglob("*.out"))
    assert cluster.call("scontrol", "show", "job", job, "--oneliner").count("JobState=COMPLETED") == 2, logs
    return [folder / "some-lr0.001", folder / "some-lr0.002"]


@pytest.mark.long
def test_a_sweep_trains_each_of_its_runs(cluster, tmp_path):
    runs = train_a_sweep(cluster, tmp_path)
    for run, rate in zip(runs, (0.001, 0.002)):
        assert load(run / "config.yaml").optim.lr == rate
        assert strategy.describe(run / "checkpoints" / "last.ckpt")["step"] == 4
        assert [len((run / f"ledger-{rank}.txt").read_text().splitlines()) for rank in (0, 1)] == [4, 4]


@pytest.mark.long
def test_every_run_of_a_sweep_is_measured(cluster, tmp_path):
    runs = train_a_sweep(cluster, tmp_path)
    quick = ["--codecs", "none", "--controls", "mean_colour", "--no-report", "--processes", "1", "--device", "cpu"]
    every = {"run": {"glob": str(tmp_path / "some-lr*")}}
    content = {"command": "eval", "arguments": ["{run}", "--out", "{run}/eval", *quick], "grid": every}
    (tmp_path / "scores.yaml").write_text(json.dumps(content))
    words = ("--array", tmp_path / "scores.yaml", "--gpus-per-node", "0", "--time", "20", "--partition", "main")
    job = cluster.submit(*words, cwd=tmp_path)
    until(lambda: cluster.ended(job), "the scores")
    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / "runs" / "scores").rglob("*.out"))
    assert all((run / "eval" / "eval.json").is_file() for run in runs), logs


def run_script(
    cluster: Cluster, folder: Path, command: str, *, nodes: int = 2, restarts: int = 3, extra: str = ""
) -> str:
    """Sends a job whose ranks run `command` (Python); its log is folder/log."""
    folder.mkdir(exist_ok=True)
    (folder / "command.py").write_text(
        "import os, signal, sys, time\nstart = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
        f"rank = int(os.environ['SLURM_PROCID'])\n{command}"
    )
    script = folder / "job.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes={nodes} --ntasks-per-node=1 --requeue --open-mode=append --time=20\n"
        f"#SBATCH --output={folder}/log{'-%a' if 'array' in extra else ''}\n{extra}\nset -eu\nsrun_args=()\n"
        f"vtok_folder={folder} vtok_lead=60 most_restarts=3\nsource {ROOT}/slurm/job.sh\nvtok_prepare\n"
        f"vtok_run {sys.executable} -u {folder}/command.py\n"
    )
    return cluster.call("sbatch", "--parsable", script).strip()


def test_the_script_asks_for_another_turn_only_when_it_should(cluster, tmp_path):
    # srun's status tells of rank 0 only where that runs already
    both = (
        "up = __file__ + '.up'\nif rank == 0: open(up, 'w').close()\nwhile not os.path.exists(up): time.sleep(0.05)\n"
    )
    stopped = "open(os.environ['VTOK_STOPPED'], 'w').write('138') if rank == 0 else None\n"
    watched = f"sys.path.insert(0, {str(ROOT)!r})\nfrom vtok.training import signals\nsignals.watch()\n"
    cases = {  # (command, restarts, state and exit status at the end)
        "fails": (
            f"{both}if rank == 1: sys.exit(1)\ntime.sleep(900)",
            0,
            ("FAILED", "143:0"),
        ),  # 143: srun ended rank 0
        "killed": (f"{both}if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(900)", 0, ("FAILED", None)),
        "saved": (f"if start < 2:\n {stopped}", 2, ("COMPLETED", "0:0")),
        "unready": ("if start == 0: os.kill(os.getpid(), signal.SIGUSR1)", 1, ("COMPLETED", "0:0")),
        # the other is ended by srun's SIGTERM, whose 143 is then the status of srun: nobody takes the nodes back
        "one unready": (
            f"{watched}{both}if start == 0:\n if rank == 1: os.kill(os.getpid(), signal.SIGUSR1)\n time.sleep(900)",
            1,
            ("COMPLETED", "0:0"),
        ),
        "for ever": (stopped, 3, ("FAILED", "138:0")),
    }
    nodes = {"unready": 1}  # of two ranks srun may end the second by SIGTERM before its own signal does
    jobs = {
        name: run_script(cluster, tmp_path / name.replace(" ", "-"), case[0], nodes=nodes.get(name, 2))
        for name, case in cases.items()
    }
    one_of_two = f"if start == 0 and os.environ['SLURM_ARRAY_TASK_ID'] == '1':\n {stopped}"
    array = run_script(cluster, tmp_path / "array", one_of_two, nodes=1, extra="#SBATCH --array=0-1")
    for name, job in jobs.items():
        until(lambda job=job: cluster.ended(job), name)
        about, (_, restarts, (state, code)) = cluster.about(job), cases[name]
        log = (tmp_path / name.replace(" ", "-") / "log").read_text()
        assert (about["JobState"], about["Restarts"]) == (state, str(restarts)), f"{name}: {log}"
        assert code is None or about["ExitCode"] == code, f"{name}: {log}"
        assert log.count("asks to be queued again") == restarts and log.count("vtok: job") >= restarts + 1
    assert "NOT requeued: restarted 3 times" in (tmp_path / "for-ever" / "log").read_text()
    until(lambda: cluster.ended(array), "the array")
    logs = [(tmp_path / "array" / f"log-{i}").read_text() for i in (0, 1)]
    assert ["start 2" in log for log in logs] == [False, True], logs  # the one element, not the whole array


def test_a_command_gives_way(cluster, tmp_path):
    """Preempted, a command that knows no signals ends by SIGTERM; it is queued again nevertheless."""
    command = "print('up', start, flush=True)\nif start == 0: time.sleep(900)"
    extra = "#SBATCH --partition=spare\n#SBATCH --nodelist=node2"
    job = run_script(cluster, tmp_path, command, nodes=1, extra=extra)
    until(lambda: (tmp_path / "log").exists() and "up 0" in (tmp_path / "log").read_text(), "its start")
    taken = ["--partition=main", "--nodelist=node2", "--cpus-per-task=8", "--output=/dev/null", "--wrap=true"]
    cluster.call("sbatch", *taken)
    until(lambda: cluster.ended(job), "its second start")
    log = (tmp_path / "log").read_text()
    assert cluster.state(job) == "COMPLETED" and "up 1" in log and "queued again after status 143" in log


def test_the_first_node_dies(cluster, tmp_path):
    """The script dies with it; SLURM itself sees that, and queues the job again."""
    job = run_script(cluster, tmp_path, "print('up', rank, start, flush=True)\nif start == 0: time.sleep(900)")
    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("up") == 2, "both ranks")
    cluster.call(LOCAL, "crash", "node1", cluster.folder)
    until(lambda: cluster.about(job)["Restarts"] == "1", "SLURM to notice")
    until(lambda: cluster.state(job) == "PENDING", "its place in the queue")
    cluster.call(LOCAL, "boot", "node1", cluster.folder)
    until(lambda: cluster.ended(job), "the second start")
    assert cluster.state(job) == "COMPLETED" and "up 0 1" in (tmp_path / "log").read_text()
