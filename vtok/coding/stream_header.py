"""What a `.vtok` file says before its first token, and the errors of reading one. `docs/formats.md` has every byte."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vtok.coding.entropy import StaticModel, take_varint, varint
from vtok.coding.prior_coding import PriorModel

MAGIC = b"\x89VTOK\r\n\x1a"  # like PNG's: a high bit and both line endings, so that text-mode copies are noticed
VERSION = 4
CODINGS = ("packed", "static", "ar")
KINDS = {"static": "the static entropy model", "ar": "the prior"}  # what a coding needs beside the codebooks
ASKED = ("tokens", "bytes", "psnr_db", "lpips", "predicted_psnr_db")  # what lengths of time blocks can be chosen for
AHEAD = 8  # kinds of asking that the look-ahead is counted above
LIMITED, CHOSEN, NAMED = 4, 8, 16  # of the first byte, beside the coding
MAX_FRAME_PIXELS = 1 << 28  # 16384 x 16384, as of videos: what a frame may allocate, whatever a file says
MAX_STEP_PIXELS = 1 << 31  # frames x height x width of one step of a stream
KEY_BYTES, FINGERPRINT_BYTES = 8, 4  # small files are mostly header, and 2^32 keeps accidents out


class VtokFileError(ValueError):
    """A .vtok file that cannot be used."""


class ForeignFile(VtokFileError):
    """Not a .vtok file at all."""


class DamagedFile(VtokFileError):
    """A checksum, or a value that a checksum covers, is wrong."""


class TruncatedFile(DamagedFile):
    """The file ends before its footer does."""


class NewerVersion(VtokFileError):
    """Written by a later version of the format than this one reads."""


class OlderVersion(VtokFileError):
    """Written before version 4, by a vtok that was never released."""


class WrongModel(VtokFileError):
    """Encoded with another model, or with another entropy model."""


class OtherBuild(VtokFileError):
    """Coded with a prior whose probabilities come out otherwise on this machine."""


def file_key(weights_sha256: bytes, entropy: StaticModel | PriorModel | None) -> bytes:
    """8 bytes that say what a file is to be decoded with: the weights, and what its coding needs beside them.

    The start of a sha256 over both sha256; with a prior 4 bytes of that, then 4 of `PriorModel.fingerprint`.
    """
    digest = hashlib.sha256(weights_sha256 + (b"" if entropy is None else entropy.sha256)).digest()
    if isinstance(entropy, PriorModel):
        return digest[: KEY_BYTES - FINGERPRINT_BYTES] + entropy.fingerprint[:FINGERPRINT_BYTES]
    return digest[:KEY_BYTES]


@dataclass(frozen=True)
class Header:
    """What a .vtok file says before its first token.

    model_id: `<family>-<hash>`. key: 8 bytes from `file_key`.
    size: (height, width) in pixels of the frames that went in, and of those that come out. fps: frames per second.
    codebook_sizes: Q sizes. coding: "packed", "static" or "ar".
    budget: most tokens a group may hold; 0 where none was asked. tokens_per_second: Fraction(0) where none was asked.
    asked: what each group's own length was chosen for, one of ASKED; "" for lengths that follow from the two above.
    asked_value: how much of it. look_ahead: groups seen beyond the one decided, or None for the whole video.
    """

    model_id: str
    key: bytes
    size: tuple[int, int]
    fps: Fraction
    codebook_sizes: tuple[int, ...]
    coding: str = "packed"
    budget: int = 0
    tokens_per_second: Fraction = Fraction(0)
    asked: str = ""
    asked_value: Fraction = Fraction(0)
    look_ahead: int | None = 0

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise ValueError(f"coding={self.coding!r} is unknown; choose one of {', '.join(CODINGS)}")
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"key={self.key.hex()} has {len(self.key)} bytes, expected the {KEY_BYTES} of file_key")
        if self.size[0] < 1 or self.size[1] < 1 or self.fps <= 0 or self.tokens_per_second < 0 or self.budget < 0:
            raise ValueError(f"size={self.size}, fps={self.fps}, budget={self.budget} must be positive")
        pixels = self.size[0] * self.size[1]
        if pixels > MAX_FRAME_PIXELS:
            raise ValueError(
                f"size={self.size[0]}x{self.size[1]}: a frame has {pixels} pixels, above the limit of "
                f"{MAX_FRAME_PIXELS}; encode at a smaller --size"
            )
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes={self.codebook_sizes}: continuous tokens have no .vtok form")
        if self.asked and (self.asked not in ASKED or self.asked_value < 0):
            raise ValueError(f"asked={self.asked!r} {self.asked_value} must be one of {', '.join(ASKED)}, 0 or more")
        if self.asked and (self.budget or self.tokens_per_second):
            raise ValueError(f"asked={self.asked!r} goes without budget and tokens_per_second")


def header_bytes(header: Header) -> bytes:
    """All of a header but its checksum."""
    flags = CODINGS.index(header.coding)
    numbers = [*header.size, header.fps.numerator, header.fps.denominator]
    if header.asked:
        ahead = 0 if header.look_ahead is None else header.look_ahead + 1
        flags |= CHOSEN
        value = header.asked_value
        numbers += [ASKED.index(header.asked) + AHEAD * ahead, value.numerator, value.denominator]
    elif header.budget or header.tokens_per_second:
        flags |= LIMITED
        rate = header.tokens_per_second
        numbers += [header.budget, rate.numerator, rate.denominator]
    named = re.fullmatch(r"(.*)-([0-9a-f]{12})", header.model_id, re.DOTALL)
    name, digits = (named[1].encode(), bytes.fromhex(named[2])) if named else (header.model_id.encode(), b"")
    flags |= NAMED if named else 0
    body = bytes([flags]) + varint(len(name)) + name + digits + header.key
    body += b"".join(map(varint, (*numbers, *header.codebook_sizes)))
    return MAGIC + bytes([VERSION]) + varint(len(body)) + body


def parse_header(body: bytes) -> Header:
    """The header whose body this is. Raises: ValueError for what no header says."""
    flags = body[0]
    if flags & 3 >= len(CODINGS) or flags >= 2 * NAMED or flags & LIMITED and flags & CHOSEN:
        raise ValueError(f"the header begins with {flags}, which says nothing")
    size, at = take_varint(body, 1)
    model_id, at = body[at : at + size].decode(), at + size
    if flags & NAMED:
        model_id, at = f"{model_id}-{body[at : at + 6].hex()}", at + 6
    key, at = body[at : at + KEY_BYTES], at + KEY_BYTES
    numbers = []
    while at < len(body):
        value, at = take_varint(body, at)
        numbers.append(value)
    height, width, fps, per = numbers[:4]
    rest = numbers[4:]
    chosen: dict[str, Any] = {}
    if flags & (LIMITED | CHOSEN):
        first, rate, rest = rest[0], Fraction(rest[1], rest[2]), rest[3:]
        chosen = {"budget": first, "tokens_per_second": rate}
        if flags & CHOSEN:
            ahead, kind = divmod(first, AHEAD)
            if kind >= len(ASKED):
                raise ValueError(f"what was asked, {kind}, is unknown")
            chosen = {"asked": ASKED[kind], "asked_value": rate, "look_ahead": ahead - 1 if ahead else None}
    return Header(model_id, key, (height, width), Fraction(fps, per), tuple(rest), CODINGS[flags & 3], **chosen)
