"""What was written in a folder: files that are whole on disk, and the record of the hash of each (sha256.jsonl)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vtok.data.workers import cores
from vtok.training.zero_shards import CheckpointError

RECORD = "sha256.jsonl"


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole on disk, or not there, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.aside")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def fsync(path: Path) -> None:
    """Until what was written to a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """`sha256` of each file, by the names they are given."""
    with ThreadPoolExecutor(min(8, cores())) as pool:  # hashing leaves the interpreter free
        return dict(zip(files, pool.map(sha256, files.values())))


def record(folder: Path, line: dict[str, Any]) -> None:
    """Adds a line to the record of hashes, in one rename. Nothing is ever taken out: the lines are short."""
    path = folder / RECORD
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_whole(path, f"{known}{json.dumps(line)}\n")


def recorded(folder: Path) -> set[str] | None:
    """The hashes of the checkpoints that were written in a folder; None where none were recorded."""
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / RECORD} cannot be read: {error}") from error
    found = set()
    for line in lines:
        try:
            found.add(json.loads(line)["sha256"])
        except (ValueError, KeyError, TypeError):  # damaged: then the checkpoint it belongs to is not known
            continue
    return found
