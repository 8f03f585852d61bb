"""`vtok shards`: videos, images and manifests into WebDataset shards that survive kills and say what they left out.

1. collect (`vtok.data.inputs`): folders, files and manifests become rows, one per wanted clip.
2. survey: every source is opened once, in parallel: size, duration, a hash of its ends.
3. plan: rows are cut into clips, named, split by source video and dealt to shards. Pure: every part of an array job
   and every later attempt arrives at the same plan; its fingerprint stands in `packing.json`.
4. pack (`vtok.data.pack`): N processes write one shard each; a finished shard is kept, whatever happens later.
5. merge: once all shards are there, whoever finishes last writes `index.json`, `split.json` and `rejected.jsonl`.

    OUT/packing.json  split.json  rejected.jsonl  .shards/<name>.json
    OUT/train/train-000000.tar ... index.json     OUT/val/val-000000.tar ... index.json
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
from rich.console import Console

from vtok.data.decode import VideoInfo, probe
from vtok.data.inputs import Inputs, Reject, Row, collect
from vtok.data.maps import open_map
from vtok.data.pack import Item, PackingError, Settings, Shard, finished, write_shard, write_shared
from vtok.data.stems import numbered, stems, utf8
from vtok.data.strict import DecodeError
from vtok.data.verify import verify
from vtok.data.workers import Notify, WorkerError, Workers, cores

logger = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
SCHEMA = 1
ENDS_BYTES = 4096  # of a source's beginning and end, hashed with its size: what tells two sources apart


@dataclass(frozen=True)
class Survey:
    """One opened source. content: hash of its size and ends. reason: why it cannot be used, "" when it can."""

    size: int = 0
    content: str = ""
    info: VideoInfo | None = None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a packing will hold, before anything is decoded."""

    settings: Settings
    shards: tuple[Shard, ...]
    rejected: tuple[Reject, ...]
    fingerprint: str


@dataclass(frozen=True)
class Summary:
    """What stands in the output folder. outstanding: shards that other parts still have to pack."""

    samples: dict[str, int]
    shards: int
    outstanding: int
    rejected: list[dict[str, Any]]
    seconds: float


def survey(path: Path) -> Survey:
    """What one source, or dense map, is; never raises for a bad one."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            digest.update(file.read(ENDS_BYTES))
            file.seek(max(0, size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
        if size == 0:
            return Survey(reason="0 bytes")
    except OSError as error:
        return Survey(reason=f"cannot read: {error.strerror or error}")
    try:
        if path.suffix.lower() == ".npy":
            open_map(path)
            return Survey(size, digest.hexdigest())
        return Survey(size, digest.hexdigest(), probe(path))
    except DecodeError as error:
        return Survey(size, digest.hexdigest(), reason=str(error))


def _survey_all(paths: list[Path], lost: dict[str, str], notify: Notify) -> list[Survey]:
    out = []
    for path in paths:
        notify(str(path))
        out.append(Survey(reason=lost[str(path)]) if str(path) in lost else survey(path))
    return out


def plan(sources: Inputs, surveys: dict[Path, Survey], settings: Settings) -> Plan:
    """Clips, keys, splits and shards of the surveyed sources: a pure function, free of this machine's paths."""
    rejected = list(sources.rejected)
    usable: list[Row] = []
    for row in sources.rows:
        reason = ""
        if surveys[row.path].info is None:
            reason = surveys[row.path].reason or "a dense map, not a video; name it as the `map` of one"
        elif row.map is not None and surveys[row.map].reason:
            reason = f"map: {surveys[row.map].reason}"
        if reason:
            rejected.append(Reject(row.source, reason, row.where, None, row.start_s, row.end_s))
        else:
            usable.append(row)
    splits = _assign_splits(usable, surveys, settings, rejected)
    usable = [row for row in usable if row.path in splits]
    named = stems({row.path: row.source for row in usable})
    items: dict[str, list[tuple[Item, float]]] = {split: [] for split in SPLITS}
    count: Counter[Path] = Counter()
    entire: set[Path] = set()
    for row in usable:
        seen = surveys[row.path]
        assert seen.info is not None
        try:
            windows = cut(row, seen.info, settings)
        except ValueError as error:
            rejected.append(Reject(row.source, str(error), row.where, None, row.start_s, row.end_s))
            continue
        for start_s, end_s, whole in windows:
            plain = whole and row.path not in entire  # a row of the whole video and one of [0, end) are two clips
            entire |= {row.path} if plain else set()
            key = named[row.path] if plain else numbered(named[row.path], count[row.path])
            count[row.path] += not plain
            clip = Item(
                key,
                row.path,
                row.video or row.source,
                start_s,
                end_s,
                whole,
                seen.size,
                row.caption,
                row.captions,
                row.label,
                row.qa,
                row.map,
                0 if row.map is None else surveys[row.map].size,
            )
            seconds = (seen.info.duration_s if end_s is None else end_s) - start_s
            share = 1.0 if whole else min(1.0, seconds / max(seen.info.duration_s, 1e-6))
            items[splits[row.path]].append((clip, seen.size * share))
    shards = tuple(shard for split in SPLITS for shard in _deal(items[split], split, settings))
    digest = hashlib.sha256(json.dumps([asdict(settings), av.__version__], sort_keys=True).encode())
    for row in usable:
        content = [row.source, surveys[row.path].content] + ([] if row.map is None else [surveys[row.map].content])
        digest.update(json.dumps(content).encode())
    for shard in shards:
        digest.update(json.dumps([shard.name, [item.fingerprint() for item in shard.items]], sort_keys=True).encode())
    return Plan(settings, shards, tuple(rejected), digest.hexdigest())


def cut(row: Row, info: VideoInfo, settings: Settings) -> list[tuple[float, float | None, bool]]:
    """(start_s, end_s, whole) of the clips of a row, end_s None where it is the video's.

    The header decides how many clips there are; the last one takes up to clip_seconds of what is really there.
    Raises ValueError where the row's window does not fit the video.
    """
    if info.is_image:
        if row.start_s is not None or row.end_s is not None:
            raise ValueError("an image has no start_s or end_s")
        return [(0.0, None, True)]
    duration_s, frame_s = info.duration_s, 1.0 / info.fps
    start_s, end_s = row.start_s or 0.0, duration_s if row.end_s is None else row.end_s
    if start_s and start_s >= duration_s:
        raise ValueError(f"start_s={start_s:g} lies beyond the end ({duration_s:.3f} s)")
    if end_s > duration_s + max(0.1, 2 * frame_s):
        raise ValueError(f"end_s={end_s:g} lies beyond the end ({duration_s:.3f} s)")
    last_s = end_s if row.end_s is not None and end_s < duration_s - 0.5 * frame_s else None
    length = settings.clip_seconds
    if length is None or end_s - start_s < length + frame_s:
        return [(start_s, last_s, start_s == 0.0 and last_s is None)]
    windows, step = [], settings.stride_seconds or length
    for number in range(int((end_s - start_s) / step) + 1):
        first = round(start_s + number * step, 6)
        if min(length, end_s - first) >= 0.5 * (length - frame_s):
            last = first + length if last_s is None else min(first + length, last_s)
            windows.append((first, round(last, 6), False))
        if first + length >= end_s:
            break
    return windows


def _assign_splits(
    rows: list[Row], surveys: dict[Path, Survey], settings: Settings, rejected: list[Reject]
) -> dict[Path, str]:
    """The split of every usable source. Files of one video, and copies of one file, stay on one side.

    Sources without a split of their own fall by a hash of their video's name or else their content, so that adding or
    renaming videos moves none of the others. When chance leaves one side empty it takes the nearest source, as soon as
    there are two.
    """
    groups = _related(rows, surveys)
    sides: list[str] = []
    draws: dict[int, float] = {}
    for number, members in enumerate(groups):
        named = {row.split for row in members if row.split}
        if settings.split:
            sides.append(settings.split)
        elif named:
            sides.append(next(split for split in ("test", "val", "train") if split in named))
        else:
            name = min((row.video for row in members if row.video), default=surveys[members[0].path].content)
            draws[number] = int(hashlib.sha256(utf8(name)).hexdigest()[:13], 16) / 16**13
            sides.append("val" if draws[number] < settings.val_fraction else "train")
    if len(draws) > 1 and 0.0 < settings.val_fraction < 1.0:
        for side, nearest in (("val", min), ("train", max)):
            if side not in sides:
                sides[nearest(draws, key=lambda number: draws[number])] = side
    out: dict[Path, str] = {}
    for side, members in zip(sides, groups):
        twin = next((row.source for row in members if row.split == side), "")
        for row in members:
            if row.split not in (None, side) and not settings.split:
                reason = f"the same video or content as {twin!r} of split {side!r}, but its row says {row.split!r}"
                rejected.append(Reject(row.source, reason, row.where, None, row.start_s, row.end_s))
            else:
                out[row.path] = side
    return out


def _related(rows: list[Row], surveys: dict[Path, Survey]) -> list[list[Row]]:
    """Rows in groups that share a video's name or a content, directly or through others; in the order of the rows."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for row in rows:
        leader[find(f"video {row.video or row.source}")] = find(f"content {surveys[row.path].content}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(find(f"content {surveys[row.path].content}"), []).append(row)
    return list(groups.values())


def _deal(items: list[tuple[Item, float]], split: str, settings: Settings) -> Iterator[Shard]:
    """Shards of the items in an order drawn from their keys, so that a shard mixes sources."""
    held: list[Item] = []
    size, number = 0.0, 0
    for item, estimate in sorted(items, key=lambda pair: hashlib.sha256(pair[0].key.encode()).digest()):
        full = len(held) == settings.shard_samples or size + estimate > settings.shard_mib * 2**20
        if held and full:
            yield Shard(f"{split}-{number:06d}", split, tuple(held))
            held, size, number = [], 0.0, number + 1
        held.append(item)
        size += estimate
    if held:
        yield Shard(f"{split}-{number:06d}", split, tuple(held))


def pack(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    settings: Settings | None = None,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Summary:
    """Shards of the inputs in `out`, resuming what an earlier attempt left there.

    Args:
        inputs: folders (recursive), single files, manifests.
        workers: processes; None = as many as this process may use cores; 0 = work in this process.
        part: (i, n): pack every n-th shard from the i-th on. The last part to finish merges.
    Raises: ValueError for bad inputs or settings, or when `out` holds a packing of other inputs or settings.
        PackingError when the packing cannot go on.
    """
    began = time.monotonic()
    settings, out = settings or Settings(), Path(out)
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: the first number counts from 0 and lies below the second")
    workers = cores() if workers is None else workers
    with Console(stderr=True, quiet=not progress).status("listing inputs"):
        found = collect(inputs, exclude=out)
    if found.ignored:
        logger.info("manifest columns not read: %s", ", ".join(sorted(found.ignored)))
    with Workers(workers, progress=progress) as pool:
        paths = sorted({path for row in found.rows for path in (row.path, row.map) if path is not None})
        batches = [(paths[i : i + 32],) for i in range(0, len(paths), 32)]
        surveyed = pool.run(_survey_all, batches, title="reading headers", total=len(paths))
        todo = plan(found, dict(zip(paths, (seen for batch in surveyed for seen in batch))), settings)
        _claim(todo, out)
        with _lock(out, part):
            mine = todo.shards[part[0] :: part[1]]
            _sweep(mine, out)
            left = [shard for shard in mine if finished(shard, out) is None]
            clips = sum(len(shard.items) for shard in left)
            if len(left) < len(mine):
                logger.info("%d of %d shards are finished already", len(mine) - len(left), len(mine))
            pool.run(write_shard, [(shard, out, settings) for shard in left], title="packing clips", total=clips)
    return _merge(todo, out, seconds=time.monotonic() - began)


def _claim(todo: Plan, out: Path) -> None:
    """Make `out` this plan's folder, or refuse."""
    header = {
        "schema": SCHEMA,
        "fingerprint": todo.fingerprint,
        "settings": asdict(todo.settings),
        "av": av.__version__,
        "shards": len(todo.shards),
        "clips": sum(len(shard.items) for shard in todo.shards),
        "sources": len({item.source for shard in todo.shards for item in shard.items}),
    }
    file = out / "packing.json"
    if not file.exists():
        folders = [out / split for split in ("", *SPLITS)]
        strangers = [p for folder in folders for p in (*folder.glob("*.tar"), *folder.glob("index.json"))]
        if strangers:
            raise ValueError(
                f"{out} holds shards that are not of this packing ({strangers[0].name}); choose another --out"
            )
        for folder in {shard.split for shard in todo.shards}:
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_shared(file, header)
    try:
        there = json.loads(file.read_bytes())
        before = there["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not readable ({error}); choose another --out") from error
    if there["fingerprint"] == todo.fingerprint:
        return
    now = header["settings"]
    differ = [f"{key}={before.get(key)!r} there, {now[key]!r} now" for key in now if before.get(key) != now[key]]
    if there.get("av") != header["av"]:
        differ.append(f"PyAV {there.get('av')} there, {header['av']} now")
    what = "; ".join(differ) or (
        f"the inputs differ ({there.get('sources')} sources and {there.get('clips')} clips there, "
        f"{header['sources']} and {header['clips']} now, or other contents, rows or rejections)"
    )
    raise ValueError(f"{out} holds a packing made otherwise: {what}. Choose another --out, or remove that folder")


@contextmanager
def _lock(out: Path, part: tuple[int, int]) -> Iterator[None]:
    """One process per part: a byte of packing.json is locked; the kernel lets go however the process ends."""
    with open(out / "packing.json", "r+b") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part[1] * part[1] + part[0])
        except (BlockingIOError, PermissionError) as error:
            raise PackingError(
                f"another process is packing part {part[0]}/{part[1]} into {out}; wait for it"
            ) from error
        except OSError:  # a file system without locks: renaming keeps two writers harmless, if wasteful
            logger.debug("no file locks under %s", out)
        yield


def _sweep(shards: Iterable[Shard], out: Path) -> None:
    """Remove what killed attempts left half-written for these shards."""
    for shard in shards:
        for half in (shard.tar(out), shard.record(out)):
            for temporary in half.parent.glob(f".{half.name}.*.tmp"):
                temporary.unlink(missing_ok=True)


def _merge(todo: Plan, out: Path, *, seconds: float) -> Summary:
    """Write the indices when every shard is there; several parts may do so at once, with equal bytes."""
    records = [(shard, finished(shard, out)) for shard in todo.shards]
    done = [(shard, record) for shard, record in records if record is not None]
    rejected = [asdict(reject) for reject in todo.rejected] + [r for _, record in done for r in record["rejected"]]
    rejected = [{k: v for k, v in r.items() if v not in (None, "") or k == "source"} for r in rejected]
    rejected.sort(key=lambda r: json.dumps(r, sort_keys=True))
    rejected.sort(key=lambda r: (r["source"], r.get("start_s", 0.0)))
    splits = sorted({shard.split for shard in todo.shards}, key=SPLITS.index)
    samples = {s: sum(r["samples"] for shard, r in done if shard.split == s) for s in splits}
    summary = Summary(samples, len(done), len(records) - len(done), rejected, seconds)
    if summary.outstanding:
        return summary
    unused = {reject["key"] for _, record in done for reject in record["rejected"]}
    sources: dict[str, list[str]] = {"train": [], "val": []}
    for split in splits:
        rows = [record for shard, record in done if shard.split == split and record["samples"]]
        listed = [{key: row[key] for key in ("name", "samples", "bytes", "sha256")} for row in rows]
        totals = {"samples": samples[split], "bytes": sum(row["bytes"] for row in rows)}
        write_shared(out / split / "index.json", {"schema": SCHEMA, **totals, "shards": listed})
        items = (item for shard in todo.shards if shard.split == split for item in shard.items)
        sources[split] = sorted({item.source for item in items if item.key not in unused})
    write_shared(out / "split.json", {"schema": SCHEMA, **sources})
    write_shared(out / "rejected.jsonl", "".join(json.dumps(r) + "\n" for r in rejected).encode())
    return summary


def main(argv: list[str]) -> int:
    """`vtok shards`: 0 when something usable was packed (or verified), 1 when not, 2 for a usage error."""
    if "--texts" in argv:
        from vtok.data.text_shards import main as main_texts

        return main_texts([argument for argument in argv if argument != "--texts"])
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _verify(arguments) if arguments.verify is not None else _pack(arguments))


def guarded(command: Callable[[], int]) -> int:
    """What a command returns; 2, and its message for the user, for what it cannot do."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vtok").setLevel(logging.INFO)
    try:
        return command()
    except (ValueError, OSError, PackingError, WorkerError) as error:
        print(f"vtok shards: {error}", file=sys.stderr)
        return 2


def _verify(arguments: argparse.Namespace) -> int:
    workers = cores() if arguments.workers is None else arguments.workers
    problems = verify(arguments.verify, workers=workers, progress=not arguments.quiet)
    for problem in problems:
        print(problem)
    print(f"{arguments.verify}: " + (f"{len(problems)} problem(s)" if problems else "every shard and clip is sound"))
    return 1 if problems else 0


def _pack(arguments: argparse.Namespace) -> int:
    if arguments.out is None:
        raise ValueError("--out DIR is missing: where the shards go")
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    part = _part(arguments.part)
    summary = pack(
        arguments.inputs,
        arguments.out,
        settings=settings,
        workers=arguments.workers,
        part=part,
        progress=not arguments.quiet,
    )
    return tell(summary, arguments.out)


def tell(summary: Summary, out: Path) -> int:
    """Prints what stands in `out`; 0 when something usable does."""
    clips = ", ".join(f"{count} {split}" for split, count in summary.samples.items()) or "0"
    print(f"{out}: {clips} clips in {summary.shards} shards, {summary.seconds:.1f} s")
    for reason, count in Counter(_kind_of(r["reason"]) for r in summary.rejected).most_common():
        print(f"  rejected {count}: {reason}")
    if summary.outstanding:
        print(f"  {summary.outstanding} shards of other parts are not there yet; the last part writes the indices")
        return 0
    if summary.rejected:
        print(f"  each is listed in {out / 'rejected.jsonl'}")
    return 0 if sum(summary.samples.values()) else 1


def _kind_of(reason: str) -> str:
    """A reason without its particulars, to count by."""
    return re.sub(r"'[^']*'|-?\d+(\.\d+)?", "*", reason)[:100]


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--part {text}: expected I/N with I from 0 to N - 1, as in 0/8 ... 7/8")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(prog="vtok shards", description="Pack videos into WebDataset shards.")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="VIDEOS", help="folders, video or image files, manifests (csv, tsv, jsonl)")
    add("--out", type=Path, metavar="DIR", help="where the shards go; run again to resume")
    add(
        "--clip-seconds",
        type=float,
        help="cut longer videos into clips of this length (re-encoded, exact to the frame)",
    )
    add("--stride-seconds", type=float, help="from one clip's start to the next (default: --clip-seconds)")
    add("--fps", type=float, help="at most this many frames per second")
    add("--short-side", type=int, help="at most this many pixels on the short side")
    add("--crf", type=int, default=default.crf, help="x264 quality of re-encoded clips, 0 to 51 (default %(default)s)")
    add("--audio", action="store_true", help="add each clip's audio as <key>.wav, mono")
    add("--audio-rate", type=int, default=default.audio_rate, help="Hz (default %(default)s)")
    add(
        "--val-fraction",
        type=float,
        default=default.val_fraction,
        help="of the source videos without a split of their own (default %(default)s)",
    )
    add("--split", choices=SPLITS, help="put everything into this split")
    add("--shard-samples", type=int, default=default.shard_samples, help="clips per shard (default %(default)s)")
    add("--shard-mib", type=float, default=default.shard_mib, help="MiB per shard, about (default %(default)s)")
    add("--workers", type=int, help="processes (default: the cores at hand)")
    add("--part", default="0/1", metavar="I/N", help="pack every N-th shard from the I-th on, for array jobs")
    add("--verify", type=Path, metavar="DIR", help="re-hash and decode a finished packing, list what is wrong")
    add("--quiet", action="store_true", help="no progress bars")
    add("--texts", action="store_true", help="pack texts, not videos; its options: vtok shards --texts --help")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
