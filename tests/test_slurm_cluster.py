"""Jobs on a real SLURM cluster of two nodes (slurm/local_cluster.sh), sent by slurm/submit.py.

One training is told to stop by the time limit, gives way to a more important job, loses a node and is cancelled; it
must end bitwise like one that ran through. The script around every job is tried with small commands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_end, ledger, lines_of, make_shards, write_config

from vtok import strategy
from vtok.data.encode import write_video

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "slurm"))
import submit  # noqa: E402

LOCAL = ROOT / "slurm" / "local_cluster.sh"
NODE_TIMEOUT_S = 10
STEPS = 240  # of a quarter of a second: SLURM looks at time limits twice a minute

pytestmark = pytest.mark.slow


def until(condition: Callable[[], object], what: str, *, seconds: float = 600) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"waited {seconds} s for: {what}"
        time.sleep(0.1)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "VTOK_SLURM_NODE_TIMEOUT": str(NODE_TIMEOUT_S),
            "PYTHONPATH": str(ROOT / "tests"),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path) -> str:
        """Id of a job sent by submit.py."""
        told = self.call(sys.executable, ROOT / "slurm" / "submit.py", *words, cwd=cwd)
        return told.partition("job ")[2].split()[0]

    def about(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job (of an array, its first element)."""
        text = self.call("scontrol", "show", "job", job, "--oneliner").splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.about(job)["JobState"]

    def ended(self, job: str) -> bool:
        lines = self.call("scontrol", "show", "job", job, "--oneliner").splitlines()
        return not any(f"JobState={state}" in line for line in lines for state in ("RUN", "PEND", "COMPLETING", "CONF"))

    def ranks(self, job: str) -> dict[int, str]:
        """{rank: node} of a job's processes that are running now, as the kernel knows them."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                pairs = (item.partition("=") for item in path.read_text(errors="replace").split("\0"))
            except OSError:
                continue
            own = {key: value for key, _, value in pairs}
            if own.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in own and own.get("SLURM_STEP_ID") == "0":
                found[int(own["SLURM_PROCID"])] = own["SLURMD_NODENAME"]
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    there = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if there is None and "VTOK_NEED_SLURM" not in os.environ:
        pytest.skip("no SLURM on this machine; `make test-slurm` installs Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="vtok-slurm-"))
    made = Cluster(folder)
    began = time.monotonic()
    try:
        said = made.call(LOCAL, "start", folder)
        assert said == f"export SLURM_CONF={folder}/slurm.conf\n"
        assert time.monotonic() - began < 30 or there is None
        yield made
    finally:
        subprocess.run([LOCAL, "stop", folder], env=made.env, timeout=60, check=True)
        shutil.rmtree(folder)


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


def test_training_survives_what_a_cluster_does_to_it(cluster, tmp_path, monkeypatch):
    trainer = {"max_steps": STEPS, "checkpoint_every": 10, "val_every": 50}
    config = write_config(
        tmp_path, make_shards(tmp_path / "shards"), processes=2, steps=STEPS, slow_s=0.25, trainer=trainer
    )
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "cut" / "slurm" / "001"

    def send(name: str, *words: str) -> str:
        return cluster.submit(config, f"name={name}", "--gpus-per-node", "0", "--time", "30", *words, cwd=tmp_path)

    def goes_on(steps: int = 6) -> int:
        """Waits until the run has done so many more steps; how many lines of its ledger there are then."""
        before = lines_of(cut)
        until(lambda: lines_of(cut) >= before + steps, f"{steps} steps more than {before}")
        return lines_of(cut)

    def saved() -> int:
        return strategy.describe(cut / "checkpoints" / "last.ckpt")["step"]

    def leaves(said: str) -> None:
        """Waits until the run has stopped, and checks that what it saved are all the steps that it has done."""
        until(lambda: said in log_text(), said)
        assert max(ledger(cut, 0)) == max(ledger(cut, 1)) == saved() - 1

    def log_text() -> str:
        return "".join(path.read_text() for path in sorted(log.parent.glob("*/*.out")))

    # one node with two processes, or two with one each: the same ranks, the same run
    one = send("whole", "--nodes", "1", "--sbatch-arg=--nodelist=node1", "--partition", "main")
    job = send("cut", "trainer.devices=1", "trainer.num_nodes=2", "--nodes", "2", "--partition", "spare",
               "--signal-before", "150")  # fmt: skip
    until(lambda: lines_of(cut) > 6, "the first steps")
    assert cluster.ranks(job) == {0: "node1", 1: "node2"} and cluster.ranks(one) == {0: "node1", 1: "node1"}
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    with pytest.raises(ValueError, match=f"job {job} .* is for .*cut already"):
        submit.check_free(cut)

    # the time limit comes near
    hours, minutes, _ = cluster.about(job)["RunTime"].split(":")
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    leaves("stopped by SIGUSR1")
    until(lambda: cluster.about(job)["Restarts"] == "1", "the job is queued again")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    goes_on()

    # a more important job needs one of its nodes
    taken = ["--partition=main", "--nodelist=node2", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.call("sbatch", *taken)
    leaves("stopped by SIGTERM")
    goes_on()
    assert cluster.about(job)["Restarts"] == "2"

    # a node dies
    assert len(cluster.ranks(job)) == 2
    cluster.call(LOCAL, "crash", "node2", cluster.folder)
    until(lambda: not cluster.ranks(job), "what ran beside it on the other node ends")
    cluster.call(LOCAL, "boot", "node2", cluster.folder)
    goes_on(16)
    assert cluster.about(job)["Restarts"] == "3" and f"resuming {cut}" in log_text()

    # its user stops it, and sends it again
    assert saved() % 10 == 0
    cluster.call("scancel", job)
    leaves_at = time.monotonic()
    until(lambda: cluster.ended(job), "the cancelled job's end")
    assert cluster.state(job) == "CANCELLED" and time.monotonic() - leaves_at < 30
    assert max(ledger(cut, 0)) == max(ledger(cut, 1)) == saved() - 1 < STEPS - 1
    again = send("cut", "--nodes", "2")
    until(lambda: cluster.ended(again), "the end")
    assert cluster.state(again) == "COMPLETED", log_text()[-3000:]
    until(lambda: cluster.ended(one), "the uncut run's end")
    assert cluster.state(one) == "COMPLETED"
    assert_same_end(whole, cut, processes=2)
    keys = [line.split(" ")[3] for rank in (0, 1) for line in ledger(cut, rank).values()]
    assert len(keys) == len(set(keys)) == 2 * STEPS
    starts = json.loads((cut / "environment.json").read_text())["starts"]
    assert [start["slurm_job"] for start in starts] == [job] * 4 + [again]
    assert {start["commit"] for start in starts} == {(log / "code" / "COMMIT").read_text().strip()}
    assert all(f"{log.parent}/00" in start["command"][1] for start in starts)  # the snapshot ran, not the checkout


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


# job.sh, around small commands


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
        f"#SBATCH --output={folder}/log{extra and '-%a'}\n{extra}\nset -eu\nsrun_args=()\n"
        f"vtok_folder={folder} vtok_lead=60 most_restarts=3\nsource {ROOT}/slurm/job.sh\nvtok_prepare\n"
        f"vtok_run {sys.executable} -u {folder}/command.py\n"
    )
    return cluster.call("sbatch", "--parsable", script).strip()


def test_the_script_asks_for_another_turn_only_when_it_should(cluster, tmp_path):
    stopped = "open(os.environ['VTOK_STOPPED'], 'w').write('138') if rank == 0 else None\n"
    cases = {  # (command, restarts, state and exit status at the end)
        "fails": ("if rank == 1: sys.exit(1)\ntime.sleep(60)", 0, ("FAILED", "143:0")),  # 143: srun ended rank 0
        "killed": ("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 0, ("FAILED", None)),
        "saved": (f"if start < 2:\n {stopped}", 2, ("COMPLETED", "0:0")),
        "unready": ("if start == 0: os.kill(os.getpid(), signal.SIGUSR1)", 1, ("COMPLETED", "0:0")),
        "for ever": (stopped, 3, ("FAILED", "138:0")),
    }
    jobs = {name: run_script(cluster, tmp_path / name.replace(" ", "-"), case[0]) for name, case in cases.items()}
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


def test_the_first_node_dies(cluster, tmp_path):
    """The script dies with it; SLURM itself sees that, and queues the job again."""
    job = run_script(cluster, tmp_path, "print('up', rank, start, flush=True)\nif start == 0: time.sleep(100)")
    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("up") == 2, "both ranks")
    cluster.call(LOCAL, "crash", "node1", cluster.folder)
    until(lambda: cluster.about(job)["Restarts"] == "1", "SLURM to notice", seconds=12 * NODE_TIMEOUT_S)
    until(lambda: cluster.state(job) == "PENDING", "its place in the queue")
    cluster.call(LOCAL, "boot", "node1", cluster.folder)
    until(lambda: cluster.ended(job), "the second start")
    assert cluster.state(job) == "COMPLETED" and "up 0 1" in (tmp_path / "log").read_text()
