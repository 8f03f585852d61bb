"""Write the manifest (jsonl) that `vtok shards` takes; what the imports in data/ have in common.

A row: path (or file), map, caption, captions, label, qa, split, start_s, end_s, source. `source` names the original
video (default: the path): rows of one source never fall on both sides of a split.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

Row = dict[str, Any]


class Written(NamedTuple):
    """manifest: path of the rows kept. missing: path of the rows left out, each with its `reason`, or None."""

    manifest: Path
    missing: Path | None
    num_kept: int
    num_missing: int


def write_manifest(rows: Iterable[Row], out: Path | str, *, progress: bool = True) -> Written:
    """Write rows whose file exists to `out`, the others to `<out>.missing.jsonl` with the reason.

    A row that already has a `reason` (it cannot be used whatever is on disk) goes to the second file too. Paths under
    the manifest's folder are written relative to it, so that the folder can move; others are absolute.
    Both files are written aside and renamed; a list of missing rows from an earlier run does not survive.
    """
    out = Path(out)
    missing = out.with_name(out.name + ".missing.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent.resolve()
    asides = [path.with_name(f".{path.name}.part") for path in (out, missing)]
    counts = [0, 0]
    try:
        with open(asides[0], "w", encoding="utf-8") as kept, open(asides[1], "w", encoding="utf-8") as left:
            for row in track(rows, description="rows", disable=not progress):
                reason = row.get("reason") or _unreadable(row["path"])
                if not reason and row.get("map"):
                    reason = (why := _unreadable(row["map"])) and f"map: {why}"
                if reason:
                    row = {**row, "path": str(row.get("path", "")), "reason": reason}
                else:
                    row = {**row, "path": _portable(Path(row["path"]), folder)}
                    row |= {"map": _portable(Path(row["map"]), folder)} if row.get("map") else {}
                counts[bool(reason)] += 1
                row = {key: value for key, value in row.items() if value is not None}
                (left if reason else kept).write(json.dumps(row, ensure_ascii=False) + "\n")
    except BaseException:
        for path in asides:
            path.unlink(missing_ok=True)
        raise
    os.replace(asides[0], out)
    if counts[1]:
        os.replace(asides[1], missing)
    else:
        asides[1].unlink()
        missing.unlink(missing_ok=True)
    return Written(out, missing if counts[1] else None, *counts)


def run(parser: argparse.ArgumentParser, importer: Callable[..., Written]) -> int:
    """Call an import with the parsed arguments and print what was written.

    Returns: the exit status: 1 when not one row could be used. A file that cannot be read, or read as expected, ends
    the program with its message and status 2.
    """
    try:
        written = importer(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{written.num_kept} rows in {written.manifest}")
    if written.missing:
        print(f"{written.num_missing} rows left out, listed with reasons in {written.missing}")
    return 0 if written.num_kept else 1


def read_csv(path: Path | str, *, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of a csv with a header, as text.

    Raises: ValueError naming the file when a column of `columns` is absent or a line has more or fewer cells.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in columns if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path} has no column {', '.join(absent)}; its header is {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num} does not have the {len(reader.fieldnames or ())} cells")
            yield row


def _unreadable(path: Path | str) -> str | None:
    if os.path.isfile(path):
        return None
    return "is a folder, not a video file" if os.path.isdir(path) else "file not found"


def _portable(path: Path, folder: Path) -> str:
    full = Path(os.path.abspath(path))  # not resolved: a link inside the folder stays a name inside the folder
    for root in (folder, Path(os.path.abspath(folder))):
        if full.is_relative_to(root):
            return full.relative_to(root).as_posix()
    return str(full)
