"""Who holds a run directory: RUN/lock names the process, its machine and its SLURM job."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

RENEWED_S = 60.0
STALE_S = 600.0
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip


class Lock:
    """Holds a run directory: two processes in one would write over each other's checkpoints.

    Stale, and taken over: a lock of a process of this machine that is gone, of an earlier start of the same SLURM job,
    of a job that SLURM says has ended, or one from another machine that was not renewed for ten minutes (a thread and
    every checkpoint renew it).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.stop = threading.Event()

    def __enter__(self) -> Lock:
        mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": process_started(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        }
        self.text = json.dumps(mine)
        for _ in range(3):
            aside = self.path.with_name(f".lock-{mine['host']}-{mine['pid']}")
            aside.write_text(self.text)
            try:
                os.link(aside, self.path)  # fails if there is one; the lock is never seen half-written
                break
            except FileExistsError:
                self._refuse_or_clear(mine)
            finally:
                aside.unlink(missing_ok=True)
        else:
            raise ValueError(f"{self.path} keeps coming back: another process starts in this run directory")
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def _refuse_or_clear(self, mine: dict[str, Any]) -> None:
        try:
            text, age_s = self.path.read_text(), time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        try:
            held = json.loads(text)
        except ValueError:  # emptied by a power cut
            held = {"pid": 0, "host": mine["host"], "started": ""}
        if held["host"] == mine["host"]:
            stale = process_started(held["pid"]) != held["started"]
        else:
            stale = age_s > STALE_S or _job_ended(held, mine)
        if not stale:
            raise ValueError(
                f"{self.path.parent} is in use by process {held['pid']} on {held['host']}: wait for it, end it, or "
                f"choose another name. If that process is surely gone, delete {self.path}"
            )
        log.warning("taking over %s from process %s on %s, which is gone", self.path, held["pid"], held["host"])
        # Two starts may find the same stale lock: what is taken away must be what was read, not the other's new one.
        aside = self.path.with_name(f".lock-{mine['host']}-{mine['pid']}-stale")
        try:
            os.rename(self.path, aside)
            if aside.read_text() != text:
                os.link(aside, self.path)
        except (FileNotFoundError, FileExistsError):
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self.stop.wait(RENEWED_S):
            touch(self.path.parent)

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.text:  # not another's, which took over while this machine slept
                self.path.unlink()


def _job_ended(held: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a lock is of an earlier start of this SLURM job, or of a job that is over: a killed one leaves it."""
    job, cluster = held.get("slurm_job"), held.get("slurm_cluster")
    if not job or cluster != mine["slurm_cluster"]:  # numbers of another cluster are other jobs
        return False
    return bool(mine["slurm_job"]) and (job == mine["slurm_job"] or job_is_over(job) is True)


def process_started(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks since boot; None when there is none of that number.

    Process numbers come back after a while: the same number with another beginning is another process.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc (macOS)
        os.kill(pid, 0)
        return "running"
    except OSError:
        return None


def touch(folder: Path) -> None:
    """Renews the lock of a run directory: its age tells other machines whether the run lives."""
    try:
        os.utime(folder / "lock")
    except OSError:
        pass


def job_is_over(job: str) -> bool | None:
    """Whether a job of this SLURM cluster has ended; None where squeue cannot be asked.

    One that waits to be queued again has not: it will go on.
    """
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return True if "Invalid job id" in done.stderr else None  # it ended so long ago that SLURM has forgotten it
    return not set(done.stdout.split()) - OVER
