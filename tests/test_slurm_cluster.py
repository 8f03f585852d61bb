"""A training on a real SLURM cluster of two nodes, sent by slurm/submit.py.

It is told to stop by the time limit, gives way to a more important job, loses a node and is cancelled; it must end
bitwise like one that ran through.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import LOCAL, Cluster, running
from test_resume import assert_same_end, ledger, lines_of, make_shards, write_config
from waiting import until

from vtok.training import strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "slurm"))
import submit  # noqa: E402

STEPS = 240  # of a fifth of a second: SLURM looks at time limits twice a minute

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as made:
        yield made


def test_training_survives_what_a_cluster_does_to_it(cluster, tmp_path, monkeypatch):
    trainer = {"max_steps": STEPS, "checkpoint_every": 10, "val_every": 50}
    config = write_config(
        tmp_path, make_shards(tmp_path / "shards"), processes=2, steps=STEPS, slow_s=0.2, trainer=trainer
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
    two_nodes = ("trainer.devices=1", "trainer.num_nodes=2", "--nodes", "2")
    job = send("cut", *two_nodes, "--partition", "spare", "--signal-before", "150")
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
    until(lambda: cluster.about(job)["Restarts"] == "3", "SLURM to notice")
    assert not cluster.ranks(job), "what ran beside it on the other node goes on"
    cluster.call(LOCAL, "boot", "node2", cluster.folder)
    goes_on(16)
    assert f"resuming {cut}" in log_text()

    # its user stops it, and sends it again
    assert saved() % 10 == 0
    sent = 1 + int(cluster.about(job)["Restarts"])  # by SLURM: a slow machine may lose a start beside the three above
    cluster.call("scancel", job)
    leaves_at = time.monotonic()
    until(lambda: cluster.ended(job), "the cancelled job's end")
    assert cluster.state(job) == "CANCELLED" and time.monotonic() - leaves_at < 30
    assert max(ledger(cut, 0)) == max(ledger(cut, 1)) == saved() - 1 < STEPS - 1
    again = send("cut", *two_nodes)
    until(lambda: cluster.ended(again), "the end")
    assert cluster.state(again) == "COMPLETED", log_text()[-3000:]
    until(lambda: cluster.ended(one), "the uncut run's end")
    assert cluster.state(one) == "COMPLETED"
    assert_same_end(whole, cut, processes=2)
    keys = [line.split(" ")[3] for rank in (0, 1) for line in ledger(cut, rank).values()]
    assert len(keys) == len(set(keys)) == 2 * STEPS
    starts = json.loads((cut / "environment.json").read_text())["starts"]
    assert [start["slurm_job"] for start in starts] == [job] * (len(starts) - 1) + [again]
    assert 4 <= len(starts) - 1 <= sent
    for start, folder in zip(
        starts, [log] * (len(starts) - 1) + [log.parent / "002"]
    ):  # the snapshot ran, not the checkout
        assert start["command"][1] == str(folder / "code" / "vtok" / "cli.py")
        assert start["commit"] == (folder / "code" / "COMMIT").read_text().strip()
