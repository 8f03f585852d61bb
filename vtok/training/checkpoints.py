"""Checkpoints on disk: written whole or not at all, checked by hash before they are read, readable by any strategy.

    checkpoints/last.ckpt        the newest: one file, or (DeepSpeed) a link to a folder with a shard per process
    checkpoints/previous.ckpt    the one before, for the day a disk damages the newest
    checkpoints/recent-*.ckpt    those before it, by step, where trainer.keep_last is above 2
    checkpoints/step-*.ckpt      of every trainer.keep_every-th step: never taken away here
    checkpoints/best.ckpt        the best by validation
    checkpoints/sha256.jsonl     the hash of each checkpoint written here, recorded before it got its name

    publish   written aside, flushed, hashed, then renamed: a reader sees the old checkpoint or the new one, whole
    verify    every byte against the recorded hashes: before a run goes on from a checkpoint, and before an export
    read      any kind -> weights, AdamW's moments and the run's own state, which every strategy can go on from
    adapt     that to the parameter groups and the accumulation of the run that goes on

`python -m vtok.training.checkpoints RUN` checks the checkpoints of a run; `--use previous` goes back to the previous
one, `--use STEP` to that of a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.training.records import RECORD, fsync, hashes, record, recorded, sha256, write_whole
from vtok.training.zero_shards import MOMENTS, CheckpointError, check_shards, check_trained, read_shards

log = logging.getLogger(__name__)

ABOUT = "vtok.json"  # what a folder of shards says of itself
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
KEPT = "step-{:08d}.ckpt"  # for good
RECENT = "recent-{:08d}.ckpt"  # while it is one of the newest


# writing


def publish(written: Path, names: list[str], *, about: dict[str, Any], keep: int = 2) -> None:
    """Gives a freshly written checkpoint its public names, `names[0]` last, each replaced in one rename.

    What `names[0]` was before becomes previous.ckpt, if it is whole and of another step. A file is renamed (other names
    are hard links, or copies where the file system has none). A folder keeps a name of its own and the public names are
    symbolic links, since a folder cannot be replaced in one step.

    Args:
        keep: the newest so many stay, 2 or more: `names[0]`, previous.ckpt, and recent-<step>.ckpt. An older one is
            taken away once the new one has its names, so that there are never fewer.
    Raises: OSError; then every name is what it was, or already the new checkpoint.
    """
    folder = written.parent
    source, is_folder = written, written.is_dir()
    if is_folder:
        files = {str(p.relative_to(written)): p for p in sorted(written.rglob("*")) if p.is_file() and p.name != ABOUT}
        for path in files.values():
            fsync(path)
        write_whole(written / ABOUT, json.dumps({**about, "files": hashes(files)}))
        digest = sha256(written / ABOUT)
    else:
        fsync(written)
        digest = sha256(written)
    record(folder, {"sha256": digest, "step": about.get("step"), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    if is_folder:
        final = folder / f"step-{about['step']:08d}"
        if final.exists():  # the same step saved twice: the name may be in use, so take another
            final = folder / f"{final.name}-{os.getpid()}-{len(list(folder.glob(final.name + '*')))}"
        written.rename(final)
        source = folder / ".new.ckpt"
        source.unlink(missing_ok=True)
        source.symlink_to(final.name)
    _keep_previous(folder / names[0], about, keep)
    for name in names[1:]:
        _also(source, folder / name)
    os.replace(source, folder / names[0])
    fsync(folder)
    _drop_recent(folder, about.get("step"), keep)
    used = {os.readlink(p) for p in folder.iterdir() if p.is_symlink()}
    for path in folder.glob("step-*"):
        if path.is_dir() and not path.is_symlink() and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


def _keep_previous(last: Path, about: dict[str, Any], keep: int) -> None:
    """Names what `last` is now previous.ckpt, unless it is of the same step or cannot be read; what that was before, it
    stays by its step."""
    now, previous = step_of(last), last.with_name(PREVIOUS)
    if now is None or now == about.get("step"):
        return
    before = step_of(previous)
    if keep > 2 and before is not None and before != now:
        _also(previous, last.with_name(RECENT.format(before)))
    _also(last, previous)


def _drop_recent(folder: Path, step: int | None, keep: int) -> None:
    """Takes away recent-<step>.ckpt beyond the newest. Steps that a run has gone back from are not newer: they are the
    first to go, as it will come by them again."""
    found = {each: folder / name for name, each in _by_step(folder, RECENT).items()}
    now = math.inf if step is None else step
    held = {now, step_of(folder / PREVIOUS)} if found else set()
    order = sorted((each for each in found if each not in held), key=lambda each: (each < now, each), reverse=True)
    for each in found.keys() - set(order[: keep - 2]):
        try:
            found[each].unlink()
        except OSError as error:  # the new checkpoint is there all the same
            log.warning("%s is no longer needed and stays: %s", found[each], error)


def step_of(path: Path) -> int | None:
    """Step of a checkpoint; None where there is none that can be read."""
    try:
        return int(describe(path)["step"])
    except (ValueError, OSError, KeyError, TypeError):
        return None


def mark_best(last: Path) -> None:
    """Makes best.ckpt the checkpoint that `last` is."""
    _also(last, last.with_name(BEST))


def _also(source: Path, target: Path) -> None:
    """Makes `target` another name of what `source` is."""
    aside = target.with_name(f".{target.name}.aside")
    aside.unlink(missing_ok=True)
    if source.is_symlink():
        aside.symlink_to(os.readlink(source))
    else:
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)
            fsync(aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def discard(path: Path) -> None:
    """Removes a half-written checkpoint, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# checking


def verify(path: str | Path) -> None:
    """Reads every byte of a checkpoint and compares it with the hashes recorded when it was written.

    A checkpoint without recorded hashes (of an older vtok, or a single file that was copied elsewhere) passes with a
    warning. A folder's files must also name no class that DeepSpeed does not write: it unpickles them.
    Raises: CheckpointError naming the file, and the checkpoint to go back to.
    """
    path = Path(path)
    try:
        _verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}.{_way_back(path)}") from error


def _verify(path: Path) -> None:
    known = recorded(path.parent)
    if known is None:
        log.warning("%s: no hashes were recorded beside it, so it is not checked", path)
    about = path / ABOUT if path.is_dir() else path
    if not about.is_file():
        raise CheckpointError(f"{path} is not there, or not whole")
    if known is not None and (digest := sha256(about)) not in known:
        raise CheckpointError(
            f"{about} is damaged: its sha256 {digest[:16]}... is none of those written here ({path.parent / RECORD})"
        )
    if not path.is_dir():
        return
    stated = describe(path).get("files")
    if stated is not None:
        missing = sorted(name for name in stated if not (path / name).is_file())
        if missing:
            raise CheckpointError(f"{path} is not whole: {missing[0]} is missing")
        found = hashes({name: path / name for name in stated})
        for name, digest in found.items():
            if digest != stated[name]:
                raise CheckpointError(
                    f"{path / name} is damaged: its sha256 is {digest[:16]}..., written was {stated[name][:16]}..."
                )
    check_shards(path)


def _way_back(path: Path) -> str:
    """What to do instead of going on from a damaged checkpoint."""
    others = available(path.parent)
    for name in sorted(others, key=lambda each: (each not in (PREVIOUS, BEST), -(others[each] or 0))):
        other, step = path.with_name(name), others[name]
        if step is None or name in (path.name, LAST) or other.resolve() == path.resolve():
            continue
        try:
            _verify(other)
        except (ValueError, OSError):
            continue
        run, which = path.parent.parent, name.removesuffix(".ckpt") if name in (PREVIOUS, BEST) else step
        back = f"python -m vtok.training.checkpoints {run} --use {which}"
        return f" {other} (step {step}) is whole: go back to it with `{back}`"
    return " No other whole checkpoint is there: start again, or with init_from=EXPORT from an export of this run"


# names


def available(folder: Path) -> dict[str, int | None]:
    """{file name: step} of a run's checkpoints: last, previous, best, then by step; None: it cannot be read."""
    named = {name: step_of(folder / name) for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()}
    others = _by_step(folder, RECENT) | _by_step(folder, KEPT)
    return named | dict(sorted(others.items(), key=lambda item: item[1]))


def _by_step(folder: Path, names: str) -> dict[str, int]:
    """{file name: step} of those that carry their step in their name."""
    found = {path.name: path.stem.rpartition("-")[2] for path in folder.glob(f"{names.partition('-')[0]}-*.ckpt")}
    return {name: int(digits) for name, digits in found.items() if digits.isdecimal()}


def find(folder: Path, which: str | int) -> Path:
    """The checkpoint of a run's folder of that name: "last", "previous", "best" (the last where no best was kept), or a
    step.

    Raises: CheckpointError for another name, or where there is none, naming those that are there.
    """
    word = str(which)
    if word in ("last", "previous", "best"):
        names = [f"{word}.ckpt", *([LAST] if word == "best" else [])]
    elif word.isdecimal():
        names = [name for name, step in reversed(available(folder).items()) if step == int(word)]
    else:
        names = []
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is not None:
        return path
    there = available(folder)
    if not there:
        raise CheckpointError(f"{folder.parent} has no checkpoint yet: {folder / LAST} does not exist; train it first")
    kinds = (LAST, PREVIOUS, BEST)
    told = [f"{name.removesuffix('.ckpt')} (step {step})" for name, step in there.items() if name in kinds]
    told += [f"step {step}" for step in sorted({step for name, step in there.items() if step and name not in kinds})]
    problem = f"{folder.parent} has no checkpoint {'of step ' * word.isdecimal()}{word}"
    if word not in ("last", "previous", "best") and not word.isdecimal():
        problem = f"which={which!r} is unknown; choose best, last, previous or a step"
    raise CheckpointError(f"{problem}; there are {', '.join(told)}")


# reading


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, elapsed_s, world_size, strategy, window ... Cheap for any size.

    Raises: FileNotFoundError, or CheckpointError for what is not a checkpoint of vtok.
    """
    path = Path(path)
    if path.is_dir():
        about = path / ABOUT
        if not about.is_file():
            raise CheckpointError(f"{path} is not a checkpoint of vtok: it has no {ABOUT}")
        try:
            return dict(json.loads(about.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{about} is damaged: {error}") from error
    about = _file(path, mmap=True).get("vtok")
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} is not a checkpoint of vtok: it does not say of which step it is")
    return about


def read(path: str | Path, *, moments: bool = True) -> dict[str, Any]:
    """A whole checkpoint of any kind: the run's own state, "state_dict", and what the optimizer keeps: a file's
    "optimizer_states" with "optimizer_names", a folder's "moments" by parameter name.

    Raises: FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        describe(path)
        return read_shards(path, moments=moments)
    return _file(path)


def _file(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        whole["state_dict"]
        return whole
    except Exception as error:
        raise CheckpointError(f"{path} is not a checkpoint of vtok: {str(error)[:500]}") from error


def consolidate(path: str | Path) -> dict[str, Tensor]:
    """The full state dict of a checkpoint, float tensors in float32: `model.*` and the objective's trained parts.

    Args:
        path: a file or, for a run with DeepSpeed, a folder of shards (of any world size).
    """
    return _whole(read(path, moments=False)["state_dict"])


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone().float() if v.is_floating_point() else v.detach().clone() for k, v in state.items()}


def model_weights(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The shipped model's float32 state dict (no `model.` prefix): averaged weights where the run kept them.

    Args:
        ema: False for the raw weights of the last step.
    """
    checkpoint = read(path, moments=False)
    state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    return _whole(state | ((checkpoint.get("ema") or {}) if ema else {}))


# going on elsewhere


def moments_of(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """{parameter name: {"exp_avg", "exp_avg_sq", "step"}} of a checkpoint; None where it does not tell the names."""
    if "moments" in checkpoint:
        return checkpoint["moments"]
    names = checkpoint.get("optimizer_names")
    if names is None or not checkpoint.get("optimizer_states"):
        return None
    state = checkpoint["optimizer_states"][0]["state"]
    return {name: state[i] for i, name in enumerate(n for group in names for n in group) if i in state}


def adapt(
    checkpoint: dict[str, Any], *, names: Sequence[Sequence[str]], groups: list[dict[str, Any]], accumulate: int
) -> None:
    """Makes a checkpoint, in place, one of the run that goes on, before Lightning takes it.

    Args:
        names: of the parameters of each optimizer group, as the run has them now.
        groups: the optimizer's `param_groups` state, as of a new optimizer: settings that changed since take effect.
        accumulate: batches of a process to a step, now: Lightning counts batches, and steps where a count is full.
    Raises: CheckpointError where the optimizer's state belongs to other parameters.
    """
    moments = moments_of(checkpoint)
    if moments is not None:
        flat = [name for group in names for name in group]
        check_trained(moments, flat)
        state = {
            i: {**{k: moments[n][k] for k in MOMENTS}, "step": torch.as_tensor(float(moments[n]["step"]))}
            for i, n in enumerate(flat)
            if n in moments
        }
        checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
        checkpoint.pop("moments", None)
    recount(checkpoint, accumulate)


def recount(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Counts a checkpoint's batches anew, in place, where another number of them makes a step."""
    done = checkpoint["vtok"]
    more = done["step"] * accumulate - done["micro"]
    if not more:
        return
    done["micro"] += more
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += more


# by hand


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vtok.training.checkpoints", description="check the checkpoints of a run"
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument(
        "--use", metavar="CHECKPOINT", help="previous, best or a step: make it last.ckpt, from which the run goes on"
    )
    asked = parser.parse_args(argv)
    folder = asked.run / "checkpoints"
    if not folder.is_dir():
        raise SystemExit(f"error: {folder} is not there: name a run directory")
    damaged = False
    for name in available(folder):
        path = folder / name
        try:
            _verify(path)
            about = describe(path)
            word = f"whole, step {about['step']}, of {about.get('world_size')} process(es), {about.get('strategy')}"
        except CheckpointError as error:
            word, damaged = f"DAMAGED: {error}", True
        print(f"{name:14} {word}")
    if asked.use:
        if (asked.run / "lock").exists():
            raise SystemExit(f"error: {asked.run} is in use (there is a lock): end the run first, or delete the lock")
        try:
            source = find(folder, asked.use)
            _verify(source)
        except CheckpointError as error:
            raise SystemExit(f"error: {error}") from None
        _also(source, folder / LAST)
        print(f"{folder / LAST} is now {source.name}: the run goes on from step {describe(source)['step']}")
    elif damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
