"""Where samples lie: the list of shards, local copies of remote ones, and the members of each tar.

Everything here handles references (shard, key, byte ranges); the bytes of a sample are read when it is decoded. Tars
come from anywhere, so their headers are not trusted: only plain files with plain relative names are taken.
"""

from __future__ import annotations

import fcntl
import glob as globbing
import hashlib
import http.client
import json
import os
import re
import subprocess
import tarfile
import time
import urllib.request
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtok.data.strict import IMAGE_SUFFIXES

VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".ogv",
)
MEDIA = tuple(suffix[1:] for suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES)
TEXTS = ("json", "txt")
CLAIMS = ("packing.json", "recording.json", "tokenizing.json")  # what vtok shards, features and tokenize begin with
MAX_TEXT_BYTES = 8 << 20  # one of those
MAX_MEDIA_BYTES = 4 << 30
MAX_TAR_HEADER_BYTES = 1 << 20  # a header beside a member's own: a long name, or PAX records
MAX_TAR_GLOBALS = 64  # PAX records that hold for all members
MAX_INDEX_BYTES = 256 << 20  # an index.json of millions of shards


class BrokenSample(ValueError):
    """One sample cannot be used; the message says why."""


@dataclass(frozen=True)
class Shard:
    """One tar. url: a local path, https:, or pipe:. samples, num_bytes: as index.json states them, None without one."""

    url: str
    name: str
    samples: int | None = None
    num_bytes: int | None = None

    @property
    def is_remote(self) -> bool:
        return _is_remote(self.url)


def _is_remote(url: str) -> bool:
    return url.startswith(("https://", "http://", "pipe:"))


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..10}.{x,y}" -> a-08.x, a-08.y, a-09.x ...: zero padding of the first number is kept."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        low, high = int(span[1]), int(span[2])
        if high < low:
            raise ValueError(f"data.shards={pattern!r}: {{{match[1]}}} counts downwards")
        options = [str(n).zfill(len(span[1])) for n in range(low, high + 1)]
    else:
        options = match[1].split(",")
    return [
        item for option in options for item in expand_braces(pattern[: match.start()] + option + pattern[match.end() :])
    ]


def open_sources(
    shards: str | Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    apart: bool = False,
    root: str | Path = "",
    cache_dir: str | Path = "",
    setting: str = "data.shards",
) -> list[list[Shard]]:
    """The shards of each source.

    Args:
        shards: sources joined by "::", or a list of them; each a folder, a pattern, https: or pipe:.
        weights: sampling weight of each source; None makes one source of all.
        apart: each part is a source of its own, with or without weights, and several parts may hold the same shards
            (batches of one part each: videos and single frames of the same videos).
        root: prefix of relative paths. cache_dir: needed for https: and pipe:.
        setting: name of the setting, for messages.
    Returns: one list of shards a part, or one list. Raises: ValueError naming the setting, its value and the fix.
    """
    parts = [part.strip() for part in (shards.split("::") if isinstance(shards, str) else shards)]
    if not parts or not all(parts):
        raise ValueError(
            f"{setting}={shards!r} names no shards; give a folder made by `vtok shards`, or a pattern of tars"
        )
    sources = [_open_source(part, root=str(root), cache_dir=str(cache_dir), setting=setting) for part in parts]
    if weights is not None and len(weights) != len(parts):
        raise ValueError(
            f"data.weights={list(weights)} has {len(weights)} entries for {len(parts)} sources in {setting}"
        )
    if weights is not None and not all(w > 0 for w in weights):
        raise ValueError(f"data.weights={list(weights)} must all be above 0; leave a source out of {setting} instead")
    every = [shard for source in sources for shard in source]
    for listed in sources if apart else [every]:
        twice = [url for url, times in Counter(shard.url for shard in listed).items() if times > 1]
        if twice:
            raise ValueError(f"{setting} lists {sorted(twice)[:3]} more than once; use data.weights to repeat data")
    return sources if apart or weights is not None else [every]


def every_shard(
    shards: str | Sequence[str], *, root: str | Path = "", cache_dir: str | Path = "", setting: str = "data.shards"
) -> list[Shard]:
    """Each shard of all parts, once: for statistics over the data, where parts and weights play no role."""
    sources = open_sources(shards, apart=True, root=root, cache_dir=cache_dir, setting=setting)
    return list({shard.url: shard for source in sources for shard in source}.values())


def _open_source(part: str, *, root: str, cache_dir: str, setting: str) -> list[Shard]:
    if _is_remote(part):
        if not cache_dir:
            raise ValueError(f"{setting}={part!r} is remote; set data.cache_dir to a folder for local copies")
        if part.startswith("pipe:") or part.rstrip("/").endswith(".tar"):
            return [Shard(url, _remote_name(url)) for url in expand_braces(part)]
        base = part.rstrip("/")
        try:
            text = fetch(f"{base}/index.json", cache_dir, refresh=True, most=MAX_INDEX_BYTES).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{setting}={part!r}: no index.json there ({error}); name the tars by a pattern"
            ) from error
        return _read_index(text, base, setting)
    where = os.path.join(root, part) if root else part
    if os.path.isdir(where):
        index = Path(where, "index.json")
        if index.is_file():
            if index.stat().st_size > MAX_INDEX_BYTES:
                raise ValueError(f"{setting}: {index} has over {MAX_INDEX_BYTES} bytes, the limit of an index")
            found = _read_index(index.read_bytes(), where, setting)
        else:
            begun = [folder / name for folder in (Path(where), Path(where).resolve().parent) for name in CLAIMS]
            if claim := next((path for path in begun if path.is_file()), None):
                raise ValueError(
                    f"{setting}={part!r}: {where} has no index.json, and {claim} says that it is being made: not every "
                    "part of it is there. Give the command that makes it again (all of its --part)"
                )
            found = [Shard(str(p), p.name) for p in sorted(Path(where).glob("*.tar"))]
        if not found:
            inner = sorted(p.parent.name for p in Path(where).glob("*/index.json"))
            hint = f"; did you mean {os.path.join(part, inner[-1])!r}?" if inner else "; run data/make_shards.py"
            raise ValueError(f"{setting}={part!r}: the folder {where} holds no shards{hint}")
    else:
        names = [
            n for p in expand_braces(where) for n in (sorted(globbing.glob(p)) if re.search(r"[*?\[]", p) else [p])
        ]
        found = [Shard(name, os.path.basename(name)) for name in names]
    missing = [shard.url for shard in found if not os.path.isfile(shard.url)]
    if len(missing) == len(found):
        under = root or os.getcwd()
        raise ValueError(
            f"{setting}={part!r} matched 0 files under {under}; check data.root or run data/make_shards.py"
        )
    if missing:
        raise ValueError(f"{setting}={part!r}: {len(missing)} of {len(found)} shards are missing, e.g. {missing[0]}")
    return found


def _remote_name(url: str) -> str:
    words = [word for word in re.split(r"[\s/]+", url.split("?")[0]) if word.endswith(".tar")]
    return words[-1] if words else hashlib.sha256(url.encode()).hexdigest()[:16] + ".tar"


def _read_index(text: str | bytes, base: str, setting: str) -> list[Shard]:
    try:
        entries = json.loads(text)["shards"]
        found = [Shard(f"{base}/{e['name']}", str(e["name"]), int(e["samples"]), int(e["bytes"])) for e in entries]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting}: {base}/index.json is not an index of shards ({error!r})") from error
    bad = [shard.name for shard in found if shard.name in ("", ".", "..") or "/" in shard.name or "\\" in shard.name]
    if bad:
        raise ValueError(f"{setting}: {base}/index.json names {bad[0]!r}, which is not a plain file name")
    return [shard for shard in found if shard.samples]


def fetch(
    url: str,
    cache_dir: str | Path,
    *,
    num_bytes: int | None = None,
    most: int | None = None,
    refresh: bool = False,
    tries: int = 3,
) -> Path:
    """A local copy of an https: file or of what a pipe: command prints.

    Written aside and renamed, under a lock, so that processes sharing the folder fetch a shard once and never see half
    of one. Nothing is ever removed from the cache. num_bytes: the size it must have. most: the size it may have. Raises
    OSError after `tries` failures, or for a wrong size, as soon as more has come.
    """
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = url.split("?")[0].rstrip("/").rpartition("/")[2] if not url.startswith("pipe:") else _remote_name(url)
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and not refresh:
            return target
        aside = Path(f"{target}.{os.getpid()}.part")
        for attempt in range(tries):
            try:
                with open(aside, "wb") as out:
                    _download(url, out, most=most if num_bytes is None else num_bytes)
                size = aside.stat().st_size
                if num_bytes is not None and size != num_bytes:
                    raise OSError(f"{url} gave {size} bytes, index.json says {num_bytes}")
                os.replace(aside, target)
                return target
            except (OSError, http.client.HTTPException) as error:
                aside.unlink(missing_ok=True)
                if attempt == tries - 1:
                    raise OSError(f"{url}: {error}") from error
                time.sleep(0.5 * 4**attempt)
    raise AssertionError


def _download(url: str, out: Any, *, most: int | None) -> None:
    if url.startswith("pipe:"):
        # A session of its own: signals meant for the run (time limit, requeue) must not cut a shard short.
        with subprocess.Popen(url[5:], shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
            assert process.stdout is not None
            try:
                _copy(process.stdout, out, url, most)
            except OSError:
                process.kill()
                raise
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
        return
    with urllib.request.urlopen(url, timeout=60) as reply:
        _copy(reply, out, url, most)
        stated = reply.headers.get("Content-Length")
    if stated is not None and out.tell() != int(stated):
        raise OSError(f"received {out.tell()} of {stated} bytes")


def _copy(source: Any, out: Any, url: str, most: int | None) -> None:
    """All of `source`. Raises OSError past `most` bytes: a server that never ends would fill the disk."""
    size = 0
    while block := source.read(1 << 20):
        size += len(block)
        if most is not None and size > most:
            raise OSError(f"{url} gives more than the {most} bytes it may have")
        out.write(block)


class Sample(NamedTuple):
    """Where a sample's members lie in a tar. problem: why it cannot be used; lost: how many samples it stands for.

    passing: it stands for a whole shard that could not be read now (network, disk); another time it may be.
    """

    shard: int
    key: str
    members: dict[str, tuple[int, int]]  # suffix -> (offset, bytes)
    problem: str | None = None
    lost: int = 1
    passing: bool = False


_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarHeader(tarfile.TarInfo):
    """A member's header; a further header before it, which tarfile reads whole, may not be larger than the limit."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> TarHeader:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _HEADERS and found.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(
                f"a header of type {found.type.decode('latin-1')!r} of {found.size} bytes, above the limit of "
                f"{MAX_TAR_HEADER_BYTES}"
            )
        return found


def scan(
    path: str | Path, *, shard: int = 0, expected: int | None = None, media: Sequence[str] = MEDIA
) -> list[Sample]:
    """The samples of a tar, from its headers alone.

    Members that follow each other with the same name up to the first dot of the base name make a sample. Links,
    devices, absolute and parent paths are refused, as are samples without one of `media` and keys that come twice. A
    tar without its end mark was cut: its last sample is dropped, since it may lack members. What is lost stands at the
    end as one `Sample` with a `problem`; a file that is no tar is such an entry too. Raises OSError when it cannot be
    read.
    """
    groups: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
    problems: dict[str, str] = {}
    damage: str | None = None
    last: str | None = None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=TarHeader) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # the archive would keep every header otherwise
                if len(tar.pax_headers) > MAX_TAR_GLOBALS:
                    raise tarfile.ReadError(f"more than {MAX_TAR_GLOBALS} global PAX records")
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                problem = None
                if not member.isreg() or member.issparse():
                    problem = f"member {member.name!r} is not a plain file"
                elif (
                    member.name.startswith("/")
                    or ".." in folder.split("/")
                    or "\\" in member.name
                    or "\0" in member.name
                ):
                    problem = f"member {member.name!r} has an absolute or parent path"
                elif key != last and key in groups:
                    problem = "the key comes twice in the shard"
                elif suffix.lower() in groups.get(key, {}):
                    problem = f"two members .{suffix}"
                if problem is not None:
                    problems.setdefault(key, problem)
                groups.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
                last = key
            # A cut inside a header, or between two members, ends the iteration without an error.
            if not _is_zero(file, tar.offset):
                damage = "cut short: the end mark is missing"
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        damage = f"{type(error).__name__}: {error}"
    if damage is not None and last is not None:
        groups.pop(last, None)
        problems.pop(last, None)
    found = []
    for key, members in groups.items():
        problem = problems.get(key)
        if problem is None and not any(suffix in members for suffix in media):
            what = "video or image" if tuple(media) == MEDIA else " or ".join(f".{suffix}" for suffix in media)
            problem = f"no {what} among its members {sorted(members)}"
        found.append(Sample(shard, key, members, problem))
    lost = 0 if expected is None else expected - len(found)
    if damage is not None or lost > 0:
        problem = damage or f"holds {len(found)} samples, index.json says {expected}"
        found.append(Sample(shard, "", {}, problem, max(lost, 1)))
    return found


def _is_zero(file: Any, offset: int) -> bool:
    file.seek(offset)
    block = file.read(512)
    return len(block) == 512 and not any(block)


class ShardReader:
    """Samples and bytes of a list of shards, for one process. Keeps the headers and files of recent shards open.

    media: extensions of which a sample must have one.
    """

    def __init__(
        self, shards: Sequence[Shard], *, cache_dir: str | Path = "", keep: int = 32, media: Sequence[str] = MEDIA
    ) -> None:
        self.shards = list(shards)
        self.cache_dir = cache_dir
        self.media = tuple(media)
        self.keep = keep
        self._samples: OrderedDict[int, list[Sample]] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}  # descriptors mean nothing in another process

    def path(self, index: int) -> str:
        """Local path of a shard, fetched first where it is remote. Raises OSError."""
        shard = self.shards[index]
        return str(fetch(shard.url, self.cache_dir, num_bytes=shard.num_bytes)) if shard.is_remote else shard.url

    def samples(self, index: int) -> list[Sample]:
        """As `scan`; one `passing` sample for a shard that cannot be read."""
        if index in self._samples:
            self._samples.move_to_end(index)
            return self._samples[index]
        shard = self.shards[index]
        try:
            found = scan(self.path(index), shard=index, expected=shard.samples, media=self.media)
        except OSError as error:
            return [Sample(index, "", {}, str(error), shard.samples or 1, passing=True)]
        self._samples[index] = found
        if len(self._samples) > self.keep:
            self._samples.popitem(last=False)
        return found

    def read(self, sample: Sample, suffix: str, *, first: int = 0, num_bytes: int | None = None) -> bytes:
        """A member's bytes, or `num_bytes` of them from number `first` on. Raises OSError or BrokenSample."""
        offset, size = sample.members[suffix]
        limit = MAX_TEXT_BYTES if suffix in TEXTS else MAX_MEDIA_BYTES
        if size > limit:
            raise BrokenSample(
                f".{suffix} has {size} bytes, above the limit of {limit} for one member; cut the clip or text shorter"
            )
        offset, size = offset + first, size - first if num_bytes is None else min(num_bytes, size - first)
        if sample.shard not in self._files:
            self._files[sample.shard] = os.open(self.path(sample.shard), os.O_RDONLY)
            if len(self._files) > self.keep:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(sample.shard)
        data = os.pread(self._files[sample.shard], size, offset)
        if len(data) != size:
            raise BrokenSample(f".{suffix} is cut short: {len(data)} of {size} bytes")
        return data
