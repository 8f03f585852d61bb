"""Which clips a packing is asked for: folders, single files and manifests become `Row`s; the rest becomes `Reject`s.

    inputs --list--> candidates (a folder's files, a manifest's rows) --check--> rows --merge--> one row per clip

Nothing is opened here but manifests: whether a file decodes is found out by `vtok.data.shards`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .mts .m2ts .wmv .asf .flv .ogv .ogg .3gp .3g2 .vob .gif .y4m "
    ".mxf .nut .ivf .obu .h264 .264 .hevc .265 .dv .rm".split()
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))  # packed as clips of one frame
MANIFEST_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson"))
PATH_COLUMNS = ("path", "file", "video")
COLUMNS = frozenset((*PATH_COLUMNS, "source", "map", "caption", "captions", "label", "qa", "split", "start_s", "end_s"))
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Row:
    """One wanted clip: a file (or [start_s, end_s) of it) and what is known about it.

    path: real path, what is opened. source: the file's name in reports and keys, with forward slashes; unique per path.
    video: the original video it was taken from, "" for the file itself: a split never parts the rows of one video.
    captions: ({start_s, end_s, text}, ...), seconds of the file; None for an end that is not known yet. qa: questions,
        with the same two keys where only a part of the file shows the answer.
    where: "manifest:line", "" for a file of a folder.
    map: a dense map of the whole file, a frame for each of its frames (`vtok.data.maps`).
    """

    path: Path
    source: str
    video: str = ""
    caption: str = ""
    captions: tuple[dict[str, Any], ...] = ()
    label: str | int | None = None
    qa: tuple[dict[str, Any], ...] = ()
    split: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    where: str = ""
    map: Path | None = None


@dataclass(frozen=True)
class Reject:
    """One input, or clip of one, that could not be used, and why."""

    source: str
    reason: str
    where: str = ""
    key: str | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class Inputs:
    """rows sorted by source and start; rejected in the order found; ignored: manifest columns that were not read."""

    rows: list[Row]
    rejected: list[Reject]
    ignored: set[str] = field(default_factory=set)


def collect(inputs: Iterable[str | Path], *, exclude: Path | None = None) -> Inputs:
    """The rows that folders (recursive), video or image files and manifests ask for.

    A file that a manifest names and a folder holds is one source, with the manifest's row. Rows that name the same clip
    are merged: their captions and questions are joined.

    Args:
        exclude: folder that is never scanned (the output folder).
    Raises: ValueError when an input does not exist or nothing is given.
    """
    paths = [Path(item) for item in inputs]
    if not paths:
        raise ValueError("no inputs: give folders, video files or a manifest (csv, tsv, jsonl)")
    for path in paths:
        if not path.exists():
            raise ValueError(f"input {str(path)!r} does not exist")
    found = Inputs([], [])
    manifests = {p.resolve(): p for p in paths if p.is_file() and p.suffix.lower() in MANIFEST_SUFFIXES}
    for path in manifests.values():
        _read_manifest(path, found)
    seen = {path for row in found.rows for path in (row.path, row.map) if path is not None} | set(manifests)
    for path in sorted(paths, key=Path.is_dir):  # a file named itself is taken whatever its extension
        for file, source in _media_files(path, exclude=exclude, skip=seen, rejected=found.rejected):
            seen.add(file)
            found.rows.append(Row(file, source))
    found.rows = _merge(_distinct(found.rows), found.rejected)
    found.rejected = list(dict.fromkeys(found.rejected))
    return found


def _media_files(
    path: Path, *, exclude: Path | None, skip: set[Path], rejected: list[Reject]
) -> Iterator[tuple[Path, str]]:
    """(real path, source name) of a file, or of every file of a folder that `skip`, which may grow meanwhile, lacks.

    Hidden files and folders are left out.
    """
    if path.is_file():
        if path.resolve() not in skip:
            yield path.resolve(), path.name
        return
    excluded = exclude.resolve() if exclude is not None else None
    visited: set[Path] = set()
    root = path.resolve().name or "root"
    for folder, folders, files in os.walk(path, followlinks=True):
        real = Path(folder).resolve()
        if real in visited or real == excluded:  # a link that leads back into the tree
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            file = Path(folder) / name
            source = (Path(root) / file.relative_to(path)).as_posix()
            suffix = file.suffix.lower()
            if file.resolve() in skip:
                continue
            if suffix not in VIDEO_SUFFIXES and suffix not in IMAGE_SUFFIXES:
                hint = "give it as an input of its own" + (" to read its rows" if suffix in MANIFEST_SUFFIXES else "")
                hint = "name it as the `map` of a video, in a manifest" if suffix == ".npy" else hint
                rejected.append(Reject(source, f"not a video or image by its extension {suffix!r}; {hint}"))
            elif not file.is_file():
                rejected.append(Reject(source, "not a regular file, or a link to nothing"))
            else:
                yield file.resolve(), source


def _distinct(rows: list[Row]) -> list[Row]:
    """The same rows with one source name per path: a name shared by several files takes parent folders in front."""
    names: dict[Path, str] = {}
    for row in rows:
        names.setdefault(row.path, row.source)
    while True:
        groups: dict[str, list[Path]] = {}
        for path, name in names.items():
            groups.setdefault(name, []).append(path)
        clashes = [path for paths in groups.values() if len(paths) > 1 for path in paths]
        if not clashes:
            return [replace(row, source=names[row.path]) for row in rows]
        for path in clashes:  # links may have other names than what they lead to: a real path is unique in the end
            parts = path.relative_to(path.anchor).parts
            names[path] = "/".join(parts[-(names[path].count("/") + 2) :])


def _merge(rows: list[Row], rejected: list[Reject]) -> list[Row]:
    """Rows sorted by (source, start, end), those of one clip joined; two labels or splits of one clip are rejected."""
    clips: dict[tuple[Path, float | None, float | None], Row] = {}
    for row in rows:
        at = (row.path, row.start_s, row.end_s)
        first = clips.get(at)
        if first is None:
            clips[at] = row
        elif None not in (row.label, first.label) and row.label != first.label:
            reason = f"label {row.label!r} differs from {first.label!r} of the same clip in {first.where}"
            rejected.append(Reject(row.source, reason, row.where, None, row.start_s, row.end_s))
        elif None not in (row.map, first.map) and row.map != first.map:
            reason = f"another map than that of the same clip in {first.where}"
            rejected.append(Reject(row.source, reason, row.where, None, row.start_s, row.end_s))
        else:
            clips[at] = _joined(first, row)
    splits: dict[Path, set[str]] = {}
    for row in rows:
        splits.setdefault(row.path, set()).update([row.split] if row.split else [])
    merged = []
    for row in sorted(clips.values(), key=lambda r: (r.source, r.start_s or 0.0, r.end_s or math.inf)):
        named = sorted(splits[row.path])
        if len(named) > 1:
            reason = f"its rows name several splits ({', '.join(named)}): clips of one video must stay on one side"
            rejected.append(Reject(row.source, reason, row.where, None, row.start_s, row.end_s))
        else:
            merged.append(replace(row, split=named[0] if named else None))
    return merged


def _joined(first: Row, second: Row) -> Row:
    captions: list[dict[str, Any]] = []
    for row in (first, second):
        listed = list(row.captions)
        if row.caption and all(caption["text"] != row.caption for caption in listed):
            listed.insert(0, {"start_s": row.start_s or 0.0, "end_s": row.end_s, "text": row.caption})
        captions += [caption for caption in listed if caption not in captions]
    return replace(
        first,
        video=first.video or second.video,
        caption=first.caption or second.caption,
        captions=tuple(captions) if len(captions) > 1 or first.captions or second.captions else (),
        label=first.label if first.label is not None else second.label,
        qa=first.qa + tuple(question for question in second.qa if question not in first.qa),
        split=first.split or second.split,
        map=first.map or second.map,
    )


def _read_manifest(path: Path, found: Inputs) -> None:
    lines = _read_table(path) if path.suffix.lower() in (".csv", ".tsv") else _read_json_lines(path)
    for number, values in lines:
        where = f"{path.name}:{number}"
        if isinstance(values, str):
            found.rejected.append(Reject("", values, where))
            continue
        named = next((values[c] for c in PATH_COLUMNS if isinstance(values.get(c), str) and values[c]), "")
        try:
            found.rows.append(_row(values, where, path.parent))
            found.ignored |= {str(key) for key in values} - COLUMNS
        except ValueError as error:
            found.rejected.append(Reject(named, str(error), where))


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, object), or a reason in place of the object. Blank lines are skipped."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                values = json.loads(text)
            except UnicodeDecodeError as error:
                yield number, f"line {number} is not UTF-8: {error.reason} at byte {error.start}"
            except (ValueError, RecursionError) as error:
                yield number, f"line {number} is not JSON: {error}"
            else:
                wrong = f"line {number} is not a JSON object but {_kind(values)}"
                yield number, values if isinstance(values, dict) else wrong


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, cells by column) of a csv or tsv with a header; empty cells are left out."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"{path}: the header cannot be read: {error}") from error
    if not any(name in PATH_COLUMNS for name in header):
        raise ValueError(f"{path}: the header {header[:12]} has no column {' or '.join(PATH_COLUMNS)}")
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, f"line {reader.line_num} is not csv: {error}"
            continue
        number = reader.line_num
        if cells is None:
            return
        if not any(cells):
            continue
        if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            yield number, f"line {number} is not UTF-8"
        elif len(cells) != len(header):
            yield number, f"line {number} has {len(cells)} cells, the header {len(header)}"
        else:
            yield number, {name: cell for name, cell in zip(header, cells) if cell.strip()}


def _row(values: dict[str, Any], where: str, folder: Path) -> Row:
    """A checked row. Raises ValueError with the reason."""
    name = next((values[c] for c in PATH_COLUMNS if values.get(c)), None)
    if not isinstance(name, str):
        raise ValueError(f"no {' or '.join(PATH_COLUMNS)}: {_kind(name)}")
    path = _file(name, folder)
    video, caption, label = values.get("source") or "", values.get("caption"), values.get("label")
    if not isinstance(video, str):
        raise ValueError(f"source must be a string, got {_kind(video)}")
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"caption must be a string, got {_kind(caption)}")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ValueError(f"label must be a string or an integer, got {_kind(label)}")
    start_s, end_s = (_seconds(values.get(key), key) for key in ("start_s", "end_s"))
    if start_s is not None and start_s < 0:
        raise ValueError(f"start_s={start_s:g} is negative")
    if end_s is not None and (start_s or 0.0) >= end_s:
        raise ValueError(f"start_s={start_s or 0.0:g} is not before end_s={end_s:g}")
    captions = _captions(values.get("captions"), start_s or 0.0, end_s)
    return Row(
        path=path,
        source=_source_name(name, folder, path),
        video=video,
        caption=(caption or "").strip(),
        captions=captions,
        label=label,
        qa=_questions(values.get("qa"), start_s or 0.0, end_s),
        split=_split(values.get("split")),
        start_s=start_s,
        end_s=end_s,
        where=where,
        map=_map(values.get("map"), folder),
    )


def _file(name: str, folder: Path) -> Path:
    """The real path of a file that a manifest names."""
    if "\0" in name:
        raise ValueError("the path holds a NUL character")
    try:
        path = (folder / name).resolve()
        exists = path.is_file()
    except (OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"cannot read the path: {error}") from error
    if not exists:
        raise ValueError(f"the file is missing: {name!r} (relative to the manifest's folder)")
    return path


def _map(value: Any, folder: Path) -> Path | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not value.lower().endswith(".npy"):
        raise ValueError(f"map must be the path of a .npy file, got {_kind(value)}")
    try:
        return _file(value, folder)
    except ValueError as error:
        raise ValueError(f"map: {error}") from error


def _source_name(name: str, folder: Path, path: Path) -> str:
    """The name as the manifest gives it when it lies under the manifest's folder, else the file's own name."""
    plain = os.path.normpath(name)
    if not os.path.isabs(plain) and not plain.startswith(".."):
        return Path(plain).as_posix()
    root = folder.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _seconds(value: Any, key: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{key}={str(value)[:40]!r} is not a finite number of seconds")
    return seconds


def _split(value: Any) -> str | None:
    if value is None or value == "":
        return None
    name = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if name is None:
        raise ValueError(f"split={str(value)[:40]!r} is unknown; choose one of {', '.join(sorted(SPLIT_NAMES))}")
    return name


def _listed(value: Any, key: str) -> list[Any]:
    """A list; a csv cell holds it as JSON."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} is not a JSON list: {error}") from error
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, got {_kind(value)}")
    return value


def _captions(value: Any, start_s: float, end_s: float | None) -> tuple[dict[str, Any], ...]:
    out = []
    for item in _listed(value, "captions"):
        if isinstance(item, str):
            item = {"text": item}
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise ValueError("captions must hold strings or {start_s, end_s, text}")
        out.append({**_span(item, "captions", start_s, end_s), "text": item["text"]})
    return tuple(out)


def _span(item: dict[str, Any], key: str, start_s: float, end_s: float | None) -> dict[str, float | None]:
    """{start_s, end_s} of a caption or question; what it leaves open is the row's."""
    first, last = _seconds(item.get("start_s"), f"{key}.start_s"), _seconds(item.get("end_s"), f"{key}.end_s")
    first, last = (start_s if first is None else first), (end_s if last is None else last)
    if last is not None and first >= last:
        raise ValueError(f"{key}: start_s={first:g} is not before end_s={last:g}")
    return {"start_s": first, "end_s": last}


def _questions(value: Any, start_s: float, end_s: float | None) -> tuple[dict[str, Any], ...]:
    out = []
    for number, item in enumerate(_listed(value, "qa")):
        if not isinstance(item, dict) or not isinstance(item.get("question"), str) or item.get("answer") is None:
            raise ValueError("qa must hold {question, answer, id?, type?, choices?, start_s?, end_s?}")
        choices = item.get("choices")
        if choices is not None and not isinstance(choices, list):
            raise ValueError(f"qa.choices must be a list, got {_kind(choices)}")
        if choices and _plain(item["answer"]) not in map(_plain, choices):
            raise ValueError(
                f"qa: the answer {item['answer']!r} of {item['question'][:60]!r} is none of its choices "
                f"{[str(choice) for choice in choices]}: give the text of the right one, not its letter or number"
            )
        kind = str(item.get("type") or ("open" if choices is None else "choice"))
        question = {"id": str(item.get("id", number)), "type": kind}
        question |= {"question": item["question"], "answer": item["answer"]}
        question |= {} if choices is None else {"choices": choices}
        timed = item.get("start_s") is not None or item.get("end_s") is not None
        out.append({**question, **_span(item, "qa", start_s, end_s)} if timed else question)
    return tuple(out)


def _plain(answer: Any) -> str:
    """What `vtok.llm.questions` compares of an answer and its choices."""
    return str(answer).strip().rstrip(".").casefold()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
