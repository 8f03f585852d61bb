"""Keys of samples: made of the names of videos, and back to what clips of one video share.

train/A man.mp4 -> train-A_man          the whole video, or
                   train-A_man__0003    the fourth clip of it
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

Which = TypeVar("Which", bound=Hashable)


def stems(names: Mapping[Which, str]) -> dict[Which, str]:
    """A key per file: ASCII letters, digits, `-` and single `_`, no dots, at most 80 characters, unique without case.

    `train/A man.mp4` is `train-A_man`. A hash follows two underscores where the name alone would not do: characters
    that ASCII has not, too long, or the same as another's.
    """
    out: dict[Which, str] = {}
    for path, name in names.items():
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix else name
        plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
        slug = re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9_-]+", "_", plain.replace("/", "-"))).strip("_-")
        lost = len(plain) < len(unicodedata.normalize("NFC", stem))
        out[path] = f"{slug[:60] or 'clip'}__{_hash(name)}" if lost or len(slug) > 60 or not slug else slug
    seen = Counter(stem.casefold() for stem in out.values())
    return {p: f"{s}__{_hash(names[p])}" if seen[s.casefold()] > 1 else s for p, s in out.items()}


def numbered(stem: str, number: int) -> str:
    """The key of a clip that is a part of its video."""
    return f"{stem}__{number:04d}"


def stem_of(key: str) -> str:
    """The stem of a key: all clips of one file share it. Other files of the same video have another one."""
    return re.sub(r"__\d{4,}$", "", key)


def utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names may hold bytes that are not UTF-8


def _hash(name: str) -> str:
    return "h" + hashlib.sha256(utf8(name)).hexdigest()[:12]
