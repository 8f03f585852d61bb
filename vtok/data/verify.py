"""`vtok shards --verify`: re-hash every shard, decode every clip, and list what is wrong.

index.json --per shard, in parallel--> hash, members, json, strict decoding --together--> keys and splits
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok.data.decode import iter_frames, probe
from vtok.data.maps import MapError, check_count, parse_map
from vtok.data.sources import MEDIA, TarHeader
from vtok.data.strict import DecodeError
from vtok.data.workers import Notify, Workers

FIELDS = ("caption", "captions", "label", "qa", "source", "start_s", "duration_s", "fps", "width", "height")
CHUNK = 1 << 20


@dataclass
class Checked:
    """What one shard holds. samples: (key, source). problems: one line each."""

    samples: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(folder: str | Path, *, workers: int = 0, progress: bool = True) -> list[str]:
    """What is wrong with a packing (or with one split of it), one line each; [] when all is sound.

    Raises ValueError when the folder holds no packing.
    """
    folder = Path(folder)
    splits = [folder] if (folder / "index.json").is_file() else sorted(p.parent for p in folder.glob("*/index.json"))
    if not splits:
        begun = (folder / "packing.json").is_file()
        what = "its packing is not finished, run the same command again" if begun else "give a folder of vtok shards"
        raise ValueError(f"{folder} holds no index.json: {what}")
    problems: list[str] = []
    tasks: list[tuple[Path, dict[str, Any]]] = []
    for split in splits:
        rows = _read_index(split / "index.json", problems)
        tasks += [(split / row["name"], row) for row in rows]
        listed = {row["name"] for row in rows}
        for tar in sorted(split.glob("*.tar")):
            if tar.name not in listed:
                problems.append(f"{tar}: not in {split / 'index.json'}")
    total = sum(row["samples"] for _, row in tasks)
    with Workers(workers, progress=progress) as pool:
        checked = pool.run(check_shard, tasks, title="verifying clips", total=total)
    keys: dict[str, Path] = {}
    sides: dict[str, str] = {}
    expected = _read_split(folder if (folder / "split.json").is_file() else folder.parent, problems)
    for (tar, _), result in zip(tasks, checked):
        problems += result.problems
        for key, source in result.samples:
            if key in keys:
                problems.append(f"{tar}: key {key!r} is also in {keys[key]}")
            keys[key] = tar
            side = tar.parent.name
            if sides.setdefault(source, side) != side:
                problems.append(f"{tar}: {source!r} is also in {sides[source]!r}: clips of one video on both sides")
            if expected and expected.get(source, side) != side:
                problems.append(f"{tar}: {source!r} belongs to {expected[source]!r} by split.json")
    return problems


def check_shard(tar: Path, row: dict[str, Any], lost: dict[str, str], notify: Notify) -> Checked:
    """Re-hash one shard and decode its samples; never raises for a bad one."""
    out = Checked()

    def wrong(what: str) -> None:
        out.problems.append(f"{tar}: {what}")

    try:
        digest = hashlib.sha256()
        with open(tar, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if tar.stat().st_size != row["bytes"]:
            wrong(f"{tar.stat().st_size} bytes, index.json says {row['bytes']}")
        elif digest.hexdigest() != row["sha256"]:
            wrong("its sha256 differs from index.json")
    except OSError as error:
        wrong(f"cannot read: {error.strerror or error}")
        return out
    try:
        for key, members in _samples(tar):
            notify(key)
            if key in lost:
                wrong(f"{key}: {lost[key]}")
                out.samples.append((key, _source(members)))
                continue
            found = check_sample(members)
            out.problems += [f"{tar}: {key}: {what}" for what in found]
            out.samples.append((key, _source(members)))
    except (tarfile.TarError, OSError, EOFError) as error:
        wrong(f"not a readable tar: {error}")
    if len(out.samples) != row["samples"]:
        wrong(f"{len(out.samples)} samples, index.json says {row['samples']}")
    return out


def check_sample(members: dict[str, bytes]) -> list[str]:
    """What is wrong with one sample, given its members by extension."""
    media = sorted(set(MEDIA) & set(members))
    try:
        meta = json.loads(members["json"])
        missing = [name for name in FIELDS if name not in meta]
    except KeyError:
        return ["no json"]
    except (ValueError, TypeError, RecursionError) as error:
        return [f"its json is not readable: {error}"]
    if not isinstance(meta, dict):
        return [f"its json holds a {type(meta).__name__}, not an object"]
    if not media and "txt" in members:
        return check_text(members["txt"], meta)
    problems = [f"its json lacks {', '.join(missing)}"] if missing else []
    if len(media) != 1:
        return [*problems, f"{len(media)} videos or images ({', '.join(media) or 'none'}), expected one"]
    try:
        info = probe(members[media[0]])
        last_s, count = 0.0, 0
        for frame, seconds in iter_frames(members[media[0]]):
            last_s, count = seconds, count + 1
            if count == 1 and not missing and frame.shape[:2] != (meta["height"], meta["width"]):
                problems.append(f"{frame.shape[1]}x{frame.shape[0]}, its json says {meta['width']}x{meta['height']}")
        duration_s = last_s + (1.0 / info.fps if info.fps else 0.0)
        if not missing and not isinstance(meta["duration_s"], int | float):
            problems.append(f"its json says duration_s={meta['duration_s']!r}, not a number")
        elif not missing and abs(duration_s - meta["duration_s"]) > max(0.05, 0.01 * duration_s):
            problems.append(f"{duration_s:.3f} s long, its json says {meta['duration_s']}")
        for extension in sorted(name for name in members if name.rpartition(".")[2] == "npy"):
            try:
                check_count(len(parse_map(members[extension])), count)
            except MapError as error:
                problems.append(f"{extension}: {error}")
    except DecodeError as error:
        problems.append(f"{media[0]}: {error}")
    if "wav" in members:
        try:
            with wave.open(io.BytesIO(members["wav"])) as audio:
                audio.readframes(audio.getnframes())
        except (wave.Error, EOFError) as error:
            problems.append(f"wav: {error}")
    return problems


def check_text(data: bytes, meta: dict[str, Any]) -> list[str]:
    """What is wrong with a sample of text, given its txt and its json."""
    problems = [f"its json lacks {name}" for name in ("qa", "source") if name not in meta]
    try:
        return problems if data.decode("utf-8").strip() else [*problems, "txt: no text"]
    except UnicodeDecodeError as error:
        return [*problems, f"txt: not UTF-8: {error}"]


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members by extension), as WebDataset groups them: successive members with one name up to the first dot."""
    key, members = None, {}
    with tarfile.open(tar, "r|", tarinfo=TarHeader) as archive:
        for member in archive:
            if not member.isreg():
                raise tarfile.TarError(f"{member.name!r} is not a plain file")
            stem, _, extension = member.name.partition(".")
            if stem != key:
                if key is not None:
                    yield key, members
                key, members = stem, {}
            file = archive.extractfile(member)
            assert file is not None
            members[extension] = file.read()
    if key is not None:
        yield key, members


def _source(members: dict[str, bytes]) -> str:
    try:
        return str(json.loads(members["json"])["source"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""


def _read_index(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_bytes())["shards"]
        wanted = {"name": str, "samples": int, "bytes": int, "sha256": str}
        for row in rows:
            if not all(isinstance(row[key], kind) for key, kind in wanted.items()) or "/" in row["name"]:
                raise ValueError(f"bad row {row}")
        return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(f"{file}: not a readable index: {error}")
        return []


def _read_split(folder: Path, problems: list[str]) -> dict[str, str]:
    """{source: split} of split.json; {} where there is none (one split copied alone)."""
    file = folder / "split.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_bytes())
        return {source: side for side in values if isinstance(values[side], list) for source in values[side]}
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"{file}: not readable: {error}")
        return {}
