"""Work that turns shards into shards: one output tar for every input tar, in many processes, resumed after any kill.

1. plan: the input shards. What the result depends on stands in a claim, a json file with a name of the command's own.
2. run: N processes take whole shards. A tar is written aside, synced and renamed, then its record; a finished one
   (checked by its hash) is kept.
3. finish: once all shards are there, whoever ends last writes `index.json` and `rejected.jsonl`.

    OUT/<name>.tar  index.json  rejected.jsonl  <claim>.json  .shards/<name>.json
    (OUT/train/, OUT/val/ where the input is a whole packing)
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vtok.data.health import Health, TooManyBroken
from vtok.data.pack import _add, _Hashing, _sync_folder, write_atomically, write_shared
from vtok.data.sources import Shard, open_sources
from vtok.data.workers import WorkerError, Workers, cores

log = logging.getLogger(__name__)
SCHEMA = 1
RECORDS = ".shards"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Job:
    """One input shard, and where what is made of it goes."""

    url: str
    name: str
    folder: str  # of the output: "" or a split
    samples: int | None
    num_bytes: int | None
    cache_dir: str = ""

    def shard(self) -> Shard:
        return Shard(self.url, self.name, self.samples, self.num_bytes)

    def tar(self, out: Path) -> Path:
        return out / self.folder / self.name

    def record(self, out: Path) -> Path:
        return out / RECORDS / self.folder / f"{self.name}.json"


@dataclass(frozen=True)
class Done:
    """What stands in the output folder. totals: of each count. outstanding: shards of other parts."""

    totals: dict[str, int]
    shards: int
    outstanding: int
    rejected: list[dict[str, Any]]


def plan(shards: str, *, cache_dir: str = "") -> list[Job]:
    """The jobs for what `shards` names. Raises ValueError where it names none, or two of one name."""
    root = Path(shards)
    inner = [split for split in SPLITS if (root / split / "index.json").is_file()]
    parts = [(split, str(root / split)) for split in inner] if inner and not (root / "index.json").exists() else []
    jobs = []
    for folder, where in parts or [("", shards)]:
        (found,) = open_sources(where, cache_dir=cache_dir, setting="SHARDS")
        jobs += [Job(s.url, s.name, folder, s.samples, s.num_bytes, cache_dir) for s in found]
    twice = [name for (_, name), count in Counter((job.folder, job.name) for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"SHARDS={shards!r} holds two shards {twice[0]!r}: give each folder its own --out")
    return jobs


class TarWriter:
    """A tar that is written aside, whatever its size, and takes its name once it is whole. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> TarWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")
        self._hashed = _Hashing(self._file)
        self._tar = tarfile.open(fileobj=self._hashed, mode="w|", format=tarfile.GNU_FORMAT)  # type: ignore[arg-type]
        return self

    def add(self, name: str, content: bytes) -> None:
        _add(self._tar, name, content)

    def close(self, *, keep: bool) -> dict[str, Any]:
        """The "bytes" and "sha256" of the tar under its name; 0 and None without keep, and then nothing is there."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        if not keep:
            return {"bytes": 0, "sha256": None}
        os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)
        return {"bytes": self.path.stat().st_size, "sha256": self._hashed.sha256.hexdigest()}

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._tar.close()  # its buffer would be written when it is collected, to a closed file
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


class Ledger:
    """How far the work in a folder is.

    Args:
        claim: name of the file that says what the folder is for. counts: what a record counts, "samples" first.
        made: what the shards hold, for messages.
    """

    def __init__(self, out: Path, jobs: list[Job], *, claim: str, counts: tuple[str, ...], made: str) -> None:
        self.out, self.jobs, self.counts, self.made = out, jobs, counts, made
        self._claim = out / claim

    def claim(self, fixed: dict[str, Any], numerics: dict[str, Any]) -> None:
        """Make the folder this work's, or refuse.

        Args:
            fixed: what the result depends on, plain values. numerics: what may change its last bits: only warned of.
        Raises: ValueError naming what differs from what the folder was begun with.
        """
        inputs = [(job.folder, job.name, job.samples, job.num_bytes) for job in self.jobs]
        fixed = {**fixed, "inputs": hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}
        path = self._claim
        if not path.exists():
            strangers = [p for folder in ("", *SPLITS) for p in (self.out / folder).glob("*.tar")]
            if strangers:
                raise ValueError(
                    f"{self.out} holds shards of something else ({strangers[0].name}); choose another --out"
                )
            write_shared(path, {"schema": SCHEMA, "fixed": fixed, "numerics": numerics, "shards": len(self.jobs)})
        try:
            there = json.loads(path.read_bytes())
            before, with_ = there["fixed"], there["numerics"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not readable ({error!r}); choose another --out") from error
        now = json.loads(json.dumps(fixed))
        differ = [f"{key}={before.get(key)!r} there, {now[key]!r} now" for key in now if before.get(key) != now[key]]
        if differ:
            raise ValueError(
                f"{self.out} holds {self.made} made otherwise: {'; '.join(differ)}. Choose another --out, or remove "
                "that folder"
            )
        if with_ != numerics:
            log.warning("%s was begun with %s, now it is %s: last bits may differ", self.out, with_, numerics)

    def run(
        self,
        function: Callable[..., dict[str, Any]],
        task: Callable[[Job], tuple[Any, ...]],
        *,
        part: tuple[int, int],
        workers: int,
        title: str,
        progress: bool = True,
    ) -> dict[str, int]:
        """Make what is left of a part; what this call counted.

        Args:
            function: a module's function of `task(job)`, lost and notify (`Workers.run`); it writes tar and record, and
                returns the record.
        Raises: ValueError where a shard failed; finished ones are kept.
        """
        with self._locked(part):
            mine = self.jobs[part[0] :: part[1]]
            self._sweep(mine)
            left = [job for job in mine if self.finished(job) is None]
            if len(left) < len(mine):
                log.info("%d of %d shards are finished already", len(mine) - len(left), len(mine))
            try:
                with Workers(workers, progress=progress) as pool:
                    total = sum(job.samples or 0 for job in left)
                    records = pool.run(function, [task(job) for job in left], title=title, total=total)
            except (WorkerError, TooManyBroken) as error:
                where, what = self._write_rejected(), str(error).partition(". All are listed")[0]
                if TooManyBroken.__name__ in f"{type(error).__name__} {what}":
                    what += f". Rejected samples so far: {where}. Repair the shards, or raise --max-bad-fraction"
                raise ValueError(f"{what}. Finished shards are kept: run the command again to go on") from error
        return {name: sum(record[name] for record in records) for name in self.counts} if records else {}

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The record of a shard that is there with the bytes its record states, else None."""
        record = self._read_record(job)
        if record is None or "sha256" not in record:
            return None
        try:
            if record["samples"] and _sha256(job.tar(self.out)) != record["sha256"]:
                return None
        except OSError:
            return None
        return record

    def finish(self, index: Callable[[list[dict[str, Any]]], dict[str, Any]], *, limit: float) -> Done:
        """Write the indices when every shard is there; several parts may do so at once, with equal bytes.

        Args:
            index: an index.json without "schema" and the totals, of the records of a folder's shards. limit: share of
                the samples that may be rejected.
        Raises: ValueError past that, or where nothing is left.
        """
        records = [(job, self._read_record(job)) for job in self.jobs]
        done = [(job, record) for job, record in records if record is not None and "sha256" in record]
        rejected = [reject for _, record in done for reject in record["rejected"]]
        total = {name: sum(record[name] for _, record in done) for name in self.counts}
        result = Done(total, len(done), len(self.jobs) - len(done), rejected)
        if result.outstanding:
            return result
        where = self._write_rejected()
        lost = sum(r["samples"] for r in rejected)
        seen = total["samples"] + lost
        if lost > max(limit * seen, 2 if limit > 0 else 0):
            raise ValueError(
                f"{lost} of {seen} samples were rejected, above --max-bad-fraction {limit}; listed in {where}: "
                "repair the shards, or raise the limit and run again"
            )
        if not total["samples"]:
            raise ValueError(f"no sample could be used; the reasons are in {where}")
        for folder in sorted({job.folder for job in self.jobs}):
            rows = [record for job, record in done if job.folder == folder and record["samples"]]
            totals = {name: sum(row[name] for row in rows) for name in (*self.counts, "bytes")}
            facts = index(rows)
            value = {"schema": SCHEMA, "kind": facts["kind"], **totals, **facts}
            write_shared(self.out / folder / "index.json", value)
        return result

    def _read_record(self, job: Job) -> dict[str, Any] | None:
        try:
            record = json.loads(job.record(self.out).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    @contextmanager
    def _locked(self, part: tuple[int, int]) -> Iterator[None]:
        """One process per part: a byte of the claim is locked; the kernel lets go however the process ends."""
        with open(self._claim, "r+b") as handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part[1] * part[1] + part[0])
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(
                    f"another process makes part {part[0]}/{part[1]} of {self.out}; wait for it"
                ) from error
            except OSError:  # a file system without locks: renaming keeps two writers harmless, if wasteful
                log.debug("no file locks under %s", self.out)
            yield

    def _sweep(self, jobs: list[Job]) -> None:
        """Remove what killed attempts left half-written for these shards."""
        for job in jobs:
            for half in (job.tar(self.out), job.record(self.out)):
                for temporary in half.parent.glob(f".{half.name}.*.tmp"):
                    temporary.unlink(missing_ok=True)

    def _write_rejected(self) -> Path:
        records = [self._read_record(job) or {} for job in self.jobs]
        lines = [json.dumps(reject) + "\n" for record in records for reject in record.get("rejected", [])]
        write_shared(self.out / "rejected.jsonl", "".join(lines).encode())
        return self.out / "rejected.jsonl"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def health(command: str, limit: float) -> Health:
    """This process's count of broken samples, over all its shards; `health.cache_clear()` begins another."""
    return Health(max_bad_fraction=limit, quarantine=None, seed=0, where=command)


class Rejected(NamedTuple):
    """A sample that nothing could be made of. lost: samples it stands for (the rest of a damaged tar)."""

    reason: str
    lost: int = 1


def write_results(
    job: Job,
    out: Path,
    results: Iterable[tuple[str, Any]],
    add: Callable[[TarWriter, str, Any], None],
    *,
    command: str,
    limit: float,
) -> dict[str, Any]:
    """The tar of one shard, from (key, result or Rejected) of its samples; what its record says of it: `rejected`, and
    name, size and hash of the tar where it holds anything.

    Args:
        add: writes a result into the tar. limit: of the share of broken samples of this process.
    Raises: TooManyBroken past that. OSError where the tar cannot be written.
    """
    state, threads, rejected, kept = health(command, limit), torch.get_num_threads(), [], 0
    torch.set_num_threads(1)  # sums depend on the number of threads: the same results with any number of workers
    try:
        with TarWriter(job.tar(out)) as tar:
            for key, result in results:
                if isinstance(result, Rejected):
                    rejected.append({"shard": job.name, "key": key, "reason": result.reason, "samples": result.lost})
                    state.bad(None, job.name, key, result.reason, lost=result.lost)
                    continue
                state.good()
                add(tar, key, result)
                kept += 1
            return {**tar.close(keep=kept > 0), "rejected": rejected}
    except TooManyBroken as error:
        write_failed(job, out, error, rejected)
        raise
    finally:
        torch.set_num_threads(threads)


def write_failed(job: Job, out: Path, error: TooManyBroken, rejected: list[dict[str, Any]]) -> None:
    """Note what was rejected of a shard that is given up, so that the user can be told."""
    write_atomically(job.record(out), {"name": job.name, "failed": str(error), "rejected": rejected})


# ---- what the commands share


def add_arguments(parser: argparse.ArgumentParser, *, bad_fraction: str) -> None:
    """--workers, --device, --part, --max-bad-fraction (whose default is told), --cache-dir, --quiet."""
    add = parser.add_argument
    add("--workers", type=int, help="processes (default: one a core, on CUDA one a device)")
    add("--device", default="cpu", help="cpu, cuda (all) or cuda:N (default: cpu)")
    add("--part", default="0/1", metavar="I/N", help="every N-th shard from the I-th on, for array jobs")
    add("--max-bad-fraction", type=float, help=f"share of samples that may fail (default: {bad_fraction})")
    add("--cache-dir", default="", help="local copies of https: and pipe: shards")
    add("--quiet", action="store_true", help="no progress bar")


def parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part {text}: expected I/N with I from 0 to N - 1, as in 0/8 ... 7/8")
    return int(match[1]), int(match[2])


def check_part(part: tuple[int, int]) -> None:
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: the first number counts from 0 and lies below the second")


def parse_rate(text: str) -> float | None:
    """Frames per second; None for `source`."""
    if text == "source":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--fps {text!r} is not a number of frames per second, nor `source`") from error


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"{option} {text!r} is not HxW in pixels (height first); e.g. {option} 128x128")
    return int(match[1]), int(match[2])


def devices_of(device: str) -> list[str]:
    """The devices that processes are dealt to. Raises ValueError for what is not there."""
    if device == "cpu":
        return ["cpu"]
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device {device!r} is not one of cpu, cuda, cuda:N")
    count = torch.cuda.device_count()
    if not count or (match[1] and int(match[1]) >= count):
        raise ValueError(f"--device {device!r}: this machine has {count} CUDA devices")
    return [device] if match[1] else [f"cuda:{n}" for n in range(count)]


def default_workers(device: str, devices: list[str]) -> int:
    return cores() if device == "cpu" else len(devices)


def print_rest(out: Path, rejected: list[dict[str, Any]], outstanding: int) -> None:
    """What was left out, by reason, and what is still to come."""
    reasons = Counter(re.sub(r"'[^']*'|-?\d+(\.\d+)?", "*", r["reason"])[:100] for r in rejected)
    for reason, count in reasons.items():
        print(f"  rejected {count}: {reason}")
    if outstanding:
        print(f"  {outstanding} shards of other parts are not there yet; the last part writes the index")
    elif rejected:
        print(f"  each is listed in {out / 'rejected.jsonl'}")
