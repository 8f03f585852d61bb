"""Changed `.vtok` files: damaged ones, and ones whose checksums are right and whose words are lies."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soak import damage
from soak.corpus import Corpus
from soak.damage import DIFFER, REJECT, Case, Change
from vtok.coding import bitstream, records
from vtok.coding.entropy import take_varint, varint
from vtok.coding.stream_header import MAGIC, VERSION, Header, header_bytes

MANY = 1 << 40


@dataclass(frozen=True)
class Record:
    """A record's tag and body as in the file, and the bytes of its ids that the final sha256 covers."""

    tag: int
    body: bytes
    ids: bytes


@dataclass(frozen=True)
class Parts:
    """A .vtok file in pieces. header: what stands before the header's checksum. totals: of the footer."""

    header: bytes
    records: tuple[Record, ...]
    totals: tuple[int, ...]

    def file(self) -> bytes:
        """The whole file, with every checksum right for what it now says."""
        crc, digest, out = 0, hashlib.sha256(), bytearray()

        def put(frame: bytes) -> None:
            nonlocal crc
            crc = zlib.crc32(frame, crc)
            frame += crc.to_bytes(4, "little")
            digest.update(frame)
            out.extend(frame)

        put(self.header)
        for record in self.records:
            put(bytes([record.tag]) + varint(len(record.body)) + record.body)
            digest.update(record.ids)
        totals = bytes([bitstream.FOOTER]) + b"".join(map(varint, self.totals))
        digest.update(totals)
        ends = digest.digest()[: bitstream.DIGEST_BYTES] + bytes([len(totals)]) + bitstream.END_MAGIC
        return bytes(out) + totals + ends


def parts_of(data: bytes, chunks: list[records.Chunk]) -> Parts:
    """The pieces of a sound file of one record, whose ids are those of `chunks`."""
    size, at = take_varint(data, len(MAGIC) + 1)
    end = at + size
    header, at = data[:end], end + 4
    tag = data[at]
    size, at = take_varint(data, at + 1)
    body, at = data[at : at + size], at + size + 4
    assert data[at] == bitstream.FOOTER, "more than one record"
    totals, at = [], at + 1
    for _ in range(4):
        value, at = take_varint(data, at)
        totals.append(value)
    ids = b"".join(records.bytes_of(chunk.indices) for chunk in chunks)
    parts = Parts(header, (Record(tag, body, ids),), tuple(totals))
    assert parts.file() == data
    return parts


def lies(parts: Parts, header: Header) -> list[tuple[str, str, Parts]]:
    """(what, rule, file) of lies that no checksum can tell."""

    def head(**changes: Any) -> Parts:
        lie = object.__new__(Header)
        for name, value in {**vars(header), **changes}.items():
            object.__setattr__(lie, name, value)
        return replace(parts, header=header_bytes(lie))

    def body(new: bytes) -> Parts:
        record = parts.records[0]
        return replace(parts, records=(replace(record, body=new),))

    def totals(**changes: int) -> Parts:
        names = ("frames", "groups", "tokens", "records")
        return replace(parts, totals=tuple(changes.get(name, value) for name, value in zip(names, parts.totals)))

    first = parts.records[0].body
    frames, groups, tokens, records = parts.totals
    claimed = MAGIC + bytes([VERSION])
    return [
        ("frames of 2^20 x 2^20 pixels", REJECT, head(size=(1 << 20, 1 << 20))),
        ("frames of 2^40 rows", REJECT, head(size=(MANY, 16))),
        ("frames without rows", REJECT, head(size=(0, 16))),
        ("frames of another size", DIFFER, head(size=(17, 31))),
        ("no frames a second", REJECT, head(fps=type(header.fps)(0))),
        ("a codebook larger than the model's", REJECT, head(codebook_sizes=(header.codebook_sizes[0] + 1,))),
        ("a codebook of 2^62 ids", REJECT, head(codebook_sizes=(1 << 62,))),
        ("a codebook of one id", REJECT, head(codebook_sizes=(1,))),
        ("two ids a token", REJECT, head(codebook_sizes=header.codebook_sizes * 2)),
        ("ten thousand ids a token", REJECT, head(codebook_sizes=header.codebook_sizes * 10_000)),
        ("another model", REJECT, head(model_id="flexible-000000000000")),
        ("another key", REJECT, head(key=bytes(8))),
        ("another coding", REJECT, head(coding="static" if header.coding == "packed" else "packed")),
        ("a header of 4 GB", REJECT, replace(parts, header=claimed + varint(1 << 32))),
        ("a header of nothing", REJECT, replace(parts, header=claimed + varint(0))),
        ("a header that ends early", REJECT, replace(parts, header=claimed + varint(4) + parts.header[10:14])),
        ("no steps in a record", REJECT, body(varint(0) + first[1:])),
        ("2^40 steps in a record", REJECT, body(varint(MANY) + first[1:])),
        ("no groups in a step", REJECT, body(first[:1] + varint(0) + first[2:])),
        ("2^40 frames in a step", REJECT, body(first[:2] + varint(MANY) + first[3:])),
        ("2^23 tokens in a group", REJECT, body(first[:3] + varint(1 << 23) + first[4:])),
        ("2^60 tokens in a group", REJECT, body(first[:3] + varint(1 << 60) + first[4:])),
        ("an empty record", REJECT, body(b"")),
        ("a record without ids", REJECT, body(first[:4])),
        ("a record twice", REJECT, replace(parts, records=parts.records * 2)),
        ("no record", REJECT, replace(parts, records=())),
        ("more frames than its tokens make", REJECT, totals(frames=frames + 1 + 4 * groups)),
        ("2^60 frames", REJECT, totals(frames=1 << 60)),
        ("a frame less", DIFFER, totals(frames=frames - 1)),
        ("another number of groups", REJECT, totals(groups=groups + 1)),
        ("another number of tokens", REJECT, totals(tokens=tokens - 1)),
        ("another number of records", REJECT, totals(records=records + 1)),
        ("more after the end", REJECT, parts),
    ]


def vtok_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """Any flipped bit and any cut is noticed; what no checksum can tell is checked against the model."""
    originals = {f"{coding}.vtok": path.read_bytes() for coding, path in corpus.vtok.items()}
    told = {}
    for name, data in originals.items():
        path = corpus.vtok[name.removesuffix(".vtok")]
        header, chunks = read_chunks(corpus, path)
        told[name] = lies(parts_of(data, chunks), header)

    def lie(name: str, number: int) -> Change:
        what, rule, parts = told[name][number]
        extra = b"VTKE" if what == "more after the end" else b""
        return Change(what, rule, lambda *_: parts.file() + extra)

    def changes(name: str) -> list[Change]:
        bytewise = [
            Change("a bit", REJECT, damage.flip),
            Change("a bit again", REJECT, damage.flip),
            Change("bits", REJECT, lambda d, r: damage.flip(d, r, count=r.randint(2, 9))),
            Change("cut short", REJECT, damage.cut),
            Change("bytes removed", REJECT, damage.remove),
            Change("bytes inserted", REJECT, damage.insert),
            Change("an eighth of it overwritten", REJECT, damage.overwrite),
            Change("bytes after its end", REJECT, lambda d, r: d + r.randbytes(r.randint(1, 20))),
            Change("twice", REJECT, lambda d, _: d + d),
            Change("foreign", REJECT, damage.foreign),
            Change("under another name", damage.EQUAL, lambda d, _: d),
        ]
        draw = random.Random(next(turns))
        return bytewise + [lie(name, n) for n in draw.sample(range(len(told[name])), 8)]

    turns = iter(range(seed, 1 << 62))
    return damage.in_turn("vtok", originals, changes, seed)


def read_chunks(corpus: Corpus, path: Path) -> tuple[Header, list[records.Chunk]]:
    import vtok

    who = vtok.load(str(corpus.export)).shipped
    with open(path, "rb") as file:
        reader = bitstream.Reader(file, name=path.name)
        reader.expect(who.model_id, who.weights_sha256, entropy=who.coder(reader.header.coding))
        return reader.header, list(reader)
