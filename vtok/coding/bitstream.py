"""The `.vtok` container: a video as token ids, written and read front to back in constant memory.

    header | record | record | ... | footer          docs/formats.md describes every byte

Each record holds the ids of some steps of a stream and a checksum that continues the one before it; the footer holds
the totals and a sha256 of all that precedes it. What is inside a record is in `vtok.coding.records`, the header in
`vtok.coding.stream_header`.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import BinaryIO

import numpy as np

from vtok.coding.entropy import (
    StaticModel,
    check_ids,
    factors_of,
    pack,
    packed_bits,
    packed_bytes,
    take_varint,
    unpack,
    varint,
)
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.records import (
    MAX_GROUPS,
    MAX_RECORD,
    MODELS,
    Chunk,
    Coder,
    EntropyModel,
    Record,
    bytes_of,
    check_entropy,
    coder_of,
    take_counts,
)
from vtok.coding.stream_header import (
    ASKED,
    CODINGS,
    FINGERPRINT_BYTES,
    KINDS,
    MAGIC,
    MAX_STEP_PIXELS,
    VERSION,
    DamagedFile,
    ForeignFile,
    Header,
    NewerVersion,
    OlderVersion,
    OtherBuild,
    TruncatedFile,
    VtokFileError,
    WrongModel,
    file_key,
    header_bytes,
    parse_header,
)
from vtok.types import Tokens

__all__ = [
    "ASKED",
    "CODINGS",
    "Chunk",
    "DamagedFile",
    "Footer",
    "ForeignFile",
    "Header",
    "MAGIC",
    "NewerVersion",
    "OlderVersion",
    "OtherBuild",
    "PriorModel",
    "Reader",
    "StaticModel",
    "TruncatedFile",
    "VtokFileError",
    "Writer",
    "WrongModel",
    "factors_of",
    "file_key",
    "packed_bits",
    "read_footer",
]

END_MAGIC = b"VTKE"
END_BYTES = 1 + len(END_MAGIC)  # bytes of the totals, end mark
RECORD, PLAIN, FOOTER = 0x52, 0x50, 0x46  # "R", "P" (packed, whatever the file's coding), "F"
DIGEST_BYTES = 8  # of the sha256 at the end
MAX_HEADER = 1 << 16
StepCheck = Callable[[Sequence[int], int | None], None]  # tokens of each group, frames
FILES = {"static": "entropy.safetensors", "ar": "prior.safetensors"}


@dataclass(frozen=True)
class Footer:
    """Totals, known only at the end: frames, groups and tokens of the whole video, and the number of records."""

    frames: int
    groups: int
    tokens: int
    records: int


class Writer:
    """Writes a .vtok file front to back (the file needs no seek): `write` each step's tokens, then `close`.

    Memory is that of one record (1024 tokens or a little more), whatever the length of the video.
    Raises: ValueError where the static model or the prior is missing or does not fit the header.
    """

    def __init__(self, file: BinaryIO, header: Header, *, entropy: EntropyModel | None = None) -> None:
        check_entropy(header, entropy)
        self.header, self._file, self._coder = header, file, coder_of(header, entropy)
        self._sha, self._crc = hashlib.sha256(), 0
        self.bytes = 0  # written so far
        self._pending: list[Chunk] = []
        self._totals = {"frames": 0, "groups": 0, "tokens": 0, "records": 0}
        self._put(header_bytes(header))

    def write(self, tokens: Tokens | Chunk) -> None:
        """Add the tokens of one clip's next step, their groups numbered from 0."""
        chunk = tokens if isinstance(tokens, Chunk) else Chunk.from_tokens(tokens)
        check_ids(chunk.indices, self.header.codebook_sizes)
        most = max(chunk.counts, default=0)
        if self.header.budget and most > self.header.budget:
            raise ValueError(f"a group holds {most} tokens, more than the budget of {self.header.budget}")
        if len(chunk.counts) > MAX_GROUPS or not chunk.counts:
            raise ValueError(f"a step holds {len(chunk.counts)} groups; a record holds 1 to {MAX_GROUPS}")
        record = Record([(c.counts, c.frames) for c in self._pending])
        if not record.takes(chunk.counts, chunk.frames):
            self._flush()
        self._pending.append(chunk)

    def close(self, *, frames: int) -> Footer:
        """Write what is pending and the footer. `frames`: frames of the whole video, what decoding must return."""
        self._flush()
        footer = Footer(frames, self._totals["groups"], self._totals["tokens"], self._totals["records"])
        totals = bytes([FOOTER]) + b"".join(map(varint, astuple(footer)))
        self._sha.update(totals)
        self._file.write(totals + self._sha.digest()[:DIGEST_BYTES] + bytes([len(totals)]) + END_MAGIC)
        return footer

    def size_with(self, chunks: Iterable[Chunk], *, frames: int) -> int:
        """Bytes of the file if these chunks came next and nothing after them. It stays as it is."""
        twin, sink = copy.copy(self), _Counted(self.bytes)
        twin._file, twin._sha = sink, self._sha.copy()  # type: ignore[assignment]
        twin._pending, twin._totals = list(self._pending), dict(self._totals)
        twin._coder = self._coder.fork() if isinstance(self._coder, PriorStream) else self._coder
        for chunk in chunks:
            twin.write(chunk)
        twin.close(frames=frames)
        return sink.size

    def most_with(self, steps: Iterable[tuple[Sequence[int], int | None]], *, frames: int) -> int:
        """Most bytes of the file if steps of (tokens of each group, frames) came next and nothing after them, whatever
        their ids are: what it takes with every open record packed, and no record is ever larger."""
        sizes, size, totals = self.header.codebook_sizes, self.bytes, dict(self._totals)
        records, record = [], Record([(c.counts, c.frames) for c in self._pending])
        for counts, step_frames in steps:
            if not record.takes(counts, step_frames):
                records.append(record)
                record = Record()
            record.add(counts, step_frames)
        for each in [*records, record]:
            if each.steps:
                body = len(each.head()) + packed_bytes(sizes, each.tokens)
                size += 1 + len(varint(body)) + body + 4
                totals["groups"] += len(each.counts)
                totals["tokens"] += each.tokens
                totals["records"] += 1
        totals["frames"] = frames
        return size + 1 + sum(len(varint(n)) for n in totals.values()) + DIGEST_BYTES + END_BYTES

    def _flush(self) -> None:
        chunks, self._pending = self._pending, []
        if not chunks:
            return
        record = Record([(c.counts, c.frames) for c in chunks])
        body, counts = record.head(), record.counts
        indices = np.concatenate([chunk.indices for chunk in chunks])
        tag, ids = RECORD, self._coder.encode(indices, counts)
        if packed_bytes(self.header.codebook_sizes, len(indices)) < len(ids):
            tag, ids = PLAIN, pack(indices, self.header.codebook_sizes)
        body += ids
        if len(body) > MAX_RECORD:
            raise ValueError(f"a step of {len(indices)} tokens needs {len(body)} bytes, a record holds {MAX_RECORD}")
        self._put(bytes([tag]) + varint(len(body)) + body)
        self._sha.update(bytes_of(indices))
        self._totals["groups"] += len(counts)
        self._totals["tokens"] += len(indices)
        self._totals["records"] += 1

    def _put(self, frame: bytes) -> None:
        # Each checksum goes on from the one before: records that were dropped, repeated or swapped are noticed too.
        self._crc = zlib.crc32(frame, self._crc)
        frame += self._crc.to_bytes(4, "little")
        self._sha.update(frame)
        self._file.write(frame)
        self.bytes += len(frame)


class _Counted:
    """A file that only counts."""

    def __init__(self, size: int) -> None:
        self.size = size

    def write(self, data: bytes) -> None:
        self.size += len(data)


class Reader:
    """Reads a .vtok file front to back (the file needs no seek): `header` at once, then iterate over its chunks.

    A record is checked before any of its ids is given out; the end of the iteration has checked the whole file, and
    `footer` is set. Call `expect` before the first chunk where the coding needs a model.
    Raises: ForeignFile, NewerVersion, OlderVersion, TruncatedFile, DamagedFile; WrongModel from `expect`.
    """

    def __init__(self, file: BinaryIO, *, name: str = "this file") -> None:
        self._file, self._name = file, name
        self._sha, self._crc = hashlib.sha256(), 0
        self._entropy: EntropyModel | None = None
        self._check_step: StepCheck | None = None
        self.footer: Footer | None = None
        self.header = self._read_header()

    def expect(
        self,
        model_id: str,
        weights_sha256: bytes,
        *,
        entropy: EntropyModel | None = None,
        check_step: StepCheck | None = None,
    ) -> None:
        """Require that the file was made with this model, and with `entropy`: the static model or the prior, whichever
        its coding needs. check_step: told the tokens of each group and the frames of every step before any of its ids
        is decoded; its ValueError says why no such step can be, and becomes a DamagedFile.

        Raises: WrongModel naming both; OtherBuild where the prior's probabilities come out otherwise here.
        """
        header, coding = self.header, self.header.coding
        if header.model_id != model_id:
            raise WrongModel(
                f"{self._name} was encoded with model {header.model_id}, but this is {model_id}; decode it with the "
                "model that encoded it"
            )
        if coding in KINDS and not isinstance(entropy, MODELS[coding]):
            raise WrongModel(
                f"{self._name} is coded with {KINDS[coding]} of {header.model_id}, which this copy of the model lacks "
                f"({FILES[coding]} in the export)"
            )
        entropy = entropy if coding in KINDS else None
        key, here = header.key, file_key(weights_sha256, entropy)
        cut = len(key) - (FINGERPRINT_BYTES if coding == "ar" else 0)
        if key[:cut] != here[:cut]:
            kind = f"{KINDS[coding]} or the weights" if coding in KINDS else "the weights"
            raise WrongModel(
                f"{self._name} was coded with another {model_id}: {kind} differ from this copy's (key "
                f"{key[:cut].hex()} there, {here[:cut].hex()} here); use the export that encoded it"
            )
        if key != here:
            assert isinstance(entropy, PriorModel)
            raise OtherBuild(
                f"{self._name} was coded where the prior's probabilities are {key[cut:].hex()}; on this machine "
                f"({entropy.build}) they are {here[cut:].hex()}, which would decode to other ids. Decode it on a build "
                "like the first, or encode the video again with coding 'static'"
            )
        self._entropy, self._check_step = entropy, check_step

    def __iter__(self) -> Iterator[Chunk]:
        if self.header.coding in KINDS and self._entropy is None:
            raise WrongModel(
                f"{self._name} is {self.header.coding}-coded: it can only be read with {self.header.model_id}'s own "
                f"model ({FILES[self.header.coding]}); call expect() first"
            )
        groups = tokens = records = 0
        coder = coder_of(self.header, self._entropy)
        while True:
            with self._damage():
                tag = self._read(1)
                if tag[0] == FOOTER:
                    self.footer = self._check_footer(groups=groups, tokens=tokens, records=records)
                    return
                body = self._read_record(tag)
                chunks = self._chunks(body, coder, packed=tag[0] == PLAIN)
            for chunk in chunks:
                self._sha.update(bytes_of(chunk.indices))
                groups += len(chunk.counts)
                tokens += len(chunk.indices)
                yield chunk
            records += 1

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Checksums stop accidents; what passes them and still cannot be is called damage too, never a bare error."""
        try:
            yield
        except VtokFileError:
            raise
        except (ValueError, ZeroDivisionError, IndexError, OverflowError) as error:
            raise DamagedFile(f"{self._name} is damaged: {error}") from error

    def _chunks(self, body: bytes, coder: Coder, *, packed: bool) -> list[Chunk]:
        header = self.header
        chunks, at = take_varint(body, 0)
        groups, at = take_varint(body, at)
        frames, at = take_varint(body, at)
        if chunks < 1 or groups < 1 or chunks * groups > MAX_GROUPS:
            raise DamagedFile(f"{self._name}: a record of {chunks} x {groups} groups")
        if frames * header.size[0] * header.size[1] > MAX_STEP_PIXELS:
            raise DamagedFile(
                f"{self._name}: a step of {frames - 1} frames of {header.size[0]}x{header.size[1]}, above the limit of "
                f"{MAX_STEP_PIXELS} pixels"
            )
        uniform, at = take_varint(body, at)
        if uniform:
            counts = [uniform - 1] * (chunks * groups)
        else:
            counts, at = take_counts(body, at, chunks * groups)
        # An id costs at least 2**-22 of a bit, so no count can be checked by the bytes alone: bound it first.
        if sum(counts) > MAX_RECORD or (header.budget and max(counts) > header.budget):
            raise DamagedFile(f"{self._name}: a record of {sum(counts)} tokens")
        if self._check_step is not None:
            for c in range(chunks):
                self._check_step(counts[c * groups : (c + 1) * groups], frames - 1 if frames else None)
        if packed:
            indices = unpack(body[at:], sum(counts), header.codebook_sizes)
            if isinstance(coder, PriorStream):
                coder.advance(indices, counts)
        else:
            indices = coder.decode(body[at:], counts)
        out, cursor = [], 0
        for c in range(chunks):
            here = tuple(counts[c * groups : (c + 1) * groups])
            out.append(Chunk(indices[cursor : cursor + sum(here)], here, frames - 1 if frames else None))
            cursor += sum(here)
        return out

    def _check_footer(self, *, groups: int, tokens: int, records: int) -> Footer:
        """The footer, whose tag is read; the end of the file is after it."""
        values, totals = [], bytes([FOOTER])
        for _ in fields(Footer):
            value, raw = self._read_varint()
            values.append(value)
            totals += raw
        footer = Footer(*values)
        self._sha.update(totals)
        if self._read(DIGEST_BYTES) != self._sha.digest()[:DIGEST_BYTES]:
            slipped = ", or the prior gave other ids here" if self.header.coding == "ar" else ""
            raise DamagedFile(f"{self._name} is damaged: its sha256 is not the one it states{slipped}")
        if (footer.groups, footer.tokens, footer.records) != (groups, tokens, records):
            raise DamagedFile(
                f"{self._name} is damaged: it states {footer}, but holds {groups} groups, {tokens} tokens"
            )
        if self._read(END_BYTES) != bytes([len(totals)]) + END_MAGIC:
            raise DamagedFile(f"{self._name} is damaged: its last {END_BYTES} bytes are not an end mark")
        if self._file.read(1):
            raise DamagedFile(f"{self._name} is damaged: there is more after its end mark")
        return footer

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise TruncatedFile(f"{self._name} is cut off: {size - len(data)} of the next {size} bytes are missing")
        return data

    def _read_varint(self) -> tuple[int, bytes]:
        raw = bytearray(self._read(1))
        while raw[-1] & 0x80 and len(raw) < 10:
            raw += self._read(1)
        return take_varint(bytes(raw), 0)[0], bytes(raw)

    def _read_record(self, tag: bytes) -> bytes:
        """The checked body of a record whose tag is read."""
        size, raw = self._read_varint()
        if tag[0] not in (RECORD, PLAIN) or size > MAX_RECORD:
            raise DamagedFile(f"{self._name} is damaged: a record starts with {tag.hex()} and claims {size} bytes")
        body = self._read(size)
        self._sha.update(self._checked(tag + raw + body))
        return body

    def _checked(self, frame: bytes) -> bytes:
        self._crc = zlib.crc32(frame, self._crc)
        stored = self._read(4)
        if stored != self._crc.to_bytes(4, "little"):
            raise DamagedFile(f"{self._name} is damaged: a checksum does not match")
        return frame + stored

    def _read_header(self) -> Header:
        magic = self._file.read(len(MAGIC))
        if magic != MAGIC:
            if magic and MAGIC.startswith(magic):
                raise TruncatedFile(f"{self._name} is cut off after {len(magic)} bytes")
            raise ForeignFile(f"{self._name} is not a .vtok file: it starts with {magic.hex() or 'nothing'}")
        version = self._read(1)
        if version[0] > VERSION:
            raise NewerVersion(
                f"{self._name} has format version {version[0]}, this vtok reads version {VERSION}; install a newer "
                "vtok (or the file is damaged)"
            )
        if version[0] < VERSION:
            raise OlderVersion(
                f"{self._name} has format version {version[0]}, this vtok reads version {VERSION}; encode the video "
                "again (or the file is damaged)"
            )
        with self._damage():
            size, raw = self._read_varint()
            if size > MAX_HEADER:
                raise DamagedFile(f"{self._name} is damaged: its header claims {size} bytes")
            body = self._read(size)
            self._sha.update(self._checked(magic + version + raw + body))
            return parse_header(body)


def read_footer(file: BinaryIO, *, name: str = "this file") -> Footer:
    """The totals of a seekable .vtok file from its last bytes, without reading (or checking) its records."""
    length = file.seek(0, 2)
    if length < len(MAGIC) + END_BYTES:
        raise TruncatedFile(f"{name} is cut off after {length} bytes")
    file.seek(length - END_BYTES)
    tail = file.read(END_BYTES)
    size = tail[0] + DIGEST_BYTES + END_BYTES
    if tail[1:] != END_MAGIC or size + len(MAGIC) > length:
        raise TruncatedFile(f"{name} does not end with a footer: it was cut off or never finished")
    file.seek(length - size)
    totals = file.read(tail[0])
    values, at = [], 1
    try:
        for _ in fields(Footer):
            value, at = take_varint(totals, at)
            values.append(value)
    except ValueError as error:
        raise DamagedFile(f"{name} is damaged: {error}") from error
    if totals[0] != FOOTER or at != len(totals):
        raise DamagedFile(f"{name} is damaged: its footer is not where its end mark says")
    return Footer(*values)
