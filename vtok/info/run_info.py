"""`vtok info RUN`: what a run directory tells of a run, while it is running too; nothing in it is touched.

    lock, environment.json, metrics.jsonl, checkpoints/, stacks/ --summary--> plain values --text--> lines for people

state   running | stalled   its process lives and wrote a line lately | not for long
        killed | lost       its lock is there but the process is gone | on another machine, which was silent
        complete | alarm    it reached its end | an alarm ended it
        stopped | new       it ended before (a signal, an error): the same command goes on | it has not begun
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from vtok.config import RunConfig, load
from vtok.metric_lines import metric_lines
from vtok.progress import duration
from vtok.train import finished
from vtok.training import strategy
from vtok.training.lock import process_started

SILENT_S = 120.0  # a running run is not called stalled before; nor before it missed several lines
MISSED = 5
RENEWED_S = 600.0  # a lock of another machine that was not renewed for so long is left behind
LATELY = 10  # lines whose rate is the run's


def summary(run: str | Path, *, now: float | None = None) -> dict[str, Any]:
    """Plain values on a run directory; unknown ones are None. Cheap: no weights are read.

    Args:
        now: seconds since 1970; None: of the clock.
    Raises: ValueError for a config.yaml that cannot be read.
    """
    run, now = Path(run), time.time() if now is None else now
    config = load(run / "config.yaml")
    starts = (_json(run / "environment.json") or {}).get("starts") or []
    rows = metric_lines(run / "metrics.jsonl")
    train = [row for row in rows if "train/loss" in row or "train/lr" in row]
    kept = _checkpoints(run / "checkpoints", now)
    step = max([row["step"] for row in rows] + [c["step"] for c in kept if c["step"] is not None], default=0)
    rate = _rate(train)
    left = (config.trainer.max_steps - step) / rate if rate else None
    elapsed = train[-1].get("time_s") if train else None
    if config.trainer.max_minutes and elapsed is not None:
        left = min(math.inf if left is None else left, max(60 * config.trainer.max_minutes - elapsed, 0.0))
    last = {k: v for k, v in train[-1].items() if k.startswith("train/")} if train else {}
    out = {
        "run": str(run),
        "family": config.model.name,
        **_state(run, config, rows, kept, _interval(train), now),
        "step": step,
        "max_steps": config.trainer.max_steps,
        "steps_per_s": rate,
        "elapsed_s": elapsed,
        "train": last,
        "validations": [row for row in rows if "val/loss" in row][-3:],
        "alarms": [row for row in rows if "alarm" in row][-5:],
        "checkpoints": kept,
        "stacks": _stacks(run / "stacks", now),
        "bad_batches": _lines(run / "bad_batches.jsonl"),
        "quarantined": _lines(run / "quarantine.jsonl"),
        "starts": len(starts),
        "environment": starts[-1] if starts else None,
        "strategy": config.trainer.strategy,
        "precision": config.trainer.precision,
        "world_size": config.trainer.devices * config.trainer.num_nodes,
        "shards": config.data.shards,
    }
    out["left_s"] = left if out["state"] in ("running", "stalled") else None
    return out


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def _steady(train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last lines that have a step and a time, both growing."""
    timed = [row for row in train if isinstance(row.get("time_s"), int | float)][-LATELY:]
    return [row for a, row in zip([None, *timed], timed) if a is None or row["time_s"] > a["time_s"]]


def _rate(train: list[dict[str, Any]]) -> float | None:
    """Steps a second lately, validation and checkpoints included."""
    steady = _steady(train)
    if not steady:
        return None
    first = steady[0] if len(steady) > 1 else {"step": 0, "time_s": 0.0}
    steps, seconds = steady[-1]["step"] - first["step"], steady[-1]["time_s"] - first["time_s"]
    return steps / seconds if steps > 0 and seconds > 0 else None


def _interval(train: list[dict[str, Any]]) -> float | None:
    """Seconds between lines, as a rule."""
    steady = _steady(train)
    gaps = [b["time_s"] - a["time_s"] for a, b in zip(steady, steady[1:])]
    return statistics.median(gaps) if gaps else None


def _checkpoints(folder: Path, now: float) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            size, written = sum(p.stat().st_size for p in parts), max(p.stat().st_mtime for p in parts)
        except (OSError, ValueError):  # replaced at this moment
            continue
        try:
            step, problem = strategy.describe(path)["step"], None
        except (ValueError, FileNotFoundError, KeyError) as error:
            step, problem = None, str(error)
        entry = {"name": path.name, "step": step, "bytes": size, "age_s": max(now - written, 0.0)}
        found.append(entry | ({"problem": problem} if problem else {}))
    return found


def _stacks(folder: Path, now: float) -> list[dict[str, Any]]:
    found = []
    for path in folder.glob("rank-*.txt"):
        try:
            found.append({"file": f"{folder.name}/{path.name}", "age_s": max(now - path.stat().st_mtime, 0.0)})
        except OSError:
            continue
    return sorted(found, key=lambda each: each["age_s"])


def _state(
    run: Path, config: RunConfig, rows: list[dict[str, Any]], kept: list[dict[str, Any]], interval: float | None,
    now: float,
) -> dict[str, Any]:  # fmt: skip
    """state, note, host, pid, last_line_age_s, line_interval_s."""
    lock, at = run / "lock", run / "metrics.jsonl"
    held = _json(lock) if lock.exists() else None
    held = held if isinstance(held, dict) else None
    age = max(now - at.stat().st_mtime, 0.0) if at.exists() and rows else None
    out: dict[str, Any] = {
        "state": "new",
        "note": "",
        "host": held.get("host") if held else None,
        "pid": held.get("pid") if held else None,
        "last_line_age_s": age,
        "line_interval_s": interval,
    }
    if held is not None:
        if held.get("host") == socket.gethostname():
            alive, gone = process_started(int(held.get("pid") or 0)) == held.get("started"), "killed"
        else:
            alive, gone = now - lock.stat().st_mtime < RENEWED_S, "lost"
        silent = age is not None and age > max(SILENT_S, MISSED * (interval or 0.0))
        out["state"] = ("stalled" if silent else "running") if alive else gone
        if silent and alive and age is not None:
            usual = f"; they come every {duration(interval)}" if interval else ""
            out["note"] = f"no line for {duration(age)}{usual}: validation, a checkpoint, or a hang"
        elif not alive:
            out["note"] = "its process is gone and left the lock: the same command goes on from the last checkpoint"
        return out
    last = next((c for c in kept if c["name"] == "last.ckpt" and c["step"] is not None), None)
    if last is not None and _finished(run, config):
        out["state"] = "complete"
    elif rows and "alarm" in rows[-1] and rows[-1].get("action") == "stop":
        out["state"], out["note"] = "alarm", str(rows[-1].get("text", ""))
    elif rows or last is not None:
        out["state"] = "stopped"
        out["note"] = "by a signal or an error, before its end: the same command goes on from the last checkpoint"
    return out


def _finished(run: Path, config: RunConfig) -> bool:
    try:
        return finished(strategy.describe(run / "checkpoints" / "last.ckpt"), config)
    except (ValueError, OSError, KeyError):
        return False


# for people


def text(found: dict[str, Any]) -> str:
    """The summary as lines."""
    lines = [f"run {found['run']} ({found['family']})"]

    def add(head: str, value: str) -> None:
        lines.append(f"  {head:<13} {value}")

    where = f" on {found['host']}, process {found['pid']}" if found["host"] else ""
    add("state", found["state"] + where + (f": {found['note']}" if found["note"] else ""))
    share = f", {100 * found['step'] / found['max_steps']:.1f} %" if found["max_steps"] else ""
    add("step", f"{found['step']} of {found['max_steps']}{share}")
    if found["last_line_age_s"] is not None:
        add("last line", f"{duration(found['last_line_age_s'])} ago")
    if found["steps_per_s"]:
        rate = found["steps_per_s"]
        pace = f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"
        left = f", {duration(found['left_s'])} left" if found["left_s"] is not None else ""
        taken = f", {duration(found['elapsed_s'])} so far" if found["elapsed_s"] is not None else ""
        add("rate", pace + taken + left)
    _train(found["train"], add)
    for row in found["validations"]:
        add("validation", f"step {row['step']}: {_scores(row, 'val/')}")
    for row in found["alarms"]:
        add("alarm", f"step {row['step']}: {row.get('text', row['alarm'])}")
    for each in found["checkpoints"]:
        step = f"step {each['step']}" if each["step"] is not None else f"cannot be read: {each['problem']}"
        add("checkpoint", f"{each['name']}, {step}, {_size(each['bytes'])}, {duration(each['age_s'])} old")
    if not found["checkpoints"]:
        add("checkpoint", "none yet")
    if found["stacks"]:
        newest = found["stacks"][0]
        add("stalls", f"{len(found['stacks'])} file(s) of stacks, {newest['file']} {duration(newest['age_s'])} ago")
    for name, what in (("bad_batches", "steps not finite"), ("quarantined", "broken samples")):
        if found[name]:
            add("skipped", f"{found[name]} {what}")
    _environment(found, add)
    add("data", found["shards"])
    return "\n".join(lines)


def _train(last: dict[str, Any], add: Any) -> None:
    speed = {"clips_per_s": "clips/s", "tokens_per_s": "tokens/s", "tflops_per_s": "TFLOP/s"}
    said = [f"{last[f'train/{k}']:.3g} {unit}" for k, unit in speed.items() if last.get(f"train/{k}") is not None]
    for key, title in (("mfu", "MFU"), ("data_wait_share", "data wait")):
        if last.get(f"train/{key}") is not None:
            said.append(f"{title} {100 * last[f'train/{key}']:.1f} %")
    if said:
        add("speed", ", ".join(said))
    memory = [
        f"{last[f'train/{key}']:.2f} GiB {title}"
        for key, title in (("device_memory_gib", "device, at most"), ("host_memory_gib", "host"))
        if last.get(f"train/{key}") is not None
    ]
    if memory:
        add("memory", ", ".join(memory))
    told = {f"train/{k}" for k in (*speed, "mfu", "data_wait_share", "device_memory_gib", "host_memory_gib")}
    rest = {k: v for k, v in last.items() if k not in told}
    if rest:
        add("training", _scores(rest, "train/"))


def _scores(row: dict[str, Any], prefix: str) -> str:
    """loss first, then the others by name; lists and what is undefined are left out."""
    names = sorted((k for k in row if k.startswith(prefix)), key=lambda k: (k != f"{prefix}loss", k))
    return ", ".join(f"{k.removeprefix(prefix)} {row[k]:.4g}" for k in names if isinstance(row[k], int | float))


def _environment(found: dict[str, Any], add: Any) -> None:
    here = found["environment"] or {}
    world = f"{found['world_size']} process(es), strategy {found['strategy']}, {found['precision']}"
    add("spread", world)
    if here:
        if here.get("parameters"):
            trained = f", {here['parameters_trained'] / 1e6:.2f} M trained" if here.get("parameters_trained") else ""
            most = f"; at most {here['max_tokens']} tokens a window" if here.get("max_tokens") else ""
            add("model", f"{here['parameters'] / 1e6:.2f} M parameters{trained}{most}")
        hardware = ", ".join(here.get("gpus") or []) or f"{here.get('cpu_count')} CPU cores"
        packages = ", ".join(f"{k} {v}" for k, v in (here.get("packages") or {}).items() if v)
        add("machine", f"{here.get('host')}: {hardware}")
        add("versions", f"Python {here.get('python')}, {packages}")
        add("commit", here.get("commit") or "not known")
        job = f", SLURM job {here['slurm_job']}" if here.get("slurm_job") else ""
        add("starts", f"{found['starts']}, resumed {found['starts'] - 1} times; the last {here.get('time')}{job}")


def _size(count: int) -> str:
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
