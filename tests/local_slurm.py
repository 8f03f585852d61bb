"""A SLURM cluster of two nodes on this machine (slurm/local_cluster.sh), for the tests that send jobs to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "slurm" / "local_cluster.sh"
NODE_TIMEOUT_S = 10


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
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)
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


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster, ended after use; skips the tests of a file that asks for one where there is no SLURM."""
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
        subprocess.run([LOCAL, "stop", folder], env=made.env, timeout=PATIENCE_S, check=True)
        shutil.rmtree(folder)
