"""`vtok shards --texts`: text files and manifests of texts into shards of `<key>.txt` and `<key>.json`.

1. read: folders (every .txt in them), single .txt files, and .jsonl manifests whose rows have a `text` (or `caption`)
2. cut: a text of more than `--words` words becomes several, at spaces
3. split by source: texts of one source, and equal texts, stay on one side
4. pack: as `vtok shards` does; a finished shard is kept, and a plan of other texts or settings is refused

The layout is that of videos: OUT/packing.json, split.json, rejected.jsonl, OUT/train/train-000000.tar and index.json.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from vtok.data.inputs import Reject, Row, _questions, _split
from vtok.data.pack import Shard, finished, write_shard
from vtok.data.shards import (
    SPLITS,
    Plan,
    Summary,
    Survey,
    _assign_splits,
    _claim,
    _deal,
    _lock,
    _merge,
    _part,
    _sweep,
    guarded,
    tell,
)
from vtok.data.sources import MAX_TEXT_BYTES
from vtok.data.stems import numbered, stems
from vtok.data.workers import Workers

logger = logging.getLogger(__name__)
COLUMNS = ("text", "caption")  # of a manifest, the first one that a row has


@dataclass(frozen=True)
class TextSettings:
    """words: texts of more are cut, 0 = never. The rest as `vtok.data.pack.Settings`."""

    words: int = 0
    val_fraction: float = 0.1
    split: str | None = None
    shard_samples: int = 1024
    shard_mib: float = 64.0

    def __post_init__(self) -> None:
        if self.words < 0:
            raise ValueError(f"words={self.words} must be 1 or more, or 0 to cut no text")
        if not 0.0 <= self.val_fraction <= 1.0:
            raise ValueError(f"val_fraction={self.val_fraction} must lie in [0, 1]")
        if self.split not in (None, *SPLITS):
            raise ValueError(f"split={self.split!r} is unknown; choose one of {', '.join(SPLITS)}")
        if self.shard_samples < 1 or not self.shard_mib > 0:
            raise ValueError(f"shard_samples={self.shard_samples}, shard_mib={self.shard_mib} must be above 0")


@dataclass(frozen=True)
class Text:
    """One text as it was found. name: unique, what its key is made of. source: texts of one source stay together."""

    name: str
    source: str
    text: str
    where: str
    qa: tuple[dict[str, Any], ...] = ()
    split: str | None = None


@dataclass(frozen=True)
class TextItem:
    """One sample."""

    key: str
    source: str
    text: str
    qa: tuple[dict[str, Any], ...]

    def fingerprint(self) -> dict[str, Any]:
        text = hashlib.sha256(self.text.encode("utf-8")).hexdigest()
        return {"key": self.key, "source": self.source, "text": text, "qa": self.qa}


def read_texts(inputs: Iterable[str | Path], *, exclude: Path | None = None) -> tuple[list[Text], list[Reject]]:
    """Every text of the inputs, in order, and what could not be used.

    Raises: ValueError for an input that does not exist or is neither a folder, a .txt nor a .jsonl.
    """
    found: list[Text] = []
    rejected: list[Reject] = []
    given = [Path(item) for item in inputs]
    if not given:
        raise ValueError("nothing to pack: name folders, .txt files or .jsonl manifests")
    for path in given:
        if path.is_dir():
            for file in _files(path, exclude=exclude):
                _take_file(file, f"{path.resolve().name}/{file.relative_to(path).as_posix()}", found, rejected)
        elif not path.is_file():
            raise ValueError(f"input {str(path)!r} does not exist")
        elif path.suffix.lower() in (".jsonl", ".ndjson"):
            _take_manifest(path, found, rejected)
        elif path.suffix.lower() == ".txt":
            _take_file(path, path.name, found, rejected)
        else:
            raise ValueError(f"input {str(path)!r}: texts come as .txt, or in a .jsonl manifest with a `text` a row")
    names: set[str] = set()
    unique = []
    for text in found:
        if text.name in names:
            rejected.append(Reject(text.source, f"a text named {text.name!r} came before", text.where))
        else:
            unique.append(text)
        names.add(text.name)
    return unique, rejected


def _files(folder: Path, *, exclude: Path | None) -> Iterator[Path]:
    left_out = exclude.resolve() if exclude is not None else None
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and Path(here, n).resolve() != left_out)
        yield from (Path(here, name) for name in sorted(files) if name.lower().endswith(".txt") and name[0] != ".")


def _take_file(file: Path, name: str, found: list[Text], rejected: list[Reject]) -> None:
    try:
        if file.stat().st_size > 64 * MAX_TEXT_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes, above the limit of {64 * MAX_TEXT_BYTES}")
        text = file.read_bytes().decode("utf-8-sig")
        if not text.strip():
            raise ValueError("no text")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        rejected.append(Reject(name, f"cannot be read: {error}" if isinstance(error, OSError) else str(error), name))
    else:
        found.append(Text(name, name, text.strip(), name))


def _take_manifest(path: Path, found: list[Text], rejected: list[Reject]) -> None:
    timed = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"the line holds a {type(row).__name__}, not an object")
                column = next((column for column in COLUMNS if row.get(column)), COLUMNS[0])
                text = row.get(column)
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"no {' or '.join(COLUMNS)}")
                name = str(row.get("key") or row.get("file") or f"{path.stem}-{number:06d}")
                source = row.get("source") or name
                if not isinstance(source, str):
                    raise ValueError(f"source must be a string, got {type(source).__name__}")
                qa = _questions(row.get("qa"), 0.0, None)
                if any("start_s" in question for question in qa):
                    if column != "caption":
                        raise ValueError("qa: a text has no seconds, leave start_s and end_s out")
                    timed += sum("start_s" in question for question in qa)  # of the video that the caption tells of
                    qa = tuple({k: v for k, v in each.items() if k not in ("start_s", "end_s")} for each in qa)
                found.append(Text(name, source, text.strip(), where, qa, _split(row.get("split"))))
            except (ValueError, RecursionError) as error:
                rejected.append(Reject(where, str(error), where))
    if timed:
        logger.info(
            "%s: %d questions have seconds of a video; its caption has none, they are left out", path.name, timed
        )


def cut(text: str, words: int) -> list[str]:
    """The text in pieces of at most so many words, evenly long; spaces between pieces are dropped. 0: in one."""
    if not words:
        return [text]
    ends = list(_word_ends(text))
    count = max(1, -(-len(ends) // words))
    bounds = [len(ends) * i // count for i in range(count + 1)]
    return [text[ends[a - 1][1] if a else 0 : ends[b - 1][1]].strip() for a, b in zip(bounds, bounds[1:])]


def _word_ends(text: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of each word in a text."""
    begin = None
    for at, character in enumerate(f"{text} "):
        if character.isspace():
            if begin is not None:
                yield begin, at
            begin = None
        elif begin is None:
            begin = at


def plan_texts(texts: list[Text], rejected: list[Reject], settings: TextSettings) -> Plan:
    """Keys, splits and shards of the texts: a pure function of them."""
    rejected = list(rejected)
    at = {Path(text.name): text for text in texts}
    rows = [Row(path, text.name, text.source, split=text.split, where=text.where) for path, text in at.items()]
    seen = {path: Survey(content=hashlib.sha256(text.text.encode("utf-8")).hexdigest()) for path, text in at.items()}
    splits = _assign_splits(rows, seen, cast(Any, settings), rejected)
    named = stems({path: at[path].name for path in splits})
    items: dict[str, list[tuple[Any, float]]] = {split: [] for split in SPLITS}
    for path, split in splits.items():
        text = at[path]
        pieces = cut(text.text, settings.words)
        for number, piece in enumerate(pieces):
            key = named[path] if len(pieces) == 1 else numbered(named[path], number)
            size = len(piece.encode("utf-8"))
            if size > MAX_TEXT_BYTES:
                reason = f"{size} bytes, above the limit of {MAX_TEXT_BYTES}: cut it with --words"
                rejected.append(Reject(text.source, reason, text.where, key))
                continue
            # which piece answers a question is not known: those of a text that is cut are left out
            item = TextItem(key, text.source, piece, text.qa if len(pieces) == 1 else ())
            items[split].append((item, size + 1024.0))
    shards = tuple(shard for split in SPLITS for shard in _deal(items[split], split, cast(Any, settings)))
    digest = hashlib.sha256(json.dumps(["texts", asdict(settings)], sort_keys=True).encode())
    for shard in shards:
        digest.update(json.dumps([shard.name, [item.fingerprint() for item in shard.items]], sort_keys=True).encode())
    return Plan(cast(Any, settings), shards, tuple(rejected), digest.hexdigest())


def make_text(item: TextItem, settings: TextSettings) -> dict[str, bytes | Path]:
    """The members of a sample of text."""
    facts = {"label": None, "qa": list(item.qa), "source": item.source}
    return {"txt": item.text.encode("utf-8"), "json": (json.dumps(facts) + "\n").encode()}


def pack_texts(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    settings: TextSettings | None = None,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Summary:
    """Shards of texts in `out`, resuming what an earlier attempt left there. Arguments and errors as `shards.pack`."""
    began = time.monotonic()
    settings, out = settings or TextSettings(), Path(out)
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: the first number counts from 0 and lies below the second")
    todo = plan_texts(*read_texts(inputs, exclude=out), settings)
    _claim(todo, out)
    with _lock(out, part):
        mine = todo.shards[part[0] :: part[1]]
        _sweep(mine, out)
        left: list[Shard] = [shard for shard in mine if finished(shard, out) is None]
        if len(left) < len(mine):
            logger.info("%d of %d shards are finished already", len(mine) - len(left), len(mine))
        with Workers(0 if workers is None else workers, progress=progress) as pool:  # reading texts is what takes time
            total = sum(len(shard.items) for shard in left)
            work = functools.partial(write_shard, make=make_text)
            pool.run(work, [(shard, out, settings) for shard in left], title="packing texts", total=total)
    return _merge(todo, out, seconds=time.monotonic() - began)


def main(argv: list[str]) -> int:
    """`vtok shards --texts`: exit codes as `vtok shards`."""
    parser = argparse.ArgumentParser(prog="vtok shards --texts", description="Pack texts into WebDataset shards.")
    add, default = parser.add_argument, TextSettings()
    add("inputs", nargs="+", metavar="TEXTS", help="folders of .txt, .txt files, .jsonl manifests with `text` a row")
    add("--out", type=Path, metavar="DIR", required=True, help="where the shards go; run again to resume")
    add("--words", type=int, default=default.words, help="cut longer texts, at spaces (default: never)")
    add("--val-fraction", type=float, default=default.val_fraction, help="of sources without a split of their own")
    add("--split", choices=SPLITS, help="put everything into this split")
    add("--shard-samples", type=int, default=default.shard_samples, help="texts per shard (default %(default)s)")
    add("--shard-mib", type=float, default=default.shard_mib, help="MiB per shard, about (default %(default)s)")
    add("--workers", type=int, default=0, help="processes (default: this one)")
    add("--part", default="0/1", metavar="I/N", help="pack every N-th shard from the I-th on, for array jobs")
    add("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)

    def command() -> int:
        settings = TextSettings(**{name: getattr(options, name) for name in TextSettings.__dataclass_fields__})
        part, shown = _part(options.part), not options.quiet
        return tell(
            pack_texts(
                options.inputs, options.out, settings=settings, workers=options.workers, part=part, progress=shown
            ),
            options.out,
        )

    return guarded(command)
