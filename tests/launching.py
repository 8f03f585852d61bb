"""Two processes that train together on this machine, for tests: starting them is what takes long.

ranks     one script in several processes that meet through torch.distributed
launch    runs of `vtok.train` one after another in one launch; Lightning starts the other processes
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def ranks(folder: Path, script: str, *, count: int = 2, timeout_s: float = PATIENCE_S) -> list[str]:
    """What each of `count` processes printed that ran `script` with RANK, WORLD_SIZE and a meeting point set.

    Raises: AssertionError with the ends of what they said, where one failed. DeepSpeed aborts at exit in a few of a
    hundred runs: that alone is forgiven, and whoever reads the output must see that the work was done.
    """
    path = folder / "script.py"
    path.write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {**os.environ, **QUIET, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    around["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    running = []
    try:
        for rank in range(count):
            own, log = {**around, "RANK": str(rank), "LOCAL_RANK": str(rank)}, (folder / f"{rank}.txt").open("w")
            command = [sys.executable, str(path)]
            running.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, cwd=folder))
        codes = [process.wait(timeout=timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
    said = [(folder / f"{rank}.txt").read_text() for rank in range(count)]
    assert set(codes) <= {0, -6}, (codes, *[text[-3000:] for text in said])
    return said


def launch(out: Path, script: str, *runs: str, timeout_s: float = PATIENCE_S) -> dict[str, int]:
    """{run: exit code} of `runs`, which `script` gets after `out` and notes in ended.txt, "RUN CODE" each, as they end.

    Raises: AssertionError where one did not end. DeepSpeed's abort at exit is forgiven, once every run has ended.
    """
    path, ended = out / "script.py", out / "ended.txt"
    path.write_text(script)
    ended.unlink(missing_ok=True)
    around = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(path), str(out), *runs]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=timeout_s, cwd=out)
    lines = ended.read_text().splitlines() if ended.exists() else []
    codes = dict(line.split() for line in lines)
    if done.returncode not in (0, -6) or list(codes) != list(runs):
        raise AssertionError(f"rc {done.returncode} after {codes}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return {run: int(code) for run, code in codes.items()}
