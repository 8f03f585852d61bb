"""Changed folders: packed shards, exports and run directories (`damage.py` says what the rules mean)."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soak import damage
from soak.corpus import Corpus
from soak.damage import DIFFER, EQUAL, REJECT, Case, Change, Span, changed

Act = Callable[[Path, random.Random], None]  # changes a folder that is a copy of the sound one


def in_folders(kind: str, source: Path, acts: list[tuple[str, str, Act]], seed: int) -> Iterator[Case]:
    """Endless cases: every act in turn on a fresh copy of a folder, each time with other numbers."""
    number = 0
    while True:
        for name, rule, act in acts:
            number += 1
            yield Case(kind, name, rule, _made(source, act, f"{kind} {seed} {number}"))


def _made(source: Path, act: Act, seed: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        copy = folder / source.name
        shutil.copytree(source, copy, symlinks=True)
        act(copy, random.Random(seed))
        return copy

    return make


def rewrite(name: str, change: Change) -> Act:
    """Changes the bytes of one file, or of one drawn from a pattern."""

    def act(folder: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(folder.glob(name)))
        data = changed(path.read_bytes(), change, draw)
        path.unlink()  # never through a hard link
        path.write_bytes(data)

    return act


def edit(name: str, change: Callable[[Any, random.Random], Any], *, indent: int | None = 1) -> Act:
    """Changes the values of one JSON file."""

    def act(folder: Path, draw: random.Random) -> None:
        path = folder / name
        values = json.loads(path.read_text())
        new = change(values, draw)
        text = json.dumps(values if new is None else new, indent=indent) if not isinstance(new, str) else new
        path.unlink()
        path.write_text(text)

    return act


def drop(name: str) -> Act:
    return lambda folder, draw: draw.choice(sorted(folder.glob(name))).unlink()


BYTEWISE = [
    Change("a bit", REJECT, damage.flip),
    Change("bits", REJECT, lambda d, r: damage.flip(d, r, count=r.randint(2, 9))),
    Change("cut short", REJECT, damage.cut),
    Change("bytes removed", REJECT, damage.remove),
    Change("bytes inserted", REJECT, damage.insert),
    Change("an eighth of it overwritten", REJECT, damage.overwrite),
    Change("foreign", REJECT, damage.foreign),
]
NO_JSON = ["", "{", "[]", "null", "5", '"text"', "{'a': 1}", "[" * 100_000, '{"a": ' * 5000, "\x00", "NaN", "\ufeff{}"]


# shards


def verified_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """`vtok shards --verify` holds every byte of every tar, and the index, against each other."""
    tar, index = "train/*.tar", "train/index.json"

    def rows(key: str, *values: Any) -> Act:
        def change(facts: Any, draw: random.Random) -> None:
            row = draw.choice(facts["shards"])
            row[key] = draw.choice([v for v in values if v != row[key]])

        return edit(index, change)

    def exchanged(folder: Path, draw: random.Random) -> None:
        one, other = draw.sample(sorted(folder.glob(tar)), 2)
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)

    def a_row_less(facts: Any, draw: random.Random) -> None:
        del facts["shards"][draw.randrange(len(facts["shards"]))]

    acts = [(f"tar: {change.name}", change.rule, rewrite(tar, change)) for change in BYTEWISE]
    acts += [
        ("tar: bytes after its end", REJECT, rewrite(tar, Change("", REJECT, lambda d, r: d + bytes(512)))),
        ("tar: gone", REJECT, drop(tar)),
        ("tars: exchanged", REJECT, exchanged),
        ("index: another count", REJECT, rows("samples", 0, 1, -1, 99, "4", None, 1e999)),
        ("index: another size", REJECT, rows("bytes", 0, -1, 512, "x", None)),
        ("index: another sha256", REJECT, rows("sha256", "0" * 64, "", None)),
        ("index: a path for a name", REJECT, rows("name", "../x.tar", "/etc/hosts", "", "..", "a/b.tar", None)),
        ("index: a row less", REJECT, edit(index, a_row_less)),
        ("index: not an index", REJECT, edit(index, lambda _, r: r.choice(NO_JSON))),
        ("index: another notation", EQUAL, edit(index, lambda v, r: v, indent=None)),
        ("index: a key more", EQUAL, edit(index, lambda v, r: v.update(note="x" * r.randint(1, 9)))),
        ("a file more", EQUAL, lambda folder, draw: (folder / "train" / "notes.txt").write_text("x") and None),
    ]  # fmt: skip
    return in_folders("shards, verified", corpus.shards, acts, seed)


def hostile_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """Shards made to fit their index: what training must find out from the tar and its samples themselves."""
    first = sorted((corpus.shards / "train").glob("*.tar"))[0].name

    def members(act: Callable[[list[tuple[tarfile.TarInfo, bytes]], random.Random], Any]) -> Act:
        """Writes the first shard anew, after a change of its members."""

        def whole(folder: Path, draw: random.Random) -> None:
            path = folder / "train" / first
            with tarfile.open(path) as tar:
                found = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
            raw = act(found, draw)
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for member, content in found:
                    member.size = len(content) if member.isreg() else 0
                    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
            data = file.getvalue() if raw is None else raw(file.getvalue())
            path.write_bytes(data)
            fit_index(folder / "train", first, data)

        return whole

    def named(*names: str) -> Act:
        def act(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
            name = draw.choice(names)
            for (member, _), suffix in zip(found[:2], ("mp4", "json")):  # one sample: its media and its json
                member.name = f"{name}.{suffix}"

        return members(act)

    def typed(kind: bytes, link: str = "") -> Act:
        def act(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
            member = tarfile.TarInfo(found[draw.randrange(len(found))][0].name)
            member.type, member.linkname = kind, link
            number = next(i for i, (m, _) in enumerate(found) if m.name == member.name)
            found[number] = (member, b"")

        return members(act)

    def facts(*texts: str | bytes) -> Act:
        def act(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
            number = draw.choice([i for i, (m, _) in enumerate(found) if m.name.endswith(".json")])
            text = draw.choice(texts)
            found[number] = (found[number][0], text.encode() if isinstance(text, str) else text)

        return members(act)

    def size_field(value: bytes) -> Act:
        """A header whose size says something else, its checksum right."""

        def act(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> Any:
            def raw(data: bytes) -> bytes:
                block = bytearray(data[:512])
                block[124:136] = value
                block[148:156] = b" " * 8
                block[148:156] = f"{sum(block):06o}\0 ".encode()
                return bytes(block) + data[512:]

            return raw

        return members(act)

    def doubled(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
        found += [(tarfile.TarInfo(member.name), content) for member, content in found[:2]]

    def without_media(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
        del found[draw.choice([i for i, (m, _) in enumerate(found) if m.name.endswith(".mp4")])]

    def damaged_media(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
        number = draw.choice([i for i, (m, _) in enumerate(found) if m.name.endswith(".mp4")])
        change = draw.choice([damage.cut, damage.noise, damage.overwrite, damage.foreign])
        found[number] = (found[number][0], change(found[number][1], draw))

    def other_owner(found: list[tuple[tarfile.TarInfo, bytes]], draw: random.Random) -> None:
        for member, _ in found:
            member.uid, member.gid, member.mtime, member.mode = (draw.randrange(1, 9999) for _ in range(4))

    acts: list[tuple[str, str, Act]] = [
        ("an absolute path", REJECT, named("/etc/passwd", "/tmp/x/y")),
        ("a parent path", REJECT, named("../../x", "a/../../b", "..\\..\\x", "../x")),
        ("a symbolic link", REJECT, typed(tarfile.SYMTYPE, "/etc/passwd")),
        ("a hard link", REJECT, typed(tarfile.LNKTYPE, "../../secret")),
        ("a device", REJECT, typed(tarfile.CHRTYPE)),
        ("a block device", REJECT, typed(tarfile.BLKTYPE)),
        ("a pipe", REJECT, typed(tarfile.FIFOTYPE)),
        ("a sparse file", REJECT, typed(tarfile.GNUTYPE_SPARSE)),
        ("an unknown kind of member", REJECT, typed(b"Z")),
        ("a key twice", REJECT, members(doubled)),
        ("a sample without its video", REJECT, members(without_media)),
        ("a damaged video", REJECT, members(damaged_media)),
        ("json that is none", REJECT, facts(*NO_JSON, b"\xff\xfe{}", b'{"caption": "\xff"}')),
        ("a caption of another type", REJECT, facts('{"caption": 5}', '{"caption": ["a"]}', '{"qa": 7}', '{"qa": {}}')),
        ("json of 9 MB", REJECT, facts(b'{"caption": "' + b"x" * (9 << 20) + b'"}')),
        ("a member of 2^62 bytes", REJECT, size_field(b"\x80" + bytes(3) + struct.pack(">Q", 1 << 62))),
        ("a member of less than 0 bytes", REJECT, size_field(b"\xff" * 8 + struct.pack(">i", -512 * 3))),
        ("a member of 8 GB", REJECT, size_field(b"77777777777\0")),
        ("a size that is no number", REJECT, size_field(b"zzzzzzzzzzz\0")),
        ("other owners, times and modes", EQUAL, members(other_owner)),
        ("members as they are", EQUAL, members(lambda found, draw: None)),
    ]
    return in_folders("shards, in training", corpus.shards, acts, seed)


def fit_index(folder: Path, name: str, data: bytes) -> None:
    """Makes index.json say what the tar now is: size and sha256."""
    path = folder / "index.json"
    facts = json.loads(path.read_text())
    for row in facts["shards"]:
        if row["name"] == name:
            row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_text(json.dumps(facts))


# exports


def tensor_data(data: bytes) -> list[Span]:
    """Where the numbers of a safetensors file lie."""
    return [(8 + int.from_bytes(data[:8], "little"), len(data))]


def export_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """config.json states hashes of the weights, the entropy model and its own model node; nothing else is code."""
    weights, entropy, facts = "model.safetensors", "entropy.safetensors", "config.json"
    bit = Change("", REJECT, lambda d, r: damage.flip(d, r, tensor_data(d), count=r.choice([1, 1, 3])))
    rest = [change for change in BYTEWISE if change.name not in ("a bit", "bits")]

    def model(draw: random.Random, node: dict[str, Any]) -> None:
        key = draw.choice([k for k, v in node.items() if type(v) in (int, float)])
        node[key] += draw.choice([1, 2, 1 << 40])

    def foreign_key(values: dict[str, Any], draw: random.Random) -> None:
        values["model"][draw.choice(["depth", "__class__", "_target_", ""])] = "os.system"

    def set_to(key: str, *options: Any) -> Act:
        return edit(facts, lambda values, draw: values.update({key: draw.choice(options)}))

    def mixed_up(folder: Path, draw: random.Random) -> None:
        shutil.copyfile(folder / entropy, folder / weights)

    def bomb(folder: Path, draw: random.Random) -> None:
        (folder / "pytorch_model.bin").write_bytes(damage.FOREIGN["pickle"])
        (folder / "modeling_vtok.py").write_text("raise SystemExit('this file was run')\n")

    acts: list[tuple[str, str, Act]] = [
        ("weights: a bit of a number", REJECT, rewrite(weights, bit)),
        ("weights: a bit of a number again", REJECT, rewrite(weights, bit)),
        ("entropy model: a bit of a number", REJECT, rewrite(entropy, bit)),
        *[(f"weights: {c.name}", REJECT, rewrite(weights, c)) for c in rest],
        *[(f"entropy model: {c.name}", REJECT, rewrite(entropy, c)) for c in rest],
        ("weights: gone", REJECT, drop(weights)),
        ("entropy model: gone", DIFFER, drop(entropy)),
        ("weights: another file's", REJECT, mixed_up),
        ("config: gone", REJECT, drop(facts)),
        ("config: not json", REJECT, edit(facts, lambda _, r: r.choice(NO_JSON))),
        ("config: cut short", REJECT, rewrite(facts, Change("", REJECT, damage.cut))),
        ("config: a setting of the model", REJECT, edit(facts, lambda v, r: model(r, v["model"]))),
        ("config: a key that there is not", REJECT, edit(facts, foreign_key)),
        ("config: code for a family", REJECT, set_to("family", "os", "os.path", "soak.corpus", "../x", "", None, 5)),
        ("config: another identity", REJECT, set_to("model_id", "flexible-000000000000", "", None)),
        ("config: other hashes", REJECT, set_to("weights_sha256", "0" * 64, "", None)),
        ("config: another entropy model's hash", REJECT, set_to("entropy_sha256", "0" * 64, "", None)),
        ("config: a later format", REJECT, set_to("format", 2, 10**9, "1", None, -1, 1.5, True)),
        ("config: of something else", REJECT, set_to("model_type", "bert", None, 3)),
        ("config: its model no mapping", REJECT, set_to("model", [], "x", None, {}, {"name": "flexible"})),
        ("config: reads the environment", REJECT, edit(facts, lambda v, r: v["model"].update(norm="${oc.env:PATH}"))),
        ("config: another notation", EQUAL, edit(facts, lambda v, r: v, indent=None)),
        ("config: a key more", EQUAL, set_to("note", "x", 1, None)),
        ("config: another version of vtok", EQUAL, set_to("vtok_version", "9.9.9")),
        ("card: other words", EQUAL, rewrite("README.md", Change("", EQUAL, damage.noise))),
        ("training.yaml: other words", EQUAL, rewrite("training.yaml", Change("", EQUAL, damage.noise))),
        ("code and a pickle beside the weights", EQUAL, bomb),
    ]
    return in_folders("export", corpus.export, acts, seed)


# checkpoints


def checkpoint_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """A checkpoint goes on as it was written or not at all."""
    last, config = "checkpoints/last.ckpt", "config.yaml"

    def other_rate(data: bytes, draw: random.Random) -> bytes:
        return data.replace(b"lr: 0.0015", f"lr: 0.00{draw.randint(16, 99)}".encode())

    def other_width(data: bytes, draw: random.Random) -> bytes:
        return data.replace(b"  width: 16\n", f"  width: {draw.choice([8, 32])}\n".encode())

    acts: list[tuple[str, str, Act]] = [
        *[(f"checkpoint: {change.name}", change.rule, rewrite(last, change)) for change in BYTEWISE],
        ("checkpoint: a bit again", REJECT, rewrite(last, BYTEWISE[0])),
        ("checkpoint: gone", REJECT, drop(last)),
        ("config: another width than the weights'", REJECT, rewrite(config, Change("", REJECT, other_width))),
        ("config: another rate", DIFFER, rewrite(config, Change("", DIFFER, other_rate))),
        ("the other checkpoint damaged", EQUAL, rewrite("checkpoints/best.ckpt", BYTEWISE[2])),
        ("curves damaged", EQUAL, rewrite("metrics.jsonl", Change("", EQUAL, damage.noise))),
    ]
    return in_folders("checkpoint", corpus.run, acts, seed)
