"""Folders of pretrained weights as the Hub keeps them: fetched, found and hashed before anything reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vtok.layers.weights import file_sha256

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def fetch(repo: str, revision: str, *, texts: Sequence[str], what: str, files: Sequence[str] = ()) -> Path:
    """The cached snapshot of a Hub repository: what `texts` names, and its weights in one format, or those `files`.

    revision: branch, tag or commit; "" = the default branch. what: names the repository in errors.
    Raises: ValueError where it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(*patterns: str) -> Path:
        asked = [*texts, *patterns]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=asked, ignore_patterns=["*/*"]))

    try:
        if files:
            return snapshot(*files)
        folder = snapshot("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else snapshot("*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{what} {repo!r} could not be had from the Hub: {error}") from error


def commit_of(folder: Path, asked: str) -> str:
    """The commit of a fetched snapshot, which its folder is named after; what was asked for where it is not."""
    return folder.name if len(folder.name) == 40 else asked


def weight_files(folder: Path, names: Sequence[str] = WEIGHTS) -> list[Path]:
    """The files the library will read, found as it finds them: safetensors before pickles, one file before shards.

    Raises: ValueError where there are none.
    """
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    raise ValueError(f"{folder} has no weights: expected one of {', '.join(names)}, or the index of its shards")


def weights_sha256(files: Sequence[Path], expected: str, *, key: str, name: str) -> str:
    """sha256 of a weights' file; of several, that of their hashes one below the other, in the order given.

    expected: hash by the user's setting `key`; "" = any. name: whose weights they are, for the error.
    Raises: ValueError for another hash than expected.
    """
    hashes = [file_sha256(file) for file in files]
    found = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if expected and expected.lower() != found:
        raise ValueError(f"{key}={expected} is expected, but {name} has {found}: other weights")
    return found
