"""`vtok tokenize`: shards of video into shards of token ids, what autoregressive models train on.

1. plan: one output shard for every input shard; what the result depends on stands in `tokenizing.json`.
2. encode: N processes take whole shards. Whole videos, at the frame rate, size and centre crop of validation, as
   `vtok.token_coding` does.
3. A shard is written aside and renamed, then its record; a finished one (checked by its hash) is kept.
4. merge: once all shards are there, whoever finishes last writes `index.json` and `rejected.jsonl`.

    OUT/<name>.tar  index.json  rejected.jsonl  tokenizing.json  .shards/<name>.json
    (OUT/train/, OUT/val/ where SHARDS is a whole packing)

The formats are those of `vtok.data.token_reader`; the model's identity goes with the ids.

Letters: B clips, T frames, H height, W width, K tokens, Q ids a token, G groups.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from vtok.config import DataConfig
from vtok.config import load as load_config
from vtok.data.health import Health, TooManyBroken
from vtok.data.pack import write_atomically
from vtok.data.sources import Shard, ShardReader, open_sources
from vtok.data.token_reader import IDS, KIND, TokenizerIdentity
from vtok.data.workers import Notify, WorkerError, Workers
from vtok.loading import export_folder, identify, is_run, load_any
from vtok.token_coding import Encoder, Rejected, Settings

log = logging.getLogger(__name__)
SCHEMA = 1
RECORDS = ".shards"
SPLITS = ("train", "val", "test")
COUNTS = ("samples", "frames", "tokens")


@dataclass(frozen=True)
class Job:
    """One input shard, and where its tokens go."""

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
class Summary:
    """What stands in the output folder, and how fast this call was. outstanding: shards of other parts."""

    samples: int
    frames: int
    tokens: int
    shards: int
    outstanding: int
    rejected: list[dict[str, Any]]
    seconds: float
    done_now: dict[str, int]  # samples, frames, tokens that this call encoded


def tokenize(
    shards: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    fps: float | None | str = "model",
    size: tuple[int, int] | None = None,
    clip_frames: int | None = None,
    budget: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
    part: tuple[int, int] = (0, 1),
    max_bad_fraction: float | None = None,
    cache_dir: str = "",
    progress: bool = True,
) -> Summary:
    """Token shards of video shards, resuming what an earlier call left in `out`.

    Args:
        shards: a folder with index.json, a whole packing (train/, val/ ...), or what `data.shards` may be.
        model: export folder, Hub repository or run directory of a discrete tokenizer.
        fps: "model": as it was trained; None: the source's own. size: (height, width); None: as it was trained.
        clip_frames: cut videos into samples of so many frames, each encoded on its own; None: whole videos.
        budget: tokens kept of each group; None: all.
        batch_size: clips of the model's length encoded at once; None: the training's data.val_batch_size.
        workers: processes; None: one a core, on CUDA one a device; 0: this process. More than there are devices share.
        device: cpu, cuda (every device) or cuda:N.
        part: (i, n): every n-th shard from the i-th on.
        max_bad_fraction: share of the samples that may be rejected; None: the training's data.max_bad_fraction.
    Raises: ValueError for bad settings or inputs, a model without codebooks, an `out` that holds something else, or
        too many rejected samples.
    """
    began, out = time.monotonic(), Path(out)
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: the first number counts from 0 and lies below the second")
    loaded = load_any(model)
    trained = trained_data(model)
    settings = Settings(
        fps=trained.fps if isinstance(fps, str) else fps,
        size=size or (trained.size[0], trained.size[1]),
        crop="none" if trained.crop == "none" else "center",
        clip_frames=clip_frames,
        budget=budget,
        batch_size=trained.val_batch_size if batch_size is None else batch_size,
        map=trained.map,
    )
    Encoder(loaded, settings)  # bad settings fail before any work
    who = identity_of(loaded)
    jobs = plan(str(shards), cache_dir=cache_dir)
    limit = trained.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    if not 0 <= limit <= 1:
        raise ValueError(f"max_bad_fraction={limit} is a share of the samples, 0 to 1")
    devices = _devices(device)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if device == "cpu" else len(devices)
    for cached in (_encoder, _health):  # of an earlier call in this process
        cached.cache_clear()
    _claim(out, jobs, settings, who)
    with _lock(out, part):
        mine = jobs[part[0] :: part[1]]
        _sweep(mine, out)
        left = [job for job in mine if finished(job, out) is None]
        if len(left) < len(mine):
            log.info("%d of %d shards are finished already", len(mine) - len(left), len(mine))
        tasks = [(job, out, str(model), who.model_id, settings, devices, limit) for job in left]
        total = sum(job.samples or 0 for job in left)
        try:
            with Workers(workers, progress=progress) as pool:
                made = pool.run(write_shard, tasks, title="tokenizing clips", total=total)
        except (WorkerError, TooManyBroken) as error:
            where, what = _write_rejected(jobs, out), str(error).partition(". All are listed")[0]
            if TooManyBroken.__name__ in f"{type(error).__name__} {what}":
                what += f". Rejected samples so far: {where}. Repair the shards, or raise --max-bad-fraction"
            raise ValueError(f"{what}. Finished shards are kept: run the command again to go on") from error
    now = Counter[str]()
    for record in made:
        now.update({name: record[name] for name in COUNTS})
    return _merge(jobs, out, who, settings, limit=limit, seconds=time.monotonic() - began, now=dict(now))


def trained_data(model: str | Path) -> DataConfig:
    """The `data:` node a model was trained with. Raises ValueError where the export has no training.yaml."""
    folder = Path(model)
    path = folder / "config.yaml" if is_run(folder) else export_folder(model) / "training.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is missing: which frames, size and crop the model was trained on is not known")
    return load_config(path).data


def identity_of(model: Any) -> TokenizerIdentity:
    """What token shards say of the tokenizer that made them."""
    sizes = tuple(int(n) for n in model.codebook_sizes)
    factors = getattr(model, "index_factors", ()) or tuple((size,) for size in sizes)
    who = identify(model)
    return TokenizerIdentity(who.model_id, who.weights_sha256.hex(), sizes, tuple(tuple(each) for each in factors))


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
        raise ValueError(f"SHARDS={shards!r} holds two shards {twice[0]!r}: tokenize each folder into its own --out")
    return jobs


def finished(job: Job, out: Path) -> dict[str, Any] | None:
    """The record of a shard that is there with the bytes its record states, else None."""
    record = _read_record(job, out)
    if record is None or "sha256" not in record:
        return None
    try:
        if record["samples"] and hashlib.sha256(job.tar(out).read_bytes()).hexdigest() != record["sha256"]:
            return None
    except OSError:
        return None
    return record


def _read_record(job: Job, out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(job.record(out).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


@lru_cache(maxsize=1)
def _encoder(model: str, model_id: str, settings: Settings, device: str) -> Encoder:
    """This process's encoder: the model is read once, not once a shard."""
    loaded = load_any(model)
    if identify(loaded).model_id != model_id:
        raise ValueError(
            f"{model} changed: it was {model_id} when tokenizing began, and is {identify(loaded).model_id}"
        )
    return Encoder(loaded.to(device), settings)


@lru_cache(maxsize=1)
def _health(limit: float) -> Health:
    """This process's count of broken samples, over all its shards."""
    return Health(max_bad_fraction=limit, quarantine=None, seed=0, where="vtok tokenize")


def write_shard(
    job: Job,
    out: Path,
    model: str,
    model_id: str,
    settings: Settings,
    devices: list[str],
    limit: float,
    lost: dict[str, str],
    notify: Notify,
) -> dict[str, Any]:
    """Tokenize one shard; returns its record.

    Args:
        lost: {key: reason} of samples not to touch again. notify: called with each sample's key before it is touched.
    Raises: ValueError past the share of broken samples. OSError where the shard cannot be read or written.
    """
    number = (multiprocessing.current_process()._identity or (0,))[0]  # 1, 2 ... in worker processes
    encoder = _encoder(model, model_id, settings, devices[number % len(devices)])
    health, threads = _health(limit), torch.get_num_threads()
    reader = ShardReader([job.shard()], cache_dir=job.cache_dir, media=encoder.view.media)
    rejected: list[dict[str, Any]] = []
    counts = Counter[str]()
    longest = 0
    file = io.BytesIO()  # ids are small: a shard of them fits in memory
    torch.set_num_threads(1)  # sums depend on the number of threads: the same ids with any number of workers
    try:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for key, result in encoder.shard(reader, 0, lost=lost, notify=notify):
                if isinstance(result, Rejected):
                    rejected.append({"shard": job.name, "key": key, "reason": result.reason, "samples": result.lost})
                    health.bad(None, job.name, key, result.reason, lost=result.lost)
                    continue
                health.good()
                for sample in result:
                    _add(archive, f"{sample.key}.{IDS}", npy(sample.ids, encoder.dtype))
                    facts = {**sample.facts, "tokens": sample.tokens._asdict()}
                    _add(archive, f"{sample.key}.json", (json.dumps(facts) + "\n").encode())
                    counts.update(samples=1, frames=sample.tokens.frames, tokens=len(sample.ids))
                    longest = max(longest, len(sample.ids))
    except TooManyBroken as error:
        write_atomically(job.record(out), {"name": job.name, "failed": str(error), "rejected": rejected})
        raise
    finally:
        torch.set_num_threads(threads)
    data = file.getvalue() if counts["samples"] else b""
    record = {
        "name": job.name,
        **{name: counts[name] for name in COUNTS},
        "longest": longest,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest() if data else None,
        "rejected": rejected,
    }
    if data:
        write_atomically(job.tar(out), data)
    write_atomically(job.record(out), record)
    return record


def npy(ids: np.ndarray, dtype: str) -> bytes:
    """A .npy file of ids [K, Q]; [K] where there is one id a token."""
    file = io.BytesIO()
    np.save(file, (ids[:, 0] if ids.shape[1] == 1 else ids).astype(dtype), allow_pickle=False)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # a plain file: mode 644, time 0, owner 0 without a name
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _claim(out: Path, jobs: list[Job], settings: Settings, who: TokenizerIdentity) -> None:
    """Make `out` this tokenizing's folder, or refuse; warn where other software may give other ids at ties."""
    inputs = [(job.folder, job.name, job.samples, job.num_bytes) for job in jobs]
    fixed = {
        "tokenizer": who.model_id,
        **{name: value for name, value in asdict(settings).items() if name != "batch_size"},
        "inputs": hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16],
    }
    numerics = {"batch_size": settings.batch_size, "torch": torch.__version__, "av": av.__version__}
    path = out / "tokenizing.json"
    if not path.exists():
        strangers = [p for folder in ("", *SPLITS) for p in (out / folder).glob("*.tar")]
        if strangers:
            raise ValueError(f"{out} holds shards of something else ({strangers[0].name}); choose another --out")
        write_atomically(path, {"schema": SCHEMA, "fixed": fixed, "numerics": numerics, "shards": len(jobs)})
    try:
        there = json.loads(path.read_bytes())
        before, made = there["fixed"], there["numerics"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not readable ({error!r}); choose another --out") from error
    now = json.loads(json.dumps(fixed))
    differ = [f"{key}={before.get(key)!r} there, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if differ:
        raise ValueError(
            f"{out} holds tokens made otherwise: {'; '.join(differ)}. Choose another --out, or remove that folder"
        )
    if made != numerics:
        log.warning("%s was begun with %s, now it is %s: ids at ties may differ", out, made, numerics)


@contextmanager
def _lock(out: Path, part: tuple[int, int]) -> Iterator[None]:
    """One process per part: a byte of tokenizing.json is locked; the kernel lets go however the process ends."""
    with open(out / "tokenizing.json", "r+b") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part[1] * part[1] + part[0])
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another process makes part {part[0]}/{part[1]} of {out}; wait for it") from error
        except OSError:  # a file system without locks: renaming keeps two writers harmless, if wasteful
            log.debug("no file locks under %s", out)
        yield


def _sweep(jobs: list[Job], out: Path) -> None:
    """Remove what killed attempts left half-written for these shards."""
    for job in jobs:
        for half in (job.tar(out), job.record(out)):
            for temporary in half.parent.glob(f".{half.name}.*.tmp"):
                temporary.unlink(missing_ok=True)


def _write_rejected(jobs: list[Job], out: Path) -> Path:
    records = [_read_record(job, out) or {} for job in jobs]
    lines = [json.dumps(reject) + "\n" for record in records for reject in record.get("rejected", [])]
    write_atomically(out / "rejected.jsonl", "".join(lines).encode())
    return out / "rejected.jsonl"


def _merge(
    jobs: list[Job],
    out: Path,
    who: TokenizerIdentity,
    settings: Settings,
    *,
    limit: float,
    seconds: float,
    now: dict[str, int],
) -> Summary:
    """Write the indices when every shard is there; several parts may do so at once, with equal bytes."""
    records = [(job, _read_record(job, out)) for job in jobs]
    done = [(job, record) for job, record in records if record is not None and "sha256" in record]
    rejected = [reject for _, record in done for reject in record["rejected"]]
    total = {name: sum(record[name] for _, record in done) for name in COUNTS}
    summary = Summary(
        **total, shards=len(done), outstanding=len(jobs) - len(done), rejected=rejected, seconds=seconds, done_now=now
    )
    if summary.outstanding:
        return summary
    where = _write_rejected(jobs, out)
    lost, seen = sum(r["samples"] for r in rejected), total["samples"] + sum(r["samples"] for r in rejected)
    if lost > max(limit * seen, 2 if limit > 0 else 0):
        raise ValueError(
            f"{lost} of {seen} samples were rejected, above --max-bad-fraction {limit} (data.max_bad_fraction of the "
            f"training); they are listed in {where}. Repair the shards, or raise the limit and run again"
        )
    if not total["samples"]:
        raise ValueError(f"no sample could be used; the reasons are in {where}")
    for folder in sorted({job.folder for job in jobs}):
        rows = [record for job, record in done if job.folder == folder and record["samples"]]
        entries = [{key: row[key] for key in (*COUNTS, "name", "longest", "bytes", "sha256")} for row in rows]
        index = {
            "schema": SCHEMA,
            "kind": KIND,
            **{name: sum(row[name] for row in rows) for name in (*COUNTS, "bytes")},
            "dtype": who.dtype,
            "tokenizer": asdict(who),
            "settings": {name: value for name, value in asdict(settings).items() if name != "batch_size"},
            "shards": entries,
        }
        write_atomically(out / folder / "index.json", index)
    return summary


def _devices(device: str) -> list[str]:
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


def main(argv: list[str]) -> int:
    """`vtok tokenize SHARDS --model EXPORT --out DIR`."""
    parser = argparse.ArgumentParser(prog="vtok tokenize", description="Shards of token ids for autoregressive models.")
    add = parser.add_argument
    add("shards", help="folder of `vtok shards` (one split, or all), or what data.shards may be")
    add("--model", required=True, help="export folder, Hub repository or run directory of a discrete tokenizer")
    add("--out", required=True, type=Path, metavar="DIR", help="where token shards go; run again to resume or to check")
    add("--fps", help="frames per second, or `source` (default: as the model was trained)")
    add("--size", help="HxW (default: as the model was trained)")
    add("--clip-frames", help="cut into samples of N frames, or `model` (default: whole videos)")
    add("--budget", type=int, metavar="K", help="keep the first K tokens of each group (default: all)")
    add("--batch-size", type=int, help="clips of the model's length at once (default: data.val_batch_size)")
    add("--workers", type=int, help="processes (default: one a core, on CUDA one a device)")
    add("--device", default="cpu", help="cpu, cuda (all) or cuda:N (default: cpu)")
    add("--part", default="0/1", metavar="I/N", help="every N-th shard from the I-th on, for array jobs")
    add("--max-bad-fraction", type=float, help="share of samples that may fail (default: the training's)")
    add("--cache-dir", default="", help="local copies of https: and pipe: shards")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    match = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if match is None:
        raise ValueError(f"--part {args.part}: expected I/N with I from 0 to N - 1, as in 0/8 ... 7/8")
    done = tokenize(
        args.shards,
        args.out,
        model=args.model,
        fps=_rate(args.fps),
        size=_size(args.size),
        clip_frames=_clip_frames(args.clip_frames, args.model),
        budget=args.budget,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        part=(int(match[1]), int(match[2])),
        max_bad_fraction=args.max_bad_fraction,
        cache_dir=args.cache_dir,
        progress=not args.quiet,
    )
    print(f"{args.out}: {done.samples} clips, {done.frames} frames, {done.tokens} tokens in {done.shards} shards")
    speed = ", ".join(
        f"{done.done_now.get(name, 0) / done.seconds:.1f} {word}/s"
        for name, word in zip(COUNTS, ("clips", *COUNTS[1:]))
    )
    print(f"  {done.done_now.get('samples', 0)} clips now, in {done.seconds:.1f} s: {speed}")
    for reason, count in Counter(
        re.sub(r"'[^']*'|-?\d+(\.\d+)?", "*", r["reason"])[:100] for r in done.rejected
    ).items():
        print(f"  rejected {count}: {reason}")
    if done.outstanding:
        print(f"  {done.outstanding} shards of other parts are not there yet; the last part writes the index")
    elif done.rejected:
        print(f"  each is listed in {args.out / 'rejected.jsonl'}")
    return 0


def _rate(text: str | None) -> float | None | str:
    if text is None:
        return "model"
    if text == "source":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"--fps {text!r} is not a number of frames per second, nor `source`") from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"--size {text!r} is not HxW in pixels (height first); e.g. --size 128x128")
    return int(match[1]), int(match[2])


def _clip_frames(text: str | None, model: str) -> int | None:
    if text is None:
        return None
    if text == "model":
        return trained_data(model).num_frames
    if not text.isdecimal():
        raise ValueError(f"--clip-frames {text!r} is not a number of frames, nor `model`")
    return int(text)
